"""What the samplers share: the interface, the time steps, and the way from the model's output to image and noise.

A sampler is a function

    sample(denoise, latents, steps, schedule, prediction_type, callback=None) -> latents

- denoise(x, t): the model's output (guidance included) for latents x (N, C, h, w) float32 at the time step t, an int:
  an array of the same shape;
- latents: the starting noise, (N, C, h, w) float32, of deviation 1; never written to;
- steps: calls of `denoise`, one each;
- prediction_type: "epsilon" or "v_prediction", what `denoise` gives;
- callback(step): called after each step, counting from 1, for progress bars.

It returns (N, C, h, w) float32 and is plain numpy: the network is the only thing that needs a device. Time steps and
formulas follow diffusers' schedulers with Stable Diffusion's settings, so that an image can be made again there from
the same starting noise.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule
from ldm.errors import UserError

Denoise = Callable[[np.ndarray, int], np.ndarray]
Callback = Callable[[int], None]


def check_steps(steps: int, timesteps: int) -> None:
    """Raise UserError unless `steps` different time steps fit the model's (at most one fewer than it has)."""
    if not 1 <= steps < timesteps:
        raise UserError(
            f"sampling_steps is {steps}: give a number from 1 to {timesteps - 1}, "
            f"the model was trained on {timesteps} time steps"
        )


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError for a prediction type that no sampler knows."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")


def linspace_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Time steps spread evenly from the last one down, 0 left out: int64 (steps,), falling. DPM-Solver's spacing."""
    check_steps(steps, schedule.timesteps)
    return np.linspace(0, schedule.timesteps - 1, steps + 1).round()[:0:-1].astype(np.int64)


def leading_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Multiples of timesteps // steps from 0 on, all one later (`steps_offset` 1), falling: int64 (steps,). DDIM's."""
    check_steps(steps, schedule.timesteps)
    return np.arange(steps - 1, -1, -1, dtype=np.int64) * (schedule.timesteps // steps) + 1


def to_denoised(output: np.ndarray, x: np.ndarray, alpha: np.float32, sigma: np.float32, kind: str) -> np.ndarray:
    """x_0 as the model sees it. alpha, sigma: weights of image and noise in x, alpha^2 + sigma^2 = 1."""
    if kind == "v_prediction":
        return alpha * x - sigma * output
    return (x - sigma * output) / alpha


def to_noise(output: np.ndarray, x: np.ndarray, alpha: np.float32, sigma: np.float32, kind: str) -> np.ndarray:
    """The noise in x as the model sees it. alpha, sigma as in `to_denoised`."""
    if kind == "v_prediction":
        return alpha * output + sigma * x
    return output
