"""DPM-Solver-2 in sigma, and its ancestral form: the slope at the middle of a step (Karras et al. 2022, algorithm 2).

Equivalent to diffusers' KDPM2DiscreteScheduler() and KDPM2AncestralDiscreteScheduler() with Stable Diffusion's betas,
use_karras_sigmas and use_exponential_sigmas. Two calls a step; the last step, to sigma 0, is Euler's with one call.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels, timestep_of
from ldm.diffusion.samplers.sigma_space import ancestral, middle, slope
from ldm.diffusion.samplers.steps import Run, Sampler


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run. DPM2 is DPM2 ancestral with an eta of 0."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing, round_karras=True)
    latents = run.start(levels, std=levels.sigma[0])
    for i in run.remaining:
        sigma = levels.sigma[i]
        down, up = ancestral(sigma, levels.sigma[i + 1], run.eta)
        direction = slope(run, latents, sigma, levels.timesteps[i])
        if down > 0.0:
            halfway = middle(sigma, down)
            advanced = latents + direction * (halfway - sigma)
            direction = slope(run, advanced, halfway, float(timestep_of(halfway, run.schedule)))
        latents = latents + direction * (down - sigma)
        if up > 0.0:
            latents = latents + run.fresh_noise() * up
        latents = run.end_step(i, latents, levels)
    return latents


# From noise alone a step spans 4,096 in sigma, and the error of its slope is multiplied by that.
sample = Sampler("dpm2", solve, SPACINGS, zero_terminal=False)
sample_ancestral = Sampler("dpm2_a", solve, SPACINGS, eta=1.0, zero_terminal=False)
