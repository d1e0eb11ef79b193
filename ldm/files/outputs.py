"""Claims on output paths, made before the work begins.

    with claim_folder(settings.output_path, "output_path"), claim_file(args.output, "--output"):
        ...

A claim checks that the output can be written, so that no result is lost at the end, and locks it, so that two runs
never write to the same place. The lock is an flock, which ends with its process. Its file is `.lock` in a folder and
`.<name>.lock` beside a file, names its process, and is removed at the end of the claim.

`name` is the name of the setting, for errors, in all functions.
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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import LONGEST_NAME, removed_at_end, resolved, temporary_path
from ldm.files.inputs import file_status, is_folder
from ldm.files.paths import check_free

logger = logging.getLogger(__name__)

MAX_TRIES = 100  # to open and lock a lock file before another process removes it
_HOLDER = "process "  # the beginning of the text in a lock file


@contextmanager
def claim_folder(path: str | Path, name: str) -> Iterator[None]:
    """Hold the folder `path` within the block, and create it if needed. New folders that stay empty are removed.

    Raises:
        UserError: The folder cannot be created or written, is not a folder, or is held by another process.
    """
    folder = Path(path)
    with _created_folder(folder, name):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise _write_error(f"{name} {plain(folder)}", error) from None
        with _locked(folder / ".lock", f"{name} {plain(folder)}"):
            yield


@contextmanager
def claim_file(path: str | Path | None, name: str) -> Iterator[None]:
    """Hold the file `path` within the block, without changing it. None claims nothing.

    Raises:
        UserError: The file could not be written (see `check_file_target`; its folder cannot be created or written; its
            name is too long), or is held by another process.
    """
    if path is None:
        yield
        return
    check_file_target(Path(path), name)
    with _locked_beside(resolved(path), name):
        yield


@contextmanager
def claim_new(path: str | Path, name: str, folder: bool = False) -> Iterator[None]:
    """Hold `path` within the block, a file or folder that must not exist yet.

    With `folder`, an empty folder may exist. Raises UserError as `claim_file`, or if `path` exists.
    """
    file_status(path, name)
    check_free(path, empty_folder=folder)
    with _locked_beside(resolved(path), name):
        yield


@contextmanager
def claim_all(*claims: AbstractContextManager[None]) -> Iterator[None]:
    """Enter several claims in their order."""
    with ExitStack() as stack:
        for claim in claims:
            stack.enter_context(claim)
        yield


def check_file_target(path: Path, name: str) -> None:
    """Raise UserError if `path` is a folder, a device, a pipe, or a link into a folder that does not exist."""
    status = file_status(path, name)
    if status is None and os.path.islink(path) and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise UserError(
            f"{name} {plain(path)} is a link to {plain(os.readlink(path))}, whose folder does not exist: "
            "remove the link, or give another path"
        )
    if is_folder(path, name):
        raise UserError(f"{name} {plain(path)} is a folder: give the path of a file")
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} {plain(path)} is not a regular file (a device or a pipe): give another path")


@contextmanager
def _locked_beside(target: Path, name: str) -> Iterator[None]:
    """Check that files can be written beside `target` and renamed to it, and hold a lock beside it."""
    subject = f"{name} {plain(target)}"
    with _created_folder(target.parent, name):
        trial = temporary_path(target)
        try:
            trial.touch()
            trial.unlink()
            _check_replaceable(target)
        except OSError as error:
            raise _write_error(subject, error) from None
        lock = f".{target.name}.lock"
        if len(os.fsencode(lock)) > LONGEST_NAME:
            lock = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.lock"
        with _locked(target.with_name(lock), subject):
            yield


def _check_replaceable(target: Path) -> None:
    """Raise OSError for another user's file in a folder like /tmp, where users can only replace their own files."""
    folder, user = os.stat(target.parent), os.geteuid()
    if folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid) and os.path.lexists(target):
        if os.lstat(target).st_uid != user:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


