"""Errors that a person can act on, and text from elsewhere made fit for a message."""

from __future__ import annotations

import errno

# Characters of a foreign text within a message, and of a whole message: more is cut out of the middle.
LONGEST_QUOTE = 200
LONGEST_MESSAGE = 600

# What to do about an answer of the operating system, by its number.
_WAYS = {
    errno.EACCES: "give this user the permission (ls -ld shows who has it), or choose another path",
    errno.EPERM: "give this user the permission, or choose another path",
    errno.ENOSPC: "free space there, or choose another path",
    errno.EDQUOT: "free space there, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle: choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold many files open",
    errno.EIO: "the disk or the network file system fails: check it",
    errno.ESTALE: "the network file system has lost it: mount it again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "name a file",
}


class UserError(Exception):
    """A mistake in a setting, file or command line: the message says what, where, and the way out."""


def plain(text: object, longest: int = LONGEST_QUOTE) -> str:
    """`text` on one line that a terminal shows as it is: control characters and invalid UTF-8 escaped, the middle cut
    out where it is longer than `longest` characters.
    """
    text = str(text)
    if len(text) > longest:
        tail = longest // 3
        text = f"{text[: longest - tail - 5]} ... {text[-tail:]}"
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char in "\n\r\t":
        return " "
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii") if not char.isspace() else " "


def system_reason(error: OSError) -> str:
    """What the operating system answered and the way out, for the end of a message: "Permission denied: give ..."."""
    reason = error.strerror or str(error) or type(error).__name__
    way = _WAYS.get(error.errno or 0, "check the path, its disk and its permissions")
    return f"{reason}: {way}"


def system_error(error: OSError) -> UserError:
    """The UserError for an answer of the operating system, with the file that it names."""
    path = "standard output, or a file that is open," if error.filename is None else error.filename
    if isinstance(path, bytes):
        path = path.decode("utf-8", "surrogateescape")
    return UserError(f"{path} cannot be used: {system_reason(error)}")
