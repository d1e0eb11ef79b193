"""A1111's text for the images of a run, see ldm.generation.a1111_text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.diffusion.sampling import Sampling
from ldm.files.inputs import content_hash, is_file, is_folder
from ldm.generation.a1111_text import write
from ldm.generation.plan import GenerationPlan, LoRAFile
from ldm.generation.source_image import Origin, first_step
from ldm.prompts.syntax import escaped
from ldm.settings.generate import GenerateSettings
from ldm.settings.sampler_names import AS_TRAINED, SAMPLER_LABELS, SCHEDULE_LABELS
from ldm.weights.base_model import base_model_hash
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.hashes import MODEL_HASH, data_hash

MODEL_DIGITS, LORA_DIGITS = 10, 12  # of the hashes, in A1111


def parameters_text(settings: GenerateSettings, plan: GenerationPlan, place: int) -> str:
    """Return A1111's text of an image of a plan, with the values in A1111's order."""
    image = plan.images[place]
    sampling, fields = image.sampling, image.sampling.fields()
    eta, default_eta = (fields["eta"], 1.0) if "eta" in fields else (fields["ddim_eta"], 0.0)
    paths = [*(file.path for file in plan.loras), *(tag.path for tag in image.loras)]
    hashes = {path.stem: short_lora_hash(path) for path in paths}
    values = {
        "Steps": sampling.num_inference_steps,
        "Sampler": SAMPLER_LABELS[sampling.sampler],
        "Schedule type": None if sampling.schedule == AS_TRAINED else SCHEDULE_LABELS[sampling.schedule],
        "CFG scale": sampling.guidance_scale,
        "Seed": image.seed,
        "Size": f"{sampling.width}x{sampling.height}",
        "Model hash": None if is_folder(plan.checkpoint) else base_model_hash(plan.checkpoint)[:MODEL_DIGITS],
        "Model": plan.checkpoint.stem,
        "Clip skip": settings.clip_skip,
        **_origin_values(plan.origins[place], sampling),
        "Eta": None if eta == default_eta else eta,
        "Lora hashes": ", ".join(f"{name}: {value}" for name, value in hashes.items() if value),
        # A1111 has no name for NumPy's generator. This one says that the noise is not the GPU's.
        "RNG": "CPU",
        "Index": image.noise_index or None,
    }
    prompt, negative_prompt = image.prompt, image.negative_prompt
    if settings.prompt_syntax == "plain":  # A1111 has no plain prompts
        prompt, negative_prompt = escaped(prompt), escaped(negative_prompt)
    prompt = " ".join([prompt, *(tag for file in plan.loras if (tag := _tag(file)))])
    return write(prompt, negative_prompt, values)


HIRES_UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos"}  # A1111's names -> the values of hires_upscaler


def _origin_values(origin: Origin, sampling: Sampling) -> dict[str, Any]:
    """Return A1111's values of what the images begin from. It has one strength for both kinds of a second start."""
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
        steps = origin.hires.steps or sampling.num_inference_steps
        values["Hires steps"] = steps - first_step(steps, origin.hires.strength)  # A1111 takes all of its hires steps
        values["Hires upscaler"] = next(k for k, name in HIRES_UPSCALERS.items() if name == origin.hires.upscaler)
    return values


@lru_cache(maxsize=64)  # the cells of a comparison have the same files
def short_lora_hash(path: Path) -> str:
    """Return the first digits of the hash by which A1111 knows a LoRA, "" for a folder."""
    if not is_file(path):
        return ""
    if path.suffix != ".safetensors":
        return content_hash(path)[:LORA_DIGITS]
    return (open_checkpoint(path).metadata.get(MODEL_HASH) or data_hash(path))[:LORA_DIGITS]


def _tag(file: LoRAFile) -> str:
    """Return A1111's words for a LoRA in a prompt: its name, its strength in the text encoder and in the UNet."""
    name = file.path.stem
    if set(name) & set(":<>"):
        return ""
    both = f"{file.text_encoder_strength:g}"
    return f"<lora:{name}:{both}>" if file.strength == file.text_encoder_strength else (
        f"<lora:{name}:{both}:{file.strength:g}>"
    )  # fmt: skip
