"""Read files of PyTorch before 1.6, such as pt_inception-2015-12-05-6726825d.pth, without PyTorch.

A file has five pickles: a number that identifies the format, its version, the machine, the content with references to
storages, and the names of the storages. Each storage follows, with its number of elements in eight bytes before its
data. torch_pickle reads the pickles without executing them.
"""

from __future__ import annotations

import io
import mmap
from pathlib import Path

from ldm.errors import UserError
from ldm.weights.arrays import Checkpoint, CheckpointFile
from ldm.weights.file_formats.torch_pickle import MAX_PICKLE, Damaged, Refused, find_tensors, read_pickles
from ldm.weights.file_formats.torch_zip import entry_of

# The pickled number that identifies the format. The protocol takes two bytes before it.
_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def is_torch_legacy(data: mmap.mmap) -> bool:
    """Whether the bytes begin like a file of PyTorch before 1.6."""
    return data[:1] == b"\x80" and data[2 : 2 + len(_MAGIC)] == _MAGIC


def open_torch_legacy(path: Path, data: mmap.mmap) -> Checkpoint:
    """Open a file that is mapped into memory. Its tensors are those of torch_pickle.find_tensors.

    Raises:
        UserError: The file is cut off or damaged, or a pickle refers to something that is not allowed.
    """
    try:
        file = io.BytesIO(data[:MAX_PICKLE])
        (_, version, machine, content, keys), storages = read_pickles(file, 5)
        if not isinstance(machine, dict) or not isinstance(keys, list):
            raise Damaged("the machine or the list of storages is missing")
        if not all(isinstance(key, str) and key in storages for key in keys):
            raise Damaged("a storage of no tensor")
        if version != 1001 or not machine.get("little_endian", True):
            raise UserError(
                f"{path} is a file of PyTorch before 1.6 in a form that cannot be read: save it again as .safetensors"
            )
        tensors = find_tensors(content)
        position = file.tell()
        starts: dict[str, tuple[int, int]] = {}
        for key in keys:  # including those of an optimizer, which may be between those of the weights
            size = int.from_bytes(data[position : position + 8], "little") * storages[key].dtype.itemsize
            starts[key] = position + 8, size
            position += 8 + size
        if position > len(data):
            raise Damaged("the file ends before its data")
        entries = {}
        for name, tensor in tensors.items():
            entry = entry_of(tensor, *starts.get(tensor.storage.key, (0, -1)))
            if entry is None:
                raise Damaged("a tensor is not within its data")
            entries[name] = entry
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Damaged as error:
        raise UserError(
            f"{path} is a file of PyTorch before 1.6 that is cut off or damaged ({error}): fetch it again"
        ) from None
    return CheckpointFile(path, "torch", data, entries, {})
