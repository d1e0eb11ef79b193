"""From settings to everything that a run needs. `set_up` reads from top to bottom as the recipe of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.data.batches import BatchOrder
from ldm.data.draws import draws
from ldm.data.preparation import prepare_data, read_listing
from ldm.data.training_data import TrainingData
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError, plain
from ldm.files.paths import under_root, writing
from ldm.generation.loading import load_model
from ldm.lora.dropout import dropout_key, set_process
from ldm.lora.formats import read_lora
from ldm.lora.inject import factors_cast_to, inject_lora, set_lora
from ldm.lora.lora import LoRA
from ldm.lora.merge import check_compatible
from ldm.lora.spec import LoRASpec
from ldm.models.attention import set_attention
from ldm.models.layers import hold_frozen_weights, set_compute_dtype
from ldm.models.stable_diffusion import StableDiffusion
from ldm.ops import bf16_unit, multiplies_bf16
from ldm.runtime.device import GRAPH, Runtime, decide_flash_attention, describe_runtime, setup_runtime
from ldm.runtime.logs import set_up_logging
from ldm.runtime.precision import automatic_precision
from ldm.settings.model import ModelConfig
from ldm.settings.read import save_settings
from ldm.settings.train import TrainSettings
from ldm.textual_inversion.embedding import Embedding
from ldm.textual_inversion.inject import extended_table, initial_vectors, make_tokenizer, put_embeddings
from ldm.training.advice import give_advice
from ldm.training.agreement import check_same_start
from ldm.training.checkpoints import Checkpoints, remove_leftovers
from ldm.training.checks import (
    base_model,
    check_settings,
    image_size,
    keeps_text_encoder_in_fp32,
    read_model_config,
    trained_timesteps,
    trains_base_model,
)
from ldm.training.class_images import add_class_images
from ldm.training.feed import Feed, check_sink, make_feed
from ldm.training.inputs import Inputs
from ldm.training.loss_scale import LossScaler, make_loss_scaler
from ldm.training.optimizers import Optimizer, make_optimizer
from ldm.training.plan import RunPlan, make_plan
from ldm.training.rates import Rates, make_rates
from ldm.training.resume import check_no_earlier_run, find_state_to_resume, make_fingerprint, precision_to_resume
from ldm.training.sample_prompts import read_sample_prompts
from ldm.training.samples import Samples
from ldm.training.sharing import SharedFile, first_start
from ldm.training.status import Status
from ldm.training.step import TrainStep, state_shapes
from ldm.training.step_graphs import LossFromTokens
from ldm.training.validation import Validation, make_validation
from ldm.training.weight_norms import norm_limit
from ldm.weights.base_weights import BaseWeights

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run."""

    settings: TrainSettings
    runtime: Runtime
    model: StableDiffusion
    lora_spec: LoRASpec
    plan: RunPlan
    fingerprint: dict[str, Any]  # what a training state is compared by
    inputs: Inputs
    feed: Feed  # returns the next micro-batch
    optimizer: Optimizer
    rates: Rates
    step: TrainStep
    reads_late: bool  # whether the result of a step is read after the next step is launched
    skips_overflow: bool  # whether a step whose gradients overflow changes nothing
    scaler: LossScaler
    checkpoints: Checkpoints
    status: Status
    validation: Validation | None  # None without held-out images
    samples: Samples  # the images that it draws meanwhile
    earlier_validation: dict[str, Any] | None  # of the training state, which those of a run without validation pass on

    @property
    def output(self) -> Path:
        return Path(self.settings.output_path)

    @property
    def is_first_process(self) -> bool:
        """Whether this process logs and saves."""
        return self.runtime.process_index == 0


def begin(settings: TrainSettings) -> Runtime:
    """Check the settings, which all processes do alike, then set up MindSpore and wait for the other processes."""
    check_settings(settings)
    check_no_earlier_run(settings)
    set_up_logging(settings.log_level)
    return setup_runtime(
        settings.device_target, settings.mode, settings.jit_level, settings.precision, settings.seed,
        settings.use_parallel, lambda: _automatic_precision(settings),
    )  # fmt: skip


def _automatic_precision(settings: TrainSettings) -> str:
    """Return what precision "auto" stands for on the CPU. A run that is resumed keeps what it was begun in."""
    keeps_fp32 = trains_base_model(settings)
    begun_in = precision_to_resume(settings)
    if begun_in in ("fp32", "bf16") and not keeps_fp32:
        return begun_in
    return automatic_precision(multiplies_bf16, keeps_fp32)


