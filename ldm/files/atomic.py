"""Write beside, then rename: a killed process leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file name, on all usual file systems

_temporaries: dict[Path, Callable[[Path], None]] = {}  # path -> what removes it


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed onto `path` when the block ends without an error.

    A link is followed: what it leads to is replaced, the link stays. The temporary name keeps the suffix of `path`,
    since writers choose their format by it. Missing parent folders are created. On any error the temporary file is
    removed and the error goes on. Raises OSError at once where a device or a pipe is in the file's place: a process of
    root would replace it.

    sync: wait until the disk has the file, so that a power cut leaves no file that is empty or cut off; for files that
    carry no checksum of their own.
    """
    path = resolved(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "It is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path)) as temporary:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, renamed to `path` when the block ends without an error, else removed.

    `path` must not exist, or be an empty folder. Raises OSError otherwise.
    """
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path)) as temporary:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder on the disk of `path`, beside it, for what is needed while `path` is made. It is removed at
    the end. Missing parent folders are created.
    """
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_at_end(temporary_path(path.with_name(f"{path.stem}.parts"))) as temporary:
        temporary.mkdir()
        yield temporary


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def removed_at_end(path: Path, remove: Callable[[Path], None] = _remove) -> Iterator[Path]:
    """Yield `path` and remove it at the end of the block, also where the process ends without unwinding. What `remove`
    raises then as an OSError is passed over.
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
    """Where a link leads; any other path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def temporary_path(path: Path) -> Path:
    """The hidden name beside `path` that it is written under; never longer than a name may be where that of `path` is
    not.
    """
    suffix = path.suffix if len(path.suffix) <= 16 else ""  # no writer's
    stem, ending = path.stem, f".{os.getpid()}.partial{suffix}"
    while len(os.fsencode(f".{stem}{ending}")) > LONGEST_NAME:
        stem = stem[:-1]
    return path.with_name(f".{stem}{ending}")


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has what was written to the file or folder `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries() -> None:
    """Remove what is being written at this moment: for a process that ends without unwinding."""
    for path, remove in reversed(list(_temporaries.items())):
        try:
            remove(path)
        except OSError:
            continue
