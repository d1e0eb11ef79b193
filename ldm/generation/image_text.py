"""The texts that image files hold about how they were made: text fields of a PNG, the comment of a JPEG or WebP."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

from PIL import ExifTags, Image

from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

MAX_BYTES = 512 << 20  # of an image file; only its texts are read, and Pillow bounds those (1 MiB each, 64 together)
FORMATS = ("PNG", "JPEG", "WEBP")
WAY = "give a PNG, JPEG or WebP image with the text of its settings, as this project and A1111 write it"

_ENCODINGS = {b"ASCII\0\0\0": "latin-1", b"UNICODE\0": "utf-16", b"\0" * 8: "utf-8"}  # EXIF 2.3, UserComment


def read_image_text(path: str | os.PathLike, name: str) -> dict[str, str]:
    """Return the texts of an image by their keys, without decoding the image. `name` is that of the setting.

    The comment that A1111 writes into JPEG and WebP has the key "parameters".

    Raises:
        UserError: The file cannot be read or is no image of FORMATS.
    """
    where = f"{name} {plain(os.fspath(path))}"
    with open_file(path, name, WAY) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise UserError(f"{where} has more than {MAX_BYTES:,} bytes: {WAY}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of many pixels, which are not decoded
                image = Image.open(file, formats=FORMATS)
                texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
                comment = None if "parameters" in texts else image.getexif().get_ifd(ExifTags.IFD.Exif)
        except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
            raise UserError(f"{where} cannot be read as an image ({plain(error, 100)}): {WAY}") from None
    if comment is not None and (text := user_comment(comment)):
        texts["parameters"] = text
    return texts


def user_comment(exif: Mapping[int, object]) -> str:
    """Return the text of EXIF's UserComment, "" without one. UTF-16 is read in the byte order that gives more letters.

    A1111 writes big-endian UTF-16 into files whose EXIF is little-endian, and other programs the reverse.
    """
    raw = exif.get(ExifTags.Base.UserComment, b"")
    if isinstance(raw, str):
        return raw.strip("\0 ")
    if not isinstance(raw, bytes):
        return ""
    encoding = _ENCODINGS.get(raw[:8])
    body = raw[8:]
    if encoding == "utf-16":
        body = body[: len(body) // 2 * 2]
        texts = [body.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
        return max(texts, key=lambda text: sum(character.isascii() for character in text)).strip("\0\ufeff ")
    return "" if encoding is None else body.decode(encoding, "replace").strip("\0 ")
