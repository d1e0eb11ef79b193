"""Equal batches: a network sees one batch size, and every row gets its own output."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.runtime.batches import fill_batch, run_in_batches


@pytest.mark.parametrize("count, batch_size", [(1, 1), (2, 4), (4, 4), (5, 4), (9, 2)])
def test_every_row_gets_its_output_from_calls_of_one_size(count, batch_size):
    sizes = []

    def network(batch):
        sizes.append(len(batch))
        return batch * 2

    rows = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
    np.testing.assert_array_equal(run_in_batches(network, rows, batch_size), rows * 2)
    assert sizes == [batch_size] * -(-count // batch_size)


def test_a_batch_is_filled_up_with_its_last_row():
    assert fill_batch(np.array([3, 7]), 4).tolist() == [3, 7, 7, 7]
    assert fill_batch(np.array([3, 7]), 2).tolist() == [3, 7]
