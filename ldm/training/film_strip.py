"""Film strips: the images of one prompt from the beginning of a training to now, side by side in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.files.atomic import atomic_path
from ldm.files.paths import writing

MOST_IMAGES = 24
WIDEST = 8192  # pixels of a strip: 15 images of 512
LEAST_SIDE = 64  # pixels; images below it are enlarged by a whole number, so that a label fits above them
GAP = 4
BEFORE = "before"  # the label of step 0, where the width does not take "before training"


def enlarged(width: int, height: int) -> tuple[int, int]:
    """Return the size that an image of this size has in a strip."""
    factor = max(1, -(-LEAST_SIDE // min(width, height)))
    return width * factor, height * factor


def shown(count: int, width: int) -> list[int]:
    """Return which of `count` images are in a strip, where each has this width, as indices, the oldest first.

    These are all of them while the strip holds them. Then it is every second image, then every fourth and so on, from
    the first one, with the newest at the end: the first and the newest are always there, and an image that was left out
    does not come back.
    """
    most = max(2, min(MOST_IMAGES, (WIDEST - GAP) // (width + GAP)))
    stride = 1
    while len(_every(count, stride)) > most:
        stride *= 2
    return _every(count, stride)


def _every(count: int, stride: int) -> list[int]:
    return sorted({*range(0, count, stride), count - 1} if count else ())


def draw_strip(images: Sequence[tuple[int, Image.Image]], size: tuple[int, int], path: Path) -> None:
    """Write a strip.

    Args:
        images: The step of each image and the image, the oldest first.
        size: Width and height of each in the strip.
        path: The PNG.

    Raises:
        UserError: It cannot be written.
    """
    width, height = size
    font_size = max(12, min(28, width // 16))
    font = ImageFont.load_default(font_size)
    top = GAP + font_size + GAP
    strip = Image.new("RGB", (len(images) * (width + GAP) + GAP, top + height + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for i, (step, image) in enumerate(images):
        left = GAP + i * (width + GAP)
        draw.text((left, GAP // 2), _label(step, width, font), fill="black", font=font)
        strip.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
    with writing(path), atomic_path(path) as temporary:
        strip.save(temporary)


def _label(step: int, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    labels = (f"step {step:,}", f"{step:,}") if step else (f"{BEFORE} training", BEFORE)
    return next((label for label in labels if font.getlength(label) <= width), labels[-1])
