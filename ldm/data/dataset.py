"""Read a data set: a folder of images, with a CSV that names each image and gives its caption."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ldm.data.checked_images import broken_reason, check_images
from ldm.data.content import FileHash
from ldm.data.sources import image_text_csv
from ldm.data.sources.image_text_csv import find_csv
from ldm.data.sources.names import IMAGE_SUFFIXES
from ldm.data.sources.place import look
from ldm.data.sources.rows import ReadOptions, report_left_out
from ldm.errors import plain

__all__ = ["IMAGE_SUFFIXES", "ImageTextRows", "Row", "read_image_text_csv"]


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
    csv_path = find_csv(Path(folder))
    options = ReadOptions(image_column, caption_column, max_bad_fraction=max_bad_fraction)
    listing = image_text_csv.read(look(folder), options)
    found, faults = check_images(list(dict.fromkeys(row.image for row in listing.rows)), record)
    rows: list[Row] = []
    broken: list[tuple[str, str]] = []
    for row in listing.rows:
        if row.image in faults:
            broken.append((listing.name(row), broken_reason(listing, row, faults)))
        else:
            assert isinstance(row.image, str)
            rows.append(Row(Path(row.image), row.caption, found[row.image].content))
    if broken:
        count, before = len(listing.rows) + len(listing.left_out), len(listing.left_out)
        report_left_out(plain(csv_path), broken, count, max_bad_fraction, before)
    return ImageTextRows(rows, listing.left_out + broken)
