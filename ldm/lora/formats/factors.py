"""Between the arrays of a file and LoRALayer, for all formats: checks before reading, shapes, alpha and types."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldm.errors import UserError, plain
from ldm.lora.formats.modules import BaseModules
from ldm.lora.lora import LoRA
from ldm.lora.products import Product
from ldm.lora.updates import DoRA, LayerUpdate, LoRALayer, direction_of, update_shape
from ldm.textual_inversion.formats import read_vectors
from ldm.weights.arrays import Checkpoint, to_bfloat16
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.names import component_of

# No layer of the published models is wider than 11,520. A sum of LoRAs has the sum of their ranks.
MAX_RANK = 1 << 14
# Bytes of all arrays for each byte of the file: types of 8 bits are widened to four times their size, and some tools
# store a tensor once for two names. PyTorch's expanded tensors have no such limit: a file of 1 KB may hold one of 2^60
# elements.
MAX_EXPANSION = 8

# Learned tokens beside the factors, vectors (count, channels): as in A1111's files, or by OneTrainer as `clip_l`.
_VECTORS = "string_to_param.*"
_BUNDLED_EMBEDDING = re.compile(rf"bundle_emb\.(.+)\.({re.escape(_VECTORS)}|string_to_token\.\*|[^.*]+)\Z")
_VECTORS_OF_OTHERS = ("emb_params", "clip_l")
_BESIDE_VECTORS = ("string_to_token.*", "step", "name", "sd_checkpoint", "sd_checkpoint_name")
# Keys beside the factors of real files that change no layer.
_HARMLESS = re.compile(r".*embeddings[._]position_ids$|(global_step|epoch)$")

Layer = TypeVar("Layer", bound=LayerUpdate)

log = logging.getLogger(__name__)


def open_lora(path: str | os.PathLike) -> Checkpoint:
    """Open a file with factors.

    Raises:
        UserError: As for `open_checkpoint`, and for arrays that are much larger than the file.
    """
    checkpoint = open_checkpoint(path)
    specs = map(checkpoint.spec, checkpoint)
    stored, held = os.stat(path).st_size, sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs)
    if held > MAX_EXPANSION * stored:
        raise UserError(
            f"{path} has {stored:,} bytes and its arrays would have {plain(f'{held:,}', 40)}: it is damaged or made to "
            "fill the memory, fetch it again"
        )
    return checkpoint


def without_extras(keys: Iterable[str]) -> list[str]:
    """Remove keys that may lie beside the factors: bundled embeddings (see read_embeddings) and training counters."""
    return [key for key in keys if not _BUNDLED_EMBEDDING.match(key) and not _HARMLESS.match(key)]


def read_embeddings(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Read the learned tokens that are bundled with a LoRA, name -> vectors (count, channels) fp32, sorted by name.

    Other arrays of a token, such as OneTrainer's `clip_l_out`, are named in a warning.

    Raises:
        UserError: One has no vectors of finite numbers, or more than a prompt holds, or two arrays of them.
    """
    keys: dict[str, str] = {}
    unused = []
    for match in filter(None, map(_BUNDLED_EMBEDDING.match, checkpoint)):
        key, name, part = match.group(0, 1, 2)
        if part == _VECTORS or part in _VECTORS_OF_OTHERS:
            if name in keys:
                raise UserError(
                    f"{checkpoint.path}: {plain(keys[name])} and {plain(key)} are both the token {plain(name)}"
                )
            keys[name] = key
        elif part not in _BESIDE_VECTORS:
            unused.append(key)
    if unused:
        log.warning(
            "%s: %d arrays of learned tokens are left out, such as %s: they are of a kind that is not supported",
            checkpoint.path,
            len(unused),
            plain(unused[0]),
        )
    return {name: read_vectors(checkpoint, keys[name], name) for name in sorted(keys)}


