"""MindSpore's .ckpt format, a protobuf message (`checkpoint.proto`: repeated Value {tag, tensor {dims, type, data}}).

`mindspore.load_checkpoint` parses the whole message, so that file, message and tensors are in memory at once. Since the
wire format is a sequence, this module reads names, shapes and offsets when a file is opened, and each array from the
mapped file when it is asked for. Both directions are tested against MindSpore's own functions.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.npy import MAX_DIMENSIONS
from ldm.weights.arrays import BFLOAT16, MAX_NAME, MAX_TENSORS, Arrays, Checkpoint, CheckpointFile, Entry
from ldm.weights.recognise import describe_file

DTYPES: dict[str, np.dtype] = {"BFloat16": BFLOAT16, **{name: np.dtype(code) for name, code in {
    "Float64": "<f8", "Float32": "<f4", "Float16": "<f2", "Int64": "<i8", "Int32": "<i4",
    "Int16": "<i2", "Int8": "i1", "UInt64": "<u8", "UInt32": "<u4", "UInt16": "<u2", "UInt8": "u1", "Bool": "?",
}.items()}}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 512 * 1024 * 1024  # bytes of one tensor in one protobuf message, as MindSpore slices them
MAX_TEXT = 64 << 20  # bytes of a text, which has four per character
CRC_TAIL = 17  # bytes of b"crc_num" and a number of 10 bytes, which MindSpore appends as an option


class _CutOff(Exception):
    """A field ends after the message that contains it."""


class _NotACheckpoint(Exception):
    """A field is not one of checkpoint.proto."""


class _Tensor(NamedTuple):
    """A tensor as the file has it: the name of its type, its shape, and (offset, size) of its pieces."""

    type: str
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]]


def open_ckpt(path: Path, data: mmap.mmap) -> Checkpoint:
    """Open a .ckpt file that is mapped into memory.

    Raises:
        UserError: The file is cut off, damaged, or something else.
    """
    end = len(data)
    if data[-CRC_TAIL:-10] == b"crc_num":
        end -= CRC_TAIL
        _check_crc(path, data, end)
    tensors: dict[str, _Tensor] = {}
    last, values = None, 0
    try:
        for number, wire, start, stop in _fields(data, 0, end):
            if (number, wire) != (1, 2):
                raise _NotACheckpoint(f"field {number} at byte {start}")
            name, tensor = _parse_value(data, start, stop)
            if values == MAX_TENSORS:
                raise _NotACheckpoint(f"more than {MAX_TENSORS:,} tensors")
            values += 1
            if name == last and tensor.shape == tensors[name].shape:  # a large tensor lies in several pieces, in order
                tensors[name].pieces.extend(tensor.pieces)
            elif name in tensors:
                raise _NotACheckpoint(f"{plain(name)!r} twice")
            else:
                tensors[name] = tensor
            last = name
    except (_CutOff, _NotACheckpoint, UnicodeDecodeError) as error:
        # The first length in a file of another format makes no sense. A cut-off file has at least one whole name.
        if not tensors and not _starts_with_a_name(data, end):
            raise UserError(f"{path} is {describe_file(path, data[:512])}") from error
        if isinstance(error, _CutOff):
            problem = f"cut off{f' after {plain(last)!r}' if last else ''} ({len(data)} bytes)"
        else:
            problem = f"a damaged MindSpore .ckpt ({error})"
        raise UserError(f"{path} is {problem}: fetch or write it again") from error

    metadata, entries = {}, {}
    for name, tensor in tensors.items():
        size = sum(size for _, size in tensor.pieces)
        if tensor.type == "str":
            if size > MAX_TEXT:
                raise UserError(
                    f"{path}: the text {plain(name)!r} has {size:,} bytes, at most {MAX_TEXT:,} are read: write the "
                    "file again without it"
                )
            try:
                raw = b"".join(data[start : start + length] for start, length in tensor.pieces)
                metadata[name] = raw.decode("utf-32-le").rstrip("\0")
            except UnicodeDecodeError as error:
                message = f"{path} is a damaged MindSpore .ckpt (the text {plain(name)!r}): write it again"
                raise UserError(message) from error
            continue
        if tensor.type not in DTYPES:
            raise UserError(
                f"{path}: {plain(name)} is of type {plain(tensor.type)}, which cannot be read: save it as Float32"
            )
        dtype = DTYPES[tensor.type]
        # Older versions of MindSpore write a scalar with the shape (0,).
        shape = () if tensor.shape == (0,) and size == dtype.itemsize else tensor.shape
        if size != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is damaged: {plain(name)} {plain(shape)} holds {size} bytes: write it again")
        entries[name] = Entry(dtype, shape, tensor.pieces)
    return CheckpointFile(path, "ckpt", data, entries, metadata)


def _check_crc(path: Path, data: mmap.mmap, end: int) -> None:
    crc = 0
    for start in range(0, end, 1 << 24):
        crc = zlib.crc32(data[start : min(end, start + (1 << 24))], crc)
    if crc != int.from_bytes(data[-10:], "big"):
        raise UserError(f"{path} is damaged: its checksum does not fit its content: fetch or write it again")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= end or shift > 63:
            raise _CutOff
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message as (number, wire type, start, stop). For an integer, `start` is its value."""
    while position < end:
        key, position = _varint(data, position, end)
        number, wire = key >> 3, key & 7
        if wire == 2:
            size, position = _varint(data, position, end)
            if position + size > end:
                raise _CutOff
            yield number, wire, position, position + size
            position += size
        elif wire == 0:
            value, position = _varint(data, position, end)
            yield number, wire, value, position
        else:
            raise _NotACheckpoint(f"wire type {wire} at byte {position}")


