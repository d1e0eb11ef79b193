"""Linear multistep: the slopes of up to four steps, by the polynomial through them (Karras et al. 2022; Crowson).

Equivalent to diffusers' LMSDiscreteScheduler() with Stable Diffusion's betas, use_karras_sigmas and
use_exponential_sigmas. Where a sampling begins at a later step, the order grows from 1 again; diffusers leaves out the
slopes that it does not have.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, sigma_levels
from ldm.diffusion.samplers.sigma_space import slope
from ldm.diffusion.samplers.steps import Run, Sampler

ORDER = 4
# Gauss-Legendre points: exact for polynomials up to a degree of 7, and those here have 3.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(ORDER)


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = sigma_levels(run.steps, run.schedule, run.spacing)
    latents = run.start(levels, std=levels.sigma[0])
    slopes: list[np.ndarray] = []  # the latest one first
    for i in run.remaining:
        slopes = [slope(run, latents, levels.sigma[i], levels.timesteps[i]), *slopes[: ORDER - 1]]
        known = [levels.sigma[i - back] for back in range(len(slopes))]
        for back, estimate in enumerate(slopes):
            latents = latents + estimate * _coefficient(known, back, levels.sigma[i + 1])
        latents = run.end_step(i, latents, levels)
    return latents


def _coefficient(sigmas: list[float], index: int, end: float) -> float:
    """Integrate the polynomial that is 1 at one of the sigmas and 0 at the others, from the first one to `end`."""
    half = 0.5 * (end - sigmas[0])
    points = sigmas[0] + half * (_POINTS + 1.0)
    values = np.ones_like(points)
    for k, sigma in enumerate(sigmas):
        if k != index:
            values *= (points - sigma) / (sigmas[index] - sigma)
    return float(half * (values @ _WEIGHTS))


sample = Sampler("lms", solve, SPACINGS)
