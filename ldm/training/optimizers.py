"""AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it, and the moving average of the parameters.

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
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import InplaceCopy

from ldm import ops as device_ops

_each = ops.HyperMap()
_adamw = ops.AdamWeightDecay()
_descend = ops.ApplyGradientDescent()
_copy, _lerp, _select = InplaceCopy(), ops.Lerp(), ops.Select()
_update = ops.MultitypeFuncGraph("update")
_update_and_average = ops.MultitypeFuncGraph("update_and_average")


def _scale(gradient: Tensor, factor: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return gradient * factor[0]


def _scale_finite(gradient: Tensor, factor: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return _select(factor[1], gradient * factor[0], factor[2])


def _average(average: Tensor, parameter: Tensor, ema_rate: Tensor) -> Tensor:
    return _descend(average, ema_rate, average - parameter)


def _average_on_ascend(average: Tensor, parameter: Tensor, ema_rate: Tensor) -> Tensor:
    """Do the same by two aclnn kernels. ApplyGradientDescent is an aclop kernel there."""
    return _copy(average, _lerp(average, parameter, ema_rate))


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


class AdamW(nn.Cell):
    """AdamW, and with `use_ema` a moving average: average += (1 - decay) (parameter - average).

    Holds the moments `m.<name>` and `v.<name>` of each parameter, which start at 0, and its average `ema.<name>`, which
    starts at the parameter.

    With `skip_overflow`, an update whose gradients are not finite leaves everything as it is. There is no branch in the
    graph for that: on Ascend the host would wait at a branch for the device, and then launch the rest. Instead the
    gradients are replaced by 0, the rates by 0 and the decay rates of the moments by 1, which changes no value.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        betas: tuple[float, float],
        use_ema: bool = False,
        skip_overflow: bool = False,
    ):
        super().__init__(auto_prefix=False)
        self.use_ema, self.skip_overflow = use_ema, skip_overflow
        self.parameters = ParameterTuple(parameters)
        self.m = ParameterTuple([companion("m", p, ops.zeros_like(p)) for p in parameters])
        self.v = ParameterTuple([companion("v", p, ops.zeros_like(p)) for p in parameters])
        self.averages = ParameterTuple([companion("ema", p, p.value().copy()) for p in parameters]) if use_ema else None
        self.scaled = _scale_finite if skip_overflow else _scale
        self.moved = _average_on_ascend if device_ops.on_ascend() else _average
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)
        self.zero = Tensor(0.0, ms.float32)
        self.maximum, self.cast = ops.Maximum(), ops.Cast()

    def construct(
        self, gradients: tuple[Tensor, ...], finite: Tensor,
        factor: Tensor, rate: Tensor, epsilon: Tensor, decay: Tensor, ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Apply one update with fp32 gradients, which are multiplied with `factor` first.

        Args:
            gradients: One for each parameter, of the same shape.
            finite: Whether all gradients are finite, a bool scalar.
            factor: Of the gradients.
            rate: See adamw_scalars, also for epsilon and decay.
            ema_rate: 1 - decay of the moving average.
        """
        beta1, beta2 = self.beta1, self.beta2
        if self.skip_overflow:
            applied = self.cast(finite, ms.float32)
            rate, ema_rate = rate * applied, ema_rate * applied
            beta1, beta2 = self.maximum(beta1, 1.0 - applied), self.maximum(beta2, 1.0 - applied)
        factor = (factor, finite, self.zero)
        if self.use_ema:
            update = ops.partial(
                _update_and_average, self.scaled, self.moved, ema_rate, factor, rate, beta1, beta2, epsilon, decay
            )
            return _each(update, self.parameters, self.m, self.v, self.averages, gradients)
        update = ops.partial(_update, self.scaled, factor, rate, beta1, beta2, epsilon, decay)
        return _each(update, self.parameters, self.m, self.v, gradients)


def companion(prefix: str, parameter: Parameter, value: Tensor) -> Parameter:
    """Return an array of the training state that belongs to a parameter."""
    return Parameter(value, name=f"{prefix}.{parameter.name}", requires_grad=False)
