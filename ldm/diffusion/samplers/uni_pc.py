"""UniPC: a predictor of second order, and a corrector from the same outputs (Zhao et al. 2023, arXiv 2302.04867).

Equivalent to diffusers' UniPCMultistepScheduler(solver_order=2, solver_type="bh2", predict_x0=True,
final_sigmas_type="zero"). One call a step: the output at a step corrects the latents that it was computed from.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import SPACINGS, Levels, solver_levels
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = solver_levels(run.steps, run.schedule, run.spacing, final_sigma=0.0)
    latents = run.start(levels)
    corrected = latents
    estimates: list[np.ndarray] = []  # of the clean latents, the latest one first
    order = 0  # of the step before
    for i in run.remaining:
        output = run.output(latents, levels.timesteps[i])
        current = predict_denoised(output, latents, levels.alpha[i], levels.sigma[i], run.prediction_type)
        corrected = _correct(levels, i, order, corrected, estimates, current) if estimates else latents
        estimates = [current, *estimates[:1]]
        order = min(2, len(estimates), run.steps - i)
        latents = run.end_step(i, _predict(levels, i, order, corrected, estimates), levels)
    return latents


def _predict(levels: Levels, i: int, order: int, latents: np.ndarray, estimates: list[np.ndarray]) -> np.ndarray:
    """Return the latents of step i + 1 (algorithm 2 with B(h) = e^h - 1)."""
    ratio = levels.sigma[i + 1] / levels.sigma[i]
    # -alpha_t (e^-h - 1), which also holds for an infinite h.
    factor = levels.alpha[i + 1] - ratio * levels.alpha[i]
    advanced = latents * ratio + estimates[0] * factor
    if order == 2:
        share = (levels.log_snr(i - 1) - levels.log_snr(i)) / (levels.log_snr(i + 1) - levels.log_snr(i))
        advanced = advanced + (estimates[1] - estimates[0]) * (0.5 * factor / share)
    return advanced


def _correct(
    levels: Levels, i: int, order: int, before: np.ndarray, estimates: list[np.ndarray], current: np.ndarray
) -> np.ndarray:
    """Return better latents of step i, from the corrected latents of the step before (algorithm 1)."""
    ratio = levels.sigma[i] / levels.sigma[i - 1]
    factor = levels.alpha[i] - ratio * levels.alpha[i - 1]
    advanced = before * ratio + estimates[0] * factor
    if order == 1:
        return advanced + (current - estimates[0]) * (0.5 * factor)
    h = levels.log_snr(i) - levels.log_snr(i - 1)
    share = (levels.log_snr(i - 2) - levels.log_snr(i - 1)) / h
    base = math.expm1(-h)
    first = base / -h - 1.0
    second = first / -h - 0.5
    weights = np.linalg.solve([[1.0, 1.0], [share, 1.0]], [first / base, 2.0 * second / base]).tolist()
    advanced = advanced + (estimates[1] - estimates[0]) * (factor * weights[0] / share)
    return advanced + (current - estimates[0]) * (factor * weights[1])


sample = Sampler("uni_pc", solve, SPACINGS)
