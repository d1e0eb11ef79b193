"""Text in images: lines that fit a width, in Pillow's built-in font."""

from __future__ import annotations

from typing import Union

from PIL import ImageFont

from ldm.errors import plain

LONGEST = 2000  # characters that are looked at
Font = Union[ImageFont.FreeTypeFont, ImageFont.ImageFont]


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """Return a text in at most `most` lines of `width` pixels. Text without spaces is broken anywhere."""
    lines, line = [], ""
    for word in plain(text, LONGEST).split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width and len(line) > 1:
            end = _fitting_count(line, font, width)
            lines.append(line[:end])
            line = line[end:]
    lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], fitting(" ".join(lines[most - 1 :]), font, width)]
    return lines


def fitting(text: str, font: Font, width: int) -> str:
    """Return a text in one line of `width` pixels, its end replaced by dots where it is too long."""
    text = plain(text, LONGEST)
    if font.getlength(text) <= width:
        return text
    return f"{text[: _fitting_count(text, font, width - font.getlength('...'))]}..."


def _fitting_count(text: str, font: Font, width: float) -> int:
    """Return how many characters fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
