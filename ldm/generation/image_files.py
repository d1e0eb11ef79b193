"""What generation leaves behind: numbered PNGs with their prompts in them, a list of the prompts, a grid, latents.

    {output_path}/samples/00000.png ...  in the order of the prompts, all images of the first prompt first
    {output_path}/samples/prompts.txt    the prompt of each PNG, one a line in the same order
    {output_path}/grid.png

An earlier run's files are never mixed with new ones nor deleted: its samples/ becomes samples.old1, its grid.png
grid.old1.png, and so on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
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

# More images than this make a grid that nobody looks at, and 64 of 768 pixels are a 38-megapixel file already.
GRID_IMAGES = 64


class SampleWriter:
    """Writes one run's images as they come.

    images_per_prompt: consecutive images that share a prompt. texts: what stands in every PNG's text fields besides
    its prompt, negative prompt and index; what is not a text is written as JSON. pngs, grid: whether to write them.

    Nothing is touched before the first `add`. Raises UserError where the disk refuses.
    """

    def __init__(
        self,
        output_path: str | Path,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        images_per_prompt: int,
        texts: Mapping[str, Any],
        pngs: bool = True,
        grid: bool = True,
    ) -> None:
        self.output_path = Path(output_path)
        self.samples = self.output_path / "samples"
        self.grid_path = self.output_path / "grid.png"
        self.prompts, self.negative_prompts = list(prompts), list(negative_prompts)
        self.images_per_prompt = images_per_prompt
        self.texts = dict(texts)
        self.pngs, self.grid = pngs, grid
        self.kept_as: list[Path] = []
        self.written = 0
        self._grid_images: list[np.ndarray] = []
        self._started = False

    def name(self, index: int) -> str:
        """The file name of image `index`, padded so that names sort as numbers do."""
        return f"{index:0{max(5, len(str(len(self.prompts) - 1)))}d}.png"

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write images (N, H, W, 3) uint8 whose places in the order of the prompts are `indices`."""
        with writing(self.output_path):
            if not self._started:
                self._start()
            for index, image in zip(indices, images):
                if self.pngs:
                    texts = {
                        "prompt": self.prompts[index],
                        "negative_prompt": self.negative_prompts[index],
                        "index": str(index),
                        **self.texts,
                    }
                    write_png(self.samples / self.name(int(index)), image, texts)
                    self.written += 1
                if self.grid and len(self._grid_images) < GRID_IMAGES:
                    self._grid_images.append(image)

    def progress(self) -> str:
        """What is done and kept so far, for somebody who interrupts it."""
        done = f"after {self.written:,} of {len(self.prompts):,} images"
        return f"{done}, which are in {self.samples}" if self.written else f"{done}: nothing is kept"

    def finish(self) -> None:
        """Write the grid: a row a prompt where there are several images of each, else as square as it gets."""
        if not self._grid_images:
            return
        count = len(self._grid_images)
        columns = self.images_per_prompt if 1 < self.images_per_prompt < count else math.ceil(math.sqrt(count))
        with writing(self.grid_path), atomic_path(self.grid_path) as temporary:
            Image.fromarray(tile(self._grid_images, min(columns, count))).save(temporary)

    def _start(self) -> None:
        if self.pngs or self.grid:
            self.kept_as = keep_earlier([self.samples, self.grid_path])
        self._started = True
        if self.pngs:
            with atomic_path(self.samples / "prompts.txt") as temporary:
                # A prompt may hold line breaks; the line counts here, the PNG has the prompt as it was. An empty one is
                # a space: ldm.files.prompts takes empty lines at the end for none.
                lines = [" ".join(prompt.splitlines()) or " " for prompt in self.prompts]
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def keep_earlier(paths: Sequence[Path]) -> list[Path]:
    """Rename those of `paths` that exist to name.oldN, N the first number that none of them has used; return the new
    names. Empty folders stay.
    """
    present = [path for path in paths if path.exists() and not (path.is_dir() and not any(path.iterdir()))]
    if not present:
        return []

    def old(path: Path, number: int) -> Path:
        return path.with_name(f"{path.stem}.old{number}{path.suffix}")

    number = 1
    while any(old(path, number).exists() for path in paths):
        number += 1
    return [path.rename(old(path, number)) for path in present]


def write_png(path: Path, image: np.ndarray, texts: Mapping[str, Any]) -> None:
    """Write (H, W, 3) uint8 as a PNG with text fields, beside and then renamed."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, valid_text(value) if isinstance(value, str) else json_text(value))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, pnginfo=info)


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Images of one size (H, W, 3) uint8 in rows of `columns`, white between them and where the last row ends."""
    height, width, _ = images[0].shape
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def read_latents(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Latents of `shape` as float32 from a .npy file.

    Raises UserError for a missing or foreign file, pickled or integer contents, another shape, values not finite.
    """
    wanted = " x ".join(map(str, shape))
    way = f"give a .npy file of {wanted} numbers"
    with open_file(path, "init_latents", way) as file:
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
            if header.dtype.kind != "f":
                raise UserError(
                    f"init_latents {path} holds {header.dtype}: latents are float32 (images x channels x h x w)"
                )
            if header.shape != tuple(shape):
                raise UserError(
                    f"init_latents {path} is {plain(' x '.join(map(str, header.shape)))}, wanted {wanted} "
                    "(images x channels x height / factor x width / factor)"
                )
            array = read_array(file, header)
        except NotNumpy as error:
            raise UserError(f"init_latents {path} is not a .npy file of numbers ({error}): {way}") from None
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"init_latents {path} holds values that are not finite (NaN or infinite): write it anew")
    return array


def write_latents(path: str | Path, starting: np.ndarray, final: np.ndarray) -> None:
    """Write final latents (N, C, h, w) to `path` and the starting ones to the same name with .init.npy."""
    for target, array in ((starting_latents_path(path), starting), (Path(path), final)):
        with writing(target), atomic_path(target) as temporary:
            np.save(temporary, np.ascontiguousarray(array, np.float32), allow_pickle=False)


def starting_latents_path(path: str | Path) -> Path:
    """out.npy -> out.init.npy."""
    return Path(path).with_suffix(".init.npy")
