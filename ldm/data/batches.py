"""The order in which training sees the rows of its data set."""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError


class BatchOrder:
    """The rows of each batch, as a pure function of the batch's number. Resuming needs no other state.

    Every epoch is a new permutation of the rows, the same in all processes. It is divided into batches of
    `batch_size * process_count` rows, and each process takes `batch_size` rows of each. Rows that do not fill a last
    batch are left out of that epoch.

    Args:
        n_rows: Number of rows in the data set.
        batch_size: Rows per batch and process. With gradient accumulation this is a micro-batch.

    Raises:
        UserError: There are fewer rows than one batch needs.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        if batch_size < 1:
            raise UserError(f"train_batch_size is {batch_size}: it must be at least 1")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} must be from 0 to {process_count - 1}")
        if n_rows < batch_size * process_count:
            devices = f" on each of {process_count} devices" if process_count > 1 else ""
            raise UserError(
                f"the data set has {n_rows} usable rows, too few for one batch of {batch_size}{devices}: "
                "lower train_batch_size or add images"
            )
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self.steps_per_epoch = n_rows // (batch_size * process_count)
        # The latest epoch and its permutation, kept only for speed. One attribute, because two threads use it.
        self._latest = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Return the rows (batch_size,) int64 of batch number `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        latest, permutation = self._latest
        if epoch != latest:
            permutation = draws(self.seed, "order", epoch).permutation(self.n_rows)
            self._latest = epoch, permutation
        start = (step_in_epoch * self.process_count + self.process_index) * self.batch_size
        return permutation[start : start + self.batch_size].copy()
