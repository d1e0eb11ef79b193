"""The lessons as processes, with a model that compiles and trains in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from tests.conftest import ROOT
from tests.training.micro import MICRO, write_base_model


class Small(NamedTuple):
    """What replaces the nano model, its recipe and its data."""

    base_model: Path
    train_config: Path
    data: Path


def write_small(folder: Path) -> Small:
    """Write a base model with its YAML beside it, a recipe of two steps, and a data folder."""
    base_model, train_config, data = folder / "micro.safetensors", folder / "recipe.yaml", folder / "data"
    write_base_model(base_model)
    base_model.with_suffix(".yaml").write_text(MICRO.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = {
        "use_lora": True, "lora_targets": ["all"], "lora_rank": 2, "model_config": str(MICRO), "train_batch_size": 2,
        "max_steps": 2, "step_mode": True, "start_learning_rate": 0.1,
    }  # fmt: skip
    train_config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    data.mkdir()
    rows = ["dir,text"]
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 128, 255 - 60 * i)).save(data / f"{i}.png")
        rows.append(f"{i}.png,an image of colour {i}")
    (data / "img_txt.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Small(base_model, train_config, data)


def run_lesson(name: str, small: Small, output: Path, *flags: str) -> str:
    """Run a lesson in another folder than the project's, and return what it printed."""
    command = [
        sys.executable, str(ROOT / "examples" / f"{name}.py"), "--output_path", output.name,
        "--base_model", str(small.base_model), "--train_config", str(small.train_config), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def images(*files: Path) -> np.ndarray:
    """The pixels of images, (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
