"""Decode image files of any common format and mode into square arrays in [-1, 1], RGB or grey."""

from __future__ import annotations

import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

# The formats that are opened. Pillow has others, of which EPS runs an interpreter on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Decoding and scaling take up to 12 bytes a pixel (a progressive CMYK JPEG), or 16 for a WebP. All threads together
# decode within MAX_MEMORY, so the process stays within 2 GB, MindSpore included.
BYTES_A_PIXEL = 12
WEBP_BYTES_A_PIXEL = 16
MAX_MEMORY = 1_440_000_000  # 120 million pixels, or 90 million of a WebP
MAX_SIDE = 100_000  # scaling a strip of 1 x 1,000,000 pixels to a square takes 1 GB
MAX_BYTES = 720_000_000  # size of a file: 120 million pixels in RGB with 16 bits, uncompressed
BYTES_AT_ONCE = 128_000_000  # size of all files that are open together, because a file may be mostly metadata
STRIP_PIXELS = 1 << 20  # conversions that need floats or more channels work in strips of this size

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
_DECODER_ERRORS = _USUAL_ERRORS + _RARE_ERRORS

_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BrokenImage(UserError):
    """An image file that cannot be used. `fault` is the reason as a predicate, such as "is an empty file"."""

    def __init__(self, path: str | Path, fault: str):
        super().__init__(f"the image {plain(path)} {fault}")
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
def decoded(path: str | Path, to_rgb: Callable[[Image.Image], Image.Image]) -> Iterator[Image.Image]:
    """Yield an image file decoded by `to_rgb`, within the memory that all threads share.

    Raises:
        BrokenImage: The file is missing, is not an image, is damaged or too large.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise BrokenImage(path, f"has {size:,} bytes, at most {MAX_BYTES:,} are read: scale it down")
        with _open_bytes.hold(size):
            with _faults(path, size):
                image = Image.open(file, formats=FORMATS)
                needed = _needed_memory(path, image)
            with image, _memory.hold(needed):
                with _faults(path, size):
                    image.load()
                    _needed_memory(path, image)  # a GIF grows if its frame is larger than its screen
                    rgb = to_rgb(image)
                if rgb is not image:
                    image.close()  # its pixels are no longer needed
                yield rgb


def open_rgb(path: str | Path) -> Image.Image:
    """Return the whole image as RGB (see `on_white`). Raises BrokenImage as `decoded` does."""
    with decoded(path, on_white) as image:
        return image


def on_white(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, turned by its EXIF orientation, with transparent parts on white.

    An animation gives its first frame. Grey with 16 bits is scaled to 8 bits, not clipped.
    """
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _composited(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(
    path: str | Path,
    size: int,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Return an image as float32 (C, size, size) in [-1, 1]: a square of its shorter side, scaled to `size` pixels.

    Args:
        channels: 3 for RGB, 1 for grey, the luma of ITU-R 601.
        random_crop: Takes the square from a random place along the longer side instead of the middle.
        random_flip: Mirrors half of the images horizontally.
        rng: Generator for both, needed if either is on.

    Raises:
        UserError: The file is missing, is not an image, is damaged or too large.
    """
    if (random_crop or random_flip) and rng is None:
        raise TypeError("random_crop and random_flip need rng")
    try:
        with decoded(path, on_white) as image:
            square = _square(image, size, rng if random_crop else None)
    except BrokenImage as error:
        raise UserError(f"{error}; replace it or remove its row") from None
    if rng is not None and random_flip and rng.random() < 0.5:
        square = ImageOps.mirror(square)
    if channels == 1:
        square = square.convert("L")
    pixels = np.atleast_3d(np.asarray(square, dtype=np.float32)).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0)


def _square(image: Image.Image, size: int, rng: np.random.Generator | None) -> Image.Image:
    """Crop a square of the shorter side from the middle, or from where `rng` draws it, and scale it to `size`."""
    side = min(image.size)
    margins = (image.width - side, image.height - side)
    left, top = (int(rng.integers(margin + 1)) if rng is not None else margin / 2 for margin in margins)
    # Cropped and scaled in one step: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
    if image.size != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return image


def _open(path: str | Path) -> BinaryIO:
    try:
        return open_file(path)
    except UserError as error:
        # The message begins with the path, which BrokenImage adds itself.
        raise BrokenImage(path, str(error).removeprefix(f"{plain(os.fspath(path))} ")) from None


@contextmanager
def _faults(path: str | Path, size: int) -> Iterator[None]:
    """Raise a readable BrokenImage for any error that decoding raises within the block."""
    try:
        yield
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        most = MAX_MEMORY // BYTES_A_PIXEL
        raise BrokenImage(path, f"has too many pixels, at most {most:,} are read: scale it down") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        fault = f"is no image in a known format ({known}) or cut off" if size else "is an empty file"
        raise BrokenImage(path, fault) from None
    except _DECODER_ERRORS as error:
        # The long form of operating system errors repeats the path.
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if detail.startswith(("Decompressed data too large", "Decompressed Data Too Large", "Too much memory used in")):
            detail = "its text or colour profile is too large: save it without"
        raise BrokenImage(path, f"is broken ({plain(detail)})") from None


def _needed_memory(path: str | Path, image: Image.Image) -> int:
    """Return the bytes that decoding takes. Raises BrokenImage for an image without pixels or of too many."""
    width, height = image.size
    if 0 in image.size:
        raise BrokenImage(path, "has no pixels")
    a_pixel = WEBP_BYTES_A_PIXEL if image.format == "WEBP" else BYTES_A_PIXEL
    if width * height * a_pixel > MAX_MEMORY:
        most = f"{MAX_MEMORY // a_pixel:,}{' of a WebP' if image.format == 'WEBP' else ''}"
        raise BrokenImage(path, f"has {width:,} x {height:,} pixels, at most {most} are read: scale it down")
    if max(image.size) > MAX_SIDE:
        raise BrokenImage(path, f"has {width:,} x {height:,} pixels, at most {MAX_SIDE:,} a side are read: cut it up")
    return width * height * a_pixel


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn an image upright, None for a damaged EXIF block or one without an orientation."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 0))
    except _DECODER_ERRORS:
        return None


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (top, strip) for strips of full width, so that a conversion takes little memory."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composited(image: Image.Image) -> Image.Image:
    """Paste an image with transparent parts on white."""
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey with 16 bits, 32 bits or floats to 8 bits."""
    if image.mode == "F":
        # The range of floats is 0 to 1 if none is above 1, else 0 to 255.
        highest = np.max([np.asarray(strip).max() for _, strip in _strips(image)])
        largest = 1.0 if highest <= 1.0 else 255.0
    else:
        # Older versions of Pillow read 16-bit PNGs as 32-bit integers.
        largest = 65535.0
    grey = Image.new("L", image.size)
    for top, strip in _strips(image):
        values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=0.0)
        values = np.clip(np.rint(values / largest * 255.0), 0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(values), (0, top))
    return grey
