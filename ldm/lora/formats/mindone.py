"""This project's LoRA files, in the names of mindone's Stable Diffusion example.

`<layer>.lora_down.weight` and `<layer>.lora_up.weight` with canonical layer names, and entries of the whole file:
lora_rank; lora_alpha and lora_scale (dW = lora_scale * lora_alpha / rank * up @ down; mindone writes neither, which
stands for alpha = rank and scale 1); architecture and prediction_type of the base (texts). A layer with an alpha of its
own has `<layer>.alpha`. mindone's text encoder has q, k and v in one layer `in_proj`: its `up` is split by rows, which
is exact with `down` shared. The file is a MindSpore .ckpt, or .safetensors with the same entries.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats import pairs
from ldm.lora.lora import LoRA, LoRALayer
from ldm.weights.arrays import Arrays
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.names import component_of, compvis, mindone

METADATA = ("architecture", "prediction_type")
_SETTINGS = ("lora_rank", "lora_alpha", "lora_scale")
_FACTOR = re.compile(r"(.+)\.(lora_down\.weight|lora_up\.weight|alpha)\Z")

log = logging.getLogger(__name__)


def detect(names: Iterable[str]) -> bool:
    """Whether these are the names of such a file."""
    factors = [name for name in names if name.endswith((".lora_down.weight", ".lora_up.weight"))]
    return bool(factors) and all(component_of(name) != "other" for name in factors)


def read(checkpoint: Arrays) -> LoRA:
    """Read an opened file.

    Other arrays are left out with a warning: mindone's files have frozen weights beside the factors. Raises UserError
    for half a pair, factors that do not go together, a lora_rank that is not the factors', keys of what is no plain
    LoRA (DoRA, LyCORIS), and names that are not canonical and not mindone's.
    """
    path = checkpoint.path
    settings = {key: _number(checkpoint, key) for key in _SETTINGS if key in checkpoint or key in checkpoint.metadata}
    factors: dict[str, dict[str, str]] = {}
    others = []
    for key in checkpoint:
        found = _FACTOR.match(key)
        if found and component_of(key) != "other":
            factors.setdefault(found.group(1), {})[found.group(2).split(".")[0]] = key
        elif key not in _SETTINGS:
            others.append(key)
    others = pairs.without_extras(path, others)
    if others:
        log.warning("%s: %d arrays that are not LoRA's are left out (%s, ...)", path, len(others), plain(others[0]))

    layers: dict[str, LoRALayer] = {}
    for module, pair in factors.items():
        for half in ("lora_down", "lora_up"):
            if half not in pair:
                raise UserError(f"{path}: {plain(module)} lacks its {half}, half of a pair: the file is damaged")
        alpha = settings.get("lora_alpha")
        if "alpha" in pair:
            alpha = pairs.read_number(checkpoint, module, pair["alpha"])
        whole = pairs.read_factors(checkpoint, module, pair["lora_down"], pair["lora_up"], alpha)
        for name, rows in _layers_of(path, module, whole.up):
            if name in layers:
                raise UserError(f"{path}: {plain(name)} is there twice, whole and in one with others")
            layers[name] = replace(whole, up=rows, alpha=whole.alpha * settings.get("lora_scale", 1.0))
    state = LoRA(layers, {key: checkpoint.metadata[key] for key in METADATA if key in checkpoint.metadata})
    if "lora_rank" in settings and settings["lora_rank"] != max(state.ranks()):
        raise UserError(f"{path} says lora_rank {settings['lora_rank']:g}, but its factors are of {state.ranks()}")
    return state


def write(path: str | os.PathLike, state: LoRA, dtype: str = "fp32") -> None:
    """Write `state` as .ckpt or .safetensors, the factors as "fp32", "fp16" or "bf16".

    Raises UserError if it is empty or cannot be written.
    """
    if not state.layers:
        raise UserError(f"{path}: the LoRA has no layers, there is nothing to write")
    arrays: dict[str, np.ndarray] = {}
    for name, layer in state.layers.items():
        for half, array in (("down", layer.down), ("up", layer.up)):
            arrays[f"{name}.lora_{half}.weight"] = pairs.as_dtype(array, dtype, f"{path}: {name}")
    alphas = {layer.alpha for layer in state.layers.values()}
    if len(alphas) == 1:
        arrays["lora_alpha"] = np.array(alphas.pop(), np.float64)
    else:
        arrays.update({f"{name}.alpha": np.array(layer.alpha, np.float64) for name, layer in state.layers.items()})
    arrays["lora_rank"] = np.array(max(state.ranks()), np.int64)
    arrays["lora_scale"] = np.array(1.0, np.float64)
    write_checkpoint(path, arrays, {key: state.metadata[key] for key in METADATA if key in state.metadata})


def _layers_of(path, module: str, up: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(canonical layer name, its rows of up) of a layer as the file names it."""
    weight = f"{module}.weight"
    # In the UNet mindone's names for attention are the canonical ones; of its text encoder's none is.
    names = (mindone.map_key(weight) if component_of(weight) == "text_encoder" else None) or compvis.map_key(weight)
    if not isinstance(names, tuple):
        raise UserError(f"{path}: {plain(module)} is no layer of Stable Diffusion 1 or 2")
    if up.shape[0] % len(names):
        raise UserError(f"{path}: the {up.shape[0]} rows of {plain(module)} are not those of {len(names)} layers")
    rows = up.shape[0] // len(names)
    return [(name[: -len(".weight")], up[i * rows : (i + 1) * rows]) for i, name in enumerate(names)]


def _number(checkpoint: Arrays, key: str) -> float:
    if key in checkpoint:
        number = pairs.read_number(checkpoint, "the whole file", key)
    else:
        text = checkpoint.metadata[key]
        try:
            number = float(text)
        except ValueError:
            raise UserError(f"{checkpoint.path}: {key} is {plain(text)!r}, which is not a number") from None
    if not math.isfinite(number) or (number <= 0 and key == "lora_rank"):
        raise UserError(f"{checkpoint.path}: {key} is {number}, which makes no sense")
    return number
