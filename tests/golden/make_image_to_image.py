"""Write image_to_image.npz: what diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline make with
the networks of small_sd1.yaml, and for the models of nine channels with a first convolution that is wider.

diffusers draws the latents of an image from the VAE's distribution. Here both sides take its mean, and the same noise.
Run in the environment of `make test-parity`: python -m tests.golden.make_image_to_image
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint

from ldm.generation.decoding import to_uint8
from ldm.settings.model import ModelConfig
from ldm.tokenizer import Tokenizer
from tests.golden.make_pipelines import diffusers_pipeline, reference_for
from tests.image_to_image_cases import CASES, IMAGES, Case, source_and_mask, with_channels
from tests.parity.reference import Reference
from tests.pipeline_cases import NEGATIVE_PROMPTS, PROMPTS, SCALE, starting_latents


@contextmanager
def same_start(noise: np.ndarray) -> Iterator[None]:
    """Let both pipelines draw this noise and take the mean of the VAE's distribution."""
    with patch.multiple(
        pipeline_stable_diffusion_img2img,
        randn_tensor=lambda *args, **more: torch.from_numpy(noise),
        retrieve_latents=lambda encoded, **more: encoded.latent_dist.mode(),
    ), patch.multiple(
        pipeline_stable_diffusion_inpaint,
        randn_tensor=lambda *args, **more: torch.from_numpy(noise),
        retrieve_latents=lambda encoded, **more: encoded.latent_dist.mode(),
    ):  # fmt: skip
        yield


def draw(config: ModelConfig, reference: Reference, case: Case) -> np.ndarray:
    """Final latents, scaled, of the shared prompts."""
    tokenizer = Tokenizer(pad=config.pad_token)
    embeddings = [
        torch.from_numpy(reference.text_states(tokenizer.encode(texts))) for texts in (PROMPTS, NEGATIVE_PROMPTS)
    ]
    noise = starting_latents(config)
    height, width = (side * config.vae_factor for side in noise.shape[2:])
    image, mask = source_and_mask(height, width)
    pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255)
    parts = {
        name: part
        for name, part in diffusers_pipeline(config, reference, case.sampler).components.items()
        if name != "image_encoder"
    }
    options = {}
    if case.masked:
        cls = StableDiffusionInpaintPipeline
        options = {
            "mask_image": torch.from_numpy(np.asarray(mask, np.float32)[None, None] / 255),
            "height": height,
            "width": width,
        }
    else:
        cls = StableDiffusionImg2ImgPipeline
    pipeline = cls(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with same_start(noise):
        return pipeline(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1],
            image=pixels.repeat(len(noise), 1, 1, 1),
            strength=case.strength,
            num_inference_steps=case.steps,
            guidance_scale=SCALE,
            output_type="latent",
            **options,
        ).images.numpy()


def answers() -> dict[str, np.ndarray]:
    """Case -> final latents; case + ".image" -> the images (N, H, W, 3) uint8 of those in IMAGES."""
    found = {}
    references = {}
    for name, case in CASES.items():
        config = with_channels(case.channels)
        reference = references.setdefault(case.channels, reference_for(config, 0))
        found[name] = draw(config, reference, case)
        if name in IMAGES:
            found[f"{name}.image"] = to_uint8(reference.decode(found[name] / np.float32(config.scale_factor)))
    return found


def main() -> None:
    found = answers()
    np.savez_compressed(Path(__file__).with_name("image_to_image.npz"), **found)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}:")
    for name, answer in found.items():
        print(f"  {name} {answer.shape}, largest {np.abs(answer).max():.3f}, deviation {answer.std():.3f}")


if __name__ == "__main__":
    main()
