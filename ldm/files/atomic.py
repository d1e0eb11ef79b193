"""Atomic writing: files and folders are written under a temporary name and renamed.

A process that is killed at any moment leaves the old file or the new one, never a part of one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file name, on all usual file systems

_temporaries: dict[Path, Callable[[Path], None]] = {}  # path -> the function that removes it


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends without an error.

    The temporary name keeps the suffix of `path`, because writers choose their format by it. Missing parent folders
    are created. If `path` is a link, the file that it leads to is replaced. With `sync`, the file is on the disk before
    it is renamed, so that a power cut cannot leave an empty one. Files with their own checksum do without it.

    Raises:
        OSError: `path` exists and is not a regular file. Root would replace a device or a pipe otherwise.
    """
    path = resolved(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "It is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path)) as temporary:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` when the block ends without an error.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path)) as temporary:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, on the same disk, and remove it at the end of the block."""
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path.with_name(f"{path.stem}.parts"))) as temporary:
        temporary.mkdir()
        yield temporary


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with its content. There may be nothing at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def removed_at_end(path: Path, remove: Callable[[Path], None] = remove_path) -> Iterator[Path]:
    """Yield `path` and call `remove` with it at the end of the block, ignoring an OSError.

    A process that ends without unwinding removes it with `remove_temporaries`.
    """
    _temporaries[path] = remove
    try:
        yield path
    finally:
        try:
            remove(path)
        except OSError:
            pass
        _temporaries.pop(path, None)


def resolved(path: str | Path) -> Path:
    """Return the target of a link, or `path` itself if it is not a link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def temporary_path(path: Path) -> Path:
    """Return a new hidden path beside `path` for writing it. Its name is shortened to LONGEST_NAME bytes.

    A part of the name is random: on two hosts, processes with the same id may write to a folder that the hosts share.
    """
    suffix = path.suffix if len(path.suffix) <= 16 else ""  # longer ones do not select a format
    stem, ending = path.stem, f".{os.getpid()}-{secrets.token_hex(4)}.partial{suffix}"
    while len(os.fsencode(f".{stem}{ending}")) > LONGEST_NAME:
        stem = stem[:-1]
    return path.with_name(f".{stem}{ending}")


def sync_to_disk(path: Path) -> None:
    """Wait until the content of the file or folder `path` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries() -> None:
    """Remove all files and folders that are being written. For a process that ends without unwinding."""
    for path, remove in reversed(list(_temporaries.items())):
        try:
            remove(path)
        except OSError:
            continue
