"""The training loop: micro-batches -> step -> metrics -> checkpoints.

lora = train_lora("datasets/emoji_noto/train", "models/nano/nano.safetensors", "output/emoji", max_steps=500)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.data.draws import draws
from ldm.errors import UserError
from ldm.files.outputs import check_file_target, claim_folder
from ldm.runtime.device import failed_allocations_as
from ldm.runtime.parallel import output_to_file
from ldm.runtime.script import describe_progress
from ldm.settings.declare import names_of
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.checks import image_size
from ldm.training.diagnosis import cause_of_not_finite, check_inputs_finite
from ldm.training.estimate import print_estimate
from ldm.training.feed import TensorBatch
from ldm.training.graph_cache import cached_graphs, graph_key
from ldm.training.loss_scale import LossScaler
from ldm.training.metrics_file import Metrics, MetricsFile
from ldm.training.report.writer import Reports
from ldm.training.schedules import ema_decay_at, learning_rate
from ldm.training.setup import Run, begin, set_up
from ldm.training.status import Status
from ldm.training.step import StepResult, StepScalars, UnreadResult
from ldm.training.training_state import TrainingState

logger = logging.getLogger(__name__)

LOG_EVERY = 50  # steps between two lines in log.txt
SMOOTHING = 0.98  # weight of the past in the mean loss that is shown


def train_lora(
    data_path: str | Path,
    base_model: str | Path,
    output_path: str | Path,
    *,
    train_config: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Train a LoRA on a folder of captioned images.

    Args:
        data_path: Folder with the images and img_txt.csv.
        base_model: Stable Diffusion checkpoint (.safetensors, .ckpt or a diffusers folder).
        output_path: Folder for the LoRA, logs and the cache.
        train_config: YAML file with settings, such as configs/train/train_config_lora_v1.yaml.
        **settings: Any settings of TrainSettings, such as max_steps or lora_rank. They override those of the file.

    Returns:
        The path of the LoRA.

    Raises:
        UserError: See `train`.
    """
    argv = [] if train_config is None else [f"--train_config={train_config}"]
    recipe = read_settings(TrainSettings, argv, yaml_flag="train_config")
    settings.update(data_path=data_path, pretrained_model_path=base_model, output_path=output_path, use_lora=True)
    return train(replace(recipe, **settings))


