"""Arrays by name that are read only when they are asked for: what all readers return and all writers take."""

from __future__ import annotations

import math
import mmap
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.npy import MAX_DIMENSIONS

PAGE = mmap.PAGESIZE
# Bounds for the content of a file, far above those of every published Stable Diffusion checkpoint.
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 40  # of one tensor
MAX_NAME = 1000  # characters
# Several tensors may share one storage, and a tensor may repeat a part of it. All tensors together hold at most
# MAX_SHARED times the bytes of the file, or SMALL bytes for a small file. Weights tied in pairs need a factor of 2.
MAX_SHARED, SMALL = 8, 64 << 20
# These stand for the types in files that numpy does not have. Arrays that are read are widened to float32.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
FLOAT8_E4M3 = np.dtype([("float8_e4m3", "u1")])  # without infinities, torch's float8_e4m3fn
FLOAT8_E5M2 = np.dtype([("float8_e5m2", "u1")])
WIDENED = (BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2)


def widen(array: np.ndarray) -> np.ndarray:
    """Return an array of one of the types WIDENED as float32, which is exact. Any other array is returned as it is."""
    if array.dtype == BFLOAT16:
        return (array.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if array.dtype == FLOAT8_E5M2:  # the upper byte of float16
        return (array.view(np.uint8).astype("<u2") << 8).view("<f2").astype(np.float32)
    if array.dtype == FLOAT8_E4M3:
        return _E4M3_VALUES[array.view(np.uint8)]
    return array


def _e4m3_values() -> np.ndarray:
    """Return the value of each byte: a sign, 4 bits of exponent with bias 7, and 3 of mantissa (Micikevicius 2022)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[byte & 127 == 127] = np.nan
    return np.where(byte < 128, values, -values).astype(np.float32)


_E4M3_VALUES = _e4m3_values()


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round finite values to the nearest bfloat16, ties to even. Returns an array of type BFLOAT16."""
    bits = np.asarray(array, np.float32, order="C").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(BFLOAT16)


class Arrays(Mapping[str, np.ndarray]):
    """A mapping from name to array whose element types and shapes are known before an array is read."""

    @abstractmethod
    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Return the element type and the shape of `self[name]`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `self[name]`."""
        return self.spec(name)[1]

    def release(self, name: str) -> None:
        """Free the memory that reading `name` took. It can be read again."""


class Checkpoint(Arrays):
    """The arrays of an opened checkpoint, a file or a folder.

    Attributes:
        path: The file or folder.
        format: "safetensors", "ckpt" (MindSpore's), "torch" or "diffusers" (a folder).
        metadata: Texts beside the arrays.
    """

    path: Path
    format: str
    metadata: dict[str, str]

    def stored_type(self, name: str) -> str:
        """Return the name of the element type in the file, such as "bfloat16", which reading may widen."""
        return self.spec(name)[0].name


class CheckpointView(Checkpoint):
    """Arrays from other places, under names of its own.

    Attributes:
        sources: Name -> (arrays, name in them).
    """

    sources: dict[str, tuple[Arrays, str]]

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        arrays, inner = self.sources[name]
        return arrays.spec(inner)

    def release(self, name: str) -> None:
        arrays, inner = self.sources[name]
        arrays.release(inner)

    def __getitem__(self, name: str) -> np.ndarray:
        arrays, inner = self.sources[name]
        return arrays[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


class RenamedCheckpoint(CheckpointView):
    """Some arrays of a checkpoint under other names, with its path and metadata.

    Args:
        checkpoint: The checkpoint.
        names: New name -> name in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]):
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.sources = {name: (checkpoint, inner) for name, inner in names.items()}


class ArraysInMemory(dict[str, np.ndarray], Arrays):
    """Arrays that are in memory already. They are written with little-endian elements."""

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        return self[name].dtype.newbyteorder("<"), self[name].shape


