"""Prodigy (Mishchenko and Defazio 2023), which finds its learning rate: AdamW with the rate d lr, and d grows.

    dlr = d lr b                   num = b3 num + sum((d / d0) dlr <g, p0 - p>)      s = b3 s + (d / d0) dlr g
    m = b1 m + d (1 - b1) g        v = b2 v + d^2 (1 - b2) g^2                        den = sum |s|
    dhat = d_coef num / den        where d = d0: d = max(d, dhat)                     dmax = max(dmax, dhat)
    d' = min(dmax, d growth)       p = p - wd dlr p - dlr m / (sqrt(v) + d' eps)

b is AdamW's bias correction or 1, p0 where the parameters started. With `safeguard_warmup`, s takes d in place of dlr.
num, d and dmax are one number each over all parameters, so that there is one learning rate for all of them.

The last line is MindSpore's fused `ops.AdamWeightDecay` with the gradient d g, the rate dlr and the epsilon d' eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, copy_into, each, scalar
from ldm.training.step_operators import stack

SMALLEST = 1e-37  # a sum |s| of 0, before the first gradient, is not divided by

_adamw = ops.AdamWeightDecay()
_sum, _abs = ops.ReduceSum(), ops.Abs()
_progress = ops.MultitypeFuncGraph("progress")
_accumulate = ops.MultitypeFuncGraph("accumulate")
_update = ops.MultitypeFuncGraph("prodigy")


@_progress.register("Tensor", "Tensor", "Tensor")
def _(parameter: Tensor, start: Tensor, gradient: Tensor) -> Tensor:
    return _sum(gradient * (start - parameter))


@_accumulate.register("Tensor", "Tensor", "Tensor", "Tensor")
def _(beta3: Tensor, weight: Tensor, s: Tensor, gradient: Tensor) -> Tensor:
    new_s = s * beta3 + gradient * weight
    return ops.depend(_sum(_abs(new_s)), copy_into(s, new_s))


@_update.register("Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", *["Tensor"] * 4)
def _(
    d: Tensor, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor,
    parameter: Tensor, m: Tensor, v: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    return _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, gradient * d)[0]


@dataclass(frozen=True)
class Prodigy(Optimizer):
    """Prodigy. Beside the moments `m` and `v`, each parameter has `s`, which starts at 0, and its start `p0`."""

    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None  # None: sqrt(beta2)
    eps: float = 1e-8
    weight_decay: float = 0.0
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = math.inf

    groups = ("m", "v", "s", "p0")
    scalars = ("d", "d_max", "d_numerator")

    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        correction = 1.0
        if self.use_bias_correction:
            correction = math.sqrt(1.0 - self.betas[1] ** t) / (1.0 - self.betas[0] ** t)
        of_m, of_v = self.rounding()
        return lr * correction, self.weight_decay / (of_m * of_v)

    def rounding(self) -> tuple[float, float]:
        """Return what the fused operator's m is to be multiplied by, and what its sqrt(v) is too large by.

        It computes 1 - beta from a beta in fp32, for 0.999 with an error of 1.3e-5. d grows by what it moves, so that
        the error became 5e-5 in d.
        """
        (b1, b2), (rounded1, rounded2) = self.betas, (float(np.float32(beta)) for beta in self.betas)
        return (1.0 - b1) / (1.0 - rounded1), math.sqrt((1.0 - rounded2) / (1.0 - b2))

    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        if options.factors is not None:
            raise ValueError("Prodigy has one learning rate for all parameters")
        return _ApplyProdigy(arrays, self, options)


class _ApplyProdigy(OptimizerCell):
    """With `skip_overflow`, an update that is skipped has the rate 0 and the decay rates 1, and leaves d and dmax."""

    def __init__(self, arrays: Sequence[Parameter], given: Prodigy, options: CellOptions):
        super().__init__(arrays, options)
        self.m, self.v, self.s = (self.zeros(group, arrays) for group in ("m", "v", "s"))
        self.p0 = self.companions("p0", arrays)
        self.d, self.d_max = scalar("d", given.d0), scalar("d_max", given.d0)
        self.d_numerator = scalar("d_numerator", 0.0)
        beta3 = math.sqrt(given.betas[1]) if given.beta3 is None else given.beta3
        self.beta1, self.beta2, self.beta3 = (Tensor(beta, ms.float32) for beta in (*given.betas, beta3))
        of_m, of_v = given.rounding()
        self.of_rate, self.eps = Tensor(of_m * of_v, ms.float32), Tensor(given.eps * of_v, ms.float32)
        self.d0, self.d_coef = Tensor(given.d0, ms.float32), Tensor(given.d_coef, ms.float32)
        self.growth_rate = None if math.isinf(given.growth_rate) else Tensor(given.growth_rate, ms.float32)
        self.smallest = Tensor(SMALLEST, ms.float32)
        self.safeguard = given.safeguard_warmup
        self.stack, self.sum, self.equal, self.minimum = stack(), ops.ReduceSum(), ops.Equal(), ops.Minimum()

    def state_groups(self) -> dict[str, ParameterTuple]:
        return {"m": self.m, "v": self.v, "s": self.s, "p0": self.p0}

    def state_scalars(self) -> dict[str, Parameter]:
        return {"d": self.d, "d_max": self.d_max, "d_numerator": self.d_numerator}

    def total(self, sums: tuple[Tensor, ...]) -> Tensor:
        return sums[0] if len(sums) == 1 else self.sum(self.stack(sums))

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        rate, decay = numbers
        beta1, beta2, beta3 = self.beta1, self.beta2, self.beta3
        d, d_max = self.d, self.d_max
        d_for_s = d
        if self.skip_overflow:
            applied = self.applied(finite)
            skipped = 1.0 - applied
            rate, ema_rate, d_for_s = rate * applied, ema_rate * applied, d * applied
            beta1, beta2 = self.maximum(beta1, skipped), self.maximum(beta2, skipped)
            beta3 = self.maximum(beta3, skipped)
        gradients = self.unscaled(gradients, finite, factor)

        # d / d0 instead of d keeps num and s away from the smallest numbers.
        dlr, ratio = d * rate, d / self.d0
        progress = self.total(each(_progress, self.parameters, self.p0, gradients))
        numerator = self.d_numerator * beta3 + ratio * dlr * progress
        weight = ratio * (d_for_s if self.safeguard else dlr)
        denominator = self.total(each(ops.partial(_accumulate, beta3, weight), self.s, gradients))

        estimate = self.d_coef * numerator / self.maximum(denominator, self.smallest)
        new_max = self.maximum(d_max, estimate)
        new_d = new_max
        if self.growth_rate is not None:
            raised = self.select(self.equal(d, self.d0), self.maximum(d, estimate), d)
            new_d = self.minimum(new_max, raised * self.growth_rate)
        if self.skip_overflow:
            new_d, new_max = self.select(finite, new_d, d), self.select(finite, new_max, d_max)

        # The new epsilon waits for `progress`, which reads the parameters.
        update = ops.partial(_update, d, dlr * self.of_rate, beta1, beta2, new_d * self.eps, decay)
        updated = each(update, self.parameters, self.m, self.v, gradients)
        kept = (
            copy_into(self.d_numerator, ops.depend(numerator, updated)),
            copy_into(self.d_max, ops.depend(new_max, updated)),
            copy_into(self.d, ops.depend(new_d, updated)),
        )
        return (*self.average(updated, ema_rate), *kept)
