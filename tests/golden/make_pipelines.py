"""Write pipelines.npz: what diffusers' StableDiffusionPipeline draws with the networks of small_sd1.yaml (noise) and
small_sd2.yaml (velocity), 20 steps with guidance.

Weights and starting latents are functions of their names (tests/named_weights.py), so the file holds the answers alone.
Run in the environment of `make test-parity`: python -m tests.golden.make_pipelines
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from ldm.models.stable_diffusion import build_model
from ldm.settings.model import ModelConfig, load_model_config
from ldm.tokenizer import Tokenizer
from tests.named_weights import named_weight
from tests.network_cases import FORMS
from tests.parity.reference import Reference
from tests.pipeline_cases import NEGATIVE_PROMPTS, PREDICTION_TYPES, PROMPTS, SCALE, STEPS, starting_latents

SCHEDULERS = {
    "dpm_solver_pp": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm_solver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
}
# These are compared live only (tests/parity/test_pipelines.py): tests/golden/make_schedulers.py has all samplers.
MORE_SCHEDULERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "uni_pc": (UniPCMultistepScheduler, {}),
}


def diffusers_pipeline(config: ModelConfig, reference: Reference, sampler: str) -> StableDiffusionPipeline:
    """diffusers' own pipeline around the reference networks, its scheduler as Stable Diffusion's folders have it."""
    cls, settings = {**SCHEDULERS, **MORE_SCHEDULERS}[sampler]
    scheduler = cls(
        num_train_timesteps=config.timesteps,
        beta_start=config.linear_start,
        beta_end=config.linear_end,
        beta_schedule=config.beta_schedule,
        steps_offset=1,
        prediction_type=config.prediction_type,
        **settings,
    )
    pipeline = StableDiffusionPipeline(
        vae=reference.vae,
        text_encoder=reference.text,
        tokenizer=None,
        unet=reference.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    config: ModelConfig, reference: Reference, sampler: str, latents: np.ndarray, steps: int, **options: Any
) -> np.ndarray:
    """Final latents, scaled, of the shared prompts (as many as there are latents). `options` are of the pipeline."""
    tokenizer = Tokenizer(pad=config.pad_token)
    states = [
        torch.from_numpy(reference.text_states(tokenizer.encode(texts[: len(latents)])))
        for texts in (PROMPTS, NEGATIVE_PROMPTS)
    ]
    return diffusers_pipeline(config, reference, sampler)(
        prompt_embeds=states[0],
        negative_prompt_embeds=states[1],
        latents=torch.from_numpy(latents),
        num_inference_steps=steps,
        guidance_scale=SCALE,
        output_type="latent",
        **options,
    ).images.numpy()


def reference_for(config: ModelConfig, text_layers_unused: int, vae: bool = True) -> Reference:
    """The reference networks with named weights, with or without the autoencoder."""
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).parameters_dict().items()}
    weights = {
        name: named_weight(name, shape)
        for name, shape in shapes.items()
        if vae or not name.startswith("first_stage_model.")
    }
    return Reference(config, weights, text_layers_unused)


def answers() -> dict[str, np.ndarray]:
    """ "form.sampler" -> final latents; "form.image" -> the first sampler's images, in [-1, 1]."""
    found = {}
    for form, unused in FORMS.items():
        config = load_model_config(Path(__file__).with_name(f"{form}.yaml"))
        config = dataclasses.replace(config, prediction_type=PREDICTION_TYPES[form])
        reference = reference_for(config, unused)
        for sampler in SCHEDULERS:
            found[f"{form}.{sampler}"] = draw(config, reference, sampler, starting_latents(config), STEPS)
        found[f"{form}.image"] = reference.decode(found[f"{form}.dpm_solver_pp"] / np.float32(config.scale_factor))
    return found


def main() -> None:
    found = answers()
    np.savez_compressed(Path(__file__).with_name("pipelines.npz"), **found)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}:")
    for name, answer in found.items():
        print(f"  {name} {answer.shape}, largest {np.abs(answer).max():.3f}, deviation {answer.std():.3f}")


if __name__ == "__main__":
    main()
