"""Running a network on equal batches, so that it is compiled for one batch size only."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np


def fill_batch(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Repeat the last row until there are `batch_size` rows."""
    return rows[np.minimum(np.arange(batch_size), len(rows) - 1)]


def run_in_batches(network: Callable[[ms.Tensor], ms.Tensor], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Run a network, which maps N rows to N rows, on batches of `batch_size` rows, and return all its outputs.

    The last batch is filled up, and its output is cut again.
    """
    outputs = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        outputs.append(network(ms.Tensor(fill_batch(batch, batch_size))).asnumpy()[: len(batch)])
    return np.concatenate(outputs)
