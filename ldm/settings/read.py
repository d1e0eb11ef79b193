"""Reads settings that are declared with `ldm.settings.declare.setting`, wherever they come from, with the same checks.

- `read_settings`: a dataclass from its defaults, then a YAML file, then command-line flags. The later wins.
- `read_mapping`: the values of a YAML or JSON document, with nested sections.
- `check_values`: an instance that was made in Python.

Types may be bool, int, float, str, Path, list[...] and dict[str, ...] of those, a dataclass for a section, and Optional
or Union of those. `None` and `null` stand for None where a setting is Optional.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
import shutil
import struct
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_yaml, write_yaml
from ldm.files.paths import expanded, under_root
from ldm.settings.declare import REQUIRED, default_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null")
LONGEST_NAME = 100  # characters: the time to compare names grows with their square


class _Setting(NamedTuple):
    """A declared setting: its field, its type (Path read as str) and its rules."""

    name: str
    default: Any
    hint: Any
    rules: Mapping[str, Any]


def read_settings(
    cls: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    yaml_flag: str | None = None,
    prog: str = "",
    description: str | None = "",
) -> Settings:
    """Builds settings from defaults, the YAML file that the flag `yaml_flag` names, and the flags in `argv`.

    Booleans read as `--flag True`, `--flag=True` or the bare `--flag`, lists as `--betas 0.9 0.98`, a value that begins
    with `--` as `--flag=--value`. `-h` or `--help` prints every setting with its default and exits. Checks between
    settings belong into `__post_init__` of `cls`.

    Args:
        cls: A dataclass of settings.
        argv: The words of the command line, without the program's name. None stands for those of this process.
        yaml_flag: A setting of type Optional[str].
        prog: The name of the program in the help text.
        description: What the program does, for the help text. Line breaks are kept.

    Raises:
        UserError: A setting is unknown (the nearest is named), missing, of a wrong type or out of range, or the file
            cannot be read.
    """
    settings = _settings(cls)
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        _print(explain(cls, prog=prog, description=description or "", yaml_flag=yaml_flag))
        sys.exit(0)

    flags = _read_flags(argv, settings)
    values: dict[str, Any] = {}
    path = flags.get(yaml_flag, settings[yaml_flag].default) if yaml_flag is not None else None
    if path is not None:
        content = read_yaml(path, f"--{yaml_flag}")
        ignored = {key: setting for key, setting in settings.items() if key != yaml_flag}
        values = _read_mapping(cls, ignored, {} if content is None else content, plain(path), partial=True)
    values.update(flags)
    for key, setting in settings.items():
        if values.get(setting.name, setting.default) is REQUIRED:
            raise UserError(f"--{key} is missing: give {_wanted(setting)} ({setting.rules['help']})")
    return cls(**values)


def split_flags(cls: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the flags of a command line that `cls` declares, with their values, and all other words."""
    names = _flag_names(_settings(cls))
    own: list[str] = []
    rest: list[str] = []
    words = rest
    for word in argv:
        if word.startswith("--") or word == "-h":
            words = own if word in ("-h", "--help") or _flag_name(word) in names else rest
        words.append(word)
    return own, rest


def read_mapping(
    cls: type, content: Any, source: str, prefix: str = "", ignore_unknown: bool = False
) -> dict[str, Any]:
    """Returns the values that a mapping from YAML or JSON gives, checked against the declarations of `cls`.

    Args:
        cls: A dataclass of settings. A field whose type is such a class is a section, and read in the same way.
        content: The mapping.
        source: Names the file in errors.
        prefix: Stands before the names in errors, such as "model.params.".
        ignore_unknown: Whether names that are not declared are passed over.

    Returns:
        Field name -> value, in the order of declaration, of the settings that are there. Sections are such mappings.

    Raises:
        UserError: A setting is unknown (the nearest is named), missing, of a wrong type or out of range.
    """
    return _read_mapping(cls, _settings(cls), content, source, prefix, ignore_unknown)