def train(settings: TrainSettings) -> Path:
    """Run a training and return the path of the newest checkpoint, `{output_path}/ckpt/lora.ckpt` or `model.ckpt`.

    With cache_only, nothing is trained, and the path is that of the cache. With estimate, nothing is read but the
    shapes of the base model, and the path is output_path, which is not created.

    Raises UserError if a setting, a file or the data is wrong, or if nothing is being learned.
    """
    output = Path(settings.output_path)
    if settings.estimate:
        print_estimate(settings)
        return output
    runtime = begin(settings)
    status = Status(output / "ckpt", bool(settings.resume))
    process = runtime.process_index
    with _claimed(output) if process == 0 else output_to_file(output / f"log-{process}.txt"):
        describe_progress(status.describe)
        run = set_up(settings, runtime, status)
        path = encode(run) if settings.cache_only else run_steps(run)
        describe_progress(None)  # not in a `finally`: after an interrupt, the status is printed when this has unwound
        return path


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Lock the folders that the first process writes to, and check that their files can be written."""
    with claim_folder(output, "output_path"), claim_folder(output / "ckpt", "output_path"):
        for name in ("log.txt", "metrics.csv", "validation.csv", "train_args.yaml", "report.html", "run.json"):
            check_file_target(output / name, "output_path")
        yield


def encode(run: Run) -> Path:
    """Encode all images and captions into the cache, and return its path. What is there already is kept."""
    what = " and ".join(run.inputs.encode_all())
    if run.validation is not None:
        run.validation.encode()
    logger.info("done: the %s of %d rows are encoded in %s", what, len(run.inputs.data), run.output / "cache")
    return run.output / "cache"


def run_steps(run: Run) -> Path:
    """Train the steps that are left, and return the path of the newest checkpoint."""
    settings, status, plan = run.settings, run.status, run.plan
    micro_batches = settings.gradient_accumulation_steps
    logger.info(
        "%d steps of %d x %d x %d images (processes, micro-batches, batch size): %.1f epochs of %d rows, on %s in %s",
        plan.steps, run.runtime.process_count, micro_batches, settings.train_batch_size,
        plan.steps / plan.steps_per_epoch, len(run.inputs.data), run.runtime.device, run.runtime.precision,
    )  # fmt: skip
    run.samples.start()
    status.phase = "while compiling the step"
    newest = run.checkpoints.newest
    if status.steps_done >= plan.steps:
        logger.info("all %d steps are done already, at step %d", plan.steps, status.steps_done)
        # What a run that was killed after its last save has not done: its last report, and what it says of the best.
        with Reports(run):
            if not newest.exists():
                save(run)  # the state is from another folder, or the checkpoint was removed
        if run.validation is not None:
            run.validation.finish()
        return newest

    if run.validation is not None:
        run.validation.begin()
    metrics_file = MetricsFile(run.output / "metrics.csv", status.steps_done) if run.is_first_process else None
    bar = tqdm(total=plan.steps, initial=status.steps_done, desc="training", unit="step", smoothing=0.1,
               disable=not run.is_first_process)  # fmt: skip
    mean_loss = None
    with bar, Reports(run) as reports:
        bar.set_postfix_str("compiling the graph, the first step takes longer")
        for metrics in train_steps(run):
            status.phase = ""
            if mean_loss is None or not math.isfinite(mean_loss):
                mean_loss = metrics.loss
            elif math.isfinite(metrics.loss):  # that of a step which overflowed in fp16 may not be
                mean_loss = SMOOTHING * mean_loss + (1.0 - SMOOTHING) * metrics.loss
            bar.set_postfix_str(f"loss {metrics.loss:.4f}, mean {mean_loss:.4f}", refresh=False)
            bar.update()
            if metrics_file is not None:
                metrics_file.write(metrics)
            reports.add(metrics, mean_loss)
            if metrics.step % LOG_EVERY == 0 or metrics.step == plan.steps:
                logger.info(
                    "step %d/%d: loss %.4f (mean %.4f), learning rate %.3g, loss scale %g, %.3f s",
                    metrics.step, plan.steps, metrics.loss, mean_loss, metrics.learning_rate, metrics.loss_scale,
                    metrics.seconds,
                )  # fmt: skip
            if run.validation is not None and run.validation.is_due(metrics.step):
                run.validation.measure(metrics.step)  # before the training state, which knows the best step
            if plan.is_save_step(metrics.step):
                save(run)
            run.samples.draw(metrics.step)
            if plan.is_save_step(metrics.step):
                reports.update()
    if metrics_file is not None:
        metrics_file.close()
    if run.scaler.overflows:
        skipped = " and were skipped" if settings.drop_overflow_update else ""
        logger.warning("%d of %d steps overflowed%s", run.scaler.overflows, plan.steps, skipped)
    if run.validation is not None:
        run.validation.finish()
    if (shared := run.checkpoints.newest_shared) is not None:
        logger.info("for A1111, ComfyUI and others: %s", shared)
    logger.info("done: %s", newest)
    return newest


def save(run: Run) -> None:
    """Write a checkpoint and a training state. Processes other than the first only give it their optimizer state."""
    if not run.is_first_process and not run.settings.shard_optimizer:
        return
    arrays = run.step.state()
    if not run.is_first_process:
        return
    state = TrainingState(run.status.steps_done, arrays, run.scaler.state(), run.fingerprint)
    state.validation = run.earlier_validation if run.validation is None else run.validation.state()
    try:
        run.status.last_state = run.checkpoints.save(state)
    except UserError as error:
        raise UserError(f"{error}; {run.status.how_to_continue()}") from error


class _Launched(NamedTuple):
    """A step whose result is not read yet."""

    began: float  # time.perf_counter()
    batches: list[TensorBatch]
    learning_rate: float
    result: UnreadResult


def train_steps(run: Run) -> Iterator[Metrics]:
    """Train the steps that are left, at least one. Yields the row of each for metrics.csv when its result is read.

    With `reads_late`, the next step is launched before that, so that the device does not wait for the host. The first
    step and those after which something else runs are read at once. When a result is read changes no value.
    """
    status, plan = run.status, run.plan
    began, batches = time.perf_counter(), _next_batches(run)
    # Nothing but the step may compile in the cache. The networks that encode a batch have run before.
    with _graph_cache(run, batches):
        metrics = _read(run, _launch(run, status.steps_done, batches, began))
    yield metrics
    unread: _Launched | None = None
    while status.steps_done < plan.steps:  # the last step saves, so it is not left unread
        began, batches = time.perf_counter(), _next_batches(run)
        step = status.steps_done + (unread is not None)
        newest = _launch(run, step, batches, began)
        if unread is not None:
            metrics = _read(run, unread)
            newest = newest._replace(began=time.perf_counter())  # the device was busy with `unread` until now
            yield metrics
            unread = None
        if run.reads_late and not _is_followed(run, step + 1):
            unread = newest
        else:
            yield _read(run, newest)


def _is_followed(run: Run, steps_done: int) -> bool:
    """Whether the run saves, validates or draws samples after this many steps."""
    return run.plan.is_save_step(steps_done) or _is_validated(run, steps_done) or run.samples.is_due(steps_done)


def _is_validated(run: Run, steps_done: int) -> bool:
    return run.validation is not None and run.validation.is_due(steps_done)


def _next_batches(run: Run) -> list[TensorBatch]:
    return [run.feed() for _ in range(run.settings.gradient_accumulation_steps)]


def _launch(run: Run, step: int, batches: list[TensorBatch], began: float) -> _Launched:
    """Launch a step. The result of the one before it may be unread.

    Args:
        run: The run.
        step: Number of the step, from 0.
        batches: Its micro-batches.
        began: time.perf_counter() before the batches were made.
    """
    settings, scaler = run.settings, run.scaler
    rate = learning_rate(
        step,
        scheduler=settings.scheduler,
        start=settings.start_learning_rate,
        end=settings.end_learning_rate,
        warmup_steps=run.plan.warmup_steps,
        decay_steps=run.plan.decay_steps,
        cycles=settings.lr_scheduler_num_cycles,
        power=settings.lr_scheduler_power,
    )
    scalers = (scaler, scaler) if step == run.status.steps_done else scaler.outcomes()
    scalars, after_overflow = (_scalars(run, scaler, rate) for scaler in scalers)
    with _failed_allocations(run):
        result = run.step(batches, scalars, _dropout_keys(run, step), after_overflow)
    return _Launched(began, batches, rate * run.rates.shown, result)


def _scalars(run: Run, scaler: LossScaler, rate: float) -> StepScalars:
    settings = run.settings
    return StepScalars(
        scaler.scale,
        1.0 / (scaler.scale * settings.gradient_accumulation_steps),
        settings.max_grad_norm,
        run.optimizer.numbers(scaler.updates + 1, rate * run.rates.largest),
        1.0 - ema_decay_at(scaler.updates, settings.ema_decay),
    )


def _read(run: Run, step: _Launched) -> Metrics:
    """Wait for the result of the oldest step that is not read, count the step and return its row for metrics.csv."""
    scaler, status = run.scaler, run.status
    with _failed_allocations(run):
        result = step.result.read()
    status.steps_done += 1
    applied = result.finite or not run.skips_overflow
    _check_finite(run, result, applied, step.batches)
    scale_before = scaler.scale
    scaler.after_step(result.finite, applied)
    if not result.finite:
        logger.warning(
            "step %d overflowed at loss scale %g and was skipped, the scale is now %g",
            status.steps_done, scale_before, scaler.scale,
        )  # fmt: skip
    seconds = time.perf_counter() - step.began
    return Metrics(status.steps_done, result.loss, step.learning_rate, scale_before, seconds, result.gradient_norm)


def _failed_allocations(run: Run) -> AbstractContextManager:
    return failed_allocations_as(
        f"the device's memory is not enough for a step with train_batch_size {run.settings.train_batch_size} and "
        f"image_size {image_size(run.settings, run.model.config)}: make one of them smaller "
        "(gradient_accumulation_steps keeps the sum)"
        + ("" if run.settings.gradient_checkpointing else ", or set gradient_checkpointing")
    )


def _check_finite(run: Run, result: StepResult, applied: bool, batches: list[TensorBatch]) -> None:
    """Raise UserError if the loss or its gradients are not finite, unless only the loss scale is too large."""
    if not result.finite:
        check_inputs_finite(run, batches)
    if (not math.isfinite(result.loss) and not run.runtime.fp16) or (applied and not result.finite):
        raise UserError(
            f"the loss or its gradients are not finite at step {run.status.steps_done} (loss {result.loss}): "
            f"{cause_of_not_finite(run)}; {run.status.how_to_continue()}"
        )


def _dropout_keys(run: Run, step: int) -> list[np.ndarray]:
    """Return the key of LoRA's dropout for each micro-batch of a step, a function of the step's number from 0."""
    seed, count = run.settings.seed, run.settings.gradient_accumulation_steps
    generators = [draws(seed, "lora_dropout", step * count + i) for i in range(count)]
    return [generator.integers(-(2**31), 2**31, 2, dtype=np.int32) for generator in generators]


def _graph_cache(run: Run, batches: list[TensorBatch]) -> AbstractContextManager:
    """Return the context in which the first step's graph is read or kept on disk, if compile_cache is set."""
    settings = run.settings
    if not settings.compile_cache:
        return nullcontext()
    key = graph_key(
        {name: getattr(settings, name) for name in names_of(TrainSettings, graph_key=True)},
        run.model.config.content(), [tensor.shape for batch in batches for tensor in batch], run.skips_overflow,
        str(run.runtime), run.lora_spec.modules, run.lora_spec.trainable_model, run.rates.differ,
    )  # fmt: skip
    return cached_graphs(run.output / "cache" / "graphs" / f"rank{run.runtime.process_index}", key)
