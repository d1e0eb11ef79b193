"""The report on a data set: sections of lines for people, and the same figures for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from ldm.errors import plain

NAMED = 5  # examples that a line names
LONGEST_VALUE = 2000  # characters of a line

Value = Union[str, Sequence[str]]


@dataclass
class Section:
    """A part of the report.

    Args:
        title: Its heading.
        lines: Label and text of each line. A line without a label continues the one before.
        figures: What the lines say, for JSON.
    """

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, label: str, value: Value) -> None:
        """Add a label and its text, or several lines of text."""
        values = [value] if isinstance(value, str) else value
        self.lines += [(label if place == 0 else "", text) for place, text in enumerate(values)]


def printed(sections: Iterable[Section]) -> str:
    """Return the report as text, all labels in one column."""
    sections = [section for section in sections if section.lines]
    longest = max((len(label) for section in sections for label, _ in section.lines), default=0)
    blocks = []
    for section in sections:
        width = longest + 2 if any(label for label, _ in section.lines) else 0
        lines = [section.title]
        lines += [f"  {label:{width}}{plain(text, LONGEST_VALUE)}".rstrip() for label, text in section.lines]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def named(names: Iterable[str], count: int, most: int = NAMED) -> str:
    """Return the first names, and how many more of `count` there are."""
    shown = [plain(name, 80) for _, name in zip(range(most), names)]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def table(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Return rows of cells as lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]


def in_columns(items: Sequence[str], columns: int = 3) -> list[str]:
    """Return short texts in columns, read downwards."""
    if not items:
        return []
    height = -(-len(items) // columns)
    parts = [items[start : start + height] for start in range(0, len(items), height)]
    widths = [max(map(len, part)) for part in parts]
    return [
        "   ".join(part[line].ljust(width) for part, width in zip(parts, widths) if line < len(part)).rstrip()
        for line in range(height)
    ]


def bytes_text(count: float) -> str:
    """Return a size on disk: "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
