"""Sample images inside of a page: small copies as data URLs."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

from PIL import Image

from ldm.errors import UserError
from ldm.files.inputs import file_status, read_bytes
from ldm.training.report.markup import Markup, raw
from ldm.training.report.records import Frame, Strip

logger = logging.getLogger(__name__)

MOST_FRAMES = 12  # of a strip on a page
LONGEST_SIDE = 384  # pixels of an image on a page
LONGEST_STRIP = 2400  # pixels of a whole film strip
SMALL = 128  # pixels of the longer side up to which an image stays PNG, without loss
QUALITY = 85  # of JPEG: 25 kB for an image of 384 pixels
MAX_BYTES = 64 << 20  # of a sample image
MAX_PIXELS = 64_000_000


class Embedded(NamedTuple):
    """An image inside of a page."""

    url: Markup
    width: int  # pixels
    height: int


def choose_frames(frames: Sequence[Frame], most: int = MOST_FRAMES) -> list[Frame]:
    """Return at most so many frames: the first, the last, and others evenly between them."""
    if len(frames) <= most:
        return list(frames)
    return [frames[round(place * (len(frames) - 1) / (most - 1))] for place in range(most)]


def embed(path: Path, longest: int = LONGEST_SIDE) -> Optional[Embedded]:
    """Return an image as a data URL, None if it cannot be read. One that did not change is encoded once."""
    try:
        status = file_status(path)
        return None if status is None else _embed(path, longest, status.st_size, status.st_mtime_ns)
    except UserError as error:
        logger.debug("not in the report: %s", error)
        return None


@lru_cache(2048)  # images, of about 30 kB
def _embed(path: Path, longest: int, size: int, changed: int) -> Optional[Embedded]:
    content = read_bytes(path, "the sample image", most=MAX_BYTES)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        logger.debug("not in the report: %s: %s", path, error)
        return None
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(small.size) <= SMALL:
        small.save(buffer, "PNG", optimize=True)
    else:
        small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    kind = "png" if max(small.size) <= SMALL else "jpeg"
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(raw(f"data:image/{kind};base64,{text}"), *small.size)


def all_steps(strips: Sequence[Strip], most: int) -> list[int]:
    """Return the steps that any of these strips has, at most so many: the first, the last, and evenly between."""
    steps = sorted({frame.step for strip in strips for frame in strip.frames})
    return [frame.step for frame in choose_frames([Frame(step, Path()) for step in steps], most)]
