"""PyTorch files (.ckpt, .bin, .pt since 1.6) without PyTorch: a zip of a pickle that names tensors, and their bytes.

A pickle is a program. This one is run by an unpickler that knows a closed list of names: what rebuilds a tensor becomes
a record of where its bytes lie; what training frameworks leave beside the weights (callbacks, numpy's scalars) becomes
an object that holds and does nothing. Anything else is refused, by its name. The tensors are then read from the mapped
file like those of the other formats, one at a time.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.errors import UserError
from ldm.weights.checkpoint import Checkpoint, Entry

STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
MOST_PICKLE = 256 << 20  # bytes of a pickle; that of the largest published Stable Diffusion files has 2 MB
# What a damaged pickle raises in an unpickler that calls nothing but what is in this file.
DAMAGED = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
           UnicodeDecodeError, OverflowError, RecursionError, struct.error)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements


class _Inert:
    """Takes any arguments, state and items, and does nothing with them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _rebuild_tensor(storage, offset, shape, stride, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


KNOWN = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    "torch.Size": tuple,
    "builtins.set": set,
    "__builtin__.set": set,
    # Beside the weights in checkpoints of PyTorch Lightning and of textual inversion; nothing of them is needed.
    **{
        name: _Inert
        for name in (
            "_codecs.encode", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct", "torch.device", "torch.float16", "torch.float32", "torch.bfloat16",
            "torch.nn.modules.container.ParameterDict", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        )
    },
}  # fmt: skip


class Refused(Exception):
    """The pickle names something that is not in the list."""


class Unpickler(pickle.Unpickler):
    """Runs a pickle that names nothing but what is in KNOWN. Raises Refused for another name, else one of DAMAGED.

    `storages`: key -> every storage that the pickle named, whatever it did with it.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            raise Refused(
                "it is a TorchScript archive, a program with its weights (OpenAI's CLIP came so): get the weights "
                "alone, as .safetensors or a Hugging Face folder"
            )
        if f"{module}.{name}" not in KNOWN:
            raise Refused(
                f"its pickle wants to run {module}.{name}, which no checkpoint needs, so it may be malicious; get the "
                "weights as .safetensors"
            )
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _device, _count, *view = identity  # what a storage is a view of, in files of before 1.6
        if any(part is not None for part in view):
            raise pickle.UnpicklingError("a storage that is a part of another")
        if kind != "storage" or dtype not in STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown kind of storage")
        self.storages[key] = _Storage(dtype, key)
        return self.storages[key]


def is_torch_zip(data: mmap.mmap) -> bool:
    """Whether the bytes are a zip such as PyTorch writes; its pickle comes first, the list of its members last."""
    head, tail = data.find(b"data.pkl", 0, 1 << 12), data.rfind(b"data.pkl", max(0, len(data) - (1 << 24)))
    return data[:2] == b"PK" and max(head, tail) >= 0


def open_torch(path: Path, data: mmap.mmap) -> Checkpoint:
    """Run the pickle and find the tensors: those of `state_dict` where there is one, else all, nested names joined by
    dots, numbers for the places in a list.

    Raises UserError for a cut-off or damaged file, and for a pickle that names anything that is not in the list.
    """
    again = "fetch or write it again"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip archive with {len(pickles)} PyTorch pickles, not a checkpoint")
            if members[pickles[0]].file_size > MOST_PICKLE:
                raise UserError(f"{path} is no checkpoint: its pickle alone has {members[pickles[0]].file_size} bytes")
            root = pickles[0][: -len("data.pkl")]
            # Before anything is unpacked: the tensors are read in place, and unpackers have errors of their own.
            if any(member.compress_type != zipfile.ZIP_STORED for name, member in members.items()
                   if name.startswith(root)):
                raise UserError(f"{path} is a compressed zip; PyTorch writes uncompressed ones: {again}")
            program = archive.read(pickles[0])
            if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} was written on a big-endian machine, which is not read here")
    except RuntimeError as error:  # a password, or features of a zip that zipfile has not
        raise UserError(f"{path} is no PyTorch checkpoint: {error}") from error
    except (zipfile.BadZipFile, OSError, *DAMAGED) as error:
        raise UserError(f"{path} is a PyTorch file that is cut off or damaged ({error}): {again}") from error
    try:
        content = Unpickler(io.BytesIO(program)).load()
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        tensors = dict(find_tensors(content, ""))
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is a damaged PyTorch file ({type(error).__name__}: {error}): {again}") from error
    if not tensors and isinstance(content, dict) and "string_to_param" in content:
        raise UserError(f"{path} is a textual-inversion embedding, not a checkpoint")
    starts: dict[str, tuple[int, int]] = {}
    entries = {}
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in starts:
            member = members.get(f"{root}data/{key}")
            if member is None:
                raise UserError(f"{path} is damaged: the data of {name} is missing: {again}")
            starts[key] = _start(data, member), member.file_size
        entry = entry_of(tensor, *starts[key])
        if entry is None or starts[key][0] + starts[key][1] > len(data):
            raise UserError(f"{path} is damaged: {name} {tensor.shape} does not lie within its data: {again}")
        entries[name] = entry
    return Checkpoint(path, "torch", data, entries, {})


def find_tensors(value: Any, name: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(value, _Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find_tensors(inner, f"{name}.{key}" if name else str(key))


def _start(data: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its own header, whose padding the list at the end does not know."""
    head = data[member.header_offset : member.header_offset + 30]
    # A damaged list points anywhere: past the end then, as all is refused that does not lie within the file.
    return member.header_offset + 30 + sum(struct.unpack("<HH", head[26:])) if len(head) == 30 else len(data) + 1


def entry_of(tensor: _Tensor, start: int, size: int) -> Entry | None:
    """Where a tensor lies in the file; None if not within the `size` bytes of its storage at `start`."""
    itemsize = tensor.storage.itemsize
    if len(tensor.shape) != len(tensor.stride) or min((0, tensor.offset, *tensor.shape, *tensor.stride)) < 0:
        return None
    count, in_order, step = 1, True, 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride)):
        in_order = in_order and (length == 1 or stride == step)
        step *= length
        count *= length
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride)) if count else -1
    if (last + 1) * itemsize > size:
        return None
    first = start + tensor.offset * itemsize
    if in_order or not count:
        return Entry(tensor.storage.dtype, tensor.shape, [(first, count * itemsize)])
    strides = tuple(stride * itemsize for stride in tensor.stride)
    return Entry(tensor.storage.dtype, tensor.shape, [(first, (last + 1 - tensor.offset) * itemsize)], strides)
