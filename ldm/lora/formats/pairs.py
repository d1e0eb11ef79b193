"""Between a file's keys and a LoRA in memory: what all formats share that name each factor by its layer."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Callable, Optional

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats.modules import BaseModules, Module, known_bases
from ldm.lora.lora import LoRA, LoRALayer, update_shape
from ldm.weights.arrays import Arrays, to_bfloat16
from ldm.weights.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from ldm.weights.names import same_up_to_1x1
from ldm.weights.recognise import sdxl_lora

# A key's layer, as the format calls it, and what the array is there: "down", "up", "mid" or "alpha".
Parse = Callable[[str], Optional[tuple[str, str]]]
# The modules of a base by the names that Parse gives.
Table = Callable[[BaseModules], Mapping[str, Module]]
# The alpha of a layer for which the file holds none: (layer as the format calls it, rank) -> alpha.
Alpha = Callable[[str, int], float]

# PEFT's names of the two factors, A is down and B is up; an adapter's name may be before `weight`.
PEFT_HALF = r"lora_([AB])(?:\.(?!weight)[^.]+)?\.weight"
HALF_OF_LETTER = {"A": "down", "B": "up"}

# No layer of the published models is wider than 11,520; a sum of LoRAs has the sum of their ranks.
MOST_RANK = 1 << 14
# Bytes of a file's arrays for each byte of the file: bfloat16 is widened to twice, some tools store a tensor once for
# two names. PyTorch's expanded tensors have no such limit: a file of 1 KB may hold one of 2^60 elements.
MOST_BYTES_A_BYTE = 8

# What lies beside the factors of real files and changes no layer.
_EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\.")
_HARMLESS = re.compile(r".*embeddings[._]position_ids$|(global_step|epoch)$")

log = logging.getLogger(__name__)


def open_lora(path: str | os.PathLike) -> Checkpoint:
    """Open a file with factors. Raises UserError as open_checkpoint does, and for arrays that are larger by far than
    the file.
    """
    checkpoint = open_checkpoint(path)
    specs = map(checkpoint.spec, checkpoint)
    stored, held = os.stat(path).st_size, sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs)
    if held > MOST_BYTES_A_BYTE * stored:
        raise UserError(
            f"{path} has {stored:,} bytes and its arrays would have {plain(f'{held:,}', 40)}: it is damaged or made to "
            "fill the memory, fetch it again"
        )
    return checkpoint


def without_extras(path, keys: list[str]) -> list[str]:
    """Those of the `keys`, which are no factors, that are not known as harmless.

    Textual-inversion embeddings that A1111's users bundle with a LoRA are left out with a warning; position numbers and
    counters of the training are left out.
    """
    embeddings = sorted({found[1] for found in map(_EMBEDDING.match, keys) if found})
    if embeddings:
        log.warning(
            "%s: %d bundled embedding(s), %s, are textual inversion and no part of the LoRA: without them prompts that "
            "name them will not mean what they did", path, len(embeddings), plain(", ".join(embeddings)),
        )  # fmt: skip
    return [key for key in keys if not _EMBEDDING.match(key) and not _HARMLESS.match(key)]


def read_pairs(
    checkpoint: Checkpoint,
    parse: Parse,
    table: Table,
    base: BaseModules | None,
    alpha: Alpha = lambda layer, rank: rank,
) -> dict[str, LoRALayer]:
    """The layers of an opened file, by canonical name, fp32.

    Args:
        table: the modules of a base, by the names that `parse` gives.
        base: whose names they are; None for the known one that has all the names and shapes.
        alpha: for layers without an array of their own for it.

    Raises:
        UserError: keys or layers that belong to nothing, half a pair, factors that do not go together, or (without
            `base`) shapes of no known base.
    """
    path = checkpoint.path
    keys: dict[str, dict[str, str]] = {}
    unknown = []
    for key in checkpoint:
        parsed = parse(key)
        if parsed is None:
            unknown.append(key)
            continue
        layer, role = parsed
        if role in keys.setdefault(layer, {}):
            raise UserError(f"{path}: {_twins(keys[layer][role], key)}")
        keys[layer][role] = key
    unknown = without_extras(path, unknown)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of its {len(checkpoint)} keys belong to nothing in a LoRA, such as "
            f"{plain(unknown[0])}: is the file damaged, or of another kind?"
        )
    candidates = _with_all(checkpoint, keys, table, base)
    shapes = {layer: _shape(checkpoint, layer, parts) for layer, parts in keys.items()}
    modules = _nearest(checkpoint, keys, shapes, candidates, base)
    layers: dict[str, LoRALayer] = {}
    sources: dict[str, str] = {}
    for layer, parts in keys.items():
        module = modules[layer]
        if module.name in layers:  # by two of its names
            raise UserError(f"{path}: {_twins(sources[module.name], parts['down'])}")
        if "mid" in parts and not same_up_to_1x1(shapes[layer], module.shape):
            raise UserError(
                f"{path}: {layer} is {shapes[layer]}, in the model {module.shape}: it was made for another model"
            )
        layers[module.name] = conformed(_layer(checkpoint, layer, parts, alpha), module.shape)
        sources[module.name] = parts["down"]
    return layers


def read_factors(
    checkpoint: Arrays, name: str, down: str, up: str, alpha: np.ndarray | float | None = None
) -> LoRALayer:
    """The layer `name` of two arrays of a file, by their keys, made fp32; alpha: a number, None for the rank.

    Raises UserError, before an array is made, for factors that do not go together, are whole numbers, or are of an
    absurd rank.
    """
    factors_shape(checkpoint, name, down, up)
    return layer_of(checkpoint.path, name, checkpoint[down], checkpoint[up], alpha)


def factors_shape(checkpoint: Arrays, name: str, down: str, up: str) -> tuple[int, ...]:
    """The shape of the update of two arrays of a file, by their keys; nothing is read. Raises as `read_factors`."""
    path = checkpoint.path
    check_types(checkpoint, name, {"down": down, "up": up})
    shapes = checkpoint.shape(down), checkpoint.shape(up)
    try:
        shape = update_shape(*shapes)
    except ValueError as error:
        raise UserError(f"{path}: {plain(name)}: {plain(error)}") from None
    check_rank(path, name, shapes[0][0])
    return shape


def check_types(checkpoint: Arrays, name: str, parts: Mapping[str, str]) -> None:
    """Raise UserError for factors (what each is -> its key) of whole numbers."""
    for half, key in parts.items():
        dtype = checkpoint.spec(key)[0]
        if dtype.kind != "f":
            raise UserError(
                f"{checkpoint.path}: the {half} of {plain(name)} is of type {dtype}: quantised? Factors "
                "are fp32, fp16 or bf16"
            )


def check_rank(path, name: str, rank: int) -> None:
    """Raise UserError for a rank that no LoRA has."""
    if rank > MOST_RANK:
        raise UserError(
            f"{path}: {plain(name)} is of rank {rank:,}, at most {MOST_RANK:,} is read: is the file damaged?"
        )


def read_number(checkpoint: Arrays, name: str, key: str) -> float:
    """The number that is in an array of one. Raises UserError for one of several, before it is made."""
    dtype, shape = checkpoint.spec(key)
    if len(shape) > 4 or math.prod(shape) != 1 or dtype.kind not in "fiu":
        raise UserError(
            f"{checkpoint.path}: {plain(name)}: {plain(key.rpartition('.')[2])} is of shape {plain(shape)} "
            f"and type {dtype}, not one number"
        )
    return float(checkpoint[key].reshape(()))


def layer_of(path, name: str, down: np.ndarray, up: np.ndarray, alpha: float | None = None) -> LoRALayer:
    """The layer `name` of factors, made fp32; alpha: None for the rank. Raises UserError for those of no pair."""
    with np.errstate(over="ignore"):  # values that are not finite are judged for all formats alike
        down, up = down.astype(np.float32), up.astype(np.float32)
    try:
        return LoRALayer(down, up, float(down.shape[0] if alpha is None else alpha))
    except ValueError as error:
        raise UserError(f"{path}: {plain(name)}: {plain(error)}") from None


def conformed(layer: LoRALayer, shape: tuple[int, ...]) -> LoRALayer:
    """`layer` with as many axes as a weight of `shape` has, where only axes of 1 are between them; else as it is.

    kohya writes 4-D factors for some dense layers, and a projection is a convolution in SD1.x and dense in SD2.x.
    """
    if not same_up_to_1x1((layer.up.shape[0], *layer.down.shape[1:]), shape):
        return layer
    ones = (1,) * (len(shape) - 2)
    return replace(
        layer, down=layer.down.reshape(layer.rank, *shape[1:]), up=layer.up.reshape(*layer.up.shape[:2], *ones)
    )


def folded(layer: LoRALayer) -> LoRALayer:
    """The same update with alpha = rank, for formats that have no alpha: `up` takes alpha / rank over."""
    if layer.alpha == layer.rank:
        return layer
    return replace(layer, up=layer.up * np.float32(layer.alpha / layer.rank), alpha=float(layer.rank))


def save(path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], dtype: str) -> None:
    """Write factors as "fp32", "fp16" or "bf16"; scalars stay fp32. Raises UserError where fp16 does not hold them."""
    cast = {name: as_dtype(array, dtype, f"{path}: {name}") for name, array in arrays.items()}
    write_checkpoint(path, cast, metadata)


def as_dtype(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """A factor as it is written; fp32 for a scalar."""
    if dtype == "bf16" and array.ndim:
        return to_bfloat16(array)
    if dtype != "fp16" or not array.ndim:
        return array.astype(np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if array.any() and not half.any():
        raise UserError(f"{name} goes up to {np.abs(array).max():.3g}, which is 0 in fp16: write --dtype fp32 or bf16")
    if not np.isfinite(half).all():
        raise UserError(f"{name} goes up to {np.abs(array).max():.3g}, fp16 ends at 65504: write --dtype fp32 or bf16")
    return half


def base_texts(state: LoRA) -> dict[str, str]:
    """What the state knows of its base, for a .safetensors' metadata."""
    return {key: state.metadata[key] for key in ("architecture", "prediction_type") if key in state.metadata}


