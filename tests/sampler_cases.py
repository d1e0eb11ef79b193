"""What golden and live comparisons of samplers share: a toy network, fixed noise, and the cases."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ALL_SPACINGS = ("as_trained", "karras", "exponential", "sgm_uniform", "linspace")
STRIDED_SPACINGS = ("as_trained", "sgm_uniform")
SPACINGS_OF = {
    "dpm_solver_pp": ALL_SPACINGS,
    "dpm_solver": ALL_SPACINGS,
    "ddim": STRIDED_SPACINGS,
    "plms": STRIDED_SPACINGS,
    "uni_pc": ALL_SPACINGS,
    "euler": ALL_SPACINGS,
    "euler_a": ALL_SPACINGS,
    "heun": ALL_SPACINGS,
    "lms": ALL_SPACINGS,
    "dpm2": ALL_SPACINGS,
    "dpm2_a": ALL_SPACINGS,
    "dpmpp_2s_a": ALL_SPACINGS,
    "dpmpp_sde": ALL_SPACINGS,
    "dpmpp_2m_sde": ALL_SPACINGS,
    "ddpm": ("as_trained", "sgm_uniform", "linspace"),
    "lcm": ("as_trained",),
}
# Those whose scheduler in diffusers has rescale_betas_zero_snr.
ZERO_TERMINAL = ("dpm_solver_pp", "uni_pc", "euler", "euler_a", "dpmpp_2m_sde", "ddpm", "lcm", "ddim")
SHAPE = (1, 4, 3, 4)


class Case(NamedTuple):
    """A sampling, whose final latents are compared."""

    sampler: str
    spacing: str
    prediction_type: str
    steps: int
    first_step: int = 0
    zero_terminal: bool = False

    def __str__(self) -> str:
        return ".".join(map(str, self)).replace(".False", "").replace(".True", ".zero_terminal")


def cases_of(sampler: str) -> list[Case]:
    """Every spacing, both prediction types, few steps, 20, a sampling from an image, and noise alone."""
    cases = []
    for prediction_type in ("epsilon", "v_prediction"):
        cases += [Case(sampler, spacing, prediction_type, 10) for spacing in SPACINGS_OF[sampler]]
        cases += [Case(sampler, "as_trained", prediction_type, steps) for steps in (2, 3, 20)]
        cases += [Case(sampler, spacing, prediction_type, 20, 13) for spacing in SPACINGS_OF[sampler][:2]]
    if sampler in ZERO_TERMINAL:
        cases.append(Case(sampler, "as_trained", "v_prediction", 12, zero_terminal=True))
    return cases


def toy_denoise(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth, nonlinear stand-in for the network."""
    return np.tanh(1.3 * x + np.roll(x, 1, axis=-1)) + 0.5 * np.cos(timestep / 150.0) * np.roll(x, 1, axis=1)


def toy_noise(shape: tuple[int, ...], draw: int) -> np.ndarray:
    """The noise of a draw: any fixed numbers with a std of 1 do."""
    return (np.sqrt(2.0) * np.sin(1.7 * np.arange(np.prod(shape)) + draw)).reshape(shape).astype(np.float32)


def starting_noise() -> np.ndarray:
    """Noise to begin with."""
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def image_latents() -> np.ndarray:
    """Clean latents to begin with."""
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference as a share of the largest value."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
