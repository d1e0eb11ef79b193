"""Recognise the recipe in a file by its content, and read it. Nothing that the file holds is run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError, plain
from ldm.files.documents import MAX_TOML_BYTES, parse_json, read_toml, read_yaml
from ldm.files.inputs import decode_text, open_file, read_bytes
from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of
from ldm.weights.checkpoint import open_checkpoint
from tools.recipes import diffusers_command, kohya, lora_header, onetrainer, onetrainer_tables, shell
from tools.recipes.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 4 << 20  # of a text
WAY = (
    "give a TOML of sd-scripts, a JSON of kohya_ss or OneTrainer, a shell script with a command of diffusers, or a "
    "LoRA (.safetensors) that sd-scripts trained"
)


def read_recipe(path: str) -> Recipe:
    """Return the recipe in a file.

    Raises:
        UserError: The file cannot be read, is no recipe of a known project, or one of another model.
    """
    where = plain(path)
    with open_file(path, way=WAY) as file:
        start = file.read(64)
    if start[8:9] == b"{" and start[:1] not in (b"{", b"["):
        checkpoint = open_checkpoint(path)
        return _with_name(where, lambda: lora_header.read(checkpoint.metadata, checkpoint))
    text = decode_text(read_bytes(path, way=WAY, most=MAX_BYTES), path, WAY)
    if not text.strip():
        raise UserError(f"{where} is empty: {WAY}")
    if text.lstrip().startswith("{"):
        content = parse_json(text, where)
        return _with_name(where, lambda: _json(content))
    if text.lstrip().startswith("[") and Path(path).suffix.lower() == ".json":
        raise UserError(f"{where} is a list of JSON, not a recipe: {WAY}")
    toml = _toml(text, path)
    if toml is not None:
        return _with_name(where, lambda: _sd_scripts(toml))
    if shell.has_command(text):
        if len(text) > shell.MAX_SHELL_BYTES:
            raise UserError(
                f"{where} has {len(text):,} characters, at most {shell.MAX_SHELL_BYTES:,} of a command are read"
            )
        return _with_name(where, lambda: diffusers_command.read(shell.parse(text, "the file")))
    _refuse_yaml(text, path)
    raise UserError(f"{where} is no recipe that this tool knows: {WAY}")


def _with_name(where: str, read: Any) -> Recipe:
    try:
        return read()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _toml(text: str, path: str) -> dict[str, Any] | None:
    """Return the content of a TOML, None if the text is none. Raises UserError where the suffix says it should be."""
    if Path(path).suffix.lower() == ".toml":
        return read_toml(path)
    if len(text) > MAX_TOML_BYTES:
        return None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, OverflowError):
        return None


def _sd_scripts(content: Mapping[str, Any]) -> Recipe:
    if isinstance(content.get("datasets"), list):
        raise UserError("it is a dataset_config: this project reads it itself, as --data_path (docs/data.md)")
    values = kohya.flat(content)
    if not any(name in values for name in kohya.SIGNS):
        raise UserError(f"none of {', '.join(kohya.SIGNS[:5])} is in it, so it is no recipe of sd-scripts: {WAY}")
    return kohya.read(values)


def _json(content: Mapping[str, Any]) -> Recipe:
    if sum(name in content for name in onetrainer_tables.SIGNS) > 1 or "training_method" in content:
        return onetrainer.read(content)
    if any(name in content for name in kohya.SIGNS):
        nested = next((name for name, value in content.items() if isinstance(value, dict)), None)
        if nested is not None:
            raise UserError(f'"{plain(nested, 60)}" is a section, and kohya_ss has none: {WAY}')
        return kohya.read(content, gui=True)
    if "r" in content and "target_modules" in content:
        raise UserError("it is the adapter_config.json of PEFT, which says nothing of the training: " + WAY)
    names = plain(json.dumps(list(content)[:5], ensure_ascii=False), 100)
    raise UserError(f"it is a JSON with {names}, and no recipe of kohya_ss or OneTrainer: {WAY}")


def _refuse_yaml(text: str, path: str) -> None:
    """Raise UserError for the YAML of this project, of mindone or of others, which says what it is."""
    if not re.search(r"^[\w-]+\s*:", text, re.MULTILINE):
        return
    where = plain(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        return
    own = {alias for key, setting in settings_of(TrainSettings).items() for alias in (key, *setting.rules["aliases"])}
    if content and sum(str(name) in own for name in content) * 2 >= len(content):
        raise UserError(
            f"{where} is a recipe of this project, or of mindone, whose YAML this project reads itself: "
            f"python train_text_to_image.py --train_config {where}"
        )
    other = "ai-toolkit's" if "job" in content and "config" in content else "no YAML of this project or mindone"
    raise UserError(f"{where} is {other}, which this tool does not read: {WAY}")
