"""Which process owns which of the optimizer's arrays, and in which order processes exchange them.

tests/training/test_parallel.py trains with it.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from ldm.training import sharding, step_graphs
from ldm.training.optimizer_arrays import OptimizerArrays
from ldm.training.optimizers.adamw import ApplyAdamW
from ldm.training.sharding import MeanInOrder, SendUpdated, Shards, balanced


@pytest.mark.parametrize("process_count", [1, 2, 8, 1000])
def test_the_owners_have_about_the_same_number_of_elements(process_count):
    """Within 1 % of the mean, or the largest array alone."""
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 10**6, 300)]
    owners = balanced(sizes, process_count)
    assert owners == balanced(sizes, process_count) and len(owners) == len(sizes)
    totals = [sum(size for size, owner in zip(sizes, owners) if owner == process) for process in range(process_count)]
    assert sum(totals) == sum(sizes)
    assert max(totals) <= max(1.01 * sum(sizes) / process_count, max(sizes))


def test_a_process_owns_the_rows_of_its_arrays_in_their_order():
    owners = (0, 1, 1, 0)
    assert [Shards(owners, process).own(("a", "b", "c", "d")) for process in (0, 1, 2)] == [["a", "d"], ["b", "c"], []]


class TestOrder:
    """Collective operators in an order that differs between processes would wait for each other forever."""

    @pytest.fixture
    def waits(self, monkeypatch):
        """(value, what it waits for) of every `ops.depend`, as numbers."""
        ms.set_context(mode=ms.PYNATIVE_MODE)
        pairs = []

        def numbers(value):
            return [float(x) for x in value] if isinstance(value, (tuple, list)) else float(value)

        def depend(value, before):
            pairs.append((numbers(value), numbers(before)))
            return value

        monkeypatch.setattr(sharding.ops, "depend", depend)
        return pairs

    def test_a_gradient_waits_for_the_mean_of_the_one_behind_it(self, waits, monkeypatch):
        monkeypatch.setattr(sharding.ops, "AllReduce", lambda: lambda gradient: gradient)
        means = MeanInOrder(4)((Tensor(4.0), Tensor(8.0), Tensor(12.0)))
        assert [float(mean) for mean in means] == [1.0, 2.0, 3.0]
        assert waits == [(12.0, 0.25), (8.0, 3.0), (4.0, 2.0)]

    def test_an_owner_sends_after_the_one_before_it_and_the_others_take_what_it_sends(self, waits, monkeypatch):
        monkeypatch.setattr(sharding.ops, "Broadcast", lambda owner: lambda arrays: tuple(a + 10 for a in arrays))
        arrays = [Parameter(Tensor(float(i)), name=f"a{i}") for i in range(3)]
        SendUpdated(arrays, Shards(owners=(1, 0, 1), process=0))((Tensor(-1.0),))
        assert waits == [([1.0], [-1.0]), ([0.0, 2.0], [11.0])]
        assert [float(array) for array in arrays] == [10.0, 1.0, 12.0]  # the second is this process's own

    @pytest.mark.parametrize("process", [0, 1], ids=["the owner", "a process without arrays"])
    def test_all_send_after_they_know_whether_a_number_saturated(self, process, monkeypatch):
        ms.set_context(mode=ms.PYNATIVE_MODE)
        before = []
        monkeypatch.setattr(sharding.ops, "AllReduce", lambda: lambda x: x)
        monkeypatch.setattr(step_graphs, "SendUpdated", lambda arrays, shards: lambda updated: before.extend(updated))
        arrays, shards = OptimizerArrays([Parameter(Tensor([1.0, 2.0]), name="a")], 1), Shards((0,), process)
        optimizer = ApplyAdamW(shards.own(arrays.arrays), (0.9, 0.999))
        update = step_graphs.Update(arrays, optimizer, False, 2, True, shards)
        saturated = Tensor([0, 1, 0, 0, 0, 0, 0, 0], ms.int32)
        _, finite = update(
            (Tensor([3.0, 4.0]),), saturated, tuple(Tensor(x, ms.float32) for x in [1, 1, 1, 0, 1, 0, 0])
        )
        assert float(finite) == 0
        assert [bool(x) for x in before if x.dtype == ms.bool_] == [False]
