"""Samplers against diffusers' schedulers, live: the golden file is current, and 20 steps agree at every schedule."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_singlestep

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NoiseSchedule
from tests.golden.make_schedulers import STABLE_DIFFUSION, answers, build, final_latents, singlestep_ancestral
from tests.sampler_cases import (
    SHAPE,
    SPACINGS_OF,
    Case,
    image_latents,
    relative_error,
    starting_noise,
    toy_denoise,
    toy_noise,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "schedulers.npz"


def test_golden_schedulers_are_up_to_date():
    stored, fresh = np.load(GOLDEN, allow_pickle=False), answers()
    assert set(stored) == set(fresh)
    assert max(relative_error(stored[name], fresh[name]) for name in fresh) < 1e-5


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampler_ends_where_diffusers_ends_with_the_same_noise(name):
    for spacing, prediction_type, first_step in itertools.product(
        SPACINGS_OF[name], ("epsilon", "v_prediction"), (0, 8)
    ):
        case = Case(name, spacing, prediction_type, 20, first_step)
        draws = itertools.count()
        ours = SAMPLERS[name](
            toy_denoise, starting_noise(), 20, NoiseSchedule(), prediction_type,
            spacing=spacing, draw_noise=lambda draws=draws: toy_noise(SHAPE, next(draws)),
            first_step=first_step, clean_latents=image_latents() if first_step else None,
        )  # fmt: skip
        assert relative_error(ours, final_latents(case)) < 3e-5, str(case)  # demanded: 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_dpmpp_2s_without_noise_is_diffusers_singlestep_solver_with_its_middle_steps(steps, prediction_type):
    """The scheduler gets the levels of our steps, and between each two of them the one in the middle."""
    case = Case("euler", "as_trained", prediction_type, steps)
    euler = build(case)
    scheduler = scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler(
        **STABLE_DIFFUSION, prediction_type=prediction_type, lower_order_final=True
    )
    scheduler.set_timesteps(2 * steps - 1)
    sigmas = euler.sigmas.double()
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    scheduler.sigmas = torch.cat([torch.stack([sigmas[:-2], middles], 1).flatten(), sigmas[-2:]]).float()
    trained = np.log(np.array(((1 - euler.alphas_cumprod) / euler.alphas_cumprod) ** 0.5, np.float64))
    timesteps = np.interp(np.log(scheduler.sigmas[:-1].double().numpy()), trained, np.arange(1000))
    scheduler.set_begin_index(0)
    latents = torch.from_numpy(starting_noise())
    # Its latents have alpha^2 + sigma^2 = 1, ours are noise alone of the std sigma.
    latents = latents * float(sigmas[0] / (sigmas[0] ** 2 + 1).sqrt())
    for timestep in timesteps:
        output = torch.from_numpy(toy_denoise(latents.numpy(), timestep).astype(np.float32))
        latents = scheduler.step(output, timestep, latents).prev_sample
    case = case._replace(sampler="dpmpp_2s_a")
    ours = SAMPLERS["dpmpp_2s_a"](toy_denoise, starting_noise(), steps, NoiseSchedule(), prediction_type, eta=0.0)
    assert relative_error(singlestep_ancestral(case, 0.0), latents.numpy()) < 1e-4
    assert relative_error(ours, latents.numpy()) < 1e-4
