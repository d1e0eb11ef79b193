"""Files that users name: looked at, opened and read with errors that a person can act on.

Whatever may be named by a user is opened through this module: a FIFO would be waited on for ever and a device may give
bytes without end, so a regular file is asked for before anything is read; a file that may not be seen is told from one
that is not there; and every text has a largest size.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from ldm.errors import UserError, plain, system_reason

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
MOST_TEXT = 64 << 20  # bytes of a text file: a million prompts of 60 characters


def look(path: str | os.PathLike, name: str = "") -> os.stat_result | None:
    """The status of what `path` leads to, links followed; None where nothing is there.

    name: of the setting or the kind of file, for errors. Raises UserError where that cannot be seen: no permission for
    a folder on the way, a circle of links, a name that is too long or holds a zero byte.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{_named(path, name)} cannot be seen: {system_reason(error)}") from None
    except ValueError as error:  # a zero byte
        raise UserError(f"{_named(path, name)} is no path ({error})") from None


def is_there(path: str | os.PathLike, name: str = "") -> bool:
    """Whether anything is at `path`; raises as `look`."""
    return look(path, name) is not None


def is_file(path: str | os.PathLike, name: str = "") -> bool:
    """Whether `path` leads to a regular file; raises as `look`."""
    found = look(path, name)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | os.PathLike, name: str = "") -> bool:
    """Whether `path` leads to a folder; raises as `look`."""
    found = look(path, name)
    return found is not None and stat.S_ISDIR(found.st_mode)


def list_folder(path: str | os.PathLike, name: str = "") -> list[str]:
    """The sorted names in a folder. Raises UserError where it is none or may not be read."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise UserError(f"{_named(path, name)} cannot be read: {system_reason(error)}") from None


def open_file(path: str | os.PathLike, name: str = "", way: str = "check the path") -> BinaryIO:
    """Open a regular file for reading, links followed.

    Args:
        name: of the setting or the kind of file, for errors.
        way: what to do about a file that is not there or is something else.

    Raises:
        UserError: it is not there, is no regular file, or may not be read.
    """
    subject = _named(path, name)
    try:
        # O_NONBLOCK: opening a FIFO waits for its writer otherwise.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{subject} does not exist: {way}") from None
    except OSError as error:
        raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{subject} is no path ({error}): {way}") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise UserError(f"{subject} is {KINDS.get(kind, 'something else')}, not a file: {way}")
    return os.fdopen(handle, "rb")


def check_file(path: str | os.PathLike, name: str = "", way: str = "check the path") -> None:
    """Raise UserError unless `path` leads to a regular file that may be read: for libraries that open it themselves."""
    open_file(path, name, way).close()


def read_bytes(path: str | os.PathLike, name: str = "", way: str = "check the path", most: int | None = None) -> bytes:
    """The content of a regular file; see `open_file`. Raises UserError for more than `most` bytes too."""
    subject = _named(path, name)
    with open_file(path, name, way) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{subject} has {size:,} bytes, at most {most:,} are read: {way}")
        try:
            return file.read() if most is None else file.read(most)
        except OSError as error:
            raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None


def read_text(path: str | os.PathLike, name: str = "", way: str = "check the path", most: int = MOST_TEXT) -> str:
    """The text of a UTF-8 file, without its byte-order mark, lines ended by line feeds alone.

    Raises UserError as `read_bytes` does, for UTF-16 and other encodings (with the line), and for a zero byte.
    """
    subject = _named(path, name)
    raw = read_bytes(path, name, way, most)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{subject} is UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{subject}, line {line}: not a UTF-8 text file: save it as UTF-8{_other_encoding(raw)}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{subject}, line {line}: not a text file, it holds a zero byte: {way}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _named(path: str | os.PathLike, name: str) -> str:
    return f"{name} {plain(os.fspath(path))}".strip()


def _other_encoding(raw: bytes) -> str:
    """What a text that is not UTF-8 may be, for the end of a message."""
    if b"\0" in raw:
        return ""
    for encoding, name in (("gb18030", "GBK"), ("cp1252", "Windows-1252")):
        try:
            raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        return f" (it may be {name} now)"
    return ""
