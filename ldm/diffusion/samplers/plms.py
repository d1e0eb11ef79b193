"""PLMS: DDIM's step with the outputs of up to four steps (Liu et al. 2022, arXiv 2202.09778).

Equivalent to diffusers' PNDMScheduler(skip_prk_steps=True, timestep_spacing="leading", steps_offset=1,
set_alpha_to_one=False), which is Stable Diffusion's published configuration. The first step calls the network twice.
Where a sampling begins at a later step, that one is the first; diffusers' pipelines take a wrong time step there.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.levels import STRIDED_SPACINGS, Levels, whole_timesteps
from ldm.diffusion.samplers.steps import Run, Sampler

# Adams-Bashforth: the factors of the latest outputs, the last one first.
FACTORS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def solve(run: Run) -> np.ndarray:
    """Take the steps of a run."""
    levels = Levels.of_timesteps(whole_timesteps(run.steps, run.schedule, run.spacing), run.schedule)
    stride = run.schedule.timesteps // run.steps
    latents = run.start(levels)
    outputs: list[np.ndarray] = []  # the latest one first
    for i in run.remaining:
        timestep = levels.timesteps[i]
        outputs = [run.output(latents, timestep), *outputs[:3]]
        if len(outputs) > 1:
            output = sum_of(outputs, FACTORS[len(outputs)])
            latents = _advance(run, latents, output, timestep, timestep - stride)
        else:
            advanced = _advance(run, latents, outputs[0], timestep, timestep - stride)
            if i < run.steps - 1:  # the first step is taken again, with the mean of the outputs at its two ends
                timestep = levels.timesteps[i + 1]
                output = sum_of([run.output(advanced, timestep), outputs[0]], (0.5, 0.5))
                advanced = _advance(run, latents, output, timestep + stride, timestep)
            latents = advanced
        latents = run.end_step(i, latents, levels)
    return latents


def sum_of(arrays: list[np.ndarray], factors: tuple[float, ...]) -> np.ndarray:
    """Return the sum of arrays that are multiplied by factors."""
    total = arrays[0] * factors[0]
    for array, factor in zip(arrays[1:], factors[1:]):
        total = total + array * factor
    return total


def _advance(run: Run, latents: np.ndarray, output: np.ndarray, timestep: int, next_timestep: int) -> np.ndarray:
    """Return the latents at the next time step (equation 11), or at time step 0 if that is before it."""
    abar = float(run.schedule.alphas_cumprod[timestep])
    next_abar = float(run.schedule.alphas_cumprod[max(next_timestep, 0)])
    if run.prediction_type == "v_prediction":
        output = output * math.sqrt(abar) + latents * math.sqrt(1.0 - abar)
    factor = (abar - next_abar) / (abar * math.sqrt(1.0 - next_abar) + math.sqrt(abar * (1.0 - abar) * next_abar))
    return latents * math.sqrt(next_abar / abar) + output * factor


# Its formula divides by the image's share, which is 0 in noise alone.
sample = Sampler("plms", solve, STRIDED_SPACINGS, zero_terminal=False)
