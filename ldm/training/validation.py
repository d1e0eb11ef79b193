"""The validation loss of a run: when it is computed, with which weights, by which process, and which step is the best.

`validation_loss` computes it for images. `validation_results` has its file and compares what was measured.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ldm.data.content import content_key
from ldm.data.training_data import TrainingData
from ldm.errors import UserError
from ldm.models.stable_diffusion import StableDiffusion
from ldm.runtime import peers
from ldm.runtime.device import Runtime, failed_allocations_as
from ldm.settings.train import TrainSettings
from ldm.training.best_checkpoint import BestCheckpoint
from ldm.training.checkpoints import Checkpoints
from ldm.training.checks import trained_timesteps
from ldm.training.inputs import Inputs
from ldm.training.metrics_file import StepRows
from ldm.training.plan import RunPlan, completes_interval
from ldm.training.status import Status
from ldm.training.step import TrainStep
from ldm.training.training_state import TrainingState
from ldm.training.validation_loss import MeasuredImages, RowLosses, choose_rows
from ldm.training.validation_results import Measured, log_summary, open_validation_file

logger = logging.getLogger(__name__)


class Validation:
    """Measures the validation loss of a run, writes validation.csv and keeps the best step.

    Batches are divided among the processes of a run, which hold the same weights. Process 0 adds up the results, so the
    number is the same in any number of processes that have the same train_batch_size. Where the moving averages are
    divided (shard_optimizer with use_ema), process 0 alone has them, and measures all.

    Args:
        settings: Those of the run.
        runtime: Of this process.
        model: The networks, as they are trained.
        inputs: Those of the training.
        held_out: The images that are not trained.
        plan: Of the run.
        step: What trains the networks.
        checkpoints: Keep the best weights.
        status: Is told that the loss is being computed.
    """

    def __init__(
        self,
        settings: TrainSettings,
        runtime: Runtime,
        model: StableDiffusion,
        inputs: Inputs,
        held_out: TrainingData,
        plan: RunPlan,
        step: TrainStep,
        checkpoints: Checkpoints,
        status: Status,
    ):
        self.settings, self.plan, self.step, self.status = settings, plan, step, status
        self.checkpoints, self.runtime = checkpoints, runtime
        self.timesteps = settings.timesteps_within(trained_timesteps(settings, model.config))
        seed = settings.seed if settings.validation_seed is None else settings.validation_seed
        limit = (settings.max_validation_steps or len(held_out)) * settings.train_batch_size
        rows = choose_rows(held_out, limit, seed, "validation_rows")
        training_rows = choose_rows(inputs.data, len(rows), seed, "training_rows")
        if not rows or not training_rows:
            raise UserError(
                "the validation loss needs images that are not class images, both held out and to train on: add some, "
                "or turn it off by --validate_every_n_epochs 0"
            )
        of_held_out = inputs.of_data(held_out, settings.validation_data_path or settings.data_path)
        self.images = {
            "validation": MeasuredImages(of_held_out, rows, seed),
            "training": MeasuredImages(of_held_out.of_data(inputs.data, settings.data_path), training_rows, seed),
        }
        self.network = RowLosses(model, settings)
        self.uses_averages = settings.use_ema or step.optimizer.keeps_average
        self._alone = settings.shard_optimizer and settings.use_ema
        self._file: StepRows | None = None
        self._is_encoded = False
        self.best: Measured | None = None
        self.last: Measured | None = None
        self._key = content_key(
            "validation", seed, repr(self.timesteps), repr(rows), held_out.fingerprint(), repr(held_out.alpha_color),
        )  # fmt: skip

    # ---- when -----------------------------------------------------------------------------------------------------

    def is_due(self, steps_done: int) -> bool:
        """Whether the loss is computed after this many steps (see `is_due`)."""
        return is_due(self.settings, self.plan, steps_done)

    # ---- its part of a training state -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: the best step, the last one, and what they were measured on."""
        best, last = (None if step is None else step.content() for step in (self.best, self.last))
        return {"key": self._key, "best": best, "last": last}

    def load_state(self, state: TrainingState) -> None:
        """Continue from a training state."""
        content = state.validation or {}
        best, last = Measured.parse(content.get("best")), Measured.parse(content.get("last"))
        if best is not None and (content.get("key") != self._key or len(best.losses) != len(self.images["validation"])):
            logger.warning(
                "the validation loss is of other images or time steps than before: the best step so far, %d, is not "
                "compared with those that follow",
                best.step,
            )
            best = None
        self.best = best
        # For `finish`, where all steps are done already.
        self.last = last if best is not None and last is not None and last.step == state.step else None
        source = None if state.path is None else state.path.parent
        keep = self.settings.keep_best

        def restore(files: BestCheckpoint) -> None:
            files.restore(None if best is None else best.step, 0.0 if best is None else best.loss, keep, source)

        self.checkpoints.restore_best = restore

    # ---- measuring ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Open validation.csv, and measure what the run starts from if no step is done yet."""
        done = self.status.steps_done
        if self.runtime.process_index == 0:
            self._file = open_validation_file(Path(self.settings.output_path), self.timesteps, done)
            logger.info(
                "validation loss: the mean squared error of %d held-out images, and of %d training images, at the time "
                "steps %s",
                len(self.images["validation"]), len(self.images["training"]), ", ".join(map(str, self.timesteps)),
            )  # fmt: skip
        if done == 0:
            self.measure(0)

    def encode(self) -> None:
        """Put the images and captions of this process's batches into the cache."""
        phase = self.status.phase
        for images in self.images.values():
            images.encode(self._part)
        self.status.phase, self._is_encoded = phase, True

    def measure(self, step: int) -> None:
        """Compute the validation loss after a step, write it down, and keep the weights if it is the best.

        Every process of a run calls this.

        Raises:
            UserError: An image cannot be read, the device's memory is not enough, or a file cannot be written.
        """
        began = time.perf_counter()
        phase, self.status.phase = self.status.phase, f"while computing the validation loss after step {step}"
        shares_state = self.settings.shard_optimizer and self.settings.keep_best
        arrays = self.step.state() if self.uses_averages or shares_state else None
        measures = self.runtime.process_index == 0 or not self._alone
        found = _add_up(peers.gather(_packed(self._losses_of_part(arrays) if measures else {})))
        if self.runtime.process_index == 0:
            self._record(step, found, arrays, time.perf_counter() - began)
        self.status.phase = phase

    def finish(self) -> None:
        """Close validation.csv and say which step was the best, and whether the last one is worse."""
        if self._file is not None:
            self._file.close()
        best, last = self.best, self.last
        if best is None or last is None or self.runtime.process_index > 0:
            return
        log_summary(best, last, self.checkpoints.kept)

    @property
    def _part(self) -> slice:
        """Which batches this process measures."""
        return slice(None) if self._alone else slice(self.runtime.process_index, None, self.runtime.process_count)

    def _losses_of_part(self, arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return the losses of this process's batches, with the weights that a checkpoint holds."""
        if not self._is_encoded:
            self.encode()
        batches = sum(len(images.batches[self._part]) for images in self.images.values())
        values = self.step.optimizer.sampled(arrays) if self.uses_averages and arrays is not None else None
        too_large = (
            "the device's memory is not enough for the validation loss with train_batch_size "
            f"{self.settings.train_batch_size}: make it smaller, or turn the validation loss off by "
            "--validate_every_n_epochs 0"
        )
        bar = tqdm(total=batches, desc="validation", unit="batch", delay=5, leave=False,
                   disable=self.runtime.process_index > 0)  # fmt: skip
        with failed_allocations_as(too_large), sampled_weights(self.step, values), bar:
            return {
                name: images.losses(self.network, self.timesteps, self._part, bar)
                for name, images in self.images.items()
            }

    def _record(
        self, step: int, found: dict[str, np.ndarray], arrays: dict[str, np.ndarray] | None, seconds: float
    ) -> None:
        means = {name: losses.mean(0) for name, losses in found.items()}
        loss, training_loss = (float(means[name].mean()) for name in ("validation", "training"))
        of_images = found["validation"].mean(1).astype(np.float32)
        self.last = measured = Measured(step, loss, training_loss, of_images)
        if self._file is not None:
            for name, of_timesteps in means.items():
                self._file.write_row(step, [name, float(of_timesteps.mean()), *of_timesteps.tolist()])
        is_best = math.isfinite(loss) and (self.best is None or loss < self.best.loss)
        if is_best:
            self.best = measured
            if self.settings.keep_best and arrays is None:
                arrays = self.step.state()
            self.checkpoints.save_best(step, loss, arrays if self.settings.keep_best else None)
        if not math.isfinite(loss):
            logger.warning("the validation loss is not finite at step %d", step)
        rank = "the best so far"
        if not is_best:
            rank = "no best yet" if self.best is None else f"best {self.best.loss:.5f} at step {self.best.step}"
        logger.info(
            "step %d: validation loss %.5f (%s), training images %.5f; %s; %.1f s",
            step, loss,
            ", ".join(f"{timestep}: {value:.4f}" for timestep, value in zip(self.timesteps, means["validation"])),
            training_loss, rank, seconds,
        )  # fmt: skip


def make_validation(
    settings: TrainSettings,
    runtime: Runtime,
    model: StableDiffusion,
    inputs: Inputs,
    held_out: TrainingData | None,
    plan: RunPlan,
    step: TrainStep,
    checkpoints: Checkpoints,
    status: Status,
    state: TrainingState | None,
) -> Validation | None:
    """Build the validation of a run, which continues from a training state if there is one.

    Returns None if no images are held out, or if the settings turn it off.
    """
    if held_out is None or not settings.validates:
        return None
    if settings.keep_best and "model" in checkpoints.writers and settings.use_lora:
        raise UserError("keep_best keeps one file, and this lora_config trains the base model as well: leave it out")
    validation = Validation(settings, runtime, model, inputs, held_out, plan, step, checkpoints, status)
    if state is not None:
        validation.load_state(state)
    return validation


def is_due(settings: TrainSettings, plan: RunPlan, steps_done: int) -> bool:
    """Whether the loss is computed after this many steps: before the first, at every interval, and at the end."""
    intervals = []
    if settings.validate_every_n_steps is not None:
        intervals.append(float(settings.validate_every_n_steps))
    epochs = settings.validate_every_n_epochs
    if epochs is None and not intervals:
        epochs = 1
    if epochs:
        intervals.append(max(1.0, epochs * plan.steps_per_epoch))
    return steps_done in (0, plan.steps) or any(completes_interval(steps_done, every) for every in intervals)


@contextmanager
def sampled_weights(step: TrainStep, values: dict[str, np.ndarray] | None) -> Iterator[None]:
    """Have the networks hold the weights that checkpoints hold, such as moving averages, and then their own again.

    Args:
        step: What trains them.
        values: Parameter name -> weights. None: those that the networks hold already.
    """
    if values is None:
        yield
        return
    own = [parameter.asnumpy().copy() for parameter in step.parameters]
    try:
        for parameter in step.parameters:
            array = values[parameter.name].astype(ms.dtype_to_nptype(parameter.dtype))
            parameter.set_data(Tensor(np.ascontiguousarray(array)))
        yield
    finally:
        for parameter, array in zip(step.parameters, own):
            parameter.set_data(Tensor(array))


def _packed(losses: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **losses)
    return buffer.getvalue()


def _add_up(parts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the sums of the arrays of all processes, each of which has zeros where it has measured nothing."""
    sums: dict[str, np.ndarray] = {}
    for part in parts:
        with np.load(io.BytesIO(part), allow_pickle=False) as arrays:
            for name in arrays.files:
                sums[name] = sums[name] + arrays[name] if name in sums else arrays[name]
    return sums
