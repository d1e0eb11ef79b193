"""The second-order multistep loop of DPM-Solver and DPM-Solver++."""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from ldm.diffusion.samplers.steps import Callback, Denoise, linspace_timesteps
from ldm.diffusion.schedule import NoiseSchedule, check_prediction_type

# With fewer steps the last one is of first order, which is more stable (diffusers' `lower_order_final`).
FEW_STEPS = 15
# The sigma at which noise alone is sampled, where it is infinite: diffusers' schedulers put abar to 2^-24 there.
MAX_SIGMA = float(np.sqrt(2.0**24 - 1.0))


class NoiseLevels(NamedTuple):
    """Factors of image and noise at each point of the solver's path, including its end: float64 (steps + 1,)."""

    alpha: np.ndarray
    sigma: np.ndarray

    @classmethod
    def from_sigmas(cls, sigmas: np.ndarray) -> NoiseLevels:
        """Build the levels from ratios of noise to image, which diffusers calls sigmas."""
        alpha = 1.0 / np.sqrt(1.0 + sigmas**2)
        return cls(alpha, sigmas * alpha)

    def log_snr(self, i: int) -> float:
        """Return lambda, log(alpha / sigma), at point i. It is infinite for a sigma of 0."""
        return float(np.log(self.alpha[i] / self.sigma[i]))


def solve(
    denoise: Denoise,
    latents: np.ndarray,
    steps: int,
    schedule: NoiseSchedule,
    prediction_type: str,
    callback: Callback | None,
    *,
    final_sigma: float,
    predict: Callable[..., np.ndarray],
    advance: Callable[[np.ndarray, np.ndarray, NoiseLevels, int], np.ndarray],
    first_order_end: bool,
) -> np.ndarray:
    """Solve the sampling equation. The arguments not listed here are described in `steps.py`.

    The second order comes from extrapolating the estimate by half a step in lambda, along the line through it and the
    estimate before it (the midpoint rule). The first step has no estimate before it and is of first order.

    Args:
        final_sigma: The ratio of noise to image after the last step.
        predict: What the solver extrapolates: `predict_denoised` or `predict_noise`.
        advance: advance(latents, estimate, levels, i) returns the latents at point i + 1 of the noise levels. It is
            exact for a constant estimate.
        first_order_end: Whether the last step is of first order.
    """
    check_prediction_type(prediction_type)
    timesteps = linspace_timesteps(steps, schedule)
    sigmas = np.minimum(schedule.sigmas[timesteps], MAX_SIGMA)
    levels = NoiseLevels.from_sigmas(np.append(sigmas, final_sigma))
    latents = np.asarray(latents, np.float32)
    previous = None
    for i, timestep in enumerate(timesteps):
        output = np.asarray(denoise(latents, int(timestep)), np.float32)
        current = predict(output, latents, levels.alpha[i], levels.sigma[i], prediction_type)
        extrapolated = current
        if previous is not None and not (i == steps - 1 and first_order_end):
            step = levels.log_snr(i + 1) - levels.log_snr(i)
            step_before = levels.log_snr(i) - levels.log_snr(i - 1)
            extrapolated = current + (0.5 * step / step_before) * (current - previous)
        latents = advance(latents, extrapolated, levels, i).astype(np.float32)
        previous = current
        if callback is not None:
            callback(i + 1)
    return latents
