"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

    c = b1 m + (1 - b1) g          p = p (1 - lr wd) - lr sign(c)          m = b2 m + (1 - b2) g

Every element moves by the learning rate, which is chosen 3 to 10 times below AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, ops

from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, copy_into, each

_sign = ops.Sign()
_update = ops.MultitypeFuncGraph("lion")


@_update.register("Function", *["Tensor"] * 7)
def _(
    blend: Callable, share1: Tensor, share2: Tensor, decay: Tensor,
    parameter: Tensor, m: Tensor, rate: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    direction = _sign(blend(m, gradient, share1)) + parameter * decay
    moved, new_m = parameter - direction * rate, blend(m, gradient, share2)
    # Both arrays are read before one is written.
    updated = copy_into(parameter, ops.depend(moved, new_m))
    return ops.depend(updated, copy_into(m, ops.depend(new_m, moved)))


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion. `m` is the moving average of each parameter's gradients, which starts at 0."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    groups = ("m",)

    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        return lr, self.weight_decay

    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        return _ApplyLion(arrays, self.betas, options)


class _ApplyLion(OptimizerCell):
    """With `skip_overflow`, the rate of an update that is skipped becomes 0, and the share of the gradient in m."""

    def __init__(self, arrays: Sequence[Parameter], betas: tuple[float, float], options: CellOptions):
        super().__init__(arrays, options)
        self.m = self.zeros("m", arrays)
        self.share1, self.share2 = Tensor(1.0 - betas[0], ms.float32), Tensor(1.0 - betas[1], ms.float32)

    def state_groups(self) -> dict[str, ParameterTuple]:
        return {"m": self.m}

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        rate, decay = numbers
        share2 = self.share2
        if self.skip_overflow:
            applied = self.applied(finite)
            rate, ema_rate, share2 = rate * applied, ema_rate * applied, share2 * applied
        gradients = self.unscaled(gradients, finite, factor)
        update = ops.partial(_update, self.blend, self.share1, share2, decay)
        updated = each(update, self.parameters, self.m, self.rates(rate), gradients)
        return self.average(updated, ema_rate)
