"""DDPM: each step draws from the posterior of the step before (Ho, Jain and Abbeel 2020, equations 6 and 7).

Equivalent to diffusers' DDPMScheduler(timestep_spacing="leading", steps_offset=1, variance_type="fixed_small",
clip_sample=False). The last step ends at a clean image and adds no noise, where diffusers' noise has a std of 1e-10.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import WHOLE_SPACINGS, Levels, whole_timesteps
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    timesteps = whole_timesteps(run.steps, run.schedule, run.spacing)
    levels = Levels.of_timesteps(timesteps, run.schedule)
    abars = [*run.schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    latents = run.start(levels)
    for i in run.remaining:
        abar, next_abar = abars[i], abars[i + 1]
        output = run.output(latents, levels.timesteps[i])
        denoised = predict_denoised(output, latents, levels.alpha[i], levels.sigma[i], run.prediction_type)
        beta = 1.0 - abar / next_abar
        latents = denoised * (math.sqrt(next_abar) * beta / (1.0 - abar)) + latents * (
            math.sqrt(abar / next_abar) * (1.0 - next_abar) / (1.0 - abar)
        )
        if next_abar < 1.0:
            latents = latents + run.fresh_noise() * math.sqrt((1.0 - next_abar) / (1.0 - abar) * beta)
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("ddpm", solve, WHOLE_SPACINGS, draws=True)
