"""Opening and reading files that users name, with errors that say what to do.

Every file that a user may name is opened through this module. It reads regular files only, because opening a FIFO can
block forever and a device may never end. It distinguishes a missing file from one that the user has no permission for,
and it limits the size of texts.

The functions share these arguments:
    name: of the setting or the kind of file, which begins the error.
    way: what the user can do about a file that is missing or is something else, which ends the error.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator

from ldm.errors import UserError, plain, system_reason

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
MAX_TEXT = 64 << 20  # bytes of a text file
MAX_LINE = 128 << 20  # bytes of a line of a text that is read line by line


def file_status(path: str | os.PathLike, name: str = "") -> os.stat_result | None:
    """Return the status of the file or folder at `path`, or None if there is none. Links are followed.

    Raises:
        UserError: The system refuses access: a missing permission, a circle of links, an invalid path.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{_named(path, name)} cannot be accessed: {system_reason(error)}") from None
    except ValueError as error:  # a zero byte
        raise UserError(f"{_named(path, name)} is not a valid path ({error})") from None


def is_there(path: str | os.PathLike, name: str = "") -> bool:
    """Return whether anything exists at `path`. Raises as `file_status`."""
    return file_status(path, name) is not None


def is_file(path: str | os.PathLike, name: str = "") -> bool:
    """Return whether `path` is a regular file. Raises as `file_status`."""
    status = file_status(path, name)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str | os.PathLike, name: str = "") -> bool:
    """Return whether `path` is a folder. Raises as `file_status`."""
    status = file_status(path, name)
    return status is not None and stat.S_ISDIR(status.st_mode)


def list_folder(path: str | os.PathLike, name: str = "") -> list[str]:
    """Return the sorted names in a folder. Raises UserError if it is not a folder or cannot be read."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise UserError(f"{_named(path, name)} cannot be read: {system_reason(error)}") from None


def open_file(path: str | os.PathLike, name: str = "", way: str = "check the path") -> io.BufferedReader:
    """Open a regular file for reading. Links are followed.

    Raises:
        UserError: The file does not exist, is not a regular file, or cannot be read.
    """
    subject = _named(path, name)
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{subject} does not exist: {way}") from None
    except OSError as error:
        raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None
    except ValueError as error:  # a zero byte
        raise UserError(f"{subject} is not a valid path ({error}): {way}") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise UserError(f"{subject} is {KINDS.get(kind, 'a special file')}, not a file: {way}")
    return os.fdopen(handle, "rb")


def check_file(path: str | os.PathLike, name: str = "", way: str = "check the path") -> None:
    """Raise UserError if `open_file` would. For files that a library opens itself."""
    open_file(path, name, way).close()


def content_hash(path: str | os.PathLike, name: str = "", way: str = "check the path") -> str:
    """Return the SHA-256 of a file in hexadecimal, which identifies weights and images. Raises as `open_file`."""
    digest = hashlib.sha256()
    with open_file(path, name, way) as file:
        try:
            while block := file.read(1 << 20):
                digest.update(block)
        except OSError as error:
            raise UserError(f"{_named(path, name)} cannot be read: {system_reason(error)}") from None
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike, name: str = "", way: str = "check the path", most: int | None = None) -> bytes:
    """Return the content of a regular file. Raises as `open_file`, and UserError for more than `most` bytes."""
    subject = _named(path, name)
    with open_file(path, name, way) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{subject} has {size:,} bytes, at most {most:,} are read: {way}")
        try:
            return file.read() if most is None else file.read(most)
        except OSError as error:
            raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None


def read_text(path: str | os.PathLike, name: str = "", way: str = "check the path", most: int = MAX_TEXT) -> str:
    """Return the text of a UTF-8 file, without its byte-order mark, with line feeds as the only line ends.

    Raises:
        UserError: As `read_bytes`, for another encoding (with the line), and for a zero byte.
    """
    return decode_text(read_bytes(path, name, way, most), _named(path, name), way)


def read_small_text(path: str, way: str = "check the path", most: int = MAX_TEXT) -> str:
    """Return the text of a UTF-8 file of which a data set may have a million. Raises as `read_text`.

    It makes four system calls and no file object, so that a million caption files are listed in 15 s instead of 51 s.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return read_text(path, way=way, most=most)  # raises the error
    try:
        status = os.fstat(handle)
        is_file = stat.S_ISREG(status.st_mode)
        size = min(status.st_size, most + 1) if is_file else 0
        raw = os.read(handle, size)
        while len(raw) < size and (more := os.read(handle, size - len(raw))):  # a read may return a part only
            raw += more
    except OSError:
        is_file = False
    finally:
        os.close(handle)
    if not is_file or len(raw) > most:
        return read_text(path, way=way, most=most)
    return decode_text(raw, path, way)


def decode_text(raw: bytes, subject: str, way: str = "check the path", first_line: int = 1) -> str:
    """Return the text that UTF-8 bytes hold, as `read_text` does for a file.

    `subject` begins the errors, and `first_line` is the number of the first line. Raises UserError as `read_text` does.
    """
    if first_line == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{plain(subject)} is UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first_line
        raise UserError(
            f"{plain(subject)}, line {line}: not a UTF-8 text file: save it as UTF-8{_other_encoding(raw)}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + first_line
        raise UserError(f"{plain(subject)}, line {line}: not a text file, it holds a zero byte: {way}")
    if first_line == 1 and text.startswith("\ufeff"):
        text = text[1:]
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def text_lines(
    path: str | os.PathLike, name: str = "", way: str = "check the path", most: int = MAX_TEXT
) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, each with its line feed, without holding the file in memory.

    The lines are those of the text that `read_text` returns, and so are the errors, each of which comes when its line
    is reached. A line of more than MAX_LINE bytes is an error too.
    """
    subject = _named(path, name)
    with open_file(path, name, way) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{subject} has {size:,} bytes, at most {most:,} are read: {way}")
        number = 0
        while True:
            try:
                raw = file.readline(MAX_LINE + 1)
            except OSError as error:
                raise UserError(f"{subject} cannot be read: {system_reason(error)}") from None
            if not raw:
                return
            number += 1
            if len(raw) > MAX_LINE:
                raise UserError(f"{subject}, line {number}: more than {MAX_LINE:,} bytes: {way}")
            text = decode_text(raw, subject, way, number)
            if text.find("\n") in (-1, len(text) - 1):  # one line, unless carriage returns alone end the lines
                yield text
            else:
                # Not str.splitlines, which also splits at other characters, such as U+2028.
                yield from (f"{line}\n" for line in (text[:-1] if text[-1] == "\n" else text).split("\n"))


def _named(path: str | os.PathLike, name: str) -> str:
    return f"{name} {plain(os.fspath(path))}".strip()


def _other_encoding(raw: bytes) -> str:
    """Return a guess at the encoding of a text that is not UTF-8, for the end of an error."""
    if b"\0" in raw:
        return ""
    for encoding, name in (("gb18030", "GBK"), ("cp1252", "Windows-1252")):
        try:
            raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        return f" (it may be {name})"
    return ""
