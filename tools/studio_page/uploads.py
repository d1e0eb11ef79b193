"""Images that the browser sends: those to begin from, and the masks that are painted on them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ldm.data.decoding import BrokenImage
from ldm.data.upright import open_rgb
from ldm.errors import UserError
from ldm.files.atomic import atomic_path, temporary_folder
from ldm.files.paths import writing

MAX_PIXELS = 64 << 20


def save_upload(raw: bytes, folder: Path) -> Path:
    """Decode an image and write its pixels as a PNG, which is named by its content.

    Raises:
        UserError: It is no image, or has too many pixels.
    """
    path = folder / f"{hashlib.sha256(raw).hexdigest()[:24]}.png"
    with writing(folder), temporary_folder(path) as temporary:
        (temporary / "image").write_bytes(raw)
        try:
            image = open_rgb(temporary / "image")
        except BrokenImage as error:
            raise UserError(f"the image {error.fault}: choose another file") from None
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"the image has more than {MAX_PIXELS:,} pixels: make it smaller")
        with atomic_path(path) as target:
            image.save(target)
    return path
