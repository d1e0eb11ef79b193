"""Errors for users, and the escaping of untrusted text for messages."""

from __future__ import annotations

import errno

# Characters of a quoted text and of a whole message. The middle of a longer one is left out.
LONGEST_QUOTE = 200
LONGEST_MESSAGE = 600

# What the user can do about an error of the operating system.
_WAYS = {
    errno.EACCES: "give this user the permission (ls -ld shows who has it), or choose another path",
    errno.EPERM: "give this user the permission, or choose another path",
    errno.ENOSPC: "free space there, or choose another path",
    errno.EDQUOT: "free space there, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links form a circle: choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold many files open",
    errno.EIO: "the disk or the network file system fails: check it",
    errno.ESTALE: "mount the network file system again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "name a file",
}


class UserError(Exception):
    """A mistake in a setting, file or command line. The message says what is wrong, where, and what to do."""


def plain(text: object, longest: int = LONGEST_QUOTE) -> str:
    """Return `text` on one line that is safe to print.

    Control characters and invalid UTF-8 are escaped. The middle of a text of more than `longest` characters is left
    out.
    """
    text = str(text)
    if len(text) > longest:
        tail = longest // 3
        text = f"{text[: longest - tail - 5]} ... {text[-tail:]}"
    if text.isprintable():  # 10 us less for a path; a data set may have a million
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char in "\n\r\t":
        return " "
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii") if not char.isspace() else " "


def system_reason(error: OSError) -> str:
    """Return the reason of a system error and what to do, such as "Permission denied: give this user ..."."""
    reason = error.strerror or str(error) or type(error).__name__
    way = _WAYS.get(error.errno or 0, "check the path, its disk and its permissions")
    return f"{reason}: {way}"


def system_error(error: OSError) -> UserError:
    """Return the UserError for a system error, with the file that it names."""
    path = "standard output, or an open file," if error.filename is None else error.filename
    if isinstance(path, bytes):
        path = path.decode("utf-8", "surrogateescape")
    return UserError(f"{path} cannot be used: {system_reason(error)}")
