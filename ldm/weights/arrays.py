"""Arrays by name, each made when it is asked for: what every reader gives and every writer takes."""

from __future__ import annotations

import math
import mmap
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.npy import MOST_DIMENSIONS

PAGE = mmap.PAGESIZE
# Bounds of a file's content, far above every published Stable Diffusion checkpoint.
MOST_TENSORS = 100_000
MOST_ELEMENTS = 1 << 40  # of one tensor
MOST_NAME = 1000  # characters
# Tensors may lie in one storage, and be repetitions of a part: all together hold so many times the file's bytes, or
# 64 MB in a small file. Weights that are tied in pairs make 2 of it.
MOST_SHARED, SMALL = 8, 64 << 20
# What stands for bfloat16 where arrays are written; numpy has none. Reading widens it to float32.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """`array` rounded to the nearest bfloat16, to even between two; for finite values."""
    bits = np.asarray(array, np.float32, order="C").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(BFLOAT16)


class Arrays(Mapping):
    """A mapping from name to numpy array whose element types and shapes are known before anything is read."""

    @abstractmethod
    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Element type and shape of the array that `self[name]` gives."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spec(name)[1]

    def release(self, name: str) -> None:
        """Say that the memory which reading `name` took is not needed any more."""


@dataclass
class Entry:
    """Where one array lies in the mapped file: element type ("bf16" or numpy's), shape, (offset, size) of its pieces
    in bytes; and the steps between elements in bytes where they are not in order (one piece then).
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]] = field(default_factory=list)
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.pieces)


class Checkpoint(Arrays):
    """The arrays of an opened checkpoint, a file or a folder.

    Attributes:
        path: The file or folder.
        format: What it is: "safetensors", "ckpt" (MindSpore's), "torch" or "diffusers" (a folder).
        metadata: Texts beside the arrays.
    """

    path: Path
    format: str
    metadata: dict[str, str]


class CheckpointFile(Checkpoint):
    """An opened checkpoint file: a mapping from name to numpy array, each array made when it is asked for.

    The arrays are read-only views of the mapped file (bfloat16 is widened to float32, which is exact), so going through
    all of them one by one holds one at a time. `metadata` holds the file's texts, `shape(name)` needs no reading.
    """

    def __init__(self, path: Path, format: str, data: mmap.mmap, entries: dict[str, Entry], metadata: dict[str, str]):
        self.path = path
        self.format = format
        self.metadata = metadata
        self._data = data
        self._entries = entries
        self._check_bounds()

    def _check_bounds(self) -> None:
        """Raise UserError for more than numpy or this machine's memory takes, before any array is made."""
        damaged = f"{self.path} is damaged or no checkpoint"
        again = "fetch or write it again"
        if len(self._entries) > MOST_TENSORS:
            raise UserError(f"{damaged}: it names {len(self._entries):,} tensors, at most {MOST_TENSORS:,}: {again}")
        total = 0
        for name, entry in self._entries.items():
            if len(name) > MOST_NAME:
                raise UserError(
                    f"{damaged}: the name {plain(name, 100)} has {len(name):,} characters, at most "
                    f"{MOST_NAME:,}: {again}"
                )
            if len(entry.shape) > MOST_DIMENSIONS:
                raise UserError(
                    f"{damaged}: {plain(name)} has {len(entry.shape):,} dimensions, at most {MOST_DIMENSIONS}: {again}"
                )
            # A size of 0 does not make the others smaller: numpy counts them.
            if math.prod(size or 1 for size in entry.shape) > MOST_ELEMENTS:
                raise UserError(
                    f"{damaged}: {plain(name)} is {plain(entry.shape)}, more than {MOST_ELEMENTS:,} elements: {again}"
                )
            total += math.prod(entry.shape) * self.spec(name)[0].itemsize
        if total > max(MOST_SHARED * len(self._data), SMALL):
            raise UserError(
                f"{damaged}: its tensors repeat one another, {total:,} bytes in a file of {len(self._data):,}: {again}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype = np.dtype("<u2" if entry.dtype == "bf16" else entry.dtype)
        if entry.strides is not None:
            array = np.ndarray(entry.shape, dtype, self._data, entry.pieces[0][0], entry.strides)
            array.flags.writeable = False
        else:
            pieces = [
                np.frombuffer(self._data, dtype, size // dtype.itemsize, start) for start, size in entry.pieces if size
            ]
            if not pieces:
                array = np.zeros(0, dtype)
            else:
                array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if entry.dtype == "bf16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        entry = self._entries[name]
        return np.dtype("<f4" if entry.dtype == "bf16" else entry.dtype), entry.shape

    def release(self, name: str) -> None:
        """Let the system drop the pages of the mapped file: read again, they come from the disk again."""
        for start, size in self._entries[name].pieces:
            first = start // PAGE * PAGE
            if size:
                self._data.madvise(mmap.MADV_DONTNEED, first, start + size - first)
