"""Limit of the norm of each layer's LoRA, as sd-scripts' scale_weight_norms.

n = norm of multiplier up down. Where n is above the limit, both factors are multiplied by sqrt(limit / n) after a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.errors import UserError, plain
from ldm.lora.inject import lora_cells
from ldm.lora.layers import PairCell
from ldm.training.optimizer_arrays import OptimizerArrays, SplitFlat
from ldm.training.step_operators import copy_into, each, stack

_transposed_first, _transposed_second = ops.MatMul(transpose_a=True), ops.MatMul(transpose_b=True)
_sum = ops.ReduceSum()
_square_norm = ops.MultitypeFuncGraph("square_norm")


@_square_norm.register("Tensor", "Tensor")
def _(down: Tensor, up: Tensor) -> Tensor:
    # |up down|^2 = sum of (up^T up) * (down down^T), which are rank x rank. up down itself is as large as the layer.
    return _sum(_transposed_first(up, up) * _transposed_second(down, down))


class NormLimit(NamedTuple):
    """The limit, and the layers that it holds for: (down, up, multiplier) of each."""

    limit: float
    layers: Sequence[tuple[Parameter, Parameter, float]]


def norm_limit(model: nn.Cell, limit: float) -> NormLimit:
    """Return the limit for all LoRA layers of a model, with DoRA for its pair of factors.

    Raises:
        UserError: A layer has no plain pair of factors, or a trainable scale.
    """
    layers = []
    for name, cell in lora_cells(model).items():
        if not isinstance(cell, PairCell) or cell.has_mid:
            what = "third factor (use_tucker)" if isinstance(cell, PairCell) else cell.kind.label
            raise UserError(f"scale_weight_norms does not go with the {what} of {plain(name)}: leave one out")
        if cell.trainable_scale:
            raise UserError(f"scale_weight_norms does not go with the trainable_scale of {plain(name)}: leave one out")
        layers.append((cell.lora_down.weight, cell.lora_up.weight, cell.multiplier))
    return NormLimit(limit, layers)


class LimitNorms(nn.Cell):
    """Scales the factors of the layers whose norm is above the limit, in the optimizer's arrays.

    Args:
        arrays: The arrays, which hold all factors.
        limit: The limit and the layers.
    """

    def __init__(self, arrays: OptimizerArrays, limit: NormLimit):
        super().__init__(auto_prefix=False)
        place = {parameter.name: i for i, parameter in enumerate(arrays.parameters)}
        downs, ups, multipliers = zip(*limit.layers)
        self.downs, self.ups = (tuple(place[p.name] for p in group) for group in (downs, ups))
        self.down_shapes = tuple((p.shape[0], p.size // p.shape[0]) for p in downs)
        self.up_shapes = tuple((p.shape[0], p.size // p.shape[0]) for p in ups)
        self.squares = Tensor(np.square(np.array(multipliers, np.float32)))
        self.limit = Tensor(limit.limit, ms.float32)
        self.ones = Tensor(np.ones(len(downs), np.float32))
        self.one, self.zero = Tensor(np.ones(1, np.float32)), Tensor(0.0, ms.float32)
        self.flat, self.large = arrays.flat, ParameterTuple(arrays.large)
        self.small = len(arrays.small)
        self.split = SplitFlat(arrays.small) if arrays.small else None
        # The layer of each parameter, and one layer more for those of none.
        layer = {p.name: i for group in (downs, ups) for i, p in enumerate(group)}
        of_parameter = [layer.get(p.name, len(downs)) for p in arrays.parameters]
        self.of_large = tuple(of_parameter[self.small :])
        if arrays.small:
            sizes = [p.size for p in arrays.small]
            indices = np.repeat(np.array(of_parameter[: self.small], np.int32), sizes)
            self.of_element = Parameter(Tensor(indices), name="norm.layers", requires_grad=False)
        self.stack, self.concat, self.gather = stack(), ops.Concat(), ops.Gather()
        self.sqrt, self.maximum, self.select = ops.Sqrt(), ops.Maximum(), ops.Select()

    def construct(self, updated: tuple[Tensor, ...], finite: Tensor) -> tuple[Tensor, ...]:
        """Return what depends on the factors being scaled.

        Args:
            updated: What this must wait for.
            finite: Whether the update was applied. Otherwise this changes nothing.
        """
        parts: tuple[Tensor, ...] = ()
        flat: Tensor | None = None
        if self.split is not None:
            flat = ops.depend(self.flat, updated)
            parts = self.split(flat)
        large = ops.depend(self.large, updated) if self.of_large else ()
        downs: tuple[Tensor, ...] = ()
        ups: tuple[Tensor, ...] = ()
        scaled: tuple[Tensor, ...] = ()
        for i, shape in zip(self.downs, self.down_shapes):
            down = parts[i] if i < self.small else large[i - self.small]
            downs = (*downs, down.reshape(shape))
        for i, shape in zip(self.ups, self.up_shapes):
            up = parts[i] if i < self.small else large[i - self.small]
            ups = (*ups, up.reshape(shape))
        # Where the terms of a norm near 0 cancel, their rounded sum may be below 0. Its root is not a number, which
        # Maximum drops on the CPU, but need not on other devices.
        squares = self.maximum(self.stack(each(_square_norm, downs, ups)), self.zero)
        norms = self.sqrt(squares * self.squares)
        factors = self.sqrt(self.limit / self.maximum(norms, self.limit))
        factors = self.concat((self.select(finite, factors, self.ones), self.one))
        if flat is not None:
            scaled = (copy_into(self.flat, flat * self.gather(factors, self.of_element, 0)),)
        for i, layer in enumerate(self.of_large):
            scaled = (*scaled, copy_into(self.large[i], large[i] * factors[layer]))
        return (*updated, *scaled)
