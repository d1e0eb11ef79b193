"""Adafactor (Shazeer and Stern 2018), as transformers' Adafactor computes it.

    u = g^2 + eps1                 row = b row + (1 - b) mean of u over columns      b = 1 - t^decay_rate
                                   column = b column + (1 - b) mean of u over rows
    h = g / sqrt(row column / mean(row))            h = h / max(1, rms(h) / clip_threshold)
    p = p - a wd p - a h           a = lr, times max(eps2, rms(p)) with scale_parameter

A parameter is one matrix of its last two axes for each place in the axes before those. One with a single axis, of n
elements, is the matrix (n, 1), with which the formula is that of a second moment for each element.

Small parameters are parts of one flat array. There, the sums over rows, columns and parameters are sums over segments,
and are read back by Gather: about 30 kernels on Ascend for all of a LoRA's factors together, where a dozen for each of
256 factors would be 3,000. The indices of rows and columns take 8 bytes an element while training. What is saved are
rows and columns alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, copy_into


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor. `row` and `column` are the factored second moment, `m` with beta1 the first one. They start at 0.

    With `relative_step`, lr is not used: it is min(0.01, 1 / sqrt(t)), and with `warmup_init` at most 1e-6 t.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False

    @property
    def groups(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("row", "column") if self.beta1 is None else ("row", "column", "m")

    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        if self.relative_step:
            lr = min(1e-6 * t if self.warmup_init else 1e-2, 1.0 / math.sqrt(t))
        return lr, t**self.decay_rate, self.weight_decay

    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        return _ApplyAdafactor(arrays, parts, self, options)

    def group_shape(self, group: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if group == "row":
            return shape[:-1] if len(shape) > 1 else (math.prod(shape),)
        if group == "column":
            return (*shape[:-2], shape[-1]) if len(shape) > 1 else (1,)
        return shape


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of matrices of a parameter, of their rows and of their columns."""
    return (math.prod(shape[:-2]), *shape[-2:]) if len(shape) > 1 else (1, math.prod(shape), 1)  # type: ignore[return-value]


class _Segments(nn.Cell):
    """Sums over segments of an array, and values of the segments for its elements.

    Args:
        of_element: (n,), the segment of each element.
        count: Number of segments.
        name: Of the parameters that hold the indices, which no other in the graph has.
    """

    def __init__(self, of_element: np.ndarray, count: int, name: str):
        super().__init__(auto_prefix=False)
        self.count = count
        self.of_element = Parameter(Tensor(of_element.astype(np.int32)), name=f"segments.{name}", requires_grad=False)
        sizes = np.bincount(of_element, minlength=count)
        self.shares = Parameter(Tensor((1.0 / sizes).astype(np.float32)), name=f"shares.{name}", requires_grad=False)
        self.sum, self.gather = ops.UnsortedSegmentSum(), ops.Gather()

    def mean(self, x: Tensor) -> Tensor:
        """Elements (n,) -> means of the segments (count,)."""
        return self.sum(x, self.of_element, self.count) * self.shares

    def spread(self, x: Tensor) -> Tensor:
        """Values of the segments (count,) -> of their elements (n,)."""
        return self.gather(x, self.of_element, 0)


class _FlatMoments(nn.Cell):
    """The factored moments of parameters that are parts of one flat array."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__(auto_prefix=False)
        row_of, column_of, matrix_of_row, parameter_of_row = [], [], [], []
        rows = columns = matrices = 0
        for i, shape in enumerate(shapes):
            b, r, c = _matrices(shape)
            index = np.arange(b * r * c)
            row_of.append(rows + index // c)
            column_of.append(columns + index // (r * c) * c + index % c)
            matrix_of_row.append(matrices + np.arange(b * r) // r)
            parameter_of_row.append(np.full(b * r, i))
            rows, columns, matrices = rows + b * r, columns + b * c, matrices + b
        self.rows = _Segments(np.concatenate(row_of), rows, "rows")
        self.columns = _Segments(np.concatenate(column_of), columns, "columns")
        self.matrices = _Segments(np.concatenate(matrix_of_row), matrices, "matrices")
        # The rows of a parameter have one length, so the mean of their means is that of its elements.
        self.parameters = _Segments(np.concatenate(parameter_of_row), len(shapes), "parameters")
        self.start = np.zeros(rows, np.float32), np.zeros(columns, np.float32)

    def row_mean(self, x: Tensor) -> Tensor:
        return self.rows.mean(x)

    def column_mean(self, x: Tensor) -> Tensor:
        return self.columns.mean(x)

    def matrix_mean(self, row: Tensor) -> Tensor:
        """Values of the rows -> their mean over the matrix, for each row."""
        return self.matrices.spread(self.matrices.mean(row))

    def product(self, row: Tensor, column: Tensor) -> Tensor:
        """Values of the rows and of the columns -> their products, for each element."""
        return self.rows.spread(row) * self.columns.spread(column)

    def parameter_mean(self, x: Tensor) -> Tensor:
        """Elements -> their mean over the parameter, for each parameter."""
        return self.parameters.mean(self.rows.mean(x))

    def to_elements(self, x: Tensor) -> Tensor:
        """Values of the parameters -> of their elements."""
        return self.rows.spread(self.parameters.spread(x))


class _ArrayMoments(nn.Cell):
    """The factored moments of one parameter. The methods are those of _FlatMoments."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        b, r, c = _matrices(shape)
        self.shape, self.size = shape, math.prod(shape)
        self.matrices, self.row_shape, self.column_shape = (b, r, c), (b, r), (b, c)
        given = Adafactor()
        self.row_group, self.column_group = given.group_shape("row", shape), given.group_shape("column", shape)
        self.start = np.zeros(self.row_group, np.float32), np.zeros(self.column_group, np.float32)
        self.mean, self.outer = ops.ReduceMean(), ops.BatchMatMul()

    def row_mean(self, x: Tensor) -> Tensor:
        return self.mean(x.reshape(self.matrices), 2).reshape(self.row_group)

    def column_mean(self, x: Tensor) -> Tensor:
        return self.mean(x.reshape(self.matrices), 1).reshape(self.column_group)

    def matrix_mean(self, row: Tensor) -> Tensor:
        b, r = self.row_shape
        mean = self.mean(row.reshape(self.row_shape), 1)
        return ops.broadcast_to(mean.reshape((b, 1)), (b, r)).reshape(self.row_group)

    def product(self, row: Tensor, column: Tensor) -> Tensor:
        # A product of matrices, because MindSpore's Mul keeps memory on the CPU where two shapes differ.
        b, r, c = self.matrices
        return self.outer(row.reshape((b, r, 1)), column.reshape((b, 1, c))).reshape(self.shape)

    def parameter_mean(self, x: Tensor) -> Tensor:
        return self.mean(x.reshape((self.size,)), 0)

    def to_elements(self, x: Tensor) -> Tensor:
        return x


