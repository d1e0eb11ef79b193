"""Paths from settings: where they are looked for, and whether they can be written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def under_root(path: str | Path) -> Path:
    """A path as given, or where that does not exist, under the project's folder: scripts run from anywhere."""
    given = Path(path)
    found = ROOT / given
    return found if not given.exists() and found.exists() else given


def weighted_path(text: str, name: str) -> tuple[Path, tuple[float, ...]]:
    """`path`, `path:weight` or `path:weight:weight` -> the path and the weights given; what exists under the whole of
    `text`, or more of it, wins.

    name: of the setting, for errors. Raises UserError for a path that is not there and for weights that are no numbers.
    """
    for count in (0, 1, 2):
        path, *words = text.rsplit(":", count)
        if path and os.path.exists(path):
            return Path(path), tuple(_weight(word, text, name) for word in words)
    path = text.rsplit(":", 1)[0] if ":" in text[1:] else text
    raise UserError(f"{name} {path} does not exist: check the path")


def _weight(word: str, text: str, name: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        raise UserError(f'{name} "{text}": "{word}" after the colon is no weight such as 0.7') from None
    if not math.isfinite(weight):
        raise UserError(f'{name} "{text}": the weight is not a finite number')
    return weight


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError, which calls the folder `name`, unless `folder` can be written, or can be made."""
    for place in (folder, *folder.absolute().parents):
        if not place.exists():
            continue
        if not place.is_dir():
            raise UserError(f"{name}: {folder} cannot be a folder, as {place} is a file; give another path")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{name}: {folder} cannot be written, there is no permission in {place}; give another path")
        return


def check_free(path: str | Path, empty_folder: bool = False) -> None:
    """Raise UserError where `path` is there already: what a tool writes never takes the place of something else.

    empty_folder: let an empty folder be in nobody's way.
    """
    if os.path.lexists(path) and not (empty_folder and _is_empty_folder(Path(path))):
        raise UserError(f"{path} exists: choose another name, or remove it first")


def _is_empty_folder(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except OSError:  # a file, or a folder that may not be read
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses within the block (a full disk, a missing permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free space there, or choose another output_path"
        ) from error
