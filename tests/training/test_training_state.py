"""Training states: the newest intact one is taken, and damage is detected and named."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.training.loss_scale import LossScaler
from ldm.training.training_state import TrainingState, _checksum, load_latest_state, load_state, save_state
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint


def state(step, value=1.0):
    arrays = {"p.a": np.full((2, 3), value, np.float32), "m.a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return TrainingState(step, arrays, LossScaler(2.0, False, updates=step).state(), {"seed": 1, "betas": [0.9, 0.99]})


def test_a_state_is_read_back(tmp_path):
    path = save_state(tmp_path, state(7, 0.1))
    latest = load_latest_state(tmp_path)
    assert (latest.step, latest.scaler, latest.fingerprint, latest.path) == (
        7, LossScaler(2.0, False, updates=7).state(), {"seed": 1, "betas": [0.9, 0.99]}, path,
    )  # fmt: skip
    for name, array in state(7, 0.1).arrays.items():
        np.testing.assert_array_equal(latest.arrays[name], array)


def test_a_state_holds_the_best_validation_loss_and_is_the_same_file_without(tmp_path):
    path = save_state(tmp_path, state(7))
    assert "validation" not in read_checkpoint(path)[1] and load_state(path).validation is None
    validation = {"key": "abc", "best": {"step": 3, "loss": 0.1}}
    with_it = state(8)
    with_it.validation = validation
    path = save_state(tmp_path, with_it)
    assert load_state(path).validation == validation
    arrays, metadata = read_checkpoint(path)
    metadata["validation"] = "[]"
    metadata["checksum"] = _checksum(arrays, {name: text for name, text in metadata.items() if name != "checksum"})
    write_checkpoint(path, arrays, metadata)
    with pytest.raises(UserError, match="invalid validation loss"):
        load_state(path)


def test_the_newest_state_is_taken(tmp_path):
    for step in (5, 100, 20):
        save_state(tmp_path, state(step))
    assert load_latest_state(tmp_path).step == 100


def test_a_state_that_does_not_fit_is_passed_over_and_named(tmp_path, caplog):
    for step in (5, 10):
        save_state(tmp_path, state(step))
    latest = load_latest_state(tmp_path, lambda state: "step 10 is not wanted" if state.step == 10 else "")
    assert latest.step == 5 and "step 10 is not wanted; trying" in caplog.text


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


def test_if_all_are_damaged_the_error_counts_them(tmp_path):
    save_state(tmp_path, state(5)).write_bytes(b"")
    with pytest.raises(UserError, match="none of its 1 training states"):
        load_latest_state(tmp_path)


def test_another_safetensors_file_is_no_state(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path / "a.safetensors")


def write(folder, **changed):
    """Write a state with changed metadata and a checksum that matches, and return its path."""
    path = save_state(folder, state(10))
    arrays, texts = read_checkpoint(path)
    arrays.update(changed.pop("arrays", {}))
    texts.update(changed)
    del texts["checksum"]
    write_checkpoint(path, arrays, {**texts, "checksum": _checksum(arrays, texts)})
    return path


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (dict(step="ten"), "invalid step 'ten'"),
        (dict(step="-1"), "invalid step '-1'"),
        (dict(step="1" + "0" * 30), "invalid step '1000"),
        (dict(step="\u0661"), "invalid step"),
        (dict(step=""), "invalid step ''"),
        (dict(scaler="no JSON"), "not valid JSON"),
        (dict(scaler="[" * 100_000), "nested too deeply"),
        (dict(scaler="{}"), "invalid loss scaler"),
        (dict(scaler=json.dumps({**LossScaler(2.0, False).state(), "updates": -1})), "invalid loss scaler"),
        (dict(scaler=json.dumps({**LossScaler(2.0, False).state(), "updates": "9"})), "invalid loss scaler"),
        (dict(scaler=json.dumps({**LossScaler(2.0, False).state(), "scale": 10**400})), "invalid loss scaler"),
        (dict(scaler=json.dumps(LossScaler(float("nan"), False).state())), "invalid loss scaler"),
        (dict(scaler=json.dumps({"scale": 2.0, "dynamic": False})), "invalid loss scaler"),
        (dict(fingerprint="[1]"), "invalid settings"),
        (dict(fingerprint='{"seed": {"a": {}}}'), "invalid settings"),
        (dict(fingerprint='{"seed": 1, "seed": 2}'), "given twice"),
        (dict(arrays={"p.a": np.zeros((2, 3), np.int8)}), "holds p.a as int8"),
        (dict(arrays={"p.a": np.full((2, 3), np.inf, np.float32)}), "not finite, the first in p.a"),
    ],
)
def test_an_invalid_state_is_named_and_the_one_before_it_taken(tmp_path, caplog, changed, error):
    save_state(tmp_path, state(5))
    path = write(tmp_path, **changed)
    with pytest.raises(UserError, match=f"{path.name}.*{error}|{error}.*{path.name}"):
        load_state(path)
    assert load_latest_state(tmp_path).step == 5 and path.name in caplog.text


def test_changed_metadata_does_not_match_the_checksum(tmp_path):
    path = save_state(tmp_path, state(10))
    path.write_bytes(path.read_bytes().replace(b'"step":"10"', b'"step":"11"'))
    with pytest.raises(UserError, match="checksum"):
        load_state(path)


def test_a_state_of_the_first_format_is_read(tmp_path):
    """Its checksum covers names and values of the arrays alone."""
    path = write(tmp_path, format="1")
    assert load_state(path).step == 10
