"""A training run from settings to checkpoints."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor
from PIL import Image
from tqdm import tqdm

from ldm.data.batches import BatchOrder
from ldm.data.cache import content_key
from ldm.data.dataset import Row, read_image_text_csv
from ldm.data.draws import draws
from ldm.data.transforms import FORMATS
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_file, is_folder
from ldm.files.outputs import check_file_target, claim_folder
from ldm.files.paths import under_root, writing
from ldm.lora.formats import mindone, read_lora
from ldm.lora.inject import get_lora, inject_lora, set_lora
from ldm.lora.layers import dropout_key
from ldm.lora.merge import check_compatible
from ldm.lora.spec import LoRASpec
from ldm.models.attention import use_flash_attention
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion, build_model
from ldm.runtime.device import Runtime, check_flash_attention, is_out_of_memory, setup_runtime
from ldm.runtime.logs import set_up_logging
from ldm.runtime.processes import own_log
from ldm.runtime.script import progress
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.read import save_settings
from ldm.settings.train import TrainSettings
from ldm.training import checkpoints
from ldm.training.checkpoints import TrainingState
from ldm.training.checks import check_settings, image_size
from ldm.training.feed import check_sink, make_feed
from ldm.training.graph_cache import cached_graphs, graph_key
from ldm.training.inputs import Inputs
from ldm.training.loss_scale import LossScaler
from ldm.training.optimizers import adamw_scalars
from ldm.training.own_files import Numbered, OwnFiles, find_states
from ldm.training.plan import make_plan
from ldm.training.reports import LOG_EVERY, Metrics, MetricsFile
from ldm.training.schedules import ema_decay_at, learning_rate
from ldm.training.step import StepScalars, TextConditionedLoss, TrainStep, differing_shapes, state_shapes
from ldm.weights.added_tokens import tokens_metadata
from ldm.weights.architecture import config_with_tokens, detect_model_config
from ldm.weights.base_model import base_model_hash, open_base_model
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.load import check_metadata, load_base_model, load_component

logger = logging.getLogger(__name__)

EPSILON = 1e-8  # torch's and diffusers' default
UNET = "model.diffusion_model."
HUGE = 1e4  # weights of a network that trains are below 100

# A resumed run must not differ in these: it would end with other weights than an uninterrupted one, or make no sense.
# What else was changed (a longer run, another learning rate) is said and taken.
FIXED_ON_RESUME = (
    "data", "model", "base", "seed", "rank_size", "precision", "image_size", "train_batch_size",
    "gradient_accumulation_steps", "random_crop", "random_flip", "caption_dropout", "use_lora", "lora_ft_unet",
    "lora_ft_text_encoder", "lora_rank", "lora_alpha", "lora_scale", "lora_targets", "lora_config", "lora_dropout",
    "lora_fp16", "use_ema", "optim",
)  # fmt: skip
FOLLOWED_ON_RESUME = (
    "updates", "scheduler", "start_learning_rate", "end_learning_rate", "warmup_steps", "decay_steps", "betas",
    "weight_decay", "clip_grad", "max_grad_norm", "ema_decay", "loss_scaler_type", "loss_scale_factor", "scale_window",
    "drop_overflow_update",
)  # fmt: skip


def train(config: TrainSettings) -> Path:
    """Run a training and return the path of the newest checkpoint, `{output_path}/ckpt/lora.ckpt` or `model.ckpt`.

    Raises UserError for everything that a person can mend: settings, files, data, a run that learns nothing.
    """
    runtime = begin(config)
    output = Path(config.output_path)
    with _claimed(output) if runtime.rank == 0 else own_log(output / f"log-{runtime.rank}.txt"):
        path = Trainer(config, runtime).run()
        progress(None)  # not after an interrupt, which is said when this has unwound
        return path


def begin(config: TrainSettings) -> Runtime:
    """Look at the settings, which all processes do alike, and let the processes meet."""
    check_settings(config)
    _check_nothing_is_lost(config)
    set_up_logging(config.log_level)
    return setup_runtime(
        config.device_target, config.mode, config.jit_level, config.precision, config.seed, config.use_parallel
    )


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Hold the folders that the first process writes to, and try the files in them."""
    with claim_folder(output, "output_path"), claim_folder(output / "ckpt", "output_path"):
        for name in ("log.txt", "metrics.csv", "train_args.yaml"):
            check_file_target(output / name, "output_path")
        yield


