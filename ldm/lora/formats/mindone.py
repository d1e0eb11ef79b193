"""This project's LoRA files, in the names of mindone's Stable Diffusion example: a .ckpt, or a .safetensors.

    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight
    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight
    lora_rank, lora_alpha, lora_scale; architecture, prediction_type (texts)

Layers have their canonical names. dW = lora_scale * lora_alpha / rank * up @ down. A layer with an alpha of its own has
`<layer>.alpha`. Layers that are no pairs of low-rank factors have LyCORIS's names for their arrays, see
ldm.lora.formats.parts, and learned tokens have A1111's. mindone writes neither alpha nor scale, which stands for
alpha = rank and scale 1. Its text encoder has q, k and v in one layer `in_proj`: its `up` is split by rows, which is
exact, and `down` is shared.
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
from ldm.lora.formats.factors import embedding_arrays, read_embeddings, read_number, to_dtype, without_extras
from ldm.lora.formats.modules import BaseModules
from ldm.lora.formats.parts import PART, part_of, read_updates, shapes_of
from ldm.lora.lora import LoRA, lora_metadata
from ldm.lora.updates import IA3, Full, LayerUpdate, LoRALayer
from ldm.weights.arrays import Checkpoint
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.names import component_of, compvis, mindone

SETTINGS = ("lora_rank", "lora_alpha", "lora_scale")  # entries for the whole file
# IA3's `weight` would be that of a frozen layer.
_IA3 = {"ia3_weight": "weight", "ia3_on_input": "on_input"}
LAYER_PART = rf"{PART}|{'|'.join(_IA3)}"  # a pattern of what follows a layer's name
_FACTOR = re.compile(rf"(.+)\.({LAYER_PART})\Z")

log = logging.getLogger(__name__)


def detect(keys: Iterable[str]) -> str | None:
    """Return "mindone" for the keys of such a file, otherwise None."""
    factors = [key for key in keys if _FACTOR.match(key) and not key.endswith(".alpha")]
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
            part = match.group(2)
            keys.setdefault(match.group(1), {})[_IA3.get(part) or part_of(part)] = key
        elif key not in SETTINGS:
            others.append(key)
    others = without_extras(others)
    if others:
        log.warning("%s: %d arrays that are not LoRA's are left out (%s, ...)", path, len(others), plain(others[0]))

    layers: dict[str, LayerUpdate] = {}
    biases: dict[str, Full] = {}
    scale = settings.get("lora_scale", 1.0)
    for module, parts in keys.items():
        shapes_of(checkpoint, module, parts)
        update, bias = read_updates(checkpoint, module, parts, settings.get("lora_alpha"))
        if isinstance(update, LoRALayer):
            update = replace(update, alpha=update.alpha * scale)
        elif scale != 1.0:
            raise UserError(
                f"{path}: lora_scale is {scale:g}, which only pairs of low-rank factors have: {plain(module)}"
            )
        for name, part_of_update, part_of_bias in _canonical_layers(path, module, update, bias):
            if name in layers or name in biases:
                raise UserError(f"{path}: {plain(name)} is there twice, alone and in one layer with others")
            if part_of_update is not None:
                layers[name] = part_of_update
            if part_of_bias is not None:
                biases[name] = part_of_bias
    lora = LoRA(layers, lora_metadata(checkpoint.metadata), read_embeddings(checkpoint), biases)
    if "lora_rank" in settings and settings["lora_rank"] != max(lora.ranks(), default=0):
        raise UserError(f"{path} has lora_rank {settings['lora_rank']:g}, but its factors have {lora.ranks()}")
    return lora


def write(path: str | os.PathLike, lora: LoRA, base: BaseModules | None = None, dtype: str = "fp32") -> None:
    """Write a .ckpt or .safetensors, with the factors in "fp32", "fp16" or "bf16". `base` is not needed."""
    arrays = {**layer_arrays(lora), **embedding_arrays(lora)}
    alphas = {layer.alpha if isinstance(layer, LoRALayer) else None for layer in lora.layers.values()}
    common = alphas.pop() if len(alphas) == 1 else None
    if common is not None:
        arrays = {name: array for name, array in arrays.items() if not name.endswith(".alpha")}
        arrays["lora_alpha"] = np.array(common, np.float64)
    # Scalars are fp64, in which an alpha is what it was.
    arrays = {
        name: to_dtype(array, dtype, f"{path}: {name}") if array.ndim else array for name, array in arrays.items()
    }
    if lora.ranks():
        arrays["lora_rank"] = np.array(max(lora.ranks()), np.int64)
    arrays["lora_scale"] = np.array(1.0, np.float64)
    write_checkpoint(path, arrays, lora.metadata)


def layer_arrays(lora: LoRA) -> dict[str, np.ndarray]:
    """Return the arrays of all layers and biases by their names in a file, each layer with its alpha."""
    ia3 = {part: name for name, part in _IA3.items()}
    arrays = {}
    for name, layer in lora.layers.items():
        for part, array in layer.arrays().items():
            arrays[f"{name}.{ia3[part] if isinstance(layer, IA3) else part}"] = array
    arrays.update({f"{name}.diff_b": bias.difference for name, bias in lora.biases.items()})
    return arrays


def _canonical_layers(
    path: Path, module: str, update: LayerUpdate | None, bias: Full | None
) -> list[tuple[str, LayerUpdate | None, Full | None]]:
    """Return (canonical layer name, its part of the update, of the bias) for each layer that `module` stands for."""
    weight = f"{module}.weight"
    # In the UNet mindone's names for attention are the canonical ones. In its text encoder none is.
    names = (mindone.map_key(weight) if component_of(weight) == "text_encoder" else None) or compvis.map_key(weight)
    if not isinstance(names, tuple):
        raise UserError(f"{path}: {plain(module)} is no layer of Stable Diffusion 1 or 2")
    layers = [name[: -len(".weight")] for name in names]
    if len(layers) == 1:
        return [(layers[0], update, bias)]
    if not (update is None or isinstance(update, LoRALayer)):
        raise UserError(f"{path}: {plain(module)} stands for {len(layers)} layers, which only low-rank factors can")
    size = len(update.up) if update is not None else len(bias.difference) if bias is not None else 0
    if size % len(layers) or bias is not None and len(bias.difference) != size:
        raise UserError(f"{path}: the {size} rows of {plain(module)} are not those of {len(layers)} layers")
    parts: list[tuple[str, LayerUpdate | None, Full | None]] = []
    for i, name in enumerate(layers):
        rows = slice(i * size // len(layers), (i + 1) * size // len(layers))
        of_update = None if update is None else replace(update, up=update.up[rows])
        parts.append((name, of_update, None if bias is None else replace(bias, difference=bias.difference[rows])))
    return parts


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
