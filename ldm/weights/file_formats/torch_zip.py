"""Read PyTorch files (.ckpt, .bin, .pt) since 1.6 without PyTorch: a zip of a pickle and the data of its tensors.

torch_pickle reads the pickle without executing it. The tensors are read from the mapped file one at a time, as in the
other formats.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path

from ldm.errors import UserError, plain
from ldm.files.archives import Archive
from ldm.weights.arrays import Checkpoint, CheckpointFile, Entry
from ldm.weights.file_formats.torch_pickle import MAX_PICKLE, Damaged, Refused, Tensor, find_tensors, read_pickles
from ldm.weights.recognise import TEXTUAL_INVERSION

MAX_ORDER = 16  # bytes of the member that names the byte order


def is_torch_zip(data: mmap.mmap) -> bool:
    """Whether the bytes are a zip as PyTorch writes it, with the pickle first and the list of members last."""
    head, tail = data.find(b"data.pkl", 0, 1 << 12), data.rfind(b"data.pkl", max(0, len(data) - (1 << 24)))
    return data[:2] == b"PK" and max(head, tail) >= 0


def open_torch_zip(path: Path, data: mmap.mmap) -> Checkpoint:
    """Open a file that is mapped into memory. Its tensors are those of torch_pickle.find_tensors.

    Raises:
        UserError: The file is cut off or damaged, or the pickle refers to something that is not allowed.
    """
    again = "fetch or write it again"
    with Archive(path, "a PyTorch file", again) as archive:
        members = archive.members
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive with {len(pickles)} PyTorch pickles, not a checkpoint")
        root = pickles[0][: -len("data.pkl")]
        # Tensors are read in place, so they must not be compressed. PyTorch compresses only the code of TorchScript
        # archives, which is not read.
        read = (name for name in members if name in pickles or name.startswith(f"{root}data/"))
        if any(members[name].compress_type != zipfile.ZIP_STORED for name in read):
            raise UserError(f"{path} is a compressed zip; PyTorch writes uncompressed ones: {again}")
        program = archive.read(pickles[0], MAX_PICKLE)
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder", MAX_ORDER) != b"little":
            raise UserError(
                f"{path} was written on a big-endian machine and cannot be read: save it again as .safetensors"
            )
    try:
        (content,), _ = read_pickles(io.BytesIO(program))
        tensors = find_tensors(content)
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Damaged as error:
        raise UserError(f"{path} is a damaged PyTorch file ({error}): {again}") from None
    if not tensors and isinstance(content, dict) and "string_to_param" in content:
        raise UserError(f"{path} is {TEXTUAL_INVERSION}")
    starts: dict[str, tuple[int, int]] = {}
    entries = {}
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in starts:
            member = members.get(f"{root}data/{key}")
            if member is None:
                raise UserError(f"{path} is damaged: the data of {plain(name)} is missing: {again}")
            starts[key] = _start(data, member), member.file_size
        entry = entry_of(tensor, *starts[key])
        if entry is None or sum(starts[key]) > len(data):
            raise UserError(f"{path} is damaged: {plain(name)} {tensor.shape} is not within its data: {again}")
        entries[name] = entry
    return CheckpointFile(path, "torch", data, entries, {})


def _start(data: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Return where the data of a member begins. Its own header says so; the list of members lacks the padding."""
    head = data[max(0, member.header_offset) : member.header_offset + 30]
    # A damaged list can point anywhere. What is not within the file is refused later.
    return member.header_offset + 30 + sum(struct.unpack("<HH", head[26:])) if len(head) == 30 else len(data) + 1


def entry_of(tensor: Tensor, start: int, size: int) -> Entry | None:
    """Return where a tensor is in the file. None if it is not within its storage of `size` bytes at `start`."""
    itemsize = tensor.storage.dtype.itemsize
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
    contiguous = in_order or not count
    strides = None if contiguous else tuple(stride * itemsize for stride in tensor.stride)
    elements = count if contiguous else last + 1 - tensor.offset
    piece = (start + tensor.offset * itemsize, elements * itemsize)
    return Entry(tensor.storage.dtype, tensor.shape, [piece], strides)
