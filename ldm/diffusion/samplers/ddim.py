"""DDIM (Song, Meng and Ermon 2020, equations 12 and 16): deterministic for eta 0, DDPM for eta 1.

Equivalent to diffusers' DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
clip_sample=False), which is Stable Diffusion's published configuration.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.diffusion.samplers.steps import Callback, Denoise, leading_timesteps, predict_denoised, predict_noise
from ldm.diffusion.schedule import NoiseSchedule, check_prediction_type


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
    """Sample latents. The arguments not listed here are described in `steps.py`.

    Args:
        eta: Share of DDPM's noise that each step adds, from 0 to 1.
        draw_noise: Returns fresh noise (N, C, h, w). Called once per step if eta is above 0.

    Raises:
        UserError: The number of steps does not fit the schedule.
        ValueError: eta is out of range, or above 0 without `draw_noise`.
    """
    check_prediction_type(prediction_type)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    if eta > 0.0 and draw_noise is None:
        raise ValueError("eta above 0 adds noise at each step: give draw_noise")
    timesteps = leading_timesteps(steps, schedule)
    stride = schedule.timesteps // steps

    latents = np.asarray(latents, np.float32)
    for i, timestep in enumerate(timesteps):
        # The last step ends at the noise level of time step 0, not at a clean image (set_alpha_to_one=False).
        abar, next_abar = schedule.alphas_cumprod[timestep], schedule.alphas_cumprod[max(timestep - stride, 0)]
        alpha, sigma = np.sqrt(abar), np.sqrt(1.0 - abar)
        output = np.asarray(denoise(latents, int(timestep)), np.float32)
        denoised = predict_denoised(output, latents, alpha, sigma, prediction_type)
        noise = predict_noise(output, latents, alpha, sigma, prediction_type)
        std = eta * np.sqrt((1.0 - next_abar) / (1.0 - abar) * (1.0 - abar / next_abar))
        latents = np.sqrt(next_abar) * denoised + np.sqrt(1.0 - next_abar - std**2) * noise
        if draw_noise is not None and eta > 0.0:
            latents = latents + std * draw_noise()
        latents = latents.astype(np.float32)
        if callback is not None:
            callback(i + 1)
    return latents
