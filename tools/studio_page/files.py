"""Which files the page may name: those below the folders that its user gave, and no others.

The page names a file as `root/path/below/it`, such as `loras/style.safetensors`. A name is checked twice: its parts
must be plain names, and what it leads to, through links, must be below the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ldm.data.sources.names import is_hidden
from ldm.errors import UserError, plain

LONGEST_NAME = 1000  # characters
MAX_DEPTH = 6  # of folders that are listed
MAX_LISTED = 20_000  # files and folders that are looked at


class NotAllowed(UserError):
    """A name that leads to no file that the page may use."""


class Folders:
    """The folders that the page may read.

    Args:
        roots: Each folder by the word that the page's names begin with. It need not exist yet.
    """

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = {word: folder.resolve() for word, folder in roots.items()}

    def resolve(self, name: object, *words: str) -> Path:
        """Return the path that a name of the page stands for, without links in it.

        Args:
            name: Such as `loras/style.safetensors`.
            *words: The roots that it may begin with, none for all.

        Raises:
            NotAllowed: It is no such name, or leads to nothing, or out of its folder.
        """
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise NotAllowed(f"{_quoted(name)} is no name of a file: choose one from the list")
        word, *parts = name.split("/")
        if word not in (words or self.roots) or word not in self.roots:
            raise NotAllowed(f"{_quoted(name)} is in none of the folders that this page may use: choose from the list")
        # A dollar is refused because paths of settings are expanded as a shell does.
        if any(not part or is_hidden(part) or "\\" in part or "$" in part for part in parts):
            raise NotAllowed(
                f"{_quoted(name)} has a part that is empty, hidden, or holds a backslash or a dollar: rename the file"
            )
        root = self.roots[word]
        try:
            path = root.joinpath(*parts).resolve(strict=True)
        except (OSError, RuntimeError):  # it is missing, or its links form a circle
            raise NotAllowed(f"{_quoted(name)} does not exist: reload the page") from None
        if not path.is_relative_to(root):
            raise NotAllowed(f"{_quoted(name)} is a link out of its folder: copy the file into the folder")
        return path

    def name_of(self, path: Path) -> str | None:
        """Return the page's name of a path, None if it is in none of the folders. One folder may hold another."""
        words = [word for word, root in self.roots.items() if path.is_relative_to(root)]
        if not words:
            return None
        word = max(words, key=lambda word: len(self.roots[word].parts))
        return "/".join([word, *path.relative_to(self.roots[word]).parts])

    def walk(self, word: str, depth: int = MAX_DEPTH) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield the name of each folder below a root, with the names in it of folders and of files, as `listed`."""
        waiting, looked_at = [word], 0
        while waiting and looked_at <= MAX_LISTED:
            name = waiting.pop()
            folders, files = self.listed(name)
            looked_at += len(folders) + len(files)
            yield name, folders, files
            if name.count("/") + 1 < depth:
                waiting += [f"{name}/{folder}" for folder in reversed(folders)]

    def listed(self, name: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder, sorted; none if it cannot be listed.

        Hidden names, links to folders, links out of the root, and names that are not printable are left out.

        Args:
            name: A root, or a folder that was listed before.
        """
        word, *parts = name.split("/")
        root = self.roots[word]
        place, found, others = next(os.walk(root.joinpath(*parts)), ("", [], []))
        folders = [folder for folder in found if _is_shown(folder) and not _is_link(place, folder)]
        files = [file for file in others if _is_shown(file) and not self._leads_out(place, file, root)]
        return sorted(folders), sorted(files)

    @staticmethod
    def _leads_out(folder: str, name: str, root: Path) -> bool:
        return _is_link(folder, name) and not Path(folder, name).resolve().is_relative_to(root)


def check_links_below(folder: Path, root: Path) -> None:
    """Raise NotAllowed if a link in a folder leads out of `root`, so that reading the folder would leave it."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise NotAllowed(f"{plain(path)} is a link out of {plain(root)}: copy what it leads to")


def _is_shown(name: str) -> bool:
    return name.isprintable() and not is_hidden(name)


def _is_link(folder: str, name: str) -> bool:
    return os.path.islink(os.path.join(folder, name))


def _quoted(name: object) -> str:
    return f'"{plain(name, 120)}"'
