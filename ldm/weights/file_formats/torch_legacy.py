"""PyTorch files of before 1.6 (pt_inception-2015-12-05-6726825d.pth is one), without PyTorch.

Five pickles one after another: a number that tells the format, its version, what machine wrote it, the content with its
storages named, the list of those names. Then each storage: its count of elements in eight bytes, and its bytes. The
pickles are read by torch_pickle, which runs nothing.
"""

from __future__ import annotations

import io
import mmap
from pathlib import Path

from ldm.errors import UserError
from ldm.weights.arrays import Checkpoint, CheckpointFile
from ldm.weights.file_formats.torch_pickle import MOST_PICKLE, Damaged, Refused, find_tensors, run
from ldm.weights.file_formats.torch_zip import entry_of

# The number that comes first, pickled; two bytes of protocol stand before it.
_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def is_torch_legacy(data: mmap.mmap) -> bool:
    return data[:1] == b"\x80" and data[2 : 2 + len(_MAGIC)] == _MAGIC


def open_torch_legacy(path: Path, data: mmap.mmap) -> Checkpoint:
    """Read the pickles and find the tensors: see torch_pickle.find_tensors.

    Raises UserError for a cut-off or damaged file, and for a pickle that names anything that is not in the list.
    """
    try:
        file = io.BytesIO(data[:MOST_PICKLE])
        (_, version, machine, content, keys), storages = run(file, 5)
        if not isinstance(machine, dict) or not isinstance(keys, list):
            raise Damaged("what it says of the machine or of its storages is missing")
        if not all(isinstance(key, str) and key in storages for key in keys):
            raise Damaged("a storage that no tensor has")
        if version != 1001 or not machine.get("little_endian", True):
            raise UserError(
                f"{path} is a PyTorch file of before 1.6 in a form that is not read here: save it anew as .safetensors"
            )
        tensors = find_tensors(content)
        position = file.tell()
        starts: dict[str, tuple[int, int]] = {}
        for key in keys:  # those of an optimizer's state too, which lie between the weights'
            size = int.from_bytes(data[position : position + 8], "little") * storages[key].itemsize
            starts[key] = position + 8, size
            position += 8 + size
        if position > len(data):
            raise Damaged("the file ends before its data")
        entries = {name: entry_of(tensor, *starts.get(tensor.storage.key, (0, -1))) for name, tensor in tensors.items()}
        if None in entries.values():
            raise Damaged("a tensor that does not lie within its data")
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Damaged as error:
        raise UserError(
            f"{path} is a PyTorch file of before 1.6 that is cut off or damaged ({error}): fetch it again"
        ) from None
    return CheckpointFile(path, "torch", data, entries, {})
