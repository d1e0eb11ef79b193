"""The files that generation writes: numbered PNGs with their prompts, a list of the prompts, a grid and latents.

    {output_path}/samples/00000.png ...  in the order of the prompts, all images of the first prompt first
    {output_path}/samples/prompts.txt    the prompts of the PNGs, one per line in the same order
    {output_path}/grid.png

Files of an earlier run are renamed, never overwritten: samples/ becomes samples.old1, grid.png becomes grid.old1.png,
and so on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text, valid_text
from ldm.files.inputs import open_file
from ldm.files.npy import NotNumpy, read_array, read_header
from ldm.files.paths import writing

# Images of a grid at most: 64 of 768 pixels are a file of 38 megapixels.
GRID_IMAGES = 64


class ImageWriter:
    """Writes the images of a run, batch after batch.

    No file is written or renamed before the first call of `add`.

    Args:
        output_path: The folder of samples/ and grid.png.
        prompts: One for each image.
        negative_prompts: One for each image.
        images_per_prompt: Consecutive images that share a prompt.
        metadata: More text fields of every PNG, or a function that returns those of an image by its index. Values that
            are not strings are written as JSON.
        pngs: Whether to write PNGs.
        grid: Whether to write the grid.
    """

    def __init__(
        self,
        output_path: str | Path,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        images_per_prompt: int,
        metadata: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
        pngs: bool = True,
        grid: bool = True,
    ) -> None:
        self.output_path = Path(output_path)
        self.samples = self.output_path / "samples"
        self.grid_path = self.output_path / "grid.png"
        self.prompts, self.negative_prompts = list(prompts), list(negative_prompts)
        self.images_per_prompt = images_per_prompt
        self.metadata = metadata
        self.pngs, self.grid = pngs, grid
        self.renamed: list[Path] = []
        self.written = 0
        self._grid_images: dict[int, np.ndarray] = {}
        self._started = False

    def name(self, index: int) -> str:
        """Return the file name of image `index`, padded so that names sort like numbers."""
        return f"{index:0{max(5, len(str(len(self.prompts) - 1)))}d}.png"

    def add(self, indices: Iterable[int], images: np.ndarray) -> None:
        """Write images (N, H, W, C) uint8, whose places in the list of prompts are `indices` (N,).

        Raises:
            UserError: A file cannot be written.
        """
        with writing(self.output_path):
            if not self._started:
                self._start()
            for index, image in zip(map(int, indices), images):
                if self.pngs:
                    more = self.metadata(index) if callable(self.metadata) else self.metadata
                    fields = {
                        "prompt": self.prompts[index],
                        "negative_prompt": self.negative_prompts[index],
                        "index": str(index),
                        **more,
                    }
                    write_png(self.samples / self.name(index), image, fields)
                    self.written += 1
                if self.grid and index < GRID_IMAGES:
                    self._grid_images[index] = image

    def progress(self) -> str:
        """Return what is written so far, for the message of an interrupted run."""
        done = f"after {self.written:,} of {len(self.prompts):,} images"
        return f"{done}, which are in {self.samples}" if self.written else f"{done}: nothing is kept"

    def finish(self) -> None:
        """Write the grid: one row per prompt where there are several images of each, else roughly a square."""
        if not self._grid_images:
            return
        count = len(self._grid_images)
        columns = self.images_per_prompt if 1 < self.images_per_prompt < count else math.ceil(math.sqrt(count))
        images = [self._grid_images[index] for index in sorted(self._grid_images)]
        with writing(self.grid_path), atomic_path(self.grid_path) as temporary:
            as_image(tile(images, min(columns, count))).save(temporary)

    def _start(self) -> None:
        if self.pngs or self.grid:
            self.renamed = rename_earlier([self.samples, self.grid_path])
        self._started = True
        if self.pngs:
            with atomic_path(self.samples / "prompts.txt") as temporary:
                # Line breaks within a prompt become spaces, so that lines and images correspond (the PNG has the exact
                # prompt). An empty prompt becomes a space, because ldm.files.prompts ignores empty lines at the end.
                lines = [" ".join(prompt.splitlines()) or " " for prompt in self.prompts]
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def rename_earlier(paths: Sequence[Path]) -> list[Path]:
    """Rename existing files and folders to name.oldN, where N is the first number that is free for all of them.

    Empty folders are left alone. Returns the new paths.
    """
    present = [path for path in paths if path.exists() and not (path.is_dir() and not any(path.iterdir()))]

    def old(path: Path, number: int) -> Path:
        return path.with_name(f"{path.stem}.old{number}{path.suffix}")

    number = 1
    while any(old(path, number).exists() for path in paths):
        number += 1
    return [path.rename(old(path, number)) for path in present]


def as_image(array: np.ndarray) -> Image.Image:
    """Return (H, W, 3) uint8 as an RGB image, (H, W, 1) as a grey one."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def write_png(path: Path, image: np.ndarray, fields: Mapping[str, Any]) -> None:
    """Write an image (H, W, C) uint8, RGB or grey, as a PNG with text fields. The file appears when it is complete."""
    info = PngInfo()
    for key, value in fields.items():
        info.add_itxt(key, valid_text(value) if isinstance(value, str) else json_text(value))
    with atomic_path(path) as temporary:
        as_image(image).save(temporary, pnginfo=info)


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Arrange images of one size, (H, W, C) uint8, in rows of `columns` with white gaps of `gap` pixels."""
    height, width, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def read_latents(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read latents of the shape (N, C, h, w) from the .npy file of the setting init_latents, as float32.

    Raises:
        UserError: The file is missing or not a .npy file, or its values are not finite floating-point numbers of
            `shape`.
    """
    expected = " x ".join(map(str, shape))
    way_out = f"give a .npy file of {expected} numbers"
    with open_file(path, "init_latents", way_out) as file:
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
            if header.dtype.kind != "f":
                raise UserError(
                    f"init_latents {path} holds {header.dtype}: latents are float32 (images x channels x h x w)"
                )
            if header.shape != tuple(shape):
                raise UserError(
                    f"init_latents {path} is {plain(' x '.join(map(str, header.shape)))}, expected {expected} "
                    "(images x channels x height / factor x width / factor)"
                )
            array = read_array(file, header)
        except NotNumpy as error:
            raise UserError(f"init_latents {path} is not a .npy file of numbers ({error}): {way_out}") from None
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"init_latents {path} holds values that are not finite (NaN or infinite): write it anew")
    return array


def write_latents(path: str | Path, starting: np.ndarray, final: np.ndarray) -> None:
    """Write final latents (N, C, h, w) to `path`, and starting latents to starting_latents_path(path)."""
    for target, array in ((starting_latents_path(path), starting), (Path(path), final)):
        with writing(target), atomic_path(target) as temporary:
            np.save(temporary, np.ascontiguousarray(array, np.float32), allow_pickle=False)


def starting_latents_path(path: str | Path) -> Path:
    """Return the path of the starting latents: out.init.npy for out.npy."""
    return Path(path).with_suffix(".init.npy")
