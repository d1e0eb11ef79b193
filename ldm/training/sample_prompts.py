"""The prompts of sample_prompts: from a text file with kohya's line flags, JSON, TOML, or the setting itself.

    # a comment
    a red apple on a table --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28 --ss ddim

Nothing here imports MindSpore, so a mistake is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError, plain
from ldm.files.documents import read_json, read_toml
from ldm.files.inputs import read_text
from ldm.files.paths import expanded, under_root
from ldm.files.prompts import MAX_CHARACTERS
from ldm.prompts.prompt_lines import FLAGS, read_prompt_line
from ldm.settings.model import ModelConfig
from ldm.settings.read import read_mapping
from ldm.settings.samples import SAMPLER_NAMES, PromptLineSettings, SampleSettings
from ldm.settings.versions import default_guidance_scale

MAX_PROMPTS = 99  # each is drawn at every sampling
MAX_BYTES = 1 << 20  # of a text file
FILES = (".txt", ".json", ".toml")
WAY = "give a .txt file with a prompt a line, a .json or a .toml file, or the prompts themselves"


@dataclass(frozen=True)
class SamplePrompt:
    """What to draw, and how."""

    prompt: str
    negative_prompt: str
    seed: int
    sampling: Sampling  # with size and guidance scale
    line: str  # as it was read; of JSON and TOML as such a line
    where: str  # names its place in errors


class _Entry(NamedTuple):
    """A prompt as it was read: its settings by kohya's names."""

    where: str
    line: str
    values: Mapping[str, Any]


def check_sample_prompts(settings: SampleSettings) -> None:
    """Raise UserError if sample_prompts cannot be read. Whether the model can draw them is not checked."""
    _read(settings.sample_prompts)


def read_sample_prompts(
    settings: SampleSettings, config: ModelConfig, from_noise_alone: bool = False
) -> list[SamplePrompt]:
    """Return the prompts to draw, none where sample_prompts is not given.

    What a prompt leaves out has the default of text_to_image.py, the sampler that of sample_sampler.
    `from_noise_alone`: whether the training is one of zero_terminal_snr.

    Raises:
        UserError: The file cannot be read, a flag or name is unknown, a value is out of range or does not suit the
            model, or there are no prompts or too many.
    """
    prompts = []
    for where, line, values in _read(settings.sample_prompts):
        entry = PromptLineSettings(**values)
        scale = default_guidance_scale(config.architecture) if entry.scale is None else entry.scale
        sampling = Sampling(
            sampler=SAMPLER_NAMES[entry.sample_sampler or settings.sample_sampler],
            num_inference_steps=entry.sample_steps,
            guidance_scale=scale,
            height=entry.height or config.image_size,
            width=entry.width or config.image_size,
            batch_size=1,
        )
        try:
            sampling.check(config, from_noise_alone)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        prompts.append(SamplePrompt(entry.prompt, entry.negative_prompt, entry.seed, sampling, line, where))
    return prompts


def _read(given: str | Sequence[str] | None) -> list[_Entry]:
    """Return the prompts of a file, or of the setting itself, with their values checked against PromptLineSettings."""
    if given is None:
        return []
    lines = [given] if isinstance(given, str) else list(given)
    files = [line for line in lines if _names_file(line)]
    if files and len(lines) > 1:
        raise UserError(
            f"sample_prompts names the file {plain(files[0])} beside others: give one file, or the prompts themselves"
        )
    if files:
        name, entries = f"sample_prompts {plain(files[0])}", _read_file(files[0])
    else:
        name = "sample_prompts"
        entries = [_from_line(line, f"sample_prompts, prompt {i}") for i, line in enumerate(lines, 1)]
    if not entries:
        raise UserError(f"{name} holds no prompts: {WAY}")
    if len(entries) > MAX_PROMPTS:
        raise UserError(
            f"{name} holds {len(entries):,} prompts, at most {MAX_PROMPTS} are drawn: leave some out, because each is "
            "drawn at every sampling"
        )
    for where, _, values in entries:
        for key in ("prompt", "negative_prompt"):
            text = values.get(key, "")
            if len(text) > MAX_CHARACTERS:
                raise UserError(
                    f"{where}: {key} has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read: shorten it"
                )
    return entries


def _names_file(line: str) -> bool:
    """Whether an entry of sample_prompts is a file. A prompt may end in such a name too, behind other words."""
    if Path(line).suffix.lower() not in FILES:
        return False
    return " " not in line or os.path.exists(expanded(line))


def _read_file(given: str) -> list[_Entry]:
    path = str(under_root(expanded(given)))
    where = f"sample_prompts {plain(path)}"
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        text = read_text(path, "sample_prompts", WAY, MAX_BYTES)
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        return [
            _from_line(line, f"{where}, line {number}") for number, line in lines if line and not line.startswith("#")
        ]
    if suffix == ".json":
        content = read_json(path, "sample_prompts", WAY)
        if not isinstance(content, list):
            raise UserError(f'{where} must hold a list: [{{"prompt": "a red apple", "seed": 1}}, ...], or lines')
        return [_from_json(entry, f"{where}, prompt {i}") for i, entry in enumerate(content, 1)]
    return _from_toml(read_toml(path, "sample_prompts", WAY), where)


def _from_json(entry: object, where: str) -> _Entry:
    return _from_line(entry, where) if isinstance(entry, str) else _from_mapping(entry, where)


def _from_toml(content: Mapping[str, Any], where: str) -> list[_Entry]:
    """Return the prompts of kohya's form: [prompt] with what is common to all, and a [[prompt.subset]] for each."""
    common = content.get("prompt")
    subsets = common.get("subset") if isinstance(common, dict) else None
    if len(content) != 1 or not isinstance(subsets, list) or not all(isinstance(entry, dict) for entry in subsets):
        raise UserError(
            f"{where} must hold one [prompt] with what is common to all prompts, and a [[prompt.subset]] with prompt "
            '= "..." for each'
        )
    assert isinstance(common, dict)
    shared = {key: value for key, value in common.items() if key != "subset"}
    return [_from_mapping({**shared, **entry}, f"{where}, subset {i}") for i, entry in enumerate(subsets, 1)]


def _from_mapping(entry: object, where: str) -> _Entry:
    """Check a prompt that is given by kohya's names."""
    values = read_mapping(PromptLineSettings, entry, where)
    if "prompt" not in values:
        raise UserError(f'{where} has no prompt: give "prompt", an empty text for an image without one')
    flags = {name: letter for letter, name in FLAGS.items()}
    texts = [f"--{flags[name]} {value}" for name, value in values.items() if name in flags and value is not None]
    return _Entry(where, " ".join(" ".join([values["prompt"], *texts]).split()), values)


def _from_line(line: str, where: str) -> _Entry:
    return _Entry(where, " ".join(line.split()), read_prompt_line(line, where))
