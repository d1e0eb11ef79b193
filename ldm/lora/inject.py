"""Putting low-rank cells into the networks from outside, and making sure of what will be trained."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from mindspore import nn

from ldm.errors import UserError
from ldm.lora.layers import LORA_CELLS, LoRAConv, LoRADense
from ldm.models.layers import Conv2d, Dense
from ldm.weights.names import LABELS, component_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PROJECTIONS = ("proj_in", "proj_out")
RESIDUAL = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op", "conv")
TARGETS = {"attention": ATTENTION, "all": ATTENTION + FEED_FORWARD + PROJECTIONS + RESIDUAL}


@dataclass(frozen=True)
class LoRASpec:
    """What to inject.

    Attributes:
        rank: of the factors.
        alpha: the update is multiplied by alpha / rank; None stands for alpha = rank.
        scale: and by this.
        unet, text_encoder: which networks.
        targets: one or several of "attention" (q, k, v and output projections), "all" (and feed-forward, projections
            around the transformers, residual blocks and resampling convolutions), and the last parts of layers' names.
        fp16: let the factors compute in fp16 where their layer does; they are stored in fp32 in any case.
        seed: of the initial values.
    """

    rank: int = 4
    alpha: float | None = None
    scale: float = 1.0
    unet: bool = True
    text_encoder: bool = False
    targets: str | tuple[str, ...] = "attention"
    fp16: bool = True
    seed: int = 0


def inject_lora(net: nn.Cell, spec: LoRASpec) -> list[str]:
    """Put low-rank cells in the place of the layers that `spec` names, and freeze everything else.

    down is drawn uniformly from +-1 / sqrt(fan-in) as in LoRA's own code, PEFT and kohya, from a generator of the seed
    and the layer's name, so a layer's values do not depend on which others are injected. up is zero: the network's
    outputs are unchanged.

    Do this before the network is compiled; a compiled graph keeps the layers it was compiled with.

    Args:
        net: a StableDiffusion, or a part of one.

    Returns:
        The full names of the injected layers, e.g. "model.diffusion_model.input_blocks.1.1....attn1.to_q".

    Raises:
        UserError: a setting is out of range, a target matches nothing, or there are low-rank cells already.
    """
    targets = _check(spec)
    if any(isinstance(cell, LORA_CELLS) for _, cell in net.cells_and_names()):
        raise UserError("LoRA layers are injected already: inject once, into a network built anew")
    found = _find(net, spec, targets)
    alpha = spec.rank if spec.alpha is None else spec.alpha
    for name, parent, key, base in found:
        cell_type = LoRADense if isinstance(base, Dense) else LoRAConv
        shape = (spec.rank, *base.weight.shape[1:])
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        cell = cell_type(base, rng.uniform(-bound, bound, shape), name, alpha, spec.scale, spec.fp16)
        cell.set_train(base.training)
        _replace(parent, key, cell)
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    for _, cell in net.cells_and_names():
        if isinstance(cell, LORA_CELLS):
            cell.lora_down.weight.requires_grad = cell.lora_up.weight.requires_grad = True
    names = [name for name, *_ in found]
    assert_trainable(net, names)
    return names


def assert_trainable(net: nn.Cell, names: Iterable[str]) -> None:
    """Raise RuntimeError unless exactly the factors of the layers `names` are trainable in `net`, and no two
    parameters share a name."""
    parameters = list(net.get_parameters())
    if len({parameter.name for parameter in parameters}) != len(parameters):
        raise RuntimeError("two parameters of the network have the same name")
    wanted = {f"{name}.lora_{factor}.weight" for name in names for factor in ("down", "up")}
    trainable = {parameter.name for parameter in parameters if parameter.requires_grad}
    if trainable != wanted:
        extra, missing = sorted(trainable - wanted), sorted(wanted - trainable)
        example = (extra or missing)[0]
        raise RuntimeError(
            f"{len(wanted)} parameters should be trainable, {len(trainable)} are: {len(extra)} should not be, "
            f"{len(missing)} are missing; for example {example}"
        )


def _check(spec: LoRASpec) -> tuple[str, ...]:
    if isinstance(spec.rank, bool) or not isinstance(spec.rank, (int, np.integer)) or spec.rank < 1:
        raise UserError(f"lora_rank is {spec.rank}: it must be a whole number, 1 or more (4 is usual)")
    for setting, value in (("lora_alpha", spec.alpha), ("lora_scale", spec.scale)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{setting} is {value}: it must be a finite number")
    if spec.alpha is not None and spec.alpha <= 0:
        raise UserError(f"lora_alpha is {spec.alpha}: it must be above 0 (leave it out for alpha = rank)")
    if not (spec.unet or spec.text_encoder):
        raise UserError("lora_ft_unet and lora_ft_text_encoder are both False: there is nothing to train, set one")
    if isinstance(spec.targets, str) and spec.targets not in TARGETS:
        raise UserError(f"LoRA targets {spec.targets!r}: choose one of {', '.join(TARGETS)}, or give layer names")
    if not spec.targets:
        raise UserError(f"lora_targets is empty: give {', '.join(TARGETS)}, or the last parts of layers' names")
    return tuple(target for entry in _entries(spec) for target in TARGETS.get(entry, (entry,)))


def _entries(spec: LoRASpec) -> tuple[str, ...]:
    return (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)


def _find(net: nn.Cell, spec: LoRASpec, targets: tuple[str, ...]) -> list[tuple[str, nn.Cell, str, nn.Cell]]:
    """(layer name, parent, key in the parent, layer) of every layer that is asked for."""
    wanted = {"unet": spec.unet, "text_encoder": spec.text_encoder}
    found, used, components = [], set(), set()
    for _, parent in net.cells_and_names():
        for key, layer in parent._cells.items():
            # Not their subclasses: those are called with other arguments.
            if type(layer) not in (Dense, Conv2d):
                continue
            # By the parameter's name, which is the full one where `net` is a part of a model too.
            name = layer.weight.name[: -len(".weight")]
            target = next((target for target in targets if f".{name}".endswith(f".{target}")), None)
            component = component_of(name)
            if target is None or not wanted.get(component):
                continue
            narrowest = min(layer.weight.shape[0], math.prod(layer.weight.shape[1:]))
            if spec.rank > narrowest:
                raise UserError(f"lora_rank {spec.rank} is more than the width {narrowest} of {name}: lower it")
            used.update(target for target in targets if f".{name}".endswith(f".{target}"))
            components.add(component)
            found.append((name, parent, key, layer))
    for component, asked in wanted.items():
        if asked and component not in components:
            raise UserError(
                f"LoRA targets {spec.targets} match no layer of the {LABELS[component]}, "
                f"which lora_ft_{component} asks for"
            )
    # a group names layers that not every network has; a name that matches nothing is a mistake
    unused = [entry for entry in _entries(spec) if entry not in TARGETS and entry not in used]
    if unused:
        raise UserError(
            f"LoRA target {unused[0]!r} matches no dense layer or convolution: give {' or '.join(TARGETS)}, "
            "or the last parts of layers' names, such as to_q"
        )
    return found


def _replace(parent: nn.Cell, key: str, cell: nn.Cell) -> None:
    # Into the dictionary itself: assignment would put the parent's prefix before the parameters' names once more.
    parent._cells[key] = cell
    if isinstance(parent, nn.SequentialCell):
        parent.cell_list = list(parent._cells.values())  # what its construct walks over
