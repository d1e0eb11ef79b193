"""The images of a run, the LoRAs that they are made with, and the base models that make them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from ldm.generation.comparison import Cell
from ldm.generation.decoding import VAETiling
from ldm.generation.loading import select_lora
from ldm.generation.pipeline import Pipeline
from ldm.generation.requests import ImageRequest
from ldm.lora.lora import LoRA
from ldm.lora.merged import MergedLoRA, SamplingRange
from ldm.lora.strength import Strength
from ldm.weights.architecture import config_with_tokens

logger = logging.getLogger(__name__)


class RunImage(NamedTuple):
    """An image of a run."""

    request: ImageRequest
    cell: Cell
    place: int  # in the plan of the cell


def images_of(cells: Sequence[Cell]) -> list[RunImage]:
    """Return the images of a run, in order. Each LoRA file is read once.

    Raises:
        UserError: A LoRA cannot be read or does not fit the model.
    """
    read: dict[Hashable, LoRA] = {}
    merged: dict[str, tuple[MergedLoRA, ...]] = {}
    images: list[RunImage] = []
    for cell in cells:
        settings, plan = cell.settings, cell.plan
        # Cells with the same LoRAs share them, or they would be merged anew for each.
        key = repr((plan.loras, settings.lora_ft_unet, settings.lora_ft_text_encoder, cell.model_key))
        if key not in merged:
            merged[key] = tuple(_merged_loras(cell, read))
        for place, (prompt, negative_prompt) in enumerate(zip(plan.prompts, plan.negative_prompts)):
            request = ImageRequest(
                index=len(images),
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=settings.seed,
                noise_index=settings.first_index + place,
                sampling=plan.sampling,
                loras=merged[key],
                origin=plan.origins[place],
            )
            images.append(RunImage(request, cell, place))
    return images


def by_model(images: Sequence[RunImage]) -> list[list[RunImage]]:
    """Return the images of each base model, so that each is loaded once."""
    models: dict[Hashable, list[RunImage]] = {}
    for image in images:
        models.setdefault(image.cell.model_key, []).append(image)
    return list(models.values())


def load_pipeline(image: RunImage, flash_attention: bool) -> Pipeline:
    """Load the base model, the learned tokens and the LoRAs of an image. Raises UserError as their functions."""
    settings, plan = image.cell.settings, image.cell.plan
    pipeline = Pipeline.from_checkpoint(
        plan.checkpoint,
        config=config_with_tokens(plan.config, plan.checkpoint),
        unet=plan.unet_checkpoint,
        vae=plan.vae_checkpoint,
        ema=settings.ckpt_ema,
        flash_attention=flash_attention,
    )
    pipeline.vae_tiling = VAETiling(settings.vae_tiling, settings.vae_tile_size)
    for embedding_file in plan.embeddings:
        pipeline.add_embeddings(embedding_file.embeddings, str(embedding_file.path))
    pipeline.merge_loras(image.request.loras or ())
    return pipeline


def _merged_loras(cell: Cell, read: dict[Hashable, LoRA]) -> Iterator[MergedLoRA]:
    settings, plan = cell.settings, cell.plan
    config = config_with_tokens(plan.config, plan.checkpoint)
    for file in plan.loras:
        key = file.path, plan.checkpoint, settings.lora_ft_unet, settings.lora_ft_text_encoder
        if key not in read:
            read[key] = select_lora(config, file.path, settings.lora_ft_unet, settings.lora_ft_text_encoder)
            if settings.lora_rank is not None and read[key].ranks() != [settings.lora_rank]:
                logger.warning("lora_rank %d is not used: %s is %s", settings.lora_rank, file.path, read[key])
        strength = Strength(file.strength, file.text_encoder_strength, file.blocks)
        yield MergedLoRA(str(file.path), read[key], strength, SamplingRange.from_ends(file.start, file.end))
