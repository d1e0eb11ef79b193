"""How much a LoRA changes each block at strength 1, and which of its layers are dead or exploding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldm.lora.lora import LoRA
from ldm.lora.strength import block_of_parameter
from ldm.settings.block_weights import in_order
from ldm.weights.arrays import Arrays
from ldm.weights.names import component_of

OUTSIDE = "other"  # layers of the UNet outside of its blocks
BAR = 24  # characters
# Beside the median of the layers of its kind: a layer below the one is dead, one above the other is exploding. Layers
# of trained LoRAs differ by a factor of about 10 around it.
DEAD, EXPLODING = 1e-3, 100.0
LARGE = 1.0  # |update| / |weight| from which a layer is replaced rather than adapted


@dataclass
class UpdateNorm:
    """The Frobenius norms of an update and of the parameter it changes, which is None without a base model."""

    update: float
    weight: float | None

    @property
    def relative(self) -> float | None:
        return None if not self.weight else self.update / self.weight


def update_norms(lora: LoRA, base: Arrays | None = None) -> dict[str, UpdateNorm]:
    """Return the name of each changed parameter -> the norm of its update.

    Updates that depend on the weight are left out without a base model.

    Args:
        lora: The LoRA.
        base: The base model's arrays by canonical name.
    """
    norms = {}
    for name, update in lora.updates().items():
        weight = None if base is None else np.array(base[name], np.float32)
        if weight is not None or not update.needs_weight:
            norms[name] = UpdateNorm(_norm(update.delta(weight)), None if weight is None else _norm(weight))
    return norms


def norm_table(norms: Mapping[str, UpdateNorm]) -> list[str]:
    """Return a line with a bar for each block: the norm of all its updates, beside that of its weights."""
    blocks: dict[str, list[UpdateNorm]] = {}
    for name, norm in norms.items():
        blocks.setdefault(block_of_parameter(name) or OUTSIDE, []).append(norm)
    updates = {block: math.hypot(*(norm.update for norm in of_block)) for block, of_block in blocks.items()}
    largest = max(updates.values(), default=0.0)
    lines = []
    for block in [*in_order(blocks.keys() - {OUTSIDE}), *(blocks.keys() & {OUTSIDE})]:
        bar = "#" * round(BAR * updates[block] / largest) if largest else ""
        weight = math.hypot(*(norm.weight or 0.0 for norm in blocks[block]))
        share = f"  {updates[block] / weight:8.2%} of its weights" if weight else ""
        lines.append(
            f"  {block:5} {len(blocks[block]):3} layers  |update| {updates[block]:10.4g}{share}  {bar}".rstrip()
        )
    return lines


def findings(lora: LoRA, norms: Mapping[str, UpdateNorm]) -> list[str]:
    """Return what is wrong with layers: dead, exploding, or larger than the weights that they change."""
    updates = lora.updates()
    kinds: dict[tuple[str, bool], dict[str, float]] = {}  # matrices and vectors differ in size by nature
    for name, norm in norms.items():
        kinds.setdefault((component_of(name), len(updates[name].shape) == 1), {})[name] = norm.update
    dead, exploding = [], []
    for of_kind in kinds.values():
        median = statistics.median(of_kind.values())
        dead += [name for name, norm in of_kind.items() if norm <= DEAD * median]
        exploding += [name for name, norm in of_kind.items() if median and norm > EXPLODING * median]
    large = [name for name, norm in norms.items() if (norm.relative or 0.0) > LARGE]
    lines = [
        *_named(dead, "dead, its update is zero or below a thousandth of the median"),
        *_named(exploding, f"exploding, its update is over {EXPLODING:g} times the median"),
        *_named(large, "changed by more than its own norm: use a lower strength"),
    ]
    left_out = updates.keys() - norms.keys()
    if left_out:
        labels = ", ".join(sorted({updates[name].label for name in left_out}))
        lines.append(f"{len(left_out)} layers ({labels}) depend on the base model: give --base to see their norms")
    return lines


def _named(names: list[str], what: str) -> list[str]:
    """Return a line that counts layers and names one of them, none if there are none."""
    return [f"{len(names)} of the layers: {what}, such as {min(names)}"] if names else []


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64).reshape(-1)))
