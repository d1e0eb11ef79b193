"""From the settings of text_to_image.py to prompts, model configuration, checkpoints and LoRA files.

Everything that can be checked without a network is checked here. Nothing here imports MindSpore, so a wrong setting is
answered before MindSpore's import, which takes seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ldm.data.sources.names import IMAGE_SUFFIXES
from ldm.diffusion.sampling import Sampling, default_batch_size
from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_folder, is_there, list_folder
from ldm.files.paths import expanded, path_and_strengths
from ldm.files.prompts import MAX_CHARACTERS, read_prompts
from ldm.generation.model_choice import existing_path, find_model
from ldm.generation.prompt_plan import PlannedImage, plan_images
from ldm.generation.source_image import HiresFix, Origin, first_step, source_images
from ldm.prompts.clip_skip import layers_to_run
from ldm.settings.block_weights import BlockWeights, block_weights_of_each, unet_blocks
from ldm.settings.declare import default_of, names_of
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import ModelConfig
from ldm.settings.prompts import MAX_IMAGES
from ldm.settings.sampling import DEFAULT_SAMPLER
from ldm.settings.versions import default_guidance_scale
from ldm.textual_inversion.embedding import Embedding, check_width
from ldm.textual_inversion.formats import read_embeddings

logger = logging.getLogger(__name__)


class LoRAFile(NamedTuple):
    """A LoRA file or folder to apply."""

    path: Path
    strength: float  # how much of its UNet part is applied
    text_encoder_strength: float
    start: float | None = None  # share of the sampling steps, see ldm.lora.merged.SamplingRange
    end: float | None = None
    blocks: BlockWeights | None = None


class EmbeddingFile(NamedTuple):
    """A file of learned tokens, and what prompts call them."""

    path: Path
    embeddings: list[Embedding]


@dataclass(frozen=True)
class GenerationPlan:
    """What a run generates, and from which files."""

    prompts: list[str]  # one for each image, all images of the first prompt first
    negative_prompts: list[str]  # in the same order
    images_per_prompt: int
    config: ModelConfig
    version: str | None  # a key of VERSIONS, None for a model that is not published
    checkpoint: Path
    unet_checkpoint: Path | None  # whose UNet replaces the checkpoint's
    vae_checkpoint: Path | None
    loras: list[LoRAFile]  # in the order in which they are merged
    embeddings: list[EmbeddingFile]
    sampling: Sampling  # with size, guidance scale and batch size, for the prompts whose line does not say otherwise
    images: list[PlannedImage]  # what each image is made from, in the order of `prompts`
    origins: list[Origin]  # what each image begins from

    @property
    def has_one_size(self) -> bool:
        """Whether all images have the same size."""
        return len({(image.sampling.height, image.sampling.width) for image in self.images}) == 1

    def final_size(self, place: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, after a hires fix."""
        sampling, hires = self.images[place].sampling, self.origins[place].hires
        height, width = sampling.height or self.config.image_size, sampling.width or self.config.image_size
        return (height, width) if hires is None else hires.size(height, width, self.config.size_multiple)


