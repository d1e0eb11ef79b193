"""Decode image files of any common format and mode into arrays of a given size in [-1, 1], sRGB or grey.

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
from functools import partial
from pathlib import Path
from typing import BinaryIO, Callable, NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image, ImageColor, ImageOps, PngImagePlugin, TiffImagePlugin, features

from ldm.data.buckets import Box, Size, crop_box
from ldm.data.colour_profiles import Conversion, UnusableProfile, find_conversion
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
_SWAPS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip

Color = tuple[int, int, int]  # RGB, 0 to 255
WHITE: Color = (255, 255, 255)
MOST_NAMED = 3  # images in a note
MOST_NOTED = 100_000  # images that are counted for a note
# The version of what is made of an image, which the keys of cached latents hold: raise it with every change of pixels.
IMAGE_CODE = f"1, {'with' if features.check('littlecms2') else 'without'} colour profiles"

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_MOST_CHUNKS = 100_000  # of a PNG that are looked at for metadata behind its pixels

Converted = TypeVar("Converted")


class BrokenImage(UserError):
    """An image file that cannot be used. `fault` is the reason as a predicate, such as "is an empty file"."""

    def __init__(self, file: ImageFile | Path, fault: str):
        super().__init__(f"the image {readable_name(file)} {fault}")
        self.fault = fault


class Placement(NamedTuple):
    """The part of an image that is trained. An image and its mask share it."""

    image_size: Size  # of the whole image, upright
    box: Box  # the part
    size: Size  # that the part is scaled to
    mirrored: bool


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


class ImageNotes:
    """Counts what is to be said of images that are read all the same. Threads may share it."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def add(self, note: str, file: ImageFile | Path) -> None:
        """Note something of an image, once however often it is read."""
        with self._lock:
            names = self._names.setdefault(note, {})
            if len(names) < MOST_NOTED:
                names[readable_name(file)] = None

    def lines(self, new: bool = False) -> list[str]:
        """Return a line for each kind of note, with the number of images and the first of them by name.

        Args:
            new: Leave out the kinds that an earlier call has returned.
        """
        with self._lock:
            lines = []
            for note, names in sorted(self._names.items()):
                if new and note in self._told:
                    continue
                self._told.add(note)
                named = sorted(names)[:MOST_NAMED]
                if len(names) > MOST_NAMED:
                    named.append("...")
                images = "1 image has" if len(names) == 1 else f"{len(names):,} images have"
                if len(names) == MOST_NOTED:
                    images = f"{MOST_NOTED:,} images or more have"
                lines.append(f"{images} {note}: {', '.join(named)}")
            return lines


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


def open_rgb(file: ImageFile | Path, alpha_color: Color = WHITE, notes: ImageNotes | None = None) -> Image.Image:
    """Return the whole image as RGB (see `upright_rgb`). Raises BrokenImage as `decoded` does."""
    with decoded(file, partial(upright_rgb, alpha_color=alpha_color, notes=notes, file=file)) as image:
        return image


def upright_rgb(
    image: Image.Image, alpha_color: Color = WHITE, notes: ImageNotes | None = None, file: ImageFile | Path = ""
) -> Image.Image:
    """Convert an image to sRGB, turned by its EXIF orientation, with transparent parts on `alpha_color`.

    An animation gives its first frame. Grey with 16 bits is scaled to 8 bits, not clipped. Colours are converted from
    the image's colour profile. Without one, or with one that cannot be used, they are taken for sRGB.

    Args:
        notes: Takes a note of an animation and of a profile that cannot be used.
        file: Of the image, for the notes.
    """
    source = image
    conversion = _conversion(image, notes, file)
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if _has_alpha(image):
        image = _composited(image, alpha_color, conversion)
    else:
        image = _to_srgb(image, conversion)
    if notes is not None and _has_frames(source):
        notes.add("several frames, of which the first is used", file)
    return image


def upright_red(image: Image.Image) -> Image.Image:
    """Return the red channel of an image, turned by its EXIF orientation, in 8 bits. Grey is its own red channel.

    An alpha channel and a colour profile have no effect: what is read are numbers, no colours.
    """
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB").getchannel("R")


