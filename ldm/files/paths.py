"""Paths from settings: where they are looked for, what is short for what, and whether they are free."""

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
MOST_STRENGTH = 1000  # of a LoRA, and its negative the least


def expanded(text: str) -> str:
    """A path as a shell would have it: `~` and `~name` at its beginning, `$NAME` and `${NAME}` anywhere.

    What names no user and no variable stays as it is: a file may be called so. For YAML files and flags such as
    `--x=~/y`, which no shell expands.
    """
    return os.path.expanduser(os.path.expandvars(text))


def user_path(text: str) -> Path:
    """`expanded` as a Path: the type of command-line flags that are paths."""
    return Path(expanded(text))


def under_root(path: str | Path) -> Path:
    """A path as given, or where that does not exist, under the project's folder: scripts run from anywhere."""
    given = Path(path)
    found = ROOT / given
    return found if not is_there(given) and is_there(found) else given


def weighted_path(text: str, name: str) -> tuple[Path, tuple[float, ...]]:
    """`path`, `path:weight` or `path:weight:weight` -> the path and the weights given; what exists under the whole of
    `text`, or more of it, wins.

    name: of the setting, for errors. Raises UserError for a path that is not there and for weights that are no numbers.
    """
    text = expanded(text)
    for count in (0, 1, 2):
        path, *words = text.rsplit(":", count)
        if path and is_there(path, name):
            return Path(path), tuple(_weight(word, text, name) for word in words)
    path = re.sub(r"(?::[-+.\w]*){1,2}$", "", text) or text  # an error names the file, without its weights
    raise UserError(f"{name} {plain(path)} does not exist: check the path")


def _weight(word: str, text: str, name: str) -> float:
    text, given = plain(text), plain(word, 40)
    try:
        weight = float(word)
    except ValueError:
        raise UserError(f'{name} "{text}": "{given}" after the colon is no weight such as 0.7') from None
    if not abs(weight) <= MOST_STRENGTH:
        raise UserError(f'{name} "{text}": the weight is not a finite number from -{MOST_STRENGTH} to {MOST_STRENGTH}')
    return weight


def check_free(path: str | Path, empty_folder: bool = False) -> None:
    """Raise UserError where `path` is there already: what a tool writes never takes the place of something else.

    empty_folder: let an empty folder be in nobody's way.
    """
    if os.path.lexists(path) and not (empty_folder and _is_empty_folder(Path(path))):
        raise UserError(f"{plain(path)} exists: choose another name, or remove it first")


def _is_empty_folder(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except OSError:  # a file, or a folder that may not be read
        return False


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the system refuses within the block (a full disk, a missing permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{plain(path)} cannot be written: {system_reason(error)}") from error
