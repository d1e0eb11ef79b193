"""DPM-Solver (2M): second order in the predicted noise (Lu et al. 2022, "DPM-Solver").

Equivalent to diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver", solver_order=2,
solver_type="midpoint", final_sigmas_type="sigma_min"). A last step to sigma 0 is impossible in the predicted noise,
because e^h is infinite there, and diffusers refuses final_sigmas_type="zero" too. The last step ends at the sigma of
time step 0, which is 0.029 for Stable Diffusion, and leaves that much noise in the latents. Use DPM-Solver++ where
this shows.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers import multistep
from ldm.diffusion.samplers.levels import SPACINGS, Levels
from ldm.diffusion.samplers.steps import Run, Sampler, predict_noise


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    return multistep.solve(
        run, final_sigma=float(run.schedule.sigmas[0]), predict=predict_noise, advance=_advance,
        first_order_end=run.steps < multistep.FEW_STEPS,
    )  # fmt: skip


def _advance(latents: np.ndarray, noise: np.ndarray, levels: Levels, i: int) -> np.ndarray:
    # alpha_t / alpha_s latents - sigma_t (e^h - 1) noise, with sigma_t e^h = alpha_t sigma_s / alpha_s.
    ratio = levels.alpha[i + 1] / levels.alpha[i]
    return ratio * latents + (levels.sigma[i + 1] - ratio * levels.sigma[i]) * noise


sample = Sampler("dpm_solver", solve, SPACINGS)
