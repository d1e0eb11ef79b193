"""Sampling of latent consistency models: denoise, add fresh noise (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

Equivalent to diffusers' LCMScheduler(original_inference_steps=50, set_alpha_to_one=False, clip_sample=False). It is for
models and LoRAs that were distilled for it, with 2 to 8 steps and a guidance scale of 1 to 2.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.samplers.levels import AS_TRAINED, Levels
from ldm.diffusion.samplers.steps import Run, Sampler, predict_denoised
from ldm.diffusion.schedule import NoiseSchedule

DISTILLED_STEPS = 50  # the time steps that the model was distilled at
TIMESTEP_SCALING = 10.0
SIGMA_DATA = 0.5


def lcm_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Return some of the distillation's time steps, from the last one on: int64 (steps,), falling."""
    distilled = min(DISTILLED_STEPS, schedule.timesteps)
    falling = np.arange(distilled, 0, -1) * (schedule.timesteps // distilled) - 1
    return falling[np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(np.int64)]


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = Levels.of_timesteps(lcm_timesteps(run.steps, run.schedule), run.schedule)
    latents = run.start(levels)
    for i in run.remaining:
        output = run.output(latents, levels.timesteps[i])
        denoised = predict_denoised(output, latents, levels.alpha[i], levels.sigma[i], run.prediction_type)
        # The boundary condition: at time step 0 a consistency model returns its input.
        scaled = levels.timesteps[i] * TIMESTEP_SCALING
        skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        latents = denoised * out + latents * skip
        if i < run.steps - 1:
            latents = latents * levels.alpha[i + 1] + run.fresh_noise() * levels.sigma[i + 1]
        latents = run.end_step(i, latents, levels)
    return latents


sample = Sampler("lcm", solve, (AS_TRAINED,), draws=True, most_steps=DISTILLED_STEPS)
