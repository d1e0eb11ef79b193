"""Axes of a comparison: a setting and the values that it has, as "lora_scale=0,0.5,1"."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError, plain
from ldm.settings.values import Setting, accept, from_word, list_item, nearest, wanted

MAX_VALUES = 100  # of an axis
MAX_CHARACTERS = 100_000
REPLACED = "prompt_sr"  # A1111's "Prompt S/R": the first text in the prompt is replaced by each of the others


@dataclass(frozen=True)
class SettingAxis:
    """A setting of a comparison, the values that it takes one after the other, and the texts that stand for them."""

    name: str
    values: list[Any]
    labels: list[str]


def parse_axis(text: str, flag: str, settings: Mapping[str, Setting], allowed: Collection[str]) -> SettingAxis:
    """Read an axis.

    Args:
        text: A setting, an equals sign, and values between commas. A value that holds a comma stands in double quotes.
        flag: The setting that holds the axis, for errors.
        settings: The declared settings by their names.
        allowed: The names of those that may be an axis.

    Raises:
        UserError: The setting is unknown or may not be an axis, or a value is of a wrong type or out of range.
    """
    where = f"--{flag} {plain(text)}"
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: {len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    name, equals, written = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals or not name:
        raise UserError(f"{where}: give a setting and its values, such as --{flag} lora_scale=0,0.5,1")
    aliases = {alias: key for key, setting in settings.items() for alias in setting.rules["aliases"]}
    name = aliases.get(name, name)
    if name not in allowed and name != REPLACED:
        reason = "cannot be compared" if name in settings else "is unknown"
        near = nearest(name, [*allowed, REPLACED])
        raise UserError(f"{where}: the setting {plain(name, 60)} {reason}; settings of the images can, such as {near}")
    labels = _labels(written, where)
    if not 1 <= len(labels) <= MAX_VALUES:
        raise UserError(f"{where}: {len(labels):,} values, wanted 1 to {MAX_VALUES}")
    if name == REPLACED:
        if not labels[0]:
            raise UserError(f"{where}: the first text is what is replaced, and may not be empty")
        return SettingAxis(name, labels, labels)
    values = [_value(label, settings[name], where) for label in labels]
    if settings[name].rules["path"]:  # a sheet is passed on, and the folders of its maker are private
        labels = [os.path.basename(re.sub(r"/+(:|$)", r"\1", label)) or label for label in labels]
    return SettingAxis(name, values, labels)


def without_folders(text: str, flag: str, settings: Mapping[str, Setting]) -> str:
    """Return an axis with the names of its files in place of their paths. Arguments and errors are parse_axis's."""
    axis = parse_axis(text, flag, settings, settings)
    if axis.name == REPLACED or not settings[axis.name].rules["path"]:
        return text
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow(axis.labels)
    return f"{axis.name}={row.getvalue()}"


def _labels(written: str, where: str) -> list[str]:
    if "\n" in written or "\r" in written:
        raise UserError(f"{where}: the values must stand on one line")
    try:
        rows = list(csv.reader([written], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{where}: {plain(error, 60)}: put a value with a comma or a quote into double quotes, with each quote "
            "in it doubled"
        ) from None
    return [label.strip() for label in rows[0]] if rows else []


def _value(label: str, setting: Setting, where: str) -> Any:
    item = list_item(setting.hint)
    if not label and str not in (setting.hint,):
        raise UserError(f"{where}: an empty value: {setting.name} takes {wanted(setting)}")
    value = from_word(label, setting.hint if item is None else item, where)
    return accept(value if item is None else [value], setting, where)
