"""Outputs, claimed before the work: tried, so that nothing is lost at its end, and locked, so that two runs never mix.

    with claim_folder(config.output_path, "output_path"), claim_file(args.output, "--output"):
        ...

A lock is the system's own (flock), which ends with its process however that ends. Its file lies in the folder as
`.lock`, beside a single file as `.<name>.lock`, says who holds it, and is removed at the end of the claim.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import LONGEST_NAME, removed_at_end, resolved, temporary_path
from ldm.files.inputs import file_status, is_folder
from ldm.files.paths import check_free

logger = logging.getLogger(__name__)

MOST_TRIES = 100  # each after another process removed the lock file between two calls
_HOLDER = "process "  # how the text of a lock file begins


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
            raise _refused(folder, name, error) from None
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
    check_file_target(Path(path), name)
    with _held_beside(resolved(path), name):
        yield


@contextmanager
def claim_new(path: str | Path, name: str, folder: bool = False) -> Iterator[None]:
    """Within the block, hold `path`, where nothing may be yet: a file, or a folder that is written beside and renamed.

    folder: let an empty folder be in nobody's way. Raises UserError as `claim_file`, and where something is there.
    """
    file_status(path, name)
    check_free(path, empty_folder=folder)
    with _held_beside(resolved(path), name):
        yield


@contextmanager
def claim_all(*claims) -> Iterator[None]:
    """Hold several claims, made in their order."""
    with ExitStack() as stack:
        for claim in claims:
            stack.enter_context(claim)
        yield


def check_file_target(path: Path, name: str) -> None:
    """Raise UserError where something that is no file, or a link that leads nowhere, stands in its place."""
    found = file_status(path, name)
    if found is None and os.path.islink(path) and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise UserError(
            f"{name} {plain(path)} is a link to {plain(os.readlink(path))}, whose folder does not exist: "
            "remove the link, or give another path"
        )
    if is_folder(path, name):
        raise UserError(f"{name} {plain(path)} is a folder: give the path of a file")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UserError(f"{name} {plain(path)} is no regular file (a device or a pipe): give another path")


@contextmanager
def _held_beside(target: Path, name: str) -> Iterator[None]:
    """Try that `target` can be written beside and renamed, and hold it by a lock beside it."""
    with _made(target.parent, name):
        trial = temporary_path(target)
        try:
            trial.touch()
            trial.unlink()
            _check_replaceable(target)
        except OSError as error:
            raise _refused(target, name, error) from None
        lock = f".{target.name}.lock"
        if len(os.fsencode(lock)) > LONGEST_NAME:
            lock = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.lock"
        with _locked(target.with_name(lock), target, name):
            yield


def _check_replaceable(target: Path) -> None:
    """Raise OSError for another user's file in a folder like /tmp, where each may replace only his own."""
    folder, user = os.stat(target.parent), os.geteuid()
    if folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid) and os.path.lexists(target):
        if os.lstat(target).st_uid != user:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


@contextmanager
def _made(folder: Path, name: str) -> Iterator[None]:
    """Make a folder and its parents; in the end remove those that are new and empty."""
    new: list[Path] = []
    for place in (folder, *folder.absolute().parents):
        found = file_status(place, name)
        if found is not None:
            if not stat.S_ISDIR(found.st_mode):
                raise UserError(
                    f"{name}: {plain(folder)} cannot be a folder, as {plain(place)} is a file: give another path"
                )
            break
        if os.path.islink(place):
            raise UserError(
                f"{name}: {plain(place)} is a link to {plain(os.readlink(place))}, which does not exist: "
                "make that folder, or give another path"
            )
        new.append(place)
    with ExitStack() as stack:
        for place in reversed(new):
            stack.enter_context(removed_at_end(place, os.rmdir))  # which refuses where results are in it
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name} {plain(folder)} cannot be made: {system_reason(error)}") from None
        yield


@contextmanager
def _locked(lock: Path, target: Path, name: str) -> Iterator[None]:
    """Hold the lock file `lock` of `target`."""
    handle = _lock(lock, target, name)
    if handle is None:
        yield
        return
    try:
        # Removed before it is let go: whoever opened it meanwhile finds that it is no longer there.
        with removed_at_end(lock):
            yield
    finally:
        os.close(handle)


def _lock(lock: Path, target: Path, name: str) -> int | None:
    """The handle of the locked file, None where the file system has no locks."""
    ours = f"{_HOLDER}{os.getpid()} on {socket.gethostname()}"
    for _ in range(MOST_TRIES):
        try:
            handle, foreign = _opened(lock)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
                raise _not_ours(lock, target, name) from None
            raise _refused(target, name, error) from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _not_ours(lock, target, name)
        holder = os.read(handle, 500).decode("utf-8", "replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if holder.startswith(f"{ours} "):
                    raise UserError(
                        f"{name} {plain(target)} is the place of two outputs of this run: give each a path of its own"
                    ) from None
                raise UserError(
                    f"{name} {plain(target)} is in use by {plain(holder) or 'another process'}: wait for "
                    "it to end, or give another path"
                ) from None
            if not holder:
                lock.unlink(missing_ok=True)
            logger.warning("%s: this file system has no locks (%s): two runs at once would mix there", target,
                           error.strerror)  # fmt: skip
            return None
        if holder and not holder.startswith(_HOLDER):
            os.close(handle)
            raise _not_ours(lock, target, name)
        try:
            same = os.path.samestat(os.lstat(lock), os.fstat(handle))
            if same and foreign:  # its process was killed
                lock.unlink()
            elif same:
                break
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise _refused(target, name, error) from None
        os.close(handle)  # its holder removed it between the two calls
    else:
        logger.warning("%s: the file system gives its lock another number each time: two runs at once would mix there",
                       target)  # fmt: skip
        return None
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"{ours} ({Path(sys.argv[0]).name}, since {started})".encode("utf-8", "backslashreplace")
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)
    except OSError:  # a full disk: the lock holds without its text
        pass
    return handle


def _opened(lock: Path) -> tuple[int, bool]:
    """(the handle of the lock file, whether it is another user's, who alone may write to it). No link is followed, as
    it may lead to a file of worth. Raises OSError.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle, foreign = os.open(lock, os.O_RDWR | os.O_CREAT | flags, 0o666), False
    except PermissionError:
        if not os.path.lexists(lock):
            raise
        handle, foreign = os.open(lock, os.O_RDONLY | flags), True
    return handle, foreign


def _not_ours(lock: Path, target: Path, name: str) -> UserError:
    return UserError(
        f"{name} {plain(target)} cannot be locked, since {plain(lock)} is another program's: give another "
        "path, or remove it"
    )


def _refused(target: Path, name: str, error: OSError) -> UserError:
    return UserError(f"{name} {plain(target)} cannot be written: {system_reason(error)}")