def embedding_arrays(lora: LoRA) -> dict[str, np.ndarray]:
    """Return the learned tokens of a LoRA by their names in a file that bundles them, see read_embeddings."""
    return {f"bundle_emb.{name}.{_VECTORS}": vectors for name, vectors in lora.embeddings.items()}


def warn_of_left_out_tokens(path: str | os.PathLike, lora: LoRA, format: str) -> None:
    """Warn that a format has no place for a LoRA's learned tokens."""
    if lora.embeddings:
        log.warning(
            "%s: %s has no place for the learned tokens %s, without which prompts that name them do not mean what they "
            "did: write kohya, which bundles them, or give them beside it as a file of their own",
            path,
            format,
            plain(", ".join(lora.embeddings)),
        )


def read_factors(checkpoint: Checkpoint, name: str, down: str, up: str, alpha: float | None = None) -> LoRALayer:
    """Read a layer, with factors converted to fp32.

    Args:
        checkpoint: The opened file.
        name: Name of the layer in errors.
        down, up: Keys of the factors.
        alpha: The layer's alpha. None stands for the rank.

    Raises:
        UserError: The factors are no pair, are integers, or have an absurd rank. No array is read then.
    """
    factors_shape(checkpoint, name, down, up)
    return make_layer(checkpoint[down], checkpoint[up], alpha)


def factors_shape(checkpoint: Checkpoint, name: str, down: str, up: str) -> tuple[int, ...]:
    """Return the shape of the update of two factors without reading them. Arguments and errors as `read_factors`."""
    check_types(checkpoint, name, {"down": down, "up": up})
    return checked_shape(checkpoint.path, name, checkpoint.shape(down), checkpoint.shape(up))


