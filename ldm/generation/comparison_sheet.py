"""A labelled sheet of images: a column for each value of one setting, a row for each value of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.files.atomic import atomic_path
from ldm.files.paths import writing
from ldm.generation.labels import fitting, wrapped

LEAST_SIDE = 128  # pixels; smaller images are enlarged by a whole number, so that a label fits above them
MOST_PIXELS = 64_000_000  # of a sheet; larger ones are drawn smaller, which memory and viewers bear
GAP = 6
LABEL_LINES = 3


@dataclass(frozen=True)
class Axis:
    """A setting and the texts of its values."""

    name: str
    labels: Sequence[str]

    def titles(self) -> list[str]:
        """Return the label of each column or row: "seed = 1"."""
        return [f"{self.name} = {label}" for label in self.labels]


class ComparisonSheet:
    """Takes images in any order and draws them where they belong. Places without an image stay grey.

    Args:
        columns: What differs from column to column, None for a single one.
        rows: What differs from row to row, None for a single one.
        cell: Width and height of the largest image.
        title: A line above all.
    """

    def __init__(self, columns: Axis | None, rows: Axis | None, cell: tuple[int, int], title: str) -> None:
        self.columns, self.rows = len(columns.labels) if columns else 1, len(rows.labels) if rows else 1
        self._scale = scale_of(self.columns, self.rows, cell)
        self._width, self._height = (max(1, round(side * self._scale)) for side in cell)
        size = max(12, min(28, self._width // 14))
        font = ImageFont.load_default(size)
        line = math.ceil(size * 1.25)
        titles = [] if columns is None else columns.titles()
        tops = [wrapped(text, font, self._width, LABEL_LINES) for text in titles]
        sides = [] if rows is None else [wrapped(text, font, self._width, LABEL_LINES) for text in rows.titles()]
        self._left = GAP + (max(math.ceil(font.getlength(t)) for side in sides for t in side) + GAP if sides else 0)
        self._top = GAP + line + max((len(top) * line for top in tops), default=0) + GAP
        width = self._left + self.columns * (self._width + GAP)
        self.image = Image.new("RGB", (width, self._top + self.rows * (self._height + GAP)), "white")
        draw = ImageDraw.Draw(self.image)
        draw.text((GAP, GAP), fitting(title, font, width - 2 * GAP), fill=(110, 110, 110), font=font)
        for column, lines in enumerate(tops):
            for number, text in enumerate(lines):
                y = self._top - GAP - (len(lines) - number) * line
                draw.text((self._place(column, 0)[0], y), text, fill="black", font=font)
        for row, lines in enumerate(sides):
            for number, text in enumerate(lines):
                draw.text((GAP, self._place(0, row)[1] + number * line), text, fill="black", font=font)
        for column in range(self.columns):
            for row in range(self.rows):
                x, y = self._place(column, row)
                draw.rectangle((x, y, x + self._width - 1, y + self._height - 1), fill=(235, 235, 235))

    def put(self, column: int, row: int, image: np.ndarray) -> None:
        """Draw an image (H, W, C) uint8, RGB or grey, at its place."""
        drawn = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
        width, height = (max(1, round(side * self._scale)) for side in drawn.size)
        method = Image.Resampling.NEAREST if self._scale >= 1 else Image.Resampling.LANCZOS
        self.image.paste(drawn.resize((width, height), method), self._place(column, row))

    def write(self, path: Path) -> None:
        """Write the sheet as a PNG. Raises UserError if it cannot be written."""
        with writing(path), atomic_path(path) as temporary:
            self.image.save(temporary)

    def _place(self, column: int, row: int) -> tuple[int, int]:
        return self._left + column * (self._width + GAP), self._top + row * (self._height + GAP)


def scale_of(columns: int, rows: int, cell: tuple[int, int]) -> float:
    """Return by how much images are enlarged, or made smaller so that the sheet has MOST_PIXELS."""
    scale = max(1, math.ceil(LEAST_SIDE / min(cell)))
    pixels = columns * rows * cell[0] * cell[1]
    return scale if pixels * scale**2 <= MOST_PIXELS else min(1.0, math.sqrt(MOST_PIXELS / pixels))
