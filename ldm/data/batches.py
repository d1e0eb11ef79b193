"""The order in which training sees the rows of its data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError

_DRAWN_AT_ONCE = 65_536  # rows whose draws are in memory together


class BatchOrder:
    """The rows of each batch, as a pure function of the batch's number. Resuming needs no other state.

    Every epoch is a new permutation of the rows, each as often as it is repeated, the same in all processes. The rows
    of a bucket, in the order of the permutation, are divided into batches of `batch_size * process_count` rows, and
    each process takes `batch_size` rows of each. Where there are several buckets, their batches are in random order,
    and all processes are in the same bucket.

    With `buffer_size`, the permutation reads the files that hold the images one after the other (see `read_in_turn`),
    and the batches of several buckets are in the order in which they become full.

    Args:
        n_rows: Number of rows in the data set.
        batch_size: Rows per batch and process. With gradient accumulation this is a micro-batch.
        of_row: The bucket (n_rows,) of each row. None: there is one bucket.
        repeats: How often each row is used in an epoch. None: once.
        fill: Whether the last batch of a bucket is filled from the beginning of the bucket's order, around again if
            need be, so that every row is used at least once an epoch. Otherwise rows that do not fill a last batch are
            left out of that epoch.
        file_of_row: The number (n_rows,) of the file that holds each row's image, for `buffer_size`.
        buffer_size: Rows among which the next one is drawn. 0: all.

    Raises:
        UserError: There are fewer rows than one batch needs, or batch_size is not positive.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        of_row: np.ndarray | Sequence[int] | None = None,
        repeats: np.ndarray | Sequence[int] | None = None,
        fill: bool = False,
        file_of_row: np.ndarray | Sequence[int] | None = None,
        buffer_size: int = 0,
    ):
        if batch_size < 1:
            raise UserError(f"train_batch_size is {batch_size}: it must be at least 1")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} must be from 0 to {process_count - 1}")
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        rows = np.arange(n_rows)
        if repeats is not None:
            counts = np.asarray(repeats, np.int64)
            if counts.shape != (n_rows,) or (n_rows and counts.min() < 1):
                raise ValueError("repeats must be a number of at least 1 for each row")
            rows = np.repeat(rows, counts)
        self._buffer_size = buffer_size
        self._files = _files_of_samples(rows, np.asarray(file_of_row, np.int32)) if buffer_size else None
        self._rows = rows
        self._buckets = np.zeros(len(rows), np.int32) if of_row is None else np.asarray(of_row, np.int32)[rows]
        self._counts = np.bincount(self._buckets)
        in_batch = batch_size * process_count
        batches = -(-self._counts // in_batch) if fill else self._counts // in_batch
        if not batches.sum():
            devices = f" on each of {process_count} devices" if process_count > 1 else ""
            raise UserError(
                f"the data set has {n_rows} usable rows, too few for one batch of {batch_size}{devices}: "
                "lower train_batch_size or add images"
            )
        self._labels = np.repeat(np.arange(len(batches)), batches)
        self.steps_per_epoch = len(self._labels)
        # The latest epoch, kept only for speed. One attribute, because two threads use it.
        self._latest: tuple[int, _Epoch | None] = (-1, None)

    def indices(self, step: int) -> np.ndarray:
        """Return the rows (batch_size,) int64 of batch number `step`, counted from 0 over all epochs."""
        epoch, place = self._find(step)
        bucket = epoch.buckets[place]
        start = (epoch.batches[place] * self.process_count + self.process_index) * self.batch_size
        return epoch.rows[epoch.starts[bucket] + np.arange(start, start + self.batch_size) % self._counts[bucket]]

    def epoch(self, step: int) -> int:
        """Return the number of the epoch, from 0, that batch number `step` is of."""
        return step // self.steps_per_epoch

    def bucket(self, step: int) -> int:
        """Return the bucket of batch number `step`."""
        epoch, place = self._find(step)
        return int(epoch.buckets[place])

    def _find(self, step: int) -> tuple[_Epoch, int]:
        """Return the epoch of a batch and the batch's place in it."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        number, place = divmod(step, self.steps_per_epoch)
        latest, epoch = self._latest
        if epoch is None or number != latest:
            epoch = self._make_epoch(number)
            self._latest = number, epoch
        return epoch, place

    def _make_epoch(self, number: int) -> _Epoch:
        if self._files is None:
            permutation = draws(self.seed, "order", number).permutation(len(self._rows))
        else:
            permutation = read_in_turn(self._files, self._buffer_size, self.seed, number)
        # Stable: the rows of a bucket stay in the order of the permutation.
        places = np.argsort(self._buckets[permutation], kind="stable")
        by_bucket = permutation[places]
        if self._files is None:
            # Only the buckets are shuffled, because their batches are random already.
            buckets = draws(self.seed, "bucket_order", number).permutation(self._labels)
        else:
            buckets = self._labels[np.argsort(self._last_places(places), kind="stable")]
        batches = np.empty_like(buckets)
        for bucket in range(len(self._counts)):
            places = np.flatnonzero(buckets == bucket)
            batches[places] = np.arange(len(places))
        starts = np.cumsum(self._counts) - self._counts
        return _Epoch(self._rows[by_bucket], starts, buckets, batches)

    def _last_places(self, places: np.ndarray) -> np.ndarray:
        """Return the place (batches,) in the permutation of the last row of each batch.

        Args:
            places: Those of all rows, bucket by bucket, (samples,).
        """
        in_batch = self.batch_size * self.process_count
        first = np.searchsorted(self._labels, self._labels)  # of the batch's bucket
        ends = np.minimum((np.arange(len(first)) - first + 1) * in_batch, self._counts[self._labels])
        starts = np.cumsum(self._counts) - self._counts
        return places[starts[self._labels] + ends - 1]


class _Epoch(NamedTuple):
    rows: np.ndarray  # all rows of the epoch, bucket by bucket
    starts: np.ndarray  # (buckets,): where each bucket begins in them
    buckets: np.ndarray  # (batches,): the bucket of each batch
    batches: np.ndarray  # (batches,): the number of each batch in its bucket


def read_in_turn(files: np.ndarray, buffer_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return an order (N,) int64 of rows that reads one file after the other, through a buffer.

    The files are in a random order, and the rows of a file in their own. They enter a buffer in this order. When it is
    full, each row that enters takes the place of a random one, which is the next in the result. So a row comes at most
    `buffer_size` places earlier than it is read. On average it is used `buffer_size` rows after it was read.

    Args:
        files: The number (N,) of the file of each row.
        buffer_size: Rows in the buffer, at least 1. All rows are in random order if they fit into it.
    """
    ranks = draws(seed, "files", epoch).permutation(int(files.max()) + 1).astype(np.int32)
    read = np.argsort(ranks[files], kind="stable")
    rng = draws(seed, "buffer", epoch)
    buffer = read[:buffer_size].tolist()
    order = np.empty_like(read)
    for start in range(buffer_size, len(read), _DRAWN_AT_ONCE):
        entering = read[start : start + _DRAWN_AT_ONCE].tolist()
        leaving = []
        for row, place in zip(entering, rng.integers(buffer_size, size=len(entering)).tolist()):
            leaving.append(buffer[place])
            buffer[place] = row
        order[start - buffer_size : start - buffer_size + len(leaving)] = leaving
    order[len(read) - len(buffer) :] = np.array(buffer)[rng.permutation(len(buffer))]
    return order


def _files_of_samples(rows: np.ndarray, file_of_row: np.ndarray) -> np.ndarray:
    """Return the number (samples,) int32 of a file for each sample, where repeats of a row are of different files.

    A file is read again for the repeats of its rows, so that they are far apart.

    Args:
        rows: The row (samples,) of each sample, sorted.
        file_of_row: The file (N,) of each row.
    """
    repeat = np.arange(len(rows)) - np.searchsorted(rows, rows)
    if not repeat.any():
        return file_of_row
    return np.unique(repeat * (int(file_of_row.max()) + 1) + file_of_row[rows], return_inverse=True)[1].astype(np.int32)
