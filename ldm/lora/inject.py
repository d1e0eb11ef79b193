"""Injecting LoRA layers into a model, and the LoRA that they hold: get, set and remove it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.errors import UserError, plain
from ldm.lora.cell import LoRACell
from ldm.lora.dropout import make_dropout_key
from ldm.lora.lora import LoRA
from ldm.lora.new_cells import new_lora_cell
from ldm.lora.spec import LoRASpec
from ldm.lora.target_layers import find_target_layers
from ldm.lora.updates import DoRA, LayerUpdate, direction_of
from ldm.settings.model import ModelConfig
from ldm.weights.names import COMPONENTS, same_up_to_1x1


def inject_lora(model: nn.Cell, spec: LoRASpec) -> list[str]:
    """Replace the layers that `spec` names by LoRA layers, and freeze everything else.

    A LoRA layer computes y = W x + b + scale * (alpha / rank) * up(down(x)) (Hu et al. 2021). down is drawn uniformly
    from +-1 / sqrt(fan-in) as in the paper's code, PEFT and kohya's scripts. The generator is seeded by the seed and
    the layer's name, so a layer's values do not depend on which other layers are injected. up is zero, so the model's
    outputs are unchanged.

    Call it before the model is compiled. A graph that is compiled already keeps its layers.

        names = inject_lora(model, LoRASpec(rank=8, targets=("to_q", "to_v")))
        names = inject_lora(model, LoRASpec().with_config({"to_q": {"r": 8}, "ff.net.*": {"r": 4, "alpha": 8}}))

    Args:
        model: A StableDiffusion, or a part of one.
        spec: Which layers get a LoRA, and of what kind.

    Returns:
        The full names of the injected layers, such as "model.diffusion_model.input_blocks.1.1....attn1.to_q".

    Raises:
        UserError: A setting is out of range, a target matches nothing, or the model has LoRA layers already. `model` is
            unchanged then.
    """
    if lora_cells(model):
        raise UserError("the model has LoRA layers already: call remove_lora first, or build a new model")
    targets = find_target_layers(model, spec)
    drops = any(layer.dropout or layer.rank_dropout or layer.module_dropout for _, layer in targets)
    key = make_dropout_key() if drops else None
    for layer, layer_spec in targets:
        _replace(layer.parent, layer.key, new_lora_cell(layer.cell, layer.name, layer_spec, spec, key))
    names = [layer.name for layer, _ in targets]
    trained_base = _trained_base(model, spec, names)
    for parameter in model.get_parameters():
        parameter.requires_grad = parameter.name in trained_base
    for cell in lora_cells(model).values():
        for parameter in cell.lora_parameters():
            parameter.requires_grad = True
    assert_trainable(model, names, trained_base)
    return names


def remove_lora(model: nn.Cell) -> list[str]:
    """Put back the layers that inject_lora replaced, with their current weights.

    The LoRA is lost: copy it out first (get_lora), or add it to the weights (merge_lora). Everything stays frozen. Call
    it before the model is compiled.

    Returns:
        The full names of the layers.

    Raises:
        UserError: The model has no LoRA layers.
    """
    names = []
    for _, parent in model.cells_and_names():
        for key, cell in list(parent._cells.items()):
            if isinstance(cell, LoRACell):
                names.append(cell.name)
                _replace(parent, key, cell.base)
    if not names:
        raise UserError("the model has no LoRA layers: there is nothing to remove")
    return names


@contextmanager
def without_lora(model: nn.Cell) -> Iterator[None]:
    """Put back the layers that inject_lora replaced while the block runs.

    Graphs that are compiled in the block have no LoRA, those that were compiled before keep theirs. The model may have
    no LoRA layers.
    """
    replaced = [
        (parent, key, cell)
        for _, parent in model.cells_and_names()
        for key, cell in parent._cells.items()
        if isinstance(cell, LoRACell)
    ]
    for parent, key, cell in replaced:
        _replace(parent, key, cell.base)
    try:
        yield
    finally:
        for parent, key, cell in replaced:
            _replace(parent, key, cell)


def get_lora(model: nn.Cell, config: ModelConfig | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> LoRA:
    """Copy the injected LoRA out of a model. The scale of its layers, trained or not, becomes part of alpha.

    Args:
        model: A model with injected LoRA layers.
        config: Configuration of the model, for the LoRA's metadata.
        arrays: Parameter name -> values to use in place of the parameters, such as their moving averages.

    Returns:
        The LoRA. Pairs of factors are (rank, in) and (out, rank) for linear layers, (rank, in, k, k) and
        (out, rank, 1, 1) for convolutions.

    Raises:
        UserError: The model has no LoRA layers.
    """

    def value(parameter: Parameter) -> np.ndarray:
        return np.array(parameter.asnumpy() if arrays is None else arrays[parameter.name], np.float32)

    layers = {}
    for name, cell in lora_cells(model).items():
        scale = float(value(cell.lora_scale)[0]) if cell.trainable_scale else cell.scale
        layers[name] = cell.layer_update({part: value(p) for part, p in cell.parts().items()}, scale)
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
    if lora.biases:
        raise UserError(f"{path} changes biases, such as {min(lora.biases)}, which a LoRA is not trained for here")
    values: list[tuple[Parameter, np.ndarray]] = []
    for name, layer in lora.layers.items():
        values += _new_values(name, cells[name], layer, path)
    for parameter, array in values:
        parameter.set_data(Tensor(np.ascontiguousarray(array)))


def _new_values(name: str, cell: LoRACell, layer: LayerUpdate, path: str) -> list[tuple[Parameter, np.ndarray]]:
    """Return the values of a cell's parameters with which its update is that of `layer`. Raises UserError."""
    direction, here = direction_of(layer), plain(name)
    if not isinstance(direction, cell.kind) or isinstance(layer, DoRA) != cell.dora:
        kind = f"DoRA of {cell.kind.label}" if cell.dora else cell.kind.label
        raise UserError(
            f"{path}: {here} is a {layer.label}, and a {kind} is trained here: set algo and dora_wd as it was trained"
        )
    if isinstance(layer, DoRA) and layer.on_input:
        raise UserError(f"{path}: {here} has a magnitude for each input, and one for each output is trained here")
    if not cell.scale:
        raise UserError(f"{path} cannot be trained further at scale 0, where a LoRA has no effect: set lora_scale")
    arrays = layer.arrays()
    alpha = float(arrays.pop("alpha"))
    if arrays.keys() != cell.parts().keys():
        raise UserError(
            f"{path}: {here} has the factors {', '.join(arrays)}, here they are {', '.join(cell.parts())}: set "
            "use_tucker, factor and lora_rank as it was trained (a pair in Tucker's form is saved without it)"
        )
    if direction.rank not in (None, cell.rank):
        raise UserError(f"{path}: {here} has rank {layer.rank}, here it is {cell.rank}: set lora_rank {layer.rank}")
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        ratio = 1 / cell.scale if direction.rank is None else alpha / (cell.alpha * cell.scale)
        arrays[cell.rescaled] = arrays[cell.rescaled] * np.float32(ratio)
    if not np.isfinite(arrays[cell.rescaled]).all():
        raise UserError(
            f"{path}: the factors of {here} at alpha {cell.alpha * cell.scale:g} are outside the range of fp32: set "
            "lora_alpha and lora_scale as it was trained"
        )
    values = []
    for part, parameter in cell.parts().items():
        array = arrays[part].reshape(-1) if part == "dora_scale" else arrays[part]
        if not same_up_to_1x1(array.shape, tuple(parameter.shape)):
            raise UserError(
                f"{path}: {parameter.name} is {array.shape}, wanted {tuple(parameter.shape)}: it was made for another "
                "model" + (", or with another factor" if part.startswith("lokr_") else "")
            )
        values.append((parameter, array.reshape(parameter.shape).astype(np.float32)))
    return values


