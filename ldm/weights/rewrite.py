"""Write a base model with changed weights in the form of the original, or as one fp16 file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from ldm.files.atomic import atomic_folder, temporary_folder
from ldm.files.inputs import is_folder
from ldm.files.paths import check_free, writing
from ldm.weights.architecture import yaml_beside
from ldm.weights.arrays import Checkpoint, RenamedCheckpoint
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from ldm.weights.diffusers_folder.reader import STEMS, DiffusersFolder

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".index.json")


def write_base_model(path: Path, arrays: Checkpoint, base: Checkpoint) -> None:
    """Write arrays under the names of a base model's checkpoint in the form of that checkpoint.

    That is a single file, or a diffusers folder with everything else that is in the original one. A model YAML beside
    the original is copied.

    Args:
        path: The file or folder to write.
        arrays: The arrays.
        base: The original checkpoint.

    Raises:
        UserError: The file or folder cannot be written.
    """
    if isinstance(base, DiffusersFolder):
        _write_folder(path, arrays, base)
    else:
        write_checkpoint(path, arrays, base.metadata)
    model_yaml, target = yaml_beside(base.path), yaml_beside(path)
    if model_yaml.is_file() and not target.exists():
        shutil.copyfile(model_yaml, target)


def write_fp16_file(path: Path, arrays: Checkpoint, base: Checkpoint) -> None:
    """Write arrays under the names of a base model's checkpoint as a single fp16 file.

    A .safetensors gets the published names, a .ckpt mindone's. Raises UserError as ldm.weights.convert.convert.
    """
    with temporary_folder(path) as folder:
        merged = folder / ("merged" if isinstance(base, DiffusersFolder) else "merged.safetensors")
        write_base_model(merged, arrays, base)
        convert(merged, path, dtype="fp16")


@contextmanager
def open_as_single_file(path: Path, target: Path) -> Iterator[Checkpoint]:
    """Open a base model's checkpoint. A diffusers folder is first converted to a temporary file beside `target`."""
    if not is_folder(path):
        yield open_checkpoint(path)
        return
    with temporary_folder(target) as folder:
        file = folder / "single.safetensors"
        convert(path, file, format="own")
        yield open_checkpoint(file)


def _write_folder(path: Path, arrays: Checkpoint, base: DiffusersFolder) -> None:
    check_free(path, empty_folder=True)
    with writing(path), atomic_folder(path) as folder:
        shutil.copytree(base.path, folder, ignore=_ignore_weights(base), dirs_exist_ok=True)
        for component, place in base.folders.items():
            prefix = f"{component}/"
            names = {name[len(prefix) :]: name for name in arrays if name.startswith(prefix)}
            file = folder / place.relative_to(base.path) / f"{STEMS[component][0]}.safetensors"
            write_checkpoint(file, RenamedCheckpoint(arrays, names), {"format": "pt"})


def _ignore_weights(base: DiffusersFolder) -> Callable[[str, list[str]], list[str]]:
    """Return a filter for copytree that leaves out the weights, which are written anew."""
    folders = {str(folder) for folder in base.folders.values()}
    return lambda folder, names: [name for name in names if folder in folders and name.endswith(_WEIGHT_SUFFIXES)]
