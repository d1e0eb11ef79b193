"""Reading the formats whose keys name a layer and a factor: kohya's, diffusers' and PEFT's.

A format says how a key is parsed and how it names the layers of a base model. Reading then finds the base model that
has all the names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats.factors import (
    check_pair,
    check_types,
    checked_shape,
    factors_shape,
    make_layer,
    read_number,
    reshape_layer,
    without_extras,
)
from ldm.lora.formats.modules import BaseModules, Module, known_bases
from ldm.lora.lora import LoRALayer
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.names import same_up_to_1x1
from ldm.weights.recognise import sdxl_lora

# A key -> (the format's name of the layer, "down", "up", "mid" or "alpha"), or None for any other key.
Parse = Callable[[str], Optional[tuple[str, str]]]
# A base model -> its modules by the format's names.
Table = Callable[[BaseModules], Mapping[str, Module]]
# (the format's name of a layer, its rank) -> the alpha of a layer without an array for it.
Alpha = Callable[[str, int], float]
# The format's name of a layer -> "down", "up", "mid" or "alpha" -> key.
Keys = Mapping[str, Mapping[str, str]]

# PEFT's names of the two factors: A is down and B is up. The name of an adapter may stand before `weight`.
PEFT_FACTOR = r"lora_([AB])(?:\.(?!weight)[^.]+)?\.weight"
FACTOR_OF_LETTER = {"A": "down", "B": "up"}


def read_keyed(
    checkpoint: Checkpoint,
    parse: Parse,
    table: Table,
    base: BaseModules | None,
    alpha: Alpha = lambda layer, rank: rank,
) -> dict[str, LoRALayer]:
    """Read the layers of an opened file.

    Args:
        checkpoint: The file.
        parse: How the format's keys are parsed.
        table: How the format names the modules of a base model.
        base: The base model that the LoRA is for. None for the known one that has all the names and shapes.
        alpha: The alpha of layers for which the file has no array.

    Returns:
        Canonical layer name -> layer, fp32.

    Raises:
        UserError: Keys or layers are unknown, half of a pair is missing, factors do not go together, or (without
            `base`) the shapes are those of no known base model.
    """
    path = checkpoint.path
    keys = _keys_by_layer(checkpoint, parse)
    tables = _complete_tables(checkpoint, keys, table, base)
    shapes = {name: _shape(checkpoint, name, factors) for name, factors in keys.items()}
    modules = tables[base] if base else _best_table(checkpoint, keys, shapes, tables)
    layers: dict[str, LoRALayer] = {}
    sources: dict[str, str] = {}
    for name, factors in keys.items():
        module = modules[name]
        if module.name in layers:  # under two of its names
            raise UserError(f"{path}: {_duplicate(sources[module.name], factors['down'])}")
        if "mid" in factors and not same_up_to_1x1(shapes[name], module.shape):
            raise UserError(
                f"{path}: {name} is {shapes[name]}, in the model {module.shape}: it was made for another model"
            )
        layers[module.name] = reshape_layer(_layer(checkpoint, name, factors, alpha), module.shape)
        sources[module.name] = factors["down"]
    return layers


def _keys_by_layer(checkpoint: Checkpoint, parse: Parse) -> Keys:
    keys: dict[str, dict[str, str]] = {}
    unknown = []
    for key in checkpoint:
        parsed = parse(key)
        if parsed is None:
            unknown.append(key)
            continue
        name, factor = parsed
        if factor in keys.setdefault(name, {}):
            raise UserError(f"{checkpoint.path}: {_duplicate(keys[name][factor], key)}")
        keys[name][factor] = key
    unknown = without_extras(checkpoint.path, unknown)
    if unknown:
        raise UserError(
            f"{checkpoint.path}: {len(unknown)} of its {len(checkpoint)} keys belong to nothing in a LoRA, such as "
            f"{plain(unknown[0])}: is the file damaged, or of another kind?"
        )
    return keys


def _complete_tables(
    checkpoint: Checkpoint, keys: Keys, table: Table, base: BaseModules | None
) -> dict[BaseModules, Mapping[str, Module]]:
    """Return the tables that have every layer of `keys`, by base model. Raises UserError if there are none."""
    tables = {candidate: table(candidate) for candidate in ((base,) if base else known_bases())}
    complete = {candidate: modules for candidate, modules in tables.items() if keys.keys() <= modules.keys()}
    if complete:
        return complete
    _refuse_sdxl(checkpoint, keys)
    path = checkpoint.path
    fitting = next((other.label for other in known_bases() if keys.keys() <= table(other).keys()), "another model")
    best, modules = max(tables.items(), key=lambda item: len(keys.keys() & item[1].keys()))
    missing = [name for name in keys if name not in modules]
    if len(missing) == len(keys):
        labels = " or ".join(candidate.label for candidate in tables)
        raise UserError(
            f"{path}: none of its {len(keys)} layers is one of {labels}, such as {plain(missing[0])}: it was made for "
            f"{fitting}"
        )
    raise UserError(
        f"{path}: {len(missing)} of its {len(keys)} layers belong to nothing in {best.label}, such as "
        f"{plain(missing[0])}: it was made for {fitting}"
    )


def _best_table(
    checkpoint: Checkpoint,
    keys: Keys,
    shapes: Mapping[str, tuple[int, ...]],
    tables: Mapping[BaseModules, Mapping[str, Module]],
) -> Mapping[str, Module]:
    """Return the table whose modules have the shapes of the layers, best with as many axes. UserError if none has."""

    def score(shape: tuple[int, ...], module: Module) -> int:
        return 2 if shape == module.shape else int(same_up_to_1x1(shape, module.shape))

    reasons = []
    best, best_score = None, 0
    for base, modules in tables.items():
        scores = {name: score(shape, modules[name]) for name, shape in shapes.items()}
        wrong = next((name for name, points in scores.items() if not points), None)
        if wrong is not None:
            reasons.append(f"{wrong} is {shapes[wrong]}, in {base.label} {modules[wrong].shape}")
        elif sum(scores.values()) > best_score:
            best, best_score = modules, sum(scores.values())
    if best is None:
        _refuse_sdxl(checkpoint, keys)
        raise UserError(
            f"{checkpoint.path} fits no known base model: {'; '.join(reasons)}. Name its model YAML, or take another "
            "file"
        )
    return best


def _refuse_sdxl(checkpoint: Checkpoint, keys: Keys) -> None:
    """Raise UserError if a layer shows that the LoRA is for SDXL."""
    shapes = {name: checkpoint.shape(factors["down"]) if "down" in factors else () for name, factors in keys.items()}
    sdxl = sdxl_lora(shapes)
    if sdxl:
        raise UserError(f"{checkpoint.path} is {sdxl}")


def _shape(checkpoint: Checkpoint, name: str, keys: Mapping[str, str]) -> tuple[int, ...]:
    """Return the shape of a layer's update without reading it. UserError for factors that do not go together."""
    path = checkpoint.path
    check_pair(path, name, keys)
    if "mid" not in keys:
        return factors_shape(checkpoint, name, keys["down"], keys["up"])
    check_types(checkpoint, name, {factor: keys[factor] for factor in ("down", "mid", "up")})
    down, mid, up = (checkpoint.shape(keys[factor]) for factor in ("down", "mid", "up"))
    if len(mid) != 4 or not 2 <= len(down) <= 4 or any(size != 1 for size in down[2:]) or mid[1] != down[0]:
        raise UserError(f"{path}: {name}: mid {plain(mid)} does not go with down {plain(down)}: the file is damaged")
    return checked_shape(path, name, (mid[0], down[1], *mid[2:]), up)


def _layer(checkpoint: Checkpoint, name: str, keys: Mapping[str, str], alpha: Alpha) -> LoRALayer:
    down, up = checkpoint[keys["down"]], checkpoint[keys["up"]]
    if "mid" in keys:  # LyCORIS's third factor (rank, rank, k, k) is multiplied into down (rank, in)
        mid, matrix = checkpoint[keys["mid"]], down.reshape(len(down), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            down = np.einsum("rskl,si->rikl", mid.astype(np.float32), matrix.astype(np.float32))
    value = read_number(checkpoint, name, keys["alpha"]) if "alpha" in keys else alpha(name, len(down))
    return make_layer(down, up, value)


def _duplicate(key: str, other: str) -> str:
    return f"{plain(key)} and {plain(other)} stand for the same layer: take one of them out"
