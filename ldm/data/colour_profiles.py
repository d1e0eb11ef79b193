"""Find how an image becomes sRGB, from the ICC colour profile in its file."""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Colour spaces of profiles, and the modes in which Pillow holds such images.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# A profile that changes no colour by more than this, of 255, is sRGB. Files with sRGB differ by 1 among themselves. The
# next profile in use, sRGB's primaries with a plain power of 2.2, differs by 7 in dark colours.
_TOLERANCE = 2
_MOST_KNOWN = 32  # conversions that are kept; one from CMYK takes 2 MB
_NO_CACHE = 0x0040  # cmsFLAGS_NOCACHE: threads share conversions


class Conversion(NamedTuple):
    """Converts images of one mode to sRGB."""

    mode: str  # RGB, L or CMYK
    transform: ImageCms.ImageCmsTransform


class UnusableProfile(Exception):
    """A profile that is damaged, or of colours that no image has."""


_known: dict[bytes, Conversion | UnusableProfile | None] = {}


def find_conversion(profile: object) -> Conversion | None:
    """Return how images with an ICC profile become sRGB, None for a profile that is sRGB itself.

    Args:
        profile: The bytes of the profile. A damaged file may give something else.

    Raises:
        UnusableProfile: The profile is damaged, or is not for RGB, grey or CMYK.
    """
    if not isinstance(profile, bytes):
        raise UnusableProfile
    key = hashlib.sha256(profile).digest()
    try:
        found = _known[key]
    except KeyError:
        try:
            found = _read(profile)
        except UnusableProfile as error:
            found = error
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = found
    if isinstance(found, UnusableProfile):
        raise UnusableProfile
    return found


def _read(profile: bytes) -> Conversion | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if mode is None:
            raise UnusableProfile
        transform = ImageCms.ImageCmsTransform(source, _srgb(), mode, "RGB", flags=_NO_CACHE)  # type: ignore[arg-type]
    # ImportError: Pillow was built without LittleCMS.
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        raise UnusableProfile from None
    return None if _changes_nothing(mode, transform) else Conversion(mode, transform)


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(mode: str, transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a conversion leaves colours as they are, tried on greys and on 17 steps of each channel."""
    grey = np.arange(256, dtype=np.uint8)
    if mode == "L":
        tried, expected = grey[None], np.repeat(grey[None, :, None], 3, axis=2)
    elif mode == "RGB":
        steps = np.linspace(0, 255, 17).astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        tried = expected = np.concatenate([np.repeat(grey[None, :, None], 3, axis=2), cube], axis=1)
    else:
        return False
    result = np.asarray(transform.apply(Image.fromarray(tried)), dtype=np.int16)
    return bool(np.abs(result - expected).max() <= _TOLERANCE)
