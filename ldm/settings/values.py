"""Checks of one value against the declaration of its setting: its type, its range, and the words of errors."""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import math
import numbers
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from ldm.errors import UserError, plain
from ldm.files.paths import expanded, under_root
from ldm.settings.declare import default_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NONE_WORDS = ("none", "null")
LONGEST_NAME = 100  # characters: the time to compare names grows with their square
# The rules of a range: their words, and how a number breaks them.
_BOUNDS = {
    "low": ("at least", operator.lt),
    "above": ("above", operator.le),
    "high": ("at most", operator.gt),
    "below": ("below", operator.ge),
}


class Setting(NamedTuple):
    """A declared setting: the name and the default of its field, its type and its rules."""

    name: str
    default: Any
    hint: Any
    rules: Mapping[str, Any]


@cache
def settings_of(cls: type[DataclassInstance]) -> dict[str, Setting]:
    """Return the declared settings by their names in files and flags."""
    hints = typing.get_type_hints(cls)
    return {
        field.metadata["key"] or field.name: Setting(field.name, default_of(field), hints[field.name], field.metadata)
        for field in dataclasses.fields(cls)
    }


def accept(value: Any, setting: Setting, where: str) -> Any:
    """Return a value from a file or a flag with its paths expanded. Raises UserError where it is out of range."""
    if setting.rules["path"]:
        many = isinstance(value, list)
        value = [_expand(entry, setting, where) for entry in value] if many else _expand(value, setting, where)
    check_range(value, setting, where)
    return as_paths(value, setting)


def check_range(value: Any, setting: Setting, where: str) -> None:
    """Check choices, range and length, of every entry of a list or mapping. Raises UserError."""
    rules, choices = setting.rules, setting.rules["choices"]
    for entry in _entries(value):
        wrong, note = bool(choices) and entry not in choices, ""
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            wrong = wrong or _is_outside(entry, rules)
            if isinstance(entry, float) and not wrong:
                rounded = ctypes.c_float(entry).value
                if math.isinf(rounded):
                    raise UserError(f"{where}: {entry} is not allowed: fp32, which is computed with, ends at 3.4e38")
                if rounded in (rules["above"], rules["below"]):
                    wrong, note = True, f" (in fp32, which is computed with, it is {rounded})"
        if wrong:
            similar = difflib.get_close_matches(str(entry)[:LONGEST_NAME], map(str, choices or ()), n=1)
            if similar:
                note = f'; did you mean "{similar[0]}"?'
            raise UserError(f"{where}: {show(entry)} is not allowed: {limits_of(setting)}{note}")
    length = rules["length"]
    if length and isinstance(value, (list, dict)):
        least, most = (length, length) if isinstance(length, int) else length
        if not least <= len(value) <= most:
            raise UserError(f"{where}: {len(value):,} values given, wanted {_wanted_length(length)}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML, JSON or Python as the type that is wanted. Texts are not taken for numbers."""
    kinds = kinds_of(hint)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in NONE_WORDS)):
        return None
    item, entry = list_item(hint), _dict_entry(hint)
    if item is not None and str in kinds and isinstance(value, str):  # a text or a list of texts
        return value
    if item is not None and isinstance(value, list):
        return [convert(element, item, where) for element in value]
    if entry is not None and isinstance(value, dict):
        return {str(name): convert(element, entry, f"{where}: {plain(name, 60)}") for name, element in value.items()}
    if item is None and entry is None:
        # The exact type: a bool is an int to Python, not to a person.
        if type(value) in kinds and (type(value) is not float or math.isfinite(value)):
            return value
        if type(value) is int and float in kinds and abs(value) <= sys.float_info.max:
            return float(value)
        if type(value) is float and int in kinds and value.is_integer():  # 1000.0 and 1e3 in YAML
            return int(value)
        if isinstance(value, str) and reads_as(value, hint):
            # YAML has no numbers with a zero before them: some read them as octal.
            zeros = ", and zeros at its beginning" if re.match(r"[-+]?0\d", value) else ""
            raise UserError(f"{where}: {show(value)} is a text, not {_wanted_type(hint)}: leave the quotes away{zeros}")
        if str in kinds and not isinstance(value, (list, dict)):
            raise UserError(f"{where}: {show(value)} is read as a {type(value).__name__}; put the text in quotes")
    raise UserError(f"{where}: {show(value)} is not {_wanted_type(hint)}")