def by_component(state: LoRA, base: BaseModules) -> dict[str, dict[str, LoRALayer]]:
    """Component -> path of the module -> layer, in the base's order; components without layers are left out."""
    parts: dict[str, dict[str, LoRALayer]] = {}
    for module in base.modules:
        if module.name in state.layers:
            parts.setdefault(module.component, {})[module.path] = state.layers[module.name]
    return parts


def _with_all(
    checkpoint: Checkpoint, keys: Mapping[str, Mapping[str, str]], table: Table, base: BaseModules | None
) -> dict[BaseModules, Mapping[str, Module]]:
    """The tables of names that hold every layer of `keys`, by base; UserError if none does."""
    tables = {candidate: table(candidate) for candidate in ((base,) if base else known_bases())}
    complete = {candidate: names for candidate, names in tables.items() if keys.keys() <= names.keys()}
    if complete:
        return complete
    path = checkpoint.path
    best, names = max(tables.items(), key=lambda item: len(keys.keys() & item[1].keys()))
    missing = [layer for layer in keys if layer not in names]
    _refuse_sdxl(checkpoint, keys)
    labels = " or ".join(candidate.label for candidate in tables)
    fits = next((other.label for other in known_bases() if keys.keys() <= table(other).keys()), None)
    made_for = f"it was made for {fits}" if fits else "it was made for another model"
    if len(missing) == len(keys):
        raise UserError(
            f"{path}: none of its {len(keys)} layers is one of {labels}, such as {plain(missing[0])}: {made_for}"
        )
    raise UserError(
        f"{path}: {len(missing)} of its {len(keys)} layers belong to nothing in {best.label}, such as "
        f"{plain(missing[0])}: {made_for}"
    )


