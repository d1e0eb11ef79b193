"""The files that generation writes: numbered PNGs with their prompts, a list of the prompts, a grid and latents.

    {output_path}/samples/00000.png ...  in the order of the prompts, all images of the first prompt first
    {output_path}/samples/prompts.txt    the prompts of the PNGs, one per line in the same order
    {output_path}/samples/run.json       what decides the images, see ldm.generation.resume
    {output_path}/grid.png

Files of an earlier run are renamed, never overwritten: samples/ becomes samples.old1, grid.png becomes grid.old1.png,
and so on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text, valid_text
from ldm.files.inputs import open_file
from ldm.files.npy import NotNumpy, read_array, read_header
from ldm.files.paths import writing
from ldm.generation.comparison_sheet import ComparisonSheet
from ldm.generation.resume import RECORD, begin_or_continue, run_record, written_image

# Images of a grid at most: 64 of 768 pixels are a file of 38 megapixels.
GRID_IMAGES = 64


class ImageWriter:
    """Writes the images of a run, batch after batch.

    No file is written or renamed before the first call of `add`, or of `begin`.

    Args:
        output_path: The folder of samples/ and grid.png.
        prompts: One for each image.
        negative_prompts: One for each image.
        images_per_prompt: Consecutive images that share a prompt.
        metadata: More text fields of every PNG, or a function that returns those of an image by its index. Values that
            are not strings are written as JSON.
        pngs: Whether to write PNGs.
        grid: Whether to write the grid.
        sheet: What is drawn in place of the grid, None for the grid.
        places: The column and the row of each image on the sheet.
        labels: What stands behind the number in the name of each file, () for nothing.
        settings: Those that decide the images, for run.json.
        resume: Whether samples/ is continued, if it is of this run, instead of renamed.
        sizes: Height and width of each image, for `resume`.

    Attributes:
        batch_sizes: Images in the call of the network that makes an image, by its index. They are written with the
            settings, because rounding depends on them.
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
        sheet: ComparisonSheet | None = None,
        places: Sequence[tuple[int, int]] = (),
        labels: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.output_path = Path(output_path)
        self.samples = self.output_path / "samples"
        self.grid_path = self.output_path / "grid.png"
        self.prompts, self.negative_prompts = list(prompts), list(negative_prompts)
        self.images_per_prompt = images_per_prompt
        self.metadata = metadata
        self.pngs, self.grid = pngs, grid
        self.sheet, self.places, self.labels = sheet, places, labels
        self.settings, self.resume = dict(settings or {}), resume
        self.sizes = sizes
        self.batch_sizes: dict[int, int] = {}
        self.renamed: list[Path] = []
        self.written = 0
        self._grid_images: dict[int, np.ndarray] = {}
        self._started = False

    def name(self, index: int) -> str:
        """Return the file name of image `index`, padded so that names sort like numbers."""
        label = f"_{self.labels[index]}" if self.labels and self.labels[index] else ""
        return f"{index:0{max(5, len(str(len(self.prompts) - 1)))}d}{label}.png"

    def fields(self, index: int) -> dict[str, Any]:
        """Return the text fields of image `index`."""
        fields = self._fields(index)
        if index in self.batch_sizes:
            fields["settings"] = {**fields["settings"], "batch_size": self.batch_sizes[index]}
        return fields

    def _fields(self, index: int) -> dict[str, Any]:
        more = self.metadata(index) if callable(self.metadata) else self.metadata
        return {
            "prompt": self.prompts[index],
            "negative_prompt": self.negative_prompts[index],
            "index": str(index),
            **more,
        }

    def begin(self) -> None:
        """Begin samples/, or check that it is of this run if it is continued.

        Raises:
            UserError: A file cannot be written, or what is continued is another run.
        """
        if self._started:
            return
        with writing(self.output_path):
            self._begin()

    def _begin(self) -> None:
        if not self.resume and (self.pngs or self.grid):
            self.renamed = rename_earlier([self.samples, self.grid_path])
        elif self.resume and not (self.samples / RECORD).exists():
            self.renamed = rename_earlier([self.grid_path])  # of another run: this one begins
        self._started = True
        if self.pngs:
            record = run_record(self.settings, map(self._fields, range(len(self.prompts))))
            begin_or_continue(self.samples, record)
            with atomic_path(self.samples / "prompts.txt") as temporary:
                # Line breaks within a prompt become spaces, so that lines and images correspond (the PNG has the exact
                # prompt). An empty prompt becomes a space, because ldm.files.prompts ignores empty lines at the end.
                lines = [" ".join(prompt.splitlines()) or " " for prompt in self.prompts]
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def is_written(self, index: int) -> bool:
        """Return whether the PNG of an image is there from the run that is continued. The grid takes it from there.

        Raises:
            UserError: It is the image of another run.
        """
        pixels = written_image(self.samples / self.name(index), png_texts(self.fields(index)), self.sizes[index])
        if pixels is None:
            return False
        self.written += 1
        self._draw(index, pixels)
        return True

    def add(self, indices: Iterable[int], images: np.ndarray) -> None:
        """Write images (N, H, W, C) uint8, whose places in the list of prompts are `indices` (N,).

        Raises:
            UserError: A file cannot be written.
        """
        with writing(self.output_path):
            self.begin()
            for index, image in zip(map(int, indices), images):
                if self.pngs:
                    write_png(self.samples / self.name(index), image, self.fields(index))
                    self.written += 1
                self._draw(index, image)

    def progress(self) -> str:
        """Return what is written so far, for the message of an interrupted run."""
        done = f"after {self.written:,} of {len(self.prompts):,} images"
        return f"{done}, which are in {self.samples}" if self.written else f"{done}: nothing is kept"

    def finish(self) -> None:
        """Write the grid: one row per prompt where there are several images of each, else roughly a square."""
        if self.sheet is not None:
            if self.grid and self._started:
                self.sheet.write(self.grid_path)
            return
        if not self._grid_images:
            return
        count = len(self._grid_images)
        columns = self.images_per_prompt if 1 < self.images_per_prompt < count else math.ceil(math.sqrt(count))
        images = [self._grid_images[index] for index in sorted(self._grid_images)]
        with writing(self.grid_path), atomic_path(self.grid_path) as temporary:
            as_image(tile(images, min(columns, count))).save(temporary)

    def _draw(self, index: int, image: np.ndarray) -> None:
        if self.sheet is not None:
            self.sheet.put(*self.places[index], image)
        elif self.grid and index < GRID_IMAGES:
            self._grid_images[index] = image


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
    for key, text in png_texts(fields).items():
        if key == "parameters":
            info.add_text(key, text)  # as A1111: other programs look for a tEXt where the text is Latin-1
        else:
            info.add_itxt(key, text)
    with atomic_path(path) as temporary:
        as_image(image).save(temporary, pnginfo=info)


