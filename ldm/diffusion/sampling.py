"""How images are sampled, and the checks that need no network. Nothing here imports MindSpore."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.settings.model import ModelConfig
from ldm.settings.sampler_names import AS_TRAINED, ETA_SAMPLERS, SCHEDULES

# The default batch size keeps a call of the network below this many pixels, 8 images of 512 x 512. A thousand images at
# once would exhaust the memory, and the system would end the process.
CALL_PIXELS = 8 * 512 * 512
SMALL_IMAGE_PIXELS = 128 * 128
SMALL_IMAGE_BATCH = 16
ZERO_TERMINAL_RESCALE = 0.7  # the guidance rescale of Lin et al. 2023 (arXiv 2305.08891), section 3.4


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        sampler: A name in ldm.diffusion.samplers.SAMPLERS.
        num_inference_steps: Steps of the sampler. Some call the UNet twice a step.
        guidance_scale: The scale of classifier-free guidance, 1 for none.
        eta: Share of fresh noise, 0 to 1, in the samplers that have one. None for the sampler's default, 0 in DDIM and
            1 in ancestral and SDE samplers.
        height: In pixels, None for the model's own.
        width: In pixels, None for the model's own.
        guidance_rescale: Share of the guided output that gets the standard deviation of the positive one, 0 to 1. None
            for ZERO_TERMINAL_RESCALE where a LoRA was trained with zero_terminal_snr, else 0.
        batch_size: Images in a call of the network, which gets twice as many rows with guidance. It changes speed and
            memory, and the images within rounding.
        schedule: The noise levels of the steps: a name in ldm.settings.sampler_names.SCHEDULES.
    """

    sampler: str = "dpm_solver_pp"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    guidance_rescale: float | None = None
    schedule: str = AS_TRAINED

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {self.eta}")
        if self.eta and SAMPLERS[self.sampler].eta is None:
            raise ValueError(f"the sampler {self.sampler} has no eta")
        if self.guidance_rescale is not None and not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must be from 0 to 1, not {self.guidance_rescale}")

    @property
    def is_guided(self) -> bool:
        """Whether the network gets the negative prompts too."""
        return self.guidance_scale != 1.0

    def fields(self) -> dict[str, Any]:
        """Return how the latents are sampled by the names of text_to_image.py's settings, for the text of a PNG."""
        eta = SAMPLERS[self.sampler].eta if self.eta is None else self.eta
        return {
            "sampler": self.sampler,
            **({} if self.schedule == AS_TRAINED else {"schedule": self.schedule}),
            "sampling_steps": self.num_inference_steps,
            "scale": self.guidance_scale,
            ("eta" if self.sampler in ETA_SAMPLERS else "ddim_eta"): eta or 0.0,
        }

    def check(self, config: ModelConfig, from_noise_alone: bool = False) -> None:
        """Raise UserError unless size, steps and schedule fit the model and the sampler.

        An image in fp32 must fit into this machine's memory too. `from_noise_alone`: whether the images begin at noise
        alone, as with LoRAs of zero_terminal_snr.
        """
        _, height, width = latent_shape(config, self.height, self.width)
        # Linux grants memory that it does not have, and ends the process that uses it without an exception.
        image_bytes = 4 * 3 * height * width * config.vae_factor**2
        if image_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise UserError(self.out_of_memory_message(config))
        SAMPLERS[self.sampler].check(self.num_inference_steps, config.timesteps, self.schedule, from_noise_alone)

    def out_of_memory_message(self, config: ModelConfig, enlarged: str = "") -> str:
        """Return an error message that names the settings which decide how much memory sampling takes.

        `enlarged`: what is said of a size that comes after H and W, as with a hires fix.
        """
        height, width = self.height or config.image_size, self.width or config.image_size
        size = f"batch_size {self.batch_size}, H {height}, W {width}{enlarged}"
        return f"not enough memory for {size}: lower one of them"


def latent_shape(config: ModelConfig, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of an image's latents, for a size in pixels or the model's own.

    Raises:
        UserError: The size is not a multiple of `config.size_multiple`.
    """
    multiple = config.size_multiple
    sizes = []
    for name, size in (("H", height), ("W", width)):
        size = config.image_size if size is None else size
        if size < multiple or size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"{name} is {size}: this model takes multiples of {multiple} pixels, {nearest} is nearest")
        sizes.append(size // config.vae_factor)
    return config.latent_channels, sizes[0], sizes[1]


def default_batch_size(images_per_prompt: int, height: int, width: int) -> int:
    """Return how many images a call of the network takes by default.

    As in mindone's script, these are the images of one prompt, but at least SMALL_IMAGE_BATCH small ones and at most
    as many as have CALL_PIXELS.
    """
    pixels = height * width
    if pixels <= SMALL_IMAGE_PIXELS:
        images_per_prompt = max(images_per_prompt, SMALL_IMAGE_BATCH)
    return max(1, min(images_per_prompt, CALL_PIXELS // pixels))
