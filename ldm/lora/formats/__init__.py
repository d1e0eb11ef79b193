"""LoRA files: one module a format, each with NAME, detect(names), read(checkpoint) and write(path, state)."""

from __future__ import annotations

import os

import numpy as np

from ldm.errors import UserError
from ldm.lora.formats import mindone
from ldm.lora.state import LoRAState
from ldm.weights.names import detect_family
from ldm.weights.read import open_checkpoint

FORMATS = (mindone,)


def read_lora(path: str | os.PathLike) -> LoRAState:
    """Read a LoRA file of any known format, told by its names.

    Raises UserError if it cannot be read, is something else (which it says), or holds values that are not finite.
    """
    checkpoint = open_checkpoint(path)
    names = list(checkpoint)
    reader = next((format for format in FORMATS if format.detect(names)), None)
    if reader is None:
        raise UserError(f"{path} is {_describe(names)}")
    state = reader.read(checkpoint)
    for name, layer in state.layers.items():
        if not (np.isfinite(layer.down).all() and np.isfinite(layer.up).all() and np.isfinite(layer.alpha)):
            raise UserError(f"{path}: {name} holds values that are not finite: its training went wrong")
    return state


def write_lora(path: str | os.PathLike, state: LoRAState) -> None:
    """Write this project's format, as .ckpt or .safetensors by the suffix of `path`. Raises UserError."""
    mindone.write(path, state)


def _describe(names: list[str]) -> str:
    """What a checkpoint without a readable LoRA in it is, by its names."""

    def some(*marks: str) -> bool:
        return any(mark in name for name in names for mark in marks)

    if not names:
        return "a checkpoint without any arrays"
    if some(".hada_w", ".lokr_w", ".hada_t", ".lokr_t"):
        return "a LyCORIS file (LoHa or LoKr): its factors are no low-rank pairs, and are not supported"
    if some("lora_unet_", "lora_te_", "lora_te1_"):
        return "a kohya (A1111) LoRA, which is not read yet; this project's and mindone's .ckpt are"
    if any(name.startswith("base_model.model.") for name in names):
        return "a PEFT LoRA, which is not read yet; this project's and mindone's .ckpt are"
    if some(".processor.", ".lora.down.", ".lora_linear_layer.", ".lora_A.", "_lora.down."):
        return "a LoRA in diffusers' names, which are not read yet; this project's and mindone's .ckpt are"
    if any(name.startswith(("unet:", "text_encoder:")) for name in names):
        return "a LoRA of cloneofsimo's lora, which is not read yet; this project's and mindone's .ckpt are"
    if some("emb_params", "string_to_param") or (len(names) <= 8 and all(name.startswith("<") for name in names)):
        return "a textual-inversion embedding, not a LoRA"
    if some(".lora_up."):
        return "half a LoRA: it holds lora_up and no lora_down"
    if some("conditioner.embedders."):
        return "an SDXL base checkpoint, not a LoRA"
    if detect_family(names) is not None or some("down_blocks.", "text_model.encoder."):
        return "base weights, not a LoRA: give it as --ckpt_path (generating) or --pretrained_model_path (training)"
    return f"not a LoRA: {len(names)} unknown names ({', '.join(names[:2])}, ...)"
