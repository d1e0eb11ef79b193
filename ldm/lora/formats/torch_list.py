"""Writing a list of arrays as torch.save does, without PyTorch: a zip of a small pickle and the arrays' bytes.

Nothing is pickled here: the program is put together from its few instructions. torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.atomic import atomic_path
from ldm.errors import UserError
from ldm.lora.formats import pairs

STORAGES = {"fp32": "FloatStorage", "fp16": "HalfStorage", "bf16": "BFloat16Storage"}


def write_torch_list(path: Path, arrays: Sequence[np.ndarray], dtype: str) -> None:
    """Write `arrays` as "fp32", "fp16" or "bf16". Raises UserError where fp16 does not hold one or the disk refuses."""
    contents = [pairs.as_dtype(array, dtype, f"{path}: array {i}") for i, array in enumerate(arrays)]
    program = b"\x80\x02]" + b"(" + b"".join(
        _tensor(str(i), array.shape, STORAGES[dtype]) for i, array in enumerate(contents)
    ) + b"e."  # fmt: skip
    try:
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/byteorder", "little")
            for i, array in enumerate(contents):
                archive.writestr(f"archive/data/{i}", np.ascontiguousarray(array).tobytes())
            archive.writestr("archive/version", "3\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _tensor(key: str, shape: tuple[int, ...], storage: str) -> bytes:
    """Instructions of protocol 2: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    count = int(np.prod(shape))
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    reference = b"(" + _text("storage") + b"ctorch\n" + storage.encode() + b"\n" + _text(key) + _text("cpu")
    reference += _int(count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + _int(0) + _ints(shape) + _ints(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
