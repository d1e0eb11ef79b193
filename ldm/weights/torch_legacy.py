"""PyTorch files of before 1.6 (pt_inception-2015-12-05-6726825d.pth is one), without PyTorch.

Five pickles one after another: a number that tells the format, its version, what machine wrote it, the content with its
storages named, the list of those names. Then each storage: its count of elements in eight bytes, and its bytes. The
pickles are run by the unpickler of torch_zip, which knows a closed list of names.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ldm.errors import UserError
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.torch_zip import DAMAGED, Refused, Unpickler, entry_of, find_tensors

# The number that comes first, pickled; two bytes of protocol stand before it.
_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def is_torch_legacy(data: mmap.mmap) -> bool:
    return data[:1] == b"\x80" and data[2 : 2 + len(_MAGIC)] == _MAGIC


def open_torch_legacy(path: Path, data: mmap.mmap) -> Checkpoint:
    """Run the pickles and find the tensors: those of `state_dict` where there is one, else all, nested names joined by
    dots.

    Raises UserError for a cut-off or damaged file, and for a pickle that names anything that is not in the list.
    """
    try:
        with open(path, "rb") as file:
            parts = [Unpickler(file) for _ in range(5)]
            _magic, version, machine, content, keys = (part.load() for part in parts)
            position = file.tell()
        if version != 1001 or not machine.get("little_endian", True):
            raise UserError(f"{path} is a PyTorch file of before 1.6 in a form that is not read here: save it anew as "
                            ".safetensors")
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        tensors = dict(find_tensors(content, ""))
        storages = parts[3].storages  # those of an optimizer's state too, which lie between the weights'
        starts: dict[str, tuple[int, int]] = {}
        for key in keys:
            size = int.from_bytes(data[position:position + 8], "little") * storages[key].itemsize
            starts[key] = position + 8, size
            position += 8 + size
        if position > len(data):
            raise EOFError("the file ends before its data")
        entries = {name: entry_of(tensor, *starts[tensor.storage.key]) for name, tensor in tensors.items()}
        if None in entries.values():
            raise ValueError("a tensor that does not lie within its data")
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except DAMAGED as error:
        raise UserError(
            f"{path} is a PyTorch file of before 1.6 that is cut off or damaged ({type(error).__name__}: {error}): "
            "fetch it again"
        ) from error
    return Checkpoint(path, "torch", data, entries, {})