def from_word(word: str, hint: Any, where: str) -> Any:
    """Return a word of the command line as the type that is wanted. Raises UserError where it is none."""
    kinds = kinds_of(hint)
    if type(None) in kinds and word.lower() in NONE_WORDS:
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
    raise UserError(f"{where}: {show(word)} is not {_wanted_type(hint)}")


def plain_python(value: Any) -> Any:
    """Return tuples as lists, paths as texts and numbers of NumPy as those of Python."""
    if isinstance(value, tuple):
        return [plain_python(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def as_paths(value: Any, setting: Setting) -> Any:
    """Return texts as Path where the type is Path."""
    takes_path = Path in (typing.get_args(setting.hint) or (setting.hint,))
    return Path(value) if takes_path and isinstance(value, str) else value


def _expand(value: Any, setting: Setting, where: str) -> Any:
    if not isinstance(value, str):  # None, or True where a setting is a path or a truth value
        return value
    path = expanded(value)
    if not path:
        raise UserError(f"{where}: {show(value)} is no path: give one, or leave the setting out")
    return str(under_root(path)) if setting.rules["project"] else path


def reads_as(word: str, hint: Any) -> bool:
    """Return whether from_word accepts a word for this type."""
    try:
        from_word(word, hint, "")
    except UserError:
        return False
    return True


def _entries(value: Any) -> Iterator[Any]:
    """Yield the entries of a list or mapping, or the value itself, without None."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return (entry for entry in entries if entry is not None)


def _is_outside(number: float, rules: Mapping[str, Any]) -> bool:
    return any(rules[rule] is not None and breaks(number, rules[rule]) for rule, (_, breaks) in _BOUNDS.items())


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type hint allows. Paths are given as texts."""
    union = typing.get_origin(hint) in (Union, getattr(types, "UnionType", Union))
    return tuple(str if kind is Path else kind for kind in (typing.get_args(hint) if union else (hint,)))


def list_item(hint: Any) -> Any:
    """Return the type of the entries where the type is a list, else None."""
    return next((typing.get_args(kind)[0] for kind in kinds_of(hint) if typing.get_origin(kind) is list), None)


def _dict_entry(hint: Any) -> Any:
    return next((typing.get_args(kind)[1] for kind in kinds_of(hint) if typing.get_origin(kind) is dict), None)


def wanted(setting: Setting) -> str:
    """Return what a setting takes, for errors: "a number, above 0"."""
    limits = limits_of(setting)
    kind = _wanted_type(setting.hint)
    return f"{kind.replace('a text', 'a path') if setting.rules['path'] else kind}{f', {limits}' if limits else ''}"


def _wanted_type(hint: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}
    texts = []
    for kind in kinds_of(hint):
        if typing.get_origin(kind) is list:
            texts.append(f"a list, each {_wanted_type(list_item(kind))}")
        elif typing.get_origin(kind) is dict:
            texts.append(f"a mapping from names, each to {_wanted_type(_dict_entry(kind))}")
        else:
            texts.append(names.get(kind, "a section"))
    return " or ".join(texts)


def type_name(hint: Any) -> str:
    """Return a type for the help text: "int|None"."""
    names = {bool: "True|False", int: "int", float: "float", str: "text", type(None): "None"}
    return "|".join(f"{type_name(list_item(kind))} ..." if list_item(kind) else names[kind] for kind in kinds_of(hint))


def limits_of(setting: Setting) -> str:
    """Return the choices, the range and the length that are allowed: "at least 1, at most 10"."""
    rules, texts = setting.rules, []
    if rules["choices"]:
        texts.append("one of " + ", ".join(show(choice) for choice in rules["choices"]))
    texts += [f"{words} {rules[rule]}" for rule, (words, _) in _BOUNDS.items() if rules[rule] is not None]
    if rules["length"]:
        texts.append(f"{_wanted_length(rules['length'])} values")
    return ", ".join(texts)


def _wanted_length(length: int | tuple[int, int]) -> str:
    return str(length) if isinstance(length, int) else f"{length[0]} to {length[1]:,}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the known name most similar to `name`, for error messages."""
    return difflib.get_close_matches(name[:LONGEST_NAME], list(known), n=1, cutoff=0.0)[0]


def show(value: Any) -> str:
    """Return a value for a message, texts in quotes."""
    return f'"{plain(value)}"' if isinstance(value, str) else plain(value)
