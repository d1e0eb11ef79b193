"""Every sampler ends where diffusers' scheduler ends, at every schedule (tests/golden/make_schedulers.py)."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ldm.diffusion.samplers import SAMPLERS, dpm_solver_pp
from ldm.diffusion.samplers.levels import sigma_levels, solver_levels
from ldm.diffusion.samplers.lms import _coefficient
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.settings.sampler_names import KOHYA_SAMPLERS, SAMPLER_LABELS, SAMPLER_NAMES, SCHEDULES
from tests.sampler_cases import (
    SHAPE,
    SPACINGS_OF,
    cases_of,
    image_latents,
    relative_error,
    starting_noise,
    toy_denoise,
    toy_noise,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "schedulers.npz", allow_pickle=False)
SCHEDULE = NoiseSchedule()
ZERO_TERMINAL = NoiseSchedule(zero_terminal_snr=True)
TWICE = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")  # these call the network twice a step, but in the last
NOISY = ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "ddpm", "lcm")
FROM_NOISE_ALONE = [name for name in SAMPLERS if SAMPLERS[name].zero_terminal]


def fixed_noise(shape=SHAPE):
    draws = itertools.count()
    return lambda: toy_noise(shape, next(draws))


def sample(name, steps=6, schedule=SCHEDULE, prediction_type="epsilon", denoise=toy_denoise, noise=None, **options):
    noise = starting_noise() if noise is None else noise
    return SAMPLERS[name](denoise, noise, steps, schedule, prediction_type, draw_noise=fixed_noise(), **options)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_final_latents_are_diffusers_at_every_schedule_and_from_an_image(name):
    for case, expected in zip(cases_of(name), GOLDEN[name]):
        schedule = ZERO_TERMINAL if case.zero_terminal else SCHEDULE
        image = {"first_step": case.first_step, "clean_latents": image_latents()} if case.first_step else {}
        ours = sample(name, case.steps, schedule, case.prediction_type, spacing=case.spacing, **image)
        assert ours.dtype == np.float32 and ours.shape == SHAPE
        # Demanded: 1e-3. diffusers rounds DPM2's time steps at the middle of a step to float32.
        assert relative_error(ours, expected) < (1e-4 if name.startswith("dpm2") else 2e-5), str(case)
    assert len(GOLDEN[name]) == len(cases_of(name))


def test_every_sampler_has_its_cases_its_label_and_the_schedules_of_its_kind():
    assert {name: sampler.spacings for name, sampler in SAMPLERS.items()} == SPACINGS_OF
    assert list(SAMPLERS) == list(SAMPLER_LABELS) and set(SAMPLER_NAMES.values()) == set(SAMPLERS)
    assert len(set(SAMPLER_LABELS.values())) == len(SAMPLERS) and not set(KOHYA_SAMPLERS) & set(SAMPLERS)
    assert {spacing for spacings in SPACINGS_OF.values() for spacing in spacings} == set(SCHEDULES)


def exact_output(image, prediction_type, schedule, x, timestep):
    """The output of a network that knows the image."""
    abar = np.interp(timestep, np.arange(1000), schedule.alphas_cumprod)
    noise = (x - np.sqrt(abar) * image) / np.sqrt(1.0 - abar)
    return noise if prediction_type == "epsilon" else np.sqrt(abar) * noise - np.sqrt(1.0 - abar) * image


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_network_that_knows_the_image_leads_to_it(name):
    """Also with its fresh noise. Three samplers leave the noise of time step 0, with a std of 0.029."""
    image = image_latents()
    bound = 0.12 if name in ("dpm_solver", "ddim", "plms") else 0.02
    # LCM keeps a little of its input, because it takes the network for one that knows the boundary.
    for prediction_type, spacing in itertools.product(("epsilon", "v_prediction"), SPACINGS_OF[name]):
        denoise = partial(exact_output, image, prediction_type, SCHEDULE)
        ended = sample(name, 20, SCHEDULE, prediction_type, denoise, spacing=spacing)
        assert np.abs(ended - image).max() < bound, (prediction_type, spacing)


@pytest.mark.parametrize("name", FROM_NOISE_ALONE)
def test_noise_alone_leads_to_the_image_too(name):
    image = image_latents()
    denoise = partial(exact_output, image, "v_prediction", ZERO_TERMINAL)
    for spacing in SPACINGS_OF[name]:
        for steps in (1, 2, 20):
            ended = sample(name, steps, ZERO_TERMINAL, "v_prediction", denoise, spacing=spacing)
            assert np.abs(ended - image).max() < 0.12, (steps, spacing)


def test_samplers_that_cannot_begin_from_noise_alone_are_refused_by_name():
    refused = [name for name in SAMPLERS if name not in FROM_NOISE_ALONE]
    assert refused == ["plms", "heun", "dpm2", "dpm2_a"]
    for name in refused:
        with pytest.raises(UserError, match=f"{name} cannot begin from noise alone.*choose another"):
            sample(name, 6, ZERO_TERMINAL, "v_prediction")


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_time_steps_fall_and_are_all_whole_or_all_float(name):
    for spacing in SPACINGS_OF[name]:
        calls, told = [], []

        def denoise(x, timestep, calls=calls):
            calls.append(timestep)
            return toy_denoise(x, timestep)

        sample(name, 7, denoise=denoise, callback=told.append, spacing=spacing)
        assert told == [1, 2, 3, 4, 5, 6, 7]
        extra = 6 if name in TWICE else 1 if name == "plms" else 0
        assert len(calls) == 7 + extra and len({type(timestep) for timestep in calls}) == 1
        assert type(calls[0]) in (int, float) and 0 <= min(calls) and max(calls) == calls[0] <= 999
        # Heun and PLMS come to a time step twice, and these ancestral ones go below the next one before they add noise.
        if name not in ("heun", "plms", "dpm2_a", "dpmpp_2s_a"):
            assert calls == sorted(calls, reverse=True)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampling_from_an_image_takes_the_last_steps_and_tells_their_numbers(name):
    calls, told, all_calls = [], [], []

    def recording(into):
        def denoise(x, timestep):
            into.append(timestep)
            return toy_denoise(x, timestep)

        return denoise

    sample(name, 10, denoise=recording(all_calls))
    sample(name, 10, denoise=recording(calls), callback=told.append, first_step=7, clean_latents=image_latents())
    assert told == [8, 9, 10]
    assert sorted(set(calls)) == sorted(set(all_calls))[: len(set(calls))]
    assert len(calls) == 3 + (2 if name in TWICE else 1 if name == "plms" else 0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_constrain_gets_the_level_that_a_sampling_from_an_image_would_begin_at(name):
    """And after the last step a level without noise. What it returns is what the sampler goes on with."""
    image, noise, levels = image_latents(), starting_noise(), []

    def noised(latents, alpha, sigma):
        assert type(alpha) is float and type(sigma) is float
        levels.append(image * alpha + noise * sigma)
        return levels[-1]

    ended = sample(name, 5, constrain=noised)
    np.testing.assert_array_equal(ended, image)
    for first_step in (1, 4):
        seen = []

        def denoise(x, timestep, seen=seen):
            seen.append(x)
            return toy_denoise(x, timestep)

        sample(name, 5, denoise=denoise, first_step=first_step, clean_latents=image)
        # The network gets latents of which image and noise have shares with squares that sum to 1.
        before = levels[first_step - 1]
        scale = np.sum(seen[0] * before) / np.sum(before * before)
        np.testing.assert_allclose(seen[0], before * scale, atol=1e-5)
    assert len(levels) == 5


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_network_gets_latents_with_the_std_it_was_trained_with(name):
    """Of an image and noise with a std of 1, also in sigma space."""
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, 1, 4, 64, 64)).astype(np.float32)
    stds = []

    def denoise(x, timestep):
        stds.append(float(x.std()))
        return exact_output(image, "epsilon", SCHEDULE, x, timestep)

    for start in ({}, {"first_step": 3, "clean_latents": image}):
        draws = np.random.default_rng(1)
        SAMPLERS[name](
            denoise, noise, 8, SCHEDULE, "epsilon",
            draw_noise=lambda draws=draws: draws.standard_normal(noise.shape, np.float32), **start,
        )  # fmt: skip
    assert 0.92 < min(stds) and max(stds) < 1.03  # a sampling begins without the image's share, 0.07 to 0.13


def test_the_noise_of_a_step_of_dpmpp_sde_has_a_std_of_1_and_that_of_its_middle_is_a_part_of_it():
    draws = np.random.default_rng(0)
    seen = []

    def denoise(x, timestep):
        seen.append(x)
        return np.zeros_like(x)

    zeros = np.zeros((1, 4, 100, 100), np.float32)
    SAMPLERS["dpmpp_sde"](
        denoise, zeros, 4, SCHEDULE, "epsilon", draw_noise=lambda: draws.standard_normal(zeros.shape, np.float32)
    )
    # Latents of 0 stay 0 with an output of 0, so that the second call gets the noise of the middle alone.
    middle, end = seen[1].ravel(), seen[2].ravel()
    levels = sigma_levels(4, SCHEDULE, "as_trained").sigma
    halfway = np.sqrt(levels[0] * levels[1])
    share = (levels[0] - halfway) / (levels[0] - levels[1])
    assert 0.02 < share < 0.98
    up = levels[1] * np.sqrt(1 - levels[1] ** 2 / levels[0] ** 2)
    # The estimate of the middle, which is the noise there, is denoised from the beginning.
    expected_std = np.hypot(1.0, 0.0) * up
    down = np.sqrt(levels[1] ** 2 - up**2)
    noise_of_middle = middle * np.sqrt(halfway**2 + 1)
    whole = end * np.sqrt(levels[1] ** 2 + 1) - (1 - down / levels[0]) * noise_of_middle
    assert abs(whole.std() / expected_std - 1) < 0.02
    assert abs(np.corrcoef(whole, middle)[0, 1] - np.sqrt(share)) < 0.02


@pytest.mark.parametrize(
    ("noisy", "plain"), [("euler_a", "euler"), ("dpm2_a", "dpm2"), ("dpmpp_2m_sde", "dpm_solver_pp")]
)
def test_an_eta_of_0_is_the_sampler_without_noise(noisy, plain):
    without = SAMPLERS[noisy](toy_denoise, starting_noise(), 9, SCHEDULE, "epsilon", eta=0.0)
    assert relative_error(without, sample(plain, 9)) < 1e-5
    assert relative_error(sample(noisy, 9, eta=0.5), without) > 1e-2


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_fresh_noise_is_needed_where_a_sampler_adds_it_and_not_drawn_elsewhere(name):
    def draw():
        drawn.append(1)
        return np.zeros(SHAPE, np.float32)

    drawn = []
    SAMPLERS[name](toy_denoise, starting_noise(), 5, SCHEDULE, "epsilon", draw_noise=draw)
    assert len(drawn) == (0 if name not in NOISY else 8 if name == "dpmpp_sde" else 4)
    if name in NOISY:
        with pytest.raises(ValueError, match="draw_noise"):
            SAMPLERS[name](toy_denoise, starting_noise(), 5, SCHEDULE, "epsilon")


class HostlessArray:
    """An array that adds, subtracts, and multiplies and divides by Python floats. NumPy cannot read it."""

    __array_ufunc__ = None
    __slots__ = ("values",)

    def __init__(self, values):
        self.values = values

    def __array__(self, *args):
        raise AssertionError("the latents came to the host")

    def _other(self, other):
        assert type(other) is HostlessArray, f"adds a {type(other)}"
        return other.values

    def __add__(self, other):
        return HostlessArray(self.values + self._other(other))

    def __sub__(self, other):
        return HostlessArray(self.values - self._other(other))

    def __mul__(self, factor):
        assert type(factor) is float, f"multiplied by a {type(factor)}"
        return HostlessArray(self.values * np.float32(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        assert type(divisor) is float
        return HostlessArray(self.values / np.float32(divisor))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampler_takes_any_array_with_sums_and_products(name, prediction_type):
    for options in ({}, {"first_step": 3, "spacing": SPACINGS_OF[name][-1]}):
        draws = itertools.count()
        image = {"clean_latents": HostlessArray(image_latents())} if options else {}
        ours = SAMPLERS[name](
            lambda x, timestep: HostlessArray(toy_denoise(x.values, timestep).astype(np.float32)),
            HostlessArray(starting_noise()), 6, SCHEDULE, prediction_type,
            draw_noise=lambda draws=draws: HostlessArray(toy_noise(SHAPE, next(draws))),
            constrain=lambda latents, alpha, sigma: latents * 1.0,
            **options, **image,
        )  # fmt: skip
        assert type(ours) is HostlessArray
        image = {"clean_latents": image_latents()} if options else {}
        expected = sample(name, prediction_type=prediction_type, **options, **image)
        np.testing.assert_allclose(ours.values, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_given_arrays_are_left_as_they_are(name):
    noise, image = starting_noise(), image_latents()
    sample(name, noise=noise, first_step=2, clean_latents=image)
    sample(name, noise=noise)
    np.testing.assert_array_equal(noise, starting_noise())
    np.testing.assert_array_equal(image, image_latents())


def test_karras_levels_are_those_of_the_paper():
    levels = sigma_levels(10, SCHEDULE, "karras")
    expected = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0.0]
    np.testing.assert_allclose(levels.sigma, expected, atol=6e-5)
    whole = solver_levels(10, SCHEDULE, "karras", 0.0)
    assert whole.timesteps == [round(timestep) for timestep in levels.timesteps]
    np.testing.assert_allclose(np.divide(whole.sigma, whole.alpha), expected, atol=6e-5)


def test_a_single_step_begins_at_the_last_time_step():
    """diffusers takes it at time step 0, where an image has nearly no noise."""
    for name, spacings in SPACINGS_OF.items():
        for spacing in spacings:
            calls = []

            def denoise(x, timestep, calls=calls):
                calls.append(timestep)
                return x

            sample(name, 1, denoise=denoise, spacing=spacing)
            assert calls == [1 if name in ("ddim", "plms", "ddpm") and spacing == "as_trained" else 999]


def test_the_coefficients_of_linear_multistep_integrate_polynomials_of_their_order():
    sigmas, end = [3.0, 4.5, 7.0, 12.0], 1.5
    for degree in range(4):
        total = sum(_coefficient(sigmas, k, end) * sigma**degree for k, sigma in enumerate(sigmas))
        assert total == pytest.approx((end ** (degree + 1) - sigmas[0] ** (degree + 1)) / (degree + 1))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_steps_schedules_and_images_that_do_not_fit_are_refused(name):
    for steps in (0, -1, 1000, 10**9):
        with pytest.raises(UserError, match="sampling_steps .*1 to 999"):
            sample(name, steps)
    for spacing in {*SCHEDULES, "cosine"} - set(SPACINGS_OF[name]):
        with pytest.raises(UserError, match=f"schedule {spacing} .*{name}: choose one of as_trained"):
            sample(name, spacing=spacing)
    for first_step in (-1, 6, 7):
        with pytest.raises(ValueError, match="first_step"):
            sample(name, first_step=first_step, clean_latents=image_latents())
    with pytest.raises(ValueError, match="clean_latents"):
        sample(name, first_step=2)
    with pytest.raises(ValueError, match="sample"):
        sample(name, prediction_type="sample")
    with pytest.raises(ValueError, match="eta"):
        sample(name, eta=1.1 if SAMPLERS[name].eta is not None else 0.5)


def test_lcm_takes_at_most_the_steps_it_was_distilled_with():
    with pytest.raises(UserError, match="sampling_steps is 51: .*lcm takes at most 50"):
        sample("lcm", 51)
    assert np.isfinite(sample("lcm", 50)).all()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
def test_the_most_steps_that_fit_stay_finite(name):
    for spacing in SPACINGS_OF[name]:
        assert np.isfinite(sample(name, 999, prediction_type="v_prediction", spacing=spacing)).all(), spacing


def test_models_with_few_time_steps_are_sampled_too():
    for name, spacings in SPACINGS_OF.items():
        for spacing in spacings:
            assert np.isfinite(sample(name, 5, NoiseSchedule(timesteps=20), spacing=spacing)).all()


def test_dpm_solver_pp_is_called_by_the_name_of_its_module():
    assert dpm_solver_pp.sample is SAMPLERS["dpm_solver_pp"]


def after_first_step(name, **options):
    """The latents after the first of four steps, with the factors of image and noise there."""
    states = []

    def keep(latents, alpha, sigma):
        states.append((latents, alpha, sigma))
        return latents

    SAMPLERS[name](
        partial(exact_output, np.zeros(SHAPE, np.float32), "epsilon", SCHEDULE), starting_noise(), 4, SCHEDULE,
        "epsilon", draw_noise=lambda: np.zeros(SHAPE, np.float32), constrain=keep, **options,
    )  # fmt: skip
    return states[0]


@pytest.mark.parametrize("name", ["euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"])
def test_eta_decides_how_much_of_the_noise_is_exchanged_in_a_step(name):
    """Seen with fresh noise of 0, and a network that knows an image of 0: what is left is the noise that was kept."""
    first = sigma_levels(4, SCHEDULE, "as_trained").sigma[0]
    for eta in (0.0, 0.3, 1.0):
        latents, _, sigma = after_first_step(name, eta=eta)
        kept = sigma * np.sqrt(1.0 - eta**2 * (1.0 - (sigma / first) ** 2))
        np.testing.assert_allclose(latents, starting_noise() * kept, rtol=1e-3, atol=1e-5)


def test_eta_of_dpmpp_2m_sde_decides_how_much_of_the_noise_is_exchanged_in_a_step():
    """As above; what is kept falls exponentially with log(alpha / sigma)."""
    levels = solver_levels(4, SCHEDULE, "as_trained", 0.0)
    for eta in (0.0, 0.3, 1.0):
        latents, alpha, sigma = after_first_step("dpmpp_2m_sde", eta=eta)
        kept = np.exp(-eta * (levels.log_snr(1) - levels.log_snr(0))) * sigma / levels.sigma[0]
        np.testing.assert_allclose(latents, starting_noise() * kept, rtol=1e-3, atol=1e-5)


def test_lcm_returns_its_input_at_time_step_0():
    """A schedule of 51 time steps is sampled at all of its first 50, down to 0."""
    draws = itertools.count()
    seen = []

    def denoise(x, timestep):
        seen.append((x, timestep))
        return toy_denoise(x, timestep)

    ended = SAMPLERS["lcm"](
        denoise, starting_noise(), 50, NoiseSchedule(timesteps=51), "epsilon",
        draw_noise=lambda: toy_noise(SHAPE, next(draws)),
    )  # fmt: skip
    assert seen[-1][1] == 0
    np.testing.assert_array_equal(ended, seen[-1][0])
