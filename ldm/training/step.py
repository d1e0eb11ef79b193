"""One training step as one graph: loss, gradients, clipping, update, moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.errors import plain
from ldm.models.layers import RepeatedCell
from ldm.training.optimizers import AdamW, AdamWScalars

_each = ops.HyperMap()
_half_square = ops.L2Loss()
_half_square_sum = ops.MultitypeFuncGraph("half_square_sum")
_add_into = ops.MultitypeFuncGraph("add_into")
_clear = ops.MultitypeFuncGraph("clear")


@_half_square_sum.register("Tensor")
def _(gradient):
    return _half_square(gradient)


@_add_into.register("Tensor", "Tensor")
def _(total, gradient):
    return ops.assign_add(total, gradient)


@_clear.register("Tensor")
def _(total):
    return ops.assign(total, ops.zeros_like(total))


class StepScalars(NamedTuple):
    """What the host decides for one update: all of the run's schedule, in seven numbers."""

    loss_scale: float
    unscale: float  # 1 / (loss_scale * accumulated micro-steps)
    max_norm: float  # gradients are scaled down to this norm
    adamw: AdamWScalars
    ema_rate: float  # 1 - EMA's decay

    def tensor(self) -> Tensor:
        return Tensor(np.array([self.loss_scale, self.unscale, self.max_norm, *self.adamw, self.ema_rate], np.float32))


class StepResult(NamedTuple):
    loss: float  # mean over the batch, unscaled
    gradient_norm: float  # global L2 norm before clipping, unscaled; nan or inf where a gradient is not finite
    finite: bool  # whether the gradients are finite


