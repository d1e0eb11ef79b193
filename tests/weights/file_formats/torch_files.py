"""Files such as torch.save writes, for an environment without PyTorch: a zip, and a pickle put together by hand."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "<f8": "Double",
    "<f4": "Float",
    "<f2": "Half",
    "<i8": "Long",
    "<i4": "Int",
    "<i2": "Short",
    "|i1": "Char",
    "|u1": "Byte",
    "|b1": "Bool",
}


@dataclass
class Call:
    """What a pickle runs when it is loaded: module.name(*args)."""

    module: str
    name: str
    args: tuple = ()


@dataclass
class Tensor:
    """A tensor of torch: elements of a storage by offset, shape and strides, all in elements."""

    storage: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    kind: str | None = None  # "BFloat16" for a storage of uint16


def torch_bytes(content: Any, root: str = "archive", **options: Any) -> bytes:
    """The bytes of a file with `content`: dictionaries, lists, numbers, texts, arrays, Tensor, Call.

    options: `compression` of the zip, `byteorder`, and `cut`: bytes that are missing of each storage.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _encode(content, storages) + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr(f"{root}/data.pkl", program)
        archive.writestr(f"{root}/byteorder", options.get("byteorder", "little"))
        for key, storage in enumerate(storages):
            data = storage.tobytes()
            archive.writestr(f"{root}/data/{key}", data[: len(data) - options.get("cut", 0)])
        archive.writestr(f"{root}/version", "3\n")
    return buffer.getvalue()


def write_torch(path: Path, content: Any, **options: Any) -> Path:
    path.write_bytes(torch_bytes(content, **options))
    return path


def _encode(value: Any, storages: list[np.ndarray]) -> bytes:
    def inner(part: Any) -> bytes:
        return _encode(part, storages)

    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value).reshape(value.shape)
        steps = tuple(step // array.itemsize for step in array.strides)
        return inner(Tensor(array.reshape(-1), array.shape, steps))
    if isinstance(value, Tensor):
        known = [key for key, storage in enumerate(storages) if storage is value.storage]
        if not known:
            storages.append(value.storage)
            known = [len(storages) - 1]
        kind = (value.kind or STORAGES[value.storage.dtype.str]) + "Storage"
        identity = (
            b"(" + inner("storage") + f"ctorch\n{kind}\n".encode() + inner(str(known[0])) + inner("cpu")
            + inner(len(value.storage)) + b"tQ"
        )  # fmt: skip
        call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity
        return call + b"".join(map(inner, (value.offset, value.shape, value.stride, False, OrderedDict()))) + b"tR"
    if isinstance(value, Call):
        return f"c{value.module}\n{value.name}\n".encode() + inner(tuple(value.args)) + b"R"
    if isinstance(value, dict):
        items = b"".join(inner(key) + inner(part) for key, part in value.items())
        new = b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
        return new + b"(" + items + b"u"
    if isinstance(value, (list, tuple)):
        parts = b"".join(map(inner, value))
        return b"](" + parts + b"e" if isinstance(value, list) else b"(" + parts + b"t"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if value is None:
        return b"N"
    text = value.encode()
    return b"X" + struct.pack("<I", len(text)) + text
