"""What the samplers share: their interface, the time steps, and the estimates that follow from the network's output.

A sampler is a function

    sample(denoise, latents, steps, schedule, prediction_type, callback=None) -> latents

- denoise(latents, timestep): the network's output, guidance included, for noisy latents (N, C, h, w) float32 at one
  time step, an int. The output has the same shape.
- latents: the starting noise, (N, C, h, w) float32, with a standard deviation of 1. It is not changed.
- steps: number of calls of `denoise`.
- schedule, prediction_type: those that the network was trained with.
- callback(step): called after each step with its number, counted from 1, for progress bars.

A schedule whose last time step is noise alone (`zero_terminal_snr`) is sampled from that time step on, with the spacing
that diffusers calls "trailing" (Lin et al. 2023, arXiv 2305.08891, section 3.3).

It returns the final latents (N, C, h, w) float32. Samplers are plain NumPy: only the network needs a device. Time steps
and formulas follow diffusers' schedulers with Stable Diffusion's settings, so diffusers makes the same image from the
same starting noise.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

Denoise = Callable[[np.ndarray, int], np.ndarray]
Callback = Callable[[int], None]


def check_steps(steps: int, timesteps: int) -> None:
    """Raise UserError unless `steps` is from 1 to one less than the model's number of time steps."""
    if not 1 <= steps < timesteps:
        raise UserError(
            f"sampling_steps is {steps}: give a number from 1 to {timesteps - 1}, "
            f"the model was trained on {timesteps} time steps"
        )


def linspace_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Return evenly spaced time steps from the last one down to above 0, for DPM-Solver: int64 (steps,), falling."""
    check_steps(steps, schedule.timesteps)
    if schedule.zero_terminal_snr:
        return trailing_timesteps(steps, schedule)
    return np.linspace(0, schedule.timesteps - 1, steps + 1).round()[:0:-1].astype(np.int64)


def leading_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Return 1 + the multiples of timesteps // steps, for DDIM (`steps_offset` 1): int64 (steps,), falling."""
    check_steps(steps, schedule.timesteps)
    if schedule.zero_terminal_snr:
        return trailing_timesteps(steps, schedule)
    return np.arange(steps - 1, -1, -1, dtype=np.int64) * (schedule.timesteps // steps) + 1


def trailing_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Return every (timesteps / steps)-th time step from the last one down, rounded: int64 (steps,), falling."""
    return np.arange(schedule.timesteps, 0, -schedule.timesteps / steps)[:steps].round().astype(np.int64) - 1


def predict_denoised(
    output: np.ndarray, latents: np.ndarray, alpha: np.floating, sigma: np.floating, prediction_type: str
) -> np.ndarray:
    """Return the network's estimate of the clean latents, given its output for `latents`.

    `latents` are alpha * clean latents + sigma * noise, with alpha^2 + sigma^2 = 1.
    """
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * output
    return (latents - sigma * output) / alpha


def predict_noise(
    output: np.ndarray, latents: np.ndarray, alpha: np.floating, sigma: np.floating, prediction_type: str
) -> np.ndarray:
    """Return the network's estimate of the noise in `latents`. Arguments as in `predict_denoised`."""
    if prediction_type == "v_prediction":
        return alpha * output + sigma * latents
    return output
