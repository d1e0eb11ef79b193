"""Leaves out rows whose images cannot be used: they do not decode, or are too small."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.data.buckets import Size
from ldm.data.checked_images import broken_reason, check_images, each_image
from ldm.data.content import FileHash
from ldm.data.decoding import read_size
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import ImageFile, Listing, report_left_out
from ldm.errors import UserError
from ldm.settings.train import TrainSettings

logger = logging.getLogger(__name__)

MAX_CHECKED = 20_000  # images that are decoded before the first step, where check_images does not say it
MAX_BAD_FRACTION = 0.10


class CheckedRows(NamedTuple):
    """The rows whose images can be used, as far as they were read."""

    listing: Listing
    contents: list[FileHash] | None
    sizes: np.ndarray | None  # (N, 2) width and height, upright

    def take(self, places: np.ndarray) -> CheckedRows:
        """Return some of the rows. Raises UserError if there are none."""
        if not len(places):
            raise UserError("the data set has no usable images to train on: add images, or hold fewer of them out")
        if len(places) == len(self.listing.rows):
            return self
        rows, contents = self.listing.rows, self.contents
        return CheckedRows(
            self.listing._replace(
                rows=rows.take(places) if isinstance(rows, RowFile) else [rows[place] for place in places]
            ),
            None if contents is None else [contents[place] for place in places],
            None if self.sizes is None else self.sizes[places],
        )


def check_rows(listing: Listing, settings: TrainSettings, record: Path | None, place: str) -> CheckedRows:
    """Leave out the rows whose images do not decode or are too small, as far as images are read at all.

    `place` is that of the data set, for errors.
    """
    decodes = len(listing.rows) <= MAX_CHECKED if settings.check_images is None else settings.check_images
    needs_sizes = bool(settings.image_filter_size) or any(
        subset.settings.get("enable_bucket", settings.enable_bucket) for subset in listing.subsets
    )
    if not decodes and not needs_sizes:
        return CheckedRows(listing, None, None)
    images = list(dict.fromkeys(row.image for row in listing.rows))
    contents: dict[ImageFile, FileHash] = {}
    sizes: dict[ImageFile, Size] = {}
    if decodes:
        found, faults = check_images(images, record)
        contents = {image: each.content for image, each in found.items()}
        sizes = {image: each.size for image, each in found.items()}
    else:
        sizes, faults = each_image(images, read_size, "reading image sizes")

    places: list[int] = []
    broken: list[tuple[str, str]] = []
    small = 0
    for number, row in enumerate(listing.rows):
        if row.image in faults:
            broken.append((listing.name(row), broken_reason(listing, row, faults)))
        elif min(sizes[row.image]) < settings.image_filter_size:
            small += 1
        else:
            places.append(number)
    if broken:
        count, before = len(listing.rows) + len(listing.left_out), len(listing.left_out)
        report_left_out(place, broken, count, MAX_BAD_FRACTION, before)
    if small:
        logger.info(
            "%d of %d images left out: a side is shorter than image_filter_size %d",
            small, len(listing.rows), settings.image_filter_size,
        )  # fmt: skip
    checked = CheckedRows(listing, None, None).take(np.array(places, np.int64))
    rows = checked.listing.rows
    return checked._replace(
        contents=[contents[row.image] for row in rows] if decodes else None,
        sizes=np.array([sizes[row.image] for row in rows], np.int64) if needs_sizes else None,
    )
