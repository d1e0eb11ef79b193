"""The images of a data set, loaded by threads. Another row replaces one whose image turns out to be broken."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldm.data.checked_rows import MAX_BAD_FRACTION
from ldm.data.training_data import TrainingData
from ldm.errors import UserError, plain

logger = logging.getLogger(__name__)


class Images:
    """The images of a data set's rows.

    Args:
        data: The rows.
        data_path: Where they were read, for errors.
        pool: The threads that load images.
    """

    def __init__(self, data: TrainingData, data_path: str | None, pool: ThreadPoolExecutor):
        self.data, self.data_path, self.pool = data, data_path, pool
        self._broken: dict[int, int] = {}  # a row whose image is broken -> the row that replaces it

    def usable(self, row: int) -> int:
        """Return a row, or the one that replaces it."""
        while row in self._broken:
            row = self._broken[row]
        return row

    def usable_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return rows, with another row in place of one whose image is broken."""
        return np.array([self.usable(row) for row in rows.tolist()]) if self._broken else rows

    def load(self, rows: list[int]) -> list[np.ndarray | UserError]:
        """Return the images of rows as they are without random crop and mirroring, or the error of a broken one."""

        def load(row: int) -> np.ndarray | UserError:
            try:
                return self.data.image(row)
            except UserError as error:
                return error

        return list(self.pool.map(load, rows))

    def replace(self, row: int, error: UserError) -> None:
        """Have the next row of a bucket replace one whose image is broken.

        It is found again where the run is resumed, so the same row replaces it then. An image that was checked before
        and has been removed or damaged since is an error.
        """
        if self.data.contents is not None:
            raise error
        logger.warning("%s: %s", self.data.name(row), error)
        others = np.flatnonzero(self.data.buckets.of_row == self.data.buckets.of_row[row])
        self._broken[row] = int(others[(np.searchsorted(others, row) + 1) % len(others)])
        count = len(self._broken)
        if count > max(1.0, MAX_BAD_FRACTION * len(self.data)) or all(int(other) in self._broken for other in others):
            raise UserError(
                f"{plain(self.data_path)}: {count:,} of {len(self.data):,} images are broken, the last one: {error}"
            )

    def log_notes(self) -> None:
        """Log what is new of images that are read all the same."""
        for line in self.data.notes.lines(new=True):
            logger.info("%s", line)
