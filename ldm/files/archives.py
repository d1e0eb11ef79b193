"""Zip archives that anybody may have written, listed and read within bounds: a PyTorch file and an .npz are such."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from types import TracebackType

from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

MOST_LIST = 16 << 20  # bytes of the list of members, 46 and its name for each; zipfile takes 13 times as many
CHUNK = 1 << 20

# What zipfile raises for a damaged archive, a password (RuntimeError) and what it has not (NotImplementedError).
_MALFORMED = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error, zlib.error)


class _Bounded(io.BufferedReader):
    """A file for zipfile, which reads the list of members at once, however long it says that it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MOST_LIST:
            raise zipfile.BadZipFile(f"the list of its members has {size:,} bytes, at most {MOST_LIST:,} are read")
        return super().read(size)


class Archive:
    """An opened zip archive, a context manager. `members` maps their names to what the archive's list says of them.

    kind: what it should be, for errors; way: what to do about one that cannot be read.

    Raises UserError where there is no such regular file, or it is no archive that can be read.
    """

    def __init__(self, path: str | os.PathLike, kind: str, way: str):
        self._path, self._kind, self._way = plain(os.fspath(path)), kind, way
        self._file = _Bounded(open_file(path, way=way).detach())
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _MALFORMED as error:
            self._file.close()
            raise self._malformed(error) from None
        self.members = {member.filename: member for member in self._archive.infolist()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._archive.close()
        self._file.close()

    def read(self, name: str, most: int) -> bytes:
        """The content of a member. Raises UserError for more than `most` bytes and for what cannot be unpacked."""
        member = self.members[name]
        if member.file_size > most:
            raise UserError(
                f"{self._path} is refused: {plain(name)} in it has {member.file_size:,} bytes, at most "
                f"{most:,} are read: {self._way}"
            )
        # The others unpack a chunk as a whole, however much it becomes.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{self._path} is refused: {plain(name)} in it is compressed in a way that is not read "
                f"here: {self._way}"
            )
        try:
            with self._archive.open(name) as file:
                return b"".join(iter(lambda: file.read(CHUNK), b""))
        except _MALFORMED as error:
            raise self._malformed(error) from None

    def _malformed(self, error: Exception) -> UserError:
        reason = plain(error, 100) or type(error).__name__
        return UserError(f"{self._path} is not {self._kind}, or is cut off or damaged ({reason}): {self._way}")
