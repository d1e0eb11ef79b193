"""Settings from a dataclass: its defaults, then a YAML file, then command-line flags; the later wins.

    settings = read_settings(TrainSettings, sys.argv[1:], yaml_flag="train_config", prog="train.py")

Field types may be bool, int, float, str, list[...] of those, Optional of those, and Union[bool, str]. `None` and `null`
stand for None where a setting is Optional, on the command line and in YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import shutil
import struct
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_yaml, write_yaml
from ldm.files.paths import expanded, under_root

Config = TypeVar("Config")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null")
LONGEST_NAME = 100  # characters: comparing takes the square of them


def read_settings(
    cls: type[Config],
    argv: Sequence[str],
    *,
    yaml_flag: str | None = None,
    prog: str = "",
    description: str = "",
) -> Config:
    """Build `cls` from its defaults, the YAML file that the flag `yaml_flag` names, and the flags in `argv`.

    `yaml_flag` must be a field of `cls` of type Optional[str]. Booleans read as `--flag True`, `--flag=True` or the
    bare `--flag`; lists as `--betas 0.9 0.98`; a value that begins with `--` as `--flag=--value`. `-h` or `--help`
    prints every setting with its default and exits. Checks between settings belong into `__post_init__` of `cls`.

    Raises UserError for an unknown setting (naming the nearest), a wrong type, a value out of range, a broken file.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if "-h" in argv or "--help" in argv:
        _print(explain(cls, prog=prog, description=description))
        sys.exit(0)

    flags = {
        name: _accepted(value, fields[name], f"--{name}") for name, value in _read_flags(argv, fields, hints).items()
    }
    values: dict[str, Any] = {}
    if yaml_flag is not None:
        path = flags.get(yaml_flag, fields[yaml_flag].default)
        if path is not None:
            for name, value in _read_yaml_settings(path, fields, yaml_flag).items():
                where = f"{plain(path)}: {name}"
                values[name] = _accepted(_from_yaml(value, hints[name], where), fields[name], where)
    values.update(flags)
    return cls(**values)


def save_settings(config: Any, path: str | Path, header: str = "", leave_out: Sequence[str] = ()) -> None:
    """Write all settings of a dataclass as a YAML file that `read_settings` reads back.

    `header` becomes a comment, and so do the settings in `leave_out`: the flag that names the YAML file must be there.
    """
    settings = dataclasses.asdict(config)
    lines = header.splitlines()
    for name in leave_out:
        lines += write_yaml({name: settings.pop(name)}).splitlines()
    text = "".join(f"# {line}\n" for line in lines) + write_yaml(settings)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def explain(cls: type, *, prog: str = "", description: str = "", width: int | None = None) -> str:
    """The help text: every setting, by group, with its type, choices, range and default."""
    width = width or max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    hints = typing.get_type_hints(cls)
    lines = [f"usage: python {prog} [--setting value ...]"] if prog else []
    if description:
        lines += ["", textwrap.fill(description, width)]
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(cls):
        if field.init:
            groups.setdefault(field.metadata.get("group", "settings"), []).append(field)
    for group, members in groups.items():
        lines += ["", f"{group}:"]
        for field in members:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            text = field.metadata.get("help", "")
            limits = _limits(field)
            text += f" ({limits})" if limits else ""
            text += f" [{_show(default)}]"
            lines.append(f"  --{field.name} <{_type_name(hints[field.name])}>")
            lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    lines += ["", "In brackets: the default. A flag wins over the YAML file, the YAML file over the default."]
    return "\n".join(lines)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # read in part, as by `| head`; the rest goes nowhere, or Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`, for error messages."""
    return difflib.get_close_matches(name[:LONGEST_NAME], list(known), n=1, cutoff=0.0)[0]


# ---- the command line ------------------------------------------------------------------------------------------------


