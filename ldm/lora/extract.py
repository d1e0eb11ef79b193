"""Extracting the LoRA between two checkpoints: a base model and a full fine-tuning of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ldm.errors import UserError
from ldm.lora.algebra import Truncation, decompose
from ldm.lora.lora import LoRA
from ldm.lora.spec import TARGETS, fits
from ldm.settings.model import model_metadata
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.names import LABELS, CanonicalArrays, component_of, same_up_to_1x1


@dataclass
class Extraction:
    """A LoRA between two checkpoints, and what its ranks cut off.

    Attributes:
        left_out: Component -> (number of arrays that differ but get no LoRA, their squared distance).
    """

    lora: LoRA
    truncation: Truncation
    left_out: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(self.truncation)]
        distance = sum(layer.squared_norm for layer in self.truncation.layers.values())
        distance += sum(squares for _, squares in self.left_out.values())
        for component, (count, squares) in self.left_out.items():
            lines.append(
                f"left out: {count} other arrays of the {LABELS[component]} that differ (norms, biases, layers that "
                f"hold no LoRA), {squares / distance:.2%} of the squared distance"
            )
        return "\n".join(lines)


def extract_lora(
    base_path: str | os.PathLike,
    tuned_path: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] = ("all",),
    components: Sequence[str] = ("unet", "text_encoder"),
) -> Extraction:
    """Return the LoRA between two checkpoints, by the SVD of the difference of each layer's weights in fp32.

    Args:
        base_path, tuned_path: The base model and the fine-tuned one, checkpoints of any form.
        rank, energy: As for ldm.lora.algebra.resize.
        targets: Groups ("attention", "all"), last parts of layers' names, or patterns, see ldm.lora.spec.
        components: Which networks get a LoRA.

    Raises:
        UserError: A checkpoint cannot be read, they are of different models or equal, or a target matches nothing.
    """
    base, tuned = (
        CanonicalArrays(checkpoint, map_base_model(checkpoint))
        for checkpoint in map(open_base_model, (base_path, tuned_path))
    )
    names = [name for name in base if component_of(name) in components and name in tuned]
    unshared = [name for name in {*base} ^ {*tuned} if component_of(name) in components]
    if not names or unshared:
        raise UserError(
            f"{base_path} and {tuned_path} are not of one model: {len(unshared)} arrays are in only one, such as "
            f"{min(unshared, default='all')}"
        )
    for name in names:
        if not same_up_to_1x1(base.shape(name), tuned.shape(name)):
            raise UserError(
                f"{base_path} and {tuned_path} are not of one model: {name} is {base.shape(name)} and "
                f"{tuned.shape(name)}"
            )
    patterns = [pattern for target in targets for pattern in TARGETS.get(target, (target,))]
    layers = {
        name: name[: -len(".weight")]
        for name in names
        if name.endswith(".weight")
        and len(base.shape(name)) in (2, 4)
        and any(fits(pattern, name[: -len(".weight")]) for pattern in patterns)
    }
    for target in targets:
        if target not in TARGETS and not any(fits(target, layer) for layer in layers.values()):
            raise UserError(f'the target "{target}" matches no layer: give {" or ".join(TARGETS)}, or ends of names')
    left_out: dict[str, tuple[int, float]] = {}

    def updates() -> Iterator[tuple[str, np.ndarray]]:
        for name in tqdm(names, desc="decomposing", unit="array"):
            before = np.array(base[name], np.float32)
            delta = np.array(tuned[name], np.float32).reshape(before.shape) - before
            base.release(name)
            tuned.release(name)
            if name in layers:
                yield layers[name], delta
            elif delta.any():
                count, squares = left_out.get(component_of(name), (0, 0.0))
                left_out[component_of(name)] = (count + 1, squares + float(np.sum(np.square(delta, dtype=np.float64))))

    lora, truncation = decompose(updates(), rank, energy)
    if not lora.layers:
        raise UserError(f"{base_path} and {tuned_path} differ in none of the layers: there is no LoRA between them")
    lora.metadata.update(model_metadata(open_base_model(tuned_path).metadata))
    return Extraction(lora, truncation, left_out)
