"""A1111's text for the images of a run, see ldm.generation.a1111_text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.files.inputs import content_hash, is_file, is_folder
from ldm.generation.a1111_text import SAMPLERS, write
from ldm.generation.plan import GenerationPlan, LoRAFile
from ldm.weights.base_model import base_model_hash
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.hashes import MODEL_HASH, data_hash

MODEL_DIGITS, LORA_DIGITS = 10, 12  # of the hashes, in A1111


def constant_values(plan: GenerationPlan) -> dict[str, Any]:
    """Return A1111's values that all images of a plan share, but for the seed, in A1111's order."""
    sampling = plan.sampling
    loras = {_name(file.path): lora_hash(file.path) for file in plan.loras}
    return {
        "Steps": sampling.num_inference_steps,
        "Sampler": SAMPLERS.get(sampling.sampler, sampling.sampler),
        "CFG scale": sampling.guidance_scale,
        "Seed": None,  # here in the order
        "Size": f"{sampling.width}x{sampling.height}",
        "Model hash": None if is_folder(plan.checkpoint) else base_model_hash(plan.checkpoint)[:MODEL_DIGITS],
        "Model": plan.checkpoint.stem,
        **_origin_values(plan),
        "Eta": sampling.eta or None,
        "Lora hashes": ", ".join(f"{name}: {value}" for name, value in loras.items() if value),
        # A1111 has no name for NumPy's generator. This one says that the noise is not the GPU's.
        "RNG": "CPU",
    }


def _origin_values(plan: GenerationPlan) -> dict[str, Any]:
    """Return A1111's values of what the images begin from. It has one strength for both kinds of a second start."""
    origin = plan.origins[0]
    values: dict[str, Any] = {}
    if origin.variation_strength:
        values["Variation seed"] = origin.variation_seed
        values["Variation seed strength"] = origin.variation_strength
    if origin.source is not None:
        values["Denoising strength"] = origin.strength
        if origin.source.mask is not None:
            values["Mask blur"] = origin.source.mask_blur or None
    if origin.hires is not None:
        values["Denoising strength"] = origin.hires.strength
        values["Hires upscale"] = origin.hires.scale
        values["Hires steps"] = origin.hires.steps
        values["Hires upscaler"] = {"latent": "Latent", "lanczos": "Lanczos"}[origin.hires.upscaler]
    return values


def parameters_text(plan: GenerationPlan, values: dict[str, Any], index: int, seed: int, noise_index: int) -> str:
    """Return A1111's text of image `index` of a plan. `values` are those of constant_values."""
    prompt = " ".join([plan.prompts[index], *(tag for file in plan.loras if (tag := _tag(file)))])
    seeds = {"Seed": seed, "Index": noise_index or None}
    return write(prompt, plan.negative_prompts[index], {**values, **seeds})


def lora_hash(path: Path) -> str:
    """Return the hash by which A1111 knows a LoRA, "" for a folder."""
    if not is_file(path):
        return ""
    if path.suffix != ".safetensors":
        return content_hash(path)[:LORA_DIGITS]
    return (open_checkpoint(path).metadata.get(MODEL_HASH) or data_hash(path))[:LORA_DIGITS]


def _name(path: Path) -> str:
    return path.stem


def _tag(file: LoRAFile) -> str:
    """Return A1111's words for a LoRA in a prompt: its name, its strength in the text encoder and in the UNet."""
    name = _name(file.path)
    if set(name) & set(":<>"):
        return ""
    both = f"{file.text_encoder_strength:g}"
    return f"<lora:{name}:{both}>" if file.strength == file.text_encoder_strength else (
        f"<lora:{name}:{both}:{file.strength:g}>"
    )  # fmt: skip