def png_texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return text fields as a PNG holds them."""
    return {key: valid_text(value) if isinstance(value, str) else json_text(value) for key, value in fields.items()}


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


class LatentsWriter:
    """Writes the latents of a run batch by batch, so that memory does not grow with their number.

    Final latents (N, C, h, w) float32 go to `path`, starting latents to starting_latents_path(path). The files appear
    when the block of the context manager ends without an error, and not before.

    Args:
        path: A .npy file.
        count: Number of images N.
    """

    def __init__(self, path: str | Path, count: int) -> None:
        self.path, self.count = Path(path), count
        self._files = ExitStack()
        self._open: list[tuple[BinaryIO, int]] = []  # each file and where its numbers begin

    def __enter__(self) -> LatentsWriter:
        with writing(self.path):
            self._temporaries = [self._files.enter_context(atomic_path(path)) for path in self._paths()]
        return self

    def __exit__(self, *error: Any) -> None:
        with writing(self.path):
            for file, _ in self._open:
                file.close()
            self._files.__exit__(*error)

    def _paths(self) -> tuple[Path, Path]:
        return self.path, starting_latents_path(self.path)

    def add(self, indices: Iterable[int], starting: np.ndarray, final: np.ndarray) -> None:
        """Write the latents (n, C, h, w) of the images `indices` (n,). Raises UserError if they cannot be written."""
        with writing(self.path):
            if not self._open:
                shapes = final.shape[1:], starting.shape[1:]  # which differ after a hires fix
                self._open = [self._begin(*of_file) for of_file in zip(self._temporaries, shapes)]
            for (file, begin), arrays in zip(self._open, (final, starting)):
                for index, array in zip(indices, np.ascontiguousarray(arrays, np.float32)):
                    file.seek(begin + int(index) * array.nbytes)
                    file.write(array)

    def _begin(self, path: Path, shape: tuple[int, ...]) -> tuple[BinaryIO, int]:
        file = self._files.enter_context(open(path, "wb"))
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (self.count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file, file.tell()


def starting_latents_path(path: str | Path) -> Path:
    """Return the path of the starting latents: out.init.npy for out.npy."""
    return Path(path).with_suffix(".init.npy")
