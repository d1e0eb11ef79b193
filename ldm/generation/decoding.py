"""From images to latents and back, through the VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from ldm.generation.tiling import run_tiled
from ldm.runtime.batches import run_in_batches
from ldm.settings.model import ModelConfig

# Pixels of a call of the VAE's decoder: SD's has 256 channels at full size, 268 MB in fp32 for this many.
DECODE_PIXELS = 512 * 512
# Above this size, tiles are decoded unless the setting says otherwise. SD's decoder takes 10 GB for it, and 16 GB for
# 2,048 x 2,048, which do not fit into 24 GB beside the UNet.
TILED_ABOVE = 1536 * 1536


@dataclass(frozen=True)
class VAETiling:
    """Whether large images go through the VAE in tiles (ldm.generation.tiling).

    Attributes:
        tiled: None for images of more than TILED_ABOVE pixels.
        tile_size: Side of a tile in pixels, rounded down to the VAE's factor. With SD's VAE 1,024 take 4 GB and 512
            take 1 GB, but the colours of smaller tiles differ more.
    """

    tiled: bool | None = None
    tile_size: int = 1024

    def tile(self, config: ModelConfig, height: int, width: int) -> int | None:
        """Return the side of a tile in latents for an image of that size in pixels, None for no tiles."""
        tiled = height * width > TILED_ABOVE if self.tiled is None else self.tiled
        return max(4, self.tile_size // config.vae_factor) if tiled else None


AUTOMATIC = VAETiling()


def decode(
    decoder: Callable[[ms.Tensor], ms.Tensor],
    config: ModelConfig,
    latents: np.ndarray,
    batch_size: int | None = None,
    tiling: VAETiling = AUTOMATIC,
) -> np.ndarray:
    """Decode scaled latents (N, C, h, w) to images (N, H, W, 3) uint8, or (N, H, W, 1) if they are grey.

    Args:
        decoder: The VAE's decoder, in fp32.
        config: That of the model.
        latents: Of images of one size.
        batch_size: The most images in a call of the decoder, None for all. Large images take smaller batches.
        tiling: Which images are decoded in tiles.
    """
    height, width = (side * config.vae_factor for side in latents.shape[2:])
    unscaled = np.asarray(latents, np.float32) / np.float32(config.scale_factor)
    tile = tiling.tile(config, height, width)
    if tile is not None:
        return to_uint8(run_tiled(decoder, unscaled, tile, into=config.vae_factor))
    batch_size = max(1, min(batch_size or len(latents), DECODE_PIXELS // (height * width)))
    return to_uint8(run_in_batches(decoder, unscaled, batch_size))


def encode(
    encoder: Callable[[ms.Tensor], ms.Tensor], config: ModelConfig, images: np.ndarray, tiling: VAETiling = AUTOMATIC
) -> np.ndarray:
    """Encode images (N, C, H, W) in [-1, 1], one at a time, to scaled latents (N, C, h, w) float32.

    The latents are the mean of the VAE's distribution. diffusers and A1111 draw from it, with a standard deviation that
    is small beside the noise that follows.
    """
    tile = tiling.tile(config, *images.shape[2:])
    if tile is None:
        moments = run_in_batches(encoder, images, 1)
    else:
        moments = run_tiled(encoder, images, tile, out_of=config.vae_factor)
    return moments[:, : config.latent_channels] * np.float32(config.scale_factor)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images (N, C, H, W) in [-1, 1] to (N, H, W, C) uint8. Values outside are clipped."""
    return np.round(np.clip(images / 2 + 0.5, 0.0, 1.0) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
