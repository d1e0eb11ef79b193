"""PyTorch files (.ckpt, .bin, .pt since 1.6) without PyTorch: a zip of a pickle that names tensors, and their bytes.

The pickle is read by torch_pickle, which runs nothing. The tensors are then read from the mapped file like those of the
other formats, one at a time.
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
from ldm.weights.file_formats.torch_pickle import MOST_PICKLE, Damaged, Refused, Tensor, find_tensors, run
from ldm.weights.recognise import TEXTUAL_INVERSION

MOST_ORDER = 16  # bytes of the member that says in which order a number's bytes are


def is_torch_zip(data: mmap.mmap) -> bool:
    """Whether the bytes are a zip such as PyTorch writes; its pickle comes first, the list of its members last."""
    head, tail = data.find(b"data.pkl", 0, 1 << 12), data.rfind(b"data.pkl", max(0, len(data) - (1 << 24)))
    return data[:2] == b"PK" and max(head, tail) >= 0


def open_torch_zip(path: Path, data: mmap.mmap) -> Checkpoint:
    """Read the pickle and find the tensors: see torch_pickle.find_tensors.

    Raises UserError for a cut-off or damaged file, and for a pickle that names anything that is not in the list.
    """
    again = "fetch or write it again"
    with Archive(path, "a PyTorch file", again) as archive:
        members = archive.members
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive with {len(pickles)} PyTorch pickles, not a checkpoint")
        root = pickles[0][: -len("data.pkl")]
        # Before anything is unpacked: the tensors are read in place, and unpackers have errors of their own. Only the
        # code of a TorchScript archive is compressed, which is not read.
        read = (name for name in members if name in pickles or name.startswith(f"{root}data/"))
        if any(members[name].compress_type != zipfile.ZIP_STORED for name in read):
            raise UserError(f"{path} is a compressed zip; PyTorch writes uncompressed ones: {again}")
        program = archive.read(pickles[0], MOST_PICKLE)
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder", MOST_ORDER) != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not read here")
    try:
        (content,), _ = run(io.BytesIO(program))
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
        if entry is None or starts[key][0] + starts[key][1] > len(data):
            raise UserError(f"{path} is damaged: {plain(name)} {tensor.shape} does not lie within its data: {again}")
        entries[name] = entry
    return CheckpointFile(path, "torch", data, entries, {})


def _start(data: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its own header, whose padding the list at the end does not know."""
    head = data[max(0, member.header_offset) : member.header_offset + 30]
    # A damaged list points anywhere: past the end then, as all is refused that does not lie within the file.
    return member.header_offset + 30 + sum(struct.unpack("<HH", head[26:])) if len(head) == 30 else len(data) + 1


def entry_of(tensor: Tensor, start: int, size: int) -> Entry | None:
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
