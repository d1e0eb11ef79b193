"""The tables by time step are those of sd-scripts for Stable Diffusion's schedule."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.diffusion.loss_weighting import huber_thresholds, loss_factors
from ldm.diffusion.schedule import NoiseSchedule
from ldm.settings.loss import LossSettings

# Computed with sd-scripts' formulas in float64.
TIMESTEPS = [0, 200, 400, 600, 800, 999]
TABLES = {
    ("epsilon", "min_snr_gamma", 5.0): [0.004254, 1.0, 1.0, 1.0, 1.0, 1.0],
    ("v_prediction", "min_snr_gamma", 5.0): [0.004250, 0.753692, 0.424483, 0.160783, 0.036870, 0.004660],
    ("epsilon", "debiased_estimation_loss", True): [0.03162, 0.57167, 1.16439, 2.28464, 5.11103, 14.61464],
    ("v_prediction", "debiased_estimation_loss", True): [0.00100, 0.24631, 0.57552, 0.83922, 0.96313, 0.99534],
    ("v_prediction", "scale_v_pred_loss_like_noise_pred", True): [
        0.999001, 0.753692, 0.424483, 0.160783, 0.036870, 0.004660,
    ],
    ("epsilon", "v_pred_like_loss", 0.5): [1.5005, 1.663401, 2.177903, 4.109790, 14.561302, 108.293869],
}  # fmt: skip
SNR = [1175.4706, 3.05996, 0.737568, 0.191586, 0.038281, 0.004682]


def test_the_signal_to_noise_ratio_is_that_of_stable_diffusion():
    np.testing.assert_allclose(NoiseSchedule().snr[TIMESTEPS], SNR, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("prediction_type", "name", "value"), TABLES)
def test_the_factors_are_those_of_sd_scripts(prediction_type, name, value):
    factors = loss_factors(LossSettings(**{name: value}), NoiseSchedule(), prediction_type)
    assert factors.dtype == np.float32 and factors.shape == (1000,)
    np.testing.assert_allclose(factors[TIMESTEPS], TABLES[prediction_type, name, value], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_factors_that_are_given_together_are_multiplied(prediction_type):
    of_type = {"epsilon": dict(v_pred_like_loss=0.5), "v_prediction": dict(scale_v_pred_loss_like_noise_pred=True)}
    given = {"min_snr_gamma": 5.0, **of_type[prediction_type], "debiased_estimation_loss": True}
    together = loss_factors(LossSettings(**given), NoiseSchedule(), prediction_type)
    alone = [loss_factors(LossSettings(**{k: v}), NoiseSchedule(), prediction_type) for k, v in given.items()]
    np.testing.assert_allclose(together, np.prod(alone, axis=0), rtol=1e-6)


def test_no_setting_is_no_table():
    settings = LossSettings(min_snr_gamma=0.0, v_pred_like_loss=0.0)
    assert loss_factors(settings, NoiseSchedule(), "epsilon") is None
    assert huber_thresholds(settings, NoiseSchedule()) is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("snr", [0.94971, 0.46435, 0.29212, 0.18342, 0.12410, 0.10369]),
        ("exponential", [2.0, 1.261915, 0.796214, 0.502377, 0.316979, 0.200461]),
        ("constant", [0.2] * 6),
    ],
)
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_hubers_threshold_follows_its_schedule(schedule, expected, loss_type):
    scale = 1.0 if schedule == "snr" else 2.0
    settings = LossSettings(loss_type=loss_type, huber_schedule=schedule, huber_c=0.1, huber_scale=scale)
    thresholds = huber_thresholds(settings, NoiseSchedule())
    assert thresholds.dtype == np.float32 and thresholds.shape == (1000,)
    np.testing.assert_allclose(thresholds[TIMESTEPS], expected, rtol=1e-5, atol=1e-5)


def test_all_tables_are_finite_where_the_last_time_step_is_noise_alone():
    schedule = NoiseSchedule(zero_terminal_snr=True)
    settings = LossSettings(
        loss_type="huber", min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True, debiased_estimation_loss=True
    )
    assert np.isfinite(loss_factors(settings, schedule, "v_prediction")).all()
    assert huber_thresholds(settings, schedule)[-1] == np.float32(0.1)
