"""The checkpoint folder: what a save writes, replaces and keeps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.files.atomic import temporary_path
from ldm.lora.formats import read_lora
from ldm.training.checkpoints import remove_leftovers
from ldm.training.own_files import find_states
from ldm.training.trainer import save
from tests.training.micro import FULL, prepare, write_velocity_config

LORA = dict(use_lora=True, lora_rank=2, max_steps=3)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_at(run, *steps) -> None:
    for run.status.steps_done in steps:
        save(run)


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(settings, saved_run):
    run = prepare(settings(saved_run, **{**FULL, "max_steps": 20}, resume=True))
    state = run.step.state()
    name = next(iter(state))
    run.step.load_state({**state, name: np.full_like(state[name], np.nan)})
    before = contents(saved_run / "ckpt")
    with pytest.raises(UserError, match=f"nothing is saved at step 12.* not finite.*continues from .*-{12:08d}.safet"):
        save(run)
    assert contents(saved_run / "ckpt") == before


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_loras_file_says_whether_it_was_trained_to_noise_alone(settings, tmp_path, zero_terminal_snr):
    config = write_velocity_config(tmp_path / "velocity.yaml")
    run = prepare(settings(tmp_path / "run", **LORA, model_config=config, zero_terminal_snr=zero_terminal_snr))
    save_at(run, 1)
    lora = read_lora(tmp_path / "run" / "ckpt" / "lora.ckpt")
    assert lora.zero_terminal_snr == zero_terminal_snr and lora.metadata["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("file", ["lora-00000003.ckpt", "state-00000003.safetensors", "lora.ckpt", "files.json"])
def test_a_full_disk_is_one_line_with_the_last_state(settings, empty_run, monkeypatch, file):
    run = prepare(settings(empty_run, **LORA))
    folder = empty_run / "ckpt"
    run.status.steps_done, run.status.last_state = 3, folder / "state-00000001.safetensors"
    replace = os.replace

    def full(old, new):
        if Path(new).name == file:
            raise OSError(28, "No space left on device", str(old))
        replace(old, new)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError) as caught:
        save(run)
    message = str(caught.value)
    assert file in message and "No space left on device" in message and "\n" not in message
    assert message.endswith(f"--resume True continues from {folder}/state-00000001.safetensors")
    assert not list(empty_run.rglob("*.partial*"))


def test_files_that_the_run_did_not_write_are_kept(settings, empty_run):
    """Whatever their names."""
    folder = empty_run / "ckpt"
    folder.mkdir()
    names = ["lora-best.ckpt", "lora-mystyle-v1.ckpt", "lora-00000001.ckpt", "lora.ckpt", "lora-00000002.ckpt"]
    for name in names:
        (folder / name).write_text(name)
    (folder / "state-00000003.safetensors").mkdir()
    save_at(prepare(settings(empty_run, **LORA, ckpt_max_keep=1)), 1, 2, 3)
    assert read_lora(folder / "lora.ckpt").layers
    kept = {*names[:2], "lora-00000001-kept.ckpt", "lora-kept.ckpt", "lora-00000002-kept.ckpt"}
    assert {path.name for path in folder.iterdir()} == {
        *kept, "state-00000003-kept.safetensors", "lora.ckpt", "lora-00000003.ckpt", "state-00000002.safetensors",
        "state-00000003.safetensors", "files.json", "lora.safetensors", "lora-step00000003.safetensors",
    }  # fmt: skip
    assert {(folder / name).read_text() for name in kept} == set(names)


def test_an_interrupted_save_is_written_again(settings, empty_run, monkeypatch):
    """Killed between the LoRA of step 3 and its state, which is not the state of another run."""
    monkeypatch.setattr("ldm.training.sharing.time.time", lambda: 1e9)
    save_at(prepare(settings(empty_run, **LORA)), 1, 2, 3)
    folder = empty_run / "ckpt"
    whole = contents(folder)
    find_states(folder)[0].unlink()
    run = prepare(settings(empty_run, **LORA, resume=True))
    assert run.status.steps_done == 2
    save_at(run, 3)
    del whole["files.json"]
    assert {**contents(folder), **whole} == contents(folder)
    assert not list(folder.glob("abandoned*"))


def test_half_written_files_of_a_killed_process_are_removed_and_no_others(tmp_path):
    names = ("lora-00000009.ckpt", "model-123456789.ckpt", "state-00000009.safetensors", "metrics.csv", "files.json",
             "report.html", "run.json", "style-step00000009.safetensors", "my style.safetensors")  # fmt: skip
    leftovers = {temporary_path(tmp_path / name).name for name in names}
    leftovers |= {".lora-00000009.77.partial.ckpt", ".metrics.7.partial.csv"}  # of earlier versions
    others = {".my.77.partial.ckpt", "lora-00000009.ckpt", ".lora-best.77.partial.ckpt"}
    others |= {temporary_path(tmp_path / name).name for name in ("mine.safetensors", "my style.ckpt")}
    for name in (*leftovers, *others):
        (tmp_path / name).touch()
    (tmp_path / ".state-00000009.7.partial.safetensors").mkdir()
    remove_leftovers(tmp_path, "my style")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".state-00000009.7.partial.safetensors"}
