"""DPM-Solver++ (2M): second order in the denoised latents (Lu et al. 2022, "DPM-Solver++", algorithm 2).

Equivalent to diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2,
solver_type="midpoint", final_sigmas_type="zero"). The last step goes to sigma 0 in first order, so its result is the
network's estimate of the clean latents.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers import multistep
from ldm.diffusion.samplers.levels import SPACINGS, Levels
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    return multistep.solve(run, final_sigma=0.0, predict=predict_denoised, advance=_advance, first_order_end=True)


def _advance(latents: np.ndarray, denoised: np.ndarray, levels: Levels, i: int) -> np.ndarray:
    # sigma_t / sigma_s latents - alpha_t (e^-h - 1) denoised. With alpha_t e^-h = sigma_t alpha_s / sigma_s this
    # also holds at sigma_t = 0, where h is infinite.
    ratio = levels.sigma[i + 1] / levels.sigma[i]
    return ratio * latents + (levels.alpha[i + 1] - ratio * levels.alpha[i]) * denoised


sample = Sampler("dpm_solver_pp", solve, SPACINGS)
