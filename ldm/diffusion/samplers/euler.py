"""Euler's method in sigma, and Euler ancestral, which adds fresh noise (Karras et al. 2022, arXiv 2206.00364; Crowson).

Equivalent to diffusers' EulerDiscreteScheduler() and EulerAncestralDiscreteScheduler() with Stable Diffusion's betas.
karras and exponential are their use_karras_sigmas and use_exponential_sigmas, which diffusers offers for the first.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels
from ldm.diffusion.samplers.sigma_space import ancestral, slope
from ldm.diffusion.samplers.steps import Run, Sampler


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run. Euler is Euler ancestral with an eta of 0."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing)
    latents = run.start(levels, std=levels.sigma[0])
    for i in run.remaining:
        sigma = levels.sigma[i]
        down, up = ancestral(sigma, levels.sigma[i + 1], run.eta)
        latents = latents + slope(run, latents, sigma, levels.timesteps[i]) * (down - sigma)
        if up > 0.0:
            latents = latents + run.fresh_noise() * up
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("euler", solve, SPACINGS)
sample_ancestral = Sampler("euler_a", solve, SPACINGS, eta=1.0)
