"""The two files of a shard: records, and an index of them. See `ldm.data.shards`.

`<name>-<process>-<number>.shard` has the records, one behind the other:

    offset  bytes  content (little-endian)
         0      4  "LDM1"
         4      4  length of the record in bytes
         8     32  key
        40      4  bytes of a value (2: float16, 4: float32), number of dimensions, 2 zeros
        44     16  shape, 4 numbers
        60      4  CRC-32 of the 60 bytes before and of the values
        64         values in C order

`<name>-<process>-<number>.index` begins with INDEX_MAGIC and has 24 bytes for each record: the first 8 bytes of the key
(big-endian), offset and length of the record (4 bytes each), and a checksum (8 bytes).
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.shard_index import Place
from ldm.errors import UserError, plain
from ldm.files.inputs import open_file

MAX_VALUES = 1 << 30  # bytes of an array; with SHARD_BYTES, this keeps offset and length below 2**32

HEADER = struct.Struct("<4sI32sBB2x4II")
MAGIC = b"LDM1"
MAX_DIMENSIONS = 4
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<f2"), 4: np.dtype("<f4")}  # the types that networks compute in

ENTRY = np.dtype([("prefix", ">u8"), ("offset", "<u4"), ("length", "<u4"), ("check", "<u8")])
INDEX_MAGIC = b"LDM cache index 1\n".ljust(ENTRY.itemsize, b"\0")
# Fractional parts of the square roots of 2, 3 and 5. They are odd, so that every change of one field changes the sum.
CHECK_FACTORS = (0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B)


class Shard:
    """A pair of files: `path` with the records, and its index, of which `entries` have been read."""

    def __init__(self, path: Path, order: tuple[int, int], place: int, complete: bool = False):
        self.path, self.index_path = path, path.with_suffix(".index")
        self.order, self.place = order, place  # (number, process); place in the list of shards
        self.entries, self.complete = 0, complete


class ShardWriter:
    """The shard that this process writes. Raises FileExistsError if it exists, and OSError."""

    def __init__(self, shard: Shard):
        self.shard, self.size, self._count = shard, 0, 0
        with ExitStack() as stack:  # closes the files if an error comes
            self._records = stack.enter_context(open(shard.path, "xb", buffering=0))
            self._index = stack.enter_context(open(shard.index_path, "xb", buffering=0))
            _write_at(self._index.fileno(), INDEX_MAGIC, 0)
            self._files = stack.pop_all()

    def append(self, record: bytes) -> Place:
        _write_at(self._records.fileno(), record, self.size)
        place = Place(self.shard.place, self.size, len(record))
        prefix = int.from_bytes(record[8:16], "big")  # the key is at byte 8
        entry = struct.pack("<8sIIQ", record[8:16], *place[1:], entry_check(prefix, place.offset, place.length))
        _write_at(self._index.fileno(), entry, (1 + self._count) * ENTRY.itemsize)
        self.size += len(record)
        self._count += 1
        return place

    def flush(self) -> None:
        os.fsync(self._records.fileno())  # first, so that no entry is seen before its record
        os.fsync(self._index.fileno())

    def close(self) -> None:
        self._files.close()


def make_record(key: bytes, array: np.ndarray) -> bytes:
    """Return the bytes of a record: the header and the values of an array of one of DTYPES."""
    shape = array.shape + (0,) * (MAX_DIMENSIONS - array.ndim)
    header = HEADER.pack(MAGIC, HEADER.size + array.nbytes, key, array.itemsize, array.ndim, *shape, 0)[:-4]
    values = array.tobytes()
    return header + struct.pack("<I", zlib.crc32(values, zlib.crc32(header))) + values


def read_record(path: Path, offset: int, length: int, key: bytes, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """Return the array of a record, or None if it belongs to another key with the same first 64 bits.

    Raises:
        UserError: The file cannot be read, the record is damaged, or the array cannot be used.
    """
    subject = f"{plain(path)}, byte {offset}"
    with open_file(path, way="it was removed") as file:
        try:
            # The index may be damaged, and the shard truncated: nothing is allocated for what the file does not have.
            if not HEADER.size <= length <= min(os.fstat(file.fileno()).st_size - offset, HEADER.size + MAX_VALUES):
                raise UserError(f"{subject}: the file ends before the record of {length:,} bytes does")
            record = bytearray(length)
            _read_at(file.fileno(), record, offset)
        except OSError as error:
            raise UserError(f"{subject}: the record cannot be read ({error.strerror})") from None
    header = bytes(record[: HEADER.size])
    magic, stated_length, stored_key, item_size, dimensions, *sizes, checksum = HEADER.unpack(header)
    if magic != MAGIC:
        raise UserError(f"{subject}: the record is damaged, or of another version")
    if checksum != zlib.crc32(memoryview(record)[HEADER.size :], zlib.crc32(header[:-4])):
        raise UserError(f"{subject}: the record is damaged")
    # The checksum only shows that the record is unchanged. An index of another shard may lead to it.
    if stored_key != key:
        if stored_key[:8] == key[:8]:
            return None
        raise UserError(f"{subject}: the record has another key")
    dtype, stored_shape = DTYPES.get(item_size), tuple(sizes[:dimensions])
    if dtype is None or dimensions > MAX_DIMENSIONS or stated_length != length:
        raise UserError(f"{subject}: the record is damaged, or of another version")
    # NumPy bounds the product of the sizes even where one of them is 0.
    if math.prod(stored_shape) * item_size != len(record) - HEADER.size or math.prod(filter(None, sizes)) > MAX_VALUES:
        raise UserError(f"{subject}: the record's {length:,} bytes do not suit the shape {stored_shape}")
    array = np.frombuffer(record, dtype, offset=HEADER.size).reshape(stored_shape)
    check_array(array, shape, subject)
    return array


def check_array(array: np.ndarray, shape: tuple[int, ...] | None, subject: str) -> None:
    """Raise UserError if an array has another shape than expected, or is not finite."""
    if shape is not None and array.shape != tuple(shape):
        raise UserError(f"{subject}: the shape is {array.shape}, not {tuple(shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{subject}: the values are not finite")


def _read_at(handle: int, buffer: bytearray, offset: int) -> None:
    """Fill `buffer` with the bytes at `offset`. What the file does not have is left as it is. Raises OSError."""
    view = memoryview(buffer)
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            return
        view, offset = view[count:], offset + count


def _write_at(handle: int, content: bytes, offset: int) -> None:
    """Write all of `content` at `offset`. Raises OSError."""
    view = memoryview(content)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def entry_check(prefix: Any, offset: Any, length: Any) -> Any:
    """Return the checksum of an index entry, from integers, or of many, from arrays of uint64, which wrap around."""
    first, second, third = CHECK_FACTORS
    return ((prefix + 1) * first + offset * second + length * third) & 0xFFFFFFFFFFFFFFFF
