"""The training step as one graph: loss, gradients, clipping, AdamW, moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.errors import plain
from ldm.ops import RepeatedCell
from ldm.training.optimizers import AdamW, AdamWScalars, companion

_each = ops.HyperMap()
_half_square = ops.L2Loss()
_half_square_sum = ops.MultitypeFuncGraph("half_square_sum")
_add_into = ops.MultitypeFuncGraph("add_into")
_clear = ops.MultitypeFuncGraph("clear")


@_half_square_sum.register("Tensor")
def _(gradient: Tensor) -> Tensor:
    return _half_square(gradient)


@_add_into.register("Tensor", "Tensor")
def _(total: Tensor, gradient: Tensor) -> Tensor:
    return ops.assign_add(total, gradient)


@_clear.register("Tensor")
def _(total: Tensor) -> Tensor:
    return ops.assign(total, ops.zeros_like(total))


class StepScalars(NamedTuple):
    """What the host decides for one step: schedules and loss scale, in seven numbers."""

    loss_scale: float
    unscale: float  # 1 / (loss_scale * number of micro-batches)
    max_norm: float  # gradients are scaled down to this norm
    adamw: AdamWScalars
    ema_rate: float  # 1 - decay of the moving average

    def tensor(self) -> Tensor:
        return Tensor(np.array([self.loss_scale, self.unscale, self.max_norm, *self.adamw, self.ema_rate], np.float32))


class StepResult(NamedTuple):
    """What the host learns from one step."""

    loss: float  # mean over the batch, unscaled
    gradient_norm: float  # global L2 norm before clipping, unscaled; nan or inf if a gradient is not finite
    finite: bool  # whether the gradients are finite


class LossFromTokens(nn.Cell):
    """A diffusion loss that encodes the captions' tokens (N, 77) itself, so that the text encoder can be trained."""

    def __init__(self, loss: nn.Cell, text_encoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.text_encoder = text_encoder

    def construct(self, latents: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.loss(latents, noise, timesteps, self.text_encoder(tokens))


class _Gradients(nn.Cell):
    """Returns the scaled loss of a micro-batch and its gradients with respect to the parameters."""

    def __init__(self, loss: nn.Cell, parameters: tuple[Parameter, ...]):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.value_and_grad = ops.value_and_grad(self.scaled_loss, None, weights=ParameterTuple(parameters))

    def scaled_loss(self, loss_scale: Tensor, *batch: Tensor) -> Tensor:
        return self.loss(*batch) * loss_scale

    def construct(self, loss_scale: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.value_and_grad(loss_scale, *batch)


class _Update(nn.Cell):
    """Norm, overflow check, clipping, AdamW and moving average, from gradients that are still scaled.

    The norm is also the overflow check: a sum of squares is finite only if all gradients are. It takes one pass over
    the gradients, a check of each of them several.
    """

    def __init__(self, optimizer: AdamW, clip: bool, skip_overflow: bool, process_count: int):
        super().__init__(auto_prefix=False)
        self.optimizer, self.clip, self.skip_overflow = optimizer, clip, skip_overflow
        self.reduce = nn.DistributedGradReducer(optimizer.parameters) if process_count > 1 else None
        self.add_n = ops.AddN()
        self.sqrt = ops.Sqrt()
        self.minimum = ops.Minimum()
        self.is_finite = ops.IsFinite()
        self.cast = ops.Cast()

    def construct(self, gradients: tuple[Tensor, ...], scalars: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the norm, and 1.0 if it is finite or else 0.0. `scalars`: those of StepScalars, one tensor each."""
        if self.reduce is not None:
            gradients = self.reduce(gradients)
        _, unscale, max_norm, rate, epsilon, decay, ema_rate = scalars
        norm = self.sqrt(self.add_n(_each(_half_square_sum, gradients)) * 2.0) * unscale
        factor = unscale
        if self.clip:
            factor = unscale * self.minimum(max_norm / (norm + 1e-6), 1.0)
        finite = self.is_finite(norm)
        if self.skip_overflow:
            if finite:
                norm = ops.depend(norm, self.optimizer(gradients, factor, rate, epsilon, decay, ema_rate))
        else:
            norm = ops.depend(norm, self.optimizer(gradients, factor, rate, epsilon, decay, ema_rate))
        return norm, self.cast(finite, ms.float32)


class _WholeStep(RepeatedCell):
    """Gradients and update in one graph."""

    def __init__(self, gradients: _Gradients, update: _Update):
        super().__init__(auto_prefix=False)
        self.gradients, self.update = gradients, update
        self.stack, self.unstack = ops.Stack(), ops.Unstack()

    def construct(self, scalars: Tensor, *batch: Tensor) -> Tensor:
        scalars = self.unstack(scalars)
        loss, gradients = self.gradients(scalars[0], *batch)
        norm, finite = self.update(gradients, scalars)
        return self.stack((loss / scalars[0], norm, finite))


class _MicroBatch(RepeatedCell):
    """Adds the gradients of a micro-batch to the totals."""

    def __init__(self, gradients: _Gradients, totals: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients, self.totals = gradients, totals

    def construct(self, scalars: Tensor, *batch: Tensor) -> Tensor:
        loss, gradients = self.gradients(scalars[0], *batch)
        return ops.depend(loss / scalars[0], _each(_add_into, self.totals, gradients))


class _UpdateFromTotals(nn.Cell):
    """Updates from the totals and clears them."""

    def __init__(self, update: _Update, totals: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.update, self.totals = update, totals
        self.stack, self.unstack = ops.Stack(), ops.Unstack()

    def construct(self, scalars: Tensor) -> Tensor:
        result = self.stack(self.update(self.totals, self.unstack(scalars)))
        return ops.depend(result, _each(_clear, ops.depend(self.totals, result)))


class TrainStep:
    """Trains parameters by AdamW.

    With one micro-batch, everything is one graph. With more, one graph adds up the gradients of each, and a second,
    small graph updates. The graphs hold no state but the arrays of `state()`: schedules, loss scale and counts come
    with each call.

    Args:
        loss: Cell of (latents (N, C, h, w), noise (N, C, h, w), timesteps (N,) int32, text embeddings (N, 77, D)) that
            returns a fp32 scalar. A LossFromTokens takes tokens (N, 77) int32 in place of the text embeddings.
        parameters: The parameters to train, in fp32. All others of `loss` stay as they are.
        betas: Decay rates of AdamW.
        clip: Whether to scale gradients down to the global norm StepScalars.max_norm.
        use_ema: Whether to keep a moving average of the parameters.
        skip_overflow: Whether to leave parameters, moments and average as they are if a gradient is not finite.
        micro_batches: Number of batches that a step is the mean over.
        process_count: Number of data-parallel processes.
        dropout_key: Key of LoRA's dropout (see ldm.lora.dropout), which is set for each micro-batch.
    """

    def __init__(
        self,
        loss: nn.Cell,
        parameters: Sequence[Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: bool = False,
        use_ema: bool = False,
        skip_overflow: bool = False,
        micro_batches: int = 1,
        process_count: int = 1,
        dropout_key: Parameter | None = None,
    ):
        if not parameters:
            raise ValueError("there is nothing to train")
        self.parameters = tuple(parameters)
        for parameter in self.parameters:
            if parameter.dtype != ms.float32:
                raise ValueError(f"{parameter.name} is {parameter.dtype}: what is trained must be fp32")
            parameter.requires_grad = True
        self.micro_batches, self.dropout_key, self.use_ema = micro_batches, dropout_key, use_ema
        optimizer = AdamW(self.parameters, betas, use_ema)
        update = _Update(optimizer, clip, skip_overflow, process_count)
        groups = {"p": self.parameters, "m": optimizer.m, "v": optimizer.v}
        if use_ema:
            groups["ema"] = optimizer.averages
        self._state: dict[str, Parameter] = {
            f"{group}.{p.name}": array for group, arrays in groups.items() for p, array in zip(self.parameters, arrays)
        }
        gradients = _Gradients(loss, self.parameters)
        if micro_batches == 1:
            self.whole = _WholeStep(gradients, update)
            self.whole.set_train()
        else:
            totals = ParameterTuple([companion("total", p, ops.zeros_like(p)) for p in self.parameters])
            self.micro = _MicroBatch(gradients, totals)
            self.finish = _UpdateFromTotals(update, totals)
            self.micro.set_train()

    def __call__(
        self, batches: Sequence[tuple[Tensor, ...]], scalars: StepScalars, dropout_keys: Sequence[np.ndarray] = ()
    ) -> StepResult:
        """Train one step.

        Args:
            batches: Micro-batches of (latents, noise, timesteps, text embeddings or tokens).
            scalars: Schedules and loss scale of this step.
            dropout_keys: A key (2,) int32 for each micro-batch, if there is a dropout_key.
        """
        numbers = scalars.tensor()
        if self.micro_batches == 1:
            self._set_dropout_key(dropout_keys, 0)
            loss, norm, finite = self.whole(numbers, *batches[0]).asnumpy()
        else:
            losses = []
            for i, batch in enumerate(batches):
                self._set_dropout_key(dropout_keys, i)
                losses.append(self.micro(numbers, *batch))
            norm, finite = self.finish(numbers).asnumpy()
            # Read at the end, because reading a loss waits for the device.
            loss = np.mean([float(loss.asnumpy()) for loss in losses])
        self._set_dropout_key([np.zeros(2, np.int32)], 0)  # no dropout if the network is used between steps
        return StepResult(float(loss), float(norm), bool(finite))

    def _set_dropout_key(self, keys: Sequence[np.ndarray], i: int) -> None:
        if self.dropout_key is not None:
            self.dropout_key.set_data(Tensor(keys[i]))

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that the next step depends on.

        The names are those of the parameters after `p.` (parameters), `m.` and `v.` (moments), and `ema.` (averages).
        """
        return {name: parameter.asnumpy().copy() for name, parameter in self._state.items()}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Load what `state` returned, before the first step. Raises ValueError if names or shapes differ."""
        difference = differing_shapes({name: tuple(p.shape) for name, p in self._state.items()}, arrays)
        if difference:
            raise ValueError(difference)
        for name, parameter in self._state.items():
            parameter.set_data(Tensor(np.ascontiguousarray(arrays[name], np.float32)))

    def averages(self) -> dict[str, np.ndarray]:
        """Return what to sample with, by parameter name: the moving averages, or the parameters without them."""
        group = "ema" if self.use_ema else "p"
        return {p.name: self._state[f"{group}.{p.name}"].asnumpy().copy() for p in self.parameters}


def state_shapes(parameters: Sequence[Parameter], use_ema: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of TrainStep.state(), before there is a TrainStep."""
    groups = ("p", "m", "v", "ema") if use_ema else ("p", "m", "v")
    return {f"{group}.{p.name}": tuple(p.shape) for group in groups for p in parameters}


def differing_shapes(expected: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray]) -> str:
    """Return which arrays do not have the expected names and shapes, "" if all do."""
    shapes = {name: array.shape for name, array in arrays.items()}
    differ = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    return f"{len(differ)} arrays differ in name or shape, the first is {plain(differ[0], 80)}" if differ else ""
