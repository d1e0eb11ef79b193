"""A mistake in the settings is reported before MindSpore is imported, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import ROOT

# Calls both scripts with mistakes, and prints their errors and whether MindSpore was imported.
ANSWERS = """
import json, sys
import text_to_image, train_text_to_image
from ldm.errors import UserError
answers = []
for script, *argv in json.loads(sys.argv[1]):
    sys.argv = [script, *argv]
    try:
        {"generate": text_to_image, "train": train_text_to_image}[script].main()
    except UserError as error:
        answers.append(str(error))
print(json.dumps([answers, "mindspore" in sys.modules]))
"""

NANO = ["--train_config", "configs/train/train_config_lora_nano.yaml"]
DATA = ["--data_path", str(ROOT / "datasets" / "emoji_fluent_hc")]
BASE = ["--pretrained_model_path", str(ROOT / "models" / "nano" / "nano.safetensors")]


def test_mistakes_are_answered_without_mindspore(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "date.yaml").write_text("seed: 2020-13-45\n")
    text = (ROOT / "configs" / "nano.yaml").read_text()
    (tmp_path / "huge.yaml").write_text(text.replace("timesteps: 1000", "timesteps: 1000000000000"))
    mistakes = {
        "H is 100: this model takes multiples of 16": ["generate", "--prompt", "x", "--H", "100"],
        "sampling_steps is 5000: give a number from 1": ["generate", "--prompt", "x", "--sampling_steps", "5000"],
        "init_latents pipe is a pipe (FIFO)": ["generate", "--prompt", "x", "--init_latents", "pipe"],
        "data_path pipe is a pipe (FIFO)": ["generate", "--data_path", "pipe"],
        "ckpt_path pipe is a pipe (FIFO)": ["generate", "--prompt", "x", "--ckpt_path", "pipe"],
        "lora_ckpt_path pipe is a pipe (FIFO)": ["generate", "--prompt", "x", "--lora_ckpt_path", "pipe"],
        "model configuration huge.yaml: model.params.timesteps": ["generate", "--prompt", "x", "--config", "huge.yaml"],
        'date.yaml: seed: "2020-13-45" is not a whole number': ["train", "--train_config", "date.yaml"],
        "--train_config pipe is a pipe (FIFO)": ["train", "--train_config", "pipe"],
        "--data_path is needed: give the data set": ["train", *NANO],
        "data_path nowhere does not exist": ["train", *NANO, "--data_path", "nowhere", *BASE],
        "pretrained_model_path pipe is a pipe (FIFO)": ["train", *NANO, *DATA, "--pretrained_model_path", "pipe"],
        "configuration huge.yaml: model.params.timesteps: 1000000000000 is not allowed": [
            "train",
            *NANO,
            *DATA,
            *BASE,
            "--model_config",
            "huge.yaml",
        ],
        "image_size 70 must be a multiple of 16": ["train", *NANO, *DATA, *BASE, "--image_size", "70"],
        "lora_init_path pipe is a pipe (FIFO)": ["train", *NANO, *DATA, *BASE, "--lora_init_path", "pipe"],
    }
    run = subprocess.run(
        [sys.executable, "-c", ANSWERS, json.dumps(list(mistakes.values()))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers, imported = json.loads(run.stdout)
    assert len(answers) == len(mistakes)
    assert [(expected, answer) for expected, answer in zip(mistakes, answers) if expected not in answer] == []
    assert not imported
