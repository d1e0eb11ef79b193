"""Grids of images that compare models: a row for each prompt, a column for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.files.atomic import atomic_path

SIZE, GAP, TEXT_WIDTH = 128, 8, 300


def evenly(total: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced indices from 0 to total - 1, or all indices if there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def draw_grid(
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Path]],
    path: Path,
    header: str = "prompt",
    text_width: int = TEXT_WIDTH,
    colours: int | None = None,
    blocks: int = 1,
) -> None:
    """Write a grid to `path`: a row for each prompt, and for each title in `columns` one image file per prompt.

    Args:
        prompts: The names of the rows.
        columns: The image files of each column, by its title, one for each prompt.
        path: The PNG to write.
        header: The title of the prompts, for rows that are something else.
        text_width: Width of the prompts in pixels.
        colours: The number of colours in the PNG, at most 256, for a small file. None keeps all of them.
        blocks: The rows are shared out to so many blocks beside each other, each with the titles, so that a sheet of
            many rows is seen as a whole.
    """
    font, bold = ImageFont.load_default(16), ImageFont.load_default(18)
    rows, width = max(1, -(-len(prompts) // blocks)), text_width + len(columns) * (SIZE + GAP) + GAP
    blocks = max(1, -(-len(prompts) // rows))  # none is empty
    sheet = Image.new("RGB", (blocks * width, 40 + rows * (SIZE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for j in range(rows):
        y = 36 + j * (SIZE + GAP)
        draw.line((0, y, sheet.width, y), fill=(225, 225, 225))
    for left in range(0, sheet.width, width):
        draw.text((left + GAP, 10), header, fill="black", font=bold)
        for i, title in enumerate(columns):
            draw.text((left + text_width + i * (SIZE + GAP), 10), title, fill="black", font=bold)
    for j, prompt in enumerate(prompts):
        left, y = j // rows * width, 40 + j % rows * (SIZE + GAP)
        for k, line in enumerate(textwrap.wrap(prompt, text_width * 32 // TEXT_WIDTH)):
            draw.text((left + GAP, y + 46 + 20 * k), line, fill="black", font=font)
        for i, files in enumerate(columns.values()):
            image = Image.open(files[j]).convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)
            sheet.paste(image, (left + text_width + i * (SIZE + GAP), y))
    if colours is not None:
        # 98 kB for 30 images of nano, MEDIANCUT 169 kB, with similar errors.
        sheet = sheet.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        sheet.save(temporary, optimize=True)