def upright_alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of an image, turned by its EXIF orientation, in 8 bits. None if it has none.

    A transparent colour of a palette counts, and one of a grey or RGB image of 8 bits.
    """
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F" or not _has_alpha(image):
        return None
    alpha = Image.new("L", image.size)
    for top, strip in _strips(image):
        alpha.paste(strip.convert("RGBA").getchannel("A"), (0, top))
    return alpha


def read_size(file: ImageFile | Path) -> Size:
    """Return the width and height of an image, upright, from its header. Raises BrokenImage.

    Only a PNG with texts or EXIF behind its pixels is decoded, because Pillow reads these with the pixels.
    """
    with _opened(file) as (stream, size), _faults(file, size), Image.open(stream, formats=FORMATS) as image:
        needed = _needed_memory(file, image)
        if not isinstance(image, PngImagePlugin.PngImageFile):
            turn = _turn(image)
        elif _has_metadata_behind(stream):
            with _memory.hold(needed):
                turn = _turn(image)
        else:
            turn = _turn(image, Image.Image.getexif)  # that of PngImageFile decodes the pixels
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # later versions of Pillow turn the size themselves
            width, height = (int(image.tag_v2[tag]) for tag in (256, 257))
    swaps = turn is not None and turn in _SWAPS
    return (height, width) if swaps else (width, height)


def parse_color(name: str, text: str) -> Color:
    """Return the colour that a setting gives as a name, #rrggbb or rgb(r, g, b).

    Args:
        name: The setting, for the error.

    Raises:
        UserError: It is no colour, or has an alpha channel.
    """
    way = "give a colour such as white, #ffffff or rgb(255, 255, 255)"
    try:
        color = ImageColor.getrgb(text)
    except ValueError:
        raise UserError(f'{name}: "{plain(text)}" is no colour: {way}') from None
    if len(color) != 3:
        raise UserError(f'{name}: "{plain(text)}" is transparent: {way}')
    return color


def load_image(
    file: ImageFile | Path,
    size: int | Size,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
    alpha_color: Color = WHITE,
    notes: ImageNotes | None = None,
) -> np.ndarray:
    """Return an image as float32 (C, height, width) in [-1, 1]: its largest part of the wanted shape, scaled.

    Args:
        size: Width and height in pixels, or the side of a square.
        channels: 3 for RGB, 1 for grey, the luma of ITU-R 601.
        random_crop: Takes the part from a random place along the longer side instead of the middle.
        random_flip: Mirrors half of the images horizontally.
        rng: Generator for both, needed if either is on.
        scale: Pixels of the result for a pixel of the image: see `ldm.data.buckets.crop_box`.
        alpha_color: Stands behind transparent parts.
        notes: Takes notes of the image: see `upright_rgb`.

    Raises:
        UserError: The file is missing, is not an image, is damaged or too large.
    """
    return load_placed(
        file, size, channels=channels, random_crop=random_crop, random_flip=random_flip, rng=rng, scale=scale,
        alpha_color=alpha_color, notes=notes,
    )[0]  # fmt: skip


def load_placed(
    file: ImageFile | Path,
    size: int | Size,
    *,
    channels: int = 3,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
    alpha_color: Color = WHITE,
    notes: ImageNotes | None = None,
) -> tuple[np.ndarray, Placement]:
    """Return what `load_image` does, and which part of the image it is."""
    try:
        with decoded(file, partial(upright_rgb, alpha_color=alpha_color, notes=notes, file=file)) as image:
            placement = place(
                image.size, size, random_crop=random_crop, random_flip=random_flip, rng=rng, scale=scale
            )  # fmt: skip
            if image.size == placement.size:
                part = image
            else:
                # Cropped and scaled in one step: a strip of 1 x 10,000 pixels never becomes 512 x 5,120,000.
                part = image.resize(placement.size, Image.Resampling.BICUBIC, box=placement.box)
    except BrokenImage as error:
        raise UserError(f"{error}; replace it or remove its row") from None
    if placement.mirrored:
        part = ImageOps.mirror(part)
    if channels == 1:
        part = part.convert("L")
    pixels = np.atleast_3d(np.asarray(part, dtype=np.float32)).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0), placement


def place(
    image_size: Size,
    size: int | Size,
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
    scale: float | None = None,
) -> Placement:
    """Choose the part of an image that is trained. The arguments are those of `load_image`.

    Args:
        image_size: Width and height of the whole image, upright.
    """
    if (random_crop or random_flip) and rng is None:
        raise TypeError("random_crop and random_flip need rng")
    target = (size, size) if isinstance(size, int) else size
    box = crop_box(image_size, target, scale, rng if random_crop else None)
    if image_size == target:  # with a scale above 1 as well
        box = (0, 0, *image_size)
    mirrored = rng is not None and random_flip and bool(rng.random() < 0.5)
    return Placement(image_size, box, target, mirrored)


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
    except _DECODER_ERRORS as error:
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


def _turn(
    image: Image.Image, getexif: Callable[[Image.Image], Image.Exif] = lambda image: image.getexif()
) -> Image.Transpose | None:
    """Return how to turn an image upright, None for a damaged EXIF block or one without an orientation."""
    try:
        return _TURNS.get(getexif(image).get(_ORIENTATION, 0))
    except _DECODER_ERRORS:
        return None


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


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _has_frames(image: Image.Image) -> bool:
    """Return whether a file has more frames or pages than the first. A GIF must have been converted already."""
    if image.format == "MPO":  # a photograph with a preview or a depth map
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except _DECODER_ERRORS:  # damaged behind its first frame
        return False


def _conversion(image: Image.Image, notes: ImageNotes | None, file: ImageFile | Path) -> Conversion | None:
    """Return how an image's colours become sRGB. None if they are, or if its profile cannot be used."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        conversion = find_conversion(profile)
    except UnusableProfile:
        fault = "a damaged or unknown colour profile, which is ignored"
    else:
        if conversion is None:
            return None
        # A grey image is an RGB one as well, and so is one with a palette.
        is_grey = image.mode in _GREY_MODES or image.mode.startswith("I;")
        if conversion.mode == {"CMYK": "CMYK"}.get(image.mode, "RGB") or (conversion.mode == "L" and is_grey):
            return conversion
        fault = "a colour profile of another kind of image, which is ignored"
    if notes is not None:
        notes.add(fault, file)
    return None


def _to_srgb(image: Image.Image, conversion: Conversion | None) -> Image.Image:
    """Return an image without transparency as RGB. The colours of one that is RGB are converted in place."""
    if conversion is None or conversion.mode == "RGB":
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb if conversion is None else conversion.transform.apply_in_place(rgb)
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(conversion.transform.apply(strip.convert(conversion.mode)), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (top, strip) for strips of full width, so that a conversion takes little memory."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composited(image: Image.Image, alpha_color: Color, conversion: Conversion | None) -> Image.Image:
    """Paste an image with transparent parts on a colour."""
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgba = strip.convert("RGBA")
        if conversion is not None:
            alpha = rgba.getchannel("A")
            rgba = _to_srgb(rgba if conversion.mode == "RGB" else rgba.convert("L"), conversion)
            rgba.putalpha(alpha)
        background = Image.new("RGBA", strip.size, alpha_color)
        rgb.paste(Image.alpha_composite(background, rgba).convert("RGB"), (0, top))
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
