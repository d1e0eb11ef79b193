"""The .safetensors file: 8 bytes of length, a JSON header, the data. Read from the mapped file, written one array at a
time (the library's own writer wants all of them in memory).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.weights.arrays import BFLOAT16, Arrays, Checkpoint, CheckpointFile, Entry

# Element types by the format's names; bfloat16, which numpy lacks, is widened to float32.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bf16", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
LIBRARYS_MOST = 100_000_000  # bytes of a header, which the library takes
MOST_HEADER = 16 << 20  # what is read here: one of 100 MB becomes 1 GB; those of Stable Diffusion have 0.3 MB
DTYPE_NAMES = {BFLOAT16 if code == "bf16" else np.dtype(code): name for name, code in DTYPES.items()}


def is_safetensors(data: mmap.mmap) -> bool:
    return len(data) >= 9 and data[8:9] == b"{" and _header_size(data) < LIBRARYS_MOST


def open_safetensors(path: Path, data: mmap.mmap) -> Checkpoint:
    """Read the header. Raises UserError for a damaged or very large one and for element types that numpy has not."""
    again = "fetch or write it again"
    size = _header_size(data)
    if size > MOST_HEADER:
        raise UserError(
            f"{path} is damaged or no checkpoint: its header has {size:,} bytes, at most {MOST_HEADER:,} "
            f"are read: {again}"
        )
    try:
        # The library checks the header: lengths, overlaps, coverage of the file.
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
                f"{path}: {plain(name)} is of type {plain(dtype)}, which is not read here: convert it to F16 or F32"
            )
        entries[name] = Entry(DTYPES[dtype], tuple(info["shape"]), [(start + first, last - first)])
    return CheckpointFile(path, "safetensors", data, entries, metadata)


def _header_size(data: mmap.mmap) -> int:
    return int.from_bytes(data[:8], "little")


def write_safetensors(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write `arrays` to `path`, holding one at a time. Raises TypeError for an element type the format has not."""
    specs = {name: arrays.spec(name) for name in arrays}
    for name, (dtype, _) in specs.items():
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: {dtype} has no place in a .safetensors")
    # Wider types first, as the library does, so that every array lies at a multiple of its element's size.
    names = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header, end = ({"__metadata__": dict(metadata)} if metadata else {}), 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            dtype, shape = specs[name]
            array = np.asarray(arrays[name], dtype, order="C")
            if array.shape != shape:
                raise ValueError(f"{name} is {array.shape}, announced as {shape}")
            file.write(array.reshape(-1).view(np.uint8))
            arrays.release(name)