class Trainer:
    """Builds everything that a run needs; `run` goes through its updates.

    runtime: of `begin`; None calls it.
    """

    def __init__(self, config: TrainSettings, runtime: Runtime | None = None):
        self.config = config
        self.output = Path(config.output_path)
        self.folder = self.output / "ckpt"
        self.done = 0  # updates
        self.last_state: Path | None = None
        self.phase = "before the first step"  # until there are updates
        progress(self.what_is_done)
        self.runtime = runtime or begin(config)
        _check_nothing_is_lost(config)  # again, as the folder is this run's own now
        check_flash_attention(config.enable_flash_attention, self.runtime)
        check_sink(config, self.runtime)
        self.is_first_rank = self.runtime.rank == 0
        if self.is_first_rank:
            set_up_logging(config.log_level, self.output / "log.txt")
        else:
            set_up_logging("WARNING")  # the others would say the same
        self.model_config = _model_config(config)
        self.image_size = image_size(config, self.model_config)
        rows = self._read_rows()
        self.order = BatchOrder(
            len(rows), config.train_batch_size, config.seed, self.runtime.rank, self.runtime.rank_size
        )
        self.plan = make_plan(config, self.order.steps_per_epoch)
        self.scaler = make_loss_scaler(config, self.runtime)
        self.lora_spec = make_lora_spec(config)
        self.fingerprint = self._fingerprint(rows)
        if self.is_first_rank:
            checkpoints.remove_remains(self.folder)
            checkpoints.remove_remains(self.output)
        # Whatever can be wrong is found before the data is encoded, which may take hours.
        self.model = self._build_model()
        self.trained_names: list[str] = []
        trainable = self._choose_trainable()
        state = self._state_to_resume(trainable) if config.resume else None
        if state is not None:
            self.last_state = state.path
        goes_on = config.resume is True or state is not None and self._is_below(state.path)
        self.own_files = OwnFiles(self.folder, goes_on)
        if state is None and config.lora_init_path is not None:
            self._start_from_lora(config.lora_init_path)
        if self.is_first_rank:
            path = self.output / "train_args.yaml"
            with writing(path):
                # of this start alone: the file holds all settings itself, and a new run has nothing to resume
                save_settings(config, path, leave_out=("train_config", "resume"))
        self.inputs = Inputs(
            config,
            self.model_config,
            self.model,
            rows,
            self.order,
            image_size=self.image_size,
            tokens_only=config.lora_ft_text_encoder,
            note=self._note,
        )
        self.step = self._build_step(trainable)
        if state is not None:
            self._take_over(state)
        self.began_at: int | None = self.done  # until the first save
        micro_steps = config.gradient_accumulation_steps
        self.feed = make_feed(
            self.inputs, self.done * micro_steps, self.plan.updates * micro_steps, config.dataset_sink_mode
        )

    # ---- building ----------------------------------------------------------------------------------------------------

    def _read_rows(self) -> list[Row]:
        config = self.config
        rows = read_image_text_csv(
            config.data_path, image_column=config.image_column, text_column=config.caption_column
        ).rows
        if config.image_filter_size:
            large = [row for row in rows if _shorter_side(row.path) >= config.image_filter_size]
            if len(large) < len(rows):
                logger.info(
                    "%d of %d images left out: a side is shorter than image_filter_size %d",
                    len(rows) - len(large), len(rows), config.image_filter_size,
                )  # fmt: skip
            rows = large
        return rows

    def _build_model(self) -> StableDiffusion:
        path = self.config.pretrained_model_path
        check_metadata(open_base_model(path).metadata, self.model_config, path)
        random_unet = self.config.unet_initialize_random
        model = build_model(self.model_config, random=random_unet)
        vae = self.config.vae_ckpt_path
        components = [*(() if random_unet else ("unet",)), *(("vae",) if vae is None else ()), "text_encoder"]
        report = load_base_model(model, path, components, ema=self.config.pretrained_model_ema)
        logger.info("%s: %s", path, report)
        if vae is not None:
            logger.info("%s: %s", vae, load_component(model, vae, "vae", self.model_config))
        return model

    def _choose_trainable(self) -> list[Parameter]:
        """Inject LoRA, or take the whole UNet."""
        config, model = self.config, self.model
        if config.use_lora:
            self.trained_names = inject_lora(model, self.lora_spec)
        else:
            for parameter in model.model.get_parameters():
                parameter.requires_grad = True
        trainable = list(model.trainable_params())
        self._assert_trainable(trainable)
        logger.info(
            "training %s parameters in %d arrays%s",
            f"{sum(p.size for p in trainable):,}", len(trainable),
            f", LoRA in {len(self.trained_names)} layers" if config.use_lora else "",
        )  # fmt: skip
        return trainable

    def _start_from_lora(self, path: str) -> None:
        lora = read_lora(path, self.model_config)
        check_compatible(lora, self.model_config, path)
        set_lora(self.model, lora, path)
        logger.info("training starts from %s: %s", path, lora)

    def _build_step(self, trainable: list[Parameter]) -> TrainStep:
        config, model = self.config, self.model
        unet = model.model.diffusion_model
        set_compute_dtype(unet, self.runtime.compute_dtype)
        if config.enable_flash_attention:
            use_flash_attention(unet, True)
        schedule = NoiseSchedule.from_config(self.model_config)
        loss = DiffusionLoss(unet, schedule, self.model_config.prediction_type)
        if config.lora_ft_text_encoder:
            set_compute_dtype(model.cond_stage_model, self.runtime.compute_dtype)
            loss = TextConditionedLoss(loss, model.cond_stage_model)
        return TrainStep(
            loss,
            trainable,
            betas=tuple(config.betas),
            clip=config.clip_grad,
            use_ema=config.use_ema,
            skip_overflow=self._scales_loss() and config.drop_overflow_update,
            micro_steps=config.gradient_accumulation_steps,
            rank_size=self.runtime.rank_size,
            dropout_key=dropout_key(model),
        )

    def _scales_loss(self) -> bool:
        return self.scaler.dynamic or self.scaler.scale != 1.0

    def _assert_trainable(self, trainable: list[Parameter]) -> None:
        """By name: what slipped in or was left out would be trained, or not, unnoticed. inject_lora looks itself."""
        if self.config.use_lora:
            return
        wanted = {name for name in self.model.parameters_dict() if name.startswith(UNET)}
        found = {parameter.name for parameter in trainable}
        if found != wanted:
            example = sorted(found ^ wanted)[0]
            raise AssertionError(f"{len(found)} trainable parameters, wanted {len(wanted)}; for example {example}")

    def _fingerprint(self, rows: list[Row]) -> dict:
        settings = asdict(self.config)
        settings.update(
            data=content_key("rows", *(part for row in rows for part in (row.path, row.text)))[:16],
            model=content_key("model", repr(self.model_config.content()))[:16],
            base=self._base_identity(),
            rank_size=self.runtime.rank_size,
            precision="fp16" if self.runtime.fp16 else "fp32",
            image_size=self.image_size,
            updates=self.plan.updates,
            lora_config=self._lora_layers()[:16] if self.config.lora_config else None,
        )
        return {name: settings[name] for name in FIXED_ON_RESUME + FOLLOWED_ON_RESUME}

    def _base_identity(self) -> str:
        config = self.config
        vae = "" if config.vae_ckpt_path is None else f"-vae-{base_model_hash(config.vae_ckpt_path)[:16]}"
        return base_model_hash(config.pretrained_model_path)[:16] + "-ema" * config.pretrained_model_ema + vae

    def _lora_layers(self) -> str:
        """A hash of what lora_config says."""
        return content_key("lora_config", repr((self.lora_spec.modules, self.lora_spec.trainable_model)))

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def _state_to_resume(self, trainable: list[Parameter]) -> TrainingState | None:
        where = self.folder if self.config.resume is True else Path(self.config.resume)
        if is_folder(where, "resume"):
            where = where / "ckpt" if is_folder(where / "ckpt", "resume") else where
        wanted = state_shapes(trainable, self.config.use_ema)

        def misfit(state: TrainingState) -> str:
            self._check_same_run(state)
            found = differing_shapes(wanted, state.arrays)
            return f"{state.path} does not fit this run ({found})" if found else ""

        if is_file(where, "resume"):
            state = checkpoints.load_state(where)
            if fault := misfit(state):
                raise UserError(fault)
        else:
            state = checkpoints.load_latest_state(where, misfit)
        if state is None:
            if self.config.resume is True:
                logger.info("resume: %s holds no state yet, so this run starts from the beginning", where)
                return None
            raise UserError(f"resume: {plain(where)} holds no training state (state-<step>.safetensors)")
        for name, text in checkpoints.compare_fingerprints(state.fingerprint, self.fingerprint).items():
            if name not in FIXED_ON_RESUME:
                logger.warning("resume: %s; the new value holds from here", text)
        return state

    def _check_same_run(self, state: TrainingState) -> None:
        differences = checkpoints.compare_fingerprints(state.fingerprint, self.fingerprint)
        fixed = [text for name, text in differences.items() if name in FIXED_ON_RESUME]
        if fixed:
            raise UserError(
                f"{state.path} belongs to another run: {'; '.join(fixed)}. Use the same settings and data, or "
                "start afresh without --resume in another output_path"
            )

    def _is_below(self, path: Path) -> bool:
        """Whether a state is of the run in this output_path."""
        return self.folder.resolve() in path.resolve().parents

    def _take_over(self, state: TrainingState) -> None:
        self.step.load_state(state.arrays)
        self.scaler = make_loss_scaler(self.config, self.runtime, state.scaler)
        self.done = state.step
        logger.info("going on after step %d of %d, from %s", state.step, self.plan.updates, state.path)

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Go through the updates that are left."""
        config = self.config
        logger.info(
            "%d updates of %d x %d x %d images (%.1f epochs of %d rows) on %s in %s",
            self.plan.updates, self.runtime.rank_size, config.gradient_accumulation_steps, config.train_batch_size,
            self.plan.updates / self.plan.steps_per_epoch, self.order.n_rows, self.runtime.device,
            "fp16" if self.runtime.fp16 else "fp32",
        )  # fmt: skip
        self._note("while compiling the step")
        if self.done >= self.plan.updates:
            logger.info("all %d updates are done already, at step %d", self.plan.updates, self.done)
            if not self._newest_link().exists():
                self._save()  # of a state from another folder, or one whose checkpoint was taken away
            return self._newest_link()
        metrics_file = MetricsFile(self.output / "metrics.csv", self.done) if self.is_first_rank else None
        bar = tqdm(
            total=self.plan.updates, initial=self.done, desc="training", unit="step", disable=not self.is_first_rank,
            smoothing=0.1,
        )  # fmt: skip
        smooth_loss, first = None, True
        with bar:
            bar.set_postfix_str("compiling the graph, the first step takes longer")
            while self.done < self.plan.updates:
                begin = time.perf_counter()
                batches = [self.feed() for _ in range(config.gradient_accumulation_steps)]
                # nothing but the step may compile in here, so the batches, which may run the encoders, come first
                with self._cached_graphs() if first else nullcontext():
                    metrics = self._one_update(batches, begin)
                first, self.phase = False, ""
                smooth_loss = metrics.loss if smooth_loss is None else 0.98 * smooth_loss + 0.02 * metrics.loss
                bar.set_postfix_str(f"loss {metrics.loss:.4f}, mean {smooth_loss:.4f}", refresh=False)
                bar.update()
                if metrics_file is not None:
                    metrics_file.write(metrics)
                if self.done % LOG_EVERY == 0 or self.done == self.plan.updates:
                    logger.info(
                        "step %d/%d: loss %.4f (mean %.4f), learning rate %.3g, loss scale %g, %.3f s",
                        metrics.step, self.plan.updates, metrics.loss, smooth_loss, metrics.learning_rate,
                        metrics.loss_scale, metrics.seconds,
                    )  # fmt: skip
                if self.plan.is_save_step(self.done):
                    self._save()
        if metrics_file is not None:
            metrics_file.close()
        if self.scaler.overflows:
            logger.warning(
                "%d of %d steps overflowed%s", self.scaler.overflows, self.plan.updates,
                " and were skipped" if config.drop_overflow_update else "",
            )  # fmt: skip
        logger.info("done: %s", self._newest_link())
        return self._newest_link()

    def _cached_graphs(self) -> AbstractContextManager:
        config, runtime = self.config, self.runtime
        if not config.compile_cache:
            return nullcontext()
        names = (
            "train_batch_size", "use_lora", "lora_ft_unet", "lora_ft_text_encoder", "lora_rank", "lora_alpha",
            "lora_scale", "lora_targets", "lora_dropout", "lora_fp16", "betas", "clip_grad", "use_ema",
            "drop_overflow_update", "gradient_accumulation_steps", "enable_flash_attention", "jit_level", "mode",
        )  # fmt: skip
        key = graph_key(
            {name: getattr(config, name) for name in names}, self.model_config.content(),
            self.image_size, self._scales_loss(), str(runtime), self._lora_layers(),
        )  # fmt: skip
        return cached_graphs(self.output / "cache" / "graphs" / f"rank{runtime.rank}", key)

    def _one_update(self, batches: list[tuple[Tensor, ...]], begin: float) -> Metrics:
        config, scaler = self.config, self.scaler
        rate = learning_rate(
            self.done,
            scheduler=config.scheduler,
            start=config.start_learning_rate,
            end=config.end_learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=self.plan.decay_steps,
        )
        micro_steps = config.gradient_accumulation_steps
        scalars = StepScalars(
            scaler.scale,
            1.0 / (scaler.scale * micro_steps),
            config.max_grad_norm,
            adamw_scalars(scaler.updates + 1, rate, tuple(config.betas), EPSILON, config.weight_decay),
            1.0 - ema_decay_at(scaler.updates, config.ema_decay),
        )
        try:
            result = self.step(batches, scalars, self._dropout_keys())
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the device's memory is not enough for a step with train_batch_size {config.train_batch_size} and "
                f"image_size {self.image_size}: make one of them smaller (gradient_accumulation_steps keeps the sum)"
            ) from error
        self.done += 1
        applied = result.finite or not (self._scales_loss() and config.drop_overflow_update)
        if not result.finite:
            self._check_inputs(batches)  # no smaller scale mends those
        if not math.isfinite(result.loss) and not self.runtime.fp16 or (applied and not result.finite):
            raise UserError(
                f"the loss or its gradients are not finite at step {self.done} (loss {result.loss}): "
                f"{self._cause()}; {self._way_on()}"
            )
        used_scale = scaler.scale
        scaler.after_step(result.finite, applied)
        if not result.finite:
            logger.warning(
                "step %d overflowed at loss scale %g; skipped, the scale is now %g", self.done, used_scale, scaler.scale
            )
        return Metrics(self.done, result.loss, rate, used_scale, time.perf_counter() - begin, result.gradient_norm)

    def _check_inputs(self, batches: list[tuple[Tensor, ...]]) -> None:
        """Raise UserError where what an image or caption was encoded to is not finite."""
        micro_steps = self.config.gradient_accumulation_steps
        for i, (latents, _, _, condition) in enumerate(batches):
            rows = self.order.indices((self.done - 1) * micro_steps + i)
            for what, array in (("latents", latents.asnumpy()), ("text embeddings", condition.asnumpy())):
                bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
                if len(bad):
                    path = self.inputs.rows[rows[bad[0]]].path
                    raise UserError(
                        f"the {what} of {plain(path)} are not finite at step {self.done}: look at that image and its "
                        f"caption, remove {self.output / 'cache'}, or try --precision fp32; {self._way_on()}"
                    )

    def _cause(self) -> str:
        """Why a step from finite inputs may have a loss that is not finite, and what to do."""
        for parameter in self.model.get_parameters():
            if not parameter.requires_grad and not np.isfinite(parameter.asnumpy()).all():
                return (
                    f"{parameter.name} of {self.config.pretrained_model_path} holds values that are not finite: "
                    "take another checkpoint"
                )
        if self.last_state is not None:
            arrays, _ = read_checkpoint(self.last_state)
            largest = max(np.abs(array).max() for name, array in arrays.items() if name.startswith("p."))
            if not largest <= HUGE:  # not finite either
                return (
                    f"the weights were as large as {largest:.3g} in {self.last_state} already: go on from a state "
                    "before it with a lower start_learning_rate, or start again"
                )
        way = "lower start_learning_rate, or set clip_grad"
        if self.runtime.rank_size > 1:
            way += f", or see {self.output}/log-*.txt: another process's inputs may be at fault"
        return way

    def _dropout_keys(self) -> list[np.ndarray]:
        """One for each micro-step, a function of its number."""
        micro_steps = self.config.gradient_accumulation_steps
        return [
            draws(self.config.seed, "lora_dropout", self.done * micro_steps + i, self.runtime.rank).integers(
                -(2**31), 2**31, 2, dtype=np.int32
            )
            for i in range(micro_steps)
        ]

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the weights, then the state: a state on disk has its weights beside it."""
        if not self.is_first_rank:
            return
        state = TrainingState(self.done, self.step.state(), self.scaler.state(), self.fingerprint)
        try:
            checkpoints.check_finite(state.arrays, f"nothing is saved at step {self.done}, as what was trained")
            if self.began_at is not None:
                self.own_files.set_aside_later(self.began_at)
                self.began_at = None
            self._write_files(state)
        except UserError as error:
            raise UserError(f"{error}; {self._way_on()}") from error
        logger.debug("saved step %d in %s", self.done, self.folder)

    def _write_files(self, state: TrainingState) -> None:
        writers = {"lora": self._write_lora} if self.config.use_lora else {"model": self._write_model}
        if self.lora_spec.trainable_model:  # the base that this LoRA belongs to
            writers["model"] = self._write_model
        names = [Numbered(kind, self.done).name for kind in (*writers, "state")]
        self.own_files.begin([*names, *(f"{kind}.ckpt" for kind in writers)])
        for (kind, write), name in zip(writers.items(), names):
            write(self.folder / name)
            _link(self.folder / name, self.folder / f"{kind}.ckpt")
        self.last_state = checkpoints.save_state(self.folder, state)
        for kind in writers:
            self.own_files.prune(kind, self.config.ckpt_max_keep)
        self.own_files.prune("state", checkpoints.STATES_KEPT)

    def what_is_done(self) -> str:
        """For the line that an interrupted run ends with."""
        return f"{self.phase or f'after step {self.done} of {self.plan.updates}'}; {self._way_on()}"

    def _note(self, phase: str) -> None:
        self.phase = phase

    def _way_on(self) -> str:
        if self.last_state is None:
            return "what was saved before stays" if self.config.resume else "nothing was saved yet"
        own = self.last_state.parent == self.folder
        return f"--resume {True if own else self.last_state} goes on from {self.last_state}"

    def _newest_link(self) -> Path:
        return self.folder / ("lora.ckpt" if self.config.use_lora else "model.ckpt")

    def _write_model(self, path: Path) -> None:
        """The whole model, so that text_to_image.py takes it as --ckpt_path; the UNet's moving average if there is.
        Without LoRA, which has its own file.
        """
        arrays = {name: parameter.asnumpy() for name, parameter in self.model.parameters_dict().items()}
        arrays.update(self.step.averages())
        arrays = {name: array for name, array in arrays.items() if "lora_" not in name}
        metadata = {
            "architecture": self.model_config.architecture,
            "prediction_type": self.model_config.prediction_type,
            "step": str(self.done),
            **tokens_metadata(self.model_config.added_tokens),
        }
        write_checkpoint(path, arrays, metadata)

    def _write_lora(self, path: Path) -> None:
        """The factors alone (their moving averages if there are), with what a reader must know of the base."""
        mindone.write(path, get_lora(self.model, self.model_config, self.step.averages()))


