"""The images that were made, and the settings in their PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.inputs import open_file
from tools.studio_page.files import Folders

AT_ONCE = 60  # images that the page loads together
MAX_PIXELS = 64 << 20  # of an image whose fields are read


def newest_images(folders: Folders, before: str = "") -> dict[str, Any]:
    """Return the names of at most AT_ONCE images, the newest first.

    Args:
        folders: With the root "images".
        before: Begin behind the image of this name, "" for the newest.

    Returns:
        "images": the names; "more": whether there are older ones.
    """
    names = []
    for folder, _, files in folders.walk("images", depth=3):
        if folder.endswith("/samples"):
            names += [f"{folder}/{file}" for file in files if file.endswith(".png")]
    # Folders are named by their time. Within one, the first image stands first.
    names.sort(key=lambda name: name.rpartition("/")[2])
    names.sort(key=lambda name: name.rpartition("/")[0], reverse=True)
    start = names.index(before) + 1 if before in names else 0
    return {"images": names[start : start + AT_ONCE], "more": len(names) > start + AT_ONCE}


def image_fields(path: Path) -> dict[str, Any]:
    """Return the text fields of a PNG, those that hold JSON as their content.

    Raises:
        UserError: It is no PNG that can be read.
    """
    with open_file(path) as file:
        try:
            with Image.open(file, formats=["PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{plain(path)} has too many pixels")
                image.load()  # the fields may stand behind the pixels
                texts = {str(key): str(value) for key, value in image.text.items()}
                size = [image.width, image.height]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{plain(path)} is no PNG that can be read: {plain(error)}") from None
    return {"size": size, "fields": {key: _value(key, text) for key, text in texts.items()}}


def _value(key: str, text: str) -> Any:
    if text[:1] in "{[" and key not in ("prompt", "negative_prompt"):
        try:
            return parse_json(text, key)
        except UserError:
            return text
    return text
