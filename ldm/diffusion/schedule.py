"""The noise schedule: how much of the image is left at each time step."""

from __future__ import annotations

import numpy as np

from ldm.settings.model import PREDICTION_TYPES, ModelConfig


class NoiseSchedule:
    """A variance-preserving noise schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for t in [0, timesteps).

    The betas are linear in their square root, as in Stable Diffusion: diffusers calls this "scaled_linear", LDM's own
    code "linear".

    `alphas_cumprod` is abar, float64 (timesteps,). The float32 tables of other projects are the same values, rounded.

    With `zero_terminal_snr`, sqrt(abar) is shifted and scaled so that it is 0 at the last time step and as before at
    the first one (Lin et al. 2023, arXiv 2305.08891, algorithm 1). The last time step is then noise alone, and sampling
    has to begin there. Only velocity can be trained on it: a prediction of that noise says nothing about the image.

    Args:
        linear_start: The first beta.
        linear_end: The last beta.
        timesteps: Number of time steps.
        zero_terminal_snr: Whether the last time step is noise alone.

    Raises:
        ValueError: There are fewer than two time steps, or the betas do not rise within (0, 1).
    """

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        if timesteps < 2:
            raise ValueError(f"a noise schedule needs at least 2 time steps, not {timesteps}")
        if not 0.0 < linear_start <= linear_end < 1.0:
            raise ValueError(f"betas must rise within (0, 1): linear_start is {linear_start}, linear_end {linear_end}")
        betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
        self.timesteps = timesteps
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.zero_terminal_snr = zero_terminal_snr
        if zero_terminal_snr:
            alphas = np.sqrt(self.alphas_cumprod)
            self.alphas_cumprod = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2

    @classmethod
    def from_config(cls, config: ModelConfig, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """Build the schedule that a model was trained with, or that of its training with zero_terminal_snr."""
        return cls(config.linear_start, config.linear_end, config.timesteps, zero_terminal_snr)

    @property
    def sqrt_alphas(self) -> np.ndarray:
        """sqrt(abar_t), the factor of the image in x_t: float32 (timesteps,)."""
        return np.sqrt(self.alphas_cumprod).astype(np.float32)

    @property
    def sqrt_one_minus_alphas(self) -> np.ndarray:
        """sqrt(1 - abar_t), the factor of the noise in x_t: float32 (timesteps,)."""
        return np.sqrt(1.0 - self.alphas_cumprod).astype(np.float32)

    @property
    def sigmas(self) -> np.ndarray:
        """sqrt((1 - abar_t) / abar_t), the ratio of noise to image: float64 (timesteps,). It is inf for noise alone."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    @property
    def snr(self) -> np.ndarray:
        """abar_t / (1 - abar_t), the signal-to-noise ratio of x_t: float64 (timesteps,)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is what a network can predict."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
