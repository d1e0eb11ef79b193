"""Runs of a model of 16 pixels, which compile and train in seconds, for the tests of training."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor
from PIL import Image

from ldm.models.stable_diffusion import build_model
from ldm.runtime.device import setup_runtime
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.setup import Run, begin, set_up
from ldm.training.status import Status
from ldm.training.step import UnreadResult
from ldm.weights.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests" / "training" / "micro.yaml"
UNET = "model.diffusion_model."
STEPS = 12
# In fp32 on every machine, because tests compare with the weights of the base model's file. test_bf16.py has the other
# precision, and the published recipe in test_trainer.py what a user has.
SETTINGS = {
    "model_config": str(MICRO), "image_size": 16, "train_batch_size": 2, "step_mode": True, "ckpt_save_interval": 3,
    "device_target": "CPU", "precision": "fp32",
}  # fmt: skip
# The whole UNet, with all that a training state holds.
FULL = {
    "max_steps": STEPS, "use_ema": True, "ema_decay": 0.9, "clip_grad": True, "caption_dropout": 0.3,
    "scheduler": "cosine", "start_learning_rate": 1e-3, "warmup_steps": 2, "ckpt_max_keep": 2,
}  # fmt: skip


def write_base_model(path: Path) -> None:
    """Write a base model with random weights."""
    setup_runtime("CPU", seed=3)
    model = build_model(load_model_config(MICRO))
    write_checkpoint(path, {name: p.asnumpy() for name, p in model.parameters_dict().items()})


def write_velocity_config(path: Path) -> str:
    """Write the configuration of the micro model as one that predicts velocity, and return its path."""
    text = MICRO.read_text(encoding="utf-8")
    path.write_text(text.replace("  params:\n", "  params:\n    parameterization: v\n", 1), encoding="utf-8")
    return str(path)


def write_data(folder: Path) -> None:
    """Write ten plain images with captions. The last one is small."""
    rows = ["dir,text"]
    for i in range(10):
        size = 8 if i == 9 else 24
        Image.new("RGB", (size, size + 4), (25 * i, 128, 255 - 25 * i)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,an image of colour {i}")
    (folder / "img_txt.csv").write_text("\n".join(rows) + "\n")


def command(base_model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """The command that trains FULL."""
    paths = {"pretrained_model_path": base_model, "data_path": data, "output_path": output}
    arguments = [f"--{name}={value}" for name, value in {**SETTINGS, **FULL, **paths}.items()]
    return [sys.executable, "train_text_to_image.py", *arguments, *flags]


def prepare(settings: TrainSettings, status: Status | None = None) -> Run:
    """Set up a run in this process without training a step."""
    runtime = begin(settings)
    return set_up(settings, runtime, status or Status(Path(settings.output_path) / "ckpt", bool(settings.resume)))


def unread(loss: float, norm: float, finite: bool) -> UnreadResult:
    """What a step returns that has this result."""
    return UnreadResult((), Tensor(np.array([loss, norm, finite], np.float32)))


def metrics(output: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