def checked_shape(path: Path, name: str, down: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the update, given the shapes of its factors. Raises UserError as `read_factors`."""
    try:
        shape = update_shape(down, up)
    except ValueError as error:
        raise UserError(f"{path}: {plain(name)}: {plain(error)}") from None
    if down[0] > MAX_RANK:
        raise UserError(
            f"{path}: {plain(name)} is of rank {down[0]:,}, at most {MAX_RANK:,} is read: is the file damaged?"
        )
    return shape


def check_types(checkpoint: Checkpoint, name: str, keys: Mapping[str, str]) -> None:
    """Raise UserError unless all factors, factor -> key, are floating-point arrays."""
    for factor, key in keys.items():
        dtype = checkpoint.spec(key)[0]
        if dtype.kind != "f":
            raise UserError(
                f"{checkpoint.path}: the {factor} of {plain(name)} is of type {dtype}: quantised? Factors "
                "are fp32, fp16, bf16 or fp8"
            )


def check_pair(path: Path, name: str, found: Iterable[str], factors: Iterable[str] = ("down", "up")) -> None:
    """Raise UserError unless both factors of a layer are found."""
    for factor in factors:
        if factor not in found:
            raise UserError(f"{path}: {plain(name)} lacks its {factor}, half of a pair: the file is damaged")


def read_number(checkpoint: Checkpoint, name: str, key: str) -> float:
    """Read the number in an array of one element. Raises UserError for a larger array, without reading it."""
    dtype, shape = checkpoint.spec(key)
    if len(shape) > 4 or math.prod(shape) != 1 or dtype.kind not in "fiu":
        raise UserError(
            f"{checkpoint.path}: {plain(name)}: {plain(key.rpartition('.')[2])} is of shape {plain(shape)} "
            f"and type {dtype}, not one number"
        )
    return float(checkpoint[key].reshape(()))


def make_layer(down: np.ndarray, up: np.ndarray, alpha: float | None = None) -> LoRALayer:
    """Make a layer with fp32 factors. An `alpha` of None stands for the rank."""
    with np.errstate(over="ignore"):  # read_lora checks for values that are not finite
        return LoRALayer(down.astype(np.float32), up.astype(np.float32), float(len(down) if alpha is None else alpha))


def reshape_layer(layer: LayerUpdate, shape: tuple[int, ...]) -> LayerUpdate:
    """Give an update as many axes as a weight of `shape` has, if it fits.

    kohya writes 4-D factors for some linear layers. A projection is a convolution in SD1.x and a linear layer in SD2.x.
    """
    return layer.reshaped(shape) if layer.fits(shape) else layer


def fold_alpha(layer: LoRALayer) -> LoRALayer:
    """Return the same update with alpha = rank, for formats without an alpha: `up` is multiplied by alpha / rank."""
    if layer.alpha == layer.rank:
        return layer
    return replace(layer, up=layer.up * np.float32(layer.alpha / layer.rank), alpha=float(layer.rank))


def pairs_and_magnitudes(
    lora: LoRA, base: BaseModules, path: str
) -> tuple[dict[str, LoRALayer], dict[str, np.ndarray]]:
    """Return a LoRA in PEFT's form: the pairs of factors, and the magnitudes of networks whose layers are all DoRA.

    Returns:
        Canonical name -> pair, and Module.path -> magnitude (out,), or (1, out, 1, 1) of a convolution.

    Raises:
        UserError: There are layers of other kinds, DoRA by input, or in one network DoRA and pairs without a magnitude.
            `path` names the LoRA.
    """
    doras = {name: layer for name, layer in lora.layers.items() if isinstance(layer, DoRA)}
    with_dora = {component_of(name) for name in doras}
    plain_pair = next((name for name in lora.layers if name not in doras and component_of(name) in with_dora), None)
    by_input = next((name for name, layer in doras.items() if layer.on_input), None)
    if by_input is not None or plain_pair is not None:
        problem = f"{by_input} is DoRA by input" if by_input is not None else f"{plain_pair} is none beside DoRA"
        raise UserError(
            f"{path}: {problem}, for which PEFT's form has no place: write kohya, or let tools/lora/convert_lora.py "
            "--bake_energy 0.99 --ckpt_path BASE make pairs of low-rank factors"
        )
    pairs = replace(lora, layers={name: direction_of(layer) for name, layer in lora.layers.items()}).pairs(path)
    shapes = {name: (-1,) if pair.down.ndim == 2 else (1, -1, 1, 1) for name, pair in pairs.items()}
    return pairs, {base.by_name[name].path: layer.magnitude.reshape(shapes[name]) for name, layer in doras.items()}


def positive_alpha(layer: LayerUpdate) -> LayerUpdate:
    """Return the same update with an alpha above 0: sd-scripts and LyCORIS take an alpha of 0 for the rank."""
    if isinstance(layer, LoRALayer):
        return layer if layer.alpha > 0 else fold_alpha(layer)
    if isinstance(layer, DoRA):
        return replace(layer, direction=positive_alpha(layer.direction))
    if not isinstance(layer, Product) or layer.alpha > 0:
        return layer
    first = min(layer.factors)
    factors = {**layer.factors, first: layer.factors[first] * np.float32(layer.scale)}
    return replace(layer, factors=factors, alpha=float(layer.rank or 1))


def write_factors(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], dtype: str
) -> None:
    """Write a file of factors and scalars, see `to_dtype`."""
    cast = {key: to_dtype(array, dtype, f"{path}: {key}") for key, array in arrays.items()}
    write_checkpoint(path, cast, metadata)


def to_dtype(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Convert a factor to "fp32", "fp16" or "bf16", and a scalar to fp32.

    Raises:
        UserError: fp16 does not hold the values. `name` tells which array.
    """
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


def by_component(layers: Mapping[str, Layer], base: BaseModules) -> dict[str, dict[str, Layer]]:
    """Return component -> diffusers' name -> layer, in diffusers' order. Components without layers are left out."""
    components: dict[str, dict[str, Layer]] = {}
    for module in (*base.modules, *base.norms):
        if module.name in layers:
            components.setdefault(module.component, {})[module.path] = layers[module.name]
    return components
