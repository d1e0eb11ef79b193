"""Image files to arrays: any common mode to RGB on white, a square, [-1, 1]."""

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

# What is opened at all. Pillow knows more, one of which (EPS) starts an interpreter on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Decoding and scaling take up to 12 bytes a pixel (a progressive CMYK JPEG), WebP's decoder 16. What all threads
# decode at one time stays within MOST_MEMORY, and so within 2 GB beside MindSpore.
BYTES_A_PIXEL = 12
WEBP_BYTES_A_PIXEL = 16
MOST_MEMORY = 1_440_000_000  # 120 million pixels, of WebP 90 million
MOST_SIDE = 100_000  # scaling a strip of 1 x 1,000,000 pixels to a square takes 1 GB
MOST_BYTES = 720_000_000  # of a file: 120 million pixels in RGB of 16 bits, uncompressed
BYTES_AT_ONCE = 128_000_000  # of the files that all threads have open: a file may be metadata for the most part
STRIP_PIXELS = 1 << 20  # images that take part in a longer calculation go through it in strips

# Blocks larger than 32 MB go back to the system when an image is freed. Of smaller ones, Pillow's default, malloc keeps
# some for every thread: 2.5 GB instead of 1.3 where eight threads decode images of 110 million pixels in turn.
Image.core.set_block_size(64 << 20)
# Pillow's bound on a colour profile or compressed text, 1 MB, refuses PNGs of scanners and print shops.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
# What Pillow finds odd in a file that it reads all the same; what it cannot read raises an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# What Pillow raises on damaged files: of 6,800 of them, changed at random, all were among the first five; the others
# are what its decoders and its EXIF reader are built on.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
    EOFError,
    TypeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zlib.error,
)

_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BrokenImage(UserError):
    """An image file that cannot be used; `fault` says why, to follow its name: "is an empty file"."""

    def __init__(self, path: str | Path, fault: str):
        super().__init__(f"the image {plain(path)} {fault}")
        self.fault = fault


class _Budget:
    """Lets threads hold `total` units of something together; who asks for more than that waits to be the only one."""

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
_memory = _Budget(MOST_MEMORY)


@contextmanager
def decoded(path: str | Path, to_rgb: Callable[[Image.Image], Image.Image]) -> Iterator[Image.Image]:
    """Yield an image file decoded by `to_rgb`, within the memory that all threads have together for that.

    Raises:
        BrokenImage: the file is missing, is no image, is damaged or too large.
    """
    with _regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise BrokenImage(path, f"has {size:,} bytes, at most {MOST_BYTES:,} are read: scale it down")
        with _open_bytes.hold(size):
            with _faults(path, size):
                image = Image.open(file, formats=FORMATS)
                needed = _needed_memory(path, image)
            with image, _memory.hold(needed):
                with _faults(path, size):
                    image.load()
                    _needed_memory(path, image)  # a GIF grows where its frame is larger than its screen
                    rgb = to_rgb(image)
                if rgb is not image:
                    image.close()  # its pixels are no longer needed
                yield rgb


def open_rgb(path: str | Path) -> Image.Image:
    """The whole image, decoded, as RGB; see `on_white`. Raises BrokenImage as `decoded` does."""
    with decoded(path, on_white) as image:
        return image


def on_white(image: Image.Image) -> Image.Image:
    """An image as RGB: turned as its EXIF orientation says, transparent parts on white.

    Of an animation it is the first frame. 16-bit grey is brought to 8 bits by its range, not cut off.
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
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """An image as float32 (3, size, size) in [-1, 1]: a square of its shorter side, scaled to `size` pixels.

    Args:
        random_crop: take the square anywhere along the longer side instead of its middle.
        random_flip: mirror left and right every other time.
        rng: where both draw from; needed if either is asked for.

    Raises:
        UserError: the file is missing, is no image, is damaged or too large.
    """
    if (random_crop or random_flip) and rng is None:
        raise TypeError("random_crop and random_flip need a generator")
    try:
        with decoded(path, on_white) as image:
            square = _square(image, size, rng if random_crop else None)
    except BrokenImage as error:
        raise UserError(f"{error}; replace it or take out its row") from None
    if random_flip and rng.random() < 0.5:
        square = ImageOps.mirror(square)
    pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0)


def _square(image: Image.Image, size: int, rng: np.random.Generator | None) -> Image.Image:
    """A square of the shorter side, from the middle or where `rng` draws it, scaled to `size` pixels."""
    side = min(image.size)
    spare = (image.width - side, image.height - side)
    left, top = (int(rng.integers(room + 1)) if rng is not None else room / 2 for room in spare)
    # Cropping and scaling in one go: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
    if image.size != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return image


@contextmanager
def _regular_file(path: str | Path) -> Iterator[BinaryIO]:
    try:
        file = open_file(path)
    except UserError as error:
        # It begins with the path, which a BrokenImage names itself.
        raise BrokenImage(path, str(error).removeprefix(f"{plain(os.fspath(path))} ")) from None
    with file:
        yield file


@contextmanager
def _faults(path: str | Path, size: int) -> Iterator[None]:
    """Turn what decoding raises within the block into a BrokenImage, in a person's words."""
    try:
        yield
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        most = MOST_MEMORY // BYTES_A_PIXEL
        raise BrokenImage(path, f"has too many pixels, at most {most:,} are read: scale it down") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        fault = f"is no image in a known format ({known}) or cut off" if size else "is an empty file"
        raise BrokenImage(path, fault) from None
    except _DECODER_ERRORS as error:
        # Errors of the operating system name the path again in their long form.
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if detail.startswith(("Decompressed data too large", "Decompressed Data Too Large", "Too much memory used in")):
            detail = "more text or colour profile than is read: save it without"
        raise BrokenImage(path, f"is broken ({plain(detail)})") from None


def _needed_memory(path: str | Path, image: Image.Image) -> int:
    """The bytes that decoding takes. Raises BrokenImage for an image without pixels and for one that is too large."""
    width, height = image.size
    if 0 in image.size:
        raise BrokenImage(path, "has no pixels")
    a_pixel = WEBP_BYTES_A_PIXEL if image.format == "WEBP" else BYTES_A_PIXEL
    if width * height * a_pixel > MOST_MEMORY:
        most = f"{MOST_MEMORY // a_pixel:,}{' of a WebP' if image.format == 'WEBP' else ''}"
        raise BrokenImage(path, f"has {width:,} x {height:,} pixels, at most {most} are read: scale it down")
    if max(image.size) > MOST_SIDE:
        raise BrokenImage(path, f"has {width:,} x {height:,} pixels, at most {MOST_SIDE:,} a side are read: cut it up")
    return width * height * a_pixel


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image must be turned to stand upright; a damaged EXIF block says nothing about that."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except _DECODER_ERRORS:
        return None


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top, strip) of an image cut into strips of full width: what is calculated a pixel at a time takes little memory
    so.
    """
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composited(image: Image.Image) -> Image.Image:
    """An image with transparent parts as RGB on white."""
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (PNG, TIFF) to 8-bit; 32-bit integers and floats that stay within a smaller range by that range."""
    if image.mode == "F":
        # Floats are taken as 0 to 1 where they stay in it, else as 0 to 255.
        highest = np.max([np.asarray(strip).max() for _, strip in _strips(image)])
        largest = 1.0 if highest <= 1.0 else 255.0
    else:
        # Older Pillows give 16-bit PNGs as 32-bit integers.
        largest = 65535.0
    grey = Image.new("L", image.size)
    for top, strip in _strips(image):
        values = np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=0.0)
        values = np.clip(np.rint(values / largest * 255.0), 0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(values), (0, top))
    return grey
