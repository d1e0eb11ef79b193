"""Classifier-free guidance (Ho and Salimans 2022), with one call of the network per step."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np


class GuidedDenoiser:
    """The samplers' `denoise(latents, timestep)`: negative + scale * (positive - negative) of the network's outputs.

    The outputs may be noise or velocity. With guidance the network gets a batch of 2N, the negative half first, as in
    diffusers. A scale of 1 needs no negative half, and the network gets a batch of N.

    Args:
        unet: The network, called with latents (M, C, h, w) float32, timesteps (M,) and text embeddings (M, 77, D)
            float32, where M is N or 2N. Time steps are int32, or float32 if the sampler goes between two of them.
        text_embeddings: Of the prompts, (N, 77, D).
        negative_text_embeddings: Of the negative prompts, (N, 77, D). May be None for a scale of 1.
        scale: The guidance scale.
        rescale: Share of the guided output that gets the standard deviation of the positive one, for each image, 0 to
            1. It keeps images of zero-terminal models from being overexposed (Lin et al. 2023, arXiv 2305.08891,
            section 3.4, who use 0.7).

    Raises:
        ValueError: Guidance is asked for without negative text embeddings of the same shape.
    """

    def __init__(
        self,
        unet: Callable[..., ms.Tensor],
        text_embeddings: np.ndarray,
        negative_text_embeddings: np.ndarray | None,
        scale: float,
        rescale: float = 0.0,
    ) -> None:
        self.unet = unet
        self.rescale = np.float32(rescale)
        self.scale = np.float32(scale)
        self.guided = scale != 1.0
        self.text_embeddings = guidance_inputs(text_embeddings, negative_text_embeddings, scale)

    def __call__(self, latents: np.ndarray, timestep: float) -> np.ndarray:
        """Return the guided output (N, C, h, w) float32 for latents of that shape at one time step."""
        if self.guided:
            latents = np.concatenate([latents, latents])
        timesteps = timestep_inputs(timestep, len(latents))
        output = self.unet(ms.Tensor(latents), timesteps, self.text_embeddings).asnumpy()
        if not self.guided:
            return output
        negative, positive = np.split(output, 2)
        guided = negative + self.scale * (positive - negative)
        if not self.rescale:
            return guided
        axes = tuple(range(1, guided.ndim))
        ratio = positive.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
        return guided * (self.rescale * ratio + (np.float32(1.0) - self.rescale))


def guidance_inputs(
    text_embeddings: np.ndarray, negative_text_embeddings: np.ndarray | None, scale: float
) -> ms.Tensor:
    """Return the text embeddings for the network, with guidance those of the negative prompts first.

    They are converted once, because they are the same for all steps, and copying them to a device takes time.

    Raises:
        ValueError: Guidance is asked for without negative text embeddings of the same shape.
    """
    if scale != 1.0:
        if negative_text_embeddings is None or negative_text_embeddings.shape != text_embeddings.shape:
            raise ValueError("guidance needs negative text embeddings of the same shape as the text embeddings")
        text_embeddings = np.concatenate([negative_text_embeddings, text_embeddings])
    return ms.Tensor(np.ascontiguousarray(text_embeddings, np.float32))


def timestep_inputs(timestep: float, count: int) -> ms.Tensor:
    """Return a time step for each row of a batch: int32, or float32 where it lies between two of them."""
    return ms.Tensor(np.full(count, timestep, np.int32 if isinstance(timestep, int) else np.float32))
