"""The inputs of the page, made from the declarations of the settings, so that a new setting needs no line here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ldm.errors import UserError, plain
from ldm.settings.generate import GenerateSettings
from ldm.settings.read import read_mapping
from ldm.settings.train import TrainSettings
from ldm.settings.values import Setting, kinds_of, list_item, settings_of

# What the server decides itself: files, the model, what is written where, and how it is computed.
SERVER_GROUPS = ("model", "LoRA", "textual inversion", "output", "device")
SERVER_NAMES = ("resume", "full_batches", "grid_x", "grid_y")  # of repeated and compared runs
# Of a training, beside its data and its recipe. All else is in the recipe.
TRAIN_NAMES = (
    "max_steps", "lora_rank", "start_learning_rate", "train_batch_size", "ckpt_save_interval", "image_size", "seed",
    "sample_every_n_steps", "sample_prompts",
)  # fmt: skip
# Where the page takes less than the command line does.
HELP = {
    "prompt": "Ctrl+Enter in it makes the images too",
    "ckpt_save_interval": "steps between checkpoints, from which a stopped training continues",
    "sample_prompts": "draw images while training: a prompt on each line, with kohya's flags if wanted, such as --s 10 "
    "for ten steps (docs/watching.md)",
}


def generate_fields() -> dict[str, Setting]:
    """Return the settings of text_to_image.py that the page shows, by name."""
    fields, groups = {}, groups_of(GenerateSettings)
    for name, setting in settings_of(GenerateSettings).items():
        single = not any(list_item(kind) for kind in kinds_of(setting.hint)) and list_item(setting.hint) is None
        shown = setting.rules["help"] and not setting.rules["path"] and single
        if shown and groups[name] not in SERVER_GROUPS and name not in SERVER_NAMES:
            fields[name] = setting
    return fields


def train_fields() -> dict[str, Setting]:
    """Return the settings of train_text_to_image.py that the page shows, by name."""
    settings = settings_of(TrainSettings)
    return {name: settings[name] for name in TRAIN_NAMES}


def groups_of(cls: type) -> dict[str, str]:
    """Return the heading of each setting in `-h`."""
    groups, group = {}, ""
    for name, setting in settings_of(cls).items():
        group = groups[name] = setting.rules["group"] or group
    return groups


def describe(cls: type, fields: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """Return what the page needs to know to show each setting of a class, as JSON."""
    described, groups = [], groups_of(cls)
    for name, setting in fields.items():
        rules = {rule: setting.rules[rule] for rule in ("low", "high", "above", "below")}
        described.append({
            "name": name, "group": groups[name], "help": HELP.get(name, setting.rules["help"]),
            "kind": _kind(setting),
            "default": setting.default, "optional": type(None) in kinds_of(setting.hint),
            "choices": _choices(setting), **rules,
        })  # fmt: skip
    return described


def read_values(cls: type, content: Any, fields: Collection[str]) -> dict[str, Any]:
    """Return the values of a request, checked as those of a YAML file. Raises UserError for any that is not shown."""
    if isinstance(content, Mapping) and (unknown := next((name for name in content if name not in fields), None)):
        raise UserError(f'the request: "{plain(unknown, 100)}" is no setting of this page')
    return read_mapping(cls, content, "the request", partial=True)


def _choices(setting: Setting) -> list[Any] | None:
    if {bool, type(None)} <= set(kinds_of(setting.hint)):  # a box has two states, and not three
        return [True, False]
    return None if setting.rules["choices"] is None else list(setting.rules["choices"])


def _kind(setting: Setting) -> str:
    kinds = kinds_of(setting.hint)
    if _choices(setting):
        return "choice"
    for kind, name in ((bool, "flag"), (float, "number"), (int, "integer")):
        if kind in kinds:
            return name
    return "lines" if list_item(setting.hint) else "text"