def check_values(settings: DataclassInstance, prefix: str = "") -> None:
    """Checks the values of settings that were made in Python as those from files and flags.

    Tuples become lists, paths become texts where the setting is a text, and NumPy's numbers become Python's. `prefix`
    stands before the names in errors. Paths are not expanded.

    Raises:
        UserError: A value is missing, of a wrong type or out of range.
    """
    for setting in _settings(type(settings)).values():
        given, where = getattr(settings, setting.name), f"{prefix}{setting.name}"
        if given is REQUIRED:
            raise UserError(f"{where} is missing: give {_wanted(setting)}")
        value = _convert(_plain_python(given), setting.hint, where)
        _check_range(value, setting, where)
        value = _as_paths(value, setting)
        if value is not given:
            object.__setattr__(settings, setting.name, value)  # also where the dataclass is frozen


def save_settings(
    settings: DataclassInstance, path: str | Path, header: str = "", leave_out: Sequence[str] = ()
) -> None:
    """Writes settings as a YAML file that `read_settings` reads back.

    Args:
        settings: A dataclass of settings.
        path: The file to write.
        header: A comment for its beginning.
        leave_out: Settings that become comments. The flag that names the YAML file must be one of them.
    """
    values = dataclasses.asdict(settings)
    lines = header.splitlines()
    for name in leave_out:
        lines += write_yaml({name: values.pop(name)}).splitlines()
    text = "".join(f"# {line}\n" for line in lines) + write_yaml(values)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def explain(
    cls: type, *, prog: str = "", description: str = "", yaml_flag: str | None = None, width: int | None = None
) -> str:
    """Returns the help text: every setting that has one, by group, with its type, choices, range and default."""
    width = width or max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"usage: python {prog} [--setting value ...]"] if prog else []
    if description:
        lines += ["", *([description.rstrip()] if "\n" in description else textwrap.wrap(description, width))]
    groups: dict[str, dict[str, _Setting]] = {}
    for key, setting in _settings(cls).items():
        if setting.rules["help"]:
            groups.setdefault(setting.rules["group"], {})[key] = setting
    for group, members in groups.items():
        lines += ["", f"{group}:"]
        for key, setting in members.items():
            limits = _limits(setting)
            text = f"{setting.rules['help']}{f' ({limits})' if limits else ''} [{_show(setting.default)}]"
            names = ", ".join(f"--{name}" for name in (key, *setting.rules["aliases"]))
            names = f"[{names}]" if setting.rules["positional"] else names
            kind = _type_name(setting.hint)
            lines.append(f"  {names} <{kind.replace('text', 'path') if setting.rules['path'] else kind}>")
            indent = "      "
            lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    order = " A flag wins over the YAML file, the YAML file over the default." if yaml_flag else ""
    lines += ["", f"In brackets: the default.{order}"]
    return "\n".join(lines).lstrip("\n")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # read in part, as by `| head`; without this, Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns the known name most similar to `name`, for error messages."""
    return difflib.get_close_matches(name[:LONGEST_NAME], list(known), n=1, cutoff=0.0)[0]


