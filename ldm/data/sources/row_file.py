"""The rows of a data set on disk, for data sets that are too large to be listed in memory."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, Union, overload

import numpy as np

from ldm.data.sources.rows import FilePart, Row
from ldm.errors import UserError, plain, system_reason

AT_ONCE = 4096  # rows that are read from the disk together
_TEXTS_AT_ONCE = 8 << 20  # bytes
_RECORD = struct.Struct("<IqqIqqHI")  # of _Record
_MAX_NAME = (1 << 16) - 1  # bytes


class _Record(NamedTuple):
    """A row without its texts: the name of the image and, behind it, the caption."""

    file: int  # index in RowFile._files
    offset: int  # of the image in that file
    size: int
    subset: int
    where: int
    text: int  # place of the texts
    name_bytes: int
    caption_bytes: int


class RowFile(Sequence[Row]):
    """Rows whose images are parts of larger files. They are kept in temporary files, which have no name.

    Rows are appended, then read. After a first one was read, several threads may read. The files are in the folder
    TMPDIR, or else in /var/tmp: unlike /tmp, that is a disk on all systems. The system removes them when the process
    ends.
    """

    def __init__(self) -> None:
        self._files: list[str] = []  # paths of the larger files, in the order in which they come
        self._records, self._texts = _temporary_file(), _temporary_file()
        self._count, self._text_end = 0, 0
        self._waiting: list[bytes] = []  # records that are not written yet
        self._waiting_texts: list[bytes] = []

    def append(self, row: Row) -> None:
        """Add a row. Raises UserError if the disk is full, and for a name of more than 65,535 bytes."""
        image = row.image
        if not isinstance(image, FilePart):
            raise TypeError("a RowFile holds parts of larger files only")
        if not self._files or self._files[-1] != image.file:
            self._files.append(image.file)
        name, caption = _encode(image.name), _encode(row.caption)
        if len(name) > _MAX_NAME:
            raise UserError(
                f"{plain(image.file)} has a name of {len(name):,} bytes, {plain(image.name, 60)}: shorten it"
            )
        self._waiting.append(
            _RECORD.pack(
                len(self._files) - 1, image.offset, image.size, row.subset, row.where, self._text_end, len(name),
                len(caption),
            )
        )  # fmt: skip
        self._waiting_texts += (name, caption)
        self._text_end += len(name) + len(caption)
        self._count += 1
        if len(self._waiting) == AT_ONCE:
            self._write()

    def take(self, places: np.ndarray) -> RowFile:
        """Return the rows at `places` (n,), which share the texts with these rows."""
        self._write()
        taken = RowFile.__new__(RowFile)
        taken._files, taken._records, taken._texts = self._files, _temporary_file(), self._texts
        taken._count, taken._text_end = len(places), self._text_end
        taken._waiting, taken._waiting_texts = [], []
        for start in range(0, len(places), AT_ONCE):
            part = places[start : start + AT_ONCE]
            first, last = int(part.min()), int(part.max())
            if last - first < 16 * AT_ONCE:
                records = np.frombuffer(self._read(first, last + 1), f"V{_RECORD.size}")
                _write(taken._records, records[part - first].tobytes())
            else:
                _write(taken._records, b"".join(self._read(place, place + 1) for place in part.tolist()))
        return taken

    def file_numbers(self) -> np.ndarray:
        """Return the number (N,) int32 of the file that holds each row's image, in the order of their first rows."""
        parts = (self._read(start, min(start + AT_ONCE, len(self))) for start in range(0, len(self), AT_ONCE))
        numbers = (record[0] for part in parts for record in _RECORD.iter_unpack(part))
        return np.fromiter(numbers, np.int32, len(self))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: Union[int, slice]) -> Union[Row, list[Row]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # raises IndexError, and counts negative places from the end
        record = _Record._make(_RECORD.unpack(self._read(place, place + 1)))
        return self._row(record, _read(self._texts, record.text, record.name_bytes + record.caption_bytes))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._rows(start, min(start + AT_ONCE, len(self)))

    def _rows(self, start: int, end: int) -> Iterator[Row]:
        records = [_Record._make(record) for record in _RECORD.iter_unpack(self._read(start, end))]
        first = min(record.text for record in records)
        last = max(record.text + record.name_bytes + record.caption_bytes for record in records)
        # Rows that were taken from others may lie far apart. Then their texts are read one by one.
        texts = _read(self._texts, first, last - first) if last - first < _TEXTS_AT_ONCE else None
        for record in records:
            at, size = record.text - first, record.name_bytes + record.caption_bytes
            yield self._row(
                record, texts[at : at + size] if texts is not None else _read(self._texts, record.text, size)
            )

    def _row(self, record: _Record, texts: bytes) -> Row:
        name, caption = texts[: record.name_bytes], texts[record.name_bytes :]
        image = FilePart(self._files[record.file], record.offset, record.size, _decode(name))
        return Row(image, _decode(caption), record.subset, record.where)

    def _read(self, start: int, end: int) -> bytes:
        if self._waiting:
            self._write()
        return _read(self._records, start * _RECORD.size, (end - start) * _RECORD.size)

    def _write(self) -> None:
        if self._waiting:
            _write(self._records, b"".join(self._waiting))
            _write(self._texts, b"".join(self._waiting_texts))
            self._waiting, self._waiting_texts = [], []


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a name that is not UTF-8 has lone surrogates


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _folder() -> str:
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    return folder if os.access(folder, os.W_OK) else tempfile.gettempdir()


def _temporary_file() -> BinaryIO:
    try:
        return tempfile.TemporaryFile(dir=_folder(), buffering=0)
    except OSError as error:
        raise _failure("written", error) from None


def _write(file: BinaryIO, content: bytes) -> None:
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _failure("written", error) from None


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise _failure("read", error) from None
    if len(content) < size:
        raise UserError("the temporary file with the rows is cut off: start again")
    return content


def _failure(what: str, error: OSError) -> UserError:
    return UserError(
        f"the temporary file with the rows cannot be {what} in {plain(_folder())}: {system_reason(error)}; set TMPDIR "
        "to a folder with more room: each image takes 46 bytes, and its name and caption"
    )
