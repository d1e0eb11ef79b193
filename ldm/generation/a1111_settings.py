"""The settings of text_to_image.py that A1111's text of an image gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import UserError, plain
from ldm.generation.a1111_text import A1111Text, sampler_name, size
from ldm.generation.parameters import HIRES_UPSCALERS
from ldm.settings.declare import MAX_SEED
from ldm.settings.generate import GenerateSettings
from ldm.settings.model_yaml import MAX_TIMESTEPS
from ldm.settings.read import read_mapping
from ldm.settings.repeating import MAX_INDEX
from ldm.settings.sampler_names import SAMPLER_LABELS, SCHEDULE_LABELS
from ldm.settings.values import settings_of

# Of A1111's values, those that describe the image and are no settings, or are read together.
_NOT_SETTINGS = ("Version", "Model", "Model hash", "Lora hashes", "RNG", "Schedule type", "Sampler", "Size", "Eta")
# Those of a second start: taken over together, or not at all.
_SECOND_START = (
    "Variation seed", "Variation seed strength", "Denoising strength", "Hires upscale", "Hires upscaler", "Hires steps",
)  # fmt: skip


def a1111_settings(text: A1111Text, where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of text_to_image.py that A1111's text of an image gives, and what cannot be repeated.

    Raises:
        UserError: Its prompt is not text that can be read, which names `where`.
    """
    known, values = settings_of(GenerateSettings), text.values
    content: dict[str, Any] = {
        "prompt": text.prompt,
        "negative_prompt": text.negative_prompt,
        "prompt_syntax": "a1111",
    }
    missing = ["its noise: A1111 draws other random numbers for a seed"]
    kinds: tuple[tuple[str, str, Callable[[str], float]], ...] = (
        ("Steps", "sampling_steps", int),
        ("CFG scale", "scale", float),
        ("Seed", "seed", int),
        ("Clip skip", "clip_skip", int),
        ("Index", "first_index", int),
    )
    most = {"seed": MAX_SEED, "first_index": MAX_INDEX}
    for key, name, kind in kinds:
        if key not in values or (key == "Clip skip" and values[key] == "1"):
            continue
        try:
            number = kind(values[key][:40])
            if name not in known or not 0 <= number <= most.get(name, math.inf):
                raise ValueError
            content[name] = number
        except (ValueError, OverflowError):
            missing.append(f"{key} {plain(values[key], 40)}")
    if (sides := size(values)) is not None:
        content["W"], content["H"] = sides
    missing += _sampler(values, content)
    second_start = _second_start(values, content)
    content.update(second_start)
    done = (*(key for key, _, _ in kinds), *(_SECOND_START if second_start else ()), *_NOT_SETTINGS)
    missing += [f"{plain(key, 40)} {plain(value, 40)}" for key, value in values.items() if key not in done]
    if text.rest:
        missing.append(f"the lines {plain(text.rest, 60)}")
    return read_mapping(GenerateSettings, content, where, partial=True), missing


def _second_start(values: Mapping[str, str], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of variations and of the hires fix, none if one of the values is not understood."""
    try:
        found: dict[str, Any] = {}
        if "Variation seed strength" in values:
            found["variation_seed"] = int(values["Variation seed"][:40])
            found["variation_strength"] = float(values["Variation seed strength"][:40])
        if "Hires upscale" in values:
            found["hires_scale"] = float(values["Hires upscale"][:40])
            found["hires_strength"] = strength = float(values["Denoising strength"][:40])
            found["hires_upscaler"] = HIRES_UPSCALERS[values["Hires upscaler"]]
            taken = int(values["Hires steps"][:40]) if "Hires steps" in values else int(content["sampling_steps"])
            # Of A1111's hires steps all are taken. Of these, the last int(steps * strength).
            found["hires_steps"] = next(n for n in range(taken, MAX_TIMESTEPS) if int(n * strength) >= taken)
        elif "Denoising strength" in values:
            return {}  # of an image that the text does not name
        read_mapping(GenerateSettings, found, "", partial=True)
    except (ValueError, KeyError, OverflowError, StopIteration, UserError):
        return {}
    return found


def _sampler(values: Mapping[str, str], content: dict[str, Any]) -> list[str]:
    """Put the sampler and the schedule into `content`, and return those that are not known."""
    missing = []
    for name, given, labels in zip(
        ("sampler", "schedule"), sampler_name(values), (SAMPLER_LABELS, SCHEDULE_LABELS)
    ):  # fmt: skip
        names = [own for own, label in labels.items() if label.lower() == given.lower()]
        if names:
            content[name] = names[0]
        elif given:
            missing.append(f"the {name} {plain(given, 40)}")
    if "Eta" in values:
        try:
            share = float(values["Eta"][:40])
            if not 0.0 <= share <= 1.0:
                raise ValueError
            content["ddim_eta" if content.get("sampler") == "ddim" else "eta"] = share
        except ValueError:
            missing.append(f"Eta {plain(values['Eta'], 40)}")
    return missing
