"""The order in which training sees its rows."""

from __future__ import annotations

import numpy as np

from ldm.data.draws import draws
from ldm.errors import UserError


class BatchOrder:
    """Which rows make up the batch of a step: a pure function of the step, so that resuming is going on at a step.

    Every epoch is a new permutation of the rows, the same on all ranks, dealt out in batches of
    `batch_size * rank_size`; each rank takes its own `batch_size` of them. Rows that do not fill a last batch are left
    out of that epoch; other ones are in the next.

    Args:
        n_rows: rows in the data set.
        batch_size: rows a step and rank (a micro-step, where gradients are accumulated).
        seed: the run's seed.
        rank, rank_size: this process, of how many.

    Raises:
        UserError: there are fewer rows than one step needs.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int, rank: int = 0, rank_size: int = 1):
        if batch_size < 1:
            raise UserError(f"train_batch_size is {batch_size}: it must be at least 1")
        if not 0 <= rank < rank_size:
            raise ValueError(f"rank {rank} is not one of {rank_size}")
        if n_rows < batch_size * rank_size:
            devices = f" on each of {rank_size} devices" if rank_size > 1 else ""
            raise UserError(
                f"the data set has {n_rows} usable rows, too few for one batch of {batch_size}{devices}: "
                "lower train_batch_size or add images"
            )
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.rank, self.rank_size = rank, rank_size
        self.steps_per_epoch = n_rows // (batch_size * rank_size)
        # The permutation of the epoch asked for last: kept for speed, never for what it says.
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """The rows (batch_size,) int64 of the global micro-step `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = draws(self.seed, "order", epoch).permutation(self.n_rows)
            self._epoch = epoch
        start = (step_in_epoch * self.rank_size + self.rank) * self.batch_size
        return self._permutation[start : start + self.batch_size].copy()
