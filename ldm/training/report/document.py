"""A whole HTML document: its style and script stand inside, and a policy forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.files.documents import valid_text
from ldm.training.report.markup import Markup, joined, raw, tag

_FOLDER = Path(__file__).parent


@lru_cache
def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"


def document(title: str, head: Sequence[Any], sections: Sequence[Markup], generator: str) -> str:
    """Return a page.

    Args:
        title: Of the page.
        head: What stands above the sections, after the title.
        sections: Made by `section`; empty ones are left out.
        generator: What made the page.
    """
    style, script = _part("page.css"), _part("page.js")
    # The page loads nothing, and runs no script but its own: a caption that got through as markup would do nothing.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = [section for section in sections if section]
    body = tag(
        "body",
        tag("a", "Skip to the curves", href="#main", class_="skip"),
        tag("header", tag("h1", title), list(head)),
        tag("main", shown, id="main"),
        tag("script", raw(script)),
    )
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=generator),
            tag("meta", name="referrer", content="no-referrer"),
            tag("title", title),
            tag("style", raw(style)),
        ),
        body,
        lang="en",
    )
    return valid_text(f"<!DOCTYPE html>\n{page}\n")


def section(title: str, *content: Any, identifier: str) -> Markup:
    """Return a section of a page, nothing if it has no content."""
    inside = joined(*content)
    if not inside:
        return joined()
    heading = tag("h2", title, id=f"{identifier}-heading")
    return tag("section", heading, inside, id=identifier, aria_labelledby=f"{identifier}-heading")


def table(caption: str, header: Sequence[Any], rows: Sequence[Sequence[Any]], class_: str = "") -> Markup:
    """Return a table whose first column names the rows, in a box that scrolls sideways; nothing without rows."""
    if not rows:
        return joined()
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in header])) if header else None
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    inner = tag("table", tag("caption", caption, class_="hidden"), head, tag("tbody", body), class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {caption}")


def tiles(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """Return figures that stand out: name, value, and a note."""
    return tag(
        "dl",
        [
            tag("div", tag("dt", name), tag("dd", tag("strong", value), tag("span", note) if note else None))
            for name, value, note in entries
        ],
        class_="tiles",
    )
