"""DDIM (Song, Meng and Ermon 2020, equations 12 and 16), deterministic at eta 0, DDPM's noise at eta 1.

As diffusers' DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False),
which is Stable Diffusion's published configuration.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.diffusion.samplers.steps import (
    Callback,
    Denoise,
    check_prediction_type,
    leading_timesteps,
    to_denoised,
    to_noise,
)
from ldm.diffusion.schedule import NoiseSchedule


def sample(
    denoise: Denoise,
    latents: np.ndarray,
    steps: int,
    schedule: NoiseSchedule,
    prediction_type: str,
    callback: Callback | None = None,
    eta: float = 0.0,
    draw_noise: Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    """Latents (N, C, h, w) float32 after `steps` steps; arguments and errors as in steps.py.

    eta: share of DDPM's noise that is added at each step, 0 to 1. draw_noise(): fresh noise (N, C, h, w), asked for
    once a step where eta is not 0. Raises ValueError where eta is out of range, or is not 0 without `draw_noise`.
    """
    check_prediction_type(prediction_type)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is a share from 0 to 1, not {eta}")
    if eta > 0.0 and draw_noise is None:
        raise ValueError("eta above 0 adds noise at each step: give draw_noise")
    timesteps = leading_timesteps(steps, schedule)
    stride = schedule.timesteps // steps
    alphas_cumprod = schedule.alphas_cumprod

    x = np.asarray(latents, np.float32)
    for i, timestep in enumerate(timesteps):
        # Past the first time step the end is that of time step 0, not a clean image (set_alpha_to_one False).
        here, there = alphas_cumprod[timestep], alphas_cumprod[max(timestep - stride, 0)]
        alpha, sigma = np.sqrt(here), np.sqrt(1.0 - here)
        output = np.asarray(denoise(x, int(timestep)), np.float32)
        image = to_denoised(output, x, alpha, sigma, prediction_type)
        noise = to_noise(output, x, alpha, sigma, prediction_type)
        deviation = eta * np.sqrt((1.0 - there) / (1.0 - here) * (1.0 - here / there))
        x = np.sqrt(there) * image + np.sqrt(1.0 - there - deviation**2) * noise
        if eta > 0.0:
            x = x + deviation * draw_noise()
        x = x.astype(np.float32)
        if callback is not None:
            callback(i + 1)
    return x