def _shape(checkpoint: Checkpoint, name: str, parts: Mapping[str, str]) -> tuple[int, ...]:
    """The shape of a layer's update, told without reading it. Raises UserError for half a pair and factors that do not
    go together.
    """
    path = checkpoint.path
    for half in ("down", "up"):
        if half not in parts:
            raise UserError(f"{path}: {name} lacks its {half}, half of a pair: the file is damaged")
    if "mid" not in parts:
        return factors_shape(checkpoint, name, parts["down"], parts["up"])
    check_types(checkpoint, name, {half: parts[half] for half in ("down", "mid", "up")})
    down, mid, up = (checkpoint.shape(parts[half]) for half in ("down", "mid", "up"))
    if len(mid) != 4 or not 2 <= len(down) <= 4 or any(size != 1 for size in down[2:]) or mid[1] != down[0]:
        raise UserError(f"{path}: {name}: mid {plain(mid)} does not go with down {plain(down)}: the file is damaged")
    try:
        shape = update_shape((mid[0], down[1], *mid[2:]), up)
    except ValueError as error:
        raise UserError(f"{path}: {name}: {plain(error)}") from None
    check_rank(path, name, mid[0])
    return shape


def _layer(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], alpha: Alpha) -> LoRALayer:
    down, up = (checkpoint[parts[half]] for half in ("down", "up"))
    if "mid" in parts:  # LyCORIS's third factor (rank, rank, k, k) between the two: a convolution in three steps
        mid, inner = checkpoint[parts["mid"]], down.reshape(len(down), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            down = np.einsum("rskl,si->rikl", mid.astype(np.float32), inner.astype(np.float32))
    said = read_number(checkpoint, name, parts["alpha"]) if "alpha" in parts else alpha(name, len(down))
    return layer_of(checkpoint.path, name, down, up, said)


def _refuse_sdxl(checkpoint: Checkpoint, keys: Mapping[str, Mapping[str, str]]) -> None:
    """Raise UserError if a layer tells that the LoRA is for SDXL."""
    sdxl = sdxl_lora(
        {layer: checkpoint.shape(parts["down"]) if "down" in parts else () for layer, parts in keys.items()}
    )
    if sdxl:
        raise UserError(f"{checkpoint.path} is {sdxl}")


def _nearest(
    checkpoint: Checkpoint,
    keys: Mapping[str, Mapping[str, str]],
    shapes: dict[str, tuple[int, ...]],
    candidates: Mapping[BaseModules, Mapping[str, Module]],
    base: BaseModules | None,
) -> Mapping[str, Module]:
    """The table whose shapes are those of the layers; with `base`, its table: what does not fit is for merge_lora."""
    if base:
        return candidates[base]
    path = checkpoint.path

    def fit(shape: tuple[int, ...], module: Module) -> int:
        return 2 if shape == module.shape else int(same_up_to_1x1(shape, module.shape))

    reasons = []
    best, best_score = None, 0
    for candidate, table in candidates.items():
        scores = {name: fit(shape, table[name]) for name, shape in shapes.items()}
        wrong = next((name for name, score in scores.items() if not score), None)
        if wrong is None and sum(scores.values()) > best_score:
            best, best_score = table, sum(scores.values())
        elif wrong is not None:
            reasons.append(f"{wrong} is {shapes[wrong]}, in {candidate.label} {table[wrong].shape}")
    if best is None:
        _refuse_sdxl(checkpoint, keys)
        raise UserError(f"{path} fits no known base: {'; '.join(reasons)}. Name its model YAML, or take another file")
    return best


def _twins(one: str, two: str) -> str:
    return f"{plain(one)} and {plain(two)} stand for the same layer: take one of them out"
