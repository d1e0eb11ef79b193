"""The validation loss: that of images which are not trained, at fixed time steps and with fixed noise.

The loss of an image is the mean squared error of the network's prediction, without anything that a training may do with
it: no weights of time steps, no other error than the square, no offset of the noise, no masks, no class images, neither
dropout nor augmentation, and the caption with all its tags. As many training images are measured in the same way. The
difference between the two is then due to the images alone, and grows when a training begins to learn them by heart.

Noise, latents' posterior and captions are functions of the seed, the time step and the row of an image, so the loss of
an image depends on the weights alone, whatever other images and time steps are measured.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from ldm.data.content import content_key
from ldm.data.draws import draws
from ldm.data.training_data import TrainingData
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.files.inputs import is_there, read_bytes
from ldm.files.paths import writing
from ldm.models.stable_diffusion import StableDiffusion
from ldm.ops import RepeatedCell
from ldm.runtime import peers
from ldm.runtime.batches import fill_batch
from ldm.runtime.device import Runtime, failed_allocations_as
from ldm.settings.train import TrainSettings
from ldm.training.best_checkpoint import BestCheckpoint
from ldm.training.checkpoints import Checkpoints
from ldm.training.checks import trained_timesteps
from ldm.training.inputs import Inputs, ValidationInputs, sample_latents
from ldm.training.metrics_file import StepRows
from ldm.training.own_files import free_name, make_room
from ldm.training.plan import RunPlan, completes_interval
from ldm.training.status import Status
from ldm.training.step import LossFromTokens, TrainStep
from ldm.training.training_state import TrainingState

logger = logging.getLogger(__name__)

FILE = "validation.csv"
# Student's t: a mean is this many standard errors from 0 by chance in 5 of 100 cases, for 1, 2, ... degrees of freedom.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class RowLosses(RepeatedCell):
    """Loss (N,) float32 of each row of a batch, as a graph of its own that shares the networks' weights.

    LoRA's dropout drops nothing here, because its key is zero between steps (ldm.lora.dropout).

    Args:
        model: The networks, in the precision that TrainStep runs them in.
        settings: Those of the run.
    """

    def __init__(self, model: StableDiffusion, settings: TrainSettings):
        super().__init__(auto_prefix=False)
        schedule = NoiseSchedule.from_config(model.config, settings.zero_terminal_snr)
        unet = model.model.diffusion_model
        self.loss: nn.Cell = DiffusionLoss(unet, schedule, model.config.prediction_type, of_rows=True)
        if settings.trains_text_encoder:
            self.loss = LossFromTokens(self.loss, model.cond_stage_model)

    def construct(self, latents: Tensor, noise: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        """Latents and noise (N, C, h, w), timesteps (N,) int32, text embeddings or tokens -> (N,) float32."""
        return self.loss(latents, noise, timesteps, texts)


class MeasuredImages:
    """Images whose loss is computed: rows of a data set in batches of one shape, which are always the same.

    Args:
        inputs: Encodes the images and captions of a data set. See `Inputs.of_data`.
        rows: Their rows.
        seed: Of the noise.
    """

    def __init__(self, inputs: ValidationInputs, rows: Sequence[int], seed: int):
        self.inputs, self.rows, self.seed = inputs, list(rows), seed
        self.batch_size = inputs.settings.train_batch_size
        buckets = inputs.data.buckets.of_row[self.rows]
        self.batches = [
            places[start : start + self.batch_size]
            for places in (np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets))
            for start in range(0, len(places), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, part: slice) -> None:
        """Put the images and captions of a part of the batches into the cache."""
        rows = [self.rows[place] for batch in self.batches[part] for place in batch.tolist()]
        self.inputs.encode(rows, [self._caption(row) for row in rows])

    def losses(self, network: nn.Cell, timesteps: Sequence[int], part: slice, bar: tqdm) -> np.ndarray:
        """Return the loss (images, time steps) float64 of each image, 0 of those of other batches than `part`.

        Args:
            network: RowLosses.
            timesteps: The time steps.
            part: Which batches.
            bar: Counts them.
        """
        result = np.zeros((len(self), len(timesteps)))
        for places in self.batches[part]:
            latents, texts = self._inputs_of(places)
            noises = (self._normal(f"validation_noise_{timestep}", places, latents.shape) for timestep in timesteps)
            # All are launched before the first is read, so that an Ascend device need not wait for the host.
            unread = [
                network(latents, Tensor(noise), Tensor(np.full(self.batch_size, timestep, np.int32)), texts)
                for timestep, noise in zip(timesteps, noises)
            ]
            for column, losses in enumerate(unread):
                result[places, column] = losses.asnumpy()[: len(places)]
            bar.update()
        return result

    def _inputs_of(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the latents and the text embeddings of a batch, whose last row is repeated to fill it."""
        config = self.inputs.config
        rows, moments = self.inputs.moments_of([self.rows[place] for place in places.tolist()])
        texts = self.inputs.texts.of([self._caption(row) for row in rows])
        shape = (len(places), config.latent_channels, *moments.shape[2:])
        eps = self._normal("validation_posterior", places, shape)[: len(places)]
        latents = sample_latents(moments, eps, config.scale_factor)
        return Tensor(fill_batch(latents, self.batch_size)), Tensor(fill_batch(texts, self.batch_size))

    def _caption(self, row: int) -> str:
        return self.inputs.captions.whole(row, draws(self.seed, "validation_caption", row))

    def _normal(self, stream: str, places: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return normal numbers for a whole batch, those of each image being a function of its row."""
        rows = [self.rows[place] for place in places.tolist()]
        drawn = [draws(self.seed, stream, row).standard_normal(shape[1:], np.float32) for row in rows]
        return fill_batch(np.stack(drawn), self.batch_size)


class Measured(NamedTuple):
    """What was measured at a step. `losses` are float32 (images,), each the mean over the time steps."""

    step: int
    loss: float  # mean of the held-out images and time steps
    training_loss: float  # that of the training images
    losses: np.ndarray  # of the held-out images

    def content(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        losses = base64.b64encode(self.losses.astype("<f4").tobytes()).decode("ascii")
        return {**self._asdict(), "losses": losses}

    @classmethod
    def parse(cls, content: Any) -> Measured | None:
        """Return what `content` was made from, or None if it was made from nothing that can be used."""
        try:
            raw = base64.b64decode(content["losses"], validate=True)
            losses = np.frombuffer(raw, "<f4").astype(np.float32)
            step, loss, training_loss = content["step"], float(content["loss"]), float(content["training_loss"])
        except (KeyError, TypeError, ValueError):
            return None
        is_step = type(step) is int and 0 <= step < 10**12
        return cls(step, loss, training_loss, losses) if is_step and math.isfinite(loss) else None


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
            path = Path(self.settings.output_path) / FILE
            header = ["step", "images", "loss", *(f"loss_{timestep}" for timestep in self.timesteps)]
            _set_aside_other_columns(path, header, done)
            self._file = StepRows(path, header, done)
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
        logger.info(
            "validation loss: the best is %.5f at step %d, with %.5f of the training images; at the end it is %.5f, "
            "with %.5f",
            best.loss, best.step, best.training_loss, last.loss, last.training_loss,
        )  # fmt: skip
        if not best.loss < last.loss:
            return
        difference, chance = compare(last.losses, best.losses)
        if not difference > chance:
            logger.info(
                "the last step is worse than the best one by %.2g, which may be chance (+- %.2g, from %d images)",
                difference, chance, len(last.losses),
            )  # fmt: skip
            return
        path = self.checkpoints.kept(best.step)
        if path is not None:
            advice = f"use {path}, which is from step {best.step}"
        elif best.step == 0:
            advice = "no step was better than what the training started from; lower the learning rate"
        else:
            advice = f"step {best.step} was not kept; train again with --keep_best True, or with fewer steps"
        logger.warning(
            "the last step is worse than step %d by more than chance (%.2g +- %.2g, from %d images): %s",
            best.step, difference, chance, len(last.losses), advice,
        )  # fmt: skip

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


def choose_rows(data: TrainingData, count: int, seed: int, stream: str) -> list[int]:
    """Return at most `count` rows of a data set that are no class images, drawn by the seed, in their order."""
    rows = np.arange(len(data))
    is_reg = np.array([subset.is_reg for subset in data.subsets])
    if is_reg.any():
        rows = rows[~is_reg[np.fromiter((row.subset for row in data.rows), np.int64, len(data))]]
    return sorted(rows[draws(seed, stream, 0).permutation(len(rows))[:count]].tolist())


def compare(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Return the mean of losses - others, and how far from 0 it may be by chance in 95 of 100 cases.

    The losses are of the same images with the same noise, so that their differences count, which vary much less than
    the losses. "By chance" is about which images were held out.

    Args:
        losses: (images,).
        others: (images,).

    Returns:
        The mean, and Student's t times its standard error. That is inf for one image.
    """
    differences = losses.astype(np.float64) - others
    if len(differences) < 2:
        return float(differences.mean()), math.inf
    free = len(differences) - 1
    student_t = _STUDENT_T[free - 1] if free <= len(_STUDENT_T) else 1.96 + 2.5 / free
    return float(differences.mean()), student_t * float(differences.std(ddof=1)) / math.sqrt(len(differences))


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


def _set_aside_other_columns(path: Path, header: Sequence[str], step: int) -> None:
    """Rename a file that no run wrote, or that of a run which is resumed with other time steps."""
    if not is_there(path):
        return
    found = read_bytes(path).partition(b"\n")[0].strip()
    is_of_a_run = found.startswith(b"step,images,loss")
    if is_of_a_run and (not step or found == ",".join(header).encode()):
        return
    with writing(path):
        if not is_of_a_run:
            make_room(path)
            return
        kept = free_name(path.with_name(f"validation-until-{step:08d}.csv"))
        os.replace(path, kept)
    logger.warning("validation_timesteps has changed: the rows until step %d are in %s", step, kept)


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
