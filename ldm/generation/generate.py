"""The work of text_to_image.py: plan, load the model and the LoRAs, generate images and write them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.diffusion.sampling import latent_shape
from ldm.files.inputs import content_hash
from ldm.files.outputs import claim_file, claim_folder
from ldm.generation.image_files import ImageWriter, read_latents, starting_latents_path, write_latents
from ldm.generation.plan import GenerationPlan, LoRAFile, plan_generation
from ldm.runtime import peers
from ldm.runtime.logs import set_up_logging
from ldm.runtime.parallel import is_scheduler, output_to_file, process_index
from ldm.runtime.script import describe_progress
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import ModelConfig
from ldm.weights.architecture import config_with_tokens
from ldm.weights.base_model import base_model_hash

if TYPE_CHECKING:
    from ldm.generation.pipeline import ImageBatch, Pipeline
    from ldm.runtime.device import Runtime

    OpenModel = Callable[..., Pipeline]

logger = logging.getLogger(__name__)


def generate(settings: GenerateSettings, open_model: OpenModel | None = None) -> None:
    """Generate the images that the settings describe, and write them to `settings.output_path`.

    Everything that needs no network is checked first, without MindSpore, and the outputs are claimed. With
    use_parallel, every process calls this, and the first one alone claims and writes the outputs.

    Args:
        settings: See GenerateSettings.
        open_model: Takes the arguments of Pipeline.from_checkpoint, and may return the pipeline of an earlier call,
            without learned tokens. None for Pipeline.from_checkpoint.

    Raises:
        UserError: A setting, a file or an output does not fit. Nothing is written then.
    """
    plan = plan_generation(settings)
    if settings.use_parallel and (is_scheduler() or process_index() > 0):
        generate_plan(settings, plan, open_model)
        return
    latents = settings.save_latents
    starting_latents = None if latents is None else starting_latents_path(latents)
    with (
        claim_folder(settings.output_path, "output_path"),
        claim_file(latents, "save_latents"),
        claim_file(starting_latents, "save_latents"),
    ):
        generate_plan(settings, plan, open_model)


def generate_plan(settings: GenerateSettings, plan: GenerationPlan, open_model: OpenModel | None = None) -> None:
    """Load the model and the LoRAs of a plan, generate its images and write them."""
    describe_progress(lambda: "before the first image")
    # MindSpore takes seconds to import, so these modules are imported when the settings are known to be right.
    from ldm.runtime.device import setup_runtime

    config = config_with_tokens(plan.config, plan.checkpoint)
    starting_latents = None
    if settings.init_latents is not None:
        shape = (len(plan.prompts), *latent_shape(config, plan.sampling.height, plan.sampling.width))
        starting_latents = read_latents(settings.init_latents, shape)

    runtime = setup_runtime(
        settings.device_target,
        settings.mode,
        settings.jit_level,
        settings.precision,
        settings.seed,
        settings.use_parallel,
    )
    process = runtime.process_index
    with nullcontext() if process == 0 else output_to_file(Path(settings.output_path) / f"log-{process}.txt"):
        if process:
            set_up_logging("WARNING")  # the other processes would repeat the first one
            describe_progress(None)
        _generate_images(settings, plan, config, starting_latents, runtime, open_model)


def _generate_images(
    settings: GenerateSettings,
    plan: GenerationPlan,
    config: ModelConfig,
    starting_latents: np.ndarray | None,
    runtime: Runtime,
    open_model: OpenModel | None,
) -> None:
    """Load the model and the LoRAs, and generate this process's share of the images. The first process writes all."""
    from ldm.generation.loading import select_lora
    from ldm.generation.pipeline import Pipeline
    from ldm.lora.merged import MergedLoRA, SamplingRange
    from ldm.lora.strength import Strength
    from ldm.runtime.device import decide_flash_attention, describe_runtime

    flash_attention = decide_flash_attention(settings.enable_flash_attention, runtime)
    logger.info("%s", describe_runtime(runtime, flash_attention))
    # The LoRAs are read before the base model, which takes longer, so that a wrong file is reported early.
    loras = [
        select_lora(config, file.path, settings.lora_ft_unet, settings.lora_ft_text_encoder) for file in plan.loras
    ]
    for file, lora in zip(plan.loras, loras):
        if settings.lora_rank is not None and lora.ranks() != [settings.lora_rank]:
            logger.warning("lora_rank %d is not used: %s is %s", settings.lora_rank, file.path, lora)
    pipeline = (open_model or Pipeline.from_checkpoint)(
        plan.checkpoint,
        config=config,
        unet=plan.unet_checkpoint,
        vae=plan.vae_checkpoint,
        ema=settings.ckpt_ema,
        flash_attention=flash_attention,
    )
    for embedding_file in plan.embeddings:
        pipeline.add_embeddings(embedding_file.embeddings, str(embedding_file.path))
    pipeline.merge_loras(
        [
            MergedLoRA(
                str(file.path),
                lora,
                Strength(file.strength, file.text_encoder_strength, file.blocks),
                SamplingRange.from_ends(file.start, file.end),
            )
            for file, lora in zip(plan.loras, loras)
        ]
    )

    batches = pipeline.generate(
        plan.prompts,
        plan.sampling,
        settings.seed,
        plan.negative_prompts,
        starting_latents,
        progress=runtime.process_index == 0,
        process_index=runtime.process_index,
        process_count=runtime.process_count,
    )
    batch_count = math.ceil(len(plan.prompts) / plan.sampling.batch_size)
    if batch_count < runtime.process_count:
        logger.warning(
            "%d processes, but only %d batches of %d images: the other processes have nothing to do; a smaller "
            "--batch_size gives more batches",
            runtime.process_count,
            batch_count,
            plan.sampling.batch_size,
        )
    gathered = peers.gather_batches(
        _arrays(batches, settings.save_latents is not None), math.ceil(batch_count / runtime.process_count)
    )
    if runtime.process_index:
        for _ in gathered:  # this generates the images and sends them to the first process
            pass
    else:
        _write(settings, plan, runtime.precision, gathered)


