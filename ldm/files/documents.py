"""YAML and JSON from files that anybody may have written: nothing in them runs, and their size is bounded."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import yaml

from ldm.errors import UserError, plain
from ldm.files.inputs import read_text

MOST_BYTES = 16 << 20  # of a JSON file
MOST_YAML_BYTES = 256 << 10  # PyYAML reads some tens of thousands of words a second
MOST_ENTRIES = 1_000_000  # aliases of a YAML counted as often as they stand, 32 characters of a text as one more
MOST_DIGITS = 1000  # of a whole number
MOST_DEPTH = 100  # of sections and lists in one another in a YAML

# What the constructors of PyYAML and json raise for text that their scanners let through: `!!int x`, `!!bool x`, a
# number of 5,000 digits, a hundred thousand brackets.
_MALFORMED = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

_MERGE, _VALUE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "value", "str"))

# Half of a UTF-16 pair, which no file can hold. \udc80 to \udcff are the bytes of a path that is not UTF-8.
_NO_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 with what people mean by it: 1e-4 is a number (YAML 1.1 wants 1.0e-4); dates, 1:30 (90 there) and
    010 (8 there) are texts; a key given twice is an error.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[yaml.Node] = set()
        self._merged = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self._depth += 1
        if self._depth > MOST_DEPTH:
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
            raise _refusal(node, f'"{plain(node.value, 60)}" is no !!{plain(kind, 20)}') from None

    def construct_yaml_int(self, node: yaml.Node) -> int:
        if len(self.construct_scalar(node)) > MOST_DIGITS:
            raise _refusal(node, f"a number of more than {MOST_DIGITS} digits")
        return super().construct_yaml_int(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the entries that `<<` names into `node`, each once: PyYAML's own copies double with every level."""
        if node in self._flat:
            return
        self._flat.add(node)
        own, merged = {}, {}
        for key, value in node.value:
            if key.tag != _MERGE:
                if key.tag == _VALUE:  # `=`
                    key.tag = _TEXT
                name = key.value if isinstance(key, yaml.ScalarNode) else key  # which PyYAML refuses later
                if name in own:
                    raise _refusal(key, f'"{plain(name, 60)}" is given twice')
                own[name] = key, value
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise _refusal(value, "<< must name a section, or a list of sections")
                self.flatten_mapping(source)
                self._merged += len(source.value)
                if self._merged > MOST_ENTRIES:
                    raise _refusal(value, f"more than {MOST_ENTRIES:,} entries are merged (<<)")
                for entry in source.value:
                    merged.setdefault(entry[0].value if isinstance(entry[0], yaml.ScalarNode) else entry[0], entry)
        node.value = list({**merged, **own}.values())


def _refusal(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# A number of another form is a text, which the setting then refuses. Each pattern reads a text once: no backtracking.
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
    """Writes what `_Loader` reads back: quotes stand around a text that either takes for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {**yaml.SafeLoader.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def read_yaml(path: str | os.PathLike, name: str = "", way: str = "give the path of a YAML file") -> Any:
    """The content of a YAML file. Raises UserError for one that cannot be read (see ldm.files.inputs), is not YAML
    (with the line), or is larger than MOST_YAML_BYTES or MOST_ENTRIES.

    name: of the setting, for errors; way: what to do about a file that is not there.
    """
    text = read_text(path, name, way, MOST_YAML_BYTES)
    where = f"{name} {plain(os.fspath(path))}".strip()
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _MALFORMED as error:
        raise UserError(f"{where}{_line(error, text)} is not valid YAML: {_problem(error)}") from None
    _check_entries(content, where)
    return content


def write_yaml(content: Any) -> str:
    """The text of a YAML file that `read_yaml` reads as `content`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_json(path: str | os.PathLike, name: str = "", way: str = "give the path of a JSON file") -> Any:
    """The content of a JSON file; raises as `read_yaml` does, and for a key given twice."""
    text = read_text(path, name, way, MOST_BYTES)
    return parse_json(text, f"{name} {plain(os.fspath(path))}".strip())


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text, which `where` names in errors. Raises UserError where it is none, or gives a key
    twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno} is not valid JSON: {error.msg}") from None
    except _MALFORMED as error:
        raise UserError(f"{where} is not valid JSON: {_problem(error)}") from None


def json_text(content: Any, indent: int | None = None) -> str:
    """Return `content` as JSON with letters unescaped. `json.loads` restores every text, also file names that are not
    UTF-8.
    """
    return valid_text(json.dumps(content, ensure_ascii=False, indent=indent))


def valid_text(text: str) -> str:
    """Return `text` with every character that UTF-8 cannot encode (bytes of file names) replaced by its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f'"{plain(name, 60)}" is given twice')
        content[name] = value
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, at most {MOST_DIGITS} are read")
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
    """Raise UserError where aliases make of a small file a large or deep content (a message would print all of it), and
    for texts that no file can hold.
    """
    sizes: dict[int, tuple[int, int]] = {}

    def measure(value: Any) -> tuple[int, int]:
        """(entries, depth)."""
        if not isinstance(value, (dict, list, tuple, set, str, bytes)):
            return 1, 0
        if id(value) in sizes:
            return sizes[id(value)]
        if isinstance(value, (str, bytes)):
            if isinstance(value, str) and (found := _NO_TEXT.search(value)):
                raise UserError(f"{where}: {ascii(found.group())[1:-1]} in a text is no character: take it out")
            sizes[id(value)] = 1 + len(value) // 32, 0
        else:
            sizes[id(value)] = MOST_ENTRIES, 0  # of one that holds itself
            inner = [measure(entry) for entry in ([*value, *value.values()] if isinstance(value, dict) else value)]
            sizes[id(value)] = (
                1 + sum(entries for entries, _ in inner),
                1 + max((depth for _, depth in inner), default=0),
            )
        return sizes[id(value)]

    entries, depth = measure(content)
    if entries > MOST_ENTRIES or depth > MOST_DEPTH:
        most = f"{MOST_ENTRIES:,} entries" if entries > MOST_ENTRIES else f"{MOST_DEPTH} levels"
        raise UserError(f"{where}: its aliases (&, *) stand for more than {most}: write it without")
