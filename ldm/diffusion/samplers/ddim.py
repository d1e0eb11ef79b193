"""DDIM (Song, Meng and Ermon 2020, equations 12 and 16): deterministic for eta 0, DDPM for eta 1.

Equivalent to diffusers' DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
clip_sample=False), which is Stable Diffusion's published configuration.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import STRIDED_SPACINGS, Levels, whole_timesteps
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised, predict_noise


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    timesteps = whole_timesteps(run.steps, run.schedule, run.spacing)
    stride = run.schedule.timesteps // run.steps
    abars = run.schedule.alphas_cumprod.tolist()
    levels = Levels.of_timesteps(timesteps, run.schedule)
    latents = run.start(levels)
    for i in run.remaining:
        timestep = levels.timesteps[i]
        # The last step ends at the noise level of time step 0, not at a clean image (set_alpha_to_one=False).
        abar, next_abar = abars[timestep], abars[max(timestep - stride, 0)]
        alpha, sigma = levels.alpha[i], levels.sigma[i]
        output = run.output(latents, timestep)
        denoised = predict_denoised(output, latents, alpha, sigma, run.prediction_type)
        noise = predict_noise(output, latents, alpha, sigma, run.prediction_type)
        std = run.eta * math.sqrt((1.0 - next_abar) / (1.0 - abar) * (1.0 - abar / next_abar))
        latents = math.sqrt(next_abar) * denoised + math.sqrt(1.0 - next_abar - std**2) * noise
        if run.eta > 0.0:
            latents = latents + std * run.fresh_noise()
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("ddim", solve, STRIDED_SPACINGS, eta=0.0)
