"""The training step as one graph: loss, gradients, clipping, optimizer, moving average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm import ops as device_ops
from ldm.errors import plain
from ldm.ops import RepeatedCell
from ldm.training.checkpointing import CheckpointedGradients
from ldm.training.optimizer_arrays import CopyIntoParameters, JoinGradients, OptimizerArrays
from ldm.training.optimizers import AdamW, CellOptions, Optimizer, OptimizerCell, companion
from ldm.training.sharding import MeanInOrder, SendUpdated, Shards, balanced
from ldm.training.step_operators import (
    SaturationFlags,
    adder,
    clear,
    copy_into,
    each,
    global_norm,
    pick,
    stack,
    unstack,
)
from ldm.training.weight_norms import LimitNorms, NormLimit

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


class LossFromTokens(nn.Cell):
    """A diffusion loss that encodes the captions' tokens (N, 77) itself, so that the text encoder can be trained.

    What follows the tokens goes to the loss as it is.
    """

    def __init__(self, loss: nn.Cell, text_encoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.text_encoder = text_encoder

    def construct(self, latents: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
        return self.loss(latents, noise, timesteps, self.text_encoder(tokens), *weights)


class _Gradients(nn.Cell):
    """Returns the scaled loss of a micro-batch, its gradients for `arrays` in fp32, and the SaturationFlags (8,).

    The flags are zeros if `saturates` is not set, and then cost nothing.
    """

    def __init__(self, loss: nn.Cell, arrays: OptimizerArrays, saturates: bool, checkpointing: bool):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.flags = SaturationFlags() if saturates else None
        self.no_flags = Tensor(np.zeros(8, np.int32))
        if checkpointing:
            of_unet, text_encoder = (loss.loss, loss.text_encoder) if isinstance(loss, LossFromTokens) else (loss, None)
            self.value_and_grad = CheckpointedGradients(of_unet, text_encoder, arrays.parameters)
        else:
            self.value_and_grad = ops.value_and_grad(self.scaled_loss, None, weights=ParameterTuple(arrays.parameters))
        self.join = JoinGradients(arrays)

    def scaled_loss(self, loss_scale: Tensor, *batch: Tensor) -> Tensor:
        return self.loss(*batch) * loss_scale

    def construct(self, loss_scale: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        if self.flags is not None:
            batch = self.flags.clear(batch)
        loss, gradients = self.value_and_grad(loss_scale, *batch)
        flags = self.no_flags if self.flags is None else self.flags(gradients)
        return loss, self.join(gradients), flags


class _Scalars(nn.Cell):
    """Chooses the scalars of a step by `previous_finite`, the outcome of the step before, which _Update keeps.

    The host can then launch a step before it knows that outcome.
    """

    def __init__(self, previous_finite: Parameter):
        super().__init__(auto_prefix=False)
        self.previous_finite = previous_finite
        self.unstack, self.select = unstack(), ops.Select()

    def construct(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows (2, n) for a step after a finite one and after an overflow -> n scalars."""
        after_finite, after_overflow = self.unstack(rows)
        return self.unstack(self.select(self.previous_finite, after_finite, after_overflow))


