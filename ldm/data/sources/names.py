"""The names of images and the folders they are in: what is listed, what a name in a metadata file stands for."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator, Set
from pathlib import Path
from typing import NamedTuple

from ldm.errors import UserError, plain, system_reason

# Suffixes of the images that metrics compute with and that a CSV without a header is recognised by.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
# Suffixes of the files in a folder that are taken for images. One that does not decode is named later.
LISTED_SUFFIXES = frozenset((*IMAGE_SUFFIXES, ".jfif"))
_SUFFIXES = tuple(sorted([*LISTED_SUFFIXES, *(suffix.upper() for suffix in LISTED_SUFFIXES)]))
MAX_DEPTH = 64  # of folders below the data set's


class Names(NamedTuple):
    """The names in a folder, without hidden ones (.DS_Store, ._image.png) and __MACOSX."""

    folder: str
    files: list[str]
    folders: list[str]
    left_out: tuple[str, ...] = ()  # the folders that `walk` was told not to enter


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is not listed."""
    return name.startswith(".") or name == "__MACOSX"


def list_names(folder: str) -> Names:
    """Return the names in a folder. Links are followed. Raises UserError if it cannot be read."""
    names = Names(folder, [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_hidden(entry.name):
                    (names.folders if _is_folder(entry) else names.files).append(entry.name)
    except OSError as error:
        raise UserError(f"the folder {plain(folder)} cannot be read: {system_reason(error)}") from None
    return names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def walk(folder: str, recursive: bool = True, leave_out: Collection[str] = ()) -> Iterator[Names]:
    """Yield the names in a folder and in all folders below it, each folder once however links lead to it.

    Args:
        folder: The path.
        recursive: Whether folders below are included.
        leave_out: Real paths of folders below that are not entered.

    Raises:
        UserError: A folder cannot be read, or they are nested too deeply.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, 0)]
    while waiting:
        path, depth = waiting.pop()
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"the folder {plain(path)} cannot be read: {system_reason(error)}") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if depth > MAX_DEPTH:
            raise UserError(f"{plain(path)}: folders are nested more than {MAX_DEPTH} deep: move the images up")
        names = list_names(path)
        if leave_out:
            left = tuple(name for name in names.folders if os.path.realpath(f"{path}/{name}") in leave_out)
            names = names._replace(folders=[name for name in names.folders if name not in left], left_out=left)
        yield names
        if recursive:
            waiting.extend((f"{path}/{name}", depth + 1) for name in sorted(names.folders, reverse=True))


def split_suffix(name: str) -> tuple[str, str]:
    """Return the stem and the lower-case suffix of a file name: ("cat", ".png")."""
    at = name.rfind(".")
    return (name[:at], name[at:].lower()) if at > 0 else (name, "")


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return split_suffix(name)[1] in LISTED_SUFFIXES


def check_inside(folder: str | os.PathLike, place: str, name: str) -> None:
    """Raise UserError, which begins with `place`, for a name that leads out of the folder. Links in it are allowed."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise UserError(
            f"{place}: {plain(name)} is outside the folder: put the image, or a link to it, into "
            f"{plain(os.fspath(folder))} and name it relative to that"
        )


class NamedImages:
    """Finds the files of the image names in a metadata file. Each folder is listed once, and no file is asked for."""

    def __init__(self, folder: str):
        self.folder = folder
        self._names: dict[str, frozenset[str] | None] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}
        self._similar = SimilarNames(Path(folder))

    def find(self, name: str, place: str, stem: bool = False) -> tuple[str, str, bool]:
        """Return (path, fault, whether the file's name differs from `name`). The path is "" where there is a fault.

        Args:
            name: Relative to the folder.
            place: File and line of the name, for errors.
            stem: Whether the name may leave the suffix away.

        Raises:
            UserError: The name leads out of the folder.
        """
        if not name:
            return "", "it names no image", False
        if "\0" in name:
            return "", "its image's name holds a zero byte", False
        inside = os.path.normpath(name)
        if inside[0] in "./":
            check_inside(self.folder, place, name)
        below, _, base = inside.rpartition("/")
        folder = f"{self.folder}/{below}" if below else self.folder
        names = self._listed(folder)
        if names is None or base in names:
            return f"{folder}/{base}", "", False
        if stem:
            # Trying the suffixes takes 250 MB less for a million names than a dictionary of their stems.
            stems = [f"{base}{suffix}" for suffix in _SUFFIXES if f"{base}{suffix}" in names]
            stems = stems or self._stems_of(folder).get(base, [])
            if len(stems) == 1:
                return f"{folder}/{stems[0]}", "", False
            if stems:
                return "", f"two images have this name: {plain(stems[0])} and {plain(stems[1])}", False
        similar = self._similar.find(name)
        if len(similar) == 1:
            return str(similar[0]), "", True
        if similar:
            both = " and ".join(plain(other.name) for other in similar[:2])
            return "", f"the image does not exist, only {both}", False
        return "", "the image does not exist", False

    def unused(self, used: Set[str]) -> Iterator[str]:
        """Yield the images in the folders that names were looked up in, of which no path is in `used`."""
        for folder, names in self._names.items():
            yield from (name for name in names or () if is_image(name) and f"{folder}/{name}" not in used)

    def _listed(self, folder: str) -> frozenset[str] | None:
        """Return the names in a folder; None if it may not be listed, but perhaps entered."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except PermissionError:
                self._names[folder] = None
            except (OSError, ValueError):
                self._names[folder] = frozenset()
        return self._names[folder]

    def _stems_of(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._stems:
            stems: dict[str, list[str]] = {}
            for name in sorted(self._listed(folder) or ()):
                stem, suffix = split_suffix(name)
                if suffix in LISTED_SUFFIXES:
                    stems.setdefault(stem, []).append(name)
            self._stems[folder] = stems
        return self._stems[folder]


class SimilarNames:
    """Finds files whose names differ from those in a CSV only in case, Unicode form, kind of slash or encoding."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> list[Path]:
        """Return the paths of all such files. They are inside the folder, because no listing contains ".."."""
        paths = [self._folder]
        for part in os.path.normpath(name.replace("\\", "/")).split("/"):
            paths = [path / similar for path in paths for similar in self._names(path).get(_folded(part), ())]
        return paths

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Return the names in a folder by their folded form."""
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    for folded in {_folded(name), _folded(_from_gbk(name))}:
                        names.setdefault(folded, []).append(name)
            except OSError:  # not a folder, or it may not be listed
                pass
            self._listed[folder] = names
        return self._listed[folder]


def _folded(name: str) -> str:
    """Return a file name without the differences that operating systems introduce."""
    return unicodedata.normalize("NFC", name.casefold())


def _from_gbk(name: str) -> str:
    """Decode a file name as GBK, which archives from Chinese Windows use, even if its bytes are valid UTF-8."""
    try:
        return os.fsencode(name).decode("gb18030")
    except UnicodeError:
        return name
