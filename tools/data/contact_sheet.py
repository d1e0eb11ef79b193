"""A sheet of the images that a training sees: each as it is cropped, with its caption below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.files.atomic import atomic_path
from ldm.generation.labels import Font, fitting, wrapped
from tools.grid import evenly

COLUMNS, ROWS = 6, 4  # images of a page
SIDE, GAP, LINE = 256, 16, 17  # pixels: an image's longer side, the space between images, a line of text
HEADER = 44
CAPTION_LINES, NOTE_LINES = 6, 3
DARK, GREY, RED, BACK, FRAME = (20, 20, 20), (110, 110, 110), (190, 20, 20), (255, 255, 255), (205, 205, 205)
TINT = (230, 30, 30)  # over what a mask hides
SHARE_FIRST = 4  # up to 1 / SHARE_FIRST of the images are the worst crops, and as many have a caption that is cut
LEAST_CROP = 0.1  # share of an image that is cropped away, from which on it is among the worst


class Choice(NamedTuple):
    """A row on the sheet, and why it is there."""

    row: int
    why: str  # "worst crop", "cut caption", or "" for one of the evenly spread


@dataclass
class Cell:
    """An image on the sheet.

    Args:
        pixels: What is trained: (C, H, W) in [-1, 1]. None if it cannot be read.
        title: Its name.
        caption: As a step trains it.
        facts: Size and crop.
        notes: What deserves attention, in red.
        mask: What is trained of it, (H, W) from 0 to 1.
    """

    pixels: Optional[np.ndarray]
    title: str
    caption: str
    facts: str
    notes: Sequence[str] = ()
    mask: Optional[np.ndarray] = None


def choose_rows(cropped: np.ndarray, cut: Sequence[int], count: int) -> list[Choice]:
    """Choose the images of a sheet: the worst crops and the cut captions first, the others evenly from all rows.

    Args:
        cropped: The share (N,) of each image that is cropped away.
        cut: The rows whose caption is cut.
        count: Number of images, if there are so many rows.
    """
    first = count // SHARE_FIRST
    worst = [row for row in np.argsort(-cropped, kind="stable")[:first].tolist() if cropped[row] >= LEAST_CROP]
    chosen = {row: Choice(row, "worst crop") for row in worst}
    others = [row for row in cut if row not in chosen]
    for place in evenly(len(others), first).tolist() if others else ():
        chosen[others[place]] = Choice(others[place], "cut caption")
    rest = [row for row in range(len(cropped)) if row not in chosen]
    for place in evenly(len(rest), count - len(chosen)).tolist() if rest else ():
        chosen[rest[place]] = Choice(rest[place], "")
    return list(chosen.values())


def draw_page(cells: Sequence[Cell], header: str, path: Path) -> None:
    """Write a page of at most COLUMNS * ROWS images as a PNG."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(13)
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    texts = [[_text_of(cell, font, small) for cell in row] for row in rows]
    heights = [SIDE + GAP + LINE * max(len(lines) for lines in row) for row in texts]
    width = GAP + min(COLUMNS, len(cells)) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, HEADER + sum(heights) + GAP * len(rows)), BACK)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), fitting(header, small, width - 2 * GAP), fill=GREY, font=small)
    top = HEADER
    for row, lines, height in zip(rows, texts, heights):
        for column, (cell, of_cell) in enumerate(zip(row, lines)):
            left = GAP + column * (SIDE + GAP)
            _paste(sheet, draw, cell, left, top)
            for number, (text, color, line_font) in enumerate(of_cell):
                draw.text((left, top + SIDE + 6 + number * LINE), text, fill=color, font=line_font)
        top += height + GAP
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    """Draw a cell's image into a square, in its middle and at the bottom."""
    if cell.pixels is None:
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=RED)
        draw.text((left + 8, top + 8), "cannot be read", fill=RED, font=ImageFont.load_default(14))
        return
    image = as_image(cell.pixels, cell.mask)
    longer = max(image.size)
    if longer < SIDE:  # whole multiples, so that the pixels are seen as they are
        factor = SIDE // longer
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif longer > SIDE:
        size = (max(1, image.width * SIDE // longer), max(1, image.height * SIDE // longer))
        image = image.resize(size, Image.Resampling.LANCZOS)
    x, y = left + (SIDE - image.width) // 2, top + SIDE - image.height
    sheet.paste(image, (x, y))
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FRAME)


def as_image(pixels: np.ndarray, mask: Optional[np.ndarray] = None) -> Image.Image:
    """Return an array (C, H, W) in [-1, 1] as RGB, with a tint over what `mask` (H, W) from 0 to 1 hides."""
    values = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
    rgb = (values.transpose(1, 2, 0) + 1.0) * 127.5
    if mask is not None:
        hidden = 0.55 * (1.0 - mask[:, :, None])
        rgb = rgb * (1 - hidden) + np.array(TINT) * hidden
    return Image.fromarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))


Line = tuple[str, tuple[int, int, int], Font]


def _text_of(cell: Cell, font: Font, small: Font) -> list[Line]:
    """Return the lines below an image, with their colours and fonts."""
    lines: list[Line] = [
        (fitting(cell.facts, small, SIDE), GREY, small),
        (fitting(cell.title, small, SIDE), GREY, small),
    ]
    lines += [(line, DARK, font) for line in wrapped(cell.caption or "(empty caption)", font, SIDE, CAPTION_LINES)]
    for note in cell.notes:
        lines += [(line, RED, small) for line in wrapped(note, small, SIDE, NOTE_LINES)]
    return lines
