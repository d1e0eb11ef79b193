"""The two sides of a comparison: training a LoRA and drawing images, with this project and with diffusers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.files.inputs import content_hash
from ldm.settings.declare import names_of
from ldm.settings.model import ModelConfig
from ldm.settings.train import TrainSettings
from tools.eval.comparison.experiment import Experiment
from tools.eval.comparison.jobs import Worker, run_command, script


class Ours:
    """This project's side: its published scripts."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    def train(self, settings: TrainSettings, start: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Train the LoRA. Returns its place, its hash, the seconds and the peak memory."""
        inputs = self.experiment
        usage = run_command(
            sys.executable, script("train_text_to_image.py"), "--train_config", inputs.args.train_config,
            *inputs.flags, "--data_path", str(inputs.training_folder), "--pretrained_model_path", str(inputs.base),
            "--output_path", str(folder), "--seed", str(settings.seed), "--precision", "fp32",
            "--loss_scaler_type", "none", "--lora_init_path", str(inputs.start_lora(settings.seed)), "--resume", "True",
        )  # fmt: skip
        return {**usage, **_lora_entry(folder, "ckpt/lora.ckpt")}

    def draw(self, lora: Path | None, folder: Path) -> dict[str, Any]:
        """Draw all held-out prompts into a folder. Returns the hash of the images, the seconds and the peak memory."""
        inputs = self.experiment
        usage = run_command(
            sys.executable, script("text_to_image.py"), *inputs.generate_flags, "--ckpt_path", str(inputs.base),
            "--data_path", str(inputs.held_out / "prompts.txt"),
            "--init_latents", str(inputs.held_out / "latents.npy"),
            "--sampling_steps", str(inputs.args.sampling_steps), "--scale", str(inputs.scale),
            "--H", str(inputs.image_size), "--W", str(inputs.image_size), "--precision", "fp32",
            "--batch_size", str(inputs.batch_size), "--output_path", str(folder), "--skip_grid",
            *(["--lora_ckpt_path", str(lora)] if lora else []),
        )  # fmt: skip
        return {**usage, "sha256": _images_hash(folder)}


class Diffusers:
    """The side of diffusers: jobs for diffusers_worker.py."""

    def __init__(self, experiment: Experiment, worker: Worker):
        self.experiment, self.worker = experiment, worker
        self.model = {
            "base": str(experiment.diffusers_base),
            "pad_token": experiment.config.pad_token,
            "added_tokens": experiment.config.added_tokens,
        }

    def train(self, settings: TrainSettings, start: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Train the LoRA. Returns its place, its hash, the seconds and the peak memory."""
        inputs = self.experiment
        plan = inputs.plan(settings)
        job = {
            **{name: getattr(settings, name) for name in names_of(TrainSettings, shared_with_diffusers=True)},
            **self.model,
            "lora": str(inputs.start_lora(settings.seed)),
            "trained_parameters": start["parameters"],
            "rows": [[str(row.path), row.caption] for row in inputs.rows],
            "image_size": inputs.image_size,
            "batch_size": settings.train_batch_size,
            "micro_batches": settings.gradient_accumulation_steps,
            "steps": plan.steps,
            "warmup_steps": plan.warmup_steps,
            "decay_steps": plan.decay_steps,
            **settings.resolved(),
        }
        return {**self.worker.run("train", folder, job), **_lora_entry(folder, "pytorch_lora_weights.safetensors")}

    def draw(self, lora: Path | None, folder: Path) -> dict[str, Any]:
        """Draw all held-out prompts into a folder. Returns the hash of the images, the seconds and the peak memory."""
        inputs = self.experiment
        job = {
            **self.model,
            "lora": None if lora is None else str(lora),
            "prompts": inputs.prompts,
            "latents": str(inputs.held_out / "latents.npy"),
            "sampling_steps": inputs.args.sampling_steps,
            "scale": inputs.scale,
            "image_size": inputs.image_size,
            "batch_size": inputs.batch_size,
        }
        return {**self.worker.run("generate", folder, job), "sha256": _images_hash(folder)}


def write_start_lora(config: ModelConfig, settings: TrainSettings, path: Path) -> dict[str, Any]:
    """Write the untrained LoRA that both sides start from. Returns its hash and its number of parameters."""
    from ldm.lora.formats import write_lora
    from ldm.lora.inject import get_lora, inject_lora
    from ldm.models.stable_diffusion import build_model
    from ldm.training.setup import make_lora_spec

    model = build_model(config, random=False)
    inject_lora(model, make_lora_spec(settings))
    lora = get_lora(model, config)
    write_lora(path, lora, "diffusers", config)
    parameters = sum(layer.down.size + layer.up.size for layer in lora.layers.values())
    return {"sha256": content_hash(path), "parameters": parameters}


def write_diffusers_base(base: Path, config: ModelConfig, folder: Path) -> None:
    """Write the base model as a diffusers folder in fp32.

    Unlike `ldm.weights.convert.convert`, it accepts an autoencoder whose first convolution is narrower than diffusers'
    can be, like that of the nano model. diffusers_worker.py loads such a folder.
    """
    from ldm.weights.base_model import map_base_model, open_base_model
    from ldm.weights.convert import fit_networks, write_diffusers_folder
    from ldm.weights.load import check_metadata

    checkpoint = open_base_model(base)
    check_metadata(checkpoint.metadata, config, base)
    canonical, shapes, _ = fit_networks(checkpoint, map_base_model(checkpoint), config)
    write_diffusers_folder(folder, canonical, shapes, config, "fp32")


def _lora_entry(folder: Path, name: str) -> dict[str, Any]:
    return {"lora": name, "sha256": content_hash(folder / name)}


def _images_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((folder / "samples").glob("*.png")):
        digest.update(np.asarray(Image.open(path)).tobytes())
    return digest.hexdigest()
