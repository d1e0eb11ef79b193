"""Training states: the newest sound one is taken, damage is noticed and named."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.training.checkpoints import (
    TrainState,
    compare_fingerprints,
    find_states,
    load_latest_state,
    load_state,
    prune,
    remove_remains,
    save_state,
    set_aside_later,
)


def state(step, value=1.0):
    arrays = {"p.a": np.full((2, 3), value, np.float32), "m.a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return TrainState(step, arrays, {"scale": 2.0, "updates": step}, {"seed": 1, "betas": [0.9, 0.99]})


def test_a_state_is_read_back(tmp_path):
    path = save_state(tmp_path, state(7, 0.1))
    found = load_latest_state(tmp_path)
    assert (found.step, found.scaler, found.fingerprint, found.path) == (
        7, {"scale": 2.0, "updates": 7}, {"seed": 1, "betas": [0.9, 0.99]}, path,
    )  # fmt: skip
    for name, array in state(7, 0.1).arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_the_newest_are_kept_and_the_newest_is_taken(tmp_path):
    for step in (5, 10, 100, 20):
        save_state(tmp_path, state(step), keep=2)
    assert [path.name for path in find_states(tmp_path)] == ["state-00000100.safetensors", "state-00000020.safetensors"]
    assert load_latest_state(tmp_path).step == 100


def test_no_state_is_no_error(tmp_path):
    assert load_latest_state(tmp_path) is None
    assert load_latest_state(tmp_path / "missing") is None


def _cut(data):
    return data[: len(data) // 2]


def _flip(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda data: b"", lambda data: b"not a state"])
def test_a_damaged_newest_state_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage):
    save_state(tmp_path, state(5))
    newest = save_state(tmp_path, state(10))
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert load_latest_state(tmp_path).step == 5
    assert newest.name in caplog.text
    with pytest.raises(UserError, match=newest.name):
        load_state(newest)


def test_if_all_are_damaged_it_says_so(tmp_path):
    save_state(tmp_path, state(5)).write_bytes(b"")
    with pytest.raises(UserError, match="none of its 1 training states"):
        load_latest_state(tmp_path)


def test_another_safetensors_file_is_no_state(tmp_path):
    from ldm.weights.read import write_checkpoint

    write_checkpoint(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path / "a.safetensors")


def test_pruning_goes_by_the_step_and_leaves_other_files(tmp_path):
    for name in ("lora-00000009.ckpt", "lora-00000010.ckpt", "lora-00000100.ckpt", "lora.ckpt", "model-00000001.ckpt"):
        (tmp_path / name).touch()
    prune(tmp_path, "lora-*.ckpt", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lora-00000010.ckpt", "lora-00000100.ckpt", "lora.ckpt", "model-00000001.ckpt",
    ]  # fmt: skip


def test_what_another_run_left_beyond_the_step_is_moved_aside_and_said(tmp_path, caplog):
    for step in (200, 500, 600):
        save_state(tmp_path, state(step), keep=3)
        (tmp_path / f"lora-{step:08d}.ckpt").touch()
    (tmp_path / "lora.ckpt").touch()
    with caplog.at_level(logging.WARNING):
        set_aside_later(tmp_path, 200)
    later = {f"{kind}-00000{step}" for kind in ("lora", "state") for step in (500, 600)}
    assert {path.stem for path in (tmp_path / "abandoned-after-00000200").iterdir()} == later
    assert {path.stem for path in tmp_path.glob("*.*")} == {"lora", "lora-00000200", "state-00000200"}
    assert "4 files" in caplog.text and "abandoned-after-00000200" in caplog.text


def test_nothing_is_moved_where_nothing_lies_beyond_the_step(tmp_path, caplog):
    set_aside_later(tmp_path / "missing", 0)
    save_state(tmp_path, state(200))
    set_aside_later(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000200.safetensors"] and not caplog.text


def test_differences_between_runs_are_named():
    saved = {"a": 1, "b": [1, 2], "gone": 0}
    assert compare_fingerprints(saved, {"a": 2, "b": [1, 2], "new": 3}) == {
        "a": "a was 1, is 2",
        "gone": "gone was 0, is None",
    }


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    for name in (".lora-00000009.77.partial.ckpt", "lora-00000009.ckpt"):
        (tmp_path / name).touch()
    remove_remains(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora-00000009.ckpt"]
