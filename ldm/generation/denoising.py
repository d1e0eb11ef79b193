"""From noise to the latents of one batch, through the sampler and the UNet with its LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mindspore as ms
import numpy as np

from ldm.data.draws import draws
from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.on_device import DeviceSampling
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sampling import ZERO_TERMINAL_RESCALE, Sampling
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.generation.requests import ImageRequest
from ldm.generation.source_image import slerp
from ldm.lora.merged import MergedLoRA, MergedLoRAs
from ldm.settings.model import ModelConfig


def draw_starting_latents(requests: Sequence[ImageRequest], shape: tuple[int, int, int]) -> np.ndarray:
    """Draw noise (N, *shape) float32. That of an image depends on its seed and its noise index alone."""
    return np.stack([_starting_noise(request, shape) for request in requests])


def _starting_noise(request: ImageRequest, shape: tuple[int, int, int]) -> np.ndarray:
    noise = _generator(request, "starting latents").standard_normal(shape, np.float32)
    origin = request.origin
    if not origin.variation_strength:
        return noise
    other = _generator(replace(request, seed=origin.variation_seed), "starting latents")
    return slerp(noise, other.standard_normal(shape, np.float32), origin.variation_strength)


def draw_hires_noise(requests: Sequence[ImageRequest], shape: tuple[int, int, int]) -> np.ndarray:
    """Draw the noise (N, *shape) float32 of the second pass of a hires fix."""
    return np.stack([_generator(request, "hires noise").standard_normal(shape, np.float32) for request in requests])


def fresh_noise(
    requests: Sequence[ImageRequest], shape: tuple[int, int, int], purpose: str = "ddim noise"
) -> Callable[[], np.ndarray]:
    """Return what draws a sampler's fresh noise. Each image has its own generator, so the batch size has no effect."""
    generators = [_generator(request, purpose) for request in requests]
    return lambda: np.stack([generator.standard_normal(shape, np.float32) for generator in generators])


def _generator(request: ImageRequest, purpose: str) -> np.random.Generator:
    return draws(request.seed, purpose, request.noise_index)


@dataclass(frozen=True)
class SourceLatents:
    """The images that a batch begins from.

    Attributes:
        clean_latents: Scaled latents (N, C, h, w) that get the noise of the first step. None to begin from noise.
        first_step: Counted from 0.
        kept_latents: Scaled latents (N, C, h, w) that stay as they are where `mask` is 0. None keeps nothing.
        mask: (N, 1, h, w), 1 where the image is repainted.
        extra_channels: Of an inpainting model, see ldm.diffusion.guidance.
    """

    clean_latents: np.ndarray | None = None
    first_step: int = 0
    kept_latents: np.ndarray | None = None
    mask: np.ndarray | None = None
    extra_channels: np.ndarray | None = None

    def constrain(
        self, noise: np.ndarray, on_device: DeviceSampling | None
    ) -> Callable[[Any, float, float], Any] | None:
        """Return what puts the kept latents back after each step, with the starting noise at its level."""
        if self.kept_latents is None or self.mask is None:
            return None
        repainted = (self.mask == 1.0).astype(np.float32)
        kept_share = np.float32(1.0) - repainted
        kept: Any = self.kept_latents
        started: Any = noise
        shares: Any = repainted, kept_share
        if on_device is not None:
            kept, started = on_device.array(kept), on_device.array(noise)
            shares = ms.Tensor(repainted), ms.Tensor(kept_share)

        kept, started = kept * shares[1], started * shares[1]

        def put_back(latents: Any, alpha: float, sigma: float) -> Any:
            return latents * shares[0] + kept * float(alpha) + started * float(sigma)

        return put_back


def samples_from_noise_alone(config: ModelConfig, loras: Sequence[MergedLoRA]) -> bool:
    """Whether images are sampled on the schedule of zero_terminal_snr, because a merged LoRA was trained on it.

    The model must predict velocity: noise alone says nothing to a model that predicts noise.
    """
    return config.prediction_type == "v_prediction" and any(
        merged.lora.zero_terminal_snr and merged.applies_to_unet for merged in loras
    )


