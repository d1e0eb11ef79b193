"""train_text_to_image.py as a command: what a run leaves, and that a killed one ends as if it had not been killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.own_files import find_states
from ldm.training.training_state import load_state
from ldm.weights.checkpoint import read_checkpoint
from ldm.weights.load import load_base_model
from tests.training.micro import MICRO, ROOT, STEPS, UNET, command, metrics


def test_a_run_leaves_its_log_metrics_settings_and_checkpoints(full_run):
    rows = metrics(full_run)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(0 < float(row["loss"]) < 10 and float(row["seconds"]) > 0 for row in rows)
    assert float(rows[0]["learning_rate"]) == pytest.approx(5e-4) and float(rows[2]["learning_rate"]) == 1e-3
    assert f"step {STEPS}/{STEPS}" in (full_run / "log.txt").read_text()
    settings = yaml.safe_load((full_run / "train_args.yaml").read_text())
    assert settings["ema_decay"] == 0.9 and settings["max_steps"] == STEPS
    assert sorted(path.name for path in (full_run / "ckpt").iterdir()) == [
        "files.json", "model-00000009.ckpt", "model-00000012.ckpt", "model.ckpt",
        "state-00000009.safetensors", "state-00000012.safetensors",
    ]  # fmt: skip
    newest = (full_run / "ckpt" / "model-00000012.ckpt").read_bytes()
    assert (full_run / "ckpt" / "model.ckpt").read_bytes() == newest


def test_the_saved_settings_are_a_recipe(full_run):
    argv = ["--train_config", str(full_run / "train_args.yaml")]
    settings = read_settings(TrainSettings, argv, yaml_flag="train_config")
    assert settings.resolved()["betas"] == [0.9, 0.999] and settings.use_ema


def test_the_checkpoint_is_a_whole_model_with_the_averages_as_its_unet(full_run, micro_base_model):
    path = full_run / "ckpt" / "model.ckpt"
    assert load_base_model(build_model(load_model_config(MICRO)), path).ok
    arrays, metadata = read_checkpoint(path)
    assert (metadata["architecture"], metadata["prediction_type"]) == ("custom", "epsilon")
    state = load_state(full_run / "ckpt" / f"state-{STEPS:08d}.safetensors").arrays
    before, _ = read_checkpoint(micro_base_model)
    assert before.keys() == arrays.keys()
    for name, array in arrays.items():
        if name.startswith(UNET):
            np.testing.assert_array_equal(array, state[f"ema.{name}"], err_msg=name)
            assert not np.array_equal(array, before[name]), name
        else:
            np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_a_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(full_run, micro_base_model, micro_data, tmp_path):
    """The graph is cached here, and was not in the uninterrupted run."""
    output = tmp_path / "run"
    moment = random.SystemRandom().choice(range(1, STEPS))
    print(f"killed after step {moment}")
    arguments = command(micro_base_model, micro_data, output, "--compile_cache")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (output / "metrics.csv").exists() or len(metrics(output)) < moment:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    saved = find_states(output / "ckpt")
    done = subprocess.run([*arguments, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if saved:
        assert "continuing after step" in done.stderr
    for name in (f"model-{STEPS:08d}.ckpt", "model.ckpt", f"state-{STEPS:08d}.safetensors"):
        (expected, _), (arrays, _) = read_checkpoint(full_run / "ckpt" / name), read_checkpoint(output / "ckpt" / name)
        assert expected.keys() == arrays.keys()
        for array in expected:
            np.testing.assert_array_equal(arrays[array], expected[array], err_msg=f"{name} {array}")
    for expected_row, row in zip(metrics(full_run), metrics(output)):
        assert {**row, "seconds": 0} == {**expected_row, "seconds": 0}
    assert not list(output.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--lora_ranks", "4"], "error: unknown setting --lora_ranks: did you mean --lora_rank?"),
        (["--train_config", "configs/train/train_config_lora_v1.yaml"], "error: --data_path is needed"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(flags, error):
    done = subprocess.run(
        [sys.executable, "train_text_to_image.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert error in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_help_lists_the_settings():
    done = subprocess.run(
        [sys.executable, "train_text_to_image.py", "-h"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for word in ("--use_lora", "--resume", "--loss_scaler_type", "[4]"):
        assert word in done.stdout
