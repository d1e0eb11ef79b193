"""Draw images for prompts: python text_to_image.py --prompt "a cat" (-h lists every setting)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.runtime.script import progress, run, start

if __name__ == "__main__":  # before the imports that take seconds
    start()

import numpy as np  # noqa: E402

from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.generation.image_files import SampleWriter, read_latents, starting_latents_path, write_latents  # noqa: E402
from ldm.generation.plan import GenerationPlan, plan_generation  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.generate import GenerateSettings  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.weights.base_model import base_model_hash  # noqa: E402
from ldm.weights.checkpoint import content_hash  # noqa: E402

logger = logging.getLogger("ldm.text_to_image")

CALL_PIXELS = 8 * 512 * 512  # of a network call where batch_size is not given


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check everything that can be checked without a network, then draw."""
    config = read_settings(
        GenerateSettings,
        sys.argv[1:] if argv is None else argv,
        prog="text_to_image.py",
        description="Draw images for prompts with Stable Diffusion, a LoRA merged into it where one is given.",
    )
    set_up_logging(config.log_level, prefix=False)
    job = plan_generation(config)
    latents = config.save_latents
    starting = None if latents is None else starting_latents_path(latents)
    with (
        claim_folder(config.output_path, "output_path"),
        claim_file(latents, "save_latents"),
        claim_file(starting, "save_latents"),
    ):
        draw(config, job)


def draw(config: GenerateSettings, job: GenerationPlan) -> None:
    """Load the model and the LoRAs, draw the images of `job` and write them."""
    progress(lambda: "before the first image")
    # MindSpore takes seconds to import: not before the settings are known to be right, and the runtime first.
    from ldm.runtime.device import check_flash_attention, setup_runtime  # isort: skip
    from ldm.lora.lora import Strength  # isort: skip
    from ldm.weights.architecture import config_with_tokens  # isort: skip
    from ldm.generation.pipeline import Pipeline, Sampling, apply_chosen, check_sampling, choose_lora, load_model  # isort: skip

    job.config = config_with_tokens(job.config, job.checkpoint)
    height, width = config.H or job.config.image_size, config.W or job.config.image_size
    sampling = Sampling(
        sampler=config.sampler,
        steps=config.sampling_steps,
        scale=job.guidance_scale,
        eta=config.ddim_eta,
        height=height,
        width=width,
        batch_size=batch_size(config, height, width),
    )
    shape = check_sampling(sampling, job.config)
    starting = None
    if config.init_latents is not None:
        starting = read_latents(config.init_latents, (len(job.prompts), *shape))

    runtime = setup_runtime(config.device_target, config.mode, config.jit_level, config.precision, config.seed)
    check_flash_attention(config.enable_flash_attention, runtime)
    # Before the base, which takes longer to read.
    chosen = [
        choose_lora(job.config, file.path, config.lora_ft_unet, config.lora_ft_text_encoder) for file in job.loras
    ]
    for file, lora in zip(job.loras, chosen):
        if config.lora_rank is not None and lora.ranks() != [config.lora_rank]:
            logger.warning("lora_rank %d is not used: %s is %s", config.lora_rank, file.path, lora)
    model = load_model(
        job.config,
        job.checkpoint,
        runtime.compute_dtype,
        job.unet_checkpoint,
        config.enable_flash_attention,
        config.ckpt_ema,
        job.vae_checkpoint,
    )
    for file, lora in zip(job.loras, chosen):
        weights = Strength(
            file.strength, file.strength if file.text_encoder_strength is None else file.text_encoder_strength
        )
        apply_chosen(model, lora, file.path, weights)

    settings = {
        "sampler": sampling.sampler,
        "sampling_steps": sampling.steps,
        "scale": sampling.scale,
        "ddim_eta": sampling.eta,
        "H": height,
        "W": width,
        "precision": "fp16" if runtime.fp16 else "fp32",
        "prediction_type": job.config.prediction_type,
    }
    writer = SampleWriter(
        config.output_path,
        job.prompts,
        job.negative_prompts,
        job.images_per_prompt,
        {**provenance(config, job), "settings": settings},
        pngs=not config.skip_save,
        grid=not config.skip_grid,
    )
    progress(writer.progress)
    latents = []
    pipeline = Pipeline(model)
    for batch in pipeline.generate(job.prompts, sampling, config.seed, job.negative_prompts, starting):
        writer.add(batch.indices, batch.images)
        if config.save_latents is not None:
            latents.append((batch.starting_latents, batch.latents))
    writer.finish()
    report(config, job, writer)
    if latents:
        write_latents(config.save_latents, *(np.concatenate(part) for part in zip(*latents)))
        logger.info("latents: %s, starting ones: %s", config.save_latents, starting_latents_path(config.save_latents))


def batch_size(config: GenerateSettings, height: int, width: int) -> int:
    """Images a network call: as asked for; else n_samples as published, at least 16 where they are small, and no more
    than CALL_PIXELS hold: a thousand at once would end in the system's killing the process.
    """
    if config.batch_size is not None:
        return config.batch_size
    wanted = max(config.n_samples, 16) if height * width <= 128 * 128 else config.n_samples
    return max(1, min(wanted, CALL_PIXELS // (height * width)))


def provenance(config: GenerateSettings, job: GenerationPlan) -> dict[str, Any]:
    """What a PNG says about where it comes from: enough to make it again."""
    texts: dict[str, Any] = {
        "seed": str(config.seed),
        "model": job.version or job.config.architecture,
        "model_config": Path(job.config.path).name,
        "checkpoint": job.checkpoint.name,
        "checkpoint_sha256": base_model_hash(job.checkpoint),
    }
    if config.ckpt_ema:
        texts["checkpoint_ema"] = "True"
    for name, path in (("unet_checkpoint", job.unet_checkpoint), ("vae_checkpoint", job.vae_checkpoint)):
        if path is not None:
            texts[name] = path.name
            texts[f"{name}_sha256"] = base_model_hash(path)
    if job.loras:
        parts = {"lora_ft_unet": config.lora_ft_unet, "lora_ft_text_encoder": config.lora_ft_text_encoder}
        texts["lora"] = [
            {
                "file": file.path.name,
                "sha256": lora_hash(file.path),
                "weight": file.strength,
                **({} if file.text_encoder_strength is None else {"text_encoder_weight": file.text_encoder_strength}),
                **parts,
            }
            for file in job.loras
        ]
    if config.init_latents is not None:
        texts["init_latents"] = Path(config.init_latents).name
        texts["init_latents_sha256"] = content_hash(config.init_latents)
    return texts


def lora_hash(path: Path) -> str:
    """The SHA-256 of a LoRA's file; of a folder, those of its files one after another."""
    from ldm.lora.formats import lora_files

    return " ".join(content_hash(file) for file in lora_files(path))


def report(config: GenerateSettings, job: GenerationPlan, writer: SampleWriter) -> None:
    """Say what was written and where."""
    for path in writer.kept_as:
        logger.info("kept from an earlier run: %s", path)
    if not config.skip_save:
        logger.info("%d images: %s", len(job.prompts), writer.samples)
    if not config.skip_grid:
        logger.info("grid: %s", writer.grid_path)


if __name__ == "__main__":
    run(main)
