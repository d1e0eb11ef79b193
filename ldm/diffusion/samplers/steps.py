"""What the samplers share: their interface, and the estimates that follow from the network's output.

A sampler is called as

    sample(denoise, latents, steps, schedule, prediction_type, callback=None, **options) -> latents

- denoise(latents, timestep): the network's output, guidance included, for noisy latents (N, C, h, w) float32 at one
  time step, an int, or a float where a sampler goes between two of them. The output has the same shape.
- latents: the starting noise, (N, C, h, w) float32, with a standard deviation of 1. It is not changed.
- steps: number of steps of the whole schedule. Some samplers call `denoise` twice a step.
- schedule, prediction_type: those that the network was trained with.
- callback(step): called after each step with its number, counted from 1, for progress bars. A sampling that begins at
  step `first_step` tells first_step + 1 first.

The options are keyword arguments (`Sampler.__call__`): which noise levels, fresh noise, and where to begin.

A schedule whose last time step is noise alone (`zero_terminal_snr`) is sampled from that time step on, with the spacing
that diffusers calls "trailing" (Lin et al. 2023, arXiv 2305.08891, section 3.3).

It returns the final latents (N, C, h, w) float32. Time steps and formulas follow diffusers' schedulers with Stable
Diffusion's settings, so diffusers makes the same image from the same starting noise.

Samplers are plain arithmetic: a step adds and subtracts arrays, and multiplies and divides them by Python floats, which
are computed on the host. So they work on NumPy's arrays, and on any other type of array that can do this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np

from ldm.diffusion.samplers.levels import AS_TRAINED, Levels, check_steps
from ldm.diffusion.schedule import NoiseSchedule, check_prediction_type
from ldm.errors import UserError

Denoise = Callable[[np.ndarray, float], np.ndarray]
Callback = Callable[[int], None]
DrawNoise = Callable[[], np.ndarray]
Constrain = Callable[[np.ndarray, float, float], np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a sampler was called with. The arguments are described in `steps.py` and in `Sampler.__call__`."""

    denoise: Denoise
    noise: np.ndarray
    steps: int
    schedule: NoiseSchedule
    prediction_type: str
    callback: Callback | None
    spacing: str
    eta: float
    draw_noise: DrawNoise | None
    first_step: int
    clean_latents: np.ndarray | None
    constrain: Constrain | None

    @property
    def remaining(self) -> range:
        """The steps to take."""
        return range(self.first_step, self.steps)

    def start(self, levels: Levels, std: float = 1.0) -> np.ndarray:
        """Return the latents at the first step: noise with this standard deviation, or clean latents with noise."""
        if self.clean_latents is not None:
            alpha, sigma = levels.alpha[self.first_step], levels.sigma[self.first_step]
            return self.clean_latents * alpha + self.noise * sigma
        return self.noise if std == 1.0 else self.noise * std

    def output(self, latents: np.ndarray, timestep: float) -> np.ndarray:
        """Return the network's output."""
        return as_float32(self.denoise(latents, timestep))

    def fresh_noise(self) -> np.ndarray:
        """Draw noise of the latents' shape."""
        assert self.draw_noise is not None  # checked by Sampler
        return as_float32(self.draw_noise())

    def end_step(self, i: int, latents: np.ndarray, levels: Levels) -> np.ndarray:
        """Return the latents after step i, counted from 0, and tell that it is done."""
        if self.constrain is not None:
            at_end = i == self.steps - 1  # diffusers puts the clean image there, whatever noise the sampler leaves
            latents = self.constrain(
                latents, 1.0 if at_end else levels.alpha[i + 1], 0.0 if at_end else levels.sigma[i + 1]
            )
        if self.callback is not None:
            self.callback(i + 1)
        return latents


