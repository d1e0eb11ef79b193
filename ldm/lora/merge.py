"""Merging a LoRA into the weights of a model in memory, after checking that its layers fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn

from ldm.errors import UserError, plain
from ldm.lora.lora import LoRA
from ldm.lora.strength import Strength
from ldm.lora.updates import LayerUpdate
from ldm.settings.model import ModelConfig
from ldm.weights.names import LABELS, component_of
from ldm.weights.recognise import version_of_width

LARGEST_FP16 = 65504.0


@dataclass
class LoRAMatch:
    """How the layers of a LoRA fit a model. A bias is named `<layer>.bias`.

    Attributes:
        matched: Names of the layers that the model has in the same shape.
        unmatched: Names of the layers that the model does not have.
        wrong_shape: Name -> (shape in the LoRA, shape in the model) of the layers that have another shape.
    """

    matched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.matched) and not self.unmatched and not self.wrong_shape

    def require(self, path: str) -> None:
        """Raise UserError unless every layer fits. `path` names the LoRA in the error."""
        if not (self.matched or self.unmatched or self.wrong_shape):
            raise UserError(f"{path} holds no layers: there is nothing to merge")
        if not self.ok:
            what = "does not fit the model" if self.matched else "matches nothing in the model"
            raise UserError(f"{path} {what} ({self}; {self._example()})")

    def _example(self) -> str:
        """Return what a layer that does not fit tells about the models, or the layer itself."""
        for name, (shape, wanted) in self.wrong_shape.items():
            if name.endswith(("attn2.to_k", "attn2.to_v")) and shape[1] != wanted[1]:
                return f"it was made for {version_of_width(shape[1])}, not for {version_of_width(wanted[1])}"
        for name, (shape, wanted) in self.wrong_shape.items():
            return f"for example {name} is {shape}, wanted {wanted}"
        return f"for example {self.unmatched[0]} is not in the model"

    def __str__(self) -> str:
        parts = []
        for component, label in LABELS.items():
            counts = [
                f"{count} {what}"
                for names, what in (
                    (self.matched, "matched"),
                    (self.unmatched, "unmatched"),
                    (self.wrong_shape, "of a wrong shape"),
                )
                if (count := sum(component_of(name) == component for name in names))
            ]
            if counts:
                parts.append(f"{label}: {', '.join(counts)}")
        return "; ".join(parts) or "no layers"


def match_lora(model: nn.Cell, lora: LoRA) -> LoRAMatch:
    """Compare the layers of `lora` with the parameters of `model`, by name and shape."""
    return match_shapes({p.name: tuple(p.shape) for p in model.get_parameters()}, lora)


def match_shapes(shapes: Mapping[str, tuple[int, ...]], lora: LoRA) -> LoRAMatch:
    """Compare the layers of `lora` with a model given as parameter name -> shape."""
    match = LoRAMatch()
    for parameter, update in lora.updates().items():
        name = parameter.removesuffix(".weight")
        wanted = shapes.get(parameter)
        if wanted is None:
            match.unmatched.append(name)
        elif update.fits(wanted):
            match.matched.append(name)
        else:
            match.wrong_shape[name] = (update.misfit(wanted), wanted)
    return match


class Update(NamedTuple):
    """What a LoRA adds to one weight: `layer.update(strength, weight)`. `path` names the LoRA in errors."""

    layer: LayerUpdate
    strength: float
    path: str


def add_updates(weight: np.ndarray, updates: Sequence[Update], dtype: npt.DTypeLike) -> np.ndarray:
    """Add updates to a weight, one after another in fp32, and cast the sum to `dtype`. Returns a new array.

    An update that depends on the weight gets the sum so far, as in A1111 and ComfyUI.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # see check_range
        total = weight.astype(np.float32)
        for update in updates:
            total += update.layer.update(update.strength, total).reshape(total.shape)
        return total.astype(dtype, copy=False)


def may_overflow(updates: Sequence[Update]) -> bool:
    """Whether the updates are so large that their sum with a weight may be outside the range of fp16."""
    # Weights are small and large updates are rare: only where this is true, the sum is computed twice.
    if any(update.layer.needs_weight for update in updates):
        return True  # `largest` leaves out the weight
    return not sum(update.layer.largest(update.strength) for update in updates) < LARGEST_FP16 / 2


