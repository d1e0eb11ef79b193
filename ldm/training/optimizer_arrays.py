"""Which arrays the optimizer works on: small parameters as parts of one flat array, large ones by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import InplaceCopy, SplitWithSizeView

from ldm.runtime.versions import splits_into_views

SPLIT_INTO = 64  # parts at once: the compiler checks their sizes by a recursion, which fails at 320

_each = ops.HyperMap()
_copy, _split = InplaceCopy(), SplitWithSizeView() if splits_into_views() else ops.split
_ravel = ops.MultitypeFuncGraph("ravel")
_write = ops.MultitypeFuncGraph("write")


@_ravel.register("Tensor")
def _(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)


@_write.register("Tensor", "Tensor")
def _(parameter: Tensor, part: Tensor) -> Tensor:
    return _copy(parameter, part.reshape(parameter.shape))


_assign = ops.MultitypeFuncGraph("assign")


@_assign.register("Tensor", "Tensor")
def _(parameter: Tensor, part: Tensor) -> Tensor:
    return ops.assign(parameter, part.reshape(parameter.shape))


class OptimizerArrays:
    """The arrays that the optimizer works on: one flat array of all small parameters, and each large parameter itself.

    An operator on the flat array takes the place of one for each parameter: on Ascend a launch costs about as much
    as the work on an array of 10^6 elements. A large parameter is not copied, so that training a whole network does not
    need its memory a second time.

    All of these arrays are fp32, and their values are those that are trained and saved. The small parameters are copies
    for the networks to read. Those that a network reads in fp16 become fp16, so that one cast of the flat array takes
    the place of one for each parameter and one for each gradient. The values are rounded where they were before.

    Args:
        parameters: The parameters to train, in fp32.
        large: Number of elements from which a parameter is large.
        read_in_fp16: Those that the networks cast to fp16 at each use. The small ones of them become fp16 here.
    """

    def __init__(self, parameters: Sequence[Parameter], large: int, read_in_fp16: Sequence[Parameter] = ()):
        small = [p for p in parameters if p.size < large]
        if len(small) == 1:
            small = []
        in_fp16 = {id(p) for p in read_in_fp16}
        self.small_fp16 = tuple(p for p in small if id(p) in in_fp16)
        self.small_fp32 = tuple(p for p in small if id(p) not in in_fp16)
        in_flat = {id(p) for p in small}
        self.large = tuple(p for p in parameters if id(p) not in in_flat)
        self.flat = None
        if small:
            values = np.concatenate([p.asnumpy().ravel() for p in self.small])
            self.flat = Parameter(Tensor(values), name="flat", requires_grad=False)
        for parameter in self.small_fp16:
            parameter.set_dtype(ms.float16)

    @property
    def small(self) -> tuple[Parameter, ...]:
        """The parameters that are copies of parts of the flat array, in its order."""
        return self.small_fp16 + self.small_fp32

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The trained parameters in the order in which the step handles them: the small ones come first."""
        return self.small + self.large

    @property
    def arrays(self) -> tuple[Parameter, ...]:
        return self.large if self.flat is None else (self.flat, *self.large)

    @property
    def parts(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of the parameters that each of `arrays` consists of."""
        parts: list[tuple[tuple[int, ...], ...]] = [(tuple(p.shape),) for p in self.large]
        if self.flat is not None:
            parts.insert(0, tuple(tuple(p.shape) for p in self.small))
        return tuple(parts)

    def split(
        self, values: Sequence[np.ndarray], shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    ) -> dict[str, np.ndarray]:
        """Return a copy of `values`, one for each of `arrays`, by parameter name.

        `shape` gives the shape of a value for that of its parameter.
        """
        values, result = list(values), {}
        if self.flat is not None:
            shapes = [shape(p.shape) for p in self.small]
            ends = np.cumsum([math.prod(size) for size in shapes])[:-1]
            parts = np.split(values.pop(0), ends)
            result = {p.name: part.reshape(size) for p, part, size in zip(self.small, parts, shapes)}
        result.update({p.name: value for p, value in zip(self.large, values)})
        return {name: value.copy() for name, value in result.items()}

    def join(self, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return one array for each of `arrays` of values by parameter name, the inverse of `split`."""
        rows = [values[p.name] for p in self.large]
        if self.flat is not None:
            rows.insert(0, np.concatenate([values[p.name].ravel() for p in self.small]))
        return [np.ascontiguousarray(row, np.float32) for row in rows]


class JoinGradients(nn.Cell):
    """Gradients of `OptimizerArrays.parameters` -> gradients of `OptimizerArrays.arrays`, in fp32."""

    def __init__(self, arrays: OptimizerArrays):
        super().__init__(auto_prefix=False)
        self.fp16, self.small = len(arrays.small_fp16), len(arrays.small)
        self.concat, self.cast = ops.Concat(), ops.Cast()

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.small:
            return gradients
        parts = _each(_ravel, gradients[: self.small])
        if self.fp16:
            of_fp16 = self.cast(self.concat(parts[: self.fp16]), ms.float32)
            parts = (of_fp16,) + parts[self.fp16 :]
        flat = parts[0] if len(parts) == 1 else self.concat(parts)
        return (flat,) + gradients[self.small :]


class SplitFlat(nn.Cell):
    """Flat array -> its parts (size,) of each parameter, which are views."""

    def __init__(self, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        sizes = [p.size for p in parameters]
        self.sizes = tuple(tuple(sizes[i : i + SPLIT_INTO]) for i in range(0, len(sizes), SPLIT_INTO))
        self.group_sizes = tuple(sum(group) for group in self.sizes)

    def construct(self, flat: Tensor) -> tuple[Tensor, ...]:
        parts = ()
        groups = _split(flat, self.group_sizes, 0)
        for group, sizes in zip(groups, self.sizes):
            parts += _split(group, sizes, 0)
        return parts


class _CopyParts(nn.Cell):
    """Copies the parts of a flat array into parameters of its type."""

    def __init__(self, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.parameters, self.split = ParameterTuple(parameters), SplitFlat(parameters)
        # In pynative mode a part is a view, whose copy MindSpore 2.8 refuses on the CPU: its memory has another size.
        self.write = _assign if ms.get_context("mode") == ms.PYNATIVE_MODE else _write

    def construct(self, flat: Tensor) -> tuple[Tensor, ...]:
        return _each(self.write, self.parameters, self.split(flat))


class CopyIntoParameters(nn.Cell):
    """Copies the flat array into the small parameters, which the networks read."""

    def __init__(self, arrays: OptimizerArrays):
        super().__init__(auto_prefix=False)
        assert arrays.flat is not None
        self.flat, self.cast = arrays.flat, ops.Cast()
        self.copy_fp16 = _CopyParts(arrays.small_fp16) if arrays.small_fp16 else None
        self.copy_fp32 = _CopyParts(arrays.small_fp32) if arrays.small_fp32 else None
        self.sizes = tuple(sum(p.size for p in group) for group in (arrays.small_fp16, arrays.small_fp32) if group)

    def construct(self, updated: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what depends on the parameters being up to date.

        Args:
            updated: What the copies must wait for.
        """
        copied: tuple[Tensor, ...] = ()
        flat = ops.depend(self.flat, updated)
        if self.copy_fp16 is not None:
            # A part is a view. A cast of the array itself would bring two copies of it, aclop kernels on Ascend.
            parts = _split(flat, self.sizes, 0)
            copied = self.copy_fp16(self.cast(parts[0], ms.float16))
            if self.copy_fp32 is not None:
                copied += self.copy_fp32(parts[1])
        elif self.copy_fp32 is not None:
            copied = self.copy_fp32(flat)
        return copied
