"""Heun's method in sigma: second order, two calls a step (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

Equivalent to diffusers' HeunDiscreteScheduler() with Stable Diffusion's betas, use_karras_sigmas and
use_exponential_sigmas. The last step, to sigma 0, is Euler's and calls the network once.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels
from ldm.diffusion.samplers.sigma_space import slope
from ldm.diffusion.samplers.steps import Run, Sampler


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing)
    latents = run.start(levels, std=levels.sigma[0])
    for i in run.remaining:
        sigma, next_sigma = levels.sigma[i], levels.sigma[i + 1]
        first = slope(run, latents, sigma, levels.timesteps[i])
        advanced = latents + first * (next_sigma - sigma)
        if next_sigma > 0.0:
            second = slope(run, advanced, next_sigma, levels.timesteps[i + 1])
            advanced = latents + (first + second) * (0.5 * (next_sigma - sigma))
        latents = run.end_step(i, advanced, levels)
    return latents


# From noise alone the two slopes are averaged over an interval of 4,096 in sigma, and their errors with them.
sample = Sampler("heun", solve, SPACINGS, zero_terminal=False)
