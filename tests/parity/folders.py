"""Diffusers folders made by diffusers itself, and images drawn from them on both sides."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

import text_to_image
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import ModelConfig
from ldm.tokenizer.tokenizer import END_TEXT, START_TEXT, vocabulary
from tests.named_weights import named_weight
from tests.parity.reference import Reference

diffusers.utils.logging.disable_progress_bar()


def named_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """The networks' parameters as functions of their names."""
    shapes = {p.name: tuple(p.shape) for p in build_model(config, random=False).get_parameters()}
    return {name: named_weight(name, shape) for name, shape in shapes.items()}


def make_pipeline(config: ModelConfig, place: Path) -> StableDiffusionPipeline:
    """diffusers' own pipeline of the model with named weights; the tokenizer's files are written to `place`."""
    reference = Reference(config, named_weights(config))
    words = vocabulary()
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps(words.ids), encoding="utf-8")
    (place / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in words.ranks), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        str(place / "vocab.json"), str(place / "merges.txt"), bos_token=START_TEXT, eos_token=END_TEXT,
        unk_token=END_TEXT, pad_token=END_TEXT if config.pad_token == "end" else "!", model_max_length=77,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=config.timesteps, beta_start=config.linear_start, beta_end=config.linear_end,
        beta_schedule=config.beta_schedule, steps_offset=1, prediction_type=config.prediction_type,
    )  # fmt: skip
    reference.vae.register_to_config(scaling_factor=config.scale_factor)
    return StableDiffusionPipeline(
        vae=reference.vae, text_encoder=reference.text, tokenizer=tokenizer, unet=reference.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def draw_with_diffusers(
    folder: Path,
    prompts: Sequence[str],
    negative: Sequence[str],
    latents: np.ndarray,
    steps: int,
    scale: float,
    lora: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Final latents and images (N, H, W, 3) uint8 of StableDiffusionPipeline.from_pretrained(folder)."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    settings = dict(
        prompt=list(prompts),
        negative_prompt=list(negative),
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
    )
    final = pipeline(latents=torch.from_numpy(latents), **settings).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
    images = pipeline.image_processor.postprocess(decoded, output_type="np")
    del pipeline
    gc.collect()
    return final.numpy(), np.round(images * 255).astype(np.uint8)


def draw_with_ours(
    folder: Path,
    prompts: Sequence[str],
    negative: Sequence[str],
    latents: np.ndarray,
    steps: int,
    scale: float,
    output: Path,
    *more: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The same by text_to_image.py, from the folder as it is."""
    output.mkdir(parents=True)
    np.save(output / "start.npy", latents)
    for name, lines in (("prompts", prompts), ("negative", negative)):
        (output / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    text_to_image.main([
        "--ckpt_path", str(folder), "--data_path", str(output / "prompts.txt"),
        "--negative_data_path", str(output / "negative.txt"), "--init_latents", str(output / "start.npy"),
        "--save_latents", str(output / "final.npy"), "--sampling_steps", str(steps), "--scale", str(scale),
        "--output_path", str(output), "--skip_grid", "--device_target", "CPU", "--precision", "fp32",
        "--log_level", "WARNING", *more,
    ])  # fmt: skip
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((output / "samples").glob("*.png"))]
    return np.load(output / "final.npy"), np.stack(images)


def largest_pixel_difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs).max())
