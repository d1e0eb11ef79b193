"""Check a recipe with this project's own reader, and write it as the YAML of --train_config."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_yaml, valid_text, write_yaml
from ldm.settings.read import read_mapping, read_settings
from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of
from tools.recipes.recipe import LISTS, NO_COUNTERPART, OFF, Named, Recipe, shown, whole

WIDTH = 118  # of a comment
_IN_BRACKETS = ("lora_targets", "report_to")  # lists of plain words


def settle(recipe: Recipe) -> None:
    """Leave out, and name, the settings that do not go together here. Raises UserError if that does not help."""
    while (problem := _problem(recipe)) is not None:
        words = re.findall(r"\w+", problem)
        suspects = sorted((name for name in recipe.settings if name in words), key=words.index)
        helping = [name for name in suspects if _problem(recipe, name) is None]
        different = [name for name in suspects if _problem(recipe, name) != problem]
        if not different:
            raise UserError(f"the recipe's settings do not go together here: {problem}")
        name = (helping or different)[0]
        given = recipe.settings.pop(name)
        recipe.name(NO_COUNTERPART, given.theirs or name, given.value, f"refused here: {problem}")


def _problem(recipe: Recipe, without: str = "") -> str | None:
    """Return what TrainSettings says of the settings, without one of them. None if it takes them."""
    values = {name: entry.value for name, entry in recipe.settings.items() if name != without}
    try:
        TrainSettings(**read_mapping(TrainSettings, values, "the recipe"))
    except UserError as error:
        return str(error)
    return None


def yaml_text(recipe: Recipe, source: str) -> str:
    """Return the YAML: the settings in the order of `-h`, and the lists of what is no setting here."""
    lines = [
        f"# {line}"
        for line in _wrapped(f"Made of {plain(source)}, a recipe of {recipe.project}, by tools/import_recipe.py.")
    ]
    if "data_path" not in recipe.settings:
        lines.append("# It names no data set that can be read here: give --data_path.")
    group = ""
    groups: dict[str, list[str]] = {}
    for key, setting in settings_of(TrainSettings).items():
        group = setting.rules["group"] or group
        if setting.name not in recipe.settings:
            continue
        written = recipe.settings[setting.name]
        entry = groups.setdefault(group, [])
        entry += [f"# {line}" for line in _wrapped(written.comment)]
        entry += _lines(key, written.value)
    for group, entry in groups.items():
        lines += ["", f"# ---- {group}", *entry]
    for name in LISTS:
        entries = [entry for entry in recipe.named if entry.list == name]
        if entries:
            lines += ["", f"# ---- {name} ({len(entries)})", *(f"# {line}" for line in listed(name, entries))]
    return valid_text("\n".join(lines) + "\n")


def listed(name: str, entries: list[Named]) -> Iterator[str]:
    """Yield the lines of a list. What asks for nothing needs no reasons."""
    if name == OFF:
        yield from textwrap.wrap(", ".join(plain(entry.theirs, 60) for entry in entries), WIDTH, break_on_hyphens=False)
        return
    for entry in entries:
        yield from _wrapped(f"{plain(entry.theirs, 60)} {shown(entry.theirs, entry.value)}: {plain(entry.reason, 400)}")


def _lines(key: str, value: Any) -> list[str]:
    """Return the YAML of a setting. Lists of layers' names are in brackets, and 500.0 is 500."""
    if isinstance(value, float) and abs(value) < 1e15:
        value = whole(value)
    if key in _IN_BRACKETS and value and all(re.fullmatch(r"[a-z][a-z0-9._]+", word) for word in value):
        return textwrap.wrap(f"{key}: [{', '.join(value)}]", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return write_yaml({key: value}).splitlines()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def write(recipe: Recipe, source: str, path: Path) -> None:
    """Write the YAML under a temporary name, read it back as a training does, and rename it."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml_text(recipe, source), encoding="utf-8")
        read_settings(TrainSettings, ["--train_config", str(temporary)], yaml_flag="train_config")
        values = read_mapping(TrainSettings, read_yaml(temporary), source)
        for name, entry in recipe.settings.items():
            if not settings_of(TrainSettings)[name].rules["path"] and values[name] != entry.value:
                raise AssertionError(f"{name}: {entry.value!r} was written, and {values[name]!r} is read")


def summary(recipe: Recipe) -> Iterator[str]:
    """Yield the lines that are printed: counts, and the lists."""
    from_defaults = sum(not entry.theirs for entry in recipe.settings.values())
    counts = ", ".join(
        f"{sum(entry.list == name for entry in recipe.named)} {name}"
        for name in LISTS
        if any(entry.list == name for entry in recipe.named)
    )
    yield (
        f"{recipe.project}: {len(recipe.settings)} settings ({from_defaults} of them defaults of {recipe.project})"
        + (f"; {counts}" if counts else "")
    )
    for name in LISTS:
        entries = [entry for entry in recipe.named if entry.list == name]
        if entries:
            yield f"{name}:"
            yield from (f"  {line}" for line in listed(name, entries))
