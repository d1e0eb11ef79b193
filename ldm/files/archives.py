"""Bounded reading of untrusted zip archives, such as PyTorch checkpoints and .npz files."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib

from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

MAX_LIST = 16 << 20  # bytes of the archive's directory; zipfile needs 13 times as many in memory
CHUNK = 1 << 20

# What zipfile raises for a damaged archive, a password (RuntimeError) and unsupported features (NotImplementedError).
_MALFORMED = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error, zlib.error)


class _BoundedFile(io.BufferedReader):
    """A file for zipfile, which reads the archive's whole directory at once, whatever size the archive declares."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_LIST:
            raise zipfile.BadZipFile(f"the list of its members has {size:,} bytes, at most {MAX_LIST:,} are read")
        return super().read(size)


class Archive:
    """An open zip archive, to be used as a context manager. `members` are its entries by their names.

    `kind` is what the file should be ("a PyTorch file") and `way` what the user can do otherwise, for errors.

    Raises:
        UserError: The file does not exist, is not a regular file, or is not a readable archive.
    """

    def __init__(self, path: str | os.PathLike, kind: str, way: str):
        self._path, self._kind, self._way = plain(os.fspath(path)), kind, way
        self._file = _BoundedFile(open_file(path, way=way).detach())
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _MALFORMED as error:
            self._file.close()
            raise self._malformed(error) from None
        self.members = {member.filename: member for member in self._archive.infolist()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()
        self._file.close()

    def read(self, name: str, most: int) -> bytes:
        """Return the content of a member.

        Raises:
            UserError: The content has more than `most` bytes or cannot be decompressed.
        """
        member = self.members[name]
        problem = None
        if member.file_size > most:
            problem = f"has {member.file_size:,} bytes, at most {most:,} are read"
        # zipfile decompresses whole chunks of the other methods, whatever size they expand to.
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "uses an unsupported compression method"
        if problem:
            raise UserError(f"{self._path} is refused: its member {plain(name)} {problem}: {self._way}")
        try:
            with self._archive.open(name) as file:
                return b"".join(iter(lambda: file.read(CHUNK), b""))
        except _MALFORMED as error:
            raise self._malformed(error) from None

    def _malformed(self, error: Exception) -> UserError:
        reason = plain(error, 100) or type(error).__name__
        return UserError(f"{self._path} is not {self._kind}, or is truncated or damaged ({reason}): {self._way}")
