"""Leaves out rows whose images cannot be used, and chooses the rows that are held out for validation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.buckets import Size
from ldm.data.checked_images import broken_reason, check_images, each_image
from ldm.data.content import FileHash
from ldm.data.decoding import read_size
from ldm.data.draws import draws
from ldm.data.sources.row_file import RowFile
from ldm.data.sources.rows import ImageFile, Listing, report_left_out
from ldm.data.training_data import TrainingData, subset_of_rows
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


def held_out(listing: Listing, settings: TrainSettings) -> np.ndarray:
    """Return which rows (N,) bool are held out for validation: a share of the images of each subset.

    Rows of the same image go together. Class images are not held out. One image of a subset is left to train on unless
    the share is 1, and none is held out where validation_data_path gives other images.
    """
    subsets = subset_of_rows(listing.rows, len(listing.subsets))
    out = np.zeros(len(subsets), bool)
    for number, subset in enumerate(listing.subsets):
        share: Any = subset.settings.get("validation_split", settings.validation_split)
        if not share or subset.is_reg or settings.validation_data_path is not None:
            continue
        seed: Any = subset.settings.get("validation_seed", settings.validation_seed)
        places = np.flatnonzero(subsets == number)
        images = list(dict.fromkeys(listing.rows[place].image for place in places))
        count = len(images) if share == 1 else min(round(len(images) * share), len(images) - 1)
        seed = settings.seed if seed is None else seed
        chosen = {images[i] for i in draws(seed, "validation", number).permutation(len(images))[: max(0, count)]}
        out[places] = [listing.rows[place].image in chosen for place in places]
    return out


def report_trained(validation: CheckedRows, data: TrainingData) -> None:
    """Warn if images for validation are trained as well, as far as they are known by their content."""
    trained = set(data.contents or ())
    count = sum(content in trained for content in validation.contents or ())
    if count:
        logger.warning(
            "%s of %s images for validation are trained as well: their loss does not say how new images fare",
            f"{count:,}", f"{len(validation.listing.rows):,}",
        )  # fmt: skip
