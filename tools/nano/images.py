"""The images that the nano model is trained on, and their augmentation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ldm.data.dataset import Row, read_image_text_csv
from ldm.data.upright import open_rgb

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
STYLES = ("emoji_fluent_hc", "emoji_twemoji")
LINE_ART = "emoji_line_art"  # the demo's data set, which tools.nano.choose_concepts writes
# More styles of the same concepts, whose images of every concept may be used for training.
MORE_STYLES = ("noto-v1", "emojione", "emojione-monotone", "fxemoji", "notomono", "notomono-bold")


class CaptionedImage(NamedTuple):
    """An image in memory."""

    name: str  # of the file, the same for a concept in every style
    caption: str
    pixels: np.ndarray  # (64, 64, 3) uint8


def read_rows(style: str, split: str | None = None) -> list[Row]:
    """Return the rows of a bundled data set, such as "emoji_noto" and "train", or of one of MORE_STYLES."""
    return read_image_text_csv(DATASETS / "styles" / style if split is None else DATASETS / style / split).rows


def read_images(style: str, split: str | None = None) -> list[CaptionedImage]:
    """Return the images of a bundled data set, or of one of MORE_STYLES."""
    return [
        CaptionedImage(row.path.name, row.caption, np.asarray(open_rgb(row.path))) for row in read_rows(style, split)
    ]


def categories() -> dict[str, tuple[str, str]]:
    """Return {file name: (category, subcategory)} of the images of Noto."""
    with open(DATASETS / "emoji_noto" / "meta.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: (row["category"], row["subcategory"]) for row in csv.DictReader(file)}


def to_network(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 pixels (N, H, W, 3) to fp32 (N, 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1.0


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Convert images (N, 3, H, W) in about [-1, 1] to uint8 pixels (N, H, W, 3)."""
    return np.clip(np.rint((images.transpose(0, 2, 3, 1) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def shift(pixels: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    """Shift an image by up to `most` pixels in each direction, filled with white."""
    size = pixels.shape[0]
    padded = np.full((size + 2 * most, size + 2 * most, 3), 255, np.uint8)
    padded[most:-most, most:-most] = pixels
    y, x = rng.integers(0, 2 * most + 1, 2)
    return padded[y : y + size, x : x + size]


def vary_colours(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permute the colour channels at random, so that all hues are equally frequent."""
    return pixels[..., rng.permutation(3)]


def blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur an image by 0.3 to 1.5 pixels, as the small decoder does."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))))


def line_art(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the edges of an image as black lines on white, and fill its dark parts in half of the cases."""
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
    low, high = (np.asarray(image.filter(kind(3)), int) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    black = (high - low).max(axis=2) > rng.uniform(20, 80)
    if rng.random() < 0.5:
        black |= np.asarray(image.convert("L")) < rng.uniform(60, 130)
    drawn = Image.fromarray(np.where(black, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))
    return np.repeat(np.asarray(drawn)[..., None], 3, axis=2)


def turn(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate an image by up to 12 degrees and scale it by 0.85 to 1.15, filled with white."""
    angle, scale, centre = np.deg2rad(rng.uniform(-12, 12)), 1 / rng.uniform(0.85, 1.15), (pixels.shape[0] - 1) / 2
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = (cos, -sin, centre - cos * centre + sin * centre, sin, cos, centre - sin * centre - cos * centre)
    return np.asarray(
        Image.fromarray(pixels).transform(
            (pixels.shape[1], pixels.shape[0]), Image.AFFINE, matrix, Image.BILINEAR, fillcolor=(255, 255, 255)
        )
    )