class _UpdateArray(nn.Cell):
    """The update of one array."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], given: Adafactor, blend: Callable):
        super().__init__(auto_prefix=False)
        self.moments = _ArrayMoments(tuple(shapes[0])) if len(shapes) == 1 else _FlatMoments(shapes)
        self.blend = blend
        self.scale_parameter, self.has_m = given.scale_parameter, given.beta1 is not None
        self.eps1, self.eps2 = (Tensor(eps, ms.float32) for eps in given.eps)
        self.per_clip = Tensor(1.0 / given.clip_threshold, ms.float32)
        self.m_share = Tensor(1.0 - (given.beta1 or 0.0), ms.float32)
        self.one = Tensor(1.0, ms.float32)
        self.rsqrt, self.sqrt, self.maximum = ops.Rsqrt(), ops.Sqrt(), ops.Maximum()

    def construct(
        self,
        parameter: Parameter,
        row: Parameter,
        column: Parameter,
        m: Parameter,
        gradient: Tensor,
        rate: Tensor,
        share: Tensor,
        decay: Tensor,
        applied: Tensor,
    ) -> tuple[Tensor, ...]:
        moments = self.moments
        square = gradient * gradient + self.eps1
        new_row = self.blend(row, moments.row_mean(square), share)
        new_column = self.blend(column, moments.column_mean(square), share)
        # They are at least eps1, except before the first update, where one that is skipped would divide 0 by 0.
        rows, columns = self.maximum(new_row, self.eps1), self.maximum(new_column, self.eps1)
        step = gradient * moments.product(self.rsqrt(rows / moments.matrix_mean(rows)), self.rsqrt(columns))
        shrink = self.one / self.maximum(self.sqrt(moments.parameter_mean(step * step)) * self.per_clip, self.one)
        if self.scale_parameter:
            size = self.maximum(self.sqrt(moments.parameter_mean(parameter * parameter)), self.eps2)
            step = step * moments.to_elements(shrink * size)
            decayed = parameter * moments.to_elements(size * decay)
        else:
            step, decayed = step * moments.to_elements(shrink), parameter * decay
        if self.has_m:
            # transformers multiplies by the rate before it averages.
            step = self.blend(m, step * rate, self.m_share * applied)
            moved = parameter - (step * applied + decayed * rate)
            written = copy_into(m, ops.depend(step, moved))
        else:
            moved = parameter - (step + decayed) * rate
            written = moved
        updated = copy_into(parameter, ops.depend(moved, (new_row, new_column)))
        kept = copy_into(row, ops.depend(new_row, moved)), copy_into(column, ops.depend(new_column, moved))
        return ops.depend(updated, (written, kept))


class _ApplyAdafactor(OptimizerCell):
    """With `skip_overflow`, an update that is skipped has the rate and the shares in all moments of 0."""

    def __init__(
        self,
        arrays: Sequence[Parameter],
        parts: Sequence[Sequence[tuple[int, ...]]],
        given: Adafactor,
        options: CellOptions,
    ):
        super().__init__(arrays, options)
        self.updates = nn.CellList(
            [_UpdateArray(shapes, given, self.blend) for shapes in parts], auto_prefix=False
        )  # fmt: skip
        starts = [update.moments.start for update in self.updates]
        self.row, self.column = (
            ParameterTuple(
                [
                    Parameter(Tensor(start[i]), name=f"{group}.{p.name}", requires_grad=False)
                    for p, start in zip(arrays, starts)
                ]
            )
            for i, group in enumerate(("row", "column"))
        )
        self.m = None if given.beta1 is None else self.zeros("m", arrays)

    def state_groups(self) -> dict[str, ParameterTuple]:
        groups = {"row": self.row, "column": self.column}
        return groups if self.m is None else {**groups, "m": self.m}

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        rate, share, decay = numbers
        applied = self.applied(finite)
        if self.skip_overflow:
            rate, ema_rate, share = rate * applied, ema_rate * applied, share * applied
        gradients, rates = self.unscaled(gradients, finite, factor), self.rates(rate)
        moments = self.row if self.m is None else self.m
        updated: tuple[Tensor, ...] = ()
        for i, update in enumerate(self.updates):
            done = update(
                self.parameters[i], self.row[i], self.column[i], moments[i], gradients[i], rates[i], share, decay,
                applied,
            )  # fmt: skip
            updated = (*updated, done)
        return self.average(updated, ema_rate)