def check_range(name: str, weight: np.ndarray, updates: Sequence[Update], dtype: npt.DTypeLike) -> None:
    """Raise UserError if the sum with a finite weight is outside the range of `dtype`. It names the update at fault."""
    if not np.isfinite(weight).all() or np.isfinite(add_updates(weight, updates, dtype)).all():
        return
    for count, update in enumerate(updates, 1):
        if not np.isfinite(add_updates(weight, updates[:count], dtype)).all():
            raise UserError(
                f"{update.path} at strength {update.strength:g}: the sum with {plain(name.removesuffix('.weight'))} is "
                f"outside the range of {np.dtype(dtype).name}: lower the strength"
            )


def check_compatible(lora: LoRA, config: ModelConfig, path: str = "the LoRA") -> None:
    """Check what the LoRA's metadata says about its base model. The shapes are checked by `merge_lora`.

    `path` names the LoRA in the error.

    Raises:
        UserError: The LoRA was made for another architecture or prediction type.
    """
    for key, wanted, other in (
        ("architecture", config.architecture, "a model of another architecture"),
        ("prediction_type", config.prediction_type, "a model that predicts something else"),
    ):
        if lora.metadata.get(key, wanted) != wanted:
            raise UserError(
                f"{path} was made for {other}: its {key} is {lora.metadata[key]}, that of {config.path} is {wanted}; "
                "choose the version or configuration that it was trained on"
            )


def merge_lora(model: nn.Cell, lora: LoRA, strength: float | Strength = 1.0, path: str = "the LoRA") -> LoRAMatch:
    """Add the update of each layer to its weight: strength * (alpha / rank) * up @ down for low-rank factors.

    The sum is computed in fp32 and cast to the weight's type. Strength 0 leaves every weight unchanged, bit for bit. A
    negative strength subtracts. Several LoRAs can be merged one after another.

    Args:
        model: A StableDiffusion or a part of one, with or without injected LoRA layers.
        lora: The LoRA.
        strength: One number, or a Strength with one number for each network and block weights.
        path: Name of the LoRA in an error.

    Returns:
        How the layers fit.

    Raises:
        UserError: A layer has no counterpart of its shape in `model`, block weights do not suit it, or a sum is outside
            the range of the weight's type. `model` is unchanged then.
    """
    strength = Strength.from_value(strength)
    strength.check(path)
    match = match_lora(model, lora)
    match.require(path)
    parameters = {parameter.name: parameter for parameter in model.get_parameters()}
    strength.check_model(parameters, path)
    strength.warn_of_layers(lora, path)
    updates = {
        name: [Update(update, strength.of_layer(name), path)]
        for name, update in lora.updates().items()
        if strength.of_layer(name)
    }
    for name, of_weight in updates.items():
        if may_overflow(of_weight):
            weight = parameters[name].asnumpy()
            check_range(name, weight, of_weight, weight.dtype)
    for name, of_weight in updates.items():
        weight = parameters[name].asnumpy()
        parameters[name].set_data(Tensor(add_updates(weight, of_weight, weight.dtype)))
    return match


def unmerge_lora(model: nn.Cell, lora: LoRA, strength: float | Strength = 1.0) -> LoRAMatch:
    """Take out of the weights what merge_lora(model, lora, strength) put in, within rounding of their type.

    Raises:
        UserError: As for merge_lora, and for kinds of layers (DoRA) whose weights the merged ones do not tell. `model`
            is unchanged then.
    """
    strength = Strength.from_value(strength)
    strength.check("the LoRA")
    match = match_lora(model, lora)
    match.require("the LoRA")
    parameters = {parameter.name: parameter for parameter in model.get_parameters()}
    strength.check_model(parameters, "the LoRA")
    restored = {}
    for name, update in lora.updates().items():
        weight = parameters[name].asnumpy()
        if strength.of_layer(name):
            restored[name] = update.restore(weight, strength.of_layer(name)).astype(weight.dtype)
    for name, weight in restored.items():
        parameters[name].set_data(Tensor(weight))
    return match
