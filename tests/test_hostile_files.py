"""Every setting that names a file: whatever is there instead of the file, the error is one line that names it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

import text_to_image
import train_text_to_image
from ldm.errors import LONGEST_MESSAGE, UserError, plain
from tools.eval import eval_clip_score, eval_fid
from tools.lora import convert_lora, cvtckpt, extract_lora, lora_add, resize_lora
from tools.model_conversion import convert_weights

ROOT = Path(__file__).resolve().parents[1]
NANO = str(ROOT / "models" / "nano" / "nano.safetensors")
IMAGES = str(ROOT / "datasets" / "emoji_fluent_hc" / "test")

GENERATE = "--prompt x --device_target CPU --output_path out"
TRAIN = f"--data_path {IMAGES} --pretrained_model_path {NANO} --use_lora True --device_target CPU --output_path out"
# The program, its other flags, and the flag of the file. The last one of repeated flags counts.
FILES = [
    (text_to_image.main, "--device_target CPU --output_path out", "data_path"),
    *((text_to_image.main, GENERATE, name) for name in (
        "generate_config", "negative_data_path", "init_latents", "config", "ckpt_path", "unet_ckpt_path",
        "vae_ckpt_path", "lora_ckpt_path", "ti_ckpt_path")),
    *((train_text_to_image.main, TRAIN, name) for name in (
        "train_config", "data_path", "pretrained_model_path", "vae_ckpt_path", "model_config", "lora_config",
        "lora_init_path", "resume")),
    (eval_fid.main, "--save_stats out.npz", "real_dir"),
    (eval_fid.main, f"--real_dir {IMAGES} --gen_dir {IMAGES}", "ckpt_path"),
    (eval_clip_score.main, "--prompt_or_path x", "image_path_or_dir"),
    (eval_clip_score.main, f"--prompt_or_path x --image_path_or_dir {IMAGES}", "ckpt_path"),
    (convert_lora.main, "", "source"),
    (resize_lora.main, "--rank 1 --target out.ckpt", "source"),
    (lora_add.main, "--mode sum --output_path out.ckpt", "paths"),
    (cvtckpt.main, "--mode extract --out_ckpt out.ckpt", "model_ckpt"),
    (cvtckpt.main, f"--mode merge --model_ckpt {NANO} --out_ckpt out.ckpt", "lora_ckpt"),
    (extract_lora.main, f"--base_model {NANO} --save_path out.ckpt", "target_model"),
    (convert_weights.main, "--target out.ckpt", "source"),
]  # fmt: skip
OBSTACLES = ("missing", "pipe", "link to a pipe", "device", "circle of links", "over-long", "zeros", "another's")


def make_obstacle(kind: str, folder: Path) -> str:
    """Create what is there instead of a file, and return its path."""
    path = folder / kind.replace(" ", "-").replace("'", "")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "circle of links":
        path.symlink_to(path)
    elif kind == "over-long":
        path = path.with_name("y" * 300)
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    elif kind == "another's":
        path.mkdir()
        (path / "inside").touch()
        path.chmod(0)
        path = path / "inside"
    return str(path)


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("main, others, flag", FILES, ids=[f"{main.__module__}-{flag}" for main, _, flag in FILES])
def test_an_unsuitable_file_is_named_in_one_line(main, others, flag, obstacle, unprivileged, monkeypatch):
    monkeypatch.chdir(unprivileged)
    path = make_obstacle(obstacle, unprivileged)
    arguments = [*others.split(), f"--{flag}", path]
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    try:
        with pytest.raises(UserError) as error:
            main() if main is train_text_to_image.main else main(arguments)
    finally:
        for handler in list(logging.getLogger("ldm").handlers):
            logging.getLogger("ldm").removeHandler(handler)
    message = str(error.value)
    assert Path(path).name[:60] in message or flag in message
    assert len(message) < LONGEST_MESSAGE and plain(message, LONGEST_MESSAGE) == message
    assert ":" in message.replace(path, "")  # what, and the way out
    if obstacle == "another's":
        assert "Permission denied" in message
    if obstacle in ("pipe", "link to a pipe", "device"):
        assert "a pipe" in message or "a device" in message or "not a f" in message
