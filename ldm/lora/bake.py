"""Baking: pairs of low-rank factors in place of all other kinds of updates, by the SVD of each dense update."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ldm.errors import UserError
from ldm.lora.algebra import LayerTruncation, Truncation, check_cut, decompose
from ldm.lora.formats import base_of
from ldm.lora.formats.factors import reshape_layer
from ldm.lora.lora import LoRA
from ldm.lora.merge import match_shapes
from ldm.lora.updates import LayerUpdate, LoRALayer
from ldm.settings.model import ModelConfig
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.names import CanonicalArrays


@dataclass
class Baked:
    """A LoRA of low-rank factors alone, and what it lost.

    Attributes:
        left_out: Names of the updates that no low-rank factors hold: of normalisations and biases.
    """

    lora: LoRA
    truncation: Truncation
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        layers = self.truncation.layers.values()
        norm, loss = sum(layer.squared_norm for layer in layers), sum(layer.squared_loss for layer in layers)
        lines = [f"baked: {self.truncation}"]
        if norm:
            lines.append(f"energy kept: {1 - loss / norm:.4%} of the squared norm of the baked layers")
        if self.left_out:
            lines.append(
                f"left out: {len(self.left_out)} updates of normalisations and biases, which low-rank factors cannot "
                f"hold, such as {self.left_out[0]}"
            )
        return "\n".join(lines)


def bake(
    lora: LoRA,
    rank: int | None = None,
    energy: float | None = None,
    base_path: str | os.PathLike | None = None,
    config: ModelConfig | None = None,
) -> Baked:
    """Return a LoRA whose layers are all pairs of low-rank factors. Pairs stay as they are, bit for bit.

    Args:
        lora: The LoRA.
        rank, energy: How much of each other update is kept, as for ldm.lora.algebra.resize.
        base_path: The base model, for kinds that depend on its weights (DoRA, IA3, OFT).
        config: Configuration of the base model, which tells the kernels. None for a known base model.

    Raises:
        UserError: Neither rank nor energy is given or one is out of range, the base model is needed and missing or
            does not fit, or no layer is left.
    """
    check_cut(rank, energy)
    modules = base_of(lora, config).by_name
    others = {
        name: reshape_layer(layer, modules[name].shape)
        for name, layer in lora.layers.items()
        if not isinstance(layer, LoRALayer)
    }
    matrices = {name: layer for name, layer in others.items() if len(layer.shape) > 1}
    left_out = [f"{name}.weight" for name in others.keys() - matrices.keys()] + [f"{name}.bias" for name in lora.biases]
    baked, truncation = decompose(_dense(lora, matrices, base_path), rank, energy)
    for name in matrices.keys() - baked.layers.keys():
        truncation.layers[name] = LayerTruncation(0, 0, 0.0, 0.0)
    pairs = {name: baked.layers.get(name, layer) for name, layer in lora.layers.items()}
    layers = {name: layer for name, layer in pairs.items() if isinstance(layer, LoRALayer)}
    if not layers:
        raise UserError("nothing is left of the LoRA: all its updates are zero, of normalisations or of biases")
    kept = LoRA(layers, dict(lora.metadata), dict(lora.embeddings), file_metadata=dict(lora.file_metadata))
    return Baked(kept, truncation, sorted(left_out))


def _dense(
    lora: LoRA, layers: dict[str, LayerUpdate], base_path: str | os.PathLike | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the dense update of each layer. Raises UserError as `bake`."""
    dependent = next((layer for layer in layers.values() if layer.needs_weight), None)
    base = None
    if dependent is not None:
        if base_path is None:
            raise UserError(
                f"{dependent.label} depends on the weights of the base model: give it as well (--ckpt_path), the one "
                "that the LoRA is for"
            )
        checkpoint = open_base_model(base_path)
        base = CanonicalArrays(checkpoint, map_base_model(checkpoint))
        shapes = {name: base.shape(name) for name in base}
        match_shapes(shapes, LoRA(layers, lora.metadata)).require(f"the LoRA, for {base_path},")
    for name, layer in tqdm(layers.items(), desc="decomposing", unit="layer"):
        if base is None or not layer.needs_weight:
            yield name, layer.delta()
        else:
            weight = np.array(base[f"{name}.weight"], np.float32)
            yield name, layer.delta(weight).reshape(weight.shape)
            base.release(f"{name}.weight")
