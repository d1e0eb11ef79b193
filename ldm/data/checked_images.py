"""Remember which images decode, so that a run does not decode all of them again at every start."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import PIL
from tqdm import tqdm

from ldm.data.buckets import Size
from ldm.data.content import FileHash, file_hash
from ldm.data.decoding import BrokenImage
from ldm.data.sources.rows import FilePart, ImageFile, Listing, Row, read_image, readable_name
from ldm.data.upright import open_rgb
from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.documents import json_text, parse_json
from ldm.files.inputs import is_there, read_text

logger = logging.getLogger(__name__)

# Another Pillow, or a later version of this record, starts an empty record.
VERSION = f"2, Pillow {PIL.__version__}"
MAX_BYTES = 1 << 30  # of a record: four million images, for which reading it takes 6 GB of memory
# A file can change twice within the resolution of its date, which is 2 s on FAT. The date of a file that has changed so
# shortly before is not trusted (git calls such files racily clean).
RESOLUTION_NS = 2_000_000_000
AT_ONCE = 10_000  # images that wait for a thread, which takes memory
_HASH = re.compile("[0-9a-f]{64}")

Result = TypeVar("Result")


class CheckedImage(NamedTuple):
    """An image that decodes."""

    content: FileHash
    size: Size  # width and height, upright


class _Image(NamedTuple):
    content: FileHash
    bytes: int
    dates: tuple[int, ...]  # time of change of content and of inode in ns, and the inode; empty if not trusted
    size: Size


class CheckedImages:
    """The images that are known to decode, by path, kept in a file.

    An image whose size and dates match the record is not read. One of the same size whose dates differ is hashed, and
    decoded only if its content differs. A damaged record is ignored with a warning and written anew. The file can be
    deleted at any time.

    Args:
        record: The file. None keeps no record: every image is decoded.
    """

    def __init__(self, record: Path | None = None):
        self._record = record
        self._recorded = {} if record is None else _read(record)
        self._checked: dict[str, _Image] = {}

    def check(self, image: ImageFile | Path) -> CheckedImage:
        """Return the hash of an image's content and its size. Raises BrokenImage if the image does not decode."""
        part = image if isinstance(image, FilePart) else None
        path = str(image) if part is None else part.file
        name = os.path.abspath(path) + ("" if part is None else f":{part.offset}")
        recorded = self._recorded.get(name)
        count, dates = _status(path)
        if part is not None:
            count = min(count, part.size)
        if recorded is not None and recorded.bytes == count:
            if recorded.dates and recorded.dates == dates:
                self._checked[name] = recorded
                return CheckedImage(recorded.content, recorded.size)
            content = image_content(image)
            size = recorded.size if content == recorded.content else None
        else:
            size = None
        if size is None:
            size = open_rgb(image).size
            content = image_content(image)
        self._checked[name] = _Image(content, count, dates, size)
        return CheckedImage(content, size)

    def save(self) -> None:
        """Write the images that were checked to the record. A record that cannot be written is not an error."""
        if self._record is None or self._checked == self._recorded:
            return
        images = {name: list(image) for name, image in sorted(self._checked.items())}
        content = {"version": VERSION, "checksum": _checksum(images), "images": images}
        text = json_text(content).encode("utf-8")
        if len(text) > MAX_BYTES:
            logger.warning(
                "%s is not written, because it would have more than %s bytes: the next start decodes all images again",
                self._record, f"{MAX_BYTES:,}",
            )  # fmt: skip
            return
        try:
            with atomic_path(self._record, sync=False) as temporary:  # the checksum replaces the sync
                temporary.write_bytes(text)
        except OSError as error:
            logger.warning(
                "cannot write %s (%s): the next start decodes all images again", self._record, system_reason(error)
            )


def check_images(
    images: Sequence[ImageFile], record: Path | None
) -> tuple[dict[ImageFile, CheckedImage], dict[ImageFile, str]]:
    """Check that images decode, and return what is known of each, and the faults of the broken ones.

    Args:
        images: Each once.
        record: See `CheckedImages`.
    """
    checked_images = CheckedImages(record)
    found, faults = each_image(images, checked_images.check, "checking images")
    checked_images.save()
    return found, faults


def broken_reason(listing: Listing, row: Row, faults: Mapping[ImageFile, str]) -> str:
    """Return why a row with a broken image is left out: "line 5: the image is an empty file"."""
    unit = listing.subsets[row.subset].unit
    return f"{f'{unit} {row.where}: ' if unit else ''}the image {faults[row.image]}"


def each_image(
    images: Sequence[ImageFile], function: Callable[[ImageFile], Result], desc: str
) -> tuple[dict[ImageFile, Result], dict[ImageFile, str]]:
    """Return what `function` returns for each image, and the faults of the broken ones."""

    def call(image: ImageFile) -> tuple[Result | None, str]:
        try:
            return function(image), ""
        except BrokenImage as error:
            return None, error.fault

    results: dict[ImageFile, Result] = {}
    faults: dict[ImageFile, str] = {}
    # Decoding releases Python's lock, so threads help.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # The bar appears only if it takes longer than a second.
        with tqdm(total=len(images), desc=desc, unit="image", delay=1) as bar:
            for start in range(0, len(images), AT_ONCE):
                part = images[start : start + AT_ONCE]
                for image, (result, fault) in zip(part, pool.map(call, part)):
                    if result is None:
                        faults[image] = fault
                    else:
                        results[image] = result
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return results, faults


def image_content(image: ImageFile | Path) -> FileHash:
    """Return the hash of an image's bytes. Raises BrokenImage if they cannot be read."""
    try:
        if isinstance(image, FilePart):
            return FileHash(hashlib.sha256(read_image(image)).hexdigest())
        return file_hash(Path(image))
    except UserError as error:  # removed or closed since it was decoded
        fault = str(error).removeprefix("the image ").removeprefix(f"{readable_name(image)} ")
        raise BrokenImage(image, fault) from None


def _status(path: str) -> tuple[int, tuple[int, ...]]:
    """Return the size and the dates of a file. The dates are empty if the file changed just now or is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # opening the image raises the error
        return -1, ()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < RESOLUTION_NS:
        return status.st_size, ()
    return status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _read(record: Path) -> dict[str, _Image]:
    """Return the images of a record, none if there is no record or it is damaged."""
    try:
        if not is_there(record):
            return {}
        content = parse_json(read_text(record, most=MAX_BYTES), plain(record))
        if isinstance(content, dict) and content.get("version") != VERSION:
            return {}
        if not isinstance(content, dict) or content.get("checksum") != _checksum(content.get("images")):
            raise UserError(f"{plain(record)} is damaged")
        return {name: _parse(entry) for name, entry in content["images"].items()}
    except UserError as error:
        logger.warning("%s; checking all images again", error)
    except (AttributeError, TypeError, ValueError):  # valid JSON of another form
        logger.warning("%s is damaged; checking all images again", plain(record))
    return {}


def _parse(entry: Any) -> _Image:
    content, count, dates, (width, height) = entry
    if not (_HASH.fullmatch(content) and all(type(number) is int for number in (count, *dates, width, height))):
        raise ValueError("not an image's entry")
    return _Image(FileHash(content), count, tuple(dates), (width, height))


def _checksum(images: Any) -> str:
    return hashlib.sha256(json_text(images).encode()).hexdigest()
