"""Whole runs with other optimizers and rates: what is saved, and a resumed run that ends with the same LoRA."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.training.trainer import train
from ldm.training.training_state import load_state
from ldm.weights.checkpoint import read_checkpoint

LORA = {
    "use_lora": True, "lora_ft_text_encoder": True, "lora_rank": 2, "max_steps": 4, "ckpt_save_interval": 2,
    "start_learning_rate": 1e-2,
}  # fmt: skip
CHANGES = {
    "Prodigy": {"optim": "prodigy", "start_learning_rate": 1.0, "optimizer_args": ["d_coef=2"]},
    "AdamWScheduleFree": {"optim": "adamwschedulefree", "warmup_steps": 0.5},
    "AdamW at several rates, with a limit": {
        "unet_lr": 2e-2, "text_encoder_lr": 5e-3, "loraplus_lr_ratio": 4, "scale_weight_norms": 0.05,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_ends_with_the_same_lora(settings, empty_run, tmp_path, name):
    given = {**LORA, **CHANGES[name]}
    whole = train(settings(empty_run, **given))
    half = empty_run / "ckpt" / "state-00000002.safetensors"
    resumed = train(settings(tmp_path / "resumed", **given, resume=str(half)))
    assert resumed.read_bytes() == whole.read_bytes()
    states = [load_state(path.parent / "state-00000004.safetensors") for path in (whole, resumed)]
    assert list(states[0].arrays) == list(states[1].arrays)
    for key, array in states[0].arrays.items():
        np.testing.assert_array_equal(states[1].arrays[key], array, err_msg=key)
    assert ("optimizer.d" in states[0].arrays) == (name == "Prodigy")


def test_the_lora_of_a_schedule_free_run_is_the_averaged_point(settings, empty_run):
    path = train(settings(empty_run, **{**LORA, "max_steps": 2, "optim": "adamwschedulefree"}))
    lora, _ = read_checkpoint(path)
    arrays = load_state(path.parent / "state-00000002.safetensors").arrays
    name = next(key[2:] for key in arrays if key.startswith("p.") and key.endswith("lora_up.weight"))
    y, z = arrays[f"p.{name}"].astype(np.float64), arrays[f"z.{name}"]
    average = (y + (1 - 1 / 0.9) * (z - y)).astype(np.float32)
    assert any(array.shape == y.shape and np.array_equal(array, average) for array in lora.values())
    assert not np.array_equal(average, y)
