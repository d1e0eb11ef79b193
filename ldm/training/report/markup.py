"""HTML that is escaped where it is made: only what `tag` and `raw` return is markup, every other text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from ldm.errors import plain

LONGEST_TEXT = 5000  # characters of a prompt or a setting on a page
_VOID = frozenset({"br", "col", "img", "link", "meta"})


class Markup(str):
    """Text that is HTML already."""


def raw(text: str) -> Markup:
    """Return a text as markup. For texts of this package alone, never for what a user or a file gives."""
    return Markup(text)


def joined(*content: Any) -> Markup:
    """Return contents one after the other: markup as it is, other values escaped, None left out, lists flattened."""
    return Markup("".join(_pieces(content)))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        *content: As in `joined`.
        **attributes: A final underscore is dropped (`class_`), others become hyphens. None and False leave an attribute
            out, True gives it no value. Markup stands as it is: data URLs and paths, which are long.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        text = value if isinstance(value, Markup) else _escaped(value)
        parts.append(f" {key}" if value is True else f' {key}="{text}"')
    parts.append(">")
    if name in _VOID:
        return Markup("".join(parts))
    return Markup("".join([*parts, *_pieces(content), f"</{name}>"]))


def _pieces(content: Iterable[Any]) -> Iterable[str]:
    for piece in content:
        if piece is None:
            continue
        if isinstance(piece, Markup):
            yield piece
        elif isinstance(piece, (list, tuple)):
            yield from _pieces(piece)
        else:
            yield _escaped(piece)


def _escaped(value: Any) -> str:
    """Return a text without control characters, half characters and marks that turn the direction of writing."""
    return html.escape(plain(value, LONGEST_TEXT), quote=True)
