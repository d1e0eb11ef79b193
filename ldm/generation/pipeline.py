"""Text to images, for every caller: prompts -> text states -> sampler -> latents -> autoencoder -> images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import mindspore as ms
import numpy as np
from tqdm import tqdm

from ldm.data.draws import draws
from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sampling import Sampling, check_sampling, out_of_memory
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.lora.formats import read_lora
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA, Strength
from ldm.lora.merge import check_compatible, match_shapes, merge_lora
from ldm.models.attention import use_flash_attention
from ldm.models.autoencoder import VAEDecode
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion, build_model
from ldm.runtime.batches import run_in_batches
from ldm.runtime.device import is_out_of_memory
from ldm.settings.model import ModelConfig
from ldm.tokenizer import Tokenizer
from ldm.weights.base_model import open_base_model
from ldm.weights.load import check_metadata, load_base_model, load_component
from ldm.weights.names import COMPONENTS

logger = logging.getLogger(__name__)

# Images are decoded so many pixels at a time: SD's decoder has activations of 256 channels at full size, 268 MB in
# fp32 for this many.
DECODE_PIXELS = 512 * 512


@dataclass(frozen=True)
class Generated:
    """One batch of images: their indices (N,), starting and final latents (N, C, h, w), images (N, H, W, 3) uint8."""

    indices: np.ndarray
    starting_latents: np.ndarray
    latents: np.ndarray
    images: np.ndarray


class Pipeline:
    """A model that draws images for prompts. Each network is compiled once for each shape and batch size it meets.

    The weights are read at every call, so a network that trains in between is sampled as it is then. The compute type
    of the networks is whatever they were set to; the autoencoder is meant to stay in fp32.
    """

    def __init__(self, model: StableDiffusion, tokenizer: Tokenizer | None = None) -> None:
        self.config = config = model.config
        self.schedule = NoiseSchedule.from_config(config)
        self.tokenizer = tokenizer or Tokenizer(config.pad_token, config.added_tokens)
        self.unet = model.model.diffusion_model
        self.text_encoder = model.cond_stage_model
        self.decoder = VAEDecode(model.first_stage_model)

    def starting_latents(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
        """Noise (N, *shape) float32: that of image i depends on the seed and i alone, whatever is drawn with it."""
        return np.stack([draws(seed, "starting latents", i).standard_normal(shape, np.float32) for i in indices])

    def encode_prompts(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Text states (N, 77, D) float32; texts given twice are encoded once.

        batch_size: texts a call of the network, None for all but at most 16. A last call with fewer is filled up.
        """
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer.encode(distinct)
        batch_size = batch_size or min(len(distinct), 16)
        states = run_in_batches(self.text_encoder, tokens, batch_size)
        place = {text: i for i, text in enumerate(distinct)}
        return states[[place[text] for text in texts]]

    def sample(
        self,
        context: np.ndarray,
        negative_context: np.ndarray | None,
        latents: np.ndarray,
        sampling: Sampling,
        draw_noise: Callable[[], np.ndarray] | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Final latents (N, C, h, w) of one batch from starting latents of that shape, both scaled.

        context, negative_context: (N, 77, D), the second None at scale 1. draw_noise: see samplers/ddim.py.
        Raises UserError where they are not finite any more.
        """
        denoise = GuidedDenoiser(self.unet, context, negative_context, sampling.scale)
        extra = {"eta": sampling.eta, "draw_noise": draw_noise} if sampling.sampler == "ddim" else {}
        final = SAMPLERS[sampling.sampler](
            denoise, latents, sampling.steps, self.schedule, self.config.prediction_type, callback=callback, **extra
        )
        if not np.isfinite(final).all():
            raise UserError(
                "the sampled latents are not finite: the checkpoint or the LoRA is broken, or, in fp16, overflows "
                "(try --precision fp32)"
            )
        return final

    def decode(self, latents: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Images (N, H, W, 3) uint8 of scaled latents (N, C, h, w).

        batch_size: images a call at most, None for all; fewer where they are large. A last call with fewer is filled
        up.
        """
        pixels = latents.shape[2] * latents.shape[3] * self.config.vae_factor**2
        batch_size = max(1, min(batch_size or len(latents), DECODE_PIXELS // pixels))
        scaled = np.asarray(latents, np.float32) / np.float32(self.config.scale_factor)
        images = run_in_batches(self.decoder, scaled, batch_size)
        return to_uint8(images)

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        seed: int,
        negative_prompts: Sequence[str] | None = None,
        starting_latents: np.ndarray | None = None,
        progress: bool = True,
    ) -> Iterator[Generated]:
        """Draw one image for each prompt, batch after batch, in order; image i comes from (seed, i).

        negative_prompts: one for each prompt, None for empty ones; not used at scale 1.
        starting_latents: (N, C, h, w), None to draw them from the seed.
        progress: a bar on the terminal.

        Raises UserError for sizes or steps that do not fit the model, and where memory does not suffice; ValueError for
        lists of unequal lengths.
        """
        shape = check_sampling(sampling, self.config)
        count = len(prompts)
        negative_prompts = [""] * count if negative_prompts is None else negative_prompts
        if len(negative_prompts) != count:
            raise ValueError(f"{count} prompts, but {len(negative_prompts)} negative prompts")
        if starting_latents is not None and starting_latents.shape != (count, *shape):
            raise ValueError(f"starting latents are {starting_latents.shape}, wanted {(count, *shape)}")
        batch_size = max(1, min(sampling.batch_size, count))
        batches = [np.arange(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        guided = sampling.scale != 1.0
        cut = self.tokenizer.cut_off(dict.fromkeys([*prompts, *(negative_prompts if guided else ())]))
        if cut:
            logger.warning('%d prompts are longer than 75 tokens and cut there; the first loses "%s"', len(cut), cut[0])
        texts = [
            [*(prompts[i] for i in indices), *(negative_prompts[i] for i in indices if guided)] for indices in batches
        ]
        # One size for all, so that the text encoder too is compiled once.
        text_batch_size = max((len(set(batch)) for batch in texts), default=1)
        with tqdm(total=len(batches) * sampling.steps, desc="compiling", unit="step", disable=not progress) as bar:

            def advance(step: int) -> None:
                bar.set_description("sampling", refresh=False)  # the first step of all took the compiling
                bar.update()

            for indices, batch_texts in zip(batches, texts):
                # The last batch is filled up with its last image, or its size would be compiled as well.
                padded = np.append(indices, np.full(batch_size - len(indices), indices[-1], indices.dtype))
                with _memory_is_named(self.config, shape, batch_size):
                    if starting_latents is None:
                        start = self.starting_latents(seed, padded.tolist(), shape)
                    else:
                        start = np.asarray(starting_latents[padded], np.float32)
                    states = self.encode_prompts(batch_texts, text_batch_size)
                    rows = np.minimum(np.arange(batch_size), len(indices) - 1)
                    context = states[rows]
                    negative_context = states[len(indices) + rows] if guided else None
                    final = self.sample(
                        context,
                        negative_context,
                        start,
                        sampling,
                        draw_noise=_noise_of_images(seed, padded.tolist(), shape),
                        callback=advance,
                    )
                    images = self.decode(final, batch_size)
                kept = slice(len(indices))
                yield Generated(indices, start[kept], final[kept], images[kept])


def load_model(
    config: ModelConfig,
    checkpoint: str | Path,
    compute_dtype=ms.float32,
    unet_checkpoint: str | Path | None = None,
    flash_attention: bool = False,
    ema: bool = False,
    vae_checkpoint: str | Path | None = None,
) -> StableDiffusion:
    """The networks with a base checkpoint (a file or a diffusers folder) in them, UNet and text encoder computing in
    `compute_dtype`, the autoencoder in fp32 (in fp16 it is known to overflow).

    unet_checkpoint, vae_checkpoint: whose UNet and VAE take the place of the checkpoint's, see load_component.
    flash_attention: Ascend's, in the UNet (see ldm.runtime.device.check_flash_attention). ema: take the checkpoint's
    moving averages of the UNet.

    Raises UserError for a file that does not fit the configuration or says that it was made for another, see
    ldm.weights.load.
    """
    check_metadata(open_base_model(checkpoint).metadata, config, checkpoint)
    model = build_model(config, random=False)
    # A base may be without a VAE where another one is given.
    components = [component for component in COMPONENTS if component != "vae" or vae_checkpoint is None]
    logger.info("%s: %s", checkpoint, load_base_model(model, checkpoint, components, ema=ema))
    for component, path in (("unet", unet_checkpoint), ("vae", vae_checkpoint)):
        if path is not None:
            logger.info("%s: %s", path, load_component(model, path, component, config))
    set_compute_dtype(model.model, compute_dtype)
    set_compute_dtype(model.cond_stage_model, compute_dtype)
    if flash_attention:
        use_flash_attention(model.model, True)
    return model


def apply_lora(
    model: StableDiffusion,
    config: ModelConfig,
    path: str | Path,
    weight: float | Strength = 1.0,
    unet: bool | None = None,
    text_encoder: bool | None = None,
) -> LoRA:
    """Merge a LoRA of any known format into the weights and return what was merged; weight 0 leaves them as they are,
    bit for bit.

    weight: of the whole, or Strength with one for each network.
    unet, text_encoder: None applies the part if the file has it, False leaves it out, True demands it.

    Raises UserError as choose_lora.
    """
    chosen = choose_lora(config, path, unet, text_encoder)
    apply_chosen(model, chosen, path, weight)
    return chosen


def apply_chosen(model: StableDiffusion, chosen: LoRA, path: str | Path, weight: float | Strength = 1.0) -> None:
    """Merge what choose_lora found at `path`."""
    match = merge_lora(model, chosen, weight, str(path))
    logger.info("%s: %s; weight %s", path, match, Strength.from_value(weight))


def choose_lora(
    config: ModelConfig, path: str | Path, unet: bool | None = None, text_encoder: bool | None = None
) -> LoRA:
    """What of a LoRA file is applied to a model; see apply_lora.

    Raises UserError for a file that is no LoRA or was made for another model, a part that is demanded and not there,
    and where nothing is left to apply.
    """
    state = read_lora(path, config)
    check_compatible(state, config, str(path))
    layers = {}
    for component, label, wanted, flag in (
        ("unet", "UNet", unet, "lora_ft_unet"),
        ("text_encoder", "text encoder", text_encoder, "lora_ft_text_encoder"),
    ):
        part = state.only(component).layers
        if wanted and not part:
            raise UserError(f"{path} has no {label} part ({state}): leave out {flag}, or choose another file")
        if wanted is False and part:
            logger.warning("%s: its %s part, %d layers, is left out (%s False)", path, label, len(part), flag)
        elif part:
            layers.update(part)
    if not layers:
        raise UserError(f"{path}: nothing of it would be applied ({state}): leave out lora_ft_... False")
    chosen = LoRA(layers, state.metadata)
    match_shapes(BaseModules(config).shapes, chosen).require(str(path))
    return chosen


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) around [-1, 1] -> (N, H, W, 3) uint8, rounded to the nearest."""
    return np.round(np.clip(images / 2 + 0.5, 0.0, 1.0) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


@contextmanager
def _memory_is_named(config: ModelConfig, shape: tuple[int, int, int], batch_size: int) -> Iterator[None]:
    """Turn a failed allocation, numpy's or MindSpore's, into a UserError; every other error goes on as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, shape, batch_size) from error


def _noise_of_images(seed: int, indices: list[int], shape: tuple[int, int, int]) -> Callable[[], np.ndarray]:
    """DDIM's fresh noise, from a generator for each image, so that the batch size does not matter."""
    generators = [draws(seed, "ddim noise", i) for i in indices]
    return lambda: np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
