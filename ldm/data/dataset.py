"""Read a data set: a folder of images, with a CSV that names each image and gives its caption."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm.data.checked_images import CheckedImages
from ldm.data.content import FileHash
from ldm.data.sources.image_text_csv import find_csv, parse_csv
from ldm.data.sources.names import IMAGE_SUFFIXES, SimilarNames, check_inside
from ldm.data.sources.rows import report_left_out
from ldm.data.transforms import BrokenImage
from ldm.errors import plain

__all__ = ["IMAGE_SUFFIXES", "ImageTextRows", "Row", "read_image_text_csv"]

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """An image and its caption."""

    path: Path
    caption: str
    content: FileHash  # of the image file


class ImageTextRows(NamedTuple):
    """The rows of a data set, in the order of the CSV."""

    rows: list[Row]
    left_out: list[tuple[str, str]]  # the unusable rows: name in the CSV, line and reason


def read_image_text_csv(
    folder: str | Path,
    image_column: str = "dir",
    caption_column: str = "text",
    max_bad_fraction: float = 0.10,
    record: Path | None = None,
) -> ImageTextRows:
    """Read the rows of the img_txt.csv in a folder, and check that every image decodes.

    The CSV is UTF-8, with or without a byte-order mark, and has a header. Other columns are ignored. Image names are
    relative to `folder` and may be links to anywhere. If no file has a name, the only file whose name differs in case,
    Unicode form, kind of slash or encoding (GBK) is used, and a warning counts these. A row is left out if its image is
    missing or broken, or if it has too few or too many fields. The log names the first such rows and counts all. Empty
    captions are kept, because training without captions is useful, and a warning counts them.

    Args:
        max_bad_fraction: The data set is refused if more than this fraction of its rows is unusable.
        record: File that remembers which images decode (see `CheckedImages`). None decodes all of them.

    Raises:
        UserError: The folder or the CSV is missing, the CSV is empty, not UTF-8, malformed, or has no header or not the
            columns, an image is outside the folder, or too many rows are unusable.
    """
    folder = Path(folder)
    csv_path = find_csv(folder)
    csv_rows = list(parse_csv(csv_path, image_column, caption_column))
    for row in csv_rows:
        if not row.fault:
            check_inside(folder, f"{plain(csv_path)}, line {row.line}", row.name)
    names = list(dict.fromkeys(row.name for row in csv_rows if not row.fault))
    images = _check_images(folder, names, record)

    rows: list[Row] = []
    left_out: list[tuple[str, str]] = []
    for row in csv_rows:
        image = row.fault or images[row.name]
        if isinstance(image, str):
            left_out.append((row.name, f"line {row.line}: {image}"))
        else:
            path, content = image
            rows.append(Row(path, row.caption, content))
    report_left_out(plain(csv_path), left_out, len(csv_rows), max_bad_fraction)
    paths = {name: image[0] for name, image in images.items() if not isinstance(image, str)}
    similar = [(name, path) for name, path in paths.items() if path != _path(folder, name)]
    if similar:
        logger.warning(
            "%s: %d image names differ from the CSV's in case, Unicode form, slashes or encoding, the first for %s: %s",
            csv_path, len(similar), *similar[0],
        )  # fmt: skip
    empty = sum(not row.caption for row in rows)
    if empty:
        logger.warning("%s: %d of %d captions are empty and train as such", csv_path, empty, len(rows))
    return ImageTextRows(rows, left_out)


def _path(folder: Path, name: str) -> Path:
    # Normalized, because ".." after a link would lead out of the folder.
    return folder / os.path.normpath(name)


def _check_images(folder: Path, names: list[str], record: Path | None) -> dict[str, tuple[Path, FileHash] | str]:
    """Return the path and the content of every named image, or the fault of an unusable one."""
    checked_images = CheckedImages(record)
    similar_names = SimilarNames(folder)

    def check(name: str) -> tuple[Path, FileHash] | str:
        path = _path(folder, name)
        if not _may_exist(path):
            similar = similar_names.find(name)
            if len(similar) > 1:
                both = " and ".join(plain(other.name) for other in similar[:2])
                return f"the image does not exist, only {both}"
            path = similar[0] if similar else path
        try:
            return path, checked_images.check(path).content
        except BrokenImage as error:
            return f"the image {error.fault}"

    # Decoding releases Python's lock, so threads help.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # The bar appears only if the check takes longer than a second.
        checked = tqdm(pool.map(check, names), total=len(names), desc="checking images", unit="image", delay=1)
        images = dict(zip(names, checked))
    finally:
        pool.shutdown(cancel_futures=True)
    checked_images.save()
    return images


def _may_exist(path: Path) -> bool:
    """Return whether there is a file or a dead link at `path`, also if this cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no permission, or too long a name: the error comes when the image is opened
        pass
    return True
