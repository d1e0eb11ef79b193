"""The images of a run, the LoRAs that they are made with, and the base models that make them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from ldm.generation.comparison import Cell
from ldm.generation.decoding import VAETiling
from ldm.generation.loading import select_lora
from ldm.generation.pipeline import Pipeline
from ldm.generation.prompt_plan import TaggedLoRA
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
    tagged: dict[Hashable, MergedLoRA] = {}
    images: list[RunImage] = []
    for cell in cells:
        settings, plan = cell.settings, cell.plan
        # Cells and images with the same LoRAs share them, or they would be merged anew for each.
        key = repr((plan.loras, settings.lora_ft_unet, settings.lora_ft_text_encoder, cell.model_key))
        if key not in merged:
            merged[key] = tuple(_merged_loras(cell, read))
        for place, image in enumerate(plan.images):
            for tag in image.loras:
                if (cell.model_key, tag) not in tagged:
                    tagged[cell.model_key, tag] = _tagged_lora(cell, tag, read)
            request = ImageRequest(
                index=len(images),
                prompt=image.text,
                negative_prompt=image.negative_prompt,
                seed=image.seed,
                noise_index=image.noise_index,
                sampling=image.sampling,
                loras=(*merged[key], *(tagged[cell.model_key, tag] for tag in image.loras)),
                origin=plan.origins[place],
            )
            images.append(RunImage(request, cell, place))
    return images


def by_model(images: Sequence[RunImage]) -> list[list[list[RunImage]]]:
    """Return the images of each base model, which is loaded once, in groups whose prompts it reads alike."""
    models: dict[Hashable, dict[Hashable, list[RunImage]]] = {}
    for image in images:
        of_model = models.setdefault(image.cell.model_key, {})
        of_model.setdefault(image.cell.prompt_settings, []).append(image)
    return [list(of_model.values()) for of_model in models.values()]


def load_pipeline(
    image: RunImage, flash_attention: bool, open_model: Callable[..., Pipeline] = Pipeline.from_checkpoint
) -> Pipeline:
    """Load the base model, the learned tokens and the LoRAs of an image. Raises UserError as their functions."""
    settings, plan = image.cell.settings, image.cell.plan
    pipeline = open_model(
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


def _tagged_lora(cell: Cell, tag: TaggedLoRA, read: dict[Hashable, LoRA]) -> MergedLoRA:
    """Return a LoRA that a prompt names. lora_ft_unet and lora_ft_text_encoder are for the files of lora_ckpt_path."""
    key = tag.path, cell.plan.checkpoint, None, None
    if key not in read:
        read[key] = select_lora(config_with_tokens(cell.plan.config, cell.plan.checkpoint), tag.path)
    return MergedLoRA(str(tag.path), read[key], Strength(tag.strength, tag.text_encoder_strength))
