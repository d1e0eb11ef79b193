"""From noise to the latents of one batch, through the sampler and the UNet with its LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np

from ldm.data.draws import draws
from ldm.diffusion.guidance import GuidedDenoiser
from ldm.diffusion.on_device import DeviceSampling
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.sampling import ZERO_TERMINAL_RESCALE, Sampling
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.generation.requests import ImageRequest
from ldm.lora.merged import MergedLoRA, MergedLoRAs
from ldm.settings.model import ModelConfig


def draw_starting_latents(requests: Sequence[ImageRequest], shape: tuple[int, int, int]) -> np.ndarray:
    """Draw noise (N, *shape) float32. That of an image depends on its seed and its noise index alone."""
    return np.stack(
        [_generator(request, "starting latents").standard_normal(shape, np.float32) for request in requests]
    )


def fresh_noise(requests: Sequence[ImageRequest], shape: tuple[int, int, int]) -> Callable[[], np.ndarray]:
    """Return what draws a sampler's fresh noise. Each image has its own generator, so the batch size has no effect."""
    generators = [_generator(request, "ddim noise") for request in requests]
    return lambda: np.stack([generator.standard_normal(shape, np.float32) for generator in generators])


def _generator(request: ImageRequest, purpose: str) -> np.random.Generator:
    return draws(request.seed, purpose, request.noise_index)


def samples_from_noise_alone(config: ModelConfig, loras: Sequence[MergedLoRA]) -> bool:
    """Whether images are sampled on the schedule of zero_terminal_snr, because a merged LoRA was trained on it.

    The model must predict velocity: noise alone says nothing to a model that predicts noise.
    """
    return config.prediction_type == "v_prediction" and any(
        merged.lora.zero_terminal_snr and merged.applies_to_unet for merged in loras
    )


def denoise_batch(
    unet: Callable[..., ms.Tensor],
    config: ModelConfig,
    merged_loras: MergedLoRAs,
    text_embeddings: np.ndarray,
    negative_text_embeddings: np.ndarray | None,
    latents: np.ndarray,
    sampling: Sampling,
    draw_noise: Callable[[], np.ndarray] | None = None,
    callback: Callable[[int], None] | None = None,
    on_device: DeviceSampling | None = None,
) -> np.ndarray:
    """Denoise one batch.

    Args:
        unet: The network, see ldm.diffusion.guidance.
        config: That of the model.
        merged_loras: The LoRAs that are merged into the UNet's weights. Each is applied at its steps.
        text_embeddings: Of the prompts, (N, 77, D).
        negative_text_embeddings: Of the negative prompts, (N, 77, D). None at guidance scale 1.
        latents: The scaled latents to start from, (N, C, h, w).
        sampling: How the images are sampled.
        draw_noise: Returns fresh noise (N, C, h, w), for samplers that add some.
        callback: Called with the number of each step that is done, from 1.
        on_device: Keeps the latents on the device from step to step. A step counts as done when its work is handed to
            the device. None computes all but the network with NumPy.

    Returns:
        The final scaled latents, (N, C, h, w) float32.

    Raises:
        UserError: They are not finite.
    """
    from_noise_alone = samples_from_noise_alone(config, merged_loras.loras)
    schedule = NoiseSchedule.from_config(config, zero_terminal_snr=from_noise_alone)
    rescale = sampling.guidance_rescale
    if rescale is None and from_noise_alone:
        rescale = ZERO_TERMINAL_RESCALE
    guidance = text_embeddings, negative_text_embeddings, sampling.guidance_scale, rescale or 0.0
    denoise: Callable[[Any, float], Any] = (
        GuidedDenoiser(unet, *guidance) if on_device is None else on_device.denoiser(*guidance)
    )
    sampler, steps = SAMPLERS[sampling.sampler], sampling.num_inference_steps
    done = 0  # steps, not calls of the network: some samplers call it twice a step

    def denoise_with_loras(latents: Any, timestep: float) -> Any:
        merged_loras.switch([merged.is_active(done, steps, round(timestep)) for merged in merged_loras.loras])
        return denoise(latents, timestep)

    def end_step(step: int) -> None:
        nonlocal done
        done = step
        if callback is not None:
            callback(step)

    start: Any = latents
    draw: Callable[[], Any] | None = draw_noise
    if on_device is not None:
        start = on_device.array(latents)
        draw = None if draw_noise is None else on_device.drawn(draw_noise)
    try:
        final: Any = sampler(
            denoise_with_loras, start, steps, schedule, config.prediction_type, end_step,
            spacing=sampling.schedule, eta=sampling.eta, draw_noise=draw,
        )  # fmt: skip
    finally:
        merged_loras.switch([True] * len(merged_loras.loras))
    if on_device is not None:
        final = final.asnumpy()
    if not np.isfinite(final).all():
        raise UserError(
            "the sampled latents are not finite: the checkpoint or the LoRA is broken, or fp16 overflows "
            "(try --precision fp32)"
        )
    return final
