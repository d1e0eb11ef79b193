"""Which noise levels the steps of a sampler are at: time steps, and the factors of image and noise there.

Three families of samplers space their steps differently in diffusers, so there is a function for each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.settings.sampler_names import AS_TRAINED, EXPONENTIAL, KARRAS, LINSPACE, SCHEDULES, SGM_UNIFORM

SPACINGS = SCHEDULES
# Those that are time steps of the model, for samplers that cannot go between them.
WHOLE_SPACINGS = (AS_TRAINED, SGM_UNIFORM, LINSPACE)
# Those whose time steps are timesteps // steps apart, for samplers that step by so many. With linspace they would end a
# step at another time step than the next one begins at, as diffusers' do: an image with much noise.
STRIDED_SPACINGS = (AS_TRAINED, SGM_UNIFORM)

KARRAS_RHO = 7.0  # Karras et al. 2022 (arXiv 2206.00364), table 1
# The sigma at which noise alone is sampled, where it is infinite: diffusers' schedulers put abar to 2^-24 there.
MAX_SIGMA = float(np.sqrt(2.0**24 - 1.0))


class Levels(NamedTuple):
    """The noise levels of a sampling: latents at step i are alpha[i] * image + sigma[i] * noise.

    The samplers of "sigma space" leave alpha at 1. In the others, alpha^2 + sigma^2 is 1.
    """

    timesteps: list  # all int, or all float, (steps,)
    alpha: list[float]  # with the level after the last step, (steps + 1,)
    sigma: list[float]  # (steps + 1,)

    @classmethod
    def of_ratios(cls, timesteps: np.ndarray, ratios: np.ndarray) -> Levels:
        """Build levels with alpha^2 + sigma^2 = 1 from the ratios of noise to image, (steps + 1,)."""
        alpha = 1.0 / np.sqrt(1.0 + ratios**2)
        return cls(timesteps.tolist(), alpha.tolist(), (ratios * alpha).tolist())

    @classmethod
    def of_timesteps(cls, timesteps: np.ndarray, schedule: NoiseSchedule) -> Levels:
        """Build the levels of whole time steps, and a clean image after them."""
        abars = schedule.alphas_cumprod[timesteps]
        alpha, sigma = np.sqrt(abars).tolist(), np.sqrt(1.0 - abars).tolist()
        return cls(timesteps.tolist(), [*alpha, 1.0], [*sigma, 0.0])

    def log_snr(self, i: int) -> float:
        """Return lambda, log(alpha / sigma), of step i. It is infinite for a sigma of 0."""
        return float(np.log(self.alpha[i] / self.sigma[i])) if self.sigma[i] else float("inf")


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


def even_timesteps(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """Return evenly spaced points from the last time step down to 0: float64 (steps,), falling."""
    # diffusers takes a single step at time step 0, which draws nothing.
    return np.linspace(schedule.timesteps - 1, 0, steps)


def whole_timesteps(steps: int, schedule: NoiseSchedule, spacing: str) -> np.ndarray:
    """Return the time steps of DDIM, PLMS and DDPM: int64 (steps,), falling. As trained they are leading."""
    if spacing == SGM_UNIFORM:
        return trailing_timesteps(steps, schedule)
    if spacing == LINSPACE:
        return even_timesteps(steps, schedule).round().astype(np.int64)
    return leading_timesteps(steps, schedule)


def solver_levels(steps: int, schedule: NoiseSchedule, spacing: str, final_sigma: float) -> Levels:
    """Return the levels of the solvers in log(alpha / sigma): DPM-Solver, DPM-Solver++, UniPC. As trained: linspace.

    `final_sigma` is the ratio of noise to image after the last step. The time steps of karras are rounded and those of
    exponential rounded down, as in diffusers; the ratios are not.
    """
    sigmas = trained_sigmas(schedule)
    if spacing in (KARRAS, EXPONENTIAL):
        ratios = between(sigmas[-1], sigmas[0], steps, spacing)
        timesteps = timestep_of(ratios, schedule)
        timesteps = (timesteps.round() if spacing == KARRAS else timesteps).astype(np.int64)
    else:
        trailing = spacing == SGM_UNIFORM or (spacing == AS_TRAINED and schedule.zero_terminal_snr)
        timesteps = (trailing_timesteps if trailing else linspace_timesteps)(steps, schedule)
        ratios = sigmas[timesteps]
    return Levels.of_ratios(timesteps, np.append(ratios, final_sigma))


def sigma_levels(steps: int, schedule: NoiseSchedule, spacing: str, round_karras: bool = False) -> Levels:
    """Return the levels of the samplers of sigma space, such as Euler's. As trained they are linspace.

    Time steps keep their fraction, and sigma is interpolated between two of them. `round_karras`: round those of
    karras, as diffusers does for DPM2 alone.
    """
    if spacing == SGM_UNIFORM or (spacing == AS_TRAINED and schedule.zero_terminal_snr):
        timesteps = trailing_timesteps(steps, schedule).astype(np.float64)
    else:
        timesteps = even_timesteps(steps, schedule).astype(np.float32).astype(np.float64)
    trained = trained_sigmas(schedule)
    sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if spacing in (KARRAS, EXPONENTIAL):
        sigmas = between(trained[-1], trained[0], steps, spacing)
        timesteps = timestep_of(sigmas, schedule)
        if spacing == KARRAS and round_karras:
            timesteps = timesteps.round()
    return Levels(timesteps.tolist(), [1.0] * (steps + 1), [*sigmas.tolist(), 0.0])


def between(highest: float, lowest: float, steps: int, spacing: str) -> np.ndarray:
    """Return sigmas from the highest to the lowest as Karras et al. space them (equation 5), or exponentially."""
    if spacing == KARRAS:
        ends = highest ** (1 / KARRAS_RHO), lowest ** (1 / KARRAS_RHO)
        return np.linspace(*ends, steps) ** KARRAS_RHO
    return np.exp(np.linspace(np.log(highest), np.log(lowest), steps))


def trained_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Return the schedule's ratios of noise to image, where noise alone has MAX_SIGMA: float64 (timesteps,)."""
    return np.minimum(schedule.sigmas, MAX_SIGMA)


def timestep_of(sigma: np.ndarray | float, schedule: NoiseSchedule) -> np.ndarray:
    """Return the time steps of ratios of noise to image, between two by their logarithm: float64."""
    trained = np.log(trained_sigmas(schedule))
    return np.interp(np.log(sigma), trained, np.arange(len(trained)))