def _read_flags(argv: Sequence[str], fields: dict[str, dataclasses.Field], hints: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith("--"):
            raise UserError(f'"{plain(token)}" does not belong to a setting: write --name value (-h lists the names)')
        name, equals, attached = token[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            near = nearest(name, list(fields))
            raise UserError(f"unknown setting --{plain(name)}: did you mean --{near}? (-h lists all)")
        words = [attached] if equals else []
        hint = hints[name]
        if not equals:
            limit = len(argv) if _list_item(hint) else position + 1
            while position < min(limit, len(argv)) and not argv[position].startswith("--"):
                words.append(argv[position])
                position += 1
        values[name] = _from_words(words, hint, f"--{name}")
    return values


def _from_words(words: list[str], hint: Any, where: str) -> Any:
    if not words:
        if bool in _alternatives(hint):
            return True
        raise UserError(f"{where} needs a value: {_type_name(hint)}")
    item = _list_item(hint)
    if item is None:
        return _from_word(words[0], hint, where)
    if len(words) == 1 and words[0].lower() in _NONE and type(None) in _alternatives(hint):
        return None
    if item is not str:  # also as "0.9,0.98" or "[0.9, 0.98]"; texts may hold commas themselves
        words = [word for word in re.split(r"[\s,\[\]()]+", " ".join(words)) if word]
    return [_from_word(word, item, where) for word in words]


def _from_word(word: str, hint: Any, where: str) -> Any:
    kinds = _alternatives(hint)
    if type(None) in kinds and word.lower() in _NONE:
        return None
    # a lone 1 or 0 is a truth value only where no number is wanted
    if bool in kinds and word.lower() in _TRUE + _FALSE:
        return word.lower() in _TRUE
    for kind in (int, float):
        if kind in kinds:
            try:
                number = kind(word)
            except ValueError:
                continue
            if kind is int or math.isfinite(number):
                return number
    if str in kinds:
        return word
    raise UserError(f"{where}: {_show(word)} is not {_wanted(hint)}")


# ---- the YAML file ---------------------------------------------------------------------------------------------------


def _read_yaml_settings(path: str, fields: dict[str, dataclasses.Field], yaml_flag: str) -> dict[str, Any]:
    content = read_yaml(path, f"--{yaml_flag}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{plain(path)} must hold lines of `setting: value`, not a {type(content).__name__}")
    known = [name for name in fields if name != yaml_flag]
    for name in content:
        if name not in known:
            near = nearest(str(name), known)
            raise UserError(f'{plain(path)}: unknown setting "{plain(name)}": did you mean "{near}"? (-h lists all)')
    return content


def _from_yaml(value: Any, hint: Any, where: str) -> Any:
    kinds = _alternatives(hint)
    item = _list_item(hint)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in _NONE)):
        return None
    if item is not None:
        if isinstance(value, list):
            return [_from_yaml(entry, item, where) for entry in value]
    # The exact type: a bool is an int to Python, not to a person.
    elif type(value) in kinds and (type(value) is not float or math.isfinite(value)):
        return value
    elif type(value) is int and float in kinds and abs(value) <= sys.float_info.max:
        return float(value)
    elif isinstance(value, str) and _reads_unquoted(value, hint):
        # A number with a zero before it is none in a YAML: some read it as octal.
        zeros = ", and zeros at its beginning" if re.match(r"[-+]?0\d", value) else ""
        raise UserError(f"{where}: {_show(value)} is a text, not {_wanted(hint)}: leave the quotes away{zeros}")
    elif str in kinds and not isinstance(value, (list, dict)):
        raise UserError(f"{where}: {_show(value)} is read as a {type(value).__name__}; put the text in quotes")
    raise UserError(f"{where}: {_show(value)} is not {_wanted(hint)}")


def _reads_unquoted(text: str, hint: Any) -> bool:
    try:
        _from_word(text, hint, "")
    except UserError:
        return False
    return True


# ---- types and ranges ------------------------------------------------------------------------------------------------


def _alternatives(hint: Any) -> tuple:
    union = typing.get_origin(hint) in (Union, getattr(types, "UnionType", Union))
    return typing.get_args(hint) if union else (hint,)


def _list_item(hint: Any) -> Any:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is list:
            return typing.get_args(kind)[0]
    return None


def _wanted(hint: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}
    texts = []
    for kind in _alternatives(hint):
        texts.append(f"a list, each {_wanted(_list_item(kind))}" if _list_item(kind) else names[kind])
    return " or ".join(texts)


def _type_name(hint: Any) -> str:
    names = {bool: "True|False", int: "int", float: "float", str: "text", type(None): "None"}
    return "|".join(f"{_type_name(_list_item(k))} ..." if _list_item(k) else names[k] for k in _alternatives(hint))


def _limits(field: dataclasses.Field) -> str:
    rules = field.metadata
    texts = []
    if rules.get("choices"):
        texts.append("one of " + ", ".join(_show(choice) for choice in rules["choices"]))
    names = (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
    texts += [f"{name} {rules[rule]}" for rule, name in names if rules.get(rule) is not None]
    if rules.get("length"):
        texts.append(f"{rules['length']} values")
    return ", ".join(texts)


def _accepted(value: Any, field: dataclasses.Field, where: str) -> Any:
    """The value with its paths expanded. Raises UserError where it is out of range."""
    if field.metadata.get("path"):
        project = field.metadata["project"]
        entries = [_path(entry, project, where) for entry in (value if isinstance(value, list) else [value])]
        value = entries if isinstance(value, list) else entries[0]
    _check_range(value, field, where)
    return value


def _path(value: Any, project: bool, where: str) -> Any:
    if not isinstance(value, str):  # None, or True where a setting is a path or a truth value
        return value
    path = expanded(value)
    if not path:
        raise UserError(f"{where}: {_show(value)} is no path: give one, or leave the setting out")
    return str(under_root(path)) if project else path


def _check_range(value: Any, field: dataclasses.Field, where: str) -> None:
    rules = field.metadata
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if entry is None:
            continue
        wrong = rules.get("choices") and entry not in rules["choices"]
        note = ""
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            wrong = wrong or _is_outside(entry, rules)
            rounded = _in_fp32(entry) if isinstance(entry, float) else entry
            if not wrong and _is_outside(rounded, rules):
                wrong, note = True, f" (in fp32, which is computed with, it is {rounded})"
        if wrong:
            if rules.get("choices") and isinstance(entry, str):
                note = f'; did you mean "{nearest(entry, [str(choice) for choice in rules["choices"]])}"?'
            raise UserError(f"{where}: {_show(entry)} is not allowed: {_limits(field)}{note}")
        if isinstance(entry, float) and math.isinf(rounded):
            raise UserError(f"{where}: {entry} is not allowed: fp32, which is computed with, ends at 3.4e38")
    if rules.get("length") and isinstance(value, list) and len(value) != rules["length"]:
        raise UserError(f"{where}: {len(value)} values given, wanted {rules['length']}")


def _is_outside(number: float, rules: Mapping[str, Any]) -> bool:
    low, high, above, below = (rules.get(rule) for rule in ("low", "high", "above", "below"))
    return (
        (low is not None and number < low)
        or (high is not None and number > high)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    )


def _in_fp32(number: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)


def _show(value: Any) -> str:
    return f'"{plain(value)}"' if isinstance(value, str) else plain(value)
