"""The .safetensors format: the length of the header in 8 bytes, a JSON header, and the data.

Arrays are read from the mapped file and written one at a time. The writer of the safetensors library needs all of them
in memory.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.weights.arrays import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, Arrays, Checkpoint, CheckpointFile, Entry

# Element types by their names in the format.
DTYPES: dict[str, np.dtype] = {"BF16": BFLOAT16, "F8_E4M3": FLOAT8_E4M3, "F8_E5M2": FLOAT8_E5M2}
DTYPES.update({name: np.dtype(code) for name, code in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}.items()})  # fmt: skip
LARGEST_VALID_HEADER = 100_000_000  # bytes, the limit of the safetensors library
# Bytes of the largest header that is read: one of 100 MB takes 1 GB in memory. Those of Stable Diffusion have 0.3 MB.
MAX_HEADER = 16 << 20
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_safetensors(data: mmap.mmap) -> bool:
    """Whether the bytes begin like a .safetensors file."""
    return len(data) >= 9 and data[8:9] == b"{" and _header_size(data) < LARGEST_VALID_HEADER


def open_safetensors(path: Path, data: mmap.mmap) -> Checkpoint:
    """Open a .safetensors file that is mapped into memory.

    Raises:
        UserError: The header is damaged or too large, or an element type is one that numpy does not have.
    """
    again = "fetch or write it again"
    size = _header_size(data)
    if size > MAX_HEADER:
        raise UserError(
            f"{path} is damaged or no checkpoint: its header has {size:,} bytes, at most {MAX_HEADER:,} "
            f"are read: {again}"
        )
    try:
        # The library checks lengths and overlaps in the header, and that the tensors cover the file.
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is a damaged or cut-off .safetensors ({plain(error)}): {again}") from error
    start = 8 + size
    header = parse_json(data[8:start].decode("utf-8"), f"{path}, its header,")
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, info in header.items():
        dtype, (first, last) = info["dtype"], info["data_offsets"]
        if dtype not in DTYPES:
            raise UserError(
                f"{path}: {plain(name)} is of type {plain(dtype)}, which cannot be read: convert it to F16 or F32"
            )
        entries[name] = Entry(DTYPES[dtype], tuple(info["shape"]), [(start + first, last - first)])
    return CheckpointFile(path, "safetensors", data, entries, metadata)


def _header_size(data: mmap.mmap) -> int:
    return int.from_bytes(data[:8], "little")


def write_safetensors(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file. One array at a time is in memory.

    Raises:
        TypeError: The format does not have an element type.
    """
    parts = safetensors_parts(arrays, metadata)
    header = next(parts)  # before the file is opened, as it may raise the error
    with open(path, "wb") as file:
        file.write(header)
        for part in parts:
            file.write(part)


def safetensors_parts(arrays: Arrays, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a .safetensors file: its header with the header's length, then those of each array.

    Raises:
        TypeError: The format does not have an element type.
    """
    specs = {name: arrays.spec(name) for name in arrays}
    for name, (dtype, _) in specs.items():
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: {dtype} cannot be written to a .safetensors file")
    # As in the library, wider types are first, so that every array is aligned to the size of its elements.
    names = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        dtype, shape = specs[name]
        array = np.asarray(arrays[name], dtype, order="C")
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, but its spec says {shape}")
        yield array.reshape(-1).view(np.uint8).data
        arrays.release(name)
