"""The order of the rows is a function of the batch number."""

import math
import sys

import numpy as np
import pytest

from ldm.data.batches import BatchOrder, read_in_turn
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
        if frame.f_code in (BatchOrder.indices.__code__, BatchOrder._find.__code__):
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


# Several buckets, and batches that are filled

OF_ROW = np.random.default_rng(0).choice(4, 61, p=[0.5, 0.3, 0.15, 0.05])


def filled(of_row, batch_size, seed, **others):
    return BatchOrder(len(of_row), batch_size, seed, of_row=of_row, fill=True, **others)


@pytest.mark.parametrize("bucket", [0, 3])
def test_one_bucket_that_fills_its_batches_is_the_order_without_buckets(bucket):
    alone, buckets = BatchOrder(24, 4, seed=5), filled([bucket] * 24, 4, seed=5)
    assert buckets.steps_per_epoch == alone.steps_per_epoch
    for step in range(20):
        batch = buckets.indices(step)
        assert batch.dtype == np.int64 and batch.tolist() == alone.indices(step).tolist()
        assert buckets.bucket(step) == bucket


def test_one_bucket_that_does_not_fill_its_batches_has_one_more():
    alone, buckets = BatchOrder(26, 4, seed=5), filled([0] * 26, 4, seed=5)
    assert buckets.steps_per_epoch == alone.steps_per_epoch + 1
    for step in range(alone.steps_per_epoch):
        assert buckets.indices(step).tolist() == alone.indices(step).tolist()


def test_every_batch_is_of_one_bucket():
    order = filled(OF_ROW, 4, seed=1)
    for step in range(3 * order.steps_per_epoch):
        assert (OF_ROW[order.indices(step)] == order.bucket(step)).all() and order.indices(step).shape == (4,)


@pytest.mark.parametrize("number", [0, 3])
def test_an_epoch_is_every_row_at_least_once_and_fills_the_last_batch_of_a_bucket_from_it(number):
    order = filled(OF_ROW, 4, seed=1)
    assert order.steps_per_epoch == sum(math.ceil(count / 4) for count in np.bincount(OF_ROW))
    used = np.bincount(epoch(order, number), minlength=61)
    assert used.min() == 1 and used.sum() == 4 * order.steps_per_epoch
    for bucket in range(4):
        rows = int((OF_ROW == bucket).sum())
        assert used[OF_ROW == bucket].sum() == math.ceil(rows / 4) * 4


def test_the_last_batch_is_filled_from_the_beginning_of_the_buckets_order():
    order = filled([0] * 5 + [1] * 2, 3, seed=2)
    batches = {bucket: [] for bucket in (0, 1)}
    for step in range(order.steps_per_epoch):
        batches[order.bucket(step)].append(order.indices(step).tolist())
    first, second = batches[0]
    assert second[-1] == first[0] and sorted(first + second[:2]) == [0, 1, 2, 3, 4]
    assert batches[1][0][2] == batches[1][0][0]


def test_a_bucket_smaller_than_a_batch_goes_around():
    order = filled([0, 1, 1], 4, seed=2, process_count=2)
    rows = {order.bucket(step): order.indices(step).tolist() for step in range(2)}
    assert rows[0] == [0] * 4 and sorted(rows[1]) == [1, 1, 2, 2]