def denoise_batch(
    unet: Callable[..., ms.Tensor],
    config: ModelConfig,
    merged_loras: MergedLoRAs,
    text_embeddings: np.ndarray,
    negative_text_embeddings: np.ndarray | None,
    latents: np.ndarray,
    sampling: Sampling,
    draw_noise: Callable[[], np.ndarray] | None = None,
    callback: Callable[[int], None] | None = None,
    source: SourceLatents | None = None,
    on_device: DeviceSampling | None = None,
) -> np.ndarray:
    """Denoise one batch.

    Args:
        unet: The network, see ldm.diffusion.guidance.
        config: That of the model.
        merged_loras: The LoRAs that are merged into the UNet's weights. Each is applied at its steps.
        text_embeddings: Of the prompts, (N, 77 k, D) of k chunks.
        negative_text_embeddings: Of the negative prompts, (N, 77 k, D). None at guidance scale 1.
        latents: The scaled latents to start from, (N, C, h, w).
        sampling: How the images are sampled.
        draw_noise: Returns fresh noise (N, C, h, w), for samplers that add some.
        callback: Called with the number of each step that is done, from 1.
        source: The images to begin from. None for noise alone.
        on_device: Keeps the latents on the device from step to step. A step counts as done when its work is handed to
            the device. None computes all but the network with NumPy.

    Returns:
        The final scaled latents, (N, C, h, w) float32.

    Raises:
        UserError: They are not finite.
        ValueError: An inpainting model has no source with its extra channels.
    """
    if config.is_inpainting and (source is None or source.extra_channels is None):
        raise ValueError("an inpainting model needs a source with extra_channels (see ldm.generation.source_latents)")
    from_noise_alone = samples_from_noise_alone(config, merged_loras.loras)
    schedule = NoiseSchedule.from_config(config, zero_terminal_snr=from_noise_alone)
    rescale = sampling.guidance_rescale
    if rescale is None and from_noise_alone:
        rescale = ZERO_TERMINAL_RESCALE
    source = source or SourceLatents()
    guidance = (
        text_embeddings, negative_text_embeddings, sampling.guidance_scale, rescale or 0.0, source.extra_channels,
    )  # fmt: skip
    denoise: Callable[[Any, float], Any] = (
        GuidedDenoiser(unet, *guidance) if on_device is None else on_device.denoiser(*guidance)
    )
    sampler, steps = SAMPLERS[sampling.sampler], sampling.num_inference_steps
    done = source.first_step  # steps, not calls of the network: some samplers call it twice a step

    def denoise_with_loras(latents: Any, timestep: float) -> Any:
        # The shares of a sampling that begins from an image are those of the steps that are taken, as in diffusers.
        step, count = done - source.first_step, steps - source.first_step
        merged_loras.switch([merged.is_active(step, count, round(timestep)) for merged in merged_loras.loras])
        return denoise(latents, timestep)

    def end_step(step: int) -> None:
        nonlocal done
        done = step
        if callback is not None:
            callback(step)

    start: Any = latents
    clean_latents: Any = source.clean_latents
    draw: Callable[[], Any] | None = draw_noise
    if on_device is not None:
        start = on_device.array(latents)
        clean_latents = None if clean_latents is None else on_device.array(clean_latents)
        draw = None if draw_noise is None else on_device.drawn(draw_noise)
    try:
        final: Any = sampler(
            denoise_with_loras, start, steps, schedule, config.prediction_type, end_step,
            spacing=sampling.schedule, eta=sampling.eta, draw_noise=draw,
            first_step=source.first_step, clean_latents=clean_latents, constrain=source.constrain(latents, on_device),
        )  # fmt: skip
    finally:
        merged_loras.switch([True] * len(merged_loras.loras))
    if on_device is not None:
        final = final.asnumpy()
    if not np.isfinite(final).all():
        raise UserError(
            "the sampled latents are not finite: the checkpoint or the LoRA is broken, or fp16 overflows "
            "(try --precision fp32)"
        )
    return final
