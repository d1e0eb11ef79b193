"""The rows of a data set on disk, for data sets that are too large to be listed in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Union, overload

import numpy as np

from ldm.data.sources.rows import FilePart, Row
from ldm.errors import UserError, plain, system_reason

AT_ONCE = 4096  # rows that are read from the disk together
# 44 bytes a row. The name of the image and the caption are in a file of texts.
_RECORD = np.dtype([
    ("file", "<u4"), ("offset", "<i8"), ("size", "<i8"), ("subset", "<u4"), ("where", "<i8"), ("text", "<i8"),
    ("name_bytes", "<u2"), ("caption_bytes", "<u4"),
])  # fmt: skip
_MAX_NAME = (1 << 16) - 1  # bytes


class RowFile(Sequence[Row]):
    """Rows whose images are parts of larger files. They are kept in temporary files, which have no name.

    Rows are appended, then read. Reading is safe in several threads. The files are in the folder TMPDIR, or else in
    /var/tmp: unlike /tmp, that is a disk on all systems. The system removes them when the process ends.
    """

    def __init__(self) -> None:
        self._files: list[str] = []  # paths of the larger files, in the order in which they come
        self._records, self._texts = _temporary_file(), _temporary_file()
        self._count, self._text_end = 0, 0
        self._waiting: list[tuple[int, ...]] = []  # records that are not written yet
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
        self._waiting.append((
            len(self._files) - 1, image.offset, image.size, row.subset, row.where, self._text_end, len(name),
            len(caption),
        ))  # fmt: skip
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
            if last - first < 4 * AT_ONCE:
                records = self._read(first, last + 1)[part - first]
            else:
                records = np.concatenate([self._read(int(place), int(place) + 1) for place in part])
            _write(taken._records, records.tobytes())
        return taken

    def file_numbers(self) -> np.ndarray:
        """Return the number (N,) int32 of the file that holds each row's image, in the order of their first rows."""
        numbers = np.empty(len(self), np.int32)
        for start in range(0, len(self), AT_ONCE):
            end = min(start + AT_ONCE, len(self))
            numbers[start:end] = self._read(start, end)["file"]
        return numbers

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
        return next(self._rows(place, place + 1))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._rows(start, min(start + AT_ONCE, len(self)))

    def _rows(self, start: int, end: int) -> Iterator[Row]:
        records = self._read(start, end)
        # Rows that were taken from others may lie far apart, so that their texts are read one by one.
        first = int(records["text"][0])
        span = int(records["text"][-1]) + int(records["name_bytes"][-1]) + int(records["caption_bytes"][-1]) - first
        together = (np.diff(records["text"]) >= 0).all() and span < (1 << 23)
        texts = _read(self._texts, first, span) if together else b""
        for file, offset, size, subset, where, text, name_bytes, caption_bytes in records.tolist():
            if together:
                at = text - first
                both = texts[at : at + name_bytes + caption_bytes]
            else:
                both = _read(self._texts, text, name_bytes + caption_bytes)
            image = FilePart(self._files[file], offset, size, _decode(both[:name_bytes]))
            yield Row(image, _decode(both[name_bytes:]), subset, where)

    def _read(self, start: int, end: int) -> np.ndarray:
        if self._waiting:
            self._write()
        content = _read(self._records, start * _RECORD.itemsize, (end - start) * _RECORD.itemsize)
        return np.frombuffer(content, _RECORD)

    def _write(self) -> None:
        if self._waiting:
            _write(self._records, np.array(self._waiting, _RECORD).tobytes())
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
        "to a folder with more room: each image takes 44 bytes, and its name and caption"
    )
