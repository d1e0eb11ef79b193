"""The three oldest samplers end where diffusers' schedulers end (tests/golden/make_samplers.py).

test_schedulers.py has all samplers and schedules.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ldm.diffusion.samplers import SAMPLERS, ddim
from ldm.diffusion.samplers.levels import (
    AS_TRAINED,
    leading_timesteps,
    linspace_timesteps,
    solver_levels,
    trailing_timesteps,
)
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from tests.sampler_cases import relative_error, toy_denoise, toy_noise

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "samplers.npz", allow_pickle=False)
STEPS = (1, 2, 5, 10, 14, 15, 20, 50)
NAMES = ("dpm_solver_pp", "dpm_solver", "ddim")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_the_final_latents_are_diffusers(name, prediction_type, steps):
    ours = SAMPLERS[name](toy_denoise, GOLDEN["latents"], steps, NoiseSchedule(), prediction_type)
    assert ours.dtype == np.float32
    assert relative_error(ours, GOLDEN[f"{name}.{prediction_type}.{steps}"]) < 1e-5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_noise_ends_where_diffusers_ends_with_the_same_noise(prediction_type, steps):
    draws = iter(range(steps))
    ours = ddim.sample(
        toy_denoise,
        GOLDEN["latents"],
        steps,
        NoiseSchedule(),
        prediction_type,
        eta=0.7,
        draw_noise=lambda: toy_noise(GOLDEN["latents"].shape, next(draws)),
    )
    assert relative_error(ours, GOLDEN[f"ddim_eta.{prediction_type}.{steps}"]) < 1e-5
    assert next(draws, None) is None  # one draw a step


def exact_output(image, schedule, prediction_type, x, timestep):
    """The output of a network that knows the image."""
    alpha, sigma = schedule.sqrt_alphas[timestep], schedule.sqrt_one_minus_alphas[timestep]
    noise = (x - alpha * image) / sigma
    return noise if prediction_type == "epsilon" else alpha * noise - sigma * image


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "left_over"), [("dpm_solver_pp", 1e-4), ("dpm_solver", 0.12), ("ddim", 0.12)])
def test_a_network_that_knows_the_image_leads_to_it(name, left_over, prediction_type):
    """DPM-Solver++ ends on the image; the two others leave the noise of time step 0, with a std of 0.029."""
    schedule = NoiseSchedule()
    image = np.random.default_rng(1).standard_normal((1, 4, 5, 6)).astype(np.float32)
    denoise = partial(exact_output, image, schedule, prediction_type)
    ended = SAMPLERS[name](denoise, GOLDEN["latents"][:1], 20, schedule, prediction_type)
    assert np.abs(ended - image).max() < left_over


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_called_once_a_step_and_the_callback_told(name):
    calls, told = [], []

    def denoise(x, timestep):
        assert isinstance(timestep, int)
        calls.append(timestep)
        return toy_denoise(x, timestep)

    SAMPLERS[name](denoise, GOLDEN["latents"], 7, NoiseSchedule(), "epsilon", callback=told.append)
    assert calls == sorted(calls, reverse=True) and len(calls) == 7
    assert told == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", NAMES)
def test_the_starting_latents_are_left_as_they_are(name):
    latents = GOLDEN["latents"].copy()
    SAMPLERS[name](toy_denoise, latents, 3, NoiseSchedule(), "epsilon")
    np.testing.assert_array_equal(latents, GOLDEN["latents"])


def test_the_time_steps_are_those_of_diffusers():
    schedule = NoiseSchedule()
    assert linspace_timesteps(5, schedule).tolist() == [999, 799, 599, 400, 200]
    assert leading_timesteps(5, schedule).tolist() == [801, 601, 401, 201, 1]


ZERO_TERMINAL = NoiseSchedule(zero_terminal_snr=True)


def test_a_zero_terminal_schedule_is_sampled_from_its_last_time_step_with_trailing_spacing():
    assert trailing_timesteps(5, ZERO_TERMINAL).tolist() == [999, 799, 599, 399, 199]
    assert trailing_timesteps(7, ZERO_TERMINAL).tolist() == [999, 856, 713, 570, 428, 285, 142]
    for steps in range(1, 1000):
        timesteps = trailing_timesteps(steps, ZERO_TERMINAL)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all()
    of_solvers = solver_levels(20, ZERO_TERMINAL, AS_TRAINED, final_sigma=0.0).timesteps
    for timesteps in (of_solvers, leading_timesteps(20, ZERO_TERMINAL)):
        np.testing.assert_array_equal(timesteps, trailing_timesteps(20, ZERO_TERMINAL))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_the_final_latents_of_a_zero_terminal_schedule_are_diffusers(name, steps):
    ours = SAMPLERS[name](toy_denoise, GOLDEN["latents"], steps, ZERO_TERMINAL, "v_prediction")
    # DPM-Solver's first step multiplies a difference of float32 numbers by alpha_1 / alpha_0, up to 4,096, in diffusers
    # as here.
    bound = 5e-3 if name == "dpm_solver" else 1e-5
    assert relative_error(ours, GOLDEN[f"{name}.zero_terminal_snr.{steps}"]) < bound


@pytest.mark.parametrize(("name", "left_over"), [("dpm_solver_pp", 1e-3), ("dpm_solver", 0.12), ("ddim", 0.12)])
def test_a_network_that_knows_the_image_leads_to_it_from_noise_alone(name, left_over):
    image = np.random.default_rng(1).standard_normal((1, 4, 5, 6)).astype(np.float32)
    denoise = partial(exact_output, image, ZERO_TERMINAL, "v_prediction")
    for steps in (20, 999):
        ended = SAMPLERS[name](denoise, GOLDEN["latents"][:1], steps, ZERO_TERMINAL, "v_prediction")
        assert np.abs(ended - image).max() < left_over


@pytest.mark.parametrize("steps", [0, -1, 1000, 10**9])
@pytest.mark.parametrize("name", NAMES)
def test_steps_that_do_not_fit_the_schedule_are_refused(name, steps):
    with pytest.raises(UserError, match="sampling_steps .*1 to 999"):
        SAMPLERS[name](toy_denoise, GOLDEN["latents"], steps, NoiseSchedule(), "epsilon")


@pytest.mark.parametrize("name", NAMES)
def test_the_most_steps_that_fit_stay_finite(name):
    latents = GOLDEN["latents"][:1, :, :2, :2]
    assert np.isfinite(SAMPLERS[name](toy_denoise, latents, 999, NoiseSchedule(), "v_prediction")).all()


@pytest.mark.parametrize("name", NAMES)
def test_another_prediction_type_is_refused(name):
    with pytest.raises(ValueError, match="sample"):
        SAMPLERS[name](toy_denoise, GOLDEN["latents"], 5, NoiseSchedule(), "sample")


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_ddim_refuses_an_eta_that_is_no_share(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim.sample(toy_denoise, GOLDEN["latents"], 5, NoiseSchedule(), "epsilon", eta=eta, draw_noise=lambda: 0)


def test_ddim_refuses_noise_that_nobody_draws():
    with pytest.raises(ValueError, match="draw_noise"):
        ddim.sample(toy_denoise, GOLDEN["latents"], 5, NoiseSchedule(), "epsilon", eta=0.5)
