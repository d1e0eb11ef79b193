"""Between a file's keys and a LoRA in memory: what all formats share that name each factor by its layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Callable, Optional

import numpy as np

from ldm.errors import UserError
from ldm.lora.formats.modules import Base, Module, known_bases
from ldm.lora.state import LoRALayer, LoRAState
from ldm.weights.checkpoint import to_bfloat16
from ldm.weights.names import same_up_to_1x1
from ldm.weights.read import Checkpoint, write_checkpoint

# A key's layer, as the format calls it, and what the array is there: "down", "up", "mid" or "alpha".
Parse = Callable[[str], Optional[tuple[str, str]]]
# The modules of a base by the names that Parse gives.
Table = Callable[[Base], Mapping[str, Module]]
# The alpha of a layer for which the file holds none: (layer as the format calls it, rank) -> alpha.
Alpha = Callable[[str, int], float]

SDXL = "an SDXL LoRA (two text encoders, a context of 2048): only those of SD1.x and SD2.x fit here"
# What a key says the file is: the first that fits.
NOT_PAIRS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA: it scales whole columns beside the low-rank pairs, not supported"),
    (r"\.(hada_w|hada_t|lokr_w|lokr_t)", "a LyCORIS file (LoHa or LoKr): its factors are no low-rank pairs, and are "
                                         "not supported"),
    (r"\.(diff|diff_b|w_norm|b_norm|on_input|oft_\w+|oft_blocks|boft_\w+|scalar)$|^lora_.*\.[ab][12]\.weight$",
     "a LyCORIS file (full, norm, OFT or GLoRA layers): these are no low-rank pairs, and are not supported"),
    (r"^bundle_emb\.", "a LoRA with textual-inversion embeddings bundled in it: not supported, take them out"),
    (r"lora_te2_|text_encoder_2\.|lora_unet_(input|output)_blocks_|conditioner\.", SDXL),
    (r"(lora_B|lora_up|lora\.up)(\.\w+)?\.bias$", "a LoRA with biases, which have no place in a low-rank pair: not "
                                            "supported"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding table: only dense layers and convolutions are supported"),
)  # fmt: skip
_DEEP = re.compile(r"transformer_blocks[._][1-9]")


def named(keys: list[str]) -> str | None:
    """What a file with such keys is, if one of them gives it away as no LoRA of Stable Diffusion 1 or 2."""
    return next((what for pattern, what in NOT_PAIRS for key in keys if re.search(pattern, key)), None)


def read_pairs(
    checkpoint: Checkpoint,
    parse: Parse,
    table: Table,
    base: Base | None,
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
            raise UserError(f"{path}: {keys[layer][role]} and {key} stand for the same layer: take one of them out")
        keys[layer][role] = key
    if unknown:
        what = named(unknown)
        if what:
            raise UserError(f"{path} is {what} (for example {unknown[0]})")
        raise UserError(
            f"{path}: {len(unknown)} of its {len(checkpoint)} keys belong to nothing in a LoRA, such as {unknown[0]}: "
            "is the file damaged, or of another kind?"
        )
    candidates = _with_all(path, keys, table, base)
    found = {layer: _layer(checkpoint, layer, parts, alpha) for layer, parts in keys.items()}
    modules = _nearest(path, found, candidates, base)
    return {modules[name].name: conformed(layer, modules[name].shape) for name, layer in found.items()}


def layer_of(path, name: str, down: np.ndarray, up: np.ndarray, alpha: np.ndarray | float | None = None) -> LoRALayer:
    """The layer `name` of a file's factors, made fp32; alpha: a number, also in an array of one; None for the rank.

    Raises UserError for factors that do not go together or are whole numbers, and for an alpha that is no number.
    """
    for half, array in (("down", down), ("up", up)):
        if array.dtype.kind != "f":
            raise UserError(f"{path}: the {half} of {name} is of type {array.dtype}: quantised? Factors are fp32, fp16 "
                            "or bf16")
    with np.errstate(over="ignore"):  # values that are not finite are judged for all formats alike
        down, up = down.astype(np.float32), up.astype(np.float32)
    try:
        if alpha is None:
            alpha = down.shape[0] if down.ndim else 0
        return LoRALayer(down, up, float(np.asarray(alpha).reshape(())))
    except ValueError as error:
        raise UserError(f"{path}: {name}: {error}") from error


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


def base_texts(state: LoRAState) -> dict[str, str]:
    """What the state knows of its base, for a .safetensors' metadata."""
    return {key: state.metadata[key] for key in ("architecture", "prediction_type") if key in state.metadata}


