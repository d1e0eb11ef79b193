"""Settings, facts and durations as they stand on a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of

NOT_SET = "not set"


def defaults() -> dict[str, Any]:
    """Return the default of each setting of training."""
    return {name: setting.default for name, setting in settings_of(TrainSettings).items()}


def split_by_default(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of the settings that differ from the defaults, and of the others, in the order of `-h`.

    Settings that this version does not know come first among those that differ.
    """
    known = defaults()
    order = [name for name in settings if name not in known] + [name for name in known if name in settings]
    changed = [name for name in order if name not in known or not equal(settings[name], known[name])]
    return changed, [name for name in order if name not in changed]


def equal(a: Any, b: Any) -> bool:
    """Return whether two values of a setting are the same. True is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def shown(value: Any) -> str:
    """Return a value of a setting as in YAML; the user's home folder in a path is `~`."""
    if value is None:
        return NOT_SET
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(entry) for entry in value) if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items()) if value else "none"
    if isinstance(value, str):
        return without_home(value) if value else '""'
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def without_home(path: str) -> str:
    """Return a path with `~` for the user's home folder, which names the user."""
    home = os.path.expanduser("~").rstrip("/")
    return f"~{path[len(home) :]}" if len(home) > 1 and (path + "/").startswith(f"{home}/") else path


def duration(seconds: float) -> str:
    """Return a time for a person: "0.43 s", "12 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.3g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Return a number of bytes for a person: "9.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def counted(count: int, what: str, many: str = "") -> str:
    """Return a number with its noun: "1 image", "1,200 images"."""
    return f"{count:,} {what if count == 1 else many or what + 's'}"
