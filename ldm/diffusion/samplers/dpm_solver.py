"""DPM-Solver (2M): second order in the predicted noise (Lu et al. 2022, "DPM-Solver").

As diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver", solver_order=2, solver_type="midpoint",
final_sigmas_type="sigma_min"). In the predicted noise the last step to sigma 0 has no end (e^h is infinite), and
diffusers refuses final_sigmas_type="zero" for it: the last step goes to the sigma of time step 0, 0.029 for Stable
Diffusion, and so much noise stays in the latents. Where that shows, use DPM-Solver++.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.multistep import FEW_STEPS, Levels, solve
from ldm.diffusion.samplers.steps import Callback, Denoise, check_prediction_type, linspace_timesteps, to_noise
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
    levels = Levels.of_sigmas(np.append(schedule.sigmas[timesteps], schedule.sigmas[0]))

    def estimate(output: np.ndarray, x: np.ndarray, i: int) -> np.ndarray:
        return to_noise(output, x, levels.alpha[i], levels.sigma[i], prediction_type)

    def advance(x: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        # alpha_t / alpha_s x - sigma_t (e^h - 1) noise, with sigma_t e^h = alpha_t sigma_s / alpha_s.
        ratio = levels.alpha[i + 1] / levels.alpha[i]
        return ratio * x + (levels.sigma[i + 1] - ratio * levels.sigma[i]) * noise

    few = steps < FEW_STEPS
    return solve(denoise, latents, timesteps, levels, estimate, advance, first_order_end=few, callback=callback)
