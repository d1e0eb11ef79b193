"""Turn decoded images upright and convert them to sRGB, or read them as numbers: a mask, an alpha channel.

Whoever changes pixels raises `ldm.data.transforms.IMAGE_CODE`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from ldm.data.colour_profiles import Conversion, UnusableProfile, find_conversion
from ldm.data.decoding import DECODER_ERRORS, decoded, find_turn
from ldm.data.sources.rows import ImageFile, readable_name
from ldm.errors import UserError, plain

Color = tuple[int, int, int]  # RGB, 0 to 255
WHITE: Color = (255, 255, 255)
STRIP_PIXELS = 1 << 20  # conversions that need floats or more channels work in strips of this size
MOST_NAMED = 3  # images in a note
MOST_NOTED = 100_000  # images that are counted for a note

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


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
    turn = find_turn(image)
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
    turn = find_turn(image)
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
    turn = find_turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F" or not _has_alpha(image):
        return None
    alpha = Image.new("L", image.size)
    for top, strip in _strips(image):
        alpha.paste(strip.convert("RGBA").getchannel("A"), (0, top))
    return alpha


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _has_frames(image: Image.Image) -> bool:
    """Return whether a file has more frames or pages than the first. A GIF must have been converted already."""
    if image.format == "MPO":  # a photograph with a preview or a depth map
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODER_ERRORS:  # damaged behind its first frame
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