@dataclass(frozen=True)
class Sampler:
    """A sampler, which is called as a function.

    Attributes:
        name: As in SAMPLERS, for errors.
        solve: Takes the steps of a run.
        spacings: The schedules of noise levels that it offers.
        eta: The default share of fresh noise. None where there is no share to choose.
        draws: Whether each step draws fresh noise, whatever `eta` is.
        zero_terminal: Whether it can begin from noise alone.
        most_steps: The most steps that it can take, None for one less than the model's time steps.
    """

    name: str
    solve: Callable[[Run], np.ndarray]
    spacings: tuple[str, ...]
    eta: float | None = None
    draws: bool = False
    zero_terminal: bool = True
    most_steps: int | None = None

    def __call__(
        self,
        denoise: Denoise,
        latents: np.ndarray,
        steps: int,
        schedule: NoiseSchedule,
        prediction_type: str,
        callback: Callback | None = None,
        *,
        spacing: str = AS_TRAINED,
        eta: float | None = None,
        draw_noise: DrawNoise | None = None,
        first_step: int = 0,
        clean_latents: np.ndarray | None = None,
        constrain: Constrain | None = None,
    ) -> np.ndarray:
        """Sample latents. The arguments not listed here are described in `steps.py`.

        Args:
            spacing: Which noise levels the steps are at: a name in ldm.diffusion.samplers.levels.SPACINGS.
            eta: Share of the fresh noise that each step may add, from 0 to 1. None for the sampler's default.
            draw_noise: Returns fresh noise (N, C, h, w). Called once or twice a step by samplers that add noise.
            first_step: The step to begin with, counted from 0. Of 20 steps and a strength of 0.7 the last 14 are
                taken, from step 6 on.
            clean_latents: The image to begin from, (N, C, h, w). It gets the starting noise at the level of the first
                step.
            constrain: constrain(latents, alpha, sigma), called after each step, returns the latents to go on with.
                alpha and sigma are the factors of image and noise in latents of this level, 1 and 0 after the last.

        Raises:
            UserError: The number of steps does not fit the schedule, or the sampler does not offer the spacing or
                cannot begin from noise alone.
            ValueError: eta or first_step is out of range, or draw_noise or clean_latents is missing.
        """
        check_prediction_type(prediction_type)
        self.check(steps, schedule.timesteps, spacing, schedule.zero_terminal_snr)
        if eta is None:
            eta = self.eta or 0.0
        elif not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be from 0 to 1, not {eta}")
        elif self.eta is None and eta:
            raise ValueError(f"the sampler {self.name} has no eta")
        if draw_noise is None and (eta > 0.0 or self.draws):
            raise ValueError(f"the sampler {self.name} adds noise at each step (eta {eta}): give draw_noise")
        if not 0 <= first_step < steps:
            raise ValueError(f"first_step must be from 0 to {steps - 1}, not {first_step}")
        if first_step and clean_latents is None:
            raise ValueError(f"first_step {first_step} begins from an image: give clean_latents")
        clean_latents = None if clean_latents is None else as_float32(clean_latents)
        run = Run(
            denoise, as_float32(latents), steps, schedule, prediction_type, callback, spacing, eta, draw_noise,
            first_step, clean_latents, constrain,
        )  # fmt: skip
        return self.solve(run)

    def check(self, steps: int, timesteps: int, spacing: str, from_noise_alone: bool = False) -> None:
        """Raise UserError unless the sampler can take so many steps at this spacing, of a model's time steps.

        `from_noise_alone`: whether the last time step is noise alone (`zero_terminal_snr`).
        """
        if from_noise_alone and not self.zero_terminal:
            raise UserError(
                f"the sampler {self.name} cannot begin from noise alone, where a LoRA of zero_terminal_snr begins: "
                "choose another sampler, such as dpm_solver_pp, euler or ddim"
            )
        if spacing not in self.spacings:
            raise UserError(
                f"schedule {spacing} does not go with the sampler {self.name}: choose one of "
                f"{', '.join(self.spacings)}, or another sampler"
            )
        check_steps(steps, timesteps)
        if self.most_steps is not None and steps > self.most_steps:
            raise UserError(
                f"sampling_steps is {steps}: the sampler {self.name} takes at most {self.most_steps}, and needs few"
            )


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return a NumPy array as float32. Arrays of other kinds are returned as they are."""
    return np.asarray(array, np.float32) if isinstance(array, np.ndarray) else array


def predict_denoised(
    output: np.ndarray, latents: np.ndarray, alpha: float, sigma: float, prediction_type: str
) -> np.ndarray:
    """Return the network's estimate of the clean latents, given its output for `latents`.

    `latents` are alpha * clean latents + sigma * noise, with alpha^2 + sigma^2 = 1.
    """
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * output
    return (latents - sigma * output) / alpha


def predict_noise(
    output: np.ndarray, latents: np.ndarray, alpha: float, sigma: float, prediction_type: str
) -> np.ndarray:
    """Return the network's estimate of the noise in `latents`. Arguments as in `predict_denoised`."""
    if prediction_type == "v_prediction":
        return alpha * output + sigma * latents
    return output
