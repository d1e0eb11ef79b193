"""How much a LoRA changes each block, and which of its layers are dead or exploding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldm.lora.lora import LoRA
from ldm.settings.block_weights import BASE, block_of, in_order
from ldm.weights.arrays import Arrays
from ldm.weights.names import component_of
from ldm.weights.names.tables import UNET_PREFIX

OUTSIDE = "other"  # layers of the UNet outside of its blocks
BAR = 24  # characters
# Beside the median of the layers of its network: a layer below the one is dead, one above the other is exploding.
# Layers of trained LoRAs differ by a factor of about 10 around it.
DEAD, EXPLODING = 1e-3, 100.0
LARGE = 1.0  # |update| / |weight| from which a layer is replaced rather than adapted


@dataclass
class LayerStrength:
    """The Frobenius norms of an update and of the weight it changes, which is None without a base model."""

    update: float
    weight: float | None

    @property
    def relative(self) -> float | None:
        return None if not self.weight else self.update / self.weight


def layer_strengths(lora: LoRA, base: Arrays | None = None) -> dict[str, LayerStrength]:
    """Return the name of each changed parameter -> its strength, without those that need a missing base model.

    Args:
        lora: The LoRA.
        base: The base model's arrays by canonical name.
    """
    strengths = {}
    for name, update in lora.updates().items():
        weight = None if base is None else np.array(base[name], np.float32)
        if weight is not None or not update.needs_weight:
            strengths[name] = LayerStrength(_norm(update.delta(weight)), None if weight is None else _norm(weight))
    return strengths


def strength_table(strengths: Mapping[str, LayerStrength]) -> list[str]:
    """Return a line with a bar for each block: the norm of all its updates, and beside that of its weights."""
    blocks: dict[str, list[LayerStrength]] = {}
    for name, strength in strengths.items():
        blocks.setdefault(_block(name), []).append(strength)
    updates = {block: math.hypot(*(layer.update for layer in layers)) for block, layers in blocks.items()}
    largest = max(updates.values(), default=0.0)
    lines = []
    for block in [
        *in_order(block for block in blocks if block != OUTSIDE),
        *(OUTSIDE for _ in [0] if OUTSIDE in blocks),
    ]:
        layers = blocks[block]
        bar = "#" * round(BAR * updates[block] / largest) if largest else ""
        weights = [layer.weight for layer in layers if layer.weight is not None]
        share = f"  {updates[block] / math.hypot(*weights):8.2%} of its weights" if weights and any(weights) else ""
        lines.append(f"  {block:5} {len(layers):3} layers  |update| {updates[block]:10.4g}{share}  {bar}".rstrip())
    return lines


def findings(lora: LoRA, strengths: Mapping[str, LayerStrength]) -> list[str]:
    """Return what is wrong with layers: dead, exploding, or larger than the weights that they change."""
    lines = []
    for component in ("unet", "text_encoder"):
        norms = {name: layer.update for name, layer in strengths.items() if component_of(name) == component}
        if not norms:
            continue
        median = statistics.median(norms.values())
        dead = sorted(name for name, norm in norms.items() if norm <= DEAD * median)
        exploding = sorted(name for name, norm in norms.items() if median and norm > EXPLODING * median)
        lines += _named(dead, "dead: their updates are zero or below a thousandth of the median")
        lines += _named(exploding, f"exploding: their updates are over {EXPLODING:g} times the median")
    large = sorted(name for name, layer in strengths.items() if (layer.relative or 0.0) > LARGE)
    lines += _named(large, "larger than the weights they change: use a lower strength")
    left_out = len(lora.updates()) - len(strengths)
    if left_out:
        kinds = sorted({update.label for update in lora.updates().values() if update.needs_weight})
        lines.append(
            f"{left_out} layers ({', '.join(kinds)}) depend on the base model: give --base to see their strength"
        )
    return lines


def _named(names: list[str], what: str) -> list[str]:
    return [f"{len(names)} layers are {what}, such as {names[0]}"] if names else []


def _block(name: str) -> str:
    if component_of(name) == "text_encoder":
        return BASE
    return (block_of(name[len(UNET_PREFIX) :]) if name.startswith(UNET_PREFIX) else None) or OUTSIDE


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64).reshape(-1)))