def plan_generation(settings: GenerateSettings) -> GenerationPlan:
    """Find the prompts, the model and the files that the settings name, and check them without opening a network.

    The outputs are checked by ldm.files.outputs, except for the name of `save_latents`.

    Raises:
        UserError: A file is missing or cannot be read, prompts are not UTF-8, prompts and negative prompts do not
            pair, the model is not known or is not the checkpoint's, a size or the number of steps does not suit the
            model, or `save_latents` is not a name for latents.
    """
    prompts, negative_prompts = _prompts(settings)
    images_per_prompt = settings.n_iter * settings.n_samples
    if len(prompts) * images_per_prompt > MAX_IMAGES:
        raise UserError(
            f"{len(prompts)} prompts x n_iter {settings.n_iter} x n_samples {settings.n_samples} are more than "
            f"{MAX_IMAGES} images: lower them"
        )

    version, checkpoint, config = find_model(settings.ckpt_path, settings.version, settings.config)
    unet, vae = (
        None if path is None else existing_path(path, name)
        for name, path in (("unet_ckpt_path", settings.unet_ckpt_path), ("vae_ckpt_path", settings.vae_ckpt_path))
    )
    loras = _lora_files(settings, config)
    embeddings = _embedding_files(settings, config)
    height, width = settings.H or config.image_size, settings.W or config.image_size
    scale = default_guidance_scale(config.architecture) if settings.scale is None else settings.scale
    hires = _hires(settings)
    largest = (height, width) if hires is None else hires.size(height, width, config.size_multiple)
    sampling = Sampling(
        sampler=settings.sampler or DEFAULT_SAMPLER,
        num_inference_steps=settings.sampling_steps,
        guidance_scale=scale,
        eta=settings.noise_share,
        height=height,
        width=width,
        batch_size=settings.batch_size or default_batch_size(settings.n_samples, *largest),
        guidance_rescale=settings.guidance_rescale,
        schedule=settings.schedule,
    )
    sampling.check(config)
    if hires is not None:
        hires.second_pass(sampling, config).check(config)
        first_step(hires.steps or settings.sampling_steps, hires.strength, "hires_strength")
    origins = _origins(settings, hires, len(prompts))
    _check_latents_paths(settings)
    layers_to_run(config, settings.clip_skip)
    images = plan_images(settings, prompts, negative_prompts, sampling, config, hires)
    if scale == 1 and any(negative_prompts):
        logger.warning("scale 1 is without guidance: the negative prompts are not used")
    if settings.skip_save and settings.skip_grid and settings.save_latents is None:
        logger.warning("skip_save and skip_grid without save_latents: nothing of this run is kept")
    return GenerationPlan(
        prompts=[image.prompt for image in images],
        negative_prompts=[image.negative_prompt for image in images],
        images_per_prompt=images_per_prompt,
        config=config,
        version=version,
        checkpoint=checkpoint,
        unet_checkpoint=unet,
        vae_checkpoint=vae,
        loras=loras,
        embeddings=embeddings,
        sampling=sampling,
        images=images,
        origins=[origin for origin in origins for _ in range(images_per_prompt)],
    )


def _prompts(settings: GenerateSettings) -> tuple[list[str], list[str]]:
    """Return the prompts and as many negative prompts."""
    for name in ("prompt", "negative_prompt"):
        _check_text(getattr(settings, name), name)
    if settings.data_path is None:
        prompts = [settings.prompt]
    else:
        prompts = read_prompts(settings.data_path, "data_path", settings.prompt_flags)
    if settings.negative_data_path is None:
        return prompts, [settings.negative_prompt] * len(prompts)
    path = plain(settings.negative_data_path)
    negative_prompts = read_prompts(settings.negative_data_path, "negative_data_path")
    if len(negative_prompts) == 1 < len(prompts):
        logger.info("negative_data_path %s: its only line is for all %d prompts", path, len(prompts))
        negative_prompts = negative_prompts * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise UserError(
            f"negative_data_path {path} has {len(negative_prompts)} negative prompts for {len(prompts)} prompts: give "
            "as many, or one for all (empty lines at the end do not count, a line with a space does)"
        )
    return prompts, negative_prompts


