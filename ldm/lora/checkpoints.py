"""A LoRA and a base model's checkpoint on disk: merged into it, embedded beside its weights, and split from it again.

Everything happens in the checkpoint's own names, of whatever family (ldm.weights.names), one array at a time. Arrays
that a LoRA does not touch stay as they are, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ldm.errors import UserError
from ldm.lora.formats import mindone
from ldm.lora.formats.factors import check_pair, read_factors, read_number
from ldm.lora.lora import LoRA, lora_metadata
from ldm.lora.merge import match_shapes
from ldm.lora.strength import Strength
from ldm.lora.updates import LayerUpdate, LoRALayer
from ldm.settings.model import model_metadata
from ldm.weights.arrays import ArraysInMemory, Checkpoint, RenamedCheckpoint
from ldm.weights.names import KeyMap, component_of, source_shape

# The parts of a layer's LoRA as lora_wrapper names them, where A is down. The last two are the factors of its soft
# convolutions.
_WRAPPER_PART = r"lora_A|lora_B|lora_scale|lora_A\.weight|lora_B\.weight"
_PART = re.compile(rf"(.+)\.(?:({mindone.LAYER_PART})|{_WRAPPER_PART})$")
_INNER_LAYERS = ("base_layer", "linear", "conv")  # where lora_wrapper and mindone put a wrapped layer's own parameters


class MergedArrays(RenamedCheckpoint):
    """A base model's arrays with the updates of LoRAs added one after another in fp32, and cast to their type once.

    An array whose updates are zero stays as it is, bit for bit. `key_map` is that of `base`.

    Raises:
        UserError: A layer of the LoRA has no array of its shape, block weights do not suit the base model, or (when an
            array is read) a sum is outside the range of the array's type.
    """

    def __init__(self, base: Checkpoint, key_map: KeyMap, loras: Sequence[tuple[LoRA, float | Strength]]):
        super().__init__(base, {name: name for name in base})
        self._updates: dict[str, list[tuple[LayerUpdate, float, int, int]]] = {}
        for lora, value in loras:
            _check_fits(base, key_map, lora)
            strength = Strength.from_value(value)
            strength.check_model(key_map.sources, "the LoRA", str(base.path))
            strength.warn_of_layers(lora, "the LoRA")
            for name, update in lora.updates().items():
                source = key_map.sources[name]
                entry = (update, strength.of_layer(name), source.part, source.parts)
                self._updates.setdefault(source.name, []).append(entry)

    def __getitem__(self, name: str) -> np.ndarray:
        array = super().__getitem__(name)
        merged = None
        for update, strength, part, parts in self._updates.get(name, ()):
            rows = slice(part * (array.shape[0] // parts), (part + 1) * (array.shape[0] // parts))
            before = (array if merged is None else merged)[rows].astype(np.float32)
            added = update.update(strength, before)
            if added.any():
                merged = array.astype(np.float32) if merged is None else merged
                block = merged[rows]
                block += added.reshape(block.shape)
        if merged is None:
            return array
        with np.errstate(over="ignore"):  # checked below
            merged = merged.astype(array.dtype)
        if not np.isfinite(merged).all():
            raise UserError(f"{name} with the LoRA is outside the range of {array.dtype}: lower the strength")
        return merged


class EmbeddedArrays(RenamedCheckpoint):
    """A base model's arrays, followed by those of a LoRA's layers in fp32, in the names of ldm.lora.formats.mindone.

    They are `<layer>.lora_down.weight`, `<layer>.lora_up.weight` and `<layer>.alpha` for low-rank factors. `key_map` is
    that of `base`.

    Raises:
        UserError: A layer of the LoRA has no array of its shape.
    """

    def __init__(self, base: Checkpoint, key_map: KeyMap, lora: LoRA):
        super().__init__(base, {name: name for name in base})
        _check_fits(base, key_map, lora)
        arrays = {name: array.astype(np.float32) for name, array in mindone.layer_arrays(lora).items()}
        in_memory = ArraysInMemory(arrays)
        self.sources.update({name: (in_memory, name) for name in arrays})


def split_embedded(checkpoint: Checkpoint) -> tuple[Checkpoint, LoRA | None]:
    """Split a base model's checkpoint from the LoRA beside its weights.

    The LoRA may be written by EmbeddedArrays, in mindone's network with LoRA, or in lora_wrapper's embedded checkpoints
    except for its soft convolutions, which no single kernel equals. The base model's parameters get their own names.

    Returns:
        The base model's arrays, and the LoRA or None.

    Raises:
        UserError: Half of a pair is missing, factors do not go together, or there is a soft convolution.
    """
    parts = {name: match for name in checkpoint if (match := _PART.match(name)) and component_of(name) != "other"}
    modules = {match.group(1) for match in parts.values()}
    if not modules:
        return checkpoint, None
    own_names = {
        f"{module}.{inner}.{parameter}": f"{module}.{parameter}"
        for module in modules
        for inner in _INNER_LAYERS
        for parameter in ("weight", "bias")
    }
    lora_names = {name: name for name in checkpoint if name in parts or name in mindone.SETTINGS}
    base_names = {own_names.get(name, name): name for name in checkpoint if name not in lora_names}
    if any(match.group(2) for match in parts.values()):
        lora = mindone.read(RenamedCheckpoint(checkpoint, lora_names))
    else:
        layers = {module: _wrapper_layer(checkpoint, module) for module in sorted(modules)}
        lora = LoRA(layers, lora_metadata(checkpoint.metadata))
    return RenamedCheckpoint(checkpoint, base_names), lora


def _check_fits(base: Checkpoint, key_map: KeyMap, lora: LoRA) -> None:
    shapes = {name: source_shape(base.shape(source.name), source) for name, source in key_map.sources.items()}
    match_shapes(shapes, lora).require("the LoRA")
    metadata = model_metadata(base.metadata)
    for key, text in lora.metadata.items():
        if metadata.get(key, text) != text:
            raise UserError(f"the LoRA was made for a model whose {key} is {text}, {base.path} has {metadata[key]}")


def _wrapper_layer(checkpoint: Checkpoint, module: str) -> LoRALayer:
    """Read a layer that lora_wrapper wrote."""
    if f"{module}.lora_A.weight" in checkpoint or f"{module}.lora_B.weight" in checkpoint:
        raise UserError(
            f"{checkpoint.path}: {module} is a soft convolution of lora_wrapper, two kernels in a row: no LoRA file "
            "and no single kernel can hold it"
        )
    factors = ("lora_A", "lora_B")
    check_pair(checkpoint.path, module, [name for name in factors if f"{module}.{name}" in checkpoint], factors)
    layer = read_factors(checkpoint, module, f"{module}.lora_A", f"{module}.lora_B")
    if f"{module}.lora_scale" not in checkpoint:
        return layer
    return replace(layer, alpha=read_number(checkpoint, module, f"{module}.lora_scale") * layer.rank)
