"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled"), which needs no decay of the learning rate.

    v = b2 v + (1 - b2) g^2                 h = g / (sqrt(v / (1 - b2^t)) + eps) + wd y
    w = t^r (largest lr so far)^power       c = w / (sum of all w)
    y = y + c (z - y) - lr (1 - b1 (1 - c)) h          z = z - lr h

The gradients are those at y, which is what is trained and what the networks hold. What a run samples with and saves is
the average x of the points z, which y lies near: y = x + (1 - b1) (z - x), hence x = y + (1 - 1 / b1) (z - y).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from ldm.training.optimizers.interface import CellOptions, Optimizer, OptimizerCell, copy_into, each, group_of, scalar

SMALLEST = 1e-37  # a sum of weights of 0, before the first update, is not divided by

_sqrt = ops.Sqrt()
_update = ops.MultitypeFuncGraph("schedulefree")


@_update.register("Function", "Tuple", *["Tensor"] * 5)
def _(
    blend: Callable, numbers: tuple[Tensor, ...],
    y: Tensor, z: Tensor, v: Tensor, rate: Tensor, gradient: Tensor,
) -> Tensor:  # fmt: skip
    share2, correction, epsilon, decay, c, y_factor = numbers
    new_v = blend(v, gradient * gradient, share2)
    step = (gradient * correction / (_sqrt(new_v) + epsilon) + y * decay) * rate
    new_y, new_z = blend(y, z, c) - step * y_factor, z - step
    # All arrays are read before one is written.
    updated = copy_into(y, ops.depend(new_y, (new_z, new_v)))
    others = copy_into(z, ops.depend(new_z, (new_y, new_v))), copy_into(v, ops.depend(new_v, (new_y, new_z)))
    return ops.depend(updated, others)


@dataclass(frozen=True)
class AdamWScheduleFree(Optimizer):
    """Schedule-free AdamW. Beside `v`, each parameter has `z`, which starts at the parameter."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    r: float = 0.0
    weight_lr_power: float = 2.0

    groups = ("v", "z")
    scalars = ("largest_weight", "weight_sum")
    keeps_average = True

    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        correction = math.sqrt(1.0 - self.betas[1] ** t)
        return lr, correction, self.eps * correction, self.weight_decay, lr**self.weight_lr_power, float(t) ** self.r

    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        if options.use_ema:
            raise ValueError("AdamWScheduleFree averages the parameters itself")
        return _ApplyScheduleFree(arrays, self.betas, options)

    def sampled(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the averaged point x, by parameter name."""
        share = 1.0 - 1.0 / self.betas[0]
        points = {}
        for name, y in group_of(state, "p").items():
            z = state[f"z.{name}"].astype(np.float64)
            points[name] = (y + share * (z - y)).astype(np.float32)
        return points


class _ApplyScheduleFree(OptimizerCell):
    """With `skip_overflow`, an update that is skipped has the rate, the weight and the share of g^2 in v of 0.

    `largest_weight` is (largest lr so far)^power.
    """

    def __init__(self, arrays: Sequence[Parameter], betas: tuple[float, float], options: CellOptions):
        super().__init__(arrays, options)
        self.v, self.z = self.zeros("v", arrays), self.companions("z", arrays)
        self.beta1, self.share2 = Tensor(betas[0], ms.float32), Tensor(1.0 - betas[1], ms.float32)
        self.largest_weight, self.weight_sum = scalar("largest_weight", 0.0), scalar("weight_sum", 0.0)
        self.smallest = Tensor(SMALLEST, ms.float32)

    def state_groups(self) -> dict[str, ParameterTuple]:
        return {"v": self.v, "z": self.z}

    def state_scalars(self) -> dict[str, Parameter]:
        return {"largest_weight": self.largest_weight, "weight_sum": self.weight_sum}

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        rate, correction, epsilon, decay, power_of_rate, power_of_t = numbers
        share2 = self.share2
        if self.skip_overflow:
            applied = self.applied(finite)
            rate, share2 = rate * applied, share2 * applied
            power_of_rate, power_of_t = power_of_rate * applied, power_of_t * applied
        gradients = self.unscaled(gradients, finite, factor)
        largest = self.maximum(self.largest_weight, power_of_rate)
        weight = largest * power_of_t
        total = self.weight_sum + weight
        c = weight / self.maximum(total, self.smallest)
        y_factor = 1.0 - self.beta1 * (1.0 - c)
        update = ops.partial(_update, self.blend, (share2, correction, epsilon, decay, c, y_factor))
        updated = each(update, self.parameters, self.z, self.v, self.rates(rate), gradients)
        kept = (
            copy_into(self.largest_weight, ops.depend(largest, updated)),
            copy_into(self.weight_sum, ops.depend(total, updated)),
        )
        return (*updated, *kept)
