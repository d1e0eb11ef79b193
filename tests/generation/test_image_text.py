"""Texts in image files: those of PNG, JPEG and WebP are found without decoding an image, and bad files are named."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.generation.image_files import write_png
from ldm.generation.image_text import read_image_text, user_comment

TEXT = "a cat, 猫\nSteps: 20, Sampler: Euler, Seed: 1"


def exif(comment):
    content = Image.Exif()
    content.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return content.tobytes()


def test_the_text_fields_of_a_png(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), {"prompt": "猫", "parameters": TEXT})
    texts = read_image_text(tmp_path / "a.png", "from_image")
    assert texts == {"prompt": "猫", "parameters": TEXT}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_the_comment_of_jpeg_and_webp(tmp_path, suffix, encoding):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (8, 8)).save(path, exif=exif(b"UNICODE\0" + TEXT.encode(encoding)))
    assert read_image_text(path, "from_image")["parameters"] == TEXT


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"ASCII\0\0\0a cat", "a cat"),
        (b"\0" * 8 + b"a cat\0\0", "a cat"),
        (b"JIS\0\0\0\0\0a cat", ""),
        (b"UNICODE\0", ""),
        (b"UNICODE\0a", ""),
        (b"UNICODE\0\xd8\x00\x00a", "\ufffd" + "a"),
        (b"", ""),
        (7, ""),
        ("a cat", "a cat"),
    ],
)
def test_comments_in_other_encodings(raw, text):
    assert user_comment({ExifTags.Base.UserComment: raw}) == text


def test_a_text_after_the_pixels_or_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert read_image_text(tmp_path / "a.png", "from_image") == {}


def test_pixels_are_not_decoded(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"tEXt", b"parameters\0a cat") + b"IDAT")
    with pytest.raises(UserError, match="from_image .*large.png cannot be read as an image"):
        read_image_text(path, "from_image")  # Pillow refuses the size


def bomb(path):
    info = PngInfo()
    info.add_text("parameters", "a" * (8 << 20), zip=True)
    Image.new("L", (1, 1)).save(path, pnginfo=info)


BAD = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "fifo": (lambda path: os.mkfifo(path), "is a pipe"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as an image"),
    "text": (lambda path: path.write_text("Steps: 1"), "cannot be read as an image"),
    "gif": (lambda path: Image.new("L", (1, 1)).save(path, format="GIF"), "cannot be read as an image"),
    "cut off": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "cannot be read as an image"),
    "a compressed text of 8 MiB": (bomb, "cannot be read as an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, case):
    make, message = BAD[case]
    make(tmp_path / "bad.png")
    with pytest.raises(UserError, match=f"from_image .*bad.png.*{message}.*give a PNG, JPEG or WebP"):
        read_image_text(tmp_path / "bad.png", "from_image")
