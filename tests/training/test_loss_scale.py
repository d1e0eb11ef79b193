"""The loss scale: which one is built, when it rises and falls, and when it ends the run."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.train import TrainSettings
from ldm.training.loss_scale import LARGEST_SCALE, OVERFLOWS_ALLOWED, LossScaler, make_loss_scaler


def test_dynamic_scale_falls_at_an_overflow_and_rises_after_the_window():
    scaler = LossScaler(1024.0, dynamic=True, factor=2.0, window=3)
    scaler.after_step(finite=False, applied=False)
    assert (scaler.scale, scaler.updates, scaler.overflows) == (512.0, 0, 1)
    scales = []
    for _ in range(6):
        scaler.after_step(finite=True, applied=True)
        scales.append(scaler.scale)
    assert scales == [512.0, 512.0, 1024.0, 1024.0, 1024.0, 2048.0]
    assert scaler.updates == 6


def test_an_overflow_starts_the_window_again():
    scaler = LossScaler(1024.0, dynamic=True, window=2)
    for finite in (True, False, True):
        scaler.after_step(finite, finite)
    assert scaler.scale == 512.0
    scaler.after_step(True, True)
    assert scaler.scale == 1024.0


def test_static_scale_stays():
    scaler = LossScaler(128.0, dynamic=False, window=1)
    for finite in (True, False, True):
        scaler.after_step(finite, finite)
    assert scaler.scale == 128.0


def test_the_scale_never_rises_above_the_largest():
    scaler = LossScaler(2.0**22, dynamic=True, window=1)
    for _ in range(5):
        scaler.after_step(True, True)
    assert scaler.scale == LARGEST_SCALE == 2.0**24


def test_the_scale_never_falls_below_one():
    scaler = LossScaler(2.0, dynamic=True)
    for _ in range(5):
        scaler.after_step(False, False)
    assert scaler.scale == 1.0


def test_an_overflow_at_every_step_stops_the_run_with_a_way_out():
    scaler = LossScaler(65536.0, dynamic=True)
    with pytest.raises(UserError, match="overflowed at .* in a row.*--precision fp32"):
        for _ in range(OVERFLOWS_ALLOWED):
            scaler.after_step(False, False)
    assert scaler.overflows == OVERFLOWS_ALLOWED


def test_both_outcomes_of_a_step_are_known_before_it_ends():
    scaler = LossScaler(1024.0, dynamic=True, window=3)
    for finite in (True, True, False, True, True, True, False):
        outcomes = dict(zip((True, False), scaler.outcomes()))
        scaler.after_step(finite, applied=finite)
        assert outcomes[finite] == scaler != outcomes[not finite]


def test_an_outcome_that_would_stop_the_run_is_no_error():
    scaler = LossScaler(2.0, dynamic=True, overflows_in_a_row=OVERFLOWS_ALLOWED - 1)
    assert scaler.outcomes()[1].overflows_in_a_row == OVERFLOWS_ALLOWED


@pytest.mark.parametrize(
    ("scaler_type", "fp16", "scale", "dynamic"),
    [
        ("auto", False, 1.0, False),
        ("auto", True, 512.0, True),
        ("dynamic", False, 512.0, True),
        ("static", True, 512.0, False),
        ("none", True, 1.0, False),
    ],
)
def test_the_loss_scaler_is_the_one_in_the_settings(scaler_type, fp16, scale, dynamic):
    settings = TrainSettings(loss_scaler_type=scaler_type, init_loss_scale=512.0, scale_window=7, loss_scale_factor=3.0)
    scaler = make_loss_scaler(settings, fp16)
    assert (scaler.scale, scaler.dynamic, scaler.window, scaler.factor) == (scale, dynamic, 7, 3.0)
    scaler.load_state({**scaler.state(), "scale": 64.0, "updates": 9})
    assert scaler.updates == 9 and scaler.scale == (64.0 if dynamic else scale)