def _log_resumed_precision(settings: TrainSettings, runtime: Runtime) -> None:
    """Say that a resumed run keeps a precision which is not that of a new run on this machine."""
    if not settings.resume or settings.precision != "auto" or runtime.is_ascend or settings.mode != GRAPH:
        return
    precision = automatic_precision(multiplies_bf16, trains_base_model(settings))
    if runtime.precision == precision:
        return
    if runtime.bf16:
        logger.warning(
            "resume: precision bf16, in which this run was begun. Without kernels that multiply it, the run goes on "
            "more slowly, and not bit for bit as with them"
        )
    else:
        logger.info("resume: precision %s, in which this run was begun; auto is %s", runtime.precision, precision)


def set_up(settings: TrainSettings, runtime: Runtime, status: Status) -> Run:
    """Build everything that a run needs, and keep `status` up to date meanwhile.

    Raises UserError if a setting, a file or the data is wrong. What can be wrong is checked before the images are
    encoded, which may take hours.
    """
    output, is_first_process = Path(settings.output_path), runtime.process_index == 0
    check_no_earlier_run(settings)  # again, as the folder is claimed only now
    flash_attention = decide_flash_attention(settings.enable_flash_attention, runtime)
    check_sink(settings, runtime)
    if is_first_process:
        set_up_logging(settings.log_level, output / "log.txt")
        logger.info("%s", describe_runtime(runtime, flash_attention, bf16_unit))
        _log_resumed_precision(settings, runtime)
    else:
        set_up_logging("WARNING")  # the other processes would repeat the first one

    config = read_model_config(settings)
    image_size(settings, config)  # raises UserError if it does not fit the model
    trained_timesteps(settings, config)
    settings.check_prediction_type(config.prediction_type, plain(config.path))
    sample_prompts = read_sample_prompts(settings, config, settings.zero_terminal_snr)
    base_weights = BaseWeights(base_model(settings), ema=settings.pretrained_model_ema)
    listing = read_listing(settings)
    # Loaded early if it has to draw class images.
    load_base = cache(lambda: _load_base_model(settings, config, runtime))
    listing = add_class_images(listing, settings, config, runtime, load_base, flash_attention, status)
    data, held_out = prepare_data(listing, settings, config, output / "cache" / "images.json")
    settings.check_held_out(held_out is not None)
    order = make_order(settings, runtime, data)
    plan = make_plan(settings, order.steps_per_epoch)
    status.total_steps = plan.steps
    scaler = make_loss_scaler(settings, runtime.fp16)
    lora_spec = make_lora_spec(settings)
    if settings.zero_terminal_snr and lora_spec.trainable_model:
        raise UserError(
            "zero_terminal_snr does not go with trainable_model in lora_config: a LoRA's file says that it was trained "
            "so, a model's does not. Leave one of them out"
        )
    if settings.placeholder_token is not None and lora_spec.trainable_model:
        raise UserError(
            "placeholder_token does not go with trainable_model in lora_config, which trains the base model: leave one "
            "of them out"
        )
    fingerprint = make_fingerprint(settings, runtime, config, data, plan, lora_spec)
    if settings.advise and is_first_process and not settings.trains_token_alone:  # the advice is on LoRA and the UNet
        give_advice(data, settings, config, plan, runtime.process_count)
    if is_first_process:
        remove_leftovers(status.folder, settings.share_name)
        remove_leftovers(output)

    model = load_base()
    trainable = choose_trainable(settings, model, lora_spec)
    set_process(model, runtime.process_index)
    optimizer, rates = make_optimizer(settings), make_rates(settings, [p.name for p in trainable], lora_spec)
    state = find_state_to_resume(settings, fingerprint, state_shapes(trainable, settings.use_ema, optimizer))
    if state is not None:
        status.last_state = state.path
    elif settings.lora_init_path is not None:
        lora = read_lora(settings.lora_init_path, config)
        check_compatible(lora, config, settings.lora_init_path)
        set_lora(model, lora, settings.lora_init_path)
        set_token(settings, model, lora)
        logger.info("training starts from %s: %s", settings.lora_init_path, lora)
        if lora.zero_terminal_snr and not settings.zero_terminal_snr:
            logger.warning("%s was trained with zero_terminal_snr, and this run is not", settings.lora_init_path)
    check_same_start(fingerprint, state, trainable)
    if is_first_process:
        with writing(output / "train_args.yaml"):
            # Not train_config, because the file holds all settings itself, nor resume, because a new run has no states,
            # nor cache_only, because the file is for training.
            save_settings(settings, output / "train_args.yaml", leave_out=("train_config", "resume", "cache_only"))

    inputs = Inputs(settings, model, data, order, plan.steps, status)
    skips_overflow = scaler.is_used and settings.drop_overflow_update
    saves_base = trains_base_model(settings)  # then checkpoints hold its weights
    step = build_step(
        settings, runtime, model, trainable,
        flash_attention=flash_attention, skips_overflow=skips_overflow, saves_base_model=saves_base,
        rates=rates,
    )  # fmt: skip
    if state is not None:
        step.load_state(state.arrays)
        scaler.load_state(state.scaler)
        status.steps_done = state.step
        logger.info("continuing after step %d of %d, from %s", state.step, plan.steps, state.path)
    micro_batches = settings.gradient_accumulation_steps
    feed = make_feed(
        inputs, status.steps_done * micro_batches, plan.steps * micro_batches, settings.dataset_sink_mode,
        ahead=micro_batches if runtime.is_ascend else 0,
    )  # fmt: skip
    resumed_here = settings.resume is True or (
        state is not None and state.path is not None and status.folder.resolve() in state.path.resolve().parents
    )
    shared = None
    if settings.use_lora and settings.share_name is not None and is_first_process:
        shared = SharedFile(
            settings, runtime, config, data, 0 if held_out is None else len(held_out), order, plan, fingerprint,
            first_start(state),
        )  # fmt: skip
    checkpoints = Checkpoints(
        settings, model,
        saves_base_model=saves_base, resumed_here=resumed_here, start=status.steps_done, shared=shared,
    )  # fmt: skip
    validation = make_validation(
        settings, runtime, model, inputs, held_out, plan, step, checkpoints, status, state
    )  # fmt: skip
    samples = Samples(
        sample_prompts, settings, runtime, model, base_weights, plan, step, checkpoints, status, resumed_here
    )
    return Run(
        settings, runtime, model, lora_spec, plan, fingerprint, inputs, feed, optimizer, rates, step,
        runtime.is_ascend, skips_overflow, scaler, checkpoints, status, validation, samples,
        None if state is None else state.validation,
    )  # fmt: skip