class TextConditionedLoss(nn.Cell):
    """A diffusion loss that encodes the captions' tokens (N, 77) itself, for training the text encoder too."""

    def __init__(self, loss: nn.Cell, text_encoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.text_encoder = text_encoder

    def construct(self, latents, noise, timesteps, tokens):
        return self.loss(latents, noise, timesteps, self.text_encoder(tokens))


class _Gradients(nn.Cell):
    """(scaled loss, gradients of the parameters alone)."""

    def __init__(self, loss: nn.Cell, parameters: tuple[Parameter, ...]):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.value_and_grad = ops.value_and_grad(self.scaled_loss, None, weights=ParameterTuple(parameters))

    def scaled_loss(self, latents, noise, timesteps, condition, loss_scale):
        return self.loss(latents, noise, timesteps, condition) * loss_scale

    def construct(self, latents, noise, timesteps, condition, loss_scale):
        return self.value_and_grad(latents, noise, timesteps, condition, loss_scale)


class _Update(nn.Cell):
    """Norm, overflow check, clipping, AdamW and EMA over gradients that are still scaled.

    The norm is the overflow check as well: a sum of squares is finite only if all gradients are (or were absurd), and
    costs one pass where looking at each gradient costs several.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        betas: tuple[float, float],
        clip: bool,
        use_ema: bool,
        skip_overflow: bool,
        rank_size: int,
    ):
        super().__init__(auto_prefix=False)
        self.clip, self.skip_overflow = clip, skip_overflow
        self.optimizer = AdamW(parameters, betas, use_ema)
        self.reduce = nn.DistributedGradReducer(ParameterTuple(parameters)) if rank_size > 1 else None
        self.add_n = ops.AddN()
        self.sqrt = ops.Sqrt()
        self.minimum = ops.Minimum()
        self.is_finite = ops.IsFinite()
        self.cast = ops.Cast()

    def construct(self, gradients, scalars):
        """scalars: those of StepScalars, a tensor each."""
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
                norm = ops.depend(norm, self.apply(gradients, factor, rate, epsilon, decay, ema_rate))
        else:
            norm = ops.depend(norm, self.apply(gradients, factor, rate, epsilon, decay, ema_rate))
        return norm, self.cast(finite, ms.float32)

    def apply(self, gradients, factor, rate, epsilon, decay, ema_rate):
        return ops.depend(factor, self.optimizer(gradients, factor, rate, epsilon, decay, ema_rate))


class _WholeStep(RepeatedCell):
    """Gradients and update in one graph."""

    def __init__(self, gradients: _Gradients, update: _Update):
        super().__init__(auto_prefix=False)
        self.gradients, self.update = gradients, update
        self.stack, self.unstack = ops.Stack(), ops.Unstack()

    def construct(self, latents, noise, timesteps, condition, scalars):
        scalars = self.unstack(scalars)
        loss, gradients = self.gradients(latents, noise, timesteps, condition, scalars[0])
        norm, finite = self.update(gradients, scalars)
        return self.stack((loss / scalars[0], norm, finite))


class _MicroStep(RepeatedCell):
    """Gradients added to the totals."""

    def __init__(self, gradients: _Gradients, totals: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients, self.totals = gradients, totals

    def construct(self, latents, noise, timesteps, condition, scalars):
        loss, gradients = self.gradients(latents, noise, timesteps, condition, scalars[0])
        return ops.depend(loss / scalars[0], _each(_add_into, self.totals, gradients))


class _TotalsStep(nn.Cell):
    """The update from the totals, which are cleared."""

    def __init__(self, update: _Update, totals: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.update, self.totals = update, totals
        self.stack, self.unstack = ops.Stack(), ops.Unstack()

    def construct(self, scalars):
        result = self.stack(self.update(self.totals, self.unstack(scalars)))
        return ops.depend(result, _each(_clear, ops.depend(self.totals, result)))


class TrainStep:
    """Trains `parameters` of `loss` by AdamW.

    loss: a cell of (latents (N, C, h, w), noise like it, timesteps (N,) int32, condition) -> fp32 scalar, where the
    condition is the text states (N, 77, D), or tokens (N, 77) int32 for a TextConditionedLoss.
    parameters: fp32; all others of `loss` are left as they are.
    micro_steps: how many batches one update is the mean over. One: everything is one graph. More: the gradients are
    added up in one graph, and a second, small one updates.
    clip: scale gradients down to a global norm (StepScalars.max_norm). use_ema: keep a moving average.
    skip_overflow: leave parameters, moments and average untouched where a gradient is not finite.

    Schedules, loss scale and step counts are the caller's (StepScalars): the graph holds no state but the arrays of
    `state()`.

    dropout_key: of LoRA's dropout (ldm.lora.layers.StepDropout) where there is any; each call is then given a new one
    for each micro-step.
    """

    def __init__(
        self,
        loss: nn.Cell,
        parameters: list[Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: bool = False,
        use_ema: bool = False,
        skip_overflow: bool = False,
        micro_steps: int = 1,
        rank_size: int = 1,
        dropout_key: Parameter | None = None,
    ):
        if not parameters:
            raise ValueError("there is nothing to train")
        parameters = tuple(parameters)
        for parameter in parameters:
            if parameter.dtype != ms.float32:
                raise ValueError(f"{parameter.name} is {parameter.dtype}: what is trained must be fp32")
            parameter.requires_grad = True
        self.parameters = parameters
        self.micro_steps = micro_steps
        self.dropout_key = dropout_key
        self.update = _Update(parameters, betas, clip, use_ema, skip_overflow, rank_size)
        optimizer = self.update.optimizer
        self._state: dict[str, Parameter] = {f"p.{p.name}": p for p in parameters}
        self._state.update({f"m.{p.name}": m for p, m in zip(parameters, optimizer.m)})
        self._state.update({f"v.{p.name}": v for p, v in zip(parameters, optimizer.v)})
        if use_ema:
            self._state.update({f"ema.{p.name}": average for p, average in zip(parameters, optimizer.averages)})
        gradients = _Gradients(loss, parameters)
        if micro_steps == 1:
            self.whole = _WholeStep(gradients, self.update)
            self.whole.set_train()
        else:
            self.totals = ParameterTuple(
                [
                    Parameter(ops.zeros(p.shape, ms.float32), name=f"total.{p.name}", requires_grad=False)
                    for p in parameters
                ]
            )
            self.micro = _MicroStep(gradients, self.totals)
            self.finish = _TotalsStep(self.update, self.totals)
            self.micro.set_train()

    def __call__(
        self,
        batches: list[tuple[Tensor, Tensor, Tensor, Tensor]],
        scalars: StepScalars,
        dropout_keys: Sequence[np.ndarray] = (),
    ) -> StepResult:
        """One update from `micro_steps` batches of (latents, noise, timesteps, condition).

        dropout_keys: (2,) int32, one a batch, where there is a dropout_key.
        """
        numbers = scalars.tensor()
        if self.micro_steps == 1:
            self._drop_by(dropout_keys, 0)
            loss, norm, finite = self.whole(*batches[0], numbers).asnumpy()
        else:
            losses = []
            for i, batch in enumerate(batches):
                self._drop_by(dropout_keys, i)
                losses.append(self.micro(*batch, numbers))
            norm, finite = self.finish(numbers).asnumpy()
            # read at the end: reading one waits for the device
            loss = np.mean([float(loss.asnumpy()) for loss in losses])
        self._drop_by([np.zeros(2, np.int32)], 0)  # none where the network is used between steps
        return StepResult(float(loss), float(norm), bool(finite))

    def _drop_by(self, keys: Sequence[np.ndarray], i: int) -> None:
        if self.dropout_key is not None:
            self.dropout_key.set_data(Tensor(keys[i]))

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on: `p.`, `m.`, `v.` and, with EMA, `ema.` before each name."""
        return {name: parameter.asnumpy().copy() for name, parameter in self._state.items()}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave, before the first step. Raises ValueError where names or shapes differ."""
        differing = differing_shapes({name: tuple(p.shape) for name, p in self._state.items()}, arrays)
        if differing:
            raise ValueError(differing)
        for name, parameter in self._state.items():
            parameter.set_data(Tensor(np.ascontiguousarray(arrays[name], np.float32)))

    def averages(self) -> dict[str, np.ndarray]:
        """What to sample with, by parameter name: the moving averages, or the parameters where there are none."""
        optimizer = self.update.optimizer
        chosen = optimizer.averages if optimizer.use_ema else self.parameters
        return {p.name: average.asnumpy().copy() for p, average in zip(self.parameters, chosen)}


def state_shapes(parameters: Sequence[Parameter], use_ema: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of TrainStep.state(), known before there is a TrainStep."""
    parts = ("p", "m", "v", "ema") if use_ema else ("p", "m", "v")
    return {f"{part}.{p.name}": tuple(p.shape) for part in parts for p in parameters}


def differing_shapes(wanted: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray]) -> str:
    """Which arrays are not the wanted ones by name and shape, "" for none."""
    given = {name: array.shape for name, array in arrays.items()}
    differ = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    return f"{len(differ)} arrays differ in name or shape, the first is {plain(differ[0], 80)}" if differ else ""
