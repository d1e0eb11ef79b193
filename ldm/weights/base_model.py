"""A base model in whatever form it comes: opened, and its names planned; what is none is named for what it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.files.inputs import is_folder
from ldm.weights.arrays import Checkpoint
from ldm.weights.checkpoint import content_hash, open_checkpoint
from ldm.weights.diffusers_folder.reader import DiffusersFolder, open_folder
from ldm.weights.names import LABELS, KeyMap, component_of, detect_family, map_keys
from ldm.weights.recognise import check_base_model, recognise


class PrefixedArrays(Checkpoint):
    """The arrays of another mapping, with a prefix before their names."""

    def __init__(self, arrays: Checkpoint, prefix: str):
        self.path, self.format, self.metadata = arrays.path, arrays.format, arrays.metadata
        self._arrays, self._prefix = arrays, prefix

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        return self._arrays.spec(name[len(self._prefix) :])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name[len(self._prefix) :]]

    def release(self, name: str) -> None:
        self._arrays.release(name[len(self._prefix) :])

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_base_model(path: str | os.PathLike) -> Checkpoint:
    """Open a single file of any format or a diffusers folder. See open_checkpoint and open_folder for the errors."""
    return open_folder(Path(path)) if is_folder(path) else open_checkpoint(path)


def open_component(path: str | os.PathLike, component: str) -> Checkpoint:
    """Open what holds one network, "unet" or "vae", to be put in the place of a base's: a file or folder with that
    network alone, under its own names, or any base model. Raises UserError as open_base_model, and for another network.
    """
    checkpoint = open_base_model(path)
    content = recognise(checkpoint)
    if content.kind == "component":
        checkpoint = PrefixedArrays(checkpoint, content.prefix)
    if detect_family(checkpoint) is not None and component not in map(component_of, checkpoint):
        raise UserError(f"{checkpoint.path} holds no {LABELS[component]}: give a file or folder with one")
    return checkpoint


def map_base_model(checkpoint: Checkpoint, ema: bool = False) -> KeyMap:
    """The plan for a base checkpoint, judged by its names; `ema`: see map_keys. Raises UserError for anything else: a
    LoRA, SDXL and other models, a textual inversion, one component alone.
    """
    check_base_model(checkpoint)
    path = checkpoint.path
    if ema and isinstance(checkpoint, DiffusersFolder):
        if checkpoint.variants.get("unet") == "non_ema":
            raise UserError(
                f"{path} holds the UNet without its moving averages alone (non_ema): leave out the flag "
                "that asks for EMA, or fetch the file without non_ema in its name"
            )
        ema = not checkpoint.has_averages  # what the folder gives are the averages already
    try:
        return map_keys(checkpoint, ema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def base_model_hash(path: str | os.PathLike) -> str:
    """The identity of a base model: content_hash of a file; of a folder, one of those of all its weights."""
    if not is_folder(path):
        return content_hash(path)
    digest = hashlib.sha256()
    folder = open_folder(Path(path))
    for file in folder.files:
        digest.update(f"{file.relative_to(folder.path)} {content_hash(file)}\n".encode())
    return digest.hexdigest()