def test_repeats_are_as_many_rows():
    repeats = np.where(np.arange(61) % 5 == 0, 3, 1)
    order = filled(OF_ROW, 4, seed=1, repeats=repeats)
    assert order.steps_per_epoch == sum(math.ceil(repeats[OF_ROW == bucket].sum() / 4) for bucket in range(4))
    used = np.bincount(epoch(order, 0), minlength=61)
    assert (used >= repeats).all() and (used - repeats).sum() == 4 * order.steps_per_epoch - repeats.sum()
    # Repeated rows without buckets are the same order of positions.
    alone, repeated = BatchOrder(12, 3, seed=1), filled([0] * 4, 3, seed=1, repeats=[3] * 4)
    assert [repeated.indices(step).tolist() for step in range(8)] == [
        (alone.indices(step) // 3).tolist() for step in range(8)
    ]


@pytest.mark.parametrize("repeats", [[1, 0], [1], [2, -1]])
def test_a_row_is_repeated_at_least_once(repeats):
    with pytest.raises(ValueError, match="repeats"):
        filled([0, 0], 1, seed=0, repeats=repeats)


def test_buckets_come_in_another_order_in_every_epoch_and_with_every_seed():
    order = filled(OF_ROW, 2, seed=1)
    labels = [[order.bucket(number * order.steps_per_epoch + place) for place in range(30)] for number in range(2)]
    other = [filled(OF_ROW, 2, seed=2).bucket(place) for place in range(30)]
    assert labels[0] != labels[1] and labels[0] != other and labels[0] != sorted(labels[0])
    assert epoch(order, 0).tolist() != epoch(order, 1).tolist()


def test_processes_are_in_the_same_bucket_and_share_the_batches_of_one_process():
    alone = filled(OF_ROW, 6, seed=1)
    processes = [filled(OF_ROW, 3, seed=1, process_index=process_index, process_count=2) for process_index in (0, 1)]
    assert [order.steps_per_epoch for order in processes] == [alone.steps_per_epoch] * 2
    for step in range(2 * alone.steps_per_epoch):
        assert np.concatenate([order.indices(step) for order in processes]).tolist() == alone.indices(step).tolist()
        assert {order.bucket(step) for order in processes} == {alone.bucket(step)}


def test_a_step_gives_the_same_bucket_whatever_was_asked_before():
    straight, resumed = filled(OF_ROW, 4, seed=3), filled(OF_ROW, 4, seed=3)
    rows = [(straight.bucket(step), straight.indices(step).tolist()) for step in range(60)]
    for step in (40, 7, 59, 0, 41, 12):
        assert resumed.indices(step).tolist() == rows[step][1] and resumed.bucket(step) == rows[step][0]


def test_the_published_order_of_buckets_stays():
    # A change of it breaks the resuming of every run.
    order = filled([0, 1, 0, 1, 0, 2], 2, seed=42)
    assert [(order.bucket(step), order.indices(step).tolist()) for step in range(4)] == [
        (2, [5, 5]),
        (1, [3, 1]),
        (0, [4, 2]),
        (0, [0, 4]),
    ]


def test_changing_the_returned_rows_does_not_change_the_order_of_buckets():
    order = filled(OF_ROW, 4, seed=3)
    first = order.indices(0)
    kept = first.tolist()
    first[:] = 0
    assert order.indices(0).tolist() == kept


def test_another_thread_may_ask_for_another_bucket_between_any_two_lines():
    order = filled([0] * 4 + [1] * 4, 4, seed=3)
    first, third = order.indices(0).tolist(), order.indices(2).tolist()
    watched = {BatchOrder.indices.__code__, BatchOrder._find.__code__}

    def other_thread(frame, event, argument):
        if frame.f_code in watched:
            assert order.indices(0).tolist() == first
            return other_thread

    tracing = sys.gettrace()
    for _ in range(2):  # with the other epoch kept, and with its own
        sys.settrace(other_thread)
        try:
            rows = order.indices(2)
        finally:
            sys.settrace(tracing)
        assert rows.tolist() == third
        order.indices(2)


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="0 usable rows"):
        filled([], 1, seed=0)


# One file after the other, through a buffer

FILES = np.repeat(np.arange(12), 100)  # of rows


def in_turn(files=FILES, batch_size=4, seed=1, buffer_size=50, **others):
    return BatchOrder(len(files), batch_size, seed, file_of_row=files, buffer_size=buffer_size, **others)


def test_files_are_read_in_turn_and_a_row_comes_at_most_a_buffer_early():
    order = read_in_turn(FILES, 50, seed=1, epoch=0)
    files = list(dict.fromkeys(FILES[order].tolist()))
    assert sorted(order) == list(range(1200)) and sorted(files) == list(range(12)) != files
    ranks = read_in_turn(FILES, 1, seed=1, epoch=0)  # a buffer of one row shuffles nothing
    assert [set(FILES[part]) for part in ranks.reshape(12, 100)] == [
        {FILES[part[0]]} for part in ranks.reshape(12, 100)
    ]
    assert all((np.diff(part) == 1).all() for part in ranks.reshape(12, 100))
    read_at = np.argsort(ranks)[order]
    late = np.arange(1200) - read_at
    assert late.min() >= -50 and 35 < np.abs(late).mean() < 70
    # A file is left after a few buffers: the rows in use are of few files at any time.
    assert max(len(set(FILES[order[at : at + 100]].tolist())) for at in range(0, 1100, 10)) <= 6