class _Update(nn.Cell):
    """Norm, overflow check, clipping, optimizer and moving average, from gradients that are still scaled.

    The norm is also the overflow check: a sum of squares is finite only if all gradients are. It takes one pass over
    the gradients, a check of each of them several.

    With `shards`, the optimizer holds this process's arrays alone.
    """

    def __init__(
        self,
        arrays: OptimizerArrays,
        optimizer: OptimizerCell,
        clip: bool,
        process_count: int,
        saturates: bool,
        shards: Shards | None,
        norm_limit: NormLimit | None = None,
    ):
        super().__init__(auto_prefix=False)
        self.optimizer, self.clip = optimizer, clip
        self.limit_norms = None if norm_limit is None else LimitNorms(arrays, norm_limit)
        self.copy = None if arrays.flat is None else CopyIntoParameters(arrays)
        self.reduce, self.send = None, None
        self.own: tuple[int, ...] = ()
        if shards is not None:
            self.reduce, self.send = MeanInOrder(process_count), SendUpdated(arrays.arrays, shards)
            self.own = tuple(shards.own(range(len(arrays.arrays))))
        elif process_count > 1:
            self.reduce = nn.DistributedGradReducer(optimizer.parameters)
        self.norm = global_norm(has_flat=arrays.flat is not None)
        self.minimum = ops.Minimum()
        self.is_finite = ops.IsFinite()
        self.cast = ops.Cast()
        self.saturates, self.no_flags = saturates, Tensor(np.zeros(8, np.int32))
        self.reduce_flags = ops.AllReduce() if saturates and process_count > 1 else None
        self.equal, self.all, self.both = ops.Equal(), ops.ReduceAll(), ops.LogicalAnd()
        self.previous_finite = Parameter(Tensor(True), name="previous_finite", requires_grad=False)

    def construct(
        self, gradients: tuple[Tensor, ...], flags: Tensor, scalars: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return the norm, and 1.0 if all gradients are finite and nothing saturated, or else 0.0.

        Args:
            gradients: One for each of the optimizer's arrays.
            flags: (8,) int32, see SaturationFlags.
            scalars: Those of StepScalars, one tensor each.
        """
        if self.reduce is not None:
            gradients = self.reduce(gradients)
        unscale, max_norm, numbers, ema_rate = scalars[1], scalars[2], scalars[3:-1], scalars[-1]
        norm = self.norm(gradients) * unscale
        factor = unscale
        if self.clip:
            factor = unscale * self.minimum(max_norm / (norm + 1e-6), 1.0)
        finite = self.is_finite(norm)
        if self.saturates:
            if self.reduce_flags is not None:
                flags = self.reduce_flags(ops.depend(flags, norm))
            finite = self.both(finite, self.all(self.equal(flags, self.no_flags)))
        if self.send is not None:
            gradients = pick(gradients, self.own)
        updated = (norm,)
        if gradients:  # a process may own no array
            updated = self.optimizer(gradients, finite, factor, numbers, ema_rate)
        if self.send is not None:
            # `finite` comes after the flags' AllReduce: in each process, also in one without arrays, the broadcasts
            # then come after it too.
            updated = self.send((*updated, finite))
        if self.limit_norms is not None:
            updated = self.limit_norms(updated, finite)
        if self.copy is not None:
            updated = ops.depend(updated, self.copy(updated))
        norm = ops.depend(norm, (updated, copy_into(self.previous_finite, finite)))
        return norm, self.cast(finite, ms.float32)


class _WholeStep(RepeatedCell):
    """Gradients and update in one graph."""

    def __init__(self, gradients: _Gradients, update: _Update):
        super().__init__(auto_prefix=False)
        self.gradients, self.update = gradients, update
        self.scalars, self.stack = _Scalars(update.previous_finite), stack()

    def construct(self, rows: Tensor, *batch: Tensor) -> Tensor:
        scalars = self.scalars(rows)
        loss, gradients, flags = self.gradients(scalars[0], *batch)
        norm, finite = self.update(gradients, flags, scalars)
        return self.stack((loss / scalars[0], norm, finite))


class _MicroBatch(RepeatedCell):
    """Adds the gradients of a micro-batch to the totals, and its flags to `flags` if there are any."""

    def __init__(self, gradients: _Gradients, scalars: _Scalars, totals: ParameterTuple, flags: Parameter | None):
        super().__init__(auto_prefix=False)
        self.gradients, self.scalars, self.totals, self.flags = gradients, scalars, totals, flags
        self.add_into = adder()

    def construct(self, rows: Tensor, *batch: Tensor) -> Tensor:
        loss_scale = self.scalars(rows)[0]
        loss, gradients, flags = self.gradients(loss_scale, *batch)
        added = each(self.add_into, self.totals, gradients)
        if self.flags is not None:
            added = (added, ops.assign_add(self.flags, flags))
        return ops.depend(loss / loss_scale, added)


class _UpdateFromTotals(nn.Cell):
    """Updates from the totals and clears them."""

    def __init__(self, update: _Update, scalars: _Scalars, totals: ParameterTuple, flags: Parameter | None):
        super().__init__(auto_prefix=False)
        self.update, self.scalars, self.totals, self.flags = update, scalars, totals, flags
        self.no_flags = Tensor(np.zeros(8, np.int32))
        self.stack = stack()

    def construct(self, rows: Tensor) -> Tensor:
        flags = self.no_flags if self.flags is None else self.flags
        result = self.stack(self.update(self.totals, flags, self.scalars(rows)))
        cleared = each(clear, ops.depend(self.totals, result))
        if self.flags is not None:
            cleared = (cleared, ops.assign(self.flags, ops.depend(self.no_flags, result)))
        return ops.depend(result, cleared)


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
        update = _Update(arrays, cell, clip, process_count, saturates, shards, norm_limit)
        self._arrays, self._shards = arrays, shards
        self._groups = {"p": arrays.arrays, **cell.state_groups()}
        if use_ema:
            self._groups["ema"] = cell.averages
        self._scalars = cell.state_scalars()
        gradients = _Gradients(loss, arrays, saturates, gradient_checkpointing)
        if micro_batches == 1:
            self.whole = _WholeStep(gradients, update)
            self.whole.set_train()
        else:
            totals = ParameterTuple([companion("total", p, ops.zeros_like(p)) for p in arrays.arrays])
            flags = Parameter(Tensor(np.zeros(8, np.int32)), name="flags", requires_grad=False) if saturates else None
            choice = _Scalars(update.previous_finite)
            self.micro = _MicroBatch(gradients, choice, totals, flags)
            self.finish = _UpdateFromTotals(update, choice, totals, flags)
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
