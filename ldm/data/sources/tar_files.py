"""Reading tar archives from beginning to end, header by header, with the offset of every member.

Python's tarfile takes a damaged header for the end of the archive without a word, keeps every member in memory and
needs 30 us a member. Here a damaged header is an error that names its place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ldm.errors import UserError, plain, system_reason
from ldm.files.inputs import open_file

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes
MAX_EXTENSION = 1 << 20  # bytes of an extended header, which holds a long name
MAX_PADDING = 1 << 20  # bytes after the end mark; tar fills up to 10,240
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2"), (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)  # fmt: skip


class Member(NamedTuple):
    """A regular file in a tar archive."""

    name: str
    offset: int  # of its content in the archive, bytes
    size: int  # bytes
    path: str  # of the archive
    file: BinaryIO  # the open archive

    def read(self) -> bytes:
        """Return the content. Raises UserError if it cannot be read."""
        path = plain(self.path)
        try:
            self.file.seek(self.offset)
            content = self.file.read(self.size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {system_reason(error)}") from None
        if len(content) < self.size:
            raise _broken(path, self.offset, f"the content of {plain(self.name)} is cut off")
        return content


def _broken(path: str, offset: int, reason: str) -> UserError:
    return UserError(f"{path} is broken at byte {offset:,}: {reason}; download or write it again, or take it out")


def tar_members(path: str) -> Iterator[Member]:
    """Yield the regular files of an archive in its order. Folders, links and devices are passed over.

    Only headers are read. A member's content can be read until the next one is asked for.

    Raises:
        UserError: The file cannot be read, is compressed or no tar, or is damaged or cut off; with the byte.
    """
    shown = plain(path)
    with open_file(path, way="give a tar file") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UserError(f"{shown} is an empty file: download or write it again, or take it out")
        offset = 0
        long_name = b""
        long_size = -1
        while True:
            header = _read(file, shown, offset, BLOCK)
            if not offset:
                _check_tar(shown, header)
            if len(header) < BLOCK:
                if header or long_name:
                    raise _broken(shown, offset, "a header is cut off")
                logger.warning(
                    "%s ends without the mark of a tar's end: it may be cut off after the last member", shown
                )
                return
            if header == bytes(BLOCK):
                if size - offset > MAX_PADDING + BLOCK:
                    raise _broken(shown, offset, f"{size - offset:,} bytes follow the end mark and would not be read")
                return
            length = _check_header(shown, offset, header)
            kind, content = header[156:157], offset + BLOCK
            if kind not in b"xLgK" and long_size >= 0:
                length, long_size = long_size, -1
            if content + length > size:
                name = plain(_name(header, long_name))
                raise _broken(shown, offset, f"{name} has {length:,} bytes there, and the file ends before that")
            if kind in b"xL":
                if length > MAX_EXTENSION:
                    raise _broken(shown, offset, f"an extended header of {length:,} bytes")
                extension = _read(file, shown, content, length)
                if kind == b"L":
                    long_name = extension.rstrip(b"\0")
                else:
                    fields = _pax_fields(shown, offset, extension)
                    if b"GNU.sparse.major" in fields or b"GNU.sparse.map" in fields:
                        raise _broken(shown, offset, "a sparse file, as tar --sparse writes it")
                    long_name = fields.get(b"path", long_name)
                    if b"size" in fields:
                        long_size = _number(shown, offset, fields[b"size"], 10)
            elif kind in b"\x0007":
                yield Member(os.fsdecode(_name(header, long_name)), content, length, path, file)
                long_name = b""
            elif kind in b"123456VgK":  # links, devices, folders, a volume's label, global fields, a link's long name
                long_name = b"" if kind not in b"gK" else long_name
            else:
                raise _broken(shown, offset, f"a member of the unsupported type {kind!r}")
            offset = content + (length + BLOCK - 1) // BLOCK * BLOCK


def _read(file: BinaryIO, shown: str, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {system_reason(error)}") from None


def _check_tar(shown: str, header: bytes) -> None:
    """Raise UserError for a file that is no tar at all."""
    for magic, name, command in _COMPRESSED:
        if header.startswith(magic):
            raise UserError(
                f"{shown} is compressed with {name}, in which no image can be found: decompress it ({command})"
            )
    try:
        sound = header == bytes(BLOCK) or (len(header) == BLOCK and _check_header(shown, 0, header) >= 0)
    except UserError:
        sound = False
    if not sound:
        raise UserError(f"{shown} is no tar file: download or write it again, or take it out")


def _check_header(shown: str, offset: int, header: bytes) -> int:
    """Return the size of the member. Raises UserError if the checksum or the size is wrong."""
    expected = _number(shown, offset, header[148:156], 8)
    # The checksum's own field counts as eight spaces.
    if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
        raise _broken(shown, offset, "a header is damaged (its checksum differs)")
    field = header[124:136]
    if field[0] & 0x80:  # a binary number, for more than 8 GB
        return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
    return _number(shown, offset, field, 8)


def _number(shown: str, offset: int, field: bytes, base: int) -> int:
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or len(digits) > 20:
        raise _broken(shown, offset, "a header is damaged (a number is none)")
    try:
        return int(digits, base)
    except ValueError:
        raise _broken(shown, offset, "a header is damaged (a number is none)") from None


def _name(header: bytes, long_name: bytes) -> bytes:
    if long_name:
        return long_name
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_fields(shown: str, offset: int, extension: bytes) -> dict[bytes, bytes]:
    """Return the fields of an extended header: lines of "length key=value", the length being the line's."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(extension):
        digits, _, _ = extension[at : at + 21].partition(b" ")
        length = _number(shown, offset, digits, 10)
        line = extension[at : at + length]
        if length < 5 or len(line) < length or not line.endswith(b"\n"):
            raise _broken(shown, offset, "an extended header is damaged")
        key, _, value = line[len(digits) + 1 : -1].partition(b"=")
        fields[key] = value
        at += length
    return fields
