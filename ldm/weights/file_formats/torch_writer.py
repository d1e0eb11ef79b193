"""Write arrays as torch.save does, without PyTorch: a zip of a small pickle and the data of the arrays.

The pickle is composed of the few instructions that it needs. torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Union

import numpy as np

from ldm.files.atomic import atomic_path
from ldm.files.paths import writing
from ldm.weights.arrays import BFLOAT16

STORAGES = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", BFLOAT16: "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}  # fmt: skip

Value = Union[np.ndarray, str, Sequence["Value"], Mapping[str, "Value"]]


def write_torch(path: Path, value: Value) -> None:
    """Write arrays and texts, in lists and dictionaries.

    Args:
        path: File to write.
        value: Arrays are fp32, fp16, int64, or bfloat16 as `to_bfloat16` returns it.

    Raises:
        UserError: The disk refuses.
        KeyError: An array is of another type.
    """
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + _instructions(value, arrays) + b"."
    with writing(path), atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/byteorder", "little")
            for i, array in enumerate(arrays):
                archive.writestr(f"archive/data/{i}", array.tobytes())
            archive.writestr("archive/version", "3\n")


def _instructions(value: Value, arrays: list[np.ndarray]) -> bytes:
    """Return instructions of protocol 2 that put `value` on the stack. Its arrays are appended to `arrays`."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return _tensor(str(len(arrays) - 1), value.shape, STORAGES[value.dtype])
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_text(key) + _instructions(inner, arrays) for key, inner in value.items()) + b"u"
    return b"](" + b"".join(_instructions(inner, arrays) for inner in value) + b"e"


def _tensor(key: str, shape: tuple[int, ...], storage: str) -> bytes:
    """Return the call torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    count = int(np.prod(shape))
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    reference = b"(" + _text("storage") + b"ctorch\n" + storage.encode() + b"\n" + _text(key) + _text("cpu")
    reference += _int(count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + _int(0) + _ints(shape) + _ints(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
