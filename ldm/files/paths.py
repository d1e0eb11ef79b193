"""Paths from settings: expansion, lookup below the project's folder, and LoRA paths with strengths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError, plain, system_reason
from ldm.files.inputs import is_there

# The folder with configs/, models/nano/ and the scripts: ldm/bundled in an installation (see setup.py), else the
# repository.
_BUNDLED = Path(__file__).resolve().parents[1] / "bundled"
ROOT = _BUNDLED if _BUNDLED.is_dir() else _BUNDLED.parents[1]

MAX_STRENGTH = 1000  # largest absolute strength of a LoRA


def expanded(text: str) -> str:
    """Expand `~` and `~name` at the beginning of a path, and `$NAME` and `${NAME}` anywhere, as a shell does.

    Unknown users and variables stay as they are. This serves YAML files and flags such as `--x=~/y`, which no shell
    expands.
    """
    return os.path.expanduser(os.path.expandvars(text))


def under_root(path: str | Path) -> Path:
    """Return `path` if it exists or is not below ROOT either, else the path below ROOT.

    So `configs/nano.yaml` is found from any working directory, and the user's own file of that name takes precedence.
    """
    given, bundled = Path(path), ROOT / path
    return bundled if not is_there(given) and is_there(bundled) else given


def path_and_strengths(text: str, name: str) -> tuple[Path, tuple[float, ...]]:
    """Split `path`, `path:strength` or `path:strength:strength` into the path and its strengths.

    A file whose name contains colons is found by its whole name first.

    `~` and variables are expanded. `name` is that of the setting, for errors.

    Raises:
        UserError: The path does not exist, or a strength is not a number within MAX_STRENGTH.
    """
    text = expanded(text)
    for count in (0, 1, 2):
        path, *words = text.rsplit(":", count)
        if path and is_there(path, name):
            return Path(path), tuple(_strength(word, text, name) for word in words)
    path = re.sub(r"(?::[-+.\w]*){1,2}$", "", text) or text  # the error names the file without strengths
    raise UserError(f"{name} {plain(path)} does not exist: check the path")


def _strength(word: str, text: str, name: str) -> float:
    try:
        strength = float(word)
    except ValueError:
        strength = float("nan")
    if not abs(strength) <= MAX_STRENGTH:
        raise UserError(
            f'{name} "{plain(text)}": the strength "{plain(word, 40)}" after the colon is not a number from '
            f"-{MAX_STRENGTH} to {MAX_STRENGTH}, such as 0.7"
        )
    return strength


def check_free(path: str | Path, empty_folder: bool = False) -> None:
    """Raise UserError if `path` exists, since tools never overwrite. An empty folder may exist with `empty_folder`."""
    try:
        is_free = not os.path.lexists(path) or (empty_folder and not os.listdir(path))
    except OSError:  # a file, or a folder without read permission
        is_free = False
    if not is_free:
        raise UserError(f"{plain(path)} exists: choose another name, or remove it first")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert an OSError in the block, such as a full disk, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{plain(path)} cannot be written: {system_reason(error)}") from error
