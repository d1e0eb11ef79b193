"""Preprocessing of images for the networks that score them, as in the reference implementations."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.errors import UserError

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
CLIP_PREPROCESSING = ("openai", "squash")
STRIP = 20  # images this many times as long as wide are cropped before they are scaled


def plain_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with Pillow's `convert`, as pytorch-fid does.

    An alpha channel is dropped, 16 bits become 8 as the installed Pillow decides, and the EXIF orientation is ignored.
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def inception_input(image: Image.Image, size: int = 299) -> np.ndarray:
    """Return an RGB image as (3, size, size) float32 in [-1, 1], scaled bilinearly as pytorch-fid does.

    The scaling is torch's `interpolate(mode="bilinear", align_corners=False)`. It uses two neighbours per axis at any
    size, so an image that is made smaller is not smoothed.
    """
    pixels = np.asarray(image)
    (top, bottom, y_weight), (left, right, x_weight) = (_neighbours(side, size) for side in pixels.shape[:2])

    # Only the neighbours are converted to float: they are a small part of a large image.
    def column(x: np.ndarray) -> np.ndarray:
        upper, lower = (pixels[np.ix_(y, x)] / np.float32(255.0) for y in (top, bottom))
        return _interpolate(upper, lower, y_weight[:, None, None])

    scaled = _interpolate(column(left), column(right), x_weight[None, :, None])
    return np.ascontiguousarray((2.0 * scaled - 1.0).transpose(2, 0, 1))


def _neighbours(old_size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two old pixels next to each of the `new_size` pixels, and the weight of the second."""
    # In float32 and rounded once, as torch's compiled form computes it (a fused multiply-add): the product of two
    # float32 is exact in float64. Rounded twice, a position is off by half a unit in its last place, a pixel by 5e-6.
    scale = np.float64(np.float32(old_size) / np.float32(new_size))
    position = np.maximum((scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32), np.float32(0.0))
    low = np.minimum(position.astype(np.int64), old_size - 1)
    return low, np.minimum(low + 1, old_size - 1), position - low.astype(np.float32)


def _interpolate(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return low * (np.float32(1.0) - weight) + high * weight


def clip_input(image: Image.Image, size: int = 224, preprocessing: str = "openai") -> np.ndarray:
    """Return an RGB image as (3, size, size) float32, normalised by CLIP's mean and standard deviation.

    Args:
        preprocessing: "openai" scales the shorter side to `size` (bicubic, smoothed) and crops the centre. "squash"
            scales the whole image to a square whatever its shape, as mindone does.

    Raises:
        UserError: The preprocessing is unknown.
    """
    width, height = image.size
    if preprocessing == "openai":
        short = min(width, height)
        if max(width, height) > STRIP * short:
            # The same result from the centre alone: scaled whole, a strip of 1 x 20,000 pixels takes 4 GB.
            box = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
            image, width, height = image.resize((size, size), Image.Resampling.BICUBIC, box=box), short, short
        width, height = (max(size, int(size * side / short)) for side in (width, height))
    elif preprocessing == "squash":
        width = height = size
    else:
        raise UserError(f"preprocessing '{preprocessing}' is unknown: choose from {', '.join(CLIP_PREPROCESSING)}")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Python rounds half to even, as torchvision's centre crop does.
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / np.float32(255.0)
    return np.ascontiguousarray(((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1))


def nano_input(image: Image.Image, size: int = 64) -> np.ndarray:
    """Return an RGB image as (3, size, size) float32 in [-1, 1], squashed to a square as the nano CLIP expects."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1.0)
