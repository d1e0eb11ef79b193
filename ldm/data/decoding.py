"""Open and decode image files of any common format, within the memory that all threads share.

An image is a file, or a part of one (`ldm.data.sources.rows.FilePart`): a member of a tar shard, or a value in an Arrow
file. A part is read into memory. Limits and errors are the same.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable, TypeVar

import PIL
from PIL import Image, PngImagePlugin, TiffImagePlugin, features

from ldm.data.buckets import Size
from ldm.data.sources.rows import MAX_IMAGE_BYTES, FilePart, ImageFile, read_image, readable_name
from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

# The formats that are opened. Pillow has others, of which EPS runs an interpreter on the file.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3 and later
    from PIL import AvifImagePlugin

    FORMATS += ("AVIF",)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several images are decoded at once already, each within its memory

# Decoding and scaling take up to 12 bytes a pixel (a progressive CMYK JPEG), or more in some formats. All threads
# together decode within MAX_MEMORY, so the process stays within 2 GB, MindSpore included.
BYTES_A_PIXEL = 12
LARGER_FORMATS = {"WEBP": ("a WebP", 16), "AVIF": ("an AVIF", 24)}
MAX_MEMORY = 1_440_000_000  # 120 million pixels, 90 million of a WebP, or 60 million of an AVIF
MAX_SIDE = 100_000  # scaling a strip of 1 x 1,000,000 pixels to a square takes 1 GB
MAX_BYTES = MAX_IMAGE_BYTES  # size of a file
BYTES_AT_ONCE = 128_000_000  # size of all files that are open together, because a file may be mostly metadata

# Blocks larger than 32 MB return to the system when an image is freed. Of smaller ones, Pillow's default, malloc keeps
# some for every thread: 2.5 GB instead of 1.3 GB when eight threads decode images of 110 million pixels in turn.
Image.core.set_block_size(64 << 20)
# Pillow's limit for colour profiles and compressed text, 1 MB, refuses PNGs of scanners and print shops.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
# Warnings about files that Pillow reads all the same. Files that it cannot read raise errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# The errors that Pillow raises on damaged files. For 6,800 files with random damage all were usual ones. The rare ones
# belong to the modules that its decoders and its EXIF reader use.
_USUAL_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
_RARE_ERRORS = (EOFError, TypeError, LookupError, AssertionError, ArithmeticError, struct.error, zlib.error)
DECODER_ERRORS = _USUAL_ERRORS + _RARE_ERRORS

_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SWAPS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip

_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_MOST_CHUNKS = 100_000  # of a PNG that are looked at for metadata behind its pixels

Converted = TypeVar("Converted")


class BrokenImage(UserError):
    """An image file that cannot be used. `fault` is the reason as a predicate, such as "is an empty file"."""

    def __init__(self, file: ImageFile | Path, fault: str):
        super().__init__(f"the image {readable_name(file)} {fault}")
        self.fault = fault


class _Budget:
    """Shares `total` units between threads. A thread that needs more waits until no other holds any."""

    def __init__(self, total: int):
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, units: int) -> Iterator[None]:
        units = min(units, self._total)
        with self._changed:
            self._changed.wait_for(lambda: units <= self._free)
            self._free -= units
        try:
            yield
        finally:
            with self._changed:
                self._free += units
                self._changed.notify_all()


_open_bytes = _Budget(BYTES_AT_ONCE)
_memory = _Budget(MAX_MEMORY)


@contextmanager
def decoded(file: ImageFile | Path, convert: Callable[[Image.Image], Converted]) -> Iterator[Converted]:
    """Yield what `convert` makes of a decoded image, within the memory that all threads share.

    Raises:
        BrokenImage: The file is missing, is not an image, is damaged or too large.
    """
    with _opened(file) as (stream, size):
        with _faults(file, size):
            image = Image.open(stream, formats=FORMATS)
            needed = _needed_memory(file, image)
        with image, _memory.hold(needed):
            with _faults(file, size):
                image.load()
                _needed_memory(file, image)  # a GIF grows if its frame is larger than its screen
                converted = convert(image)
            if converted is not image:
                image.close()  # its pixels are no longer needed
            yield converted


def read_size(file: ImageFile | Path) -> Size:
    """Return the width and height of an image, upright, from its header. Raises BrokenImage.

    Only a PNG with texts or EXIF behind its pixels is decoded, because Pillow reads these with the pixels.
    """
    with _opened(file) as (stream, size), _faults(file, size), Image.open(stream, formats=FORMATS) as image:
        needed = _needed_memory(file, image)
        if not isinstance(image, PngImagePlugin.PngImageFile):
            turn = find_turn(image)
        elif _has_metadata_behind(stream):
            with _memory.hold(needed):
                turn = find_turn(image)
        else:
            turn = find_turn(image, Image.Image.getexif)  # that of PngImageFile decodes the pixels
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # later versions of Pillow turn the size themselves
            width, height = (int(image.tag_v2[tag]) for tag in (256, 257))
    swaps = turn is not None and turn in _SWAPS
    return (height, width) if swaps else (width, height)


def find_turn(
    image: Image.Image, getexif: Callable[[Image.Image], Image.Exif] = lambda image: image.getexif()
) -> Image.Transpose | None:
    """Return how to turn an image upright, None for a damaged EXIF block or one without an orientation."""
    try:
        return _TURNS.get(getexif(image).get(_ORIENTATION, 0))
    except DECODER_ERRORS:
        return None


@contextmanager
def _opened(file: ImageFile | Path) -> Iterator[tuple[BinaryIO, int]]:
    """Yield an open image file and its size in bytes, within the bytes that all threads share."""
    if isinstance(file, FilePart):
        with _open_bytes.hold(file.size):
            content = io.BytesIO(_read_part(file))
            _check_format(file, content)
            yield content, file.size
        return
    with _open(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_BYTES:
            raise BrokenImage(file, f"has {size:,} bytes, at most {MAX_BYTES:,} are read: scale it down")
        _check_format(file, stream)
        with _open_bytes.hold(size):
            yield stream, size


def _open(path: str | Path) -> BinaryIO:
    try:
        return open_file(path)
    except UserError as error:
        # The message begins with the path, which BrokenImage adds itself.
        raise BrokenImage(path, str(error).removeprefix(f"{readable_name(path)} ")) from None


def _read_part(part: FilePart) -> bytes:
    try:
        return read_image(part)
    except UserError as error:
        raise BrokenImage(part, str(error).removeprefix(f"the image {readable_name(part)} ")) from None


def _check_format(file: ImageFile | Path, stream: BinaryIO) -> None:
    """Raise BrokenImage for a format that another Pillow reads."""
    if "AVIF" not in FORMATS:
        head = stream.read(12)
        stream.seek(0)
        if head[4:] in (b"ftypavif", b"ftypavis"):
            raise BrokenImage(
                file,
                f"is an AVIF, which Pillow {PIL.__version__} does not read: install Pillow 11.3, or save it as PNG",
            )


@contextmanager
def _faults(file: ImageFile | Path, size: int) -> Iterator[None]:
    """Raise a readable BrokenImage for any error that decoding raises within the block."""
    try:
        yield
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        most = MAX_MEMORY // BYTES_A_PIXEL
        raise BrokenImage(file, f"has too many pixels, at most {most:,} are read: scale it down") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        fault = f"is no image in a known format ({known}) or cut off" if size else "is an empty file"
        raise BrokenImage(file, fault) from None
    except DECODER_ERRORS as error:
        # The long form of operating system errors repeats the path.
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if detail.startswith(("Decompressed data too large", "Decompressed Data Too Large", "Too much memory used in")):
            detail = "its text or colour profile is too large: save it without"
        raise BrokenImage(file, f"is broken ({plain(detail)})") from None


def _needed_memory(file: ImageFile | Path, image: Image.Image) -> int:
    """Return the bytes that decoding takes. Raises BrokenImage for an image without pixels or of too many."""
    width, height = image.size
    if 0 in image.size:
        raise BrokenImage(file, "has no pixels")
    name, a_pixel = LARGER_FORMATS.get(image.format or "", ("", BYTES_A_PIXEL))
    if width * height * a_pixel > MAX_MEMORY:
        most = f"{MAX_MEMORY // a_pixel:,}{name and f' of {name}'}"
        raise BrokenImage(file, f"has {width:,} x {height:,} pixels, at most {most} are read: scale it down")
    if max(image.size) > MAX_SIDE:
        raise BrokenImage(file, f"has {width:,} x {height:,} pixels, at most {MAX_SIDE:,} a side are read: cut it up")
    return width * height * a_pixel


def _has_metadata_behind(file: BinaryIO) -> bool:
    """Return whether an open PNG has texts or EXIF behind its pixels."""
    place = file.tell()
    try:
        file.seek(8)
        pixels_seen = False
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            pixels_seen = pixels_seen or head[4:] == b"IDAT"
            if pixels_seen and head[4:] in _PNG_METADATA:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return True
    finally:
        file.seek(place)
