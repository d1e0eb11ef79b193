"""The arrays of one layer in a file, and the update that they make, for all kinds of ldm.lora.updates.

kohya's, LyCORIS's and this project's own files name the arrays alike, after the layer's name. Formats with other names
of their own parse them into these parts:

| Part                                       | Kind                                                                   |
| ------------------------------------------ | ---------------------------------------------------------------------- |
| down, up, alpha                            | a pair of low-rank factors                                             |
| mid                                        | its third factor (LoCon in Tucker's form), which is multiplied in      |
| hada_w1_a, ..., hada_t2                    | LoHa                                                                   |
| lokr_w1, lokr_w1_a, ..., lokr_t2           | LoKr                                                                   |
| diff, w_norm                               | a whole difference of a weight, of a linear layer or a normalisation   |
| diff_b, b_norm                             | a whole difference of a bias, alone or beside another kind             |
| weight, on_input                           | IA3                                                                    |
| oft_blocks, rescale                        | OFT                                                                    |
| dora_scale (its shape tells the axis), magnitude (by output, PEFT's) | DoRA, beside a pair, LoHa or LoKr            |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Optional

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats.factors import check_pair, check_types, checked_shape, read_number
from ldm.lora.products import LoHa, LoKr, Product, loha_shape, lokr_shape
from ldm.lora.updates import IA3, OFT, DoRA, Full, LayerUpdate, LoRALayer, update_shape, with_mid
from ldm.weights.checkpoint import Checkpoint

# The parts by their names in files, without those of IA3, which other names contain.
PART = (
    r"lora_(?:down|up|mid)\.weight|alpha|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale|"
    r"diff|diff_b|w_norm|b_norm|oft_blocks|rescale"
)
_PAIR = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}
_WEIGHTS, _BIASES = ("diff", "w_norm"), ("diff_b", "b_norm")
# Parts of one kind -> what the kind is called in errors. "alpha" and the magnitudes stand beside several kinds.
_KINDS = {
    ("down", "up", "mid"): "a pair of factors",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"): "LoHa",
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"): "LoKr",
    _WEIGHTS: "a whole difference",
    ("weight", "on_input"): "IA3",
    ("oft_blocks", "rescale"): "OFT",
}
_NUMBERS = ("alpha", "on_input")
# Parts that say the same thing twice, and parts that mean nothing without another.
_EITHER = (
    _WEIGHTS, _BIASES, ("dora_scale", "magnitude"),
    *((f"lokr_w{half}", part) for half in "12" for part in (f"lokr_w{half}_a", f"lokr_w{half}_b", f"lokr_t{half}")),
)  # fmt: skip
_NEEDED = {
    "on_input": "weight", "weight": "on_input", "rescale": "oft_blocks", "hada_t1": "hada_t2", "hada_t2": "hada_t1",
}  # fmt: skip
MAX_PRODUCT = 1 << 26  # values of a factor with `mid` multiplied in; the largest layer of SD1.x has 29 million

# The update of a layer's weight and that of its bias. One of them may be None.
LayerUpdates = tuple[Optional[LayerUpdate], Optional[Full]]


def part_of(name: str) -> str:
    """Return the part that has this name in a file, "down" for "lora_down.weight"."""
    return _PAIR.get(name, name)


def shapes_of(checkpoint: Checkpoint, name: str, keys: Mapping[str, str]) -> LayerUpdates:
    """Return a layer's updates with zeros in place of the arrays, to see what they fit. No array is read.

    Args:
        checkpoint: The file.
        name: The layer's name in errors.
        keys: Part -> key.

    Raises:
        UserError: Parts are missing, of several kinds, no floating-point arrays, or do not go together.
    """
    path = checkpoint.path
    kinds = [label for parts, label in _KINDS.items() if any(part in keys for part in parts)]
    if len(kinds) > 1:
        raise UserError(f"{path}: {plain(name)} is {' and '.join(kinds)} at once: is the file damaged?")
    if not kinds and not any(part in keys for part in _BIASES):
        raise UserError(f"{path}: {plain(name)} has {plain(', '.join(keys))} alone: the file is damaged")
    for one, other in _EITHER:
        if one in keys and other in keys:
            raise UserError(f"{path}: {plain(name)} has both {one} and {other}: is the file damaged?")
    for part, needed in _NEEDED.items():
        if part in keys and needed not in keys:
            raise UserError(f"{path}: {plain(name)} has {part} without {needed}: the file is damaged")
    check_types(checkpoint, name, {part: key for part, key in keys.items() if part not in _NUMBERS})
    if "down" in keys or "up" in keys or "mid" in keys:
        check_pair(path, name, keys)
    zero = np.zeros((), np.float32)
    zeros = {part: np.broadcast_to(zero, checkpoint.shape(key)) for part, key in keys.items() if part not in _NUMBERS}
    on_input = "on_input" in keys and bool(read_number(checkpoint, name, keys["on_input"]))
    try:
        if "mid" in zeros:  # not multiplied out: the product may be any number of times as large as the file
            zeros["down"] = np.broadcast_to(zero, _shape_with_mid(zeros["down"].shape, zeros.pop("mid").shape))
        if "down" in zeros:
            checked_shape(path, name, zeros["down"].shape, zeros["up"].shape)
        return _updates(zeros, None, on_input)
    except ValueError as error:
        raise UserError(f"{path}: {plain(name)}: {plain(error)}: the file is damaged") from None


def read_updates(
    checkpoint: Checkpoint, name: str, keys: Mapping[str, str], alpha: float | None = None
) -> LayerUpdates:
    """Read a layer's updates, fp32.

    Args:
        checkpoint, name, keys: As for `shapes_of`, which has accepted them.
        alpha: The alpha of a layer without an array for it. None stands for the rank.

    Raises:
        UserError: `alpha` or `on_input` is no number.
    """
    with np.errstate(over="ignore"):  # read_lora checks for values that are not finite
        # Copies: the file may be replaced while the LoRA is in memory.
        arrays = {part: np.array(checkpoint[key], np.float32) for part, key in keys.items() if part not in _NUMBERS}
    if "alpha" in keys:
        alpha = read_number(checkpoint, name, keys["alpha"])
    on_input = "on_input" in keys and bool(read_number(checkpoint, name, keys["on_input"]))
    return _updates(arrays, alpha, on_input)


def _updates(arrays: Mapping[str, np.ndarray], alpha: float | None, on_input: bool) -> LayerUpdates:
    """Make a layer's updates. `on_input` is IA3's. Raises ValueError for parts that do not go together."""
    biases = [name for name in _BIASES if name in arrays]
    bias = Full(_vector(arrays[biases[0]], biases[0]), "diff_b") if biases else None
    direction = _direction(arrays, alpha, on_input)
    magnitude = next((name for name in ("dora_scale", "magnitude") if name in arrays), None)
    if magnitude is None:
        return direction, bias
    if not isinstance(direction, (LoRALayer, Product)):
        raise ValueError(f"{magnitude} is not beside a pair of factors, LoHa or LoKr")
    array = arrays[magnitude]
    by_input = magnitude == "dora_scale" and array.ndim > 1 and array.shape[0] == 1
    if array.size != max(array.shape, default=0):
        raise ValueError(f"{magnitude} is {array.shape}, not one number for each output or input")
    return DoRA(direction, array.reshape(-1), by_input), bias


def _direction(arrays: Mapping[str, np.ndarray], alpha: float | None, on_input: bool) -> LayerUpdate | None:
    """Make the update of a weight, without a magnitude."""
    shapes = {part: array.shape for part, array in arrays.items()}
    if "down" in arrays:
        down = arrays["down"]
        if "mid" in arrays:
            down = with_mid(down, arrays["mid"])
        update_shape(down.shape, arrays["up"].shape)
        return LoRALayer(down, arrays["up"], float(len(down) if alpha is None else alpha))
    for kind, prefix, check in ((LoHa, "hada_", loha_shape), (LoKr, "lokr_", lokr_shape)):
        factors = {part: array for part, array in arrays.items() if part.startswith(prefix)}
        if factors:
            check(shapes)
            update = kind(factors, 1.0)
            return replace(update, alpha=float(update.rank or 1) if alpha is None else alpha)
    for part in _WEIGHTS:
        if part in arrays:
            return Full(arrays[part] if part == "diff" else _vector(arrays[part], part), part)
    if "weight" in arrays:
        return IA3(_vector(arrays["weight"], "weight"), on_input)
    if "oft_blocks" in arrays:
        blocks = arrays["oft_blocks"]
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or not blocks.size:
            raise ValueError(f"oft_blocks is {blocks.shape}, not (blocks, size, size): BOFT is not supported")
        rescale = _vector(arrays["rescale"], "rescale") if "rescale" in arrays else None
        if rescale is not None and len(rescale) != blocks.shape[0] * blocks.shape[1]:
            raise ValueError(f"rescale is {rescale.shape} beside oft_blocks {blocks.shape}")
        return OFT(blocks, 0.0 if alpha is None else alpha, rescale)
    return None


def _shape_with_mid(down: tuple[int, ...], mid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of `with_mid`, given those of its arguments. Raises ValueError if they do not go together."""
    is_matrix = 2 <= len(down) <= 4 and all(size == 1 for size in down[2:])
    if len(mid) != 4 or not is_matrix or mid[1] != down[0]:
        raise ValueError(f"mid {mid} does not go with down {down}")
    shape = (mid[0], down[1], *mid[2:])
    if math.prod(shape) > MAX_PRODUCT:
        raise ValueError(f"mid {mid} and down {down} make a factor of {math.prod(shape):,} values")
    return shape


def _vector(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of one number for each channel without its axes of size 1."""
    if array.size != max(array.shape, default=0):
        raise ValueError(f"{name} is {array.shape}, not one number for each channel")
    return array.reshape(-1)
