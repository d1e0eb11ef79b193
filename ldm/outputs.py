"""Outputs, claimed before the work: tried, so that nothing is lost at its end, and locked, so that two runs never mix.

    with claim_folder(config.output_path, "output_path"), claim_file(args.output, "--output"):
        ...

A lock is the system's own (flock), which ends with its process however that ends. Its file lies in the folder as
`.lock`, beside a single file as `.<name>.lock`, says who holds it, and is removed at the end of the claim.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.atomic import LONGEST_NAME, resolved, temporary_path
from ldm.errors import UserError, plain, system_reason
from ldm.files import is_folder, look

logger = logging.getLogger(__name__)


@contextmanager
def claim_folder(path: str | Path, name: str) -> Iterator[None]:
    """Within the block, hold the folder `path`, which is made where it is not there.

    name: of the setting, for errors. Raises UserError where it cannot be made or written, is something else than a
    folder, or is held by another process, which it names. Folders that were made and stay empty are removed.
    """
    folder = Path(path)
    with _made(folder, name):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{name} {plain(folder)} cannot be written: {system_reason(error)}") from None
        with _locked(folder / ".lock", folder, name):
            yield


@contextmanager
def claim_file(path: str | Path | None, name: str) -> Iterator[None]:
    """Within the block, hold the file `path`, which is to be written; None holds nothing. It may be there or not, and
    is not touched.

    name: of the setting, for errors. Raises UserError where it could not be written at the end: a folder, a device or a
    dead link is in its place, its folder cannot be made or written, its name is too long; and where another process
    holds it.
    """
    if path is None:
        yield
        return
    file = Path(path)
    check_file_target(file, name)
    file = resolved(file)
    with _made(file.parent, name):
        trial = temporary_path(file)
        try:
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise UserError(f"{name} {plain(file)} cannot be written: {system_reason(error)}") from None
        lock = f".{file.name}.lock"
        if len(os.fsencode(lock)) > LONGEST_NAME:
            lock = f"{trial.name[:100]}.lock".replace(f".{os.getpid()}", "")
        with _locked(file.with_name(lock), file, name):
            yield


def check_file_target(path: Path, name: str) -> None:
    """Raise UserError where something that is no file, or a link that leads nowhere, stands in its place."""
    found = look(path, name)
    if found is None and os.path.islink(path) and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise UserError(f"{name} {plain(path)} is a link to {plain(os.readlink(path))}, whose folder does not exist: "
                        "remove the link, or give another path")
    if is_folder(path, name):
        raise UserError(f"{name} {plain(path)} is a folder: give the path of a file")
    if found is not None and not os.path.isfile(path):
        raise UserError(f"{name} {plain(path)} is no regular file (a device or a pipe): give another path")


@contextmanager
def _made(folder: Path, name: str) -> Iterator[None]:
    """Make a folder and its parents; in the end remove those that are new and empty."""
    new: list[Path] = []
    for place in (folder, *folder.absolute().parents):
        found = look(place, name)
        if found is not None:
            if not is_folder(place, name):
                raise UserError(f"{name}: {plain(folder)} cannot be a folder, as {plain(place)} is a file: give "
                                "another path")
            break
        if os.path.islink(place):
            raise UserError(f"{name}: {plain(place)} is a link to {plain(os.readlink(place))}, which does not exist: "
                            "make that folder, or give another path")
        new.append(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {plain(folder)} cannot be made: {system_reason(error)}") from None
    try:
        yield
    finally:
        for place in new:
            try:
                place.rmdir()
            except OSError:  # not empty: the work's results are in it
                break


@contextmanager
def _locked(lock: Path, target: Path, name: str) -> Iterator[None]:
    """Hold the lock file `lock` of `target`."""
    handle = _lock(lock, target, name)
    try:
        yield
    finally:
        if handle is not None:
            # Removed before it is let go: whoever waits with the old file finds that it is no longer there.
            lock.unlink(missing_ok=True)
            os.close(handle)


def _lock(lock: Path, target: Path, name: str) -> int | None:
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise UserError(f"{name} {plain(target)} cannot be written: {system_reason(error)}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 500).decode("utf-8", "replace")
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{name} {plain(target)} is in use by {plain(holder) or 'another process'}: wait for "
                                "it to end, or give another path") from None
            logger.warning("%s: this file system has no locks (%s): two runs at once would mix there", target,
                           error.strerror)  # fmt: skip
            return None
        try:
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder removed it between the two calls
    os.ftruncate(handle, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name}, since {started})"
             .encode("utf-8", "backslashreplace"))  # fmt: skip
    return handle
