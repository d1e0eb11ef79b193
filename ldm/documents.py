"""YAML and JSON from files that anybody may have written: nothing in them runs, and their size is bounded."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import yaml

from ldm.errors import UserError, plain
from ldm.files import read_text

MOST_BYTES = 16 << 20
MOST_ENTRIES = 1_000_000  # with what a YAML names twice (aliases) counted twice

# What the constructors of PyYAML and json raise for text that their scanners let through: `!!int x`, `!!bool x`, a
# number of 5,000 digits, a hundred thousand brackets.
_MALFORMED = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4), a date is a text, and a key given twice is an
    error."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a section as a key, which PyYAML refuses
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f'"{plain(key_node.value, 60)}" is given twice', key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | os.PathLike, name: str = "", way: str = "give the path of a YAML file") -> Any:
    """The content of a YAML file. Raises UserError for one that cannot be read (see ldm.files), is not YAML (with the
    line), or is larger than MOST_BYTES or MOST_ENTRIES.

    name: of the setting, for errors; way: what to do about a file that is not there.
    """
    text = read_text(path, name, way, MOST_BYTES)
    where = f"{name} {plain(os.fspath(path))}".strip()
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _MALFORMED as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {_problem(error)}") from None
    _check_entries(content, where)
    return content


def read_json(path: str | os.PathLike, name: str = "", way: str = "give the path of a JSON file") -> Any:
    """The content of a JSON file; raises as `read_yaml` does, and for a key given twice."""
    text = read_text(path, name, way, MOST_BYTES)
    return parse_json(text, f"{name} {plain(os.fspath(path))}".strip())


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text; `where` names it in errors. Raises UserError where it is none, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno} is not valid JSON: {error.msg}") from None
    except _MALFORMED as error:
        raise UserError(f"{where} is not valid JSON: {_problem(error)}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f'"{plain(twin, 60)}" is given twice')
    return content


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
    return plain(problem) or type(error).__name__


def _check_entries(content: Any, where: str) -> None:
    """Raise UserError where aliases make of a small file a large content: a message would print all of it."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, (dict, list, tuple, set)):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = MOST_ENTRIES  # of one that holds itself
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, inner))
        return sizes[id(value)]

    try:
        entries = size(content)
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from None
    if entries > MOST_ENTRIES:
        raise UserError(f"{where}: its aliases (&, *) stand for more than {MOST_ENTRIES:,} entries: write it without")