@contextmanager
def _created_folder(folder: Path, name: str) -> Iterator[None]:
    """Create a folder and its parents, and remove the new ones that are empty at the end."""
    new: list[Path] = []
    for place in (folder, *folder.absolute().parents):
        status = file_status(place, name)
        if status is not None:
            if not stat.S_ISDIR(status.st_mode):
                raise UserError(
                    f"{name}: {plain(folder)} cannot be a folder, as {plain(place)} is a file: give another path"
                )
            break
        if os.path.islink(place):
            raise UserError(
                f"{name}: {plain(place)} is a link to {plain(os.readlink(place))}, which does not exist: "
                "create that folder, or give another path"
            )
        new.append(place)
    with ExitStack() as stack:
        for place in reversed(new):
            stack.enter_context(removed_at_end(place, os.rmdir))  # rmdir refuses folders with results
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name} {plain(folder)} cannot be created: {system_reason(error)}") from None
        yield


@contextmanager
def _locked(lock: Path, subject: str) -> Iterator[None]:
    """Hold the lock file `lock`. `subject` begins the errors: the setting and the path that are locked."""
    handle = _acquire(lock, subject)
    if handle is None:
        yield
        return
    try:
        # The file is removed before the lock is released: a process that has opened it meanwhile sees the removal.
        with removed_at_end(lock):
            yield
    finally:
        os.close(handle)


def _acquire(lock: Path, subject: str) -> int | None:
    """Return a handle of the locked file, or None if the file system does not support locks."""
    this_process = f"{_HOLDER}{os.getpid()} on {socket.gethostname()}"
    for _ in range(MAX_TRIES):
        with ExitStack() as stack:  # closes the handle unless it is returned
            handle, foreign = _open_lock(lock, subject)
            stack.callback(os.close, handle)
            holder = os.read(handle, 500).decode("utf-8", "replace")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _in_use_error(subject, holder, holder.startswith(f"{this_process} ")) from None
                if not holder:
                    lock.unlink(missing_ok=True)
                logger.warning(
                    "%s: this file system has no locks (%s): do not run two at once there", subject, error.strerror
                )
                return None
            if holder and not holder.startswith(_HOLDER):
                raise _foreign_lock_error(lock, subject)
            try:
                # Its holder may have removed the file between the opening and the locking. Try again then.
                current = os.path.samestat(os.lstat(lock), os.fstat(handle))
                if current and foreign:  # left by another user's process that was killed
                    lock.unlink()
                elif current:
                    stack.pop_all()
                    _write_holder(handle, this_process)
                    return handle
            except FileNotFoundError:
                pass
            except OSError as error:
                raise _write_error(subject, error) from None
    logger.warning(
        "%s: this file system has no lasting inode numbers for a lock: do not run two at once there", subject
    )
    return None


def _open_lock(lock: Path, subject: str) -> tuple[int, bool]:
    """Open a lock file, not through links. Return its handle, and whether it is another user's and read-only."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            handle, foreign = os.open(lock, os.O_RDWR | os.O_CREAT | flags, 0o666), False
        except PermissionError:
            if not os.path.lexists(lock):
                raise
            handle, foreign = os.open(lock, os.O_RDONLY | flags), True
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise _foreign_lock_error(lock, subject) from None
        raise _write_error(subject, error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _foreign_lock_error(lock, subject)
    return handle, foreign


def _write_holder(handle: int, this_process: str) -> None:
    """Name this process in its lock file."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"{this_process} ({Path(sys.argv[0]).name}, since {started})".encode("utf-8", "backslashreplace")
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)
    except OSError:  # a full disk; the lock holds without the text
        pass


def _in_use_error(subject: str, holder: str, same_process: bool) -> UserError:
    if same_process:
        return UserError(f"{subject} is the path of two outputs of this run: give each its own path")
    return UserError(
        f"{subject} is in use by {plain(holder) or 'another process'}: wait for it to end, or give another path"
    )


def _foreign_lock_error(lock: Path, subject: str) -> UserError:
    return UserError(
        f"{subject} cannot be locked, because {plain(lock)} belongs to another program: give another path, or remove it"
    )


def _write_error(subject: str, error: OSError) -> UserError:
    return UserError(f"{subject} cannot be written: {system_reason(error)}")
