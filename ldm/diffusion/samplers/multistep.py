"""The second-order multistep loop that DPM-Solver and DPM-Solver++ have in common."""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

from ldm.diffusion.samplers.steps import Callback, Denoise

# Below this many steps the last one is of first order, which steadies it (diffusers' `lower_order_final`).
FEW_STEPS = 15


class Levels(NamedTuple):
    """Weights of image and noise at each point that the solver visits, the end included: float64 (steps + 1,)."""

    alpha: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of_sigmas(cls, sigmas: np.ndarray) -> Levels:
        """From sigmas in noise per unit of image, as diffusers keeps them."""
        alpha = 1.0 / np.sqrt(1.0 + sigmas**2)
        return cls(alpha, sigmas * alpha)

    def log_snr(self, i: int) -> float:
        """Lambda at point i, log(alpha / sigma); not for a point of sigma 0."""
        return float(np.log(self.alpha[i] / self.sigma[i]))


def solve(
    denoise: Denoise,
    latents: np.ndarray,
    timesteps: np.ndarray,
    levels: Levels,
    estimate: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    advance: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    first_order_end: bool,
    callback: Callback | None,
) -> np.ndarray:
    """Walk from point 0 of `levels` to its end.

    estimate(output, x, i): what the solver follows (the image, or the noise) from the model's output at point i.
    advance(x, estimate, i): x at point i + 1 if the estimate stayed what it is; it holds exactly for a constant one.
    The second order is in the estimate: half a step further along the line through it and the one before, in lambda
    (the midpoint rule). The first step has none before and is of first order, the last if `first_order_end`.
    """
    x = np.asarray(latents, np.float32)
    previous = None
    last = len(timesteps) - 1
    for i, timestep in enumerate(timesteps):
        current = estimate(np.asarray(denoise(x, int(timestep)), np.float32), x, i)
        followed = current
        if previous is not None and not (i == last and first_order_end):
            step = levels.log_snr(i + 1) - levels.log_snr(i)
            step_before = levels.log_snr(i) - levels.log_snr(i - 1)
            followed = current + (0.5 * step / step_before) * (current - previous)
        x = advance(x, followed, i).astype(np.float32)
        previous = current
        if callback is not None:
            callback(i + 1)
    return x
