"""What the samplers of "sigma space" share (Karras et al. 2022, arXiv 2206.00364): latents are image + sigma * noise.

The network was trained on alpha * image + sqrt(1 - alpha^2) * noise, which are these latents divided by
sqrt(sigma^2 + 1). The starting noise is multiplied by the first sigma, as diffusers' init_noise_sigma does.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.diffusion.samplers.steps import Run


def slope(run: Run, latents: np.ndarray, sigma: float, timestep: float) -> np.ndarray:
    """Return d latents / d sigma, which is the network's estimate of the noise: (latents - denoised) / sigma."""
    scale = 1.0 / math.sqrt(sigma**2 + 1.0)
    output = run.output(latents * scale, timestep)
    if run.prediction_type == "v_prediction":
        return latents * (sigma * scale**2) + output * scale
    return output


def denoised(run: Run, latents: np.ndarray, sigma: float, timestep: float) -> np.ndarray:
    """Return the network's estimate of the clean latents."""
    scale = 1.0 / math.sqrt(sigma**2 + 1.0)
    output = run.output(latents * scale, timestep)
    if run.prediction_type == "v_prediction":
        return latents * scale**2 - output * (sigma * scale)
    return latents - output * sigma


def ancestral(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """Return the sigma to denoise to, and the std of the fresh noise that leads from there to the next sigma.

    With eta 1 the noise is that of DDPM's posterior (Song, Meng and Ermon 2020, equation 16), with 0 there is none.
    """
    up = min(next_sigma, eta * math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2))
    return math.sqrt(next_sigma**2 - up**2), up


def middle(sigma: float, next_sigma: float) -> float:
    """Return the sigma halfway between two by their logarithm."""
    return math.sqrt(sigma * next_sigma)
