"""AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it, on MindSpore's fused kernel, and the moving
average of what it trains.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

`ops.AdamWeightDecay` computes p -= a (m / (sqrt(v) + e) + d p), without the two corrections; with
a = lr sqrt(1 - b2^t) / (1 - b1^t), e = eps sqrt(1 - b2^t) and d = lr wd / a it is the formula above. Those three
numbers come from the host in double precision. Fused: 120 ms for 24.6 M parameters in 350 tensors on two busy CPU
cores, 270 ms in separate operators, and 2 s of compilation against 17.

As in diffusers' training scripts, every trained parameter decays, normalisation and biases too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

_each = ops.HyperMap()
_adamw = ops.AdamWeightDecay()
_descend = ops.ApplyGradientDescent()
_update = ops.MultitypeFuncGraph("update")
_update_and_average = ops.MultitypeFuncGraph("update_and_average")


@_update.register(*["Tensor"] * 10)
def _(rate, beta1, beta2, epsilon, decay, factor, parameter, m, v, gradient):
    return _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, gradient * factor)[0]


# The average follows its own parameter at once. With a barrier between all updates and all averages, the two took
# 220 ms for the nano UNet, without one 96 ms.
@_update_and_average.register(*["Tensor"] * 12)
def _(rate, beta1, beta2, epsilon, decay, ema_rate, factor, parameter, m, v, average, gradient):
    done = _adamw(parameter, m, v, rate, beta1, beta2, epsilon, decay, gradient * factor)[0]
    return ops.depend(_descend(average, ema_rate, average - ops.depend(parameter, done)), done)


class AdamWScalars(NamedTuple):
    """What the fused kernel takes for one update."""

    rate: float
    epsilon: float
    decay: float


def adamw_scalars(
    update: int, lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> AdamWScalars:
    """The scalars of the `update`-th applied update, counted from 1 (t in the formula)."""
    correction1 = 1.0 - betas[0] ** update
    correction2 = math.sqrt(1.0 - betas[1] ** update)
    rate = lr * correction2 / correction1
    return AdamWScalars(rate, epsilon * correction2, weight_decay * correction1 / correction2)


class AdamW(nn.Cell):
    """Holds the moments `m.<name>` and `v.<name>` of each parameter and, with `use_ema`, its average `ema.<name>`:
    average += (1 - decay) (parameter - average), which starts at the parameter.
    """

    def __init__(self, parameters: tuple[Parameter, ...], betas: tuple[float, float], use_ema: bool = False):
        super().__init__(auto_prefix=False)
        self.use_ema = use_ema
        self.parameters = ParameterTuple(parameters)
        self.m = ParameterTuple([_like(p, "m", ops.zeros_like(p)) for p in parameters])
        self.v = ParameterTuple([_like(p, "v", ops.zeros_like(p)) for p in parameters])
        self.averages = ParameterTuple([_like(p, "ema", p.value().copy()) for p in parameters]) if use_ema else None
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)

    def construct(self, gradients, factor, rate, epsilon, decay, ema_rate):
        """gradients: one fp32 tensor a parameter, multiplied by `factor` first; rate, epsilon, decay: of
        `adamw_scalars`; ema_rate: 1 - EMA's decay. All of these are fp32 scalars.
        """
        if self.use_ema:
            update = ops.partial(_update_and_average, rate, self.beta1, self.beta2, epsilon, decay, ema_rate, factor)
            return _each(update, self.parameters, self.m, self.v, self.averages, gradients)
        update = ops.partial(_update, rate, self.beta1, self.beta2, epsilon, decay, factor)
        return _each(update, self.parameters, self.m, self.v, gradients)


def _like(parameter: Parameter, prefix: str, value: Tensor) -> Parameter:
    return Parameter(value, name=f"{prefix}.{parameter.name}", requires_grad=False)
