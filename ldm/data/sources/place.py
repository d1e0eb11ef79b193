"""What a path leads to: a file, or a folder with the names in it. Every layout's `detect` looks at this alone."""

from __future__ import annotations

import os
from typing import NamedTuple

from ldm.data.sources.names import list_names
from ldm.errors import UserError, plain
from ldm.files.inputs import check_file, is_folder, is_there


class Place(NamedTuple):
    """A path of a data set."""

    path: str
    is_file: bool
    files: frozenset[str]  # in the folder, without hidden ones
    folders: tuple[str, ...]  # in the folder, sorted

    @property
    def suffix(self) -> str:
        """The lower-case suffix of a file."""
        return os.path.splitext(self.path)[1].lower() if self.is_file else ""


def look(path: str | os.PathLike, name: str = "data_path") -> Place:
    """Return the place at a path. Raises UserError if there is none, or it cannot be read."""
    path = os.fspath(path)
    path = path.rstrip("/") or path
    if not is_there(path, name):
        raise UserError(f"{name} {plain(path)} does not exist: check the path")
    if not is_folder(path, name):
        check_file(path, name)
        return Place(path, True, frozenset(), ())
    names = list_names(path)
    return Place(path, False, frozenset(names.files), tuple(sorted(names.folders)))
