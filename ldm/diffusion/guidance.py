"""Classifier-free guidance (Ho and Salimans 2022): one batch of 2N through the network, one graph."""

from __future__ import annotations

from typing import Callable

import mindspore as ms
import numpy as np


class GuidedDenoiser:
    """denoise(x, t) for the samplers: uncond + scale * (cond - uncond), or cond alone at scale 1.

    unet: called with latents (M, C, h, w) float32, timesteps (M,) int32, context (M, tokens, D) float32; M is 2N with
    guidance (the unconditional half first, as diffusers has it), N without. It works on the model's output, noise or
    velocity alike.
    context, negative_context: text states (N, tokens, D); the second may be None at scale 1 only, else ValueError.
    """

    def __init__(
        self,
        unet: Callable[..., ms.Tensor],
        context: np.ndarray,
        negative_context: np.ndarray | None,
        scale: float,
    ) -> None:
        self.unet = unet
        self.scale = np.float32(scale)
        self.guided = scale != 1.0
        if self.guided:
            if negative_context is None or negative_context.shape != context.shape:
                raise ValueError("guidance needs a negative context of the same shape as the context")
            context = np.concatenate([negative_context, context])
        # Once for all steps: it does not change, and copying it to a device costs time.
        self.context = ms.Tensor(np.ascontiguousarray(context, np.float32))

    def __call__(self, x: np.ndarray, timestep: int) -> np.ndarray:
        """The output (N, C, h, w) float32 for latents x of that shape at one time step."""
        if self.guided:
            x = np.concatenate([x, x])
        timesteps = np.full(len(x), timestep, np.int32)
        output = self.unet(ms.Tensor(x), ms.Tensor(timesteps), self.context).asnumpy()
        if not self.guided:
            return output
        unconditional, conditional = np.split(output, 2)
        return unconditional + self.scale * (conditional - unconditional)
