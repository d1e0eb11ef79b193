"""The masks of images, cached beside their latents."""

from __future__ import annotations

import logging

import numpy as np
from tqdm import tqdm

from ldm.data.checked_rows import MAX_CHECKED
from ldm.data.content import content_key
from ldm.data.masks import MaskReport
from ldm.data.shards import ShardedCache
from ldm.data.transforms import IMAGE_CODE
from ldm.errors import UserError
from ldm.training.inputs.images import Images

logger = logging.getLogger(__name__)


class Masks:
    """The masks of rows' images, without random crop and mirroring.

    Args:
        images: The images, of which some or none have a mask.
        factor: Pixels of an image for a pixel of its mask, along a side.
        cache: Where masks are kept. None: they are read each time.
    """

    def __init__(self, images: Images, factor: int, cache: ShardedCache | None):
        self.images, self.factor, self.cache = images, factor, cache
        self._without: set[str] = set()  # keys of images with an alpha channel as their mask, which have none

    def of_rows(self, rows: list[int]) -> list[np.ndarray | None] | None:
        """Return the masks of rows, or None if one of them has been replaced because its mask is broken.

        Without any masks in the data set, the list is empty.
        """
        masks: list[np.ndarray | None] = []
        for row in rows if self.images.data.masks is not None else []:
            try:
                masks.append(self.of_row(row))
            except UserError as error:
                self.images.replace(row, error)
                return None
        return masks

    def of_row(self, row: int) -> np.ndarray | None:
        """Return the mask (1, h, w) of a row's image, None if it has none. Raises UserError if it is broken."""
        data = self.images.data
        content = data.mask_content(row)
        if not content:
            return None
        if self.cache is None:
            return data.mask(row, self.factor)
        width, height = (side // self.factor for side in data.buckets.size(row))
        placed = data.buckets.size(row), data.buckets.scale(row), height, width
        key = content_key("mask", content, data.content(row), repr(placed), IMAGE_CODE)
        if key in self._without:
            return None
        mask = self.cache.get(key, (1, height, width))
        if mask is None:
            mask = data.mask(row, self.factor)
            if mask is not None:
                self.cache.put(key, mask)
            else:  # an image without an alpha channel
                self._without.add(key)
        return mask

    def log_report(self) -> None:
        """Log how many images have a mask, and how much of them the masks show."""
        data = self.images.data
        report = MaskReport(len(data))
        count = min(len(data), MAX_CHECKED)
        rows = np.linspace(0, len(data) - 1, count).round().astype(int).tolist()
        rows = [row for row in rows if not data.is_class_image(row)]
        masks = self.images.pool.map(self._of_row_if_readable, rows)
        for row, found in zip(rows, tqdm(masks, "reading masks", len(rows), unit="mask", delay=1, leave=False)):
            if found is not None:
                report.add(row, found[0])
        for line in report.lines(data.name):
            logger.info("%s", line)

    def _of_row_if_readable(self, row: int) -> tuple[np.ndarray | None] | None:
        """Return the mask of a row, or None if it cannot be read.

        Of images that were not checked, one that is broken is named and replaced when it is to be encoded.
        """
        try:
            return (self.of_row(row),)
        except UserError:
            if self.images.data.contents is not None:
                raise
            return None
