"""Checkpoint files: .safetensors and MindSpore .ckpt, read and written without running anything that is in them.

MindSpore's .ckpt is a protobuf message (`checkpoint.proto`: repeated Value {tag, tensor {dims, type, content}}), which
`mindspore.load_checkpoint` parses as a whole: file, message and tensors are then in memory at once. Its wire format is
a plain sequence, so it is walked here instead: names, shapes and offsets at opening, each array from the mapped file
when it is asked for. Both directions are tested against `mindspore.load_checkpoint` and `mindspore.save_checkpoint`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ldm.atomic import atomic_path
from ldm.errors import UserError

SUFFIXES = (".safetensors", ".ckpt")

# Element types by the name that each format gives them; bfloat16, which numpy lacks, is widened to float32.
_SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bf16", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_CKPT_DTYPES = {
    "Float64": "<f8", "Float32": "<f4", "Float16": "<f2", "BFloat16": "bf16", "Int64": "<i8", "Int32": "<i4",
    "Int16": "<i2", "Int8": "i1", "UInt64": "<u8", "UInt32": "<u4", "UInt16": "<u2", "UInt8": "u1", "Bool": "?",
}  # fmt: skip
_CKPT_DTYPE_NAMES = {np.dtype(code): name for name, code in _CKPT_DTYPES.items() if code != "bf16"}

_CKPT_CHUNK = 512 * 1024 * 1024  # bytes of one tensor in one protobuf message, as MindSpore slices them
_CKPT_CRC_TAIL = 17  # b"crc_num" and a number of 10 bytes, which MindSpore appends when asked to

# What a file begins with, and what to call it. Order matters: the first that fits names the file.
_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` or download it again"),
    (b"\x89PNG", "a PNG picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG picture, not a checkpoint"),
    (b"GIF8", "a GIF picture, not a checkpoint"),
    (b"\x93NUMPY", "a numpy .npy file, not a checkpoint"),
    (b"\x89HDF", "an HDF5 file (Keras?), not a checkpoint"),
    (b"GGUF", "a GGUF file, not a checkpoint that can be read here"),
    (b"%PDF", "a PDF, not a checkpoint"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
)


@dataclass
class _Entry:
    """Where one array lies in the mapped file: element type, shape, and (offset, size) of its pieces in bytes."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.pieces)


