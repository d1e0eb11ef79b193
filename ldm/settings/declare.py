"""Declarations of settings: each stands once, with its rules and with everything that depends on it.

    @dataclass
    class Settings:
        epochs: int = setting(10, "passes over the data", group="length", low=1, high=MAX_COUNT)
        precision: str = setting("auto", "type to compute in", choices=("auto", "fp16", "fp32"), resume="fixed")

`ldm.settings.read` checks values against these declarations, whether they come from flags, YAML, JSON or Python.
A class attribute `IGNORED` holds the names that a file may contain although nothing reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# Upper bounds that several settings share. A larger value is a typing error and would fail late.
MAX_COUNT = 1_000_000_000  # steps, epochs, files
MAX_BATCH = 10_000
MAX_RANK = 4096
MAX_SEED = 2**32 - 1
MAX_NETWORK_BATCH = 4096  # rows in a call of a network


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()  # the default of a setting that must be given


def setting(
    default: Any,
    help: str = "",
    *,
    group: str | None = None,
    key: str | None = None,
    aliases: tuple[str, ...] = (),
    positional: bool = False,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: int | tuple[int, int] | None = None,
    zero_one: bool = False,
    path: bool = False,
    project: bool = False,
    resume: str | None = None,
    graph_key: bool = False,
    needs: str | None = None,
    shared_with_diffusers: bool = False,
    set_by_comparison: bool = False,
    not_in_diffusers: str | None = None,
    shown: bool = True,
) -> Any:
    """Return a dataclass field that carries the rules of one setting in its metadata.

    Args:
        default: The value where none is given, or REQUIRED. It is neither checked nor expanded.
        help: What `-h` says about it. Without a text, `-h` does not list it.
        group: The heading in `-h`, from this setting to the next one with a group.
        key: Its name in files and flags where that is not the field's name.
        aliases: Further names, as a flag and in files.
        positional: Whether a list also takes the words of a command line that belong to no flag.
        choices: The allowed values.
        low, high: The range, ends included. For a list, they hold for each entry.
        above, below: The range, ends excluded.
        length: The number of entries of a list or mapping, or the smallest and the largest number.
        zero_one: Whether 0 and 1 in a file stand for False and True.
        path: Whether texts are paths, in which `~` and `$NAME` are expanded.
        project: Whether a path that does not exist is looked up in the project's folder too, so that scripts run from
            anywhere.
        resume: How a resumed training treats a changed value: "fixed" refuses it, because the run would end with
            other weights than an uninterrupted one; "followed" warns and takes it; None takes it.
        graph_key: Whether the compiled training step depends on it, so that it is part of the graph cache's key.
        needs: The setting without which this one has no effect.
        shared_with_diffusers: Whether tools/eval/compare_diffusers.py gives its value to diffusers' training as well.
        set_by_comparison: Whether that tool sets it itself, so that it cannot be given there.
        shown: Whether `repr` of an instance shows it. A training state holds a hash of the `repr` of a LoRA's layers.
        not_in_diffusers: Why diffusers' LoRA training has no counterpart, so that the comparison needs the default.
    """
    metadata = {name: value for name, value in locals().items() if name not in ("default", "shown")}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, repr=shown, metadata=metadata)


def input_path(help: str, **rules: Any) -> Any:
    """Return the setting of a path to read, which may be in the project's folder. The default is None."""
    return setting(None, help, path=True, project=True, **rules)


def names_of(cls: type, **rules: Any) -> tuple[str, ...]:
    """Return the names of the settings declared with these rules, such as `resume="fixed"` or `graph_key=True`."""
    return tuple(
        field.name
        for field in dataclasses.fields(cls)
        if all(field.metadata[name] == value for name, value in rules.items())
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field, a new list or mapping each time."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
