"""Optimizer state divided among the processes of a data-parallel run: stage 1 of ZeRO (Rajbhandari et al. 2020).

Each array that the optimizer works on has an owner. All processes compute the mean of all gradients, as without this.
The owner alone holds the array's moments and its moving average, updates the array, and then sends it to the others by
Broadcast. MindSpore's parallel optimizer (`enable_parallel_optimizer`) does the same with its own optimizers, on Ascend
alone, but keeps all moments in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import InplaceCopy

from ldm.runtime import peers

T = TypeVar("T")

_each = ops.HyperMap()
_copy = InplaceCopy()


def balanced(sizes: Sequence[int], process_count: int) -> tuple[int, ...]:
    """Return the owner of each array: the largest array first, each to the process with the fewest elements so far."""
    totals, owners = [0] * process_count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = totals.index(min(totals))
        totals[owners[i]] += sizes[i]
    return tuple(owners)


class Shards(NamedTuple):
    """Which process owns each of the optimizer's arrays."""

    owners: tuple[int, ...]  # array -> process
    process: int  # this one

    def own(self, rows: Sequence[T]) -> list[T]:
        """Return the rows, of which there is one for each array, that belong to this process's arrays."""
        return [row for row, owner in zip(rows, self.owners) if owner == self.process]

    def gather(self, own: Sequence[Parameter], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Return an array for each of the optimizer's in process 0, nothing in the others. All processes call it.

        The arrays go through the host, one after the other, so that no device holds more than its own.

        Args:
            own: Parameters that belong to this process's arrays, such as their moments.
            shapes: Of all arrays.
        """
        values, rest = [], iter(own)
        for owner, shape in zip(self.owners, shapes):
            array = next(rest).asnumpy() if owner == self.process else None
            parts = peers.gather(b"" if array is None or self.process == 0 else array.tobytes())
            if self.process == 0:
                values.append(np.frombuffer(parts[owner], np.float32).reshape(shape) if array is None else array)
        return values


class MeanInOrder(nn.Cell):
    """Mean of each gradient over the processes, one after the other.

    The graphs of the processes differ in what follows, and with that the order in which the compiler would put their
    collective operators, which must be the same in all. The last gradient comes first, as the backward pass does.
    """

    def __init__(self, process_count: int):
        super().__init__(auto_prefix=False)
        self.all_reduce, self.share = ops.AllReduce(), Tensor(1.0 / process_count)

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        means: tuple[Tensor, ...] = ()
        mean = self.share
        for gradient in gradients[::-1]:
            mean = self.all_reduce(ops.depend(gradient, mean)) * self.share
            means = (mean, *means)
        return means


class _Send(nn.Cell):
    """Sends arrays of one process to all others."""

    def __init__(self, arrays: Sequence[Parameter], owner: int, is_own: bool):
        super().__init__(auto_prefix=False)
        self.arrays, self.is_own = ParameterTuple(arrays), is_own
        self.broadcast = ops.Broadcast(owner)

    def construct(self, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sent = self.broadcast(ops.depend(self.arrays, before))
        return sent if self.is_own else _each(_copy, self.arrays, sent)


class SendUpdated(nn.Cell):
    """Gives all processes the updated arrays: one Broadcast for each owner, in the same order everywhere.

    Args:
        arrays: All arrays of the optimizer.
        shards: Their owners.
    """

    def __init__(self, arrays: Sequence[Parameter], shards: Shards):
        super().__init__(auto_prefix=False)
        self.sends = nn.CellList(
            [
                _Send([a for a, o in zip(arrays, shards.owners) if o == owner], owner, owner == shards.process)
                for owner in sorted(set(shards.owners))
            ],
            auto_prefix=False,
        )

    def construct(self, updated: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what depends on all arrays being up to date in this process.

        Args:
            updated: What the broadcasts must wait for.
        """
        for send in self.sends:
            updated = send(updated)
        return updated
