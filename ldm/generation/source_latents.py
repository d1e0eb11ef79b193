"""The latents that a batch begins from: those of its source images, or of the first pass of a hires fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import mindspore as ms
import numpy as np
from PIL import Image

from ldm.diffusion.sampling import Sampling, latent_shape
from ldm.generation.decoding import VAETiling, decode, encode
from ldm.generation.denoising import SourceLatents
from ldm.generation.image_files import as_image
from ldm.generation.requests import ImageRequest
from ldm.generation.source_image import FittedSource, first_step, fit
from ldm.settings.model import ModelConfig

Network = Callable[[ms.Tensor], ms.Tensor]


class ImageEncoder:
    """Encodes images, and keeps the latents of the last ones, which the next batch often begins from too.

    Args:
        vae: The VAE's encoder, in fp32.
        config: That of the model.
    """

    KEPT = 8

    def __init__(self, vae: Network, config: ModelConfig) -> None:
        self.vae, self.config = vae, config
        self._latents: dict[tuple[int, VAETiling], tuple[np.ndarray, np.ndarray]] = {}  # with the image, for its id

    def encode(self, images: Sequence[np.ndarray], tiling: VAETiling) -> np.ndarray:
        """Encode images (C, H, W) in [-1, 1], each array once, to scaled latents (N, C, h, w) float32."""
        return np.stack([self._encode(image, tiling) for image in images])

    def _encode(self, image: np.ndarray, tiling: VAETiling) -> np.ndarray:
        key = id(image), tiling
        if key not in self._latents:
            while len(self._latents) >= self.KEPT:
                del self._latents[next(iter(self._latents))]  # the oldest
            self._latents[key] = image, encode(self.vae, self.config, image[None], tiling)[0]
        return self._latents[key][1]


def encode_sources(
    encoder: ImageEncoder, config: ModelConfig, requests: Sequence[ImageRequest], sampling: Sampling, tiling: VAETiling
) -> tuple[SourceLatents | None, list[FittedSource]]:
    """Fit the source images of a batch to its size and encode them.

    An inpainting model without a mask repaints everything. Without an image too, it is given a grey one.

    Returns:
        What the batch begins from, None for noise alone, and the fitted images.

    Raises:
        UserError: An image cannot be used (see ldm.generation.source_image.fit), or the strength leaves no step.
    """
    height, width = sampling.height or config.image_size, sampling.width or config.image_size
    origin = requests[0].origin
    if origin.source is None:
        if not config.is_inpainting:
            return None, []
        fitted = [grey_source(config.image_channels, height, width)] * len(requests)
        masks = _latent_masks(fitted, config)
        return SourceLatents(extra_channels=_extra_channels(encoder, fitted, masks, tiling)), []
    sources = [request.origin.source for request in requests]
    fitted = [fit(source, width, height, config.image_channels) for source in sources if source is not None]
    clean_latents = encoder.encode([source.pixels for source in fitted], tiling)
    has_mask = origin.source.mask is not None
    masks = _latent_masks(fitted, config)
    return (
        SourceLatents(
            # Where a part of the image stays, full strength begins with noise alone, as in diffusers.
            clean_latents=None if has_mask and origin.strength == 1.0 else clean_latents,
            first_step=first_step(sampling.num_inference_steps, origin.strength),
            kept_latents=clean_latents if has_mask and not config.is_inpainting else None,
            mask=masks,
            extra_channels=_extra_channels(encoder, fitted, masks, tiling) if config.is_inpainting else None,
        ),
        fitted,
    )


def enlarge(
    encoder: Network,
    decoder: Network,
    config: ModelConfig,
    latents: np.ndarray,
    sampling: Sampling,
    upscaler: str,
    tiling: VAETiling,
) -> np.ndarray:
    """Enlarge scaled latents (N, C, h, w) to the size of `sampling`: linearly, or as images by Lanczos' filter."""
    if upscaler == "latent":
        _, height, width = latent_shape(config, sampling.height, sampling.width)
        return np.stack([[_resized(channel, width, height) for channel in row] for row in latents])
    images = decode(decoder, config, latents, tiling=tiling)
    size = (sampling.width or config.image_size, sampling.height or config.image_size)
    larger = [np.atleast_3d(np.asarray(as_image(image).resize(size, Image.Resampling.LANCZOS))) for image in images]
    pixels = np.stack(larger).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return encode(encoder, config, np.ascontiguousarray(pixels), tiling)


def _resized(channel: np.ndarray, width: int, height: int) -> np.ndarray:
    # Enlarging, Pillow's filter is PyTorch's interpolate(mode="bilinear", align_corners=False).
    image = Image.fromarray(np.ascontiguousarray(channel, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _latent_masks(fitted: Sequence[FittedSource], config: ModelConfig) -> np.ndarray:
    return np.stack([source.repainted_latents(config.vae_factor) for source in fitted])


def _extra_channels(
    encoder: ImageEncoder, fitted: Sequence[FittedSource], masks: np.ndarray, tiling: VAETiling
) -> np.ndarray:
    """Return the mask (N, 1, h, w) and the latents of the images, grey where they are repainted: (N, 5, h, w)."""
    return np.concatenate([masks, encoder.encode([source.kept_pixels for source in fitted], tiling)], axis=1)


@lru_cache(maxsize=2)
def grey_source(channels: int, height: int, width: int) -> FittedSource:
    """Return the grey image that an inpainting model is given where there is none."""
    return FittedSource(np.zeros((channels, height, width), np.float32), None)
