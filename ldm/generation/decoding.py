"""From latents to images."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np

from ldm.runtime.batches import run_in_batches
from ldm.settings.model import ModelConfig

# Pixels of a call of the VAE's decoder: SD's has 256 channels at full size, 268 MB in fp32 for this many.
DECODE_PIXELS = 512 * 512


def decode(
    decoder: Callable[[ms.Tensor], ms.Tensor], config: ModelConfig, latents: np.ndarray, batch_size: int | None = None
) -> np.ndarray:
    """Decode scaled latents (N, C, h, w) to images (N, H, W, 3) uint8, or (N, H, W, 1) if they are grey.

    Args:
        decoder: The VAE's decoder, in fp32.
        config: That of the model.
        latents: Of images of one size.
        batch_size: The most images in a call of the decoder, None for all. Large images take smaller batches.
    """
    pixels = latents.shape[2] * latents.shape[3] * config.vae_factor**2
    batch_size = max(1, min(batch_size or len(latents), DECODE_PIXELS // pixels))
    unscaled = np.asarray(latents, np.float32) / np.float32(config.scale_factor)
    return to_uint8(run_in_batches(decoder, unscaled, batch_size))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images (N, C, H, W) in [-1, 1] to (N, H, W, C) uint8. Values outside are clipped."""
    return np.round(np.clip(images / 2 + 0.5, 0.0, 1.0) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
