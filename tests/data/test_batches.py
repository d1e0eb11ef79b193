"""The order of the rows is a function of the batch number."""

import sys

import numpy as np
import pytest

from ldm.data.batches import BatchOrder
from ldm.errors import UserError


def epoch(order, number):
    start = number * order.steps_per_epoch
    return np.concatenate([order.indices(step) for step in range(start, start + order.steps_per_epoch)])


def test_an_epoch_is_every_row_once():
    order = BatchOrder(12, 3, seed=1)
    assert order.steps_per_epoch == 4
    assert order.indices(0).shape == (3,)
    assert sorted(epoch(order, 0)) == list(range(12))
    assert sorted(epoch(order, 5)) == list(range(12))


def test_epochs_and_seeds_differ():
    order = BatchOrder(100, 4, seed=1)
    assert epoch(order, 0).tolist() != epoch(order, 1).tolist()
    assert epoch(order, 0).tolist() != epoch(BatchOrder(100, 4, seed=2), 0).tolist()


def test_a_step_gives_the_same_rows_whatever_was_asked_before():
    straight, resumed = BatchOrder(50, 4, seed=3), BatchOrder(50, 4, seed=3)
    rows = [straight.indices(step).tolist() for step in range(60)]
    for step in (40, 7, 59, 0, 41, 12):
        assert resumed.indices(step).tolist() == rows[step]


def test_changing_the_returned_rows_does_not_change_the_order():
    order = BatchOrder(8, 4, seed=3)
    first = order.indices(0)
    kept = first.tolist()
    first[:] = 0
    assert order.indices(0).tolist() == kept


def test_another_thread_may_ask_for_another_epoch_between_any_two_lines():
    order = BatchOrder(8, 4, seed=3)
    first, third = order.indices(0).tolist(), order.indices(2).tolist()

    def other_thread(frame, event, argument):
        if frame.f_code is BatchOrder.indices.__code__:
            assert order.indices(0).tolist() == first
            return other_thread

    tracing = sys.gettrace()
    for _ in range(2):  # with the permutation of the other epoch kept, and with its own
        sys.settrace(other_thread)
        try:
            rows = order.indices(2)
        finally:
            sys.settrace(tracing)
        assert rows.tolist() == third
        order.indices(2)


def test_processes_share_an_epoch_without_overlap():
    processes = [BatchOrder(24, 3, seed=1, process_index=process_index, process_count=4) for process_index in range(4)]
    assert processes[0].steps_per_epoch == 2
    assert sorted(np.concatenate([epoch(order, 1) for order in processes])) == list(range(24))


def test_two_processes_see_the_rows_of_one_with_twice_the_batch():
    alone = BatchOrder(24, 6, seed=1)
    processes = [BatchOrder(24, 3, seed=1, process_index=process_index, process_count=2) for process_index in range(2)]
    for step in range(8):
        assert np.concatenate([order.indices(step) for order in processes]).tolist() == alone.indices(step).tolist()


def test_rows_that_fill_no_batch_are_left_to_another_epoch():
    order = BatchOrder(10, 4, seed=1)
    assert order.steps_per_epoch == 2
    assert set(np.concatenate([epoch(order, number) for number in range(20)])) == set(range(10))


@pytest.mark.parametrize(("rows", "batch", "processes"), [(0, 1, 1), (3, 4, 1), (7, 4, 2)])
def test_too_few_rows_are_refused(rows, batch, processes):
    with pytest.raises(UserError, match=f"{rows} usable rows.*train_batch_size"):
        BatchOrder(rows, batch, seed=0, process_count=processes)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch):
    with pytest.raises(UserError, match="train_batch_size"):
        BatchOrder(10, batch, seed=0)
