"""Bounded reading of arrays in numpy's format: .npy files and the members of .npz files.

np.load allocates whatever size the header declares. These functions compare it with the file's size first, and read
arrays of plain numbers and texts only.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np

from ldm.errors import plain

MAX_HEADER = 1024  # bytes; numpy writes 118 for most arrays
MAX_DIMENSIONS = 32  # of numpy 1


class NotNumpy(Exception):
    """The bytes are not a readable array; the message says why."""


@dataclass(frozen=True)
class Header:
    """The type, shape and memory order of a stored array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header at the beginning of `file`, and leave the position at the array's data.

    `size` is that of the whole file in bytes.

    Raises:
        NotNumpy: The file is not an array of numbers or texts, or is shorter than its header declares.
    """
    start = file.read(8)
    if start[:2] == b"PK":
        raise NotNumpy("it is an .npz archive: an .npy file holds a single array")
    if start[:6] != b"\x93NUMPY":
        raise NotNumpy(f"it begins with {plain(start)}" if start else "it is empty")
    count = 2 if start[6:7] == b"\1" else 4
    length = int.from_bytes(file.read(count), "little")
    if length > MAX_HEADER:
        raise NotNumpy(f"its header has {length:,} bytes, at most {MAX_HEADER:,} are read")
    try:
        # Python 2 wrote 3L for 3.
        fields = ast.literal_eval(re.sub(r"(\d)L\b", r"\1", file.read(length).decode("latin-1")).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
        raise NotNumpy("its header is truncated or damaged") from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise NotNumpy("its header is damaged")
    header = Header(_dtype(fields["descr"]), _shape(fields["shape"]), "F" if fields["fortran_order"] else "C")
    if len(start) + count + length + header.nbytes > size:
        raise NotNumpy(f"it is truncated: {size:,} bytes cannot hold {header.dtype} values of shape {header.shape}")
    return header


def read_array(file: BinaryIO, header: Header) -> np.ndarray:
    """Return the array that follows its header. Raises NotNumpy if the file has become shorter since."""
    raw = file.read(header.nbytes)
    if len(raw) != header.nbytes:
        raise NotNumpy("it is truncated")
    return np.frombuffer(raw, header.dtype).reshape(header.shape, order=header.order)


def _dtype(text: object) -> np.dtype:
    if isinstance(text, str) and re.fullmatch(r"[<>|=]?O\d?", text):
        raise NotNumpy("it holds Python objects, which could run code")
    if isinstance(text, str) and re.fullmatch(r"[<>|=]?[biufcSU][1-9]\d{0,4}", text):
        try:
            return np.dtype(text)
        except TypeError:
            pass
    raise NotNumpy(f"it holds {plain(text, 60)}, not plain numbers")


def _shape(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise NotNumpy(f"its shape is {plain(sizes, 60)}")
    # numpy limits the product of the sizes even where one of them is 0.
    if len(sizes) > MAX_DIMENSIONS or math.prod(size or 1 for size in sizes) >= 1 << 48:
        raise NotNumpy(f"its shape {plain(sizes, 60)} exceeds what can be read")
    return sizes
