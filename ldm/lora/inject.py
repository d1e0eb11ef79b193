"""Putting low-rank cells into the networks from outside, and making sure of what will be trained."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.errors import UserError, plain
from ldm.lora.layers import (
    LORA_CELLS,
    LoRAConv,
    LoRADense,
    LoRAHardConv,
    StepDropout,
    base_layer,
    make_dropout_key,
)
from ldm.lora.lora import LoRA, LoRALayer
from ldm.lora.spec import TARGETS, LayerSpec, LoRASpec, fits, near_names
from ldm.models.layers import Conv2d, Dense
from ldm.settings.model import ModelConfig
from ldm.weights.names import COMPONENTS, LABELS, component_of, same_up_to_1x1

__all__ = ["LoRASpec", "assert_trainable", "get_lora", "inject_lora", "remove_lora", "set_lora"]


def inject_lora(net: nn.Cell, spec: LoRASpec) -> list[str]:
    """Put low-rank cells in the place of the layers that `spec` names, and freeze everything else.

    A cell computes y = W x + b + scale * (alpha / rank) * up(down(x)) (Hu et al. 2021). down is drawn uniformly from
    +-1 / sqrt(fan-in) as in LoRA's own code, PEFT and kohya, from a generator of the seed and the layer's name, so a
    layer's values do not depend on which others are injected. up is zero: the network's outputs are unchanged.

    Do this before the network is compiled; a compiled graph keeps the layers it was compiled with.

        names = inject_lora(model, LoRASpec(rank=8, targets=("to_q", "to_v")))
        names = inject_lora(model, LoRASpec().with_config({"to_q": {"r": 8}, "ff.net.*": {"r": 4, "alpha": 8}}))

    Args:
        net: a StableDiffusion, or a part of one.

    Returns:
        The full names of the injected layers, e.g. "model.diffusion_model.input_blocks.1.1....attn1.to_q".

    Raises:
        UserError: a setting is out of range, a target matches nothing, or there are low-rank cells already. `net` is
            unchanged then.
    """
    rules = spec.layer_specs()
    if any(isinstance(cell, LORA_CELLS) for _, cell in net.cells_and_names()):
        raise UserError("LoRA layers are injected already: inject once, into a network built anew (or remove_lora)")
    found = _find(net, spec, rules)
    key = make_dropout_key() if any(layer.dropout for *_, layer in found) else None
    for name, parent, place, base, layer in found:
        rank, alpha = layer.rank, layer.rank if layer.alpha is None else layer.alpha
        settings = dict(name=name, alpha=alpha, scale=layer.scale, fp16=spec.fp16,
                        trainable_scale=layer.trainable_scale)  # fmt: skip
        if layer.dropout:
            settings["dropout"] = StepDropout(layer.dropout, name, key)
        shape = (rank, *base.weight.shape[1:])
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        down = np.random.default_rng([spec.seed, zlib.crc32(name.encode())]).uniform(-bound, bound, shape)
        if isinstance(base, Dense):
            cell = LoRADense(base, down, **settings)
        elif layer.hard:
            cell = LoRAHardConv(base, down.reshape(rank, -1), **settings)
        else:
            cell = LoRAConv(base, down, **settings)
        cell.set_train(base.training)
        _replace(parent, place, cell)
    names = [name for name, *_ in found]
    _choose_trainable(net, spec, names)
    assert_trainable(net, names, _prefixes(spec) if spec.trainable_model else ())
    return names


def remove_lora(net: nn.Cell) -> list[str]:
    """Put the layers back that inject_lora replaced, bit for bit as they are; returns their full names.

    What was trained goes with the cells: take it out first (ldm.lora.lora.get_lora), or add it to the weights
    (merge_lora). Everything stays frozen. As for inject_lora, before the network is compiled.

    Raises UserError if nothing is injected.
    """
    names = []
    for _, parent in net.cells_and_names():
        for place, cell in list(parent._cells.items()):
            if isinstance(cell, LORA_CELLS):
                names.append(cell.name)
                _replace(parent, place, base_layer(cell))
    if not names:
        raise UserError("the network holds no LoRA layers: there is nothing to remove")
    return names


def get_lora(model: nn.Cell, config: ModelConfig | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> LoRA:
    """Copy the injected LoRA out of a model. The scale of its layers, trained or not, becomes part of alpha.

    Args:
        model: A model with injected LoRA layers.
        config: Configuration of the model, to be noted in the LoRA's metadata.
        arrays: Parameter name -> values to use in place of the parameters, such as their moving averages.

    Returns:
        The LoRA with factors (rank, in) and (out, rank) for linear layers, (rank, in, k, k) and (out, rank, 1, 1) for
        convolutions.

    Raises:
        UserError: The model has no LoRA layers.
    """

    def value(parameter: Parameter) -> np.ndarray:
        return np.array(parameter.asnumpy() if arrays is None else arrays[parameter.name], np.float32)

    layers = {}
    for name, cell in lora_cells(model).items():
        down, up = value(cell.lora_down.weight), value(cell.lora_up.weight)
        if isinstance(cell, LoRAHardConv):
            down, up = down[:, :, None, None], up[:, :, None, None]
        scale = float(value(cell.lora_scale)[0]) if cell.trainable_scale else cell.scale
        layers[name] = LoRALayer(down, up, cell.alpha * scale)
    if not layers:
        raise UserError("the model has no LoRA layers: inject_lora comes first")
    metadata = {"architecture": config.architecture, "prediction_type": config.prediction_type} if config else {}
    return LoRA(layers, metadata)


def set_lora(model: nn.Cell, lora: LoRA, path: str = "the LoRA") -> None:
    """Load the factors of `lora` into the injected LoRA layers, to continue its training.

    The layers keep their own alpha and scale. Where those of `lora` differ, `up` is rescaled, so that every layer has
    the update of `lora` within rounding.

    Args:
        model: A model with injected LoRA layers.
        lora: A LoRA with the same layers and ranks.
        path: Name of the LoRA in an error.

    Raises:
        UserError: The layers, ranks or shapes differ, or the scale of the layers is 0. `model` is unchanged then.
    """
    cells = lora_cells(model)
    extra, missing = sorted(lora.layers.keys() - cells.keys()), sorted(cells.keys() - lora.layers.keys())
    if extra or missing:
        raise UserError(
            f"{path} does not fit the layers to be trained: {len(extra)} of its layers get no LoRA here, "
            f"{len(missing)} of those to be trained are not in it; for example {(extra or missing)[0]}. Set "
            "lora_targets, lora_ft_unet and lora_ft_text_encoder as it was trained"
        )
    values = []
    for name, layer in lora.layers.items():
        cell = cells[name]
        if not cell.scale:
            raise UserError(f"{path} cannot be trained further at scale 0, where a LoRA has no effect: set lora_scale")
        if layer.rank != cell.rank:
            raise UserError(f"{path}: {name} has rank {layer.rank}, here it is {cell.rank}: set lora_rank {layer.rank}")
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            up = layer.up * np.float32(layer.alpha / (cell.alpha * cell.scale))
        if not np.isfinite(up).all():
            raise UserError(
                f"{path}: the factors of {plain(name)} at alpha {cell.alpha * cell.scale:g} are outside the range of "
                "fp32: set lora_alpha and lora_scale as it was trained"
            )
        for parameter, array in ((cell.lora_down.weight, layer.down), (cell.lora_up.weight, up)):
            if not same_up_to_1x1(array.shape, tuple(parameter.shape)):
                raise UserError(
                    f"{path}: {parameter.name} is {array.shape}, wanted {tuple(parameter.shape)}: it was made for "
                    "another model"
                )
            values.append((parameter, array.reshape(parameter.shape).astype(np.float32)))
    for parameter, array in values:
        parameter.set_data(Tensor(np.ascontiguousarray(array)))


def lora_cells(model: nn.Cell) -> dict[str, nn.Cell]:
    """Return the injected LoRA layers of a model by their full names."""
    return {cell.name: cell for _, cell in model.cells_and_names() if isinstance(cell, LORA_CELLS)}


def assert_trainable(net: nn.Cell, names: Iterable[str], whole: tuple[str, ...] = ()) -> None:
    """Raise RuntimeError unless exactly the LoRA of the layers `names` (factors, and the scale where it is trained) is
    trainable in `net`, and no two parameters share a name.

    whole: beginnings of names whose parameters are trained besides, but for the layers `names` themselves.
    """
    names = set(names)
    parameters = list(net.get_parameters())
    if len({parameter.name for parameter in parameters}) != len(parameters):
        raise RuntimeError("two parameters of the network have the same name")
    wanted = {f"{name}.lora_{factor}.weight" for name in names for factor in ("down", "up")}
    cells = [cell for _, cell in net.cells_and_names() if isinstance(cell, LORA_CELLS)]
    wanted |= {f"{cell.name}.lora_scale" for cell in cells if cell.trainable_scale}
    if whole:
        wanted |= {parameter.name for parameter in parameters if _is_trained_base(parameter.name, whole, names)}
    trainable = {parameter.name for parameter in parameters if parameter.requires_grad}
    if trainable != wanted:
        extra, missing = sorted(trainable - wanted), sorted(wanted - trainable)
        example = (extra or missing)[0]
        raise RuntimeError(
            f"{len(wanted)} parameters should be trainable, {len(trainable)} are: {len(extra)} should not be, "
            f"{len(missing)} are missing; for example {example}"
        )


def _choose_trainable(net: nn.Cell, spec: LoRASpec, names: list[str]) -> None:
    adapted = set(names)
    for parameter in net.get_parameters():
        parameter.requires_grad = spec.trainable_model and _is_trained_base(parameter.name, _prefixes(spec), adapted)
    for _, cell in net.cells_and_names():
        if isinstance(cell, LORA_CELLS):
            cell.lora_down.weight.requires_grad = cell.lora_up.weight.requires_grad = True
            if cell.trainable_scale:
                cell.lora_scale.requires_grad = True


def _prefixes(spec: LoRASpec) -> tuple[str, ...]:
    chosen = {"unet": spec.unet, "text_encoder": spec.text_encoder}
    return tuple(COMPONENTS[component] for component, asked in chosen.items() if asked)


def _is_trained_base(name: str, prefixes: tuple[str, ...], adapted: set[str]) -> bool:
    """As in lora_wrapper: a layer that holds LoRA stays frozen where the rest of the model is trained."""
    return name.startswith(prefixes) and ".lora_" not in name and name.rpartition(".")[0] not in adapted


def _find(
    net: nn.Cell, spec: LoRASpec, rules: dict[str, LayerSpec]
) -> list[tuple[str, nn.Cell, str, nn.Cell, LayerSpec]]:
    """(layer name, parent, key in the parent, layer, its spec) of every layer that is asked for."""
    wanted = {"unet": spec.unet, "text_encoder": spec.text_encoder}
    layers = []
    for _, parent in net.cells_and_names():
        for place, layer in parent._cells.items():
            # Not their subclasses: those are called with other arguments.
            if type(layer) in (Dense, Conv2d):
                # By the parameter's name, which is the full one where `net` is a part of a model too.
                name = layer.weight.name[: -len(".weight")]
                if component_of(name) in wanted:
                    layers.append((name, parent, place, layer))
    found, used, holding, components = [], set(), set(), set()
    for name, parent, place, layer in layers:
        component = component_of(name)
        fitting = [pattern for pattern in rules if fits(pattern, name)]
        if not fitting or not wanted[component]:
            continue
        used.update(fitting)
        holding.add(fitting[-1])
        components.add(component)
        layer_spec = rules[fitting[-1]]
        if layer_spec.rank:
            _check_layer(name, layer, layer_spec, fitting[-1] if spec.modules else None)
            found.append((name, parent, place, layer, layer_spec))
    what = "names of the LoRA configuration" if spec.modules else f"LoRA targets {plain(spec.targets)}"
    for component, asked in wanted.items():
        if asked and component not in components:
            raise UserError(
                f"{what} match no layer of the {LABELS[component]}, which lora_ft_{component} asks for"
                + (_unmatched_hint(next(iter(rules)), layers) if spec.modules else "")
            )
    # a group names layers that not every network has; a name that matches nothing is a mistake
    asked_for = list(rules) if spec.modules else [entry for entry in spec.target_list() if entry not in TARGETS]
    for entry in asked_for:
        if entry not in used:
            _refuse_unmatched(entry, spec, layers)
    for entry in rules if spec.modules else ():
        if entry not in holding:
            raise UserError(
                f'"{plain(entry)}" of the LoRA configuration holds for no layer: later names fit all of its layers '
                "too, and the last one holds; put the more general name first"
            )
    if not found:
        raise UserError("the LoRA configuration leaves out every layer (r 0): there is nothing to train")
    return found


def _check_layer(name: str, layer: nn.Cell, spec: LayerSpec, entry: str | None) -> None:
    """entry: the name in the configuration, None where the settings hold for all layers."""
    setting = "lora_rank" if entry is None else f'"{plain(entry)}": r'
    narrowest = min(layer.weight.shape[0], math.prod(layer.weight.shape[1:]))
    if spec.rank > narrowest:
        raise UserError(f"{setting} {plain(spec.rank, 40)} is more than the width {narrowest} of {name}: lower it")
    if spec.hard and isinstance(layer, Conv2d) and layer.kernel_size != 1:
        size = layer.kernel_size
        raise UserError(
            f'"{plain(entry)}": hard is for 1x1 convolutions, the kernel of {name} is {size}x{size}: set hard 0 there'
        )


def _refuse_unmatched(entry: str, spec: LoRASpec, layers: list) -> None:
    elsewhere = {component_of(name) for name, *_ in layers if fits(entry, name)}
    if elsewhere and spec.modules:
        component = elsewhere.pop()
        raise UserError(
            f'"{plain(entry)}" of the LoRA configuration matches layers of the {LABELS[component]} alone, which is not '
            f"trained: set lora_ft_{component} True, or leave the name out"
        )
    if spec.modules:
        raise UserError(
            f'"{plain(entry)}" of the LoRA configuration matches no dense layer or convolution'
            + _unmatched_hint(entry, layers)
        )
    raise UserError(
        f"LoRA target {plain(entry)!r} matches no dense layer or convolution: give {' or '.join(TARGETS)}, "
        "or the last parts of layers' names, such as to_q"
    )


def _unmatched_hint(entry: str, layers: list) -> str:
    near = near_names(entry, [name for name, *_ in layers])
    return f": did you mean {', '.join(near)}?" if near else ": give the last parts of layers' names, such as to_q"


def _replace(parent: nn.Cell, key: str, cell: nn.Cell) -> None:
    # Into the dictionary itself: assignment would put the parent's prefix before the parameters' names once more.
    parent._cells[key] = cell
    if isinstance(parent, nn.SequentialCell):
        parent.cell_list = list(parent._cells.values())  # what it calls its members by