@cache
def _settings(cls: type[DataclassInstance]) -> dict[str, _Setting]:
    """Returns the declared settings by their names in files and flags."""
    hints = typing.get_type_hints(cls)
    return {
        field.metadata["key"] or field.name: _Setting(field.name, default_of(field), hints[field.name], field.metadata)
        for field in dataclasses.fields(cls)
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def _flag_names(settings: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """Returns the settings by all names that they have as flags."""
    return {name: setting for key, setting in settings.items() for name in (key, *setting.rules["aliases"])}


def _flag_name(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_")


def _read_flags(argv: Sequence[str], settings: Mapping[str, _Setting]) -> dict[str, Any]:
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
            limit = len(argv) if _list_item(setting.hint) else position + 1
            while position < min(limit, len(argv)) and not argv[position].startswith("--"):
                words.append(argv[position])
                position += 1
        values[setting.name] = _accept(_from_words(words, setting, where), setting, where)
    return values


def _from_words(words: list[str], setting: _Setting, where: str) -> Any:
    hint = setting.hint
    if not words:
        if bool in _kinds(hint):
            return True
        raise UserError(f"{where} needs a value: {_type_name(hint)}")
    item = _list_item(hint)
    if item is None:
        return _from_word(words[0], hint, where)
    if len(words) == 1 and words[0].lower() in _NONE and type(None) in _kinds(hint):
        return None
    if str not in _kinds(item):  # also as "0.9,0.98" or "[0.9, 0.98]"; texts may hold commas themselves
        words = [word for word in re.split(r"[\s,\[\]()]+", " ".join(words)) if word]
    return [_from_word(word, item, where) for word in words]


def _from_word(word: str, hint: Any, where: str) -> Any:
    kinds = _kinds(hint)
    if type(None) in kinds and word.lower() in _NONE:
        return None
    # 1 and 0 are truth values only where no number is wanted.
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
    raise UserError(f"{where}: {_show(word)} is not {_wanted_type(hint)}")


# ---- YAML and JSON ---------------------------------------------------------------------------------------------------


def _read_mapping(
    cls: type,
    settings: Mapping[str, _Setting],
    content: Any,
    source: str,
    prefix: str = "",
    ignore_unknown: bool = False,
    partial: bool = False,
) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        place = f"{source}: {prefix[:-1]}" if prefix else source  # without the last dot
        raise UserError(f"{place} must hold lines of `setting: value`, not a value of type {type(content).__name__}")
    ignored = getattr(cls, "IGNORED", ())
    for key in content:
        if not ignore_unknown and key not in settings and key not in ignored:
            near = nearest(str(key), (*settings, *ignored))
            raise UserError(f'{source}: unknown setting "{prefix}{plain(key, 100)}": did you mean "{near}"?')
    values = {}
    for key, setting in settings.items():
        where = f"{source}: {prefix}{key}"
        if key not in content:
            if setting.default is REQUIRED and not partial:
                raise UserError(f"{where} is missing: give {_wanted(setting)}")
        elif dataclasses.is_dataclass(setting.hint):
            section = typing.cast(type, setting.hint)
            values[setting.name] = _read_mapping(section, _settings(section), content[key], source, f"{prefix}{key}.")
        else:
            value = content[key]
            if setting.rules["zero_one"] and type(value) is int and value in (0, 1):
                value = bool(value)
            values[setting.name] = _accept(_convert(value, setting.hint, where), setting, where)
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Returns a value of YAML, JSON or Python as the type that is wanted. Texts are not taken for numbers."""
    kinds = _kinds(hint)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in _NONE)):
        return None
    item, entry = _list_item(hint), _dict_entry(hint)
    if item is not None and isinstance(value, list):
        return [_convert(element, item, where) for element in value]
    if entry is not None and isinstance(value, dict):
        return {str(name): _convert(element, entry, f"{where}: {plain(name, 60)}") for name, element in value.items()}
    if item is None and entry is None:
        # The exact type: a bool is an int to Python, not to a person.
        if type(value) in kinds and (type(value) is not float or math.isfinite(value)):
            return value
        if type(value) is int and float in kinds and abs(value) <= sys.float_info.max:
            return float(value)
        if isinstance(value, str) and _reads_unquoted(value, hint):
            # YAML has no numbers with a zero before them: some read them as octal.
            zeros = ", and zeros at its beginning" if re.match(r"[-+]?0\d", value) else ""
            raise UserError(
                f"{where}: {_show(value)} is a text, not {_wanted_type(hint)}: leave the quotes away{zeros}"
            )
        if str in kinds and not isinstance(value, (list, dict)):
            raise UserError(f"{where}: {_show(value)} is read as a {type(value).__name__}; put the text in quotes")
    raise UserError(f"{where}: {_show(value)} is not {_wanted_type(hint)}")


def _reads_unquoted(text: str, hint: Any) -> bool:
    try:
        _from_word(text, hint, "")
    except UserError:
        return False
    return True


def _plain_python(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_python(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


# ---- types and ranges ------------------------------------------------------------------------------------------------


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a type hint allows. Paths are given as texts."""
    union = typing.get_origin(hint) in (Union, getattr(types, "UnionType", Union))
    return tuple(str if kind is Path else kind for kind in (typing.get_args(hint) if union else (hint,)))


def _list_item(hint: Any) -> Any:
    return next((typing.get_args(kind)[0] for kind in _kinds(hint) if typing.get_origin(kind) is list), None)


def _dict_entry(hint: Any) -> Any:
    return next((typing.get_args(kind)[1] for kind in _kinds(hint) if typing.get_origin(kind) is dict), None)


def _wanted(setting: _Setting) -> str:
    limits = _limits(setting)
    kind = _wanted_type(setting.hint)
    return f"{kind.replace('a text', 'a path') if setting.rules['path'] else kind}{f', {limits}' if limits else ''}"


def _wanted_type(hint: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}
    texts = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is list:
            texts.append(f"a list, each {_wanted_type(_list_item(kind))}")
        elif typing.get_origin(kind) is dict:
            texts.append(f"a mapping from names, each to {_wanted_type(_dict_entry(kind))}")
        else:
            texts.append(names.get(kind, "a section"))
    return " or ".join(texts)


def _type_name(hint: Any) -> str:
    names = {bool: "True|False", int: "int", float: "float", str: "text", type(None): "None"}
    return "|".join(f"{_type_name(_list_item(kind))} ..." if _list_item(kind) else names[kind] for kind in _kinds(hint))


def _limits(setting: _Setting) -> str:
    rules, texts = setting.rules, []
    if rules["choices"]:
        texts.append("one of " + ", ".join(_show(choice) for choice in rules["choices"]))
    names = (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
    texts += [f"{name} {rules[rule]}" for rule, name in names if rules[rule] is not None]
    if rules["length"]:
        texts.append(f"{_wanted_length(rules['length'])} values")
    return ", ".join(texts)


def _wanted_length(length: int | tuple[int, int]) -> str:
    return str(length) if isinstance(length, int) else f"{length[0]} to {length[1]:,}"


def _accept(value: Any, setting: _Setting, where: str) -> Any:
    """Returns a value from a file or a flag with its paths expanded. Raises UserError where it is out of range."""
    if setting.rules["path"]:
        if isinstance(value, list):
            value = [_expand(entry, setting, where) for entry in value]
        else:
            value = _expand(value, setting, where)
    _check_range(value, setting, where)
    return _as_paths(value, setting)


def _expand(value: Any, setting: _Setting, where: str) -> Any:
    if not isinstance(value, str):  # None, or True where a setting is a path or a truth value
        return value
    path = expanded(value)
    if not path:
        raise UserError(f"{where}: {_show(value)} is no path: give one, or leave the setting out")
    return str(under_root(path)) if setting.rules["project"] else path


def _as_paths(value: Any, setting: _Setting) -> Any:
    """Returns texts as Path where the type is Path."""
    kinds = typing.get_args(setting.hint) or (setting.hint,)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    return value


def _check_range(value: Any, setting: _Setting, where: str) -> None:
    rules = setting.rules
    choices = rules["choices"]
    for entry in _entries(value):
        wrong, note = bool(choices) and entry not in choices, ""
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            wrong = wrong or _is_outside(entry, rules)
            if isinstance(entry, float) and not wrong:
                rounded = _in_fp32(entry)
                if math.isinf(rounded):
                    raise UserError(f"{where}: {entry} is not allowed: fp32, which is computed with, ends at 3.4e38")
                if rounded in (rules["above"], rules["below"]):
                    wrong, note = True, f" (in fp32, which is computed with, it is {rounded})"
        if wrong:
            similar = difflib.get_close_matches(str(entry)[:LONGEST_NAME], map(str, choices or ()), n=1)
            if similar:
                note = f'; did you mean "{similar[0]}"?'
            raise UserError(f"{where}: {_show(entry)} is not allowed: {_limits(setting)}{note}")
    if rules["length"] and isinstance(value, (list, dict)):
        length = rules["length"]
        least, most = (length, length) if isinstance(length, int) else length
        if not least <= len(value) <= most:
            raise UserError(f"{where}: {len(value):,} values given, wanted {_wanted_length(length)}")


def _entries(value: Any) -> Iterator[Any]:
    """Yields the entries of a list or mapping, or the value itself, without None."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return (entry for entry in entries if entry is not None)


def _is_outside(number: float, rules: Mapping[str, Any]) -> bool:
    low, high, above, below = (rules[rule] for rule in ("low", "high", "above", "below"))
    return (
        (low is not None and number < low)
        or (high is not None and number > high)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    )


def _in_fp32(number: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def _show(value: Any) -> str:
    return f'"{plain(value)}"' if isinstance(value, str) else plain(value)