def _parse_value(data: mmap.mmap, start: int, end: int) -> tuple[str, _Tensor]:
    """Parse a Value. A field that is repeated is refused, since reading many repetitions would take hours."""
    name = tensor = None
    for number, wire, first, last in _fields(data, start, end):
        if (number, wire) == (1, 2) and name is None:
            name = _text(data, first, last)
        elif (number, wire) == (2, 2) and tensor is None:
            tensor = _parse_tensor(data, first, last)
        else:
            raise _NotACheckpoint(f"field {number} of a value at byte {first}")
    if name is None or tensor is None:
        raise _NotACheckpoint(f"an incomplete value at byte {start}")
    return name, tensor


def _parse_tensor(data: mmap.mmap, start: int, end: int) -> _Tensor:
    dtype, shape, piece = None, [], None
    for number, wire, first, last in _fields(data, start, end):
        if (number, wire) == (1, 0):
            shape.append(first)
        elif (number, wire) == (1, 2):  # packed
            while first < last and len(shape) <= MAX_DIMENSIONS:
                size, first = _varint(data, first, last)
                shape.append(size)
        elif (number, wire) == (2, 2) and dtype is None:
            dtype = _text(data, first, last)
        elif (number, wire) == (3, 2) and piece is None:
            piece = (first, last - first)
        else:
            raise _NotACheckpoint(f"field {number} of a tensor at byte {first}")
        if len(shape) > MAX_DIMENSIONS:
            raise _NotACheckpoint(f"more than {MAX_DIMENSIONS} dimensions of a tensor at byte {start}")
    if dtype is None or piece is None:
        raise _NotACheckpoint(f"an incomplete tensor at byte {start}")
    return _Tensor(dtype, tuple(shape), [piece])


def _text(data: mmap.mmap, start: int, end: int) -> str:
    if end - start > MAX_NAME:
        raise _NotACheckpoint(f"a name of {end - start:,} bytes at byte {start}")
    return data[start:end].decode("utf-8")


def _starts_with_a_name(data: mmap.mmap, end: int) -> bool:
    """Whether the file begins like a Value: a length, then a tag of printable characters."""
    try:
        _, position = _varint(data, 1, end)
        if data[position] != 0x0A:
            return False
        size, position = _varint(data, position + 1, end)
        return 0 < size < 1024 and data[position : min(end, position + size)].decode("utf-8").isprintable()
    except (_CutOff, IndexError, UnicodeDecodeError):
        return False


def write_ckpt(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write a .ckpt file. One array at a time is in memory.

    Raises:
        TypeError: The format does not have an element type.
    """
    for name in arrays:
        if arrays.spec(name)[0] not in DTYPE_NAMES:
            raise TypeError(f"{name}: {arrays.spec(name)[0]} cannot be written to a .ckpt")
    with open(path, "wb") as file:
        for name in arrays:
            dtype, shape = arrays.spec(name)
            content = np.asarray(arrays[name], dtype, order="C").reshape(-1).view(np.uint8)
            for start in range(0, max(1, len(content)), CHUNK):
                _write_value(file, name, shape, DTYPE_NAMES[dtype], content[start : start + CHUNK].data)
            arrays.release(name)
        for name, text in metadata.items():
            _write_value(file, name, [0], "str", np.array(text).astype("<U").tobytes())


def _write_value(file: BinaryIO, name: str, shape: Sequence[int], dtype: str, content: bytes | memoryview) -> None:
    def encoded(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        return bytes(out)

    def prefix(number: int, size: int) -> bytes:
        return encoded(number << 3 | 2) + encoded(size)

    tensor = b"".join(b"\x08" + encoded(size) for size in shape) + prefix(2, len(dtype)) + dtype.encode()
    tensor += prefix(3, len(content))
    tag = name.encode("utf-8")
    value = prefix(1, len(tag)) + tag + prefix(2, len(tensor) + len(content)) + tensor
    file.write(prefix(1, len(value) + len(content)) + value)
    file.write(content)
