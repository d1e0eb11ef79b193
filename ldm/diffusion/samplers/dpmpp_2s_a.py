"""DPM-Solver++ (2S) ancestral: second order in the denoised latents, singlestep, with fresh noise.

The solver is algorithm 1 of Lu et al. 2022 ("DPM-Solver++", arXiv 2211.01095) with its point in the middle of a step;
the fresh noise is that of k-diffusion's sample_dpmpp_2s_ancestral (Crowson). diffusers has no scheduler of this name:
with an eta of 0 it is DPMSolverSinglestepScheduler(solver_order=2) whose every second step is at a middle. Two calls a
step; the last step, to sigma 0, takes one.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels, timestep_of
from ldm.diffusion.samplers.sigma_space import ancestral, denoised, middle
from ldm.diffusion.samplers.steps import Run, Sampler


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing)
    latents = run.start(levels, std=levels.sigma[0])
    for i in run.remaining:
        sigma = levels.sigma[i]
        down, up = ancestral(sigma, levels.sigma[i + 1], run.eta)
        estimate = denoised(run, latents, sigma, levels.timesteps[i])
        if down > 0.0:
            halfway = middle(sigma, down)
            advanced = latents * (halfway / sigma) + estimate * (1.0 - halfway / sigma)
            estimate = denoised(run, advanced, halfway, float(timestep_of(halfway, run.schedule)))
        latents = latents * (down / sigma) + estimate * (1.0 - down / sigma)
        if up > 0.0:
            latents = latents + run.fresh_noise() * up
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("dpmpp_2s_a", solve, SPACINGS, eta=1.0)
