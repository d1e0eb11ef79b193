"""The second-order multistep loop of DPM-Solver and DPM-Solver++."""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from ldm.diffusion.samplers.steps import Callback, Denoise

# With fewer steps the last one is of first order, which is more stable (diffusers' `lower_order_final`).
FEW_STEPS = 15


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
    timesteps: np.ndarray,
    levels: NoiseLevels,
    estimate: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    advance: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    first_order_end: bool,
    callback: Callback | None,
) -> np.ndarray:
    """Solves the sampling equation from point 0 of `levels` to the last one.

    The second order comes from extrapolating the estimate by half a step in lambda, along the line through it and the
    estimate before it (the midpoint rule). The first step has no estimate before it and is of first order.

    Args:
        estimate: estimate(output, latents, i) returns what the solver extrapolates, the denoised latents or the noise,
            given the network's output at point i.
        advance: advance(latents, estimate, i) returns the latents at point i + 1. It is exact for a constant estimate.
        first_order_end: Whether the last step is of first order.
    """
    latents = np.asarray(latents, np.float32)
    previous = None
    last = len(timesteps) - 1
    for i, timestep in enumerate(timesteps):
        current = estimate(np.asarray(denoise(latents, int(timestep)), np.float32), latents, i)
        extrapolated = current
        if previous is not None and not (i == last and first_order_end):
            step = levels.log_snr(i + 1) - levels.log_snr(i)
            step_before = levels.log_snr(i) - levels.log_snr(i - 1)
            extrapolated = current + (0.5 * step / step_before) * (current - previous)
        latents = advance(latents, extrapolated, i).astype(np.float32)
        previous = current
        if callback is not None:
            callback(i + 1)
    return latents
