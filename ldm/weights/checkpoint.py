"""Open, read and write checkpoint files. Nothing that a file holds is executed."""

from __future__ import annotations

import difflib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_folder, is_there, open_file
from ldm.files.paths import writing
from ldm.weights.arrays import Arrays, ArraysInMemory, Checkpoint
from ldm.weights.file_formats.mindspore_ckpt import open_ckpt, write_ckpt
from ldm.weights.file_formats.safetensors_file import is_safetensors, open_safetensors, write_safetensors
from ldm.weights.file_formats.torch_legacy import is_torch_legacy, open_torch_legacy
from ldm.weights.file_formats.torch_zip import is_torch_zip, open_torch_zip
from ldm.weights.recognise import describe_file, looks_like_text

WRITERS = {".safetensors": write_safetensors, ".ckpt": write_ckpt}


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a .safetensors file, a MindSpore .ckpt or a PyTorch file. The content decides which, not the suffix.

    Raises:
        UserError: The file is missing, empty, cut off, damaged, or not a checkpoint.
    """
    path = Path(path)
    if is_folder(path):
        raise UserError(f"{path} is a folder: name the file in it ({' or '.join(WRITERS)})")
    data = _map_file(path)
    if is_torch_zip(data):
        return open_torch_zip(path, data)
    if is_torch_legacy(data):
        return open_torch_legacy(path, data)
    if data[:1] == b"\n" and not looks_like_text(data[:512]):
        return open_ckpt(path, data)
    if is_safetensors(data):
        return open_safetensors(path, data)
    raise UserError(f"{path} is {describe_file(path, data[:512])}")


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all arrays and the metadata of a checkpoint file. Raises UserError as open_checkpoint."""
    checkpoint = open_checkpoint(path)
    return dict(checkpoint), checkpoint.metadata


def write_checkpoint(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file or a MindSpore .ckpt, as the suffix of `path` says.

    The file is written under a temporary name and then renamed. `mindspore.load_checkpoint` returns the metadata of a
    .ckpt as strings beside the parameters.

    Args:
        path: File to write. An existing one is replaced.
        arrays: Name -> array. A scalar is a 0-d array. One array at a time is read from an `Arrays`.
        metadata: Name -> text, with names that no array has.

    Raises:
        UserError: The suffix is another one, or the disk refuses.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    if path.suffix not in WRITERS:
        raise UserError(f"{path}: a checkpoint is written as {' or '.join(WRITERS)}, not {path.suffix or 'no suffix'}")
    both = metadata.keys() & arrays.keys()
    if both:
        raise ValueError(f"names of both an array and a text: {sorted(both)}")
    for name, text in metadata.items():
        if not isinstance(text, str):
            raise TypeError(f"metadata {name!r} is {type(text).__name__}, not str")
    with writing(path), atomic_path(path) as temporary:
        if not isinstance(arrays, Arrays):
            arrays = ArraysInMemory({name: np.asarray(array) for name, array in arrays.items()})
        WRITERS[path.suffix](temporary, arrays, metadata)


def _map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only. Raises UserError if it is missing, empty, or cannot be mapped."""
    if not is_there(path):
        similar = difflib.get_close_matches(path.name, _names_beside(path), 1)
        hint = f"did you mean {similar[0]}?" if similar else "check the path"
        raise UserError(f"{plain(path)} does not exist: {hint}")
    with open_file(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{plain(path)} is an empty file: did a download or a run stop? Make it again")
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # the file system cannot map files, or the file has been truncated
            raise UserError(f"{plain(path)} cannot be mapped into memory: {error}: copy it to a local disk") from None


def _names_beside(path: Path) -> list[str]:
    """List the folder of a file, up to 10,000 names, since comparing them takes time. Empty if it cannot be read."""
    try:
        return os.listdir(path.parent)[:10_000]
    except OSError:
        return []
