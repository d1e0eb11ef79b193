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
) -> None:
    """Write a grid to `path`: a row for each prompt, and for each title in `columns` one image file per prompt.

    Args:
        prompts: The names of the rows.
        columns: The image files of each column, by its title.
        path: The PNG to write.
        header: The title of the prompts, for rows that are something else.
        text_width: Width of the prompts in pixels.
        colours: The number of colours in the PNG, at most 256, for a small file. None keeps all of them.
    """
    font, bold = ImageFont.load_default(16), ImageFont.load_default(18)
    height = 40 + len(prompts) * (SIZE + GAP)
    sheet = Image.new("RGB", (text_width + len(columns) * (SIZE + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 10), header, fill="black", font=bold)
    for j, prompt in enumerate(prompts):
        y = 40 + j * (SIZE + GAP)
        draw.line((0, y - GAP // 2, sheet.width, y - GAP // 2), fill=(225, 225, 225))
        for k, line in enumerate(textwrap.wrap(prompt, text_width * 32 // TEXT_WIDTH)):
            draw.text((GAP, y + 46 + 20 * k), line, fill="black", font=font)
    for i, (title, files) in enumerate(columns.items()):
        x = text_width + i * (SIZE + GAP)
        draw.text((x, 10), title, fill="black", font=bold)
        for j, file in enumerate(files):
            image = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)
            sheet.paste(image, (x, 40 + j * (SIZE + GAP)))
    if colours is not None:
        # 98 kB for 30 images of nano, MEDIANCUT 169 kB, with similar errors.
        sheet = sheet.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        sheet.save(temporary, optimize=True)