class Checkpoint(Mapping):
    """An opened checkpoint: a mapping from name to numpy array, each array made when it is asked for.

    The arrays are read-only views of the mapped file (bfloat16 is widened to float32), so going through all of them
    one by one holds one at a time. `metadata` holds the file's texts, `shape(name)` needs no reading.
    """

    def __init__(self, path: Path, format: str, data: mmap.mmap, entries: dict[str, _Entry], metadata: dict[str, str]):
        self.path = path
        self.format = format
        self.metadata = metadata
        self._data = data
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype = np.dtype("<u2" if entry.dtype == "bf16" else entry.dtype)
        pieces = [
            np.frombuffer(self._data, dtype, size // dtype.itemsize, offset) for offset, size in entry.pieces if size
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

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a .safetensors file or a MindSpore .ckpt, told apart by what is in it rather than by its suffix.

    Raises UserError if the file is missing, empty, cut off, or something else, and says what it is.
    """
    path = Path(path)
    data = _map(path)
    if data[:1] == b"\n" and not _looks_like_text(data[:512]):
        return _open_ckpt(path, data)
    header_size = int.from_bytes(data[:8], "little")
    if len(data) >= 9 and data[8:9] == b"{" and header_size < 100_000_000:
        return _open_safetensors(path, data)
    raise UserError(f"{path} is {_describe(path, data)}")


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a .safetensors or MindSpore .ckpt file whole: (name -> array, texts). See open_checkpoint."""
    checkpoint = open_checkpoint(path)
    return dict(checkpoint), checkpoint.metadata


def write_checkpoint(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays and texts as .safetensors or MindSpore .ckpt, by the suffix of `path`, beside it and then renamed.

    A scalar is a 0-d array. mindspore.load_checkpoint returns the metadata of a .ckpt as strings beside the
    parameters. Raises UserError for another suffix and where the disk refuses.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a checkpoint is written as {' or '.join(SUFFIXES)}, not {path.suffix or 'no suffix'}")
    both = metadata.keys() & arrays.keys()
    if both:
        raise ValueError(f"named both as array and as text: {sorted(both)}")
    for name, text in metadata.items():
        if not isinstance(text, str):
            raise TypeError(f"metadata {name!r} is {type(text).__name__}, only str is written")
    try:
        with atomic_path(path) as temporary:
            if path.suffix == ".safetensors":
                # The library writes the memory as it lies, so the rows must be in order.
                ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
                safetensors.numpy.save_file(ordered, temporary, metadata=metadata or None)
            else:
                with open(temporary, "wb") as file:
                    for name, array in arrays.items():
                        _write_ckpt_array(file, name, np.asarray(array, order="C"))
                    for name, text in metadata.items():
                        _write_ckpt_value(file, name, [0], "str", np.array(text).astype("<U").tobytes())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def content_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes in hexadecimal: the identity of weights in caches and in the PNGs' text fields."""
    path = Path(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _map(path: Path) -> mmap.mmap:
    if path.is_dir():
        kind = "a diffusers folder" if (path / "model_index.json").exists() else "a folder"
        raise UserError(f"{path} is {kind}: name the checkpoint file in it ({' or '.join(SUFFIXES)})")
    if not path.exists():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1) if path.parent.is_dir() else []
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"{path} does not exist{hint}")
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is an empty file: a download or a run that stopped? Make it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _describe(path: Path, data: mmap.mmap) -> str:
    """What a file that is no checkpoint of ours is, by its first bytes."""
    head = data[:512]
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head.startswith(b"PK"):
        if data.find(b"data.pkl", 0, 1 << 16) >= 0 or data.rfind(b"data.pkl") >= 0:
            return "a PyTorch file (a zip with a pickle in it), which is not read here: convert it to .safetensors"
        return "a zip archive: unpack it first"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle (an old PyTorch file?), which could run code: convert it to .safetensors"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "an HTML page, not a checkpoint: a download that needed a login? Fetch the file itself"
    if text.startswith(b"<?xml"):
        return "an XML document, not a checkpoint"
    if path.suffix == ".safetensors":
        return "not a .safetensors file, or cut off within its header: fetch or write it again"
    if _looks_like_text(head):
        return "a text file, not a checkpoint"
    return f"neither a .safetensors file nor a MindSpore .ckpt (it begins with {head[:8].hex(' ')})"


def _looks_like_text(head: bytes) -> bool:
    # A .ckpt also starts with a line feed (0x0a), but soon has control characters: lengths and tags.
    return not any(byte < 9 or 13 < byte < 32 for byte in head)


# --- safetensors: an 8-byte length, a JSON header, the data ---


def _open_safetensors(path: Path, data: mmap.mmap) -> Checkpoint:
    try:
        # The library checks the header: lengths, overlaps, coverage of the file.
        with safetensors.safe_open(path, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged or cut-off .safetensors ({error}): fetch or write it again") from error
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start].decode("utf-8"))
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, info in header.items():
        dtype, (first, last) = info["dtype"], info["data_offsets"]
        if dtype not in _SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} is of type {dtype}, which is not read here: convert it to F16 or F32")
        entries[name] = _Entry(_SAFETENSORS_DTYPES[dtype], tuple(info["shape"]), [(start + first, last - first)])
    return Checkpoint(path, "safetensors", data, entries, metadata)


# --- MindSpore .ckpt: protobuf's wire format ---


class _CutOff(Exception):
    """A field reaches past the end of what holds it."""


class _NotACheckpoint(Exception):
    """A field that checkpoint.proto does not have."""


