"""What an optimizer is to the training step: its numbers on the host, its arrays, and the cell that updates them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import InplaceCopy

from ldm import ops as device_ops

each = ops.HyperMap()
copy_into = InplaceCopy()
_lerp, _select, _descend = ops.Lerp(), ops.Select(), ops.ApplyGradientDescent()
_scaled = ops.MultitypeFuncGraph("scaled")
_averaged = ops.MultitypeFuncGraph("averaged")
_times = ops.MultitypeFuncGraph("times")


class CellOptions(NamedTuple):
    """What all optimizers' cells can do beside their own rule.

    `factors` are factors of the learning rate where it is not the same for all parameters: an array for each of the
    optimizer's arrays, of its shape, or of shape () where one number holds for the whole array.
    """

    use_ema: bool = False
    skip_overflow: bool = False
    factors: Sequence[np.ndarray] | None = None


class Optimizer(ABC):
    """The hyperparameters of an optimizer, and what the host does with them.

    Attributes:
        groups: Names of the arrays that belong to each parameter: `m` for `m.<parameter's name>` in a training state.
            `p` (the parameters themselves) and `ema` are not among them.
        scalars: Names of the numbers that belong to all parameters: `d` for `optimizer.d` in a training state.
        keeps_average: Whether `sampled` returns other values than those that are trained, without use_ema.
    """

    groups: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    keeps_average = False

    @abstractmethod
    def numbers(self, t: int, lr: float) -> tuple[float, ...]:
        """Return the numbers that the cell needs for an update, always as many.

        Args:
            t: The number of this update among those that are applied, from 1.
            lr: Learning rate.
        """

    @abstractmethod
    def cell(
        self, arrays: Sequence[Parameter], parts: Sequence[Sequence[tuple[int, ...]]], options: CellOptions
    ) -> OptimizerCell:
        """Build the cell that updates the arrays.

        Args:
            arrays: What is trained, in fp32. The first may be the flat array (see OptimizerArrays).
            parts: Shapes of the parameters that each array consists of.
            options: What it does beside that.
        """

    def group_shape(self, group: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a group's array for a parameter of a shape."""
        return shape

    def sampled(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what to sample with of TrainStep.state(), by parameter name."""
        return averages(state)


def averages(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what to sample with of TrainStep.state(), by parameter name: averages, or parameters without them."""
    return group_of(state, "ema") or group_of(state, "p")


def group_of(state: dict[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
    """Return the arrays of a group of TrainStep.state(), by parameter name."""
    prefix = f"{group}."
    return {name[len(prefix) :]: array for name, array in state.items() if name.startswith(prefix)}


def companion(prefix: str, parameter: Parameter, value: Tensor) -> Parameter:
    """Return an array of the training state that belongs to a parameter."""
    return Parameter(value, name=f"{prefix}.{parameter.name}", requires_grad=False)


def scale(gradient: Tensor, factor: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return a gradient times factor[0]."""
    return gradient * factor[0]


def scale_finite(gradient: Tensor, factor: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return a gradient times factor[0], or factor[2], which is 0, where not factor[1]."""
    return _select(factor[1], gradient * factor[0], factor[2])


def move_average(average: Tensor, parameter: Tensor, ema_rate: Tensor) -> Tensor:
    """Return average + ema_rate (parameter - average), in place."""
    return _descend(average, ema_rate, average - parameter)


def move_average_on_ascend(average: Tensor, parameter: Tensor, ema_rate: Tensor) -> Tensor:
    """Do the same by two aclnn kernels. ApplyGradientDescent is an aclop kernel there."""
    return copy_into(average, _lerp(average, parameter, ema_rate))


def blend(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Return start + share (end - start), which is `start` to the last bit where `share` is 0."""
    return start + (end - start) * share


def blend_on_ascend(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Do the same by one kernel instead of three."""
    return _lerp(start, end, share)


@_scaled.register("Function", "Tuple", "Tensor")
def _(scale: Callable, factor: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> Tensor:
    return scale(gradient, factor)


@_averaged.register("Function", "Tensor", "Tensor", "Tensor", "Tensor")
def _(move: Callable, ema_rate: Tensor, average: Tensor, parameter: Tensor, updated: Tensor) -> Tensor:
    return ops.depend(move(average, ops.depend(parameter, updated), ema_rate), updated)


@_times.register("Tensor", "Tensor")
def _(rate: Tensor, factor: Tensor) -> Tensor:
    return factor * rate


class OptimizerCell(nn.Cell):
    """Updates arrays from gradients that are still scaled, and their moving averages.

    average += (1 - decay) (parameter - average). The averages start at the parameters.

    With `skip_overflow`, an update whose gradients are not finite leaves everything as it is. There is no branch in the
    graph for that: on Ascend the host would wait at a branch for the device, and then launch the rest. Instead the
    gradients are replaced by 0, and all that moves an array is multiplied by 0.
    """

    def __init__(self, arrays: Sequence[Parameter], options: CellOptions):
        super().__init__(auto_prefix=False)
        self.use_ema, self.skip_overflow = options.use_ema, options.skip_overflow
        self.parameters = ParameterTuple(arrays)
        self.count = len(arrays)
        self.averages = self.companions("ema", arrays) if options.use_ema else None
        self.factors = None
        if options.factors is not None:
            self.factors = ParameterTuple(
                [companion("rate", p, Tensor(f.astype(np.float32))) for p, f in zip(arrays, options.factors)]
            )
        on_ascend = device_ops.on_ascend()
        self.scaled = scale_finite if options.skip_overflow else scale
        self.move = move_average_on_ascend if on_ascend else move_average
        self.blend = blend_on_ascend if on_ascend else blend
        self.zero, self.one = Tensor(0.0, ms.float32), Tensor(1.0, ms.float32)
        self.maximum, self.cast, self.select = ops.Maximum(), ops.Cast(), ops.Select()

    @staticmethod
    def companions(group: str, arrays: Sequence[Parameter]) -> ParameterTuple:
        """Return copies of the arrays as a group."""
        return ParameterTuple([companion(group, p, p.value().copy()) for p in arrays])

    @staticmethod
    def zeros(group: str, arrays: Sequence[Parameter]) -> ParameterTuple:
        """Return zeros of the arrays' shapes as a group."""
        return ParameterTuple([companion(group, p, ops.zeros_like(p)) for p in arrays])

    def state_groups(self) -> dict[str, ParameterTuple]:
        """Return the arrays of Optimizer.groups, one for each of the optimizer's arrays."""
        return {}

    def state_scalars(self) -> dict[str, Parameter]:
        """Return the numbers of Optimizer.scalars."""
        return {}

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        finite: Tensor,
        factor: Tensor,
        numbers: tuple[Tensor, ...],
        ema_rate: Tensor,
    ) -> tuple[Tensor, ...]:
        """Apply one update with fp32 gradients, which are multiplied with `factor` first.

        Args:
            gradients: One for each array, of its shape.
            finite: Whether all gradients are finite, a bool scalar.
            factor: Of the gradients.
            numbers: Those of Optimizer.numbers.
            ema_rate: 1 - decay of the moving average.

        Returns:
            What depends on everything being up to date.
        """
        raise NotImplementedError

    def applied(self, finite: Tensor) -> Tensor:
        """Return 1.0, or 0.0 if the update is skipped."""
        return self.cast(finite, ms.float32) if self.skip_overflow else self.one

    def unscaled(self, gradients: tuple[Tensor, ...], finite: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients times `factor`, or zeros if the update is skipped."""
        return each(ops.partial(_scaled, self.scaled, (factor, finite, self.zero)), gradients)

    def rates(self, rate: Tensor) -> tuple[Tensor, ...]:
        """Return the learning rate of each array: a number, or an array of its shape."""
        if self.factors is None:
            return (rate,) * self.count
        return each(ops.partial(_times, rate), self.factors)

    def average(self, updated: tuple[Tensor, ...], ema_rate: Tensor) -> tuple[Tensor, ...]:
        """Move the averages if there are any. Returns what depends on them and on `updated`, which has no order."""
        if not self.use_ema:
            return updated
        return each(ops.partial(_averaged, self.move, ema_rate), self.averages, self.parameters, updated)


def scalar(name: str, value: float) -> Parameter:
    """Return a number of the training state that belongs to all parameters."""
    return Parameter(Tensor(value, ms.float32), name=f"optimizer.{name}", requires_grad=False)
