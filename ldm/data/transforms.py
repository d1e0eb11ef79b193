"""Picture files to arrays: any common mode to RGB on white, a square, [-1, 1]."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.errors import UserError

# What is opened at all. Pillow knows more, one of which (EPS) starts an interpreter on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# What Pillow raises on damaged files: of 6,800 of them, changed at random, all were among the first five; the others
# are what its decoders and its EXIF reader are built on.
PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
    EOFError,
    TypeError,
    LookupError,
    struct.error,
    zlib.error,
)


def open_rgb(path: str | Path) -> Image.Image:
    """The whole picture, decoded, as RGB: turned as its EXIF orientation says, transparent parts on white.

    Of an animation it is the first frame. 16-bit grey is brought to 8 bits by its range, not cut off.

    Raises:
        one of PICTURE_ERRORS: the file is missing, is no picture, or is damaged.
    """
    with Image.open(path, formats=FORMATS) as file:
        file.load()
        if 0 in file.size:
            raise ValueError("it has no pixels")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    transparent = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def load_image(
    path: str | Path,
    size: int,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """A picture as float32 (3, size, size) in [-1, 1]: a square of its shorter side, scaled to `size` pixels.

    Args:
        random_crop: take the square anywhere along the longer side instead of its middle.
        random_flip: mirror left and right every other time.
        rng: where both draw from; needed if either is asked for.

    Raises:
        UserError: the file is missing, is no picture, or is damaged.
    """
    if (random_crop or random_flip) and rng is None:
        raise TypeError("random_crop and random_flip need a generator")
    try:
        image = open_rgb(path)
    except PICTURE_ERRORS as error:
        raise UserError(f"the picture {path} {picture_fault(path, error)}: replace it or take out its row") from None
    side = min(image.size)
    spare = (image.width - side, image.height - side)
    left, top = (int(rng.integers(room + 1)) for room in spare) if random_crop else (room / 2 for room in spare)
    # Cropping and scaling in one go: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
    if image.size != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if random_flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0)


def picture_fault(path: str | Path, error: Exception) -> str:
    """What is wrong with a picture that `open_rgb` failed on, in a person's words, to follow its name."""
    path = Path(path)
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(error, Image.DecompressionBombError):
        return "has too many pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return "is an empty file" if empty else f"is no picture in a known format ({', '.join(FORMATS)}) or cut off"
    # Errors of the operating system name the path again in their long form.
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"is broken ({detail})"


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (PNG, TIFF) to 8-bit; 32-bit integers and floats that stay within a smaller range by that range."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        # Floats are taken as 0 to 1 where they stay in it, else as 0 to 255.
        largest = 1.0 if values.max() <= 1.0 else 255.0
    else:
        # Older Pillows give 16-bit PNGs as 32-bit integers.
        largest = 65535.0
    return Image.fromarray(np.clip(np.rint(values / largest * 255.0), 0, 255).astype(np.uint8))
