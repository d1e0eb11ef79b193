"""DPM-Solver++ for the stochastic equation, singlestep, with a point in the middle (Lu et al. 2022; Crowson).

Equivalent to diffusers' DPMSolverSDEScheduler() with Stable Diffusion's betas, use_karras_sigmas and
use_exponential_sigmas, and to k-diffusion's sample_dpmpp_sde. Two calls a step; the last step, to sigma 0, takes one.

Both noises of a step are of one Brownian motion in sigma, as torchsde's Brownian tree draws them there: the noise of
the whole step is the sum of that up to its middle and an independent rest.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels, timestep_of
from ldm.diffusion.samplers.sigma_space import ancestral, denoised, middle
from ldm.diffusion.samplers.steps import Run, Sampler


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing)
    latents = run.start(levels, std=levels.sigma[0])
    for i in run.remaining:
        sigma, next_sigma = levels.sigma[i], levels.sigma[i + 1]
        estimate = denoised(run, latents, sigma, levels.timesteps[i])
        if next_sigma == 0.0:
            latents = estimate
        else:
            halfway = middle(sigma, next_sigma)
            down, up = ancestral(sigma, halfway, run.eta)
            advanced = latents * (down / sigma) + estimate * (1.0 - down / sigma)
            if up > 0.0:
                noise = run.fresh_noise()
                advanced = advanced + noise * up
            estimate = denoised(run, advanced, halfway, float(timestep_of(halfway, run.schedule)))
            down, up = ancestral(sigma, next_sigma, run.eta)
            latents = latents * (down / sigma) + estimate * (1.0 - down / sigma)
            if up > 0.0:
                share = (sigma - halfway) / (sigma - next_sigma)
                noise = noise * math.sqrt(share) + run.fresh_noise() * math.sqrt(1.0 - share)
                latents = latents + noise * up
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("dpmpp_sde", solve, SPACINGS, eta=1.0)