def test_files_come_in_another_order_in_every_epoch_and_with_every_seed():
    orders = [read_in_turn(FILES, 1, seed, epoch).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_published_order_in_turn_stays():
    # A change of it breaks the resuming of every run.
    order = read_in_turn(np.array([0, 0, 1, 1, 1, 2, 3, 3]), 3, seed=42, epoch=1)
    assert order.tolist() == [0, 6, 5, 7, 3, 1, 2, 4]


def test_rows_that_fit_into_the_buffer_are_shuffled_all_together():
    for buffer_size in (1200, 5000):
        order = read_in_turn(FILES, buffer_size, seed=1, epoch=0)
        assert sorted(order) == list(range(1200)) and len(set(FILES[order[:100]].tolist())) == 12


def test_the_draws_of_a_buffer_do_not_depend_on_how_many_are_made_together(monkeypatch):
    order = read_in_turn(FILES, 50, seed=1, epoch=0).tolist()
    monkeypatch.setattr("ldm.data.batches._DRAWN_AT_ONCE", 7)
    assert read_in_turn(FILES, 50, seed=1, epoch=0).tolist() == order


def test_orders_in_turn_differ_by_epoch_seed_and_buffer_and_do_not_depend_on_what_was_asked_before():
    order = in_turn()
    epochs = [epoch(order, number).tolist() for number in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1200)) and epochs[0] != epochs[1]
    assert epoch(in_turn(seed=2), 0).tolist() != epochs[0] != epoch(in_turn(buffer_size=40), 0).tolist()
    resumed = in_turn()
    for step in (400, 7, 599, 0):
        assert resumed.indices(step).tolist() == (epochs[0] + epochs[1])[4 * step : 4 * step + 4]


def test_two_processes_see_the_rows_in_turn_of_one_with_twice_the_batch():
    alone = in_turn(batch_size=6)
    processes = [in_turn(batch_size=3, process_index=index, process_count=2) for index in range(2)]
    for step in range(0, 400, 13):
        assert np.concatenate([order.indices(step) for order in processes]).tolist() == alone.indices(step).tolist()


def test_repeats_read_the_files_again():
    order = in_turn(repeats=np.where(FILES < 6, 2, 1))
    rows = epoch(order, 0)
    assert np.bincount(rows).tolist() == np.where(FILES < 6, 2, 1).tolist()
    places = np.argsort(rows, kind="stable")[:1200].reshape(600, 2)
    assert np.median(places[:, 1] - places[:, 0]) > 100


def test_buckets_in_turn_come_as_they_become_full():
    of_row = np.random.default_rng(0).choice(4, 1200, p=[0.5, 0.3, 0.15, 0.05])
    order = in_turn(of_row=of_row, fill=True)
    ranks = np.argsort(read_in_turn(FILES, 50, seed=1, epoch=0))
    ends, labels = [], []
    for step in range(order.steps_per_epoch):
        rows = order.indices(step)
        assert (of_row[rows] == order.bucket(step)).all()
        ends.append(ranks[rows].max()), labels.append(order.bucket(step))
    last = {bucket: max(place for place, label in enumerate(labels) if label == bucket) for bucket in range(4)}
    whole = [end for place, end in enumerate(ends) if place not in last.values()]  # the last ones are filled
    assert whole == sorted(whole) and sorted(set(epoch(order, 0).tolist())) == list(range(1200))
    processes = [in_turn(of_row=of_row, fill=True, batch_size=2, process_index=i, process_count=2) for i in range(2)]
    for step in range(order.steps_per_epoch):
        assert [other.bucket(step) for other in processes] == [labels[step]] * 2


def test_without_a_buffer_the_files_do_not_matter():
    plain, files = BatchOrder(1200, 4, seed=1), in_turn(buffer_size=0)
    assert all(plain.indices(step).tolist() == files.indices(step).tolist() for step in range(0, 600, 7))
