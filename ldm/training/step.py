"""The training step: loss, gradients, clipping, optimizer, moving average, in the graphs of `step_graphs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm import ops as device_ops
from ldm.errors import plain
from ldm.training.optimizer_arrays import OptimizerArrays
from ldm.training.optimizers import AdamW, CellOptions, Optimizer, OptimizerCell, companion
from ldm.training.sharding import Shards, balanced
from ldm.training.step_graphs import ChooseScalars, MicroBatch, MicroBatchGradients, Update, UpdateFromTotals, WholeStep
from ldm.training.weight_norms import NormLimit

LARGE_ON_CPU = 2**14  # elements of an array that is not copied into the flat one
LARGE_ON_ASCEND = 2**20


class StepScalars(NamedTuple):
    """What the host decides for one step: schedules and loss scale, with AdamW in seven numbers."""

    loss_scale: float
    unscale: float  # 1 / (loss_scale * number of micro-batches)
    max_norm: float  # gradients are scaled down to this norm
    optimizer: Sequence[float]  # Optimizer.numbers
    ema_rate: float  # 1 - decay of the moving average

    def row(self) -> list[float]:
        return [self.loss_scale, self.unscale, self.max_norm, *self.optimizer, self.ema_rate]


class StepResult(NamedTuple):
    """What the host learns from one step."""

    loss: float  # mean over the batch, unscaled
    gradient_norm: float  # global L2 norm before clipping, unscaled; nan or inf if a gradient is not finite
    finite: bool  # whether the gradients are finite


class UnreadResult(NamedTuple):
    """What a step returns: its result, which the device may still be computing."""

    losses: Sequence[Tensor]  # of the micro-batches if there are several
    numbers: Tensor  # (loss if there is one micro-batch, norm, finite)

    def read(self) -> StepResult:
        """Wait for the device and return the result."""
        *loss, norm, finite = self.numbers.asnumpy()
        loss = loss or [float(loss.asnumpy()) for loss in self.losses]
        return StepResult(float(np.mean(loss)), float(norm), bool(finite))


class TrainStep:
    """Trains parameters.

    With one micro-batch, everything is one graph. With more, one graph adds up the gradients of each, and a second,
    small graph updates. The graphs hold no state but the arrays of `state()`, and whether the gradients of the newest
    step were finite: schedules, loss scale and counts come with each call.

    Args:
        loss: Cell of (latents (N, C, h, w), noise (N, C, h, w), timesteps (N,) int32, text embeddings (N, 77, D)) that
            returns a fp32 scalar. A LossFromTokens takes tokens (N, 77) int32 in place of the text embeddings. A fifth
            input, weights (N, 1, h, w), is optional (see DiffusionLoss).
        parameters: The parameters to train, in fp32. All others of `loss` stay as they are.
        optimizer: The optimizer. Its numbers of each step come with the call.
        rate_factors: Factors of the learning rate by the names of parameters. The others have the factor 1.
        norm_limit: What the norms of LoRA's layers are limited to, if they are.
        clip: Whether to scale gradients down to the global norm StepScalars.max_norm.
        use_ema: Whether to keep a moving average of the parameters.
        skip_overflow: Whether to leave everything in `state()` as it is if a gradient is not finite.
        micro_batches: Number of batches that a step is the mean over.
        process_count: Number of data-parallel processes.
        shard_of: This process, if each process is to hold its share of the moments and averages alone (see
            ldm.training.sharding). None: each process holds all.
        dropout_key: Key of LoRA's dropout (see ldm.lora.dropout), which is set for each micro-batch.
        saturates: Whether the device saturates instead of overflowing: a first Ascend 910, or an A2 with
            MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE. A step in which a number saturated is then one whose
            gradients are not finite.
        large: Number of elements from which a parameter is an array of its own, None for the device's default. All
            smaller ones are parts of one flat array, which is copied into them at the end of a step.
        read_in_fp16: Those of `parameters` that the loss casts to fp16 wherever it uses them. The small ones of them
            become fp16, rounded copies of the values in `state()`. The results are the same.
        gradient_checkpointing: Whether the UNet's blocks are computed again for their gradients. The loss is then a
            DiffusionLoss of a UNetModel, or a LossFromTokens of one.
    """

    def __init__(
        self,
        loss: nn.Cell,
        parameters: Sequence[Parameter],
        *,
        optimizer: Optimizer | None = None,
        rate_factors: Mapping[str, float] | None = None,
        norm_limit: NormLimit | None = None,
        clip: bool = False,
        use_ema: bool = False,
        skip_overflow: bool = False,
        micro_batches: int = 1,
        process_count: int = 1,
        shard_of: int | None = None,
        dropout_key: Parameter | None = None,
        saturates: bool = False,
        large: int | None = None,
        read_in_fp16: Sequence[Parameter] = (),
        gradient_checkpointing: bool = False,
    ):
        if not parameters:
            raise ValueError("there is nothing to train")
        self.parameters = tuple(parameters)
        for parameter in self.parameters:
            if parameter.dtype != ms.float32:
                raise ValueError(f"{parameter.name} is {parameter.dtype}: what is trained must be fp32")
            parameter.requires_grad = True
        self.micro_batches, self.dropout_key, self.use_ema = micro_batches, dropout_key, use_ema
        large = large or (LARGE_ON_ASCEND if device_ops.on_ascend() else LARGE_ON_CPU)
        arrays = OptimizerArrays(self.parameters, large, read_in_fp16)
        shards = None
        if shard_of is not None:
            shards = Shards(balanced([p.size for p in arrays.arrays], process_count), shard_of)
        self.optimizer = optimizer or AdamW()
        cell = self.update_cell = _optimizer_cell(
            self.optimizer, arrays, shards, use_ema, skip_overflow, rate_factors or {}
        )
        update = Update(arrays, cell, clip, process_count, saturates, shards, norm_limit)
        self._arrays, self._shards = arrays, shards
        self._groups = {"p": arrays.arrays, **cell.state_groups()}
        if use_ema:
            self._groups["ema"] = cell.averages
        self._scalars = cell.state_scalars()
        gradients = MicroBatchGradients(loss, arrays, saturates, gradient_checkpointing)
        if micro_batches == 1:
            self.whole = WholeStep(gradients, update)
            self.whole.set_train()
        else:
            totals = ParameterTuple([companion("total", p, ops.zeros_like(p)) for p in arrays.arrays])
            flags = Parameter(Tensor(np.zeros(8, np.int32)), name="flags", requires_grad=False) if saturates else None
            choice = ChooseScalars(update.previous_finite)
            self.micro = MicroBatch(gradients, choice, totals, flags)
            self.finish = UpdateFromTotals(update, choice, totals, flags)
            self.micro.set_train()

    def __call__(
        self,
        batches: Sequence[tuple[Tensor, ...]],
        scalars: StepScalars,
        dropout_keys: Sequence[np.ndarray] = (),
        after_overflow: StepScalars | None = None,
    ) -> UnreadResult:
        """Launch one step. On Ascend this does not wait until the device has computed it.

        Args:
            batches: Micro-batches of (latents, noise, timesteps, text embeddings or tokens), or all with weights as a
                fifth tensor.
            scalars: Schedules and loss scale of this step.
            dropout_keys: A key (2,) int32 for each micro-batch, if there is a dropout_key.
            after_overflow: What takes the place of `scalars` if the gradients of the step before were not finite. None:
                the result of that step was read, and `scalars` fit it.
        """
        rows = Tensor(np.array([scalars.row(), (after_overflow or scalars).row()], np.float32))
        losses = []
        if self.micro_batches == 1:
            self._set_dropout_key(dropout_keys, 0)
            numbers = self.whole(rows, *batches[0])
        else:
            for i, batch in enumerate(batches):
                self._set_dropout_key(dropout_keys, i)
                losses.append(self.micro(rows, *batch))
            numbers = self.finish(rows)
        self._set_dropout_key([np.zeros(2, np.int32)], 0)  # no dropout if the network is used between steps
        return UnreadResult(losses, numbers)

    def _set_dropout_key(self, keys: Sequence[np.ndarray], i: int) -> None:
        if self.dropout_key is not None:
            self.dropout_key.set_data(Tensor(keys[i]))

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that the next step depends on.

        The names are those of the parameters after `p.` (parameters), the optimizer's groups such as `m.` and `v.`
        (moments), and `ema.` (averages). Numbers of the optimizer are arrays (1,) with names such as `optimizer.d`.
        With `shard_of`, all processes call this together. Process 0 returns the whole, the others nothing.
        """
        state = {}
        for group in self._groups:
            values = self._values(group)
            if values:
                arrays = self._arrays.split(values, partial(self.optimizer.group_shape, group))
                state.update({f"{group}.{p.name}": arrays[p.name] for p in self.parameters})
        if state:
            state.update({p.name: p.asnumpy().reshape(1).copy() for p in self._scalars.values()})
        return state

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Load what `state` returned, before the first step. Raises ValueError if names or shapes differ."""
        difference = differing_shapes(state_shapes(self.parameters, self.use_ema, self.optimizer), arrays)
        if difference:
            raise ValueError(difference)
        for group, parameters in self._groups.items():
            rows = self._arrays.join({p.name: arrays[f"{group}.{p.name}"] for p in self.parameters})
            if self._shards is not None and group != "p":
                rows = self._shards.own(rows)
            for parameter, row in zip(parameters, rows):
                parameter.set_data(Tensor(row))
        for number in self._scalars.values():
            number.set_data(Tensor(arrays[number.name].reshape(()), ms.float32))
        for parameter in self._arrays.small:
            value = Tensor(np.ascontiguousarray(arrays[f"p.{parameter.name}"], np.float32))
            parameter.set_data(value.astype(parameter.dtype))  # as the step casts it

    def _values(self, group: str) -> list[np.ndarray]:
        """Return what a group of `state` holds for each array, or nothing in processes where `state` is empty."""
        parameters = self._groups[group]
        if self._shards is None or (group == "p" and self._shards.process == 0):
            return [parameter.asnumpy() for parameter in parameters]
        if group == "p":
            return []
        return self._shards.gather(parameters, [tuple(array.shape) for array in self._arrays.arrays])


def _optimizer_cell(
    optimizer: Optimizer,
    arrays: OptimizerArrays,
    shards: Shards | None,
    use_ema: bool,
    skip_overflow: bool,
    rate_factors: Mapping[str, float],
) -> OptimizerCell:
    """Build the optimizer's cell for the arrays, or for those that belong to this process."""
    factors = None
    if any(factor != 1.0 for factor in rate_factors.values()):
        # A large array has one factor, the flat one a factor for each element.
        values = {p.name: np.full(p.shape, rate_factors.get(p.name, 1.0), np.float32) for p in arrays.small}
        values.update({p.name: np.array(rate_factors.get(p.name, 1.0), np.float32) for p in arrays.large})
        flat = [np.concatenate([values[p.name].ravel() for p in arrays.small])] if arrays.small else []
        factors = [*flat, *(values[p.name] for p in arrays.large)]
    own: Sequence[Parameter] = arrays.arrays
    parts: Sequence[tuple[tuple[int, ...], ...]] = arrays.parts
    if shards is not None:
        own, parts = shards.own(own), shards.own(parts)
        factors = None if factors is None else shards.own(factors)
    return optimizer.cell(own, parts, CellOptions(use_ema, skip_overflow, factors))


def state_shapes(
    parameters: Sequence[Parameter], use_ema: bool, optimizer: Optimizer | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of TrainStep.state(), before there is a TrainStep."""
    optimizer = optimizer or AdamW()
    groups = ("p", *optimizer.groups, *(("ema",) if use_ema else ()))
    shapes = {f"{group}.{p.name}": optimizer.group_shape(group, tuple(p.shape)) for group in groups for p in parameters}
    return {**shapes, **{f"optimizer.{name}": (1,) for name in optimizer.scalars}}


def differing_shapes(expected: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray]) -> str:
    """Return which arrays do not have the expected names and shapes, "" if all do."""
    shapes = {name: array.shape for name, array in arrays.items()}
    differ = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    return f"{len(differ)} arrays differ in name or shape, the first is {plain(differ[0], 80)}" if differ else ""