def _check_nothing_is_lost(config: TrainSettings) -> None:
    folder = Path(config.output_path) / "ckpt"
    # Not overwritten: a forgotten --resume would cost what was trained so far.
    if not config.resume and find_states(folder):
        raise UserError(
            f"{folder} holds the training states of an earlier run: go on with --resume True, or choose another "
            "--output_path (or remove the folder)"
        )


def _model_config(config: TrainSettings) -> ModelConfig:
    if config.model_config is not None:
        return config_with_tokens(load_model_config(under_root(config.model_config)), config.pretrained_model_path)
    model = detect_model_config(
        config.pretrained_model_path,
        way_out="add --model_config, configs/v2-inference.yaml or configs/v2-vpred-inference.yaml for SD2.x",
    )
    logger.info("%s is a model of %s", config.pretrained_model_path, model.path)
    return model


def _shorter_side(path: Path) -> int:
    with Image.open(path, formats=FORMATS) as image:
        return min(image.size)


def make_lora_spec(config: TrainSettings) -> LoRASpec:
    """What to inject, by the settings and their lora_config. Raises UserError for a lora_config that is wrong."""
    spec = LoRASpec(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        scale=config.lora_scale,
        unet=config.lora_ft_unet,
        text_encoder=config.lora_ft_text_encoder,
        targets=tuple(config.lora_targets),
        fp16=config.lora_fp16,
        seed=config.seed,
        dropout=config.lora_dropout,
    )
    return spec if config.lora_config is None else spec.with_config(under_root(config.lora_config))


def make_loss_scaler(config: TrainSettings, runtime: Runtime, state: dict | None = None) -> LossScaler:
    """The scaler that the settings ask for; `state` is LossScaler.state() of the run that goes on."""
    kind = config.loss_scaler_type
    if kind == "auto":
        kind = "dynamic" if runtime.fp16 else "none"
    if kind == "dynamic" and not config.drop_overflow_update:
        raise UserError(
            "drop_overflow_update False does not go with a dynamic loss scale, which finds its size by overflows (fp16 "
            "has one unless told otherwise): leave it True, or set loss_scaler_type static with a small init_loss_scale"
        )
    scaler = LossScaler(
        scale=1.0 if kind == "none" else config.init_loss_scale,
        dynamic=kind == "dynamic",
        factor=config.loss_scale_factor,
        window=config.scale_window,
    )
    if state is not None:
        for name in ("good_steps", "overflows_in_a_row", "overflows", "updates"):
            setattr(scaler, name, state[name])
        if scaler.dynamic and state["dynamic"]:
            scaler.scale = state["scale"]
    return scaler


def _link(path: Path, link: Path) -> None:
    """Let `link` name the content of `path`: a hard link, or a copy where the file system has none."""
    with writing(link), atomic_path(link) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
