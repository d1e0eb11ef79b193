"""The noise schedule is Stable Diffusion's."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.diffusion.schedule import NoiseSchedule


def test_the_default_is_stable_diffusions_published_schedule():
    schedule = NoiseSchedule()
    # What diffusers' and LDM's float32 tables hold for 0.00085, 0.012, 1000 steps.
    published = {0: 0.99915, 1: 0.9982960, 499: 0.2776, 999: 0.0046600}
    assert schedule.alphas_cumprod.shape == (1000,)
    for timestep, value in published.items():
        assert schedule.alphas_cumprod[timestep] == pytest.approx(value, rel=1e-3)


def test_the_betas_are_linear_in_their_square_root():
    alphas_cumprod = NoiseSchedule(0.01, 0.04, 3).alphas_cumprod
    betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    np.testing.assert_allclose(np.sqrt(betas), [0.1, 0.15, 0.2], rtol=1e-12)


def test_the_factors_of_image_and_noise_keep_the_variance():
    schedule = NoiseSchedule()
    assert schedule.sqrt_alphas.dtype == np.float32
    np.testing.assert_allclose(schedule.sqrt_alphas**2 + schedule.sqrt_one_minus_alphas**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigmas, schedule.sqrt_one_minus_alphas / schedule.sqrt_alphas, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"timesteps": 0},
        {"timesteps": 1},
        {"timesteps": -5},
        {"linear_start": 0.0},
        {"linear_start": 0.02, "linear_end": 0.01},
        {"linear_end": 1.0},
        {"linear_start": float("nan")},
    ],
)
def test_an_invalid_schedule_is_refused(arguments):
    with pytest.raises(ValueError):
        NoiseSchedule(**arguments)
