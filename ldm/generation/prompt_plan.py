"""From the prompts of a run to what each of its images is made from. Nothing here imports MindSpore.

The order is: the flags of the line, the wildcards, which are drawn for each image, the LoRA tags, and then the syntax
of what is encoded (ldm.prompts.syntax), which the pipeline reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.diffusion.sampling import Sampling, default_batch_size
from ldm.errors import UserError
from ldm.generation.source_image import HiresFix, first_step
from ldm.prompts.lora_tags import LoRAFolder, LoRATag, refuse_lora_tags, take_out_lora_tags
from ldm.prompts.prompt_lines import read_prompt_line
from ldm.prompts.syntax import parse_prompt
from ldm.prompts.wildcards import Wildcards
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import ModelConfig
from ldm.settings.sampler_names import SAMPLER_NAMES

logger = logging.getLogger(__name__)


class TaggedLoRA(NamedTuple):
    """A LoRA that a prompt names, and where it is."""

    path: Path
    strength: float  # of its UNet part
    text_encoder_strength: float


class PlannedImage(NamedTuple):
    """What an image is made from. A run may have a million of them.

    Attributes:
        prompt: As it was written, but with its wildcards drawn.
        negative_prompt: The same.
        text: What is encoded of the prompt: all but its LoRA tags.
        loras: Those of its tags, beside those of all images.
        seed: Its noise depends on (seed, noise_index) alone.
        noise_index: See seed.
        sampling: How it is sampled, with size, guidance scale and batch size.
        template: The prompt with its wildcards, None without any.
        negative_template: The same of the negative prompt.
    """

    prompt: str
    negative_prompt: str
    text: str
    loras: tuple[TaggedLoRA, ...]
    seed: int
    noise_index: int
    sampling: Sampling
    template: str | None = None
    negative_template: str | None = None


def plan_images(
    settings: GenerateSettings,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    sampling: Sampling,
    config: ModelConfig,
    hires: HiresFix | None = None,
) -> list[PlannedImage]:
    """Return what each image is made from, all images of the first prompt first.

    Args:
        settings: Of the run.
        prompts: As they were given.
        negative_prompts: As many.
        sampling: For the prompts whose line does not say otherwise.
        config: The model's.
        hires: The second pass of the images.

    Raises:
        UserError: A flag, a wildcard, a LoRA tag or a weight is wrong. The error names the prompt.
    """
    count = settings.n_iter * settings.n_samples
    wildcards = Wildcards(settings.wildcard_dir) if settings.draws_wildcards else None
    tags = _Tags(settings) if settings.prompt_syntax == "a1111" else None
    images: list[PlannedImage] = []
    checked: set[str] = set()
    for number, (prompt, negative_prompt) in enumerate(zip(prompts, negative_prompts)):
        where = f"prompt {number + 1}"
        values: Mapping[str, Any] = {}
        if settings.prompt_flags:
            values = read_prompt_line(prompt, where)
            prompt, negative_prompt = values["prompt"], values.get("negative_prompt", negative_prompt)
        own_sampling = _sampling(settings, values, sampling, config, hires, where)
        for repeat in range(count):
            seed, noise_index = settings.seed, settings.first_index + len(images)
            if "seed" in values:  # which gives the same images wherever the line stands
                seed, noise_index = values["seed"], repeat
            drawn, negative = prompt, negative_prompt
            if wildcards is not None:
                drawn = wildcards.draw(prompt, seed, noise_index)
                negative = wildcards.draw(negative_prompt, seed, noise_index, "negative prompt")
            text, loras = (drawn, ()) if tags is None else tags.take_out(drawn, negative, where)
            for part in {text, negative} - checked:  # for errors, before a network is loaded
                parse_prompt(part, settings.prompt_syntax)
                checked.add(part)
            images.append(
                PlannedImage(
                    drawn,
                    negative,
                    text,
                    loras,
                    seed,
                    noise_index,
                    own_sampling,
                    prompt if drawn != prompt else None,
                    negative_prompt if negative != negative_prompt else None,
                )
            )
    if len({(image.sampling.height, image.sampling.width) for image in images}) > 1:
        for name, path in (("save_latents", settings.save_latents), ("init_latents", settings.init_latents)):
            if path is not None:
                raise UserError(f"{name} holds latents of one size, but the prompts have several (--w, --h)")
    return images


def _sampling(
    settings: GenerateSettings,
    values: Mapping[str, Any],
    sampling: Sampling,
    config: ModelConfig,
    hires: HiresFix | None,
    where: str,
) -> Sampling:
    """Return how the images of a line are sampled, whose flags are `values`."""
    names = {"width": "width", "height": "height", "scale": "guidance_scale", "sample_steps": "num_inference_steps"}
    changes = {field: values[name] for name, field in names.items() if values.get(name) is not None}
    if values.get("sample_sampler") is not None:
        changes["sampler"] = SAMPLER_NAMES[values["sample_sampler"]]
        if changes["sampler"] != sampling.sampler:
            changes["eta"] = None  # the sampler's own
    if not changes:
        return sampling
    own = replace(sampling, **changes)
    height, width = own.height or config.image_size, own.width or config.image_size
    if settings.batch_size is None:
        largest = (height, width) if hires is None else hires.size(height, width, config.size_multiple)
        own = replace(own, batch_size=default_batch_size(settings.n_samples, *largest))
    try:
        own.check(config)
        if settings.init_image:
            first_step(own.num_inference_steps, settings.strength)
        if hires is not None:
            second = hires.second_pass(own, config)
            second.check(config)
            first_step(second.num_inference_steps, hires.strength, "hires_strength")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return own


class _Tags:
    """Takes LoRA tags out of prompts and finds their files."""

    def __init__(self, settings: GenerateSettings) -> None:
        self._folder = None if settings.lora_dir is None else LoRAFolder(settings.lora_dir)
        self._unused, self._warned = settings.use_lora is False, False
        self._found: dict[LoRATag, TaggedLoRA] = {}

    def take_out(self, prompt: str, negative_prompt: str, where: str) -> tuple[str, tuple[TaggedLoRA, ...]]:
        """Return a prompt without its tags, and their LoRAs in order."""
        try:
            refuse_lora_tags(negative_prompt)
            text, tags = take_out_lora_tags(prompt)
            if tags and self._unused:
                if not self._warned:
                    logger.warning("use_lora is False: the LoRAs that prompts name are not applied (%s)", where)
                self._warned = True
                return text, ()
            return text, tuple(map(self._find, tags))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _find(self, tag: LoRATag) -> TaggedLoRA:
        if tag not in self._found:
            if self._folder is None:
                raise UserError(f"<lora:{tag.name}>: give the folder of your LoRA files: --lora_dir <folder>")
            self._found[tag] = TaggedLoRA(self._folder.find(tag.name), tag.strength, tag.text_encoder_strength)
        return self._found[tag]
