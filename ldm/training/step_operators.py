"""Operators of the training step that differ between devices, or that only one device has.

Stack, Unstack, L2Loss, AddN and AssignAdd are aclop kernels on Ascend, which cost four times as much to launch as
aclnn kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import InplaceCopy, LinalgVectorNorm, SplitWithSize, StackExt
from mindspore.ops.operations.math_ops import NPUClearFloatStatusV2, NPUGetFloatStatusV2

from ldm import ops as device_ops

each = ops.HyperMap()
copy_into = InplaceCopy()
_half_square, _vector_norm = ops.L2Loss(), LinalgVectorNorm()
_half_square_sum = ops.MultitypeFuncGraph("half_square_sum")
_norm = ops.MultitypeFuncGraph("norm")
_add_into = ops.MultitypeFuncGraph("add_into")
_add_into_on_ascend = ops.MultitypeFuncGraph("add_into_on_ascend")
clear = ops.MultitypeFuncGraph("clear")


@_half_square_sum.register("Tensor")
def _(gradient: Tensor) -> Tensor:
    return _half_square(gradient)


@_norm.register("Tensor")
def _(gradient: Tensor) -> Tensor:
    return _vector_norm(gradient, 2.0, None, False, None)


@_add_into.register("Tensor", "Tensor")
def _(total: Tensor, gradient: Tensor) -> Tensor:
    return ops.assign_add(total, gradient)


@_add_into_on_ascend.register("Tensor", "Tensor")
def _(total: Tensor, gradient: Tensor) -> Tensor:
    return copy_into(total, total + gradient)  # two aclnn kernels, where AssignAdd is an aclop kernel


@clear.register("Tensor")
def _(total: Tensor) -> Tensor:
    return copy_into(total, ops.zeros_like(total))


class _NormOnCPU(nn.Cell):
    """Global L2 norm of arrays, of which the first is the flat array if `has_flat`.

    L2Loss takes half the time of the square's ReduceSum for a large array, but adds the squares up in order, in fp32:
    its error is 1e-6 for 10^4 elements, 4e-4 for 10^6, 1e-2 for 10^7. ReduceSum's is below 1e-7.
    """

    def __init__(self, has_flat: bool):
        super().__init__(auto_prefix=False)
        self.has_flat = has_flat
        self.add_n, self.sqrt, self.square, self.sum = ops.AddN(), ops.Sqrt(), ops.Square(), ops.ReduceSum()

    def construct(self, arrays: tuple[Tensor, ...]) -> Tensor:
        if self.has_flat:
            half = self.sum(self.square(arrays[0])) * 0.5
            return self.sqrt(self.add_n((half,) + each(_half_square_sum, arrays[1:])) * 2.0)
        return self.sqrt(self.add_n(each(_half_square_sum, arrays)) * 2.0)


class _NormOnAscend(nn.Cell):
    """Global L2 norm of arrays by aclnn kernels."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.stack = stack()

    def construct(self, arrays: tuple[Tensor, ...]) -> Tensor:
        if len(arrays) == 1:
            return _norm(arrays[0])
        return _norm(self.stack(each(_norm, arrays)))


def global_norm(has_flat: bool) -> nn.Cell:
    """Return the cell that computes the global L2 norm of a tuple of arrays. `has_flat`: see _NormOnCPU."""
    return _NormOnAscend() if device_ops.on_ascend() else _NormOnCPU(has_flat)


def adder() -> ops.MultitypeFuncGraph:
    """Return the function that adds a gradient to its total, in place, and returns the total."""
    return _add_into_on_ascend if device_ops.on_ascend() else _add_into


def stack() -> Callable:
    """Return the operator that makes one tensor of a tuple of scalars."""
    return StackExt(0) if device_ops.on_ascend() else ops.Stack()


def unstack() -> Callable:
    """Return the operator that makes a tuple of scalars of a tensor."""
    return UnstackOnAscend() if device_ops.on_ascend() else ops.Unstack()


def pick(rows: tuple[Tensor, ...], indices: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the tensors at these places, in a graph."""
    picked: tuple[Tensor, ...] = ()
    for i in indices:
        picked = (*picked, rows[i])
    return picked


class UnstackOnAscend(nn.Cell):
    """Tensor (n, ...) -> n tensors (...), by one aclnn kernel.

    `mint.unbind` makes views without a kernel, but the compiler copies a view that is read twice by an aclop kernel.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.split = SplitWithSize()

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        rows: tuple[Tensor, ...] = ()
        for row in self.split(x, (1,) * x.shape[0], 0):
            rows = (*rows, row.reshape(x.shape[1:]))
        return rows


class SaturationFlags(nn.Cell):
    """The flags in which a device that saturates notes that a number did.

    A first Ascend 910 saturates, and an A2 with MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE. There a number above a
    type's largest becomes the largest, not infinity, so that the gradients may be finite and wrong. The device notes it
    in flags, whichever operator it was in, until they are cleared. MindSpore's TrainOneStepWithLossScaleCell reads the
    same flags.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.read_flags, self.reset_flags = NPUGetFloatStatusV2(), NPUClearFloatStatusV2()
        self.zeros = Tensor(np.zeros(8, np.int32))

    def clear(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return `batch`, so that what is computed from it comes after the flags are cleared."""
        return ops.depend(batch, self.reset_flags(self.zeros))

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Return the flags (8,) int32 after the gradients are computed, zeros if nothing saturated."""
        return self.read_flags(ops.depend(self.zeros, gradients))