def _load_base_model(settings: TrainSettings, config: ModelConfig, runtime: Runtime) -> StableDiffusion:
    """Load the base model. In bf16, weights that are held so are never in memory in fp32."""
    return load_model(
        config,
        base_model(settings),
        vae=settings.vae_ckpt_path,
        ema=settings.pretrained_model_ema,
        random_unet=settings.unet_initialize_random,
        prepare=(lambda model: _hold_in_bf16(settings, model)) if runtime.bf16 else None,
    )


def _hold_in_bf16(settings: TrainSettings, model: StableDiffusion) -> None:
    """Hold weights in bf16 as generation does, so that samples and class images are the same."""
    networks = [model.model, model.cond_stage_model]
    if keeps_text_encoder_in_fp32(settings):
        networks = [model.model]
    for network in networks:
        hold_frozen_weights(network, ms.bfloat16)
    set_attention(model.model, bf16=True)


def make_order(settings: TrainSettings, runtime: Runtime, data: TrainingData) -> BatchOrder:
    """Return the order in which the processes of a run see the rows."""
    several = len(data.buckets.sizes) > 1
    files = data.file_of_row() if settings.shuffle_buffer_size else None
    if settings.shuffle_buffer_size and files is None:
        logger.warning("shuffle_buffer_size has no effect: each image has a file of its own, so they are all shuffled")
    return BatchOrder(
        len(data), settings.train_batch_size, settings.seed, runtime.process_index, runtime.process_count,
        of_row=data.buckets.of_row if several else None, repeats=data.buckets.repeats, fill=data.fills_batches,
        file_of_row=files, buffer_size=0 if files is None else settings.shuffle_buffer_size,
    )  # fmt: skip


def make_lora_spec(settings: TrainSettings) -> LoRASpec:
    """Build the specification of the LoRA layers. Raises UserError if lora_config is invalid."""
    spec = LoRASpec(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        scale=settings.lora_scale,
        unet=settings.lora_ft_unet,
        text_encoder=settings.lora_ft_text_encoder,
        targets=tuple(settings.lora_targets),
        fp16=settings.lora_fp16,
        seed=settings.seed,
        dropout=settings.lora_dropout,
        algo=settings.algo,
        dora_wd=settings.dora_wd,
        rs_lora=settings.rs_lora,
        factor=settings.factor,
        use_tucker=settings.use_tucker,
        rank_dropout=settings.rank_dropout,
        module_dropout=settings.module_dropout,
        conv_rank=settings.conv_dim,
        conv_alpha=settings.conv_alpha,
    )
    return spec if settings.lora_config is None else spec.with_config(under_root(settings.lora_config))


