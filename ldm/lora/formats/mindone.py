"""This project's LoRA files, in the names of mindone's Stable Diffusion example: a .ckpt, or a .safetensors.

    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight
    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight
    lora_rank, lora_alpha, lora_scale; architecture, prediction_type (texts)

Layers have their canonical names. dW = lora_scale * lora_alpha / rank * up @ down. A layer with an alpha of its own has
`<layer>.alpha`. mindone writes neither alpha nor scale, which stands for alpha = rank and scale 1. Its text encoder has
q, k and v in one layer `in_proj`: its `up` is split by rows, which is exact, and `down` is shared.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats.factors import check_pair, read_factors, read_number, to_dtype, without_extras
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA, LoRALayer, lora_metadata
from ldm.weights.arrays import Checkpoint
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.names import component_of, compvis, mindone

SETTINGS = ("lora_rank", "lora_alpha", "lora_scale")  # entries for the whole file
_FACTOR = re.compile(r"(.+)\.(lora_down\.weight|lora_up\.weight|alpha)\Z")

log = logging.getLogger(__name__)


def detect(keys: Iterable[str]) -> str | None:
    """Return "mindone" for the keys of such a file, otherwise None."""
    factors = [key for key in keys if key.endswith((".lora_down.weight", ".lora_up.weight"))]
    return "mindone" if factors and all(component_of(key) != "other" for key in factors) else None


def read(checkpoint: Checkpoint, base: BaseModules | None = None) -> LoRA:
    """Read an opened file. `base` is not needed.

    Other arrays are left out with a warning: mindone's files have frozen weights beside the factors.

    Raises:
        UserError: Half of a pair is missing, factors do not go together or have another rank than lora_rank, or a name
            is neither canonical nor mindone's.
    """
    path = checkpoint.path
    settings = {key: _setting(checkpoint, key) for key in SETTINGS if key in checkpoint or key in checkpoint.metadata}
    keys: dict[str, dict[str, str]] = {}
    others = []
    for key in checkpoint:
        match = _FACTOR.match(key)
        if match and component_of(key) != "other":
            keys.setdefault(match.group(1), {})[match.group(2).split(".")[0]] = key
        elif key not in SETTINGS:
            others.append(key)
    others = without_extras(path, others)
    if others:
        log.warning("%s: %d arrays that are not LoRA's are left out (%s, ...)", path, len(others), plain(others[0]))

    layers: dict[str, LoRALayer] = {}
    for module, factors in keys.items():
        check_pair(path, module, factors, ("lora_down", "lora_up"))
        alpha = settings.get("lora_alpha")
        if "alpha" in factors:
            alpha = read_number(checkpoint, module, factors["alpha"])
        layer = read_factors(checkpoint, module, factors["lora_down"], factors["lora_up"], alpha)
        for name, rows in _canonical_layers(path, module, layer.up):
            if name in layers:
                raise UserError(f"{path}: {plain(name)} is there twice, alone and in one layer with others")
            layers[name] = replace(layer, up=rows, alpha=layer.alpha * settings.get("lora_scale", 1.0))
    lora = LoRA(layers, lora_metadata(checkpoint.metadata))
    if "lora_rank" in settings and settings["lora_rank"] != max(lora.ranks()):
        raise UserError(f"{path} has lora_rank {settings['lora_rank']:g}, but its factors have {lora.ranks()}")
    return lora


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules | None = None, dtype: str = "fp32") -> None:
    """Write a .ckpt or .safetensors, with the factors in "fp32", "fp16" or "bf16". `base` is not needed."""
    arrays: dict[str, np.ndarray] = {}
    for name, layer in lora.layers.items():
        for factor, array in (("down", layer.down), ("up", layer.up)):
            arrays[f"{name}.lora_{factor}.weight"] = to_dtype(array, dtype, f"{path}: {name}")
    alphas = {layer.alpha for layer in lora.layers.values()}
    if len(alphas) == 1:
        arrays["lora_alpha"] = np.array(alphas.pop(), np.float64)
    else:
        arrays.update({f"{name}.alpha": np.array(layer.alpha, np.float64) for name, layer in lora.layers.items()})
    arrays["lora_rank"] = np.array(max(lora.ranks()), np.int64)
    arrays["lora_scale"] = np.array(1.0, np.float64)
    write_checkpoint(path, arrays, lora.metadata)


def _canonical_layers(path: Path, module: str, up: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return (canonical layer name, its rows of up) for each layer that a layer of the file stands for."""
    weight = f"{module}.weight"
    # In the UNet mindone's names for attention are the canonical ones. In its text encoder none is.
    names = (mindone.map_key(weight) if component_of(weight) == "text_encoder" else None) or compvis.map_key(weight)
    if not isinstance(names, tuple):
        raise UserError(f"{path}: {plain(module)} is no layer of Stable Diffusion 1 or 2")
    if up.shape[0] % len(names):
        raise UserError(f"{path}: the {up.shape[0]} rows of {plain(module)} are not those of {len(names)} layers")
    rows = up.shape[0] // len(names)
    return [(name[: -len(".weight")], up[i * rows : (i + 1) * rows]) for i, name in enumerate(names)]


def _setting(checkpoint: Checkpoint, key: str) -> float:
    """Read an entry for the whole file, which is an array or a text of the metadata."""
    if key in checkpoint:
        number = read_number(checkpoint, "the whole file", key)
    else:
        text = checkpoint.metadata[key]
        try:
            number = float(text)
        except ValueError:
            raise UserError(f"{checkpoint.path}: {key} is {plain(text)!r}, which is not a number") from None
    if not math.isfinite(number) or (number <= 0 and key == "lora_rank"):
        raise UserError(f"{checkpoint.path}: {key} is {number}, which makes no sense")
    return number
