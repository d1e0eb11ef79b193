"""A base model in whatever form it comes: opened, and its names planned; what is none is named for what it is."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder
from ldm.weights.arrays import Arrays, Checkpoint
from ldm.weights.checkpoint import content_hash, open_checkpoint
from ldm.weights.diffusers_folder.reader import DiffusersFolder, open_folder
from ldm.weights.names import COMPONENTS, LABELS, KeyMap, component_of, detect_family, map_keys

T = TypeVar("T")

_LORA_MARKS = (
    ".lora_down.", ".lora_up.", "lora_unet_", "lora_te", ".lora_A.", ".lora_B.", "_lora.", ".lora.up.", ".lora.down.",
    ".lora_linear_layer.", ".hada_w", ".lokr_w", "unet:", "text_encoder:",
)  # fmt: skip
# How names begin that SD1.x and SD2.x have not, and whose they are. The first that is found counts.
_OTHER_MODELS = {
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "noise_augmentor.": "an unCLIP checkpoint",
    "low_scale_model.": "an upscaler's checkpoint",
    "conditioner.embedders.": "an SDXL checkpoint",
    "model.diffusion_model.label_emb.": "an SDXL checkpoint",
    "unet/add_embedding.": "an SDXL checkpoint",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
}
# A network in a file of its own: how its names begin -> what it is, and what is put before its names.
_ALONE = {
    "down_blocks.": ("the UNet of a diffusers folder", "unet/"),
    "encoder.down_blocks.": ("the VAE of a diffusers folder", "vae/"),
    "text_model.": ("the text encoder of a diffusers folder", "text_encoder/"),
    "embeddings.token_embedding.": ("the text encoder of a diffusers folder", "text_encoder/"),
    "encoder.down.": ("the VAE of a single file", COMPONENTS["vae"]),
    "input_blocks.": ("the UNet of a single file", COMPONENTS["unet"]),
}
# Input channels of UNets that take more than noisy latents.
OTHER_TASKS = {
    5: "a depth-to-image checkpoint", 7: "an upscaler's checkpoint", 8: "an InstructPix2Pix checkpoint",
    9: "an inpainting checkpoint",
}  # fmt: skip


class PrefixedArraysArrays(Arrays):
    """The arrays of another mapping, with a prefix before their names."""

    def __init__(self, arrays: Checkpoint, prefix: str):
        self.path, self.metadata = arrays.path, arrays.metadata
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


def open_base_model(path: str | os.PathLike) -> Checkpoint | DiffusersFolder:
    """Open a single file of any format or a diffusers folder. See open_checkpoint and open_folder for the errors."""
    return open_folder(Path(path)) if is_folder(path) else open_checkpoint(path)


def open_component(path: str | os.PathLike, component: str) -> Checkpoint | DiffusersFolder | PrefixedArraysArrays:
    """Open what holds one network, "unet" or "vae", to be put in the place of a base's: a file or folder with that
    network alone, under its own names, or any base model. Raises UserError as open_base_model, and for another network.
    """
    checkpoint = open_base_model(path)
    names = list(checkpoint)
    if detect_family(names) is None:
        alone = _first_found(names, _ALONE)
        if alone is not None:
            checkpoint = PrefixedArraysArrays(checkpoint, alone[1])
    if detect_family(checkpoint) is not None and component not in map(component_of, checkpoint):
        raise UserError(f"{checkpoint.path} holds no {LABELS[component]}: give a file or folder with one")
    return checkpoint


def map_base_model(checkpoint: Checkpoint | DiffusersFolder | PrefixedArraysArrays, ema: bool = False) -> KeyMap:
    """The plan for a base checkpoint, judged by its names; `ema`: see map_keys. Raises UserError for anything else: a
    LoRA, SDXL and other models, a textual inversion, one component alone.
    """
    names = list(checkpoint)
    path = checkpoint.path
    if sum(any(mark in name for mark in _LORA_MARKS) for name in names) * 2 > len(names):
        raise UserError(f"{path} is a LoRA file, not a base checkpoint: give it as --lora_ckpt_path")
    if any(re.search(r"\.(lora_down\.weight|lora_up\.weight|lora_[AB])$", name) for name in names):
        raise UserError(
            f"{path} has LoRA beside its weights: fold it in with tools/lora/cvtckpt.py --mode merge, or take it out "
            "with --mode extract --out_base"
        )
    other = _first_found(names, _OTHER_MODELS)
    if other:
        raise UserError(f"{path} is {other}; only SD1.x and SD2.x are supported")
    if detect_family(names) is None:
        alone = _first_found(names, _ALONE)
        if alone:
            raise UserError(
                f"{path} is {alone[0]} alone, not a single-file checkpoint: give the folder or the file "
                "that holds the whole model"
            )
        if names and all(name in ("emb_params", "string_to_param.*") or name.startswith("<") for name in names):
            raise UserError(f"{path} is a textual-inversion embedding, not a base checkpoint")
        shown = plain(", ".join(names[:2])) or "none"
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: {len(names)} unknown names ({shown}, ...)")
    if ema and isinstance(checkpoint, DiffusersFolder):
        if checkpoint.variants.get("unet") == "non_ema":
            raise UserError(
                f"{path} holds the UNet without its moving averages alone (non_ema): leave out the flag "
                "that asks for EMA, or fetch the file without non_ema in its name"
            )
        ema = not checkpoint.has_averages  # what the folder gives are the averages already
    try:
        return map_keys(names, ema)
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


def other_task(in_channels: int) -> str:
    """The end of a sentence on a checkpoint whose UNet takes so many channels, one of OTHER_TASKS."""
    return f"{OTHER_TASKS[in_channels]} ({in_channels} input channels), which is not supported"


def _first_found(names: list[str], beginnings: dict[str, T]) -> T | None:
    """What stands in `beginnings` for the first of its keys that a name begins with."""
    return next((what for key, what in beginnings.items() if any(name.startswith(key) for name in names)), None)