def lora_cells(model: nn.Cell) -> dict[str, LoRACell]:
    """Return the injected LoRA layers of a model by their full names."""
    return {cell.name: cell for _, cell in model.cells_and_names() if isinstance(cell, LoRACell)}


def factors_cast_to(model: nn.Cell, dtype: ms.Type) -> list[Parameter]:
    """Return the factors of a model that its layers cast to `dtype` wherever they use them."""
    return [factor for cell in lora_cells(model).values() for factor in cell.factors_cast_to(dtype)]


def assert_trainable(model: nn.Cell, names: Iterable[str], trained_base: Iterable[str] = ()) -> None:
    """Check that the LoRA of some layers is trainable and nothing else is.

    Args:
        model: A model with injected LoRA layers.
        names: Full names of the layers whose factors, and scale if it is trainable, are trained.
        trained_base: Names of the parameters of the base model that are trained as well.

    Raises:
        RuntimeError: The trainable parameters are others, or two parameters have the same name.
    """
    parameters = list(model.get_parameters())
    if len({parameter.name for parameter in parameters}) != len(parameters):
        raise RuntimeError("two parameters of the model have the same name")
    cells = lora_cells(model)
    expected = set(trained_base)
    for name in names:
        expected |= {p.name for p in cells[name].lora_parameters()} if name in cells else {f"{name}.lora_down.weight"}
    trainable = {parameter.name for parameter in parameters if parameter.requires_grad}
    if trainable != expected:
        extra, missing = sorted(trainable - expected), sorted(expected - trainable)
        raise RuntimeError(
            f"{len(expected)} parameters should be trainable, {len(trainable)} are: {len(extra)} should not be, "
            f"{len(missing)} are missing, for example {(extra or missing)[0]}"
        )


def _trained_base(model: nn.Cell, spec: LoRASpec, names: Iterable[str]) -> set[str]:
    """Return the parameters of the base model that are trained.

    As in lora_wrapper, a layer with a LoRA stays frozen where the rest of the model is trained.
    """
    if not spec.trainable_model:
        return set()
    networks = {"unet": spec.unet, "text_encoder": spec.text_encoder}
    prefixes = tuple(COMPONENTS[component] for component, trained in networks.items() if trained)
    with_lora = set(names)
    return {
        parameter.name
        for parameter in model.get_parameters()
        if parameter.name.startswith(prefixes)
        and ".lora_" not in parameter.name
        and parameter.name.rpartition(".")[0] not in with_lora
    }


def _replace(parent: nn.Cell, key: str, cell: nn.Cell) -> None:
    # Assigning the attribute would put the parent's prefix before the parameters' names once more.
    parent._cells[key] = cell
    if isinstance(parent, nn.SequentialCell):
        parent.cell_list = list(parent._cells.values())  # the list by which it calls its members
