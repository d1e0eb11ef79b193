"""Arrays in numpy's format (.npy, and the members of an .npz), read within bounds.

np.load believes the header and allocates what it says; here it is compared with the file's size first, and nothing but
plain numbers and texts is read.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ldm.errors import plain

MOST_HEADER = 1024  # bytes; numpy writes 118 for most arrays
MOST_DIMENSIONS = 32  # of numpy 1


class NotNumpy(Exception):
    """The bytes are no array that can be read; the message says why."""


@dataclass(frozen=True)
class Header:
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str  # "C" or "F"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header at the beginning of a file of `size` bytes, which stands at its data then.

    Raises NotNumpy for what is no array of numbers or texts, or is larger than the file.
    """
    start = file.read(8)
    if start[:2] == b"PK":
        raise NotNumpy("it is an .npz archive: an .npy file holds one array alone")
    if start[:6] != b"\x93NUMPY":
        raise NotNumpy(f"it begins with {plain(start)}" if start else "it is empty")
    count = 2 if start[6:7] == b"\1" else 4
    length = int.from_bytes(file.read(count), "little")
    if length > MOST_HEADER:
        raise NotNumpy(f"its header has {length:,} bytes, at most {MOST_HEADER:,} are read")
    try:
        # Python 2 wrote 3L for 3.
        fields = ast.literal_eval(re.sub(r"(\d)L\b", r"\1", file.read(length).decode("latin-1")).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as its documentation says
        raise NotNumpy("its header is cut off or damaged") from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise NotNumpy("its header is damaged")
    header = Header(_dtype(fields["descr"]), _shape(fields["shape"]), "F" if fields["fortran_order"] else "C")
    if len(start) + count + length + header.nbytes > size:
        raise NotNumpy(f"it ends before its data: {size:,} bytes hold no {header.dtype} of {header.shape}")
    return header


def read_array(file: BinaryIO, header: Header) -> np.ndarray:
    """The array that follows its header. Raises NotNumpy where the file has become shorter."""
    raw = file.read(header.nbytes)
    if len(raw) != header.nbytes:
        raise NotNumpy("it ends before its data")
    return np.frombuffer(raw, header.dtype).reshape(header.shape, order=header.order)


def _dtype(text: object) -> np.dtype:
    if isinstance(text, str) and re.fullmatch(r"[<>|=]?O\d?", text):
        raise NotNumpy("it holds Python objects, which could run code")
    if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?[biufcSU][1-9]\d{0,4}", text):
        raise NotNumpy(f"it holds {plain(text, 60)}, not plain numbers")
    try:
        return np.dtype(text)
    except TypeError:
        raise NotNumpy(f"it holds {plain(text, 60)}, not plain numbers") from None


def _shape(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise NotNumpy(f"its shape is {plain(sizes, 60)}")
    # Where one size is 0 the others take no place, but numpy counts them.
    if len(sizes) > MOST_DIMENSIONS or math.prod(size or 1 for size in sizes) >= 1 << 48:
        raise NotNumpy(f"its shape {plain(sizes, 60)} is larger than any that can be read")
    return sizes