def _check_text(text: str, name: str) -> None:
    """Raise UserError for a prompt that is too long or is not UTF-8 (Python reads such bytes as surrogates)."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"--{name} has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read: shorten it, or give several "
            "prompts in the file of --data_path"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"--{name} is not UTF-8 text (character {error.start + 1}, {text[error.start]!a}): type it anew, or set "
            "the terminal to UTF-8"
        ) from None


def _lora_files(settings: GenerateSettings, config: ModelConfig) -> list[LoRAFile]:
    if not settings.lora_ckpt_path:
        if settings.use_lora is None:
            warn_without_effect(settings, ("lora_ckpt_path",))
        return []
    if settings.use_lora is False:
        logger.warning("use_lora is False: lora_ckpt_path is not applied")
        return []
    count = len(settings.lora_ckpt_path)
    starts, ends = (_for_each_lora(getattr(settings, name), count, name) for name in ("lora_start", "lora_end"))
    blocks = block_weights_of_each(settings.lora_block_weights, count, "lora_block_weights")
    for weights in blocks:
        if weights is not None:
            weights.check_model(unet_blocks(config.unet), f"the model of {plain(config.path)}", "lora_block_weights")
    files = []
    for text, start, end, weights in zip(settings.lora_ckpt_path, starts, ends, blocks):
        if start is not None and end is not None and start >= end:
            raise UserError(f"lora_start {start:g} is not below lora_end {end:g}: {plain(text)} would not be applied")
        path, strengths = path_and_strengths(text, "lora_ckpt_path")
        existing_path(path, "lora_ckpt_path")
        scaled = [strength * settings.lora_scale for strength in strengths or (1.0,)]
        files.append(LoRAFile(path, scaled[0], scaled[-1], start, end, weights))
    return files


def _embedding_files(settings: GenerateSettings, config: ModelConfig) -> list[EmbeddingFile]:
    """Read the learned tokens of ti_ckpt_path."""
    files = []
    for text in settings.ti_ckpt_path or []:
        path, token = expanded(text), None
        if not is_there(path, "ti_ckpt_path") and ":" in path:
            path, _, token = path.rpartition(":")
        check_file(path, "ti_ckpt_path", "give a file of learned tokens, and a name for prompts if wanted: file:<name>")
        embeddings = read_embeddings(path, token)
        check_width(embeddings, config.text["width"], path)
        files.append(EmbeddingFile(Path(path), embeddings))
    return files


def _for_each_lora(numbers: Sequence[float] | None, count: int, name: str) -> Sequence[float | None]:
    """Return one number for each of `count` LoRAs."""
    if numbers is None:
        return [None] * count
    if len(numbers) not in (1, count):
        raise UserError(f"{name} has {len(numbers)} numbers for {count} LoRAs: give one for all, or one for each")
    return list(numbers) * count if len(numbers) == 1 else numbers


def _hires(settings: GenerateSettings) -> HiresFix | None:
    if settings.hires_scale is None:
        return None
    return HiresFix(settings.hires_scale, settings.hires_strength, settings.hires_steps, settings.hires_upscaler)


def _origins(settings: GenerateSettings, hires: HiresFix | None, count: int) -> list[Origin]:
    """Return what the images of each prompt begin from."""
    warn_without_effect(settings, ("init_image", "mask_image", "variation_seed", "hires_scale"))
    images, masks = (_image_files(settings, name) for name in ("init_image", "mask_image"))
    if images and len(images) not in (1, count):
        raise UserError(f"init_image names {len(images)} images for {count} prompts: give one for all, or as many")
    if masks and len(masks) not in (1, len(images)):
        raise UserError(f"mask_image names {len(masks)} masks for {len(images)} images: give one for all, or as many")
    sources = source_images(images or None, masks or None, count, settings.resize_mode, settings.mask_blur)
    if images:
        first_step(settings.sampling_steps, settings.strength)
    return [
        Origin(
            source,
            settings.strength,
            settings.paste_original,
            settings.variation_seed or 0,
            settings.variation_strength,
            hires,
        )
        for source in sources
    ]


def _image_files(settings: GenerateSettings, name: str) -> list[Path]:
    """Return the files that init_image or mask_image names."""
    given = getattr(settings, name) or []
    files: list[Path] = []
    for path in given:
        if not is_folder(path, name):
            check_file(path, name, "give the file of an image")
            files.append(Path(path))
            continue
        names = [entry for entry in list_folder(path, name) if entry.lower().endswith(IMAGE_SUFFIXES)]
        if not names:
            raise UserError(f"{name} {plain(path)} is a folder without images: give a file, or a folder with some")
        files.extend(Path(path) / entry for entry in sorted(names))
    return files


def warn_without_effect(settings: GenerateSettings, switches: Sequence[str]) -> None:
    """Warn of settings that need another one, a name in `switches`, that is not given."""
    defaults = {field.name: default_of(field) for field in fields(GenerateSettings)}
    for switch in switches:
        if getattr(settings, switch):
            continue
        given = [name for name in names_of(GenerateSettings, needs=switch) if getattr(settings, name) != defaults[name]]
        if given:
            logger.warning("no %s is given: %s has no effect", switch, ", ".join(given))


def _check_latents_paths(settings: GenerateSettings) -> None:
    if settings.save_latents is not None:
        target = Path(settings.save_latents)
        if target.suffix != ".npy":
            raise UserError(f"save_latents {plain(target)} must end in .npy")
        if is_folder(target, "save_latents"):
            raise UserError(f"save_latents {plain(target)} is a folder: give the path of a .npy file")
        if settings.init_latents is not None and os.path.realpath(target) == os.path.realpath(settings.init_latents):
            raise UserError(f"save_latents would overwrite init_latents {plain(target)}: give another name")
    if settings.init_latents is not None:
        check_file(settings.init_latents, "init_latents", "give a .npy file of numbers")
