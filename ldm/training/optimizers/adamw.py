"""AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

MindSpore's fused `ops.AdamWeightDecay` computes p -= a (m / (sqrt(v) + e) + d p), without the two corrections. With
a = lr sqrt(1 - b2^t) / (1 - b1^t), e = eps sqrt(1 - b2^t) and d = lr wd / a it is the formula above. The host computes
these three numbers in double precision. The fused operator takes 120 ms for 24.6 M parameters in 350 tensors on two
busy CPU cores, separate operators take 270 ms. They compile in 2 s and 17 s. On Ascend the fused operator is one launch
(an aclop kernel, as in the published MindSpore examples) where separate operators are 10. aclnn's AdamW exists on A2
and later alone, and takes its numbers from the host, so it could not skip an update by what the device computed.

As in diffusers' training scripts, weight decay applies to every trained parameter, normalisation and biases too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, ops

from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, copy_into, each

EPSILON = 1e-8  # the default of torch and of diffusers' training scripts

_adamw = ops.AdamWeightDecay()
_update = ops.MultitypeFuncGraph("update")
_update_and_average = ops.MultitypeFuncGraph("update_and_average")
_update_by_factor = ops.MultitypeFuncGraph("update_by_factor")


@_update.register("Function", "Tuple", *["Tensor"] * 9)
def _(
    scale: Callable, factor: tuple[Tensor, Tensor, Tensor],
    rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor,
    parameter: Tensor, m: Tensor, v: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    return _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, scale(gradient, factor))[0]


# Each average depends on its own parameter only. With a barrier between all updates and all averages, the two took
# 220 ms for the nano UNet, without one 96 ms.
@_update_and_average.register("Function", "Function", "Tensor", "Tuple", *["Tensor"] * 10)
def _(
    scale: Callable, move: Callable, ema_rate: Tensor, factor: tuple[Tensor, Tensor, Tensor],
    rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor,
    parameter: Tensor, m: Tensor, v: Tensor, average: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    scaled = scale(gradient, factor)
    updated = _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, scaled)[0]
    return ops.depend(move(average, ops.depend(parameter, updated), ema_rate), updated)


# The fused operator has one rate for an array. Where its elements have factors of it, p + factor (updated - p) takes
# five kernels more. The operator works in place, so what was there is kept as its negative.
@_update_by_factor.register("Function", "Tuple", *["Tensor"] * 10)
def _(
    scale: Callable, factor: tuple[Tensor, Tensor, Tensor],
    rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor,
    parameter: Tensor, m: Tensor, v: Tensor, rate_factor: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    negative = -parameter
    scaled = ops.depend(scale(gradient, factor), negative)
    updated = _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, scaled)[0]
    difference = ops.depend(parameter, updated) + negative
    return copy_into(parameter, difference * rate_factor - negative)


class AdamWScalars(NamedTuple):
    """The scalars of the fused operator for one step: a, e and d of the formula above."""

    rate: float
    epsilon: float
    decay: float


def adamw_scalars(t: int, lr: float, betas: Sequence[float], epsilon: float, weight_decay: float) -> AdamWScalars:
    """Return the scalars of the t-th update that is applied, from 1."""
    correction1 = 1.0 - betas[0] ** t
    correction2 = math.sqrt(1.0 - betas[1] ** t)
    rate = lr * correction2 / correction1
    return AdamWScalars(rate, epsilon * correction2, weight_decay * correction1 / correction2)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW. `m` and `v` are the moments of each parameter, which start at 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = EPSILON
    weight_decay: float = 0.01

    groups = ("m", "v")

    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        return adamw_scalars(t, lr, self.betas, self.eps, self.weight_decay)

    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        return ApplyAdamW(arrays, self.betas, options)


class ApplyAdamW(OptimizerCell):
    """AdamW, and with `use_ema` a moving average.

    With `skip_overflow`, the rates of an update that is skipped become 0 and the decay rates of the moments 1.
    """

    def __init__(self, arrays: Sequence[Parameter], betas: Sequence[float], options: CellOptions | None = None):
        super().__init__(arrays, options or CellOptions())
        self.m, self.v = self.zeros("m", arrays), self.zeros("v", arrays)
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)

    def state_groups(self) -> dict[str, ParameterTuple]:
        return {"m": self.m, "v": self.v}

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        rate, epsilon, decay = numbers
        beta1, beta2 = self.beta1, self.beta2
        if self.skip_overflow:
            applied = self.cast(finite, ms.float32)
            rate, ema_rate = rate * applied, ema_rate * applied
            beta1, beta2 = self.maximum(beta1, 1.0 - applied), self.maximum(beta2, 1.0 - applied)
        factor = (factor, finite, self.zero)
        if self.factors is not None:
            update = ops.partial(_update_by_factor, self.scaled, factor, rate, beta1, beta2, epsilon, decay)
            updated = each(update, self.parameters, self.m, self.v, self.factors, gradients)
            return self.average(updated, ema_rate)
        if self.use_ema:
            update = ops.partial(
                _update_and_average, self.scaled, self.move, ema_rate, factor, rate, beta1, beta2, epsilon, decay
            )
            return each(update, self.parameters, self.m, self.v, self.averages, gradients)
        update = ops.partial(_update, self.scaled, factor, rate, beta1, beta2, epsilon, decay)
        return each(update, self.parameters, self.m, self.v, gradients)
