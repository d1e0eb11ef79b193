"""What the text fields of an image say of the settings and the files that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.diffusion.sampling import Sampling
from ldm.files.inputs import content_hash
from ldm.generation.plan import GenerationPlan, LoRAFile
from ldm.settings.generate import GenerateSettings
from ldm.weights.base_model import base_model_hash


def metadata_of_images(
    settings: GenerateSettings, plan: GenerationPlan, precision: str
) -> Callable[[int], dict[str, Any]]:
    """Return a function from an image's index to what its text fields hold besides the prompts."""
    from ldm.generation.decoding import VAETiling  # imports MindSpore

    tiling = VAETiling(settings.vae_tiling, settings.vae_tile_size)
    shared = _metadata(settings, plan, precision)
    of_tag = {
        # lora_ft_unet and lora_ft_text_encoder are for the files of lora_ckpt_path.
        tag: {
            **lora_metadata(settings, LoRAFile(*tag)),
            "lora_ft_unet": None,
            "lora_ft_text_encoder": None,
            "from_prompt": True,
        }
        for tag in dict.fromkeys(tag for image in plan.images for tag in image.loras)
    }

    def metadata(index: int) -> dict[str, Any]:
        image = plan.images[index]
        fields = {"index": str(image.noise_index), **shared, "seed": str(image.seed)}
        for name, template in (
            ("prompt_template", image.template),
            ("negative_prompt_template", image.negative_template),
        ):
            if template is not None:
                fields[name] = template
        if image.loras:
            fields["lora"] = [*shared.get("lora", []), *(of_tag[tag] for tag in image.loras)]
        own = _sampling_metadata(image.sampling)
        if settings.vae_tiling is None and tiling.tile(plan.config, *plan.final_size(index)) is not None:
            own.update(vae_tiling=True, vae_tile_size=settings.vae_tile_size)
        return {**fields, "settings": {**shared["settings"], **own}}

    return metadata


def _metadata(settings: GenerateSettings, plan: GenerationPlan, precision: str) -> dict[str, Any]:
    """Return what the PNGs' text fields hold besides the prompts: enough to make the images again.

    File names without their folders: an image is passed on, and the folders of its maker are private.
    """
    metadata: dict[str, Any] = {
        "seed": str(settings.seed),
        "model": plan.version or plan.config.architecture,
        "model_config": Path(plan.config.path).name,
        **({} if settings.config is None else {"model_config_sha256": content_hash(plan.config.path)}),
        "checkpoint": plan.checkpoint.name,
        "checkpoint_sha256": base_model_hash(plan.checkpoint),
    }
    if settings.ckpt_ema:
        metadata["checkpoint_ema"] = "True"
    for name, path in (("unet_checkpoint", plan.unet_checkpoint), ("vae_checkpoint", plan.vae_checkpoint)):
        if path is not None:
            metadata[name] = path.name
            metadata[f"{name}_sha256"] = base_model_hash(path)
    if plan.loras:
        metadata["lora"] = [lora_metadata(settings, file) for file in plan.loras]
    if plan.embeddings:
        metadata["textual_inversion"] = [
            {"file": file.path.name, "sha256": content_hash(file.path), "tokens": [e.token for e in file.embeddings]}
            for file in plan.embeddings
        ]
    if settings.init_latents is not None:
        metadata["init_latents"] = Path(settings.init_latents).name
        metadata["init_latents_sha256"] = content_hash(settings.init_latents)
    metadata["settings"] = {
        **_sampling_metadata(plan.sampling),
        "precision": precision,
        "prediction_type": plan.config.prediction_type,
    }
    metadata["settings"].update(settings.used_source_settings())
    if plan.sampling.guidance_rescale is not None:
        metadata["settings"]["guidance_rescale"] = plan.sampling.guidance_rescale
    # Only where they are not the default, so that images of other runs keep their fields.
    for name in ("prompt_syntax", "support_long_prompts", "clip_skip"):
        if getattr(settings, name) != getattr(GenerateSettings, name):
            metadata["settings"][name] = getattr(settings, name)
    return metadata


def _sampling_metadata(sampling: Sampling) -> dict[str, Any]:
    return {
        **sampling.fields(),
        "H": sampling.height,
        "W": sampling.width,
    }


def lora_metadata(settings: GenerateSettings, file: LoRAFile) -> dict[str, Any]:
    """Return what the text fields say of a LoRA: its file, its hash and how it is applied."""
    from ldm.lora.formats import lora_files  # imports MindSpore

    metadata: dict[str, Any] = {
        "file": file.path.name,
        "sha256": " ".join(base_model_hash(path) for path in lora_files(file.path)),
        "weight": file.strength,
    }
    if file.text_encoder_strength != file.strength:
        metadata["text_encoder_weight"] = file.text_encoder_strength
    if file.blocks is not None:
        metadata["block_weights"] = file.blocks.text
    for name, share in (("start", file.start), ("end", file.end)):
        if share is not None:
            metadata[name] = share
    parts = {"lora_ft_unet": settings.lora_ft_unet, "lora_ft_text_encoder": settings.lora_ft_text_encoder}
    return {**metadata, **parts}
