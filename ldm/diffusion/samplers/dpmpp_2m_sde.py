"""DPM-Solver++ (2M) for the stochastic equation: second order, multistep (Lu et al. 2022, arXiv 2211.01095; Crowson).

Equivalent to diffusers' DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2,
solver_type="midpoint", final_sigmas_type="zero"). eta is that of k-diffusion's sample_dpmpp_2m_sde: 1 is diffusers'
form, 0 is DPM-Solver++ (2M).
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, solver_levels
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = solver_levels(run.steps, run.schedule, run.spacing, final_sigma=0.0)
    latents = run.start(levels)
    previous = None
    for i in run.remaining:
        alpha, sigma, next_alpha, next_sigma = (
            levels.alpha[i],
            levels.sigma[i],
            levels.alpha[i + 1],
            levels.sigma[i + 1],
        )
        output = run.output(latents, levels.timesteps[i])
        current = predict_denoised(output, latents, alpha, sigma, run.prediction_type)
        step = levels.log_snr(i + 1) - levels.log_snr(i)  # infinite in the last step
        extrapolated = current
        if previous is not None and i < run.steps - 1:
            step_before = levels.log_snr(i) - levels.log_snr(i - 1)
            extrapolated = current + (current - previous) * (0.5 * step / step_before)
        kept = math.exp(-run.eta * step) if run.eta else 1.0  # of the noise in the latents
        latents = latents * (next_sigma / sigma * kept)
        latents = latents + extrapolated * (next_alpha - next_sigma / sigma * kept * alpha)
        std = next_sigma * math.sqrt(1.0 - kept**2)
        if std > 0.0:
            latents = latents + run.fresh_noise() * std
        latents = run.end_step(i, latents, levels)
        previous = current
    return latents


sample = Sampler("dpmpp_2m_sde", solve, SPACINGS, eta=1.0)
