"""Safe reading of untrusted YAML, JSON and TOML, bounded in size, and the writing of YAML and JSON.

The arguments `name` and `way` are those of ldm.files.inputs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Callable

import yaml

from ldm.errors import UserError, plain
from ldm.files.inputs import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 16 << 20  # of a JSON file
MAX_TOML_BYTES = 1 << 20
MAX_YAML_BYTES = 256 << 10  # PyYAML reads some 10,000 words per second
MAX_ENTRIES = 1_000_000  # of a YAML, with aliases expanded; 32 characters of text count as one entry
MAX_DIGITS = 1000  # of an integer
MAX_DEPTH = 100  # of nested mappings and lists in a YAML

# What PyYAML and json raise for malformed text: besides their own errors, `!!int x` raises ValueError, `!!bool x`
# KeyError, and 100,000 brackets RecursionError.
_MALFORMED = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

_MERGE, _VALUE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "value", "str"))

# Characters that no text file can hold. \udc80 to \udcff are allowed: Python uses them for paths that are not UTF-8.
_INVALID = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 with fewer surprises.

    1e-4 is a number (YAML 1.1 requires 1.0e-4). Dates, 1:30 (YAML 1.1: 90) and 010 (YAML 1.1: 8) are texts. A repeated
    key is an error.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flattened: set[yaml.Node] = set()
        self._merged_entries = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except _MALFORMED as error:
            if isinstance(error, RecursionError) or not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise _syntax_error(node, f'"{plain(node.value, 60)}" is not a valid !!{plain(kind, 20)}') from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(self.construct_scalar(node)) > MAX_DIGITS:
            raise _syntax_error(node, f"a number of more than {MAX_DIGITS} digits")
        return super().construct_yaml_int(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings that `<<` names into `node`, each key once.

        PyYAML copies repeated keys, and the copies double with every level.
        """
        if node in self._flattened:
            return
        self._flattened.add(node)
        own: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                if key.tag == _VALUE:  # a key `=` is a text
                    key.tag = _TEXT
                if _key(key) in own:
                    raise _syntax_error(key, f'"{plain(_key(key), 60)}" is given twice')
                own[_key(key)] = key, value
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise _syntax_error(value, "<< must name a mapping, or a list of mappings")
                self.flatten_mapping(source)
                self._merged_entries += len(source.value)
                if self._merged_entries > MAX_ENTRIES:
                    raise _syntax_error(value, f"more than {MAX_ENTRIES:,} entries are merged (<<)")
                for entry in source.value:
                    merged.setdefault(_key(entry[0]), entry)
        node.value = list({**merged, **own}.values())


def _key(node: yaml.Node) -> object:
    """Return what identifies a key: its text, or the node itself for a list or mapping, which PyYAML rejects later."""
    return node.value if isinstance(node, yaml.ScalarNode) else node


def _syntax_error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# All other forms of numbers are texts. The patterns match in linear time, without backtracking.
_DIGITS, _EXPONENT = r"[0-9][0-9_]*", r"[eE][-+]?[0-9]+"
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    "tag:yaml.org,2002:float": rf"[-+]?(({_DIGITS}\.[0-9_]*|\.{_DIGITS})({_EXPONENT})?|{_DIGITS}{_EXPONENT})$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {**yaml.SafeLoader.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def read_yaml(path: str | os.PathLike, name: str = "", way: str = "give the path of a YAML file") -> Any:
    """Return the content of a YAML file.

    Raises:
        UserError: The file cannot be read (see ldm.files.inputs), is not valid YAML (with the line), or exceeds
            MAX_YAML_BYTES, MAX_ENTRIES or MAX_DEPTH.
    """
    text = read_text(path, name, way, MAX_YAML_BYTES)
    where = f"{name} {plain(os.fspath(path))}".strip()
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _MALFORMED as error:
        raise UserError(f"{where}{_line(error, text)} is not valid YAML: {_problem(error)}") from None
    _check_entries(content, where)
    return content


def write_yaml(content: Any) -> str:
    """Return the YAML text that `read_yaml` reads as `content`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_json(path: str | os.PathLike, name: str = "", way: str = "give the path of a JSON file") -> Any:
    """Return the content of a JSON file. Arguments and errors are those of `read_yaml`."""
    text = read_text(path, name, way, MAX_BYTES)
    return parse_json(text, f"{name} {plain(os.fspath(path))}".strip())


def parse_json(text: str, where: str, lines: bool = True, make: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the content of a JSON text. Raises UserError, which begins with `where`, if it is not valid JSON.

    Args:
        text: The JSON.
        where: Names the file.
        lines: Whether the error names the line, which a text of one line has no use for.
        make: Called with every object, the innermost first. What it returns takes the object's place.
    """
    hook = _unique_keys if make is None else lambda pairs: make(_unique_keys(pairs))
    try:
        return json.loads(text, object_pairs_hook=hook, parse_int=_integer)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if lines else ""
        raise UserError(f"{where}{line} is not valid JSON: {error.msg}") from None
    except _MALFORMED as error:
        raise UserError(f"{where} is not valid JSON: {_problem(error)}") from None


def read_toml(path: str | os.PathLike, name: str = "", way: str = "give the path of a TOML file") -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        UserError: The file cannot be read (see ldm.files.inputs), has more than MAX_TOML_BYTES, or is not valid TOML.
    """
    text = read_text(path, name, way, MAX_TOML_BYTES)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, OverflowError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else plain(error, 120)
        raise UserError(f"{f'{name} {plain(os.fspath(path))}'.strip()} is not valid TOML: {problem}") from None


def json_text(content: Any, indent: int | None = None) -> str:
    """Return `content` as JSON without escaping letters. Reading it restores file names that are not UTF-8, too."""
    return valid_text(json.dumps(content, ensure_ascii=False, indent=indent))


def valid_text(text: str) -> str:
    """Return `text` with every character that UTF-8 cannot encode (bytes of file names) replaced by its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f'"{plain(name, 60)}" is given twice')
        content[name] = value
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _line(error: Exception, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f" line {mark.line + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f" line {text.count(chr(10), 0, error.position) + 1}"
    return ""


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
    return plain(problem) or type(error).__name__


def _check_entries(content: Any, where: str) -> None:
    """Raise UserError for more than MAX_ENTRIES or MAX_DEPTH with aliases expanded, and for invalid characters."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(value: Any) -> tuple[int, int]:
        """Return the number of entries and the depth."""
        if not isinstance(value, (dict, list, tuple, set, str, bytes)):
            return 1, 0
        if id(value) not in sizes:
            if isinstance(value, str) and (match := _INVALID.search(value)):
                character = ascii(match.group())[1:-1]
                raise UserError(f"{where}: {character} in a text is not a valid character: remove it")
            if isinstance(value, (str, bytes)):
                sizes[id(value)] = 1 + len(value) // 32, 0
            else:
                sizes[id(value)] = MAX_ENTRIES, 0  # counts if the value contains itself
                inner = [measure(entry) for entry in ([*value, *value.values()] if isinstance(value, dict) else value)]
                sizes[id(value)] = 1 + sum(n for n, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        return sizes[id(value)]

    entries, depth = measure(content)
    if entries > MAX_ENTRIES or depth > MAX_DEPTH:
        most = f"{MAX_ENTRIES:,} entries" if entries > MAX_ENTRIES else f"{MAX_DEPTH} levels"
        raise UserError(f"{where}: with its aliases (&, *) expanded, it has more than {most}: write it without aliases")
