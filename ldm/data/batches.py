"""The order in which training sees the rows of its data set."""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError


class BatchOrder:
    """The rows of each batch, as a pure function of the batch's number. Resuming needs no other state.

    Every epoch is a new permutation of the rows, the same in all processes. It is divided into batches of
    `batch_size * rank_size` rows, and each process takes `batch_size` rows of each. Rows that do not fill a last batch
    are left out of that epoch.

    Args:
        n_rows: Number of rows in the data set.
        batch_size: Rows per batch and process. With gradient accumulation this is a micro-batch.
        seed: The run's seed.
        rank: The number of this process.
        rank_size: Number of processes.

    Raises:
        UserError: There are fewer rows than one batch needs.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int, rank: int = 0, rank_size: int = 1):
        if batch_size < 1:
            raise UserError(f"train_batch_size is {batch_size}: it must be at least 1")
        if not 0 <= rank < rank_size:
            raise ValueError(f"rank {rank} must be from 0 to {rank_size - 1}")
        if n_rows < batch_size * rank_size:
            devices = f" on each of {rank_size} devices" if rank_size > 1 else ""
            raise UserError(
                f"the data set has {n_rows} usable rows, too few for one batch of {batch_size}{devices}: "
                "lower train_batch_size or add images"
            )
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.rank, self.rank_size = rank, rank_size
        self.steps_per_epoch = n_rows // (batch_size * rank_size)
        # The permutation of the latest epoch, kept only for speed.
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Returns the rows (batch_size,) int64 of batch number `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = draws(self.seed, "order", epoch).permutation(self.n_rows)
            self._epoch = epoch
        start = (step_in_epoch * self.rank_size + self.rank) * self.batch_size
        return self._permutation[start : start + self.batch_size].copy()
