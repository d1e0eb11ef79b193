"""Whole runs with other optimizers and rates: what is saved, and a resumed run that ends with the same LoRA."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.training.schedules import learning_rate
from ldm.training.trainer import run_steps, train
from ldm.training.training_state import load_state
from ldm.weights.checkpoint import read_checkpoint
from tests.training.micro import metrics, prepare, unread

LORA = {
    "use_lora": True, "lora_ft_text_encoder": True, "lora_targets": ["attn2.to_q", "q_proj"], "lora_rank": 2,
    "max_steps": 4, "ckpt_save_interval": 2, "start_learning_rate": 1e-2,
}  # fmt: skip
# Each setting of the noise and the loss is in one of them, and so is what else the state of a run consists of.
CHANGES = {
    "Prodigy": {
        "optim": "prodigy", "start_learning_rate": 1.0, "optimizer_args": ["d_coef=2"], "use_ema": True,
        "ip_noise_gamma": 0.1, "min_snr_gamma": 5.0,
    },
    "AdamWScheduleFree": {
        "optim": "adamwschedulefree", "warmup_steps": 0.5, "lora_dropout": 0.2, "debiased_estimation_loss": True,
    },
    "AdamW at several rates, with a limit": {
        "unet_lr": 2e-2, "text_encoder_lr": 5e-3, "loraplus_lr_ratio": 4, "scale_weight_norms": 0.05,
        "loss_type": "l1",
    },
    "Lion, with dropout and averages": {
        "optim": "lion", "lora_dropout": 0.2, "use_ema": True, "loss_type": "huber",
        "noise_offset": 0.1, "adaptive_noise_scale": 0.2, "scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2,
    },
    "Adafactor, with two micro-batches": {
        "optim": "adafactor", "optimizer_args": ["beta1=0.9", "scale_parameter=True"], "caption_dropout": 0.5,
        "gradient_accumulation_steps": 2, "multires_noise_iterations": 4, "v_pred_like_loss": 0.5,
        "scheduler": "polynomial", "lr_scheduler_power": 2.0,
    },
    "the whole UNet by Prodigy": {
        "use_lora": False, "lora_ft_text_encoder": False, "optim": "prodigy", "start_learning_rate": 1.0,
        "use_ema": True, "clip_grad": True, "loss_type": "smooth_l1", "noise_offset": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_ends_with_the_same_weights(settings, empty_run, tmp_path, name):
    given = {**LORA, **CHANGES[name]}
    whole = train(settings(empty_run, **given))
    half = empty_run / "ckpt" / "state-00000002.safetensors"
    resumed = train(settings(tmp_path / "resumed", **given, resume=str(half)))
    assert resumed.read_bytes() == whole.read_bytes()
    states = [load_state(path.parent / "state-00000004.safetensors") for path in (whole, resumed)]
    assert list(states[0].arrays) == list(states[1].arrays)
    for key, array in states[0].arrays.items():
        np.testing.assert_array_equal(states[1].arrays[key], array, err_msg=key)
    if "scale_weight_norms" in given:
        norms = [np.linalg.norm(up @ down) for down, up in factors_of(states[0].arrays).values()]
        assert max(norms) == pytest.approx(0.05, rel=1e-5)
    assert ("optimizer.d" in states[0].arrays) == (given.get("optim") == "prodigy")


def factors_of(arrays):
    """Layer -> (down, up) in a training state."""
    layers = {name[2:-15] for name in arrays if name.startswith("p.") and name.endswith(".lora_up.weight")}
    return {layer: [arrays[f"p.{layer}.lora_{factor}.weight"] for factor in ("down", "up")] for layer in layers}


def test_rates_reach_the_layers(settings, empty_run):
    """Up matrices start at 0, and AdamW's first step moves each element by its rate."""
    rates = {"unet_lr": 2e-2, "text_encoder_lr": 5e-3, "loraplus_lr_ratio": 4}
    path = train(settings(empty_run, **{**LORA, **rates, "max_steps": 1, "weight_decay": 0.0}))
    for layer, (_, up) in factors_of(load_state(path.parent / "state-00000001.safetensors").arrays).items():
        rate = 5e-3 if layer.startswith("cond_stage_model") else 2e-2
        assert np.abs(up).max() == pytest.approx(4 * rate, rel=1e-3), layer
    [row] = metrics(empty_run)
    assert float(row["learning_rate"]) == pytest.approx(2e-2)  # the UNet's, without LoRA+


def test_the_lora_of_a_schedule_free_run_is_the_averaged_point(settings, empty_run):
    path = train(settings(empty_run, **{**LORA, "max_steps": 2, "optim": "adamwschedulefree"}))
    lora, _ = read_checkpoint(path)
    arrays = load_state(path.parent / "state-00000002.safetensors").arrays
    name = next(key[2:] for key in arrays if key.startswith("p.") and key.endswith("lora_up.weight"))
    y, z = arrays[f"p.{name}"].astype(np.float64), arrays[f"z.{name}"]
    average = (y + (1 - 1 / 0.9) * (z - y)).astype(np.float32)
    assert any(array.shape == y.shape and np.array_equal(array, average) for array in lora.values())
    assert not np.array_equal(average, y)


@pytest.mark.parametrize(
    ("given", "cycles", "power"),
    [
        ({"scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2}, 2, 1.0),
        ({"scheduler": "polynomial", "lr_scheduler_power": 3.0}, 1, 3.0),
    ],
)
def test_the_schedules_settings_reach_the_steps(settings, empty_run, monkeypatch, given, cycles, power):
    rates = {"unet_lr": 2e-2, "loraplus_lr_ratio": 4, "weight_decay": 0.0, "warmup_steps": 0.25, "max_steps": 8}
    run = prepare(settings(empty_run, **{**LORA, **rates, **given}))
    given_rates = []

    class Recorded:
        def numbers(self, t, lr):
            given_rates.append(lr)
            return lr, 1e-8, 0.0

    run.optimizer = Recorded()
    run.step = lambda *_: unread(1.0, 1.0, finite=True)
    monkeypatch.setattr("ldm.training.trainer.save", lambda run: None)
    run_steps(run)
    expected = [
        learning_rate(
            step, scheduler=given["scheduler"], start=1e-2, end=1e-7, warmup_steps=2, decay_steps=6, cycles=cycles,
            power=power,
        )
        for step in range(8)
    ]  # fmt: skip
    assert given_rates[::2] == pytest.approx([8 * rate for rate in expected])  # of the UNet's up matrices
    assert [float(row["learning_rate"]) for row in metrics(empty_run)] == pytest.approx([2 * rate for rate in expected])
