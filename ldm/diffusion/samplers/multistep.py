"""The second-order multistep loop of DPM-Solver and DPM-Solver++."""

from __future__ import annotations

from typing import Callable

import numpy as np

from ldm.diffusion.samplers.levels import Levels, solver_levels
from ldm.diffusion.samplers.steps import Run

# With fewer steps the last one is of first order, which is more stable (diffusers' `lower_order_final`).
FEW_STEPS = 15


def solve(
    run: Run,
    *,
    final_sigma: float,
    predict: Callable[..., np.ndarray],
    advance: Callable[[np.ndarray, np.ndarray, Levels, int], np.ndarray],
    first_order_end: bool,
) -> np.ndarray:
    """Solve the sampling equation.

    The second order comes from extrapolating the estimate by half a step in lambda, along the line through it and the
    estimate before it (the midpoint rule). The first step has no estimate before it and is of first order.

    Args:
        run: What the sampler was called with.
        final_sigma: The ratio of noise to image after the last step.
        predict: What the solver extrapolates: `predict_denoised` or `predict_noise`.
        advance: advance(latents, estimate, levels, i) returns the latents at step i + 1 of the levels. It is exact for
            a constant estimate.
        first_order_end: Whether the last step is of first order.
    """
    levels = solver_levels(run.steps, run.schedule, run.spacing, final_sigma)
    latents = run.start(levels)
    previous = None
    for i in run.remaining:
        output = run.output(latents, levels.timesteps[i])
        current = predict(output, latents, levels.alpha[i], levels.sigma[i], run.prediction_type)
        extrapolated = current
        if previous is not None and not (i == run.steps - 1 and first_order_end):
            step = levels.log_snr(i + 1) - levels.log_snr(i)
            step_before = levels.log_snr(i) - levels.log_snr(i - 1)
            extrapolated = current + (0.5 * step / step_before) * (current - previous)
        latents = run.end_step(i, advance(latents, extrapolated, levels, i), levels)
        previous = current
    return latents
