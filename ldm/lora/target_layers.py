"""Finding the layers of a model that a LoRASpec names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mindspore import nn

from ldm.errors import UserError, plain
from ldm.lora.spec import TARGETS, LayerSpec, LoRASpec, fits, near_names
from ldm.models.layers import Conv2d, Linear
from ldm.weights.names import LABELS, component_of

FIRST_CONVOLUTION = "input_blocks.0.0"  # of the UNet


class Layer(NamedTuple):
    """A Linear or Conv2d, found as `parent`'s child `key`. `name` is its full name."""

    name: str
    parent: nn.Cell
    key: str
    cell: nn.Cell

    @property
    def kernel_size(self) -> int:
        """That of a convolution, 1 of a linear layer."""
        return self.cell.kernel_size if isinstance(self.cell, Conv2d) else 1


def find_target_layers(model: nn.Cell, spec: LoRASpec) -> list[tuple[Layer, LayerSpec]]:
    """Return the layers that get a LoRA, each with its specification.

    Raises:
        UserError: A setting is out of range or does not suit its layer, or a target matches nothing.
    """
    specs = spec.layer_specs()
    trained = {"unet": spec.unet, "text_encoder": spec.text_encoder}
    layers = _layers(model)
    targets: list[tuple[Layer, LayerSpec]] = []
    matching, deciding, components = set(), set(), set()
    for layer in layers:
        patterns = [pattern for pattern in specs if _names(pattern, layer.name)]
        component = component_of(layer.name)
        if not patterns or not trained[component]:
            continue
        matching.update(patterns)
        deciding.add(patterns[-1])
        components.add(component)
        layer_spec = spec.for_layer(specs[patterns[-1]], layer.kernel_size)
        if layer_spec.rank:
            _check_layer(layer, layer_spec, patterns[-1] if spec.modules else None, spec)
            targets.append((layer, layer_spec))
    for component, wanted in trained.items():
        if wanted and component not in components:
            source = "names of the LoRA configuration" if spec.modules else f"LoRA targets {plain(spec.targets)}"
            raise UserError(
                f"{source} match no layer of the {LABELS[component]}, which lora_ft_{component} asks for"
                + (_suggestion(next(iter(specs)), layers) if spec.modules else "")
            )
    # A group names layers that not every model has. A name that matches nothing is a mistake.
    patterns = list(specs) if spec.modules else [target for target in spec.target_list() if target not in TARGETS]
    for pattern in patterns:
        if pattern not in matching:
            raise UserError(_unmatched(pattern, spec, layers))
    if spec.modules:
        for pattern in patterns:
            if pattern not in deciding:
                raise UserError(
                    f'"{plain(pattern)}" of the LoRA configuration is used for no layer: later names match all of its '
                    "layers too, and the last match is used. Put the more general name first"
                )
    if not targets:
        raise UserError("the LoRA configuration leaves out every layer (r 0): there is nothing to train")
    return targets


def _names(pattern: str, name: str) -> bool:
    """Whether a name of the configuration stands for a layer. Only its own name stands for the first convolution.

    A wildcard such as `input_blocks.*` then means the same layers as in the published configurations, which cannot
    train the first convolution.
    """
    return fits(pattern, name) and (not name.endswith(FIRST_CONVOLUTION) or pattern.endswith(FIRST_CONVOLUTION))


def _layers(model: nn.Cell) -> list[Layer]:
    """Return all linear layers and convolutions of the UNet and the text encoder."""
    layers = []
    for _, parent in model.cells_and_names():
        for key, cell in parent._cells.items():
            if isinstance(cell, (Linear, Conv2d)):
                # The parameter has the full name even where `model` is a part of a model.
                name = cell.weight.name[: -len(".weight")]
                if component_of(name) in ("unet", "text_encoder"):
                    layers.append(Layer(name, parent, key, cell))
    return layers


def _check_layer(layer: Layer, spec: LayerSpec, pattern: str | None, run: LoRASpec) -> None:
    """Check that a specification suits its layer. `pattern` is the name in the LoRA configuration, if there is one."""
    setting = "lora_rank" if pattern is None else f'"{plain(pattern)}": r'
    if pattern is None and run.conv_rank is not None and layer.kernel_size != 1:
        setting = "conv_dim"
    width = min(layer.cell.weight.shape[0], math.prod(layer.cell.weight.shape[1:]))
    if spec.rank > width and spec.algo != "lokr":  # whose second factor is whole at large ranks
        raise UserError(f"{setting} {plain(spec.rank, 40)} is more than the width {width} of {layer.name}: lower it")
    if spec.hard and isinstance(layer.cell, Conv2d) and layer.cell.kernel_size != 1:
        size = layer.cell.kernel_size
        raise UserError(
            f'"{plain(pattern)}": hard is for 1x1 convolutions, the kernel of {layer.name} is {size}x{size}: set hard 0'
        )


def _unmatched(pattern: str, spec: LoRASpec, layers: Sequence[Layer]) -> str:
    """Return the error for a name that matches no layer to be trained."""
    if not spec.modules:
        return (
            f"LoRA target {plain(pattern)!r} matches no linear layer or convolution: give {' or '.join(TARGETS)}, "
            "or the last parts of layers' names, such as to_q"
        )
    name = f'"{plain(pattern)}" of the LoRA configuration'
    component = next((component_of(layer.name) for layer in layers if fits(pattern, layer.name)), None)
    if component:
        return (
            f"{name} matches only layers of the {LABELS[component]}, which is not trained: set lora_ft_{component} "
            "True, or leave the name out"
        )
    return f"{name} matches no linear layer or convolution{_suggestion(pattern, layers)}"


def _suggestion(pattern: str, layers: Sequence[Layer]) -> str:
    near = near_names(pattern, [layer.name for layer in layers])
    return f": did you mean {', '.join(near)}?" if near else ": give the last parts of layers' names, such as to_q"