def choose_trainable(settings: TrainSettings, model: StableDiffusion, lora_spec: LoRASpec) -> list[Parameter]:
    """Inject LoRA and the learned token, or unfreeze the whole UNet, and return the parameters that are trained.

    Args:
        settings: Those of the run, of which `use_lora` and `placeholder_token` decide.
        model: The networks, all of whose parameters are frozen.
        lora_spec: The LoRA to inject.
    """
    layers = ""
    if settings.use_lora:
        layers = f", LoRA in {len(inject_lora(model, lora_spec))} layers"
    if settings.placeholder_token is not None:
        embedding = inject_token(settings, model)
        layers += f", the learned token {embedding}"
    elif not settings.use_lora:
        for parameter in model.model.get_parameters():
            parameter.requires_grad = True
    trainable = list(model.trainable_params())
    logger.info("training %s parameters in %d arrays%s", f"{sum(p.size for p in trainable):,}", len(trainable), layers)
    return trainable


def inject_token(settings: TrainSettings, model: StableDiffusion) -> Embedding:
    """Put the token that is learned into the text encoder, to be trained, and return it with its first vectors.

    Raises:
        UserError: The model knows the token already, or initializer_token has no tokens, or more than num_vectors.
    """
    token = settings.placeholder_token
    assert token is not None
    tokenizer, rng = make_tokenizer(model), draws(settings.seed, "learned token", 0)
    if any(added.text.lower() == token.lower() for added in model.config.added_tokens):
        raise UserError(f"placeholder_token {plain(token, 60)} is a token of the base model already: choose another")
    embedding = Embedding(
        token, initial_vectors(model, tokenizer, settings.initializer_token, settings.num_vectors, rng)
    )
    put_embeddings(model, [embedding])
    table = extended_table(model)
    assert table is not None
    table.learned.weight.requires_grad = True
    return embedding


def set_token(settings: TrainSettings, model: StableDiffusion, lora: LoRA) -> None:
    """Continue with the vectors that a LoRA's file has for the token that is learned.

    Raises:
        UserError: They are of another number or width.
    """
    vectors = lora.embeddings.get(settings.placeholder_token or "")
    if vectors is None:
        return
    table = extended_table(model)
    assert table is not None
    if vectors.shape != table.learned.weight.shape:
        raise UserError(
            f"{settings.lora_init_path}: its token {plain(settings.placeholder_token)} has vectors {vectors.shape}, "
            f"here they are {table.learned.weight.shape}: set num_vectors {len(vectors)}, or another placeholder_token"
        )
    table.learned.weight.set_data(Tensor(np.array(vectors, np.float32)))


def build_step(
    settings: TrainSettings,
    runtime: Runtime,
    model: StableDiffusion,
    trainable: list[Parameter],
    *,
    flash_attention: bool,
    skips_overflow: bool,
    saves_base_model: bool,
    rates: Rates | None = None,
) -> TrainStep:
    """Set the precision and the attention of the networks that are trained, and build the step that trains them.

    Args:
        settings: Those of the run.
        runtime: What setup_runtime returned.
        model: The networks.
        trainable: What choose_trainable returned.
        flash_attention: Whether the UNet uses Ascend's fused attention (ldm.runtime.device.decide_flash_attention).
        skips_overflow: Whether a step whose gradients overflow changes nothing.
        saves_base_model: Whether checkpoints hold the networks' own weights, frozen ones too, which then keep fp32.
        rates: The rates of the parameters, None if they are equal.
    """
    unet = model.model.diffusion_model
    set_compute_dtype(unet, runtime.compute_dtype)
    set_attention(unet, flash_attention, runtime.bf16)
    schedule = NoiseSchedule.from_config(model.config, settings.zero_terminal_snr)
    loss: nn.Cell = DiffusionLoss(unet, schedule, model.config.prediction_type, settings)
    if settings.trains_text_encoder:
        set_compute_dtype(model.cond_stage_model, runtime.compute_dtype)
        loss = LossFromTokens(loss, model.cond_stage_model)
    if runtime.fp16 and not saves_base_model:
        hold_frozen_weights(loss, runtime.compute_dtype)
    limit = None
    if settings.scale_weight_norms is not None:
        limit = norm_limit(model, settings.scale_weight_norms)
    return TrainStep(
        loss,
        trainable,
        optimizer=make_optimizer(settings),
        rate_factors=None if rates is None else rates.factors,
        norm_limit=limit,
        clip=settings.clip_grad,
        use_ema=settings.use_ema,
        skip_overflow=skips_overflow,
        micro_batches=settings.gradient_accumulation_steps,
        process_count=runtime.process_count,
        shard_of=runtime.process_index if settings.shard_optimizer and runtime.process_count > 1 else None,
        dropout_key=dropout_key(model),
        saturates=runtime.saturates and runtime.fp16,
        read_in_fp16=factors_cast_to(model, ms.float16),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
