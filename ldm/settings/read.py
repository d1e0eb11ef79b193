"""Read settings that are declared with `ldm.settings.declare.setting`, wherever they come from, with the same checks.

- `read_settings`: a dataclass from its defaults, then a YAML file, then command-line flags. The later wins.
- `read_mapping`: the values of a YAML or JSON document, with nested sections.
- `check_values`: an instance that was made in Python.

Types may be bool, int, float, str, Path, list[...] and dict[str, ...] of those, a dataclass for a section, and Optional
or Union of those. `None` and `null` stand for None where a setting is Optional.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_yaml, write_yaml
from ldm.settings.declare import REQUIRED
from ldm.settings.values import (
    NONE_WORDS,
    Setting,
    accept,
    as_paths,
    check_range,
    convert,
    from_word,
    kinds_of,
    limits_of,
    list_item,
    nearest,
    plain_python,
    reads_as,
    settings_of,
    show,
    type_name,
    wanted,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def read_settings(
    cls: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    yaml_flag: str | None = None,
    prog: str = "",
    description: str | None = "",
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> Settings:
    """Build settings from defaults, the YAML file that the flag `yaml_flag` names, and the flags in `argv`.

    Booleans read as `--flag True`, `--flag=True` or the bare `--flag`, lists as `--betas 0.9 0.98`, a value that begins
    with `--` as `--flag=--value`. `-h` or `--help` prints every setting with its default and exits. Checks between
    settings belong into `__post_init__` of `cls`.

    Args:
        cls: A dataclass of settings.
        argv: The words of the command line, without the program's name. None stands for those of this process.
        yaml_flag: A setting of type Optional[str].
        prog: The name of the program in the help text.
        description: What the program does, for the help text. Line breaks are kept.
        complete: Called with the values that file and flags give. It returns values that are taken beside these.

    Raises:
        UserError: A setting is unknown (the nearest is named), missing, of a wrong type or out of range, or the file
            cannot be read.
    """
    settings = settings_of(cls)
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        _print(explain(cls, prog=prog, description=description or "", yaml_flag=yaml_flag))
        sys.exit(0)

    flags = _read_flags(argv, settings)
    values: dict[str, Any] = {}
    if yaml_flag is not None and (path := flags.get(yaml_flag, settings[yaml_flag].default)) is not None:
        content = read_yaml(path, f"--{yaml_flag}")
        content = {} if content is None else content
        values = read_mapping(cls, content, plain(path), partial=True, leave_out=(yaml_flag,))
    values.update(flags)
    if complete is not None:
        values.update(complete(values))
    for key, setting in settings.items():
        if values.get(setting.name, setting.default) is REQUIRED:
            raise UserError(f"--{key} is missing: give {wanted(setting)} ({setting.rules['help']})")
    return cls(**values)


def split_flags(cls: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a command line that `cls` declares, with their values, and all other words."""
    names = _flag_names(settings_of(cls))
    own: list[str] = []
    rest: list[str] = []
    words = rest
    for word in argv:
        if word.startswith("--") or word == "-h":
            words = own if word in ("-h", "--help") or _flag_name(word) in names else rest
        words.append(word)
    return own, rest