def by_component(state: LoRAState, base: Base) -> dict[str, dict[str, LoRALayer]]:
    """component -> path of the module -> layer, in the base's order; components without layers are left out."""
    parts: dict[str, dict[str, LoRALayer]] = {}
    for module in base.modules:
        if module.name in state.layers:
            parts.setdefault(module.component, {})[module.path] = state.layers[module.name]
    return parts


def _with_all(path, keys: Mapping, table: Table, base: Base | None) -> dict[Base, Mapping[str, Module]]:
    """The tables of names that hold every layer of `keys`, by base; UserError if none does."""
    tables = {candidate: table(candidate) for candidate in ((base,) if base else known_bases())}
    complete = {candidate: names for candidate, names in tables.items() if keys.keys() <= names.keys()}
    if complete:
        return complete
    best, names = max(tables.items(), key=lambda item: len(keys.keys() & item[1].keys()))
    missing = [layer for layer in keys if layer not in names]
    if named(missing) or any(_DEEP.search(layer) for layer in missing):
        raise UserError(f"{path} is {named(missing) or SDXL}")
    labels = " or ".join(candidate.label for candidate in tables)
    fits = next((other.label for other in known_bases() if keys.keys() <= table(other).keys()), None)
    made_for = f"it was made for {fits}" if fits else "it was made for another model"
    if len(missing) == len(keys):
        raise UserError(f"{path}: none of its {len(keys)} layers is one of {labels}, such as {missing[0]}: {made_for}")
    raise UserError(
        f"{path}: {len(missing)} of its {len(keys)} layers belong to nothing in {best.label}, such as {missing[0]}: "
        f"{made_for}"
    )


def _layer(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], alpha: Alpha) -> LoRALayer:
    path = checkpoint.path
    for half in ("down", "up"):
        if half not in parts:
            raise UserError(f"{path}: {name} lacks its {half}, half of a pair: the file is damaged")
    down, up = (checkpoint[parts[half]] for half in ("down", "up"))
    if "mid" in parts:  # LyCORIS's third factor (rank, rank, k, k) between the two: a convolution in three steps
        mid = checkpoint[parts["mid"]]
        if mid.ndim != 4 or down.ndim < 2 or mid.shape[1] != len(down):
            raise UserError(f"{path}: {name}: mid {mid.shape} does not go with down {down.shape}: the file is damaged")
        down = np.einsum("rskl,si->rikl", mid.astype(np.float32), down.reshape(len(down), -1).astype(np.float32))
    rank = down.shape[0] if down.ndim else 0
    return layer_of(path, name, down, up, checkpoint[parts["alpha"]] if "alpha" in parts else alpha(name, rank))


def _nearest(path, found: dict[str, LoRALayer], candidates, base: Base | None) -> Mapping[str, Module]:
    """The table whose shapes are those of the layers; with `base`, its table: what does not fit is for merge_lora."""
    if base:
        return candidates[base]

    def fit(layer: LoRALayer, module: Module) -> int:
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        return 2 if shape == module.shape else int(same_up_to_1x1(shape, module.shape))

    reasons = []
    best, best_score = None, 0
    for candidate, table in candidates.items():
        scores = {name: fit(layer, table[name]) for name, layer in found.items()}
        wrong = next((name for name, score in scores.items() if not score), None)
        if wrong is None and sum(scores.values()) > best_score:
            best, best_score = table, sum(scores.values())
        elif wrong is not None:
            layer = found[wrong]
            shape = (layer.up.shape[0], *layer.down.shape[1:])
            if shape[1] == 2048 and re.search(r"attn2[._]to_[kv]$", wrong):
                raise UserError(f"{path} is {SDXL}")
            reasons.append(f"{wrong} is {shape}, in {candidate.label} {table[wrong].shape}")
    if best is None:
        raise UserError(f"{path} fits no known base: {'; '.join(reasons)}. Name its model YAML, or take another file")
    return best
