"""Image files to the networks that score them: found in order, opened as their references open them, in batches."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.dataset import IMAGE_SUFFIXES
from ldm.data.transforms import BrokenImage, decoded
from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_file, is_folder, is_there, list_folder

logger = logging.getLogger(__name__)

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
CLIP_PREPROCESSING = ("openai", "squash")
STRIP = 20  # times as long as wide
_COUNTED = re.compile(r"(.*?)([0-9]+)\.[A-Za-z]+")


def find_images(path: str | Path) -> list[Path]:
    """An image, or the images of a folder sorted by name (see `_in_order`); of this project's output folder those in
    samples/.

    Raises UserError where there is none.
    """
    path = Path(path)
    if not is_there(path):
        raise UserError(f"{plain(path)} does not exist: give an image or a folder of images")
    if not is_folder(path):
        check_file(path, way="give an image or a folder of images")
        return [path]
    if is_file(path / "samples" / "prompts.txt"):
        path = path / "samples"
    names = list_folder(path)
    found = [name for name in names if name.lower().endswith((*IMAGE_SUFFIXES, ".pgm")) and not name.startswith(".")]
    if not found:
        below = next((name for name in names if _has_images(path / name)), None)
        hint = f"; there are some in {plain(path / below)}" if below else f" ({', '.join(IMAGE_SUFFIXES)})"
        raise UserError(f"{plain(path)} has no images in it{hint}")
    ordered = _in_order(found)
    if ordered != found:
        logger.warning("%s: the images are taken by the numbers in their names, %s before %s", path,
                       *next(pair for pair in zip(ordered, ordered[1:]) if pair[0] > pair[1]))  # fmt: skip
    return [path / name for name in ordered]


def _in_order(names: list[str]) -> list[str]:
    """Names that differ in a number at their end alone by that number, as their writer counted (2.png before 10.png);
    others as text is sorted, which is what lists of prompts go by.
    """
    counted = [_COUNTED.fullmatch(name) for name in names]
    if not all(counted) or len({match[1] for match in counted}) > 1:
        return names
    return sorted(names, key=lambda name: (int(_COUNTED.fullmatch(name)[2]), name))


def _has_images(folder: Path) -> bool:
    try:
        return any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(folder))
    except OSError:  # a file, or a folder that may not be read
        return False


def open_plain(path: str | Path) -> Image.Image:
    """The whole image, decoded; see `plain_rgb`. Raises BrokenImage as ldm.data.transforms.decoded does."""
    with decoded(path, plain_rgb) as image:
        return image


def plain_rgb(image: Image.Image) -> Image.Image:
    """RGB as Pillow's own `convert` makes it, which is how pytorch-fid opens images: an alpha channel is dropped,
    16 bits become 8 as the installed Pillow does it, and EXIF's orientation is not looked at.
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def inception_input(image: Image.Image, size: int = 299) -> np.ndarray:
    """RGB -> (3, size, size) float32 in [-1, 1]: scaled bilinearly from / 255, as pytorch-fid does.

    The scaling is torch's `interpolate(mode="bilinear", align_corners=False)`: two neighbours each way at any size, so
    an image that is made smaller is not smoothed before.
    """
    pixels = np.asarray(image)
    (above, below, down), (left, right, across) = (_two_neighbours(before, size) for before in pixels.shape[:2])

    # The neighbours are taken before anything is calculated: of a large image, they are a small part.
    def column(at: np.ndarray) -> np.ndarray:
        upper, lower = (pixels[np.ix_(row, at)] / np.float32(255.0) for row in (above, below))
        return _between(upper, lower, down[:, None, None])

    scaled = _between(column(left), column(right), across[None, :, None])
    return np.ascontiguousarray((2.0 * scaled - 1.0).transpose(2, 0, 1))


def _two_neighbours(before: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every one of `size` places: the two of `before` between which it lies, and the weight of the second."""
    # In float32 and rounded once, as torch's compiled form has it (a fused multiply-add): the product of two float32 is
    # exact in float64. Rounded twice, a position is off by half a unit in its last place, and the pixel by 5e-6.
    scale = np.float64(np.float32(before) / np.float32(size))
    at = np.maximum((scale * (np.arange(size) + 0.5) - 0.5).astype(np.float32), np.float32(0.0))
    low = np.minimum(at.astype(np.int64), before - 1)
    return low, np.minimum(low + 1, before - 1), at - low.astype(np.float32)


def _between(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return low * (np.float32(1.0) - weight) + high * weight


def clip_input(image: Image.Image, size: int = 224, how: str = "openai") -> np.ndarray:
    """RGB -> (3, size, size) float32, normalised by CLIP's mean and deviation.

    how: "openai", the shorter side to `size` (bicubic, smoothed), then the middle square; "squash", the whole image
    to a square whatever its shape, as mindone does.
    """
    width, height = image.size
    if how == "openai":
        short = min(width, height)
        if max(width, height) > STRIP * short:
            # The same by the middle alone: scaled whole, a strip of 1 x 20,000 pixels takes 4 GB.
            box = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
            image, width, height = image.resize((size, size), Image.Resampling.BICUBIC, box=box), short, short
        width, height = (max(size, int(size * side / short)) for side in (width, height))
    elif how == "squash":
        width = height = size
    else:
        raise UserError(f"preprocessing '{how}' is unknown: choose from {', '.join(CLIP_PREPROCESSING)}")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Python's rounding, half to even, as torchvision's crop has it.
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / np.float32(255.0)
    return np.ascontiguousarray(((pixels - CLIP_MEAN) / CLIP_DEVIATION).transpose(2, 0, 1))


def nano_input(image: Image.Image, size: int = 64) -> np.ndarray:
    """RGB -> (3, size, size) float32 in [-1, 1], as the embedded CLIP was trained: squashed, bicubic."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1.0)


@dataclass
class ImageBatches:
    """Iterates over (places in `paths` (n,), images (n, 3, S, S)); n is at most `batch_size`.

    Images are opened by threads while the batch before is with the network, never more than two batches ahead, so
    memory does not depend on how many there are. A broken image is left out and noted in `broken` as (path, fault).
    Raises UserError where none is left.
    """

    paths: Sequence[Path]
    prepare: Callable[[Image.Image], np.ndarray]
    batch_size: int
    label: str = "images"
    broken: list[tuple[Path, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting: deque[tuple[int, Future]] = deque()
        places, images, found = [], [], 0
        following = iter(enumerate(self.paths))
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
            tqdm(total=len(self.paths), desc=self.label, unit="image", delay=1) as bar,
        ):
            while True:
                while len(waiting) < 2 * self.batch_size and (job := next(following, None)) is not None:
                    waiting.append((job[0], pool.submit(self._open, job[1])))
                if not waiting:
                    break
                place, opened = waiting.popleft()
                image = opened.result()
                bar.update()
                if isinstance(image, str):
                    self.broken.append((self.paths[place], image))
                else:
                    places.append(place)
                    images.append(image)
                if images and (len(images) == self.batch_size or not waiting):
                    found += len(images)
                    yield np.array(places), np.stack(images)
                    places, images = [], []
        if not found:
            path, fault = self.broken[0]
            raise UserError(
                f"not one of {len(self.paths)} images can be read; {plain(path)} {fault}: give other images"
            )

    def _open(self, path: Path) -> np.ndarray | str:
        """The prepared image, or what is wrong with it."""
        try:
            with decoded(path, plain_rgb) as image:
                return self.prepare(image)
        except BrokenImage as error:
            return error.fault
