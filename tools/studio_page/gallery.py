"""The images that were made, and the settings in their PNGs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.files.documents import parse_json
from ldm.files.inputs import open_file
from ldm.generation.image_text import FORMATS, read_image_text
from tools.studio_page.files import Folders

AT_ONCE = 60  # images that the page loads together


def newest_images(folders: Folders, before: str = "") -> dict[str, Any]:
    """Return the names of at most AT_ONCE images, the newest first.

    Args:
        folders: With the root "images".
        before: Begin behind the image of this name, "" for the newest.

    Returns:
        "images": the names; "more": whether there are older ones.
    """
    # Folders are named by their time. Within one, the first image stands first.
    last, _, last_file = before.removeprefix("images/").partition("/samples/")
    names: list[str] = []
    for folder in reversed(folders.listed("images")[0]):
        if (before and folder > last) or "samples" not in folders.listed(f"images/{folder}")[0]:
            continue
        files = folders.listed(f"images/{folder}/samples")[1]
        behind = last_file if before and folder == last else ""
        names += [f"images/{folder}/samples/{file}" for file in files if file.endswith(".png") and file > behind]
        if len(names) > AT_ONCE:
            break
    return {"images": names[:AT_ONCE], "more": len(names) > AT_ONCE}


def image_fields(path: Path) -> dict[str, Any]:
    """Return the size and the text fields of an image, those that hold JSON as their content.

    Raises:
        UserError: It is no image that can be read, or has too much text.
    """
    texts = read_image_text(path, "the image")
    with open_file(path) as file, Image.open(file, formats=FORMATS) as image:
        size = [image.width, image.height]
    return {"size": size, "fields": {_valid(key): _value(key, text) for key, text in texts.items()}}


def _value(key: str, text: str) -> Any:
    """Return the content of a JSON text, or the text if it has none that the answer, which is JSON, can hold."""
    if text[:1] in ("{", "[") and key not in ("prompt", "negative_prompt"):
        with suppress(UserError, ValueError, RecursionError):
            value = parse_json(text, key)
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            return value
    return _valid(text)


def _valid(text: str) -> str:
    """Return a text with what UTF-8 does not hold escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
