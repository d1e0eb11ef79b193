"""A base model in whatever form it comes: opened, and its names planned; what is none is named for what it is."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ldm.errors import UserError
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.diffusers_folder import DiffusersFolder, open_folder
from ldm.weights.names import Plan, detect_family, plan_names
from ldm.weights.read import content_hash, open_checkpoint

_LORA_MARKS = (
    ".lora_down.", ".lora_up.", "lora_unet_", "lora_te", ".lora_A.", ".lora_B.", "_lora.", ".lora.up.", ".lora.down.",
    ".lora_linear_layer.", ".hada_w", ".lokr_w", "unet:", "text_encoder:",
)  # fmt: skip


def open_base(path: str | os.PathLike) -> Checkpoint | DiffusersFolder:
    """Open a single file of any format or a diffusers folder. See open_checkpoint and open_folder for the errors."""
    return open_folder(Path(path)) if os.path.isdir(path) else open_checkpoint(path)


def plan_base(checkpoint: Checkpoint | DiffusersFolder, ema: bool = False) -> Plan:
    """The plan for a base checkpoint, judged by its names; `ema`: see plan_names. Raises UserError for anything else: a
    LoRA, SDXL, a textual inversion, one component alone."""
    names = list(checkpoint)
    path = checkpoint.path
    if sum(any(mark in name for mark in _LORA_MARKS) for name in names) * 2 > len(names):
        raise UserError(f"{path} is a LoRA file, not a base checkpoint: give it as --lora_ckpt_path")
    if any(re.search(r"\.(lora_down\.weight|lora_up\.weight|lora_[AB])$", name) for name in names):
        raise UserError(
            f"{path} has LoRA beside its weights: fold it in with tools/lora/cvtckpt.py --mode merge, or take it out "
            "with --mode extract --out_base"
        )
    if any(name.startswith(("conditioner.embedders.", "model.diffusion_model.label_emb.", "unet/add_embedding."))
           for name in names):
        raise UserError(f"{path} is an SDXL checkpoint; only SD1.x and SD2.x are supported")
    if any(name.startswith("control_model.") for name in names):
        raise UserError(f"{path} is a ControlNet, not a base checkpoint")
    if detect_family(names) is None:
        part = _diffusers_part(names)
        if part:
            raise UserError(
                f"{path} is the {part} of a diffusers folder alone, not a single-file checkpoint: "
                "give the folder, which holds the whole model"
            )
        if names and all(name in ("emb_params", "string_to_param.*") or name.startswith("<") for name in names):
            raise UserError(f"{path} is a textual-inversion embedding, not a base checkpoint")
        shown = ", ".join(names[:2]) or "none"
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: {len(names)} unknown names ({shown}, ...)")
    try:
        return plan_names(names, ema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def base_hash(path: str | os.PathLike) -> str:
    """The identity of a base model: content_hash of a file; of a folder, one of those of all its weights."""
    if not os.path.isdir(path):
        return content_hash(path)
    digest = hashlib.sha256()
    for file in open_folder(Path(path)).files:
        digest.update(f"{file.relative_to(path)} {content_hash(file)}\n".encode())
    return digest.hexdigest()


def _diffusers_part(names: list[str]) -> str | None:
    if any(name.startswith("down_blocks.") for name in names):
        return "UNet"
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return "VAE"
    if any(name.startswith("text_model.") for name in names):
        return "text encoder"
    return None
