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


def test_a_zero_terminal_schedule_ends_in_noise_alone_and_begins_as_before():
    schedule = NoiseSchedule(zero_terminal_snr=True)
    # Lin et al. 2023, algorithm 1, computed in float64.
    expected = {0: 0.999575, 200: 0.858521, 500: 0.490937, 800: 0.132821, 998: 0.000444, 999: 0.0}
    np.testing.assert_allclose(schedule.sqrt_alphas[list(expected)], list(expected.values()), atol=1e-6)
    assert schedule.alphas_cumprod[-1] == 0.0 and schedule.sqrt_one_minus_alphas[-1] == 1.0
    assert schedule.sigmas[-1] == np.inf and schedule.snr[-1] == 0.0
    np.testing.assert_allclose(schedule.alphas_cumprod[0], NoiseSchedule().alphas_cumprod[0], rtol=1e-12)


def test_the_rescaled_betas_are_those_of_algorithm_1():
    # The published form, step by step: betas -> sqrt(abar), shifted and scaled -> betas.
    alphas = np.sqrt(NoiseSchedule().alphas_cumprod)
    first, last = alphas[0], alphas[-1]
    alphas = (alphas - last) * first / (first - last)
    squares = alphas**2
    betas = 1.0 - np.concatenate([squares[:1], squares[1:] / squares[:-1]])
    rescaled = NoiseSchedule(zero_terminal_snr=True)
    np.testing.assert_allclose(rescaled.alphas_cumprod, np.cumprod(1.0 - betas), rtol=1e-9, atol=1e-15)


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