def _arrays(batches: Iterable[ImageBatch], with_latents: bool) -> Iterable[list[np.ndarray]]:
    for batch in batches:
        yield [batch.indices, batch.images, *([batch.starting_latents, batch.latents] if with_latents else [])]


def _write(
    settings: GenerateSettings, plan: GenerationPlan, precision: str, batches: Iterable[tuple[np.ndarray, ...]]
) -> None:
    """Write images and latents. `batches`: indices and images of each batch, and its starting and final latents."""
    writer = ImageWriter(
        settings.output_path,
        plan.prompts,
        plan.negative_prompts,
        plan.images_per_prompt,
        _metadata(settings, plan, precision),
        pngs=not settings.skip_save,
        grid=not settings.skip_grid,
    )
    describe_progress(writer.progress)
    latents: list[tuple[np.ndarray, ...]] = []
    for indices, images, *of_batch in batches:
        writer.add(indices, images)
        if settings.save_latents is not None:
            latents.append(tuple(of_batch))
    writer.finish()
    for path in writer.renamed:
        logger.info("kept from an earlier run: %s", path)
    if not settings.skip_save:
        logger.info("%d images: %s", len(plan.prompts), writer.samples)
    if not settings.skip_grid:
        logger.info("grid: %s", writer.grid_path)
    if settings.save_latents is not None:
        starting, final = (np.concatenate(arrays) for arrays in zip(*latents))
        write_latents(settings.save_latents, starting, final)
        logger.info("latents: %s, starting: %s", settings.save_latents, starting_latents_path(settings.save_latents))


def _metadata(settings: GenerateSettings, plan: GenerationPlan, precision: str) -> dict[str, Any]:
    """Return what a PNG's text fields hold besides the prompts: enough to make the image again.

    File names without their folders: an image is passed on, and the folders of its maker are private.
    """
    metadata: dict[str, Any] = {
        "seed": str(settings.seed),
        "model": plan.version or plan.config.architecture,
        "model_config": Path(plan.config.path).name,
        "checkpoint": plan.checkpoint.name,
        "checkpoint_sha256": base_model_hash(plan.checkpoint),
    }
    if settings.ckpt_ema:
        metadata["checkpoint_ema"] = "True"
    for name, path in (("unet_checkpoint", plan.unet_checkpoint), ("vae_checkpoint", plan.vae_checkpoint)):
        if path is not None:
            metadata[name] = path.name
            metadata[f"{name}_sha256"] = base_model_hash(path)
    if plan.loras:
        metadata["lora"] = [_lora_metadata(settings, file) for file in plan.loras]
    if plan.embeddings:
        metadata["textual_inversion"] = [
            {"file": file.path.name, "sha256": content_hash(file.path), "tokens": [e.token for e in file.embeddings]}
            for file in plan.embeddings
        ]
    if settings.init_latents is not None:
        metadata["init_latents"] = Path(settings.init_latents).name
        metadata["init_latents_sha256"] = content_hash(settings.init_latents)
    metadata["settings"] = {
        **plan.sampling.fields(),
        "H": plan.sampling.height,
        "W": plan.sampling.width,
        "precision": precision,
        "prediction_type": plan.config.prediction_type,
    }
    if plan.sampling.guidance_rescale is not None:
        metadata["settings"]["guidance_rescale"] = plan.sampling.guidance_rescale
    return metadata


def _lora_metadata(settings: GenerateSettings, file: LoRAFile) -> dict[str, Any]:
    from ldm.lora.formats import lora_files  # imports MindSpore

    metadata: dict[str, Any] = {
        "file": file.path.name,
        "sha256": " ".join(content_hash(path) for path in lora_files(file.path)),
        "weight": file.strength,
    }
    if file.text_encoder_strength != file.strength:
        metadata["text_encoder_weight"] = file.text_encoder_strength
    if file.blocks is not None:
        metadata["block_weights"] = file.blocks.text
    for name, share in (("start", file.start), ("end", file.end)):
        if share is not None:
            metadata[name] = share
    parts = {"lora_ft_unet": settings.lora_ft_unet, "lora_ft_text_encoder": settings.lora_ft_text_encoder}
    return {**metadata, **parts}
