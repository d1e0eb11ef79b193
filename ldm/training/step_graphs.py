"""The graphs of a training step, which the device computes: gradients, and the update of what is trained.

With one micro-batch, `WholeStep` is both. With more, `MicroBatch` adds up the gradients of each, and `UpdateFromTotals`
updates.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.ops import RepeatedCell
from ldm.training.checkpointing import CheckpointedGradients
from ldm.training.optimizer_arrays import CopyIntoParameters, JoinGradients, OptimizerArrays
from ldm.training.optimizers import OptimizerCell
from ldm.training.sharding import MeanInOrder, SendUpdated, Shards
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


class MicroBatchGradients(nn.Cell):
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


class ChooseScalars(nn.Cell):
    """Chooses the scalars of a step by `previous_finite`, the outcome of the step before, which Update keeps.

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


class Update(nn.Cell):
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


class WholeStep(RepeatedCell):
    """Gradients and update in one graph."""

    def __init__(self, gradients: MicroBatchGradients, update: Update):
        super().__init__(auto_prefix=False)
        self.gradients, self.update = gradients, update
        self.scalars, self.stack = ChooseScalars(update.previous_finite), stack()

    def construct(self, rows: Tensor, *batch: Tensor) -> Tensor:
        scalars = self.scalars(rows)
        loss, gradients, flags = self.gradients(scalars[0], *batch)
        norm, finite = self.update(gradients, flags, scalars)
        return self.stack((loss / scalars[0], norm, finite))


class MicroBatch(RepeatedCell):
    """Adds the gradients of a micro-batch to the totals, and its flags to `flags` if there are any."""

    def __init__(
        self, gradients: MicroBatchGradients, scalars: ChooseScalars, totals: ParameterTuple, flags: Parameter | None
    ):
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


class UpdateFromTotals(nn.Cell):
    """Updates from the totals and clears them."""

    def __init__(self, update: Update, scalars: ChooseScalars, totals: ParameterTuple, flags: Parameter | None):
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
