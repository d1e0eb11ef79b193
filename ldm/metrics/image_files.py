"""Find image files and read them in batches for the networks that score them."""

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
from ldm.data.decoding import BrokenImage, decoded
from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_file, is_folder, is_there, list_folder
from ldm.metrics.preprocessing import plain_rgb

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*?)([0-9]+)\.[A-Za-z]+")


def find_images(path: str | Path) -> list[Path]:
    """Return an image, or the images of a folder in order: by the numbers at the end of their names, else by name.

    In an output folder of this project these are the images in samples/. Raises UserError if there are none.
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
    images = [name for name in names if name.lower().endswith((*IMAGE_SUFFIXES, ".pgm")) and not name.startswith(".")]
    if not images:
        below = next((name for name in names if _has_images(path / name)), None)
        hint = f"; there are some in {plain(path / below)}" if below else f" ({', '.join(IMAGE_SUFFIXES)})"
        raise UserError(f"{plain(path)} has no images in it{hint}")
    ordered = _in_order(images)
    if ordered != images:
        logger.warning("%s: the images are ordered by the numbers in their names, %s before %s", path,
                       *next(pair for pair in zip(ordered, ordered[1:]) if pair[0] > pair[1]))  # fmt: skip
    return [path / name for name in ordered]


def _in_order(names: list[str]) -> list[str]:
    """Sort names that differ only in a number at their end by that number (2.png before 10.png).

    Other names stay sorted as text, which is the order of lists of prompts.
    """
    matches = [(match[1], int(match[2]), name) for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(matches) < len(names) or len({prefix for prefix, _, _ in matches}) > 1:
        return names
    return [name for _, _, name in sorted(matches)]


def _has_images(folder: Path) -> bool:
    try:
        return any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(folder))
    except OSError:  # not a folder, or it may not be read
        return False


@dataclass
class ImageBatches:
    """Iterates over (indices in `paths` (n,), images (n, 3, S, S)), with n up to `batch_size`.

    Threads open images while the network computes the previous batch, at most two batches ahead, so memory does not
    depend on the number of images. Broken images are left out.

    Several processes divide `paths` in blocks of `batch_size`, of which each process takes every process_count-th. A
    batch is then a block without its broken images, which leaves none where all are broken.

    Attributes:
        paths: The image files.
        prepare: Turns an RGB image into the network's input (3, S, S).
        batch_size: Images per batch.
        label: What the images are, for the progress bar.
        process_index: Of this process. Only that of the first process shows the progress bar.
        process_count: Number of processes that divide the images.
        faults: The images that were left out, as index in `paths` -> fault.
    """

    paths: Sequence[Path]
    prepare: Callable[[Image.Image], np.ndarray]
    batch_size: int
    label: str = "images"
    process_index: int = 0
    process_count: int = 1
    faults: dict[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        opening: deque[tuple[int, Future[np.ndarray | str]]] = deque()
        indices: list[int] = []
        images: list[np.ndarray] = []
        blocks = np.arange(len(self.paths)) // self.batch_size
        own = np.flatnonzero(blocks % self.process_count == self.process_index).tolist()
        remaining = iter(own)
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
            tqdm(total=len(own), desc=self.label, unit="image", delay=1, disable=self.process_index > 0) as bar,
        ):
            while True:
                while len(opening) < 2 * self.batch_size and (following := next(remaining, None)) is not None:
                    opening.append((following, pool.submit(self._open, self.paths[following])))
                if not opening:
                    break
                index, future = opening.popleft()
                image = future.result()
                bar.update()
                if isinstance(image, str):
                    self.faults[index] = image
                else:
                    indices.append(index)
                    images.append(image)
                if self.process_count == 1:
                    complete = bool(images) and (len(images) == self.batch_size or not opening)
                else:
                    complete = (index + 1) % self.batch_size == 0 or not opening
                if complete:
                    yield np.array(indices, np.int64), np.stack(images) if images else np.zeros(0, np.float32)
                    indices, images = [], []

    def _open(self, path: Path) -> np.ndarray | str:
        """Return the prepared image, or its fault."""
        try:
            with decoded(path, plain_rgb) as image:
                return self.prepare(image)
        except BrokenImage as error:
            return error.fault
