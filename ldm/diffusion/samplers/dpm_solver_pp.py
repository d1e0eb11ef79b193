"""DPM-Solver++ (2M): second order in the predicted image (Lu et al. 2022, "DPM-Solver++", algorithm 2).

As diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
final_sigmas_type="zero"): the last step goes to sigma 0 and is of first order, and so ends on the predicted image
itself.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.multistep import Levels, solve
from ldm.diffusion.samplers.steps import Callback, Denoise, check_prediction_type, linspace_timesteps, to_denoised
from ldm.diffusion.schedule import NoiseSchedule


def sample(
    denoise: Denoise,
    latents: np.ndarray,
    steps: int,
    schedule: NoiseSchedule,
    prediction_type: str,
    callback: Callback | None = None,
) -> np.ndarray:
    """Latents (N, C, h, w) float32 after `steps` steps; arguments and errors as in steps.py."""
    check_prediction_type(prediction_type)
    timesteps = linspace_timesteps(steps, schedule)
    levels = Levels.of_sigmas(np.append(schedule.sigmas[timesteps], 0.0))

    def estimate(output: np.ndarray, x: np.ndarray, i: int) -> np.ndarray:
        return to_denoised(output, x, levels.alpha[i], levels.sigma[i], prediction_type)

    def advance(x: np.ndarray, image: np.ndarray, i: int) -> np.ndarray:
        # sigma_t / sigma_s x - alpha_t (e^-h - 1) image, with alpha_t e^-h = sigma_t alpha_s / sigma_s, which holds
        # at sigma_t = 0 as well, where h is infinite.
        ratio = levels.sigma[i + 1] / levels.sigma[i]
        return ratio * x + (levels.alpha[i + 1] - ratio * levels.alpha[i]) * image

    return solve(denoise, latents, timesteps, levels, estimate, advance, first_order_end=True, callback=callback)