def _open_ckpt(path: Path, data: mmap.mmap) -> Checkpoint:
    end = len(data)
    if data[-_CKPT_CRC_TAIL:-10] == b"crc_num":
        end -= _CKPT_CRC_TAIL
        _check_crc(path, data, end)
    entries: dict[str, _Entry] = {}
    last = None
    try:
        for number, wire, start, stop in _fields(data, 0, end):
            if (number, wire) != (1, 2):
                raise _NotACheckpoint(f"field {number} at byte {start}")
            name, entry = _parse_value(data, start, stop)
            if name == last and entry.shape == entries[name].shape:  # a large tensor lies in several pieces, in order
                entries[name].pieces += entry.pieces
            elif name in entries:
                raise _NotACheckpoint(f"{name!r} twice")
            else:
                entries[name] = entry
            last = name
    except _CutOff as error:
        # A foreign file gives a nonsensical length at once; a cut-off one after at least a whole name.
        if entries or _starts_with_a_name(data, end):
            after = f" after {last!r}" if last else ""
            raise UserError(f"{path} is cut off{after} ({len(data)} bytes): fetch or write it again") from error
        raise UserError(f"{path} is {_describe(path, data)}") from error
    except (_NotACheckpoint, UnicodeDecodeError) as error:
        if entries:
            raise UserError(f"{path} is a damaged MindSpore .ckpt ({error}): fetch or write it again") from error
        raise UserError(f"{path} is {_describe(path, data)}") from error

    metadata = {}
    for name in [name for name, entry in entries.items() if entry.dtype == "str"]:
        entry = entries.pop(name)
        raw = b"".join(data[offset : offset + size] for offset, size in entry.pieces)
        try:
            metadata[name] = raw.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is a damaged MindSpore .ckpt (the text {name!r}): write it again") from error
    for name, entry in entries.items():
        if entry.dtype not in _CKPT_DTYPES:
            raise UserError(f"{path}: {name} is of type {entry.dtype}, which is not read here: save it as Float32")
        entry.dtype = _CKPT_DTYPES[entry.dtype]
        itemsize = 2 if entry.dtype == "bf16" else np.dtype(entry.dtype).itemsize
        if entry.shape == (0,) and entry.nbytes == itemsize:
            entry.shape = ()  # how older versions of MindSpore write a scalar
        if entry.nbytes != math.prod(entry.shape) * itemsize:
            raise UserError(f"{path} is damaged: {name} {entry.shape} holds {entry.nbytes} bytes: write it again")
    return Checkpoint(path, "ckpt", data, entries, metadata)


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
    """The fields of a message as (number, wire type, start, stop); for a number, `start` is its value."""
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


def _parse_value(data: mmap.mmap, start: int, end: int) -> tuple[str, _Entry]:
    name, dtype, shape, piece = None, None, [], None
    for number, wire, first, last in _fields(data, start, end):
        if (number, wire) == (1, 2):
            name = data[first:last].decode("utf-8")
        elif (number, wire) == (2, 2):
            for inner, inner_wire, begin, stop in _fields(data, first, last):
                if (inner, inner_wire) == (1, 0):
                    shape.append(begin)
                elif (inner, inner_wire) == (1, 2):  # packed
                    while begin < stop:
                        size, begin = _varint(data, begin, stop)
                        shape.append(size)
                elif (inner, inner_wire) == (2, 2):
                    dtype = data[begin:stop].decode("utf-8")
                elif (inner, inner_wire) == (3, 2):
                    piece = (begin, stop - begin)
                else:
                    raise _NotACheckpoint(f"field {inner} of a tensor at byte {begin}")
        else:
            raise _NotACheckpoint(f"field {number} of a value at byte {first}")
    if name is None or dtype is None or piece is None:
        raise _NotACheckpoint(f"an incomplete value at byte {start}")
    return name, _Entry(dtype, tuple(shape), [piece])


def _starts_with_a_name(data: mmap.mmap, end: int) -> bool:
    """Whether the file opens like a Value: a length, then a tag of readable characters."""
    try:
        _, position = _varint(data, 1, end)
        if data[position] != 0x0A:
            return False
        size, position = _varint(data, position + 1, end)
        return 0 < size < 1024 and data[position : min(end, position + size)].decode("utf-8").isprintable()
    except (_CutOff, IndexError, UnicodeDecodeError):
        return False


def _write_ckpt_array(file, name: str, array: np.ndarray) -> None:
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    if dtype not in _CKPT_DTYPE_NAMES:
        raise TypeError(f"{name}: {array.dtype} has no place in a .ckpt")
    content = memoryview(array.astype(dtype, copy=False).reshape(-1)).cast("B")
    for start in range(0, max(1, len(content)), _CKPT_CHUNK):
        _write_ckpt_value(file, name, array.shape, _CKPT_DTYPE_NAMES[dtype], content[start : start + _CKPT_CHUNK])


def _write_ckpt_value(file, name: str, shape, dtype: str, content) -> None:
    def encoded(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        return bytes(out)

    def lengthy(number: int, size: int) -> bytes:
        return encoded(number << 3 | 2) + encoded(size)

    tensor = b"".join(b"\x08" + encoded(size) for size in shape) + lengthy(2, len(dtype)) + dtype.encode()
    tensor += lengthy(3, len(content))
    tag = name.encode("utf-8")
    value = lengthy(1, len(tag)) + tag + lengthy(2, len(tensor) + len(content)) + tensor
    file.write(lengthy(1, len(value) + len(content)) + value)
    file.write(content)
