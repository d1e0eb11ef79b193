"""DPM-Solver++ (2M): second order in the denoised latents (Lu et al. 2022, "DPM-Solver++", algorithm 2).

Equivalent to diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2,
solver_type="midpoint", final_sigmas_type="zero"). The last step goes to sigma 0 in first order, so its result is the
network's estimate of the clean latents.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.multistep import NoiseLevels, solve
from ldm.diffusion.samplers.steps import Callback, Denoise, predict_denoised
from ldm.diffusion.schedule import NoiseSchedule


def sample(
    denoise: Denoise,
    latents: np.ndarray,
    steps: int,
    schedule: NoiseSchedule,
    prediction_type: str,
    callback: Callback | None = None,
) -> np.ndarray:
    """Sample latents. Arguments and errors as in `steps.py`."""
    return solve(
        denoise, latents, steps, schedule, prediction_type, callback,
        final_sigma=0.0, predict=predict_denoised, advance=_advance, first_order_end=True,
    )  # fmt: skip


def _advance(latents: np.ndarray, denoised: np.ndarray, levels: NoiseLevels, i: int) -> np.ndarray:
    # sigma_t / sigma_s latents - alpha_t (e^-h - 1) denoised. With alpha_t e^-h = sigma_t alpha_s / sigma_s this
    # also holds at sigma_t = 0, where h is infinite.
    ratio = levels.sigma[i + 1] / levels.sigma[i]
    return ratio * latents + (levels.alpha[i + 1] - ratio * levels.alpha[i]) * denoised