def read_mapping(
    cls: type,
    content: Any,
    source: str,
    prefix: str = "",
    *,
    ignore_unknown: bool = False,
    partial: bool = False,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Return the values that a mapping from YAML or JSON gives, checked against the declarations of `cls`.

    Args:
        cls: A dataclass of settings. A field whose type is such a class is a section, and read in the same way.
        content: The mapping.
        source: Names the file in errors.
        prefix: Stands before the names in errors, such as "model.params.".
        ignore_unknown: Whether names that are not declared are passed over.
        partial: Whether settings without a default may be missing.
        leave_out: Declared settings that are unknown here.

    Returns:
        Field name -> value, in the order of declaration, of the settings that are there. Sections are such mappings.

    Raises:
        UserError: A setting is unknown (the nearest is named), missing, of a wrong type or out of range.
    """
    if not isinstance(content, Mapping):
        place = f"{source}: {prefix[:-1]}" if prefix else source  # without the last dot
        raise UserError(f"{place} must hold lines of `setting: value`, not a value of type {type(content).__name__}")
    settings = {key: setting for key, setting in settings_of(cls).items() if key not in leave_out}
    keys = {alias: key for key, setting in settings.items() for alias in setting.rules["aliases"]}
    for alias in [name for name in content if name in keys]:
        key = keys[alias]
        if sum(name in content for name in (key, *settings[key].rules["aliases"])) > 1:
            raise UserError(f"{source}: {prefix}{alias} and another name of {prefix}{key} are given: leave one out")
        content = {key if name == alias else name: value for name, value in content.items()}
    known = (*settings, *keys, *getattr(cls, "IGNORED", ()))
    unknown = next((str(key) for key in content if key not in known), None)
    if unknown is not None and not ignore_unknown:
        near = nearest(unknown, known)
        raise UserError(f'{source}: unknown setting "{prefix}{plain(unknown, 100)}": did you mean "{near}"?')
    values = {}
    for key, setting in settings.items():
        where = f"{source}: {prefix}{key}"
        if key not in content:
            if setting.default is REQUIRED and not partial:
                raise UserError(f"{where} is missing: give {wanted(setting)}")
        elif dataclasses.is_dataclass(setting.hint):
            section = typing.cast(type, setting.hint)
            values[setting.name] = read_mapping(section, content[key], source, f"{prefix}{key}.")
        else:
            value = content[key]
            if setting.rules["zero_one"] and type(value) is int and value in (0, 1):
                value = bool(value)
            values[setting.name] = accept(convert(value, setting.hint, where), setting, where)
    return values


def check_values(settings: DataclassInstance, prefix: str = "") -> None:
    """Check the values of settings that were made in Python as those from files and flags.

    Tuples become lists, paths become texts where the setting is a text, and NumPy's numbers become Python's. `prefix`
    stands before the names in errors. Paths are not expanded.

    Raises:
        UserError: A value is missing, of a wrong type or out of range.
    """
    for setting in settings_of(type(settings)).values():
        given, where = getattr(settings, setting.name), f"{prefix}{setting.name}"
        if given is REQUIRED:
            raise UserError(f"{where} is missing: give {wanted(setting)}")
        value = convert(plain_python(given), setting.hint, where)
        check_range(value, setting, where)
        value = as_paths(value, setting)
        if value is not given:
            object.__setattr__(settings, setting.name, value)  # also where the dataclass is frozen


def save_settings(settings: DataclassInstance, path: str | Path, leave_out: Sequence[str] = ()) -> None:
    """Write settings as a YAML file that `read_settings` reads back.

    The settings in `leave_out` become comments. The flag that names the YAML file must be one of them.
    """
    values = dataclasses.asdict(settings)
    lines = [line for name in leave_out for line in write_yaml({name: values.pop(name)}).splitlines()]
    text = "".join(f"# {line}\n" for line in lines) + write_yaml(values)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def explain(cls: type, *, prog: str = "", description: str = "", yaml_flag: str | None = None) -> str:
    """Return the help text: every setting that has one, by group, with its type, choices, range and default."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"usage: python {prog} [--setting value ...]"] if prog else []
    if description:
        lines += ["", *([description.rstrip()] if "\n" in description else textwrap.wrap(description, width))]
    group = ""
    for key, setting in settings_of(cls).items():
        if not setting.rules["help"]:
            continue
        if not group or setting.rules["group"] not in (None, group):
            group = setting.rules["group"] or "settings"
            lines += ["", f"{group}:"]
        limits = limits_of(setting)
        text = f"{setting.rules['help']}{f' ({limits})' if limits else ''} [{show(setting.default)}]"
        names = ", ".join(f"--{name}" for name in (key, *setting.rules["aliases"]))
        names = f"[{names}]" if setting.rules["positional"] else names
        kind = type_name(setting.hint)
        lines.append(f"  {names} <{kind.replace('text', 'path') if setting.rules['path'] else kind}>")
        indent = " " * 6
        lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    order = " A flag wins over the YAML file, the YAML file over the default." if yaml_flag else ""
    lines += ["", f"In brackets: the default.{order}"]
    return "\n".join(lines).lstrip("\n")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # read in part, as by `| head`; without this, Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- the command line ------------------------------------------------------------------------------------------------


def _flag_names(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return the settings by all names that they have as flags."""
    return {name: setting for key, setting in settings.items() for name in (key, *setting.rules["aliases"])}


def _flag_name(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_")


def _read_flags(argv: Sequence[str], settings: Mapping[str, Setting]) -> dict[str, Any]:
    names = _flag_names(settings)
    positional = next((setting for setting in settings.values() if setting.rules["positional"]), None)
    values: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith("--"):
            if positional is None:
                word = plain(token)
                raise UserError(f'"{word}" does not belong to a setting: write --name value (-h lists the names)')
            values.setdefault(positional.name, []).append(token)
            continue
        name, equals, attached = _flag_name(token), "=" in token, token.partition("=")[2]
        if name not in names:
            near = nearest(name, list(names))
            raise UserError(f"unknown setting --{plain(name)}: did you mean --{near}? (-h lists all)")
        setting, where = names[name], f"--{name}"
        words = [attached] if equals else []
        if not equals:
            item = list_item(setting.hint)
            limit = len(argv) if item else position + 1
            while position < min(limit, len(argv)) and not argv[position].startswith("--"):
                # In `--apart name` and `--cores 0 1 name`, the name belongs to no flag. A flag that is True by default
                # is never given without a value.
                bare = bool in kinds_of(setting.hint) and setting.default is not True
                may_end = positional is not None and (words or bare)
                if may_end and not reads_as(argv[position], item or setting.hint):
                    break
                words.append(argv[position])
                position += 1
        values[setting.name] = accept(_from_words(words, setting, where), setting, where)
    return values


def _from_words(words: list[str], setting: Setting, where: str) -> Any:
    hint = setting.hint
    if not words:
        if bool in kinds_of(hint):
            return True
        raise UserError(f"{where} needs a value: {type_name(hint)}")
    item = list_item(hint)
    if item is None:
        return from_word(words[0], hint, where)
    if len(words) == 1 and words[0].lower() in NONE_WORDS and type(None) in kinds_of(hint):
        return None
    if str not in kinds_of(item):  # also as "0.9,0.98" or "[0.9, 0.98]"; texts may hold commas themselves
        words = [word for word in re.split(r"[\s,\[\]()]+", " ".join(words)) if word]
    return [from_word(word, item, where) for word in words]
