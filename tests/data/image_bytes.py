"""Image files that tests write, and the bytes of some that no library writes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm.data import decoding
from ldm.data.sources.rows import FilePart
from ldm.data.transforms import load_image
from ldm.data.upright import open_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(tmp_path, image, name="image.png", **settings):
    path = tmp_path / name
    image.save(path, **settings)
    return path


def pixel(path, x=0, y=0):
    """The RGB of one pixel of an 8x8 image, 0 to 255."""
    image = load_image(path, 8)
    return tuple(int(value) for value in np.rint((image[:, y, x] + 1) * 127.5))


def exif_block(*entries):
    """An EXIF block of (tag, type, count, 4 bytes of value or offset)."""
    tags = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + tags + bytes(4)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


def encoded(suffix):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, rows=None):
    """A grey PNG that says it has this size; black where `rows` are not given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = zlib.compress(bytes(width * height + height) if rows is None else rows)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", content), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width, height):
    content = bytearray(encoded("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif(width, height):
    """Its screen is of one pixel, its first frame is larger."""
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", 1, 1)
    place = content.index(b"\x2c\0\0\0\0\x20\0\x20\0")
    content[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(content)


def webp(width, height):
    """A canvas of this size around an image of another one."""
    image = encoded("WEBP")[12:]
    canvas = b"VP8X\x0a\0\0\0" + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(image)) + b"WEBP" + canvas + image


NOISE = np.random.default_rng(7).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def rgb_at(path, x=0, y=0, **settings):
    return tuple(int(value) for value in np.asarray(open_rgb(path, **settings))[y, x])


def needs_avif():
    if "AVIF" not in decoding.FORMATS:
        pytest.skip("this Pillow does not read AVIF")


def part_of(tmp_path, content, name="a/cat.png"):
    """`content` in the middle of a larger file."""
    path = tmp_path / "shard-00.tar"
    path.write_bytes(b"\x89PNG before" + content + b"behind")
    return FilePart(str(path), len(b"\x89PNG before"), len(content), name)
