"""Open base models in all forms, files and folders, and single networks that replace one of a base model."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ldm.errors import UserError
from ldm.files.inputs import check_file, content_hash, is_folder
from ldm.weights.arrays import Checkpoint, RenamedCheckpoint
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.diffusers_folder.reader import DiffusersFolder, open_diffusers_folder
from ldm.weights.names import LABELS, KeyMap, component_of, detect_family, map_keys
from ldm.weights.recognise import check_base_model, recognise


def open_base_model(path: str | os.PathLike) -> Checkpoint:
    """Open a single file of any format or a diffusers folder. map_base_model checks whether it is a base model."""
    return open_diffusers_folder(Path(path)) if is_folder(path) else open_checkpoint(path)


def open_component(path: str | os.PathLike, component: str) -> Checkpoint:
    """Open a checkpoint that holds the weights of one network, to replace that network of a base model.

    Args:
        path: A file or folder with the network alone, under its own names, or with a base model.
        component: "unet" or "vae".

    Raises:
        UserError: As open_base_model, and if it holds another network.
    """
    checkpoint = open_base_model(path)
    content = recognise(checkpoint)
    if content.kind == "component":
        checkpoint = RenamedCheckpoint(checkpoint, {content.prefix + name: name for name in checkpoint})
    if detect_family(checkpoint) is not None and component not in map(component_of, checkpoint):
        raise UserError(f"{checkpoint.path} holds no {LABELS[component]}: give a file or folder with one")
    return checkpoint


def map_base_model(checkpoint: Checkpoint, ema: bool = False) -> KeyMap:
    """Map the keys of a base model to canonical names, as map_keys.

    Raises:
        UserError: It is not a base model, or moving averages are asked for and missing.
    """
    check_base_model(checkpoint)
    if ema and isinstance(checkpoint, DiffusersFolder):
        if checkpoint.variants.get("unet") == "non_ema":
            raise UserError(
                f"{checkpoint.path} holds no moving averages (EMA) of the UNet, its file is non_ema: leave out the "
                "flag that asks for EMA, or fetch the file without non_ema in its name"
            )
        ema = not checkpoint.has_averages  # the weights that the folder gives are the averages already
    try:
        return map_keys(checkpoint, ema)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error


def base_model_hash(path: str | os.PathLike) -> str:
    """Return a hash that identifies a base model: content_hash of a file, or one hash over all weights of a folder.

    A file is read once in a process, unless it changes.
    """
    if not is_folder(path):
        return _hash_of_file(Path(path))
    digest = hashlib.sha256()
    folder = open_diffusers_folder(Path(path))
    for file in folder.files:
        digest.update(f"{file.relative_to(folder.path)} {_hash_of_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_of_file(path: Path) -> str:
    check_file(path)
    status = os.stat(path)
    return _hash_once(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _hash_once(path: str, *_: int) -> str:
    """Return content_hash of a file. The numbers are other ones when the file has changed."""
    return content_hash(path)
