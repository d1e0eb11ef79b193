"""The noise schedule: how much of the image is left at each time step."""

from __future__ import annotations

import numpy as np

BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class NoiseSchedule:
    """A variance-preserving schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for t in [0, timesteps).

    linear_start, linear_end: the first and the last beta. timesteps: how many there are.
    beta_schedule, in diffusers' words: "scaled_linear" (betas linear in their square root, Stable Diffusion's; LDM's
    own code calls this one "linear") or "linear" (betas linear).

    `alphas_cumprod` is float64 (timesteps,); the float32 of other projects is this, rounded.

    Raises ValueError for a schedule that is not one: an unknown name, no steps, betas outside (0, 1).
    """

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        timesteps: int = 1000,
        beta_schedule: str = "scaled_linear",
    ) -> None:
        if timesteps < 2:
            raise ValueError(f"a noise schedule needs at least 2 time steps, not {timesteps}")
        if not 0.0 < linear_start <= linear_end < 1.0:
            raise ValueError(f"betas go up within (0, 1), but linear_start is {linear_start}, linear_end {linear_end}")
        if beta_schedule == "scaled_linear":
            betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
        elif beta_schedule == "linear":
            betas = np.linspace(linear_start, linear_end, timesteps, dtype=np.float64)
        else:
            raise ValueError(f"beta_schedule is one of {', '.join(BETA_SCHEDULES)}, not {beta_schedule!r}")
        self.timesteps = timesteps
        self.alphas_cumprod = np.cumprod(1.0 - betas)

    @property
    def sqrt_alphas(self) -> np.ndarray:
        """sqrt(abar_t), the weight of the image: float32 (timesteps,)."""
        return np.sqrt(self.alphas_cumprod).astype(np.float32)

    @property
    def sqrt_one_minus_alphas(self) -> np.ndarray:
        """sqrt(1 - abar_t), the weight of the noise: float32 (timesteps,)."""
        return np.sqrt(1.0 - self.alphas_cumprod).astype(np.float32)

    @property
    def sigmas(self) -> np.ndarray:
        """sqrt((1 - abar_t) / abar_t), noise per unit of image: float64 (timesteps,)."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