def require_arrays(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], path: Path, network: str
) -> dict[str, np.ndarray]:
    """Return the arrays with these names and shapes. A scalar may have the shape (1,).

    Raises:
        UserError: A name is missing or unknown, a shape is wrong, or a value is not finite.
    """
    missing = [name for name in shapes if name not in arrays]
    unknown = [name for name in arrays if name not in shapes]
    if missing or unknown:
        raise UserError(
            f"{path} is not {network}: {len(missing)} of {len(shapes)} arrays are missing, {len(unknown)} unknown "
            f"({plain((missing or unknown)[0])}, ...)"
        )
    read = {}
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape not in (shape, shape or (1,)):
            raise UserError(f"{path}: {name} is {array.shape}, wanted {shape}: this is another network")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds values that are not finite: fetch the file again")
        read[name] = array.reshape(shape)
    return read


class Entry(NamedTuple):
    """Where an array lies in a mapped file.

    Attributes:
        dtype: Element type in the file.
        shape: Shape of the array.
        pieces: (offset, size) in bytes of the parts that together make up the array.
        strides: Bytes between elements, if they are not contiguous. The array is then one piece.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]]
    strides: tuple[int, ...] | None = None


class CheckpointFile(Checkpoint):
    """A checkpoint file that is mapped into memory.

    Arrays are read-only views of the mapped file, or copies where an array is not aligned in the file. bfloat16 and the
    types of 8 bits are widened to float32, which is exact. A loop over all arrays that releases each one holds one
    array at a time.

    Raises:
        UserError: The file declares more than the bounds above. No array has been made then.
    """

    def __init__(self, path: Path, format: str, data: mmap.mmap, entries: dict[str, Entry], metadata: dict[str, str]):
        self.path = path
        self.format = format
        self.metadata = metadata
        self._data = data
        self._entries = entries
        self._check_bounds()

    def _check_bounds(self) -> None:
        def refuse(problem: str) -> NoReturn:
            raise UserError(f"{self.path} is damaged or no checkpoint: {problem}: fetch or write it again")

        if len(self._entries) > MAX_TENSORS:
            refuse(f"it names {len(self._entries):,} tensors, at most {MAX_TENSORS:,}")
        total = 0
        for name, entry in self._entries.items():
            if len(name) > MAX_NAME:
                refuse(f"the name {plain(name, 100)} has {len(name):,} characters, at most {MAX_NAME:,}")
            if len(entry.shape) > MAX_DIMENSIONS:
                refuse(f"{plain(name)} has {len(entry.shape):,} dimensions, at most {MAX_DIMENSIONS}")
            # numpy refuses large dimensions even where another dimension is 0.
            if math.prod(size or 1 for size in entry.shape) > MAX_ELEMENTS:
                refuse(f"{plain(name)} is {plain(entry.shape)}, more than {MAX_ELEMENTS:,} elements")
            total += math.prod(entry.shape) * self.spec(name)[0].itemsize
        if total > max(MAX_SHARED * len(self._data), SMALL):
            refuse(f"its tensors overlap, {total:,} bytes in a file of {len(self._data):,}")

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype = entry.dtype
        array: np.ndarray
        if entry.strides is not None:
            array = np.ndarray(entry.shape, dtype, self._data, entry.pieces[0][0], entry.strides)
            array.flags.writeable = False
        else:
            pieces = [
                np.frombuffer(self._data, dtype, size // dtype.itemsize, start) for start, size in entry.pieces if size
            ]
            array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, dtype)])
        if not array.flags.aligned:  # a .ckpt of MindSpore, whose Tensor refuses such arrays in its version 2.7
            array = array.copy()
            array.flags.writeable = False
        return widen(array).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        entry = self._entries[name]
        return np.dtype("<f4") if entry.dtype in WIDENED else entry.dtype, entry.shape

    def stored_type(self, name: str) -> str:
        dtype = self._entries[name].dtype
        return dtype.names[0] if dtype.names else dtype.name

    def release(self, name: str) -> None:
        """Let the system drop the pages of the array. Reading it again reads the disk."""
        for start, size in self._entries[name].pieces:
            first = start // PAGE * PAGE
            if size:
                self._data.madvise(mmap.MADV_DONTNEED, first, start + size - first)
