"""Load images as arrays of a given size in [-1, 1], sRGB or grey: the part that is trained, scaled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, features

from ldm.data.buckets import Box, Size, crop_box
from ldm.data.decoding import BrokenImage, decoded
from ldm.data.sources.rows import ImageFile
from ldm.data.upright import WHITE, Color, ImageNotes, upright_rgb
from ldm.errors import UserError

# The version of what is made of an image, here and in ldm.data.upright and ldm.data.decoding, which the keys of cached
# latents hold: raise it with every change of pixels.
IMAGE_CODE = f"1, {'with' if features.check('littlecms2') else 'without'} colour profiles"


class Placement(NamedTuple):
    """The part of an image that is trained. An image and its mask share it."""

    image_size: Size  # of the whole image, upright
    box: Box  # the part
    size: Size  # that the part is scaled to
    mirrored: bool


def load_image(
    file: ImageFile | Path,
    size: int | Size,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
    alpha_color: Color = WHITE,
    notes: ImageNotes | None = None,
) -> np.ndarray:
    """Return an image as float32 (C, height, width) in [-1, 1]: its largest part of the wanted shape, scaled.

    Args:
        size: Width and height in pixels, or the side of a square.
        channels: 3 for RGB, 1 for grey, the luma of ITU-R 601.
        random_crop: Takes the part from a random place along the longer side instead of the middle.
        random_flip: Mirrors half of the images horizontally.
        rng: Generator for both, needed if either is on.
        scale: Pixels of the result for a pixel of the image: see `ldm.data.buckets.crop_box`.
        alpha_color: Stands behind transparent parts.
        notes: Takes notes of the image: see `upright_rgb`.

    Raises:
        UserError: The file is missing, is not an image, is damaged or too large.
    """
    return load_placed(
        file, size, channels=channels, random_crop=random_crop, random_flip=random_flip, rng=rng, scale=scale,
        alpha_color=alpha_color, notes=notes,
    )[0]  # fmt: skip


def load_placed(
    file: ImageFile | Path,
    size: int | Size,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
    alpha_color: Color = WHITE,
    notes: ImageNotes | None = None,
) -> tuple[np.ndarray, Placement]:
    """Return what `load_image` does, and which part of the image it is."""
    try:
        with decoded(file, partial(upright_rgb, alpha_color=alpha_color, notes=notes, file=file)) as image:
            placement = place(
                image.size, size, random_crop=random_crop, random_flip=random_flip, rng=rng, scale=scale
            )  # fmt: skip
            if image.size == placement.size:
                part = image
            else:
                # Cropped and scaled in one step: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
                part = image.resize(placement.size, Image.Resampling.BICUBIC, box=placement.box)
    except BrokenImage as error:
        raise UserError(f"{error}; replace it or remove its row") from None
    if placement.mirrored:
        part = ImageOps.mirror(part)
    if channels == 1:
        part = part.convert("L")
    pixels = np.atleast_3d(np.asarray(part, dtype=np.float32)).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0), placement


def place(
    image_size: Size,
    size: int | Size,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
) -> Placement:
    """Choose the part of an image that is trained. The arguments are those of `load_image`.

    Args:
        image_size: Width and height of the whole image, upright.
    """
    if (random_crop or random_flip) and rng is None:
        raise TypeError("random_crop and random_flip need rng")
    target = (size, size) if isinstance(size, int) else size
    box = crop_box(image_size, target, scale, rng if random_crop else None)
    if image_size == target:  # with a scale above 1 as well
        box = (0, 0, *image_size)
    mirrored = rng is not None and random_flip and bool(rng.random() < 0.5)
    return Placement(image_size, box, target, mirrored)
