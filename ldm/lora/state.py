"""A LoRA in memory, whatever file it came from: for each layer the factors down and up and their alpha.

The update of a layer is dW = scale * (alpha / rank) * up @ down (Hu et al. 2021; alpha as in kohya and PEFT). `scale`
is the strength at generation; a strength that a LoRA was trained with is part of its alpha. Layers go by their
canonical names, which every format is translated to and from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm.errors import UserError, plain
from ldm.lora.layers import LORA_CELLS, LoRAHardConv
from ldm.settings.model import ModelConfig
from ldm.weights.names import COMPONENTS, LABELS, component_of, same_up_to_1x1

FP16_END = 65504.0


@dataclass(frozen=True)
class LoRALayer:
    """The factors of one layer, fp32.

    down: (rank, in) for a dense layer, (rank, in, k, k) for a convolution.
    up: (out, rank), or (out, rank, 1, 1).
    alpha: the update is multiplied by alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    def __post_init__(self):
        update_shape(self.down.shape, self.up.shape)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def update(self, scale: float = 1.0) -> np.ndarray:
        """DW = scale * (alpha / rank) * up @ down, fp32, (out, in) or (out, in, k, k)."""
        product = self.up.reshape(self.up.shape[0], self.rank).astype(np.float32) @ self.down.reshape(
            self.rank, -1
        ).astype(np.float32)
        product *= np.float32(scale * self.alpha / self.rank)
        return product.reshape(self.up.shape[0], *self.down.shape[1:])

    def largest(self, scale: float = 1.0) -> float:
        """A bound for the values that `update(scale)` computes, told without the product of the factors."""
        up, down = (float(np.abs(factor).max(initial=0.0)) for factor in (self.up, self.down))
        return max(abs(scale * self.alpha / self.rank), up * down * max(self.rank, abs(scale * self.alpha)))


def update_shape(down: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the update of two factors, given by their shapes. Raises ValueError where they are no pair."""
    both = f"down {down} and up {up}"
    if len(down) not in (2, 4) or len(up) not in (2, 4):
        raise ValueError(f"{both} must have 2 or 4 axes")
    if down[0] != up[1] or any(size != 1 for size in up[2:]):
        raise ValueError(f"{both} are no pair of factors")
    if not down[0]:
        raise ValueError(f"{both} are of rank 0: they hold nothing")
    return (up[0], *down[1:])


@dataclass
class LoRA:
    """Canonical layer name -> LoRALayer, and what is known about the base it was made for.

    metadata (texts): "architecture" and "prediction_type" as in ModelConfig; absent where a file does not say.
    """

    layers: dict[str, LoRALayer]
    metadata: dict[str, str] = field(default_factory=dict)

    def only(self, component: str) -> LoRA:
        """The part for "unet" or "text_encoder"; it may be empty."""
        prefix = COMPONENTS[component]
        layers = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        return LoRA(layers, dict(self.metadata))

    def has(self, component: str) -> bool:
        return any(name.startswith(COMPONENTS[component]) for name in self.layers)

    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({layer.rank for layer in self.layers.values()})

    def __str__(self) -> str:
        counts = {component: len(self.only(component).layers) for component in COMPONENTS}
        parts = [f"{LABELS[component]}: {count} layers" for component, count in counts.items() if count]
        alphas = sorted({layer.alpha for layer in self.layers.values()})
        return (
            f"{', '.join(parts) or 'no layers'}; rank {_listed(self.ranks())}; alpha {_listed(alphas)}"
            f"{''.join(f'; {key} {value}' for key, value in self.metadata.items())}"
        )


@dataclass(frozen=True)
class Strength:
    """How much of a LoRA is taken, of its UNet and of its text encoder; any finite numbers."""

    unet: float = 1.0
    text_encoder: float = 1.0

    @classmethod
    def both(cls, weight: float | Strength) -> Strength:
        """One number for both networks, or what is two already."""
        return weight if isinstance(weight, Strength) else cls(weight, weight)

    def of(self, layer: str) -> float:
        return self.text_encoder if component_of(layer) == "text_encoder" else self.unet

    def check(self, path: str) -> None:
        """Raise UserError, which calls the LoRA `path`, for a weight that is not finite."""
        for weight in (self.unet, self.text_encoder):
            if not math.isfinite(weight):
                raise UserError(f"the scale of {path} is {weight}: it must be a finite number")

    def __neg__(self) -> Strength:
        return Strength(-self.unet, -self.text_encoder)

    def __str__(self) -> str:
        both = f"{self.unet:g}"
        return both if self.unet == self.text_encoder else f"{both} (text encoder {self.text_encoder:g})"


@dataclass
class LoRAMatch:
    """How the layers of a LoRA fit a network; names by component ("unet", "vae", "text_encoder", "other")."""

    matched: dict[str, list[str]] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    wrong_shape: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.matched) and not self.unmatched and not self.wrong_shape

    def __str__(self) -> str:
        parts = []
        for component, label in LABELS.items():
            counts = (
                (len(self.matched.get(component, ())), "matched"),
                (len(self.unmatched.get(component, ())), "unmatched"),
                (len(self.wrong_shape.get(component, ())), "of a wrong shape"),
            )
            if any(count for count, _ in counts):
                parts.append(f"{label}: " + ", ".join(f"{count} {what}" for count, what in counts if count))
        return "; ".join(parts) or "no layers"


def base_metadata(config: ModelConfig) -> dict[str, str]:
    """What a LoRA notes about the model that it is made for."""
    return {"architecture": config.architecture, "prediction_type": config.prediction_type}


def lora_state(net: nn.Cell, config: ModelConfig | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> LoRA:
    """The LoRA that is injected in `net`, copied out; the scale of its cells, trained or not, becomes part of alpha.

    Factors are (rank, in) and (out, rank) of dense layers, (rank, in, k, k) and (out, rank, 1, 1) of convolutions.

    Args:
        config: of the model, to be noted as what the LoRA was made for.
        arrays: values to take in the place of the parameters of that name, such as their moving averages.

    Raises UserError if nothing is injected.
    """

    def value(parameter: Parameter) -> np.ndarray:
        return np.array(parameter.asnumpy() if arrays is None else arrays[parameter.name], np.float32)

    layers = {}
    for _, cell in net.cells_and_names():
        if isinstance(cell, LORA_CELLS):
            down, up = value(cell.lora_down.weight), value(cell.lora_up.weight)
            if isinstance(cell, LoRAHardConv):
                down, up = down[:, :, None, None], up[:, :, None, None]
            scale = float(value(cell.lora_scale)[0]) if cell.trainable_scale else cell.scale
            layers[cell.name] = LoRALayer(down, up, cell.alpha * scale)
    if not layers:
        raise UserError("the network holds no LoRA layers: inject_lora comes first")
    return LoRA(layers, base_metadata(config) if config else {})


def start_from_lora(net: nn.Cell, state: LoRA, path: str = "the LoRA") -> None:
    """Give the low-rank cells in `net` the factors of `state`, so that training goes on from there.

    The cells keep their own alpha and scale: where those of `state` are others, `up` is scaled, and the update of every
    layer is that of `state` within rounding.

    Args:
        path: what to call the LoRA in an error.

    Raises:
        UserError: the layers, ranks or shapes are not those of the cells, or their scale is 0. `net` is unchanged then.
    """
    cells = {cell.name: cell for _, cell in net.cells_and_names() if isinstance(cell, LORA_CELLS)}
    extra, missing = sorted(state.layers.keys() - cells.keys()), sorted(cells.keys() - state.layers.keys())
    if extra or missing:
        raise UserError(
            f"{path} does not fit what is trained: {len(extra)} of its layers get no LoRA here, {len(missing)} that do "
            f"are not in it; for example {(extra or missing)[0]}. Set lora_targets, lora_ft_unet and "
            "lora_ft_text_encoder as it was trained"
        )
    values = []
    for name, layer in state.layers.items():
        cell = cells[name]
        if not cell.scale:
            raise UserError(f"{path} cannot be gone on from at scale 0, where no LoRA has an effect: set lora_scale")
        if layer.rank != cell.rank:
            raise UserError(f"{path}: {name} has rank {layer.rank}, here it is {cell.rank}: set lora_rank {layer.rank}")
        with np.errstate(over="ignore", invalid="ignore"):  # judged here, by name
            up = layer.up * np.float32(layer.alpha / (cell.alpha * cell.scale))
        if not np.isfinite(up).all():
            raise UserError(
                f"{path}: the factors of {plain(name)} at alpha {cell.alpha * cell.scale:g} are beyond "
                "fp32's range: set lora_alpha and lora_scale as it was trained"
            )
        for parameter, array in ((cell.lora_down.weight, layer.down), (cell.lora_up.weight, up)):
            if not same_up_to_1x1(array.shape, tuple(parameter.shape)):
                raise UserError(
                    f"{path}: {parameter.name} is {array.shape}, wanted {tuple(parameter.shape)}; it was "
                    "made for another model"
                )
            values.append((parameter, array.reshape(parameter.shape).astype(np.float32)))
    for parameter, array in values:
        parameter.set_data(Tensor(np.ascontiguousarray(array)))


def match_lora(net: nn.Cell, state: LoRA) -> LoRAMatch:
    """Compare the layers of `state` with the parameters of `net`, by name and shape; nothing is changed."""
    return match_shapes({p.name: tuple(p.shape) for p in net.get_parameters()}, state)


def match_shapes(shapes: Mapping[str, tuple[int, ...]], state: LoRA) -> LoRAMatch:
    """match_lora for a network given as parameter name -> shape."""
    match = LoRAMatch()
    for name, layer in state.layers.items():
        component = component_of(name)
        wanted = shapes.get(f"{name}.weight")
        found = (layer.up.shape[0], *layer.down.shape[1:])
        if wanted is None:
            match.unmatched.setdefault(component, []).append(name)
        elif same_up_to_1x1(found, wanted):  # SD1 has 1x1 convolutions where SD2 has dense layers
            match.matched.setdefault(component, []).append(name)
        else:
            match.wrong_shape.setdefault(component, []).append((name, found, wanted))
    return match


def check_compatible(state: LoRA, config: ModelConfig, path: str = "the LoRA") -> None:
    """Raise UserError if `state` says that it was made for another architecture or prediction type than the model's.

    A state that says nothing passes; its shapes are judged by merge_lora.
    """
    for key, wanted, setting in (
        ("architecture", config.architecture, "a model of another architecture"),
        ("prediction_type", config.prediction_type, "a model that predicts something else"),
    ):
        made_for = state.metadata.get(key)
        if made_for is not None and made_for != wanted:
            raise UserError(
                f"{path} was made for {setting}: its {key} is {made_for}, the one of {config.path} is {wanted}; "
                "choose the version or configuration that it was trained on"
            )


def merge_lora(net: nn.Cell, state: LoRA, scale: float | Strength = 1.0, path: str = "the LoRA") -> LoRAMatch:
    """Add scale * (alpha / rank) * up @ down to the weights of `net`, each layer of `state` to its own.

    The sum is formed in fp32 and cast to the weight's type. scale 0 leaves every weight as it is, bit for bit; a
    negative scale takes out what was added (within rounding). Any number of LoRAs can be merged one after another.

    Args:
        net: a StableDiffusion or a part of one, with canonical parameter names; injected cells may be in it.
        scale: one number, or Strength with one for each network.
        path: what to call the LoRA in an error.

    Raises:
        UserError: no layer, or not every layer, has a place of its shape in `net`, with the counts; or a weight's type
            does not hold the sum. `net` is unchanged.
    """
    scales = Strength.both(scale)
    scales.check(path)
    match = match_lora(net, state)
    if not match.ok:
        raise UserError(refusal(match, path))
    parameters = {parameter.name: parameter for parameter in net.get_parameters()}

    def merged(name: str) -> np.ndarray:
        base = parameters[f"{name}.weight"].asnumpy()
        with np.errstate(over="ignore", invalid="ignore"):  # judged here, by name
            update = state.layers[name].update(scales.of(name)).reshape(base.shape)
            return (base.astype(np.float32) + update).astype(base.dtype)

    names = [name for name in state.layers if scales.of(name)]
    for name in names:
        # Weights are small, and few updates can be large: only those are computed twice.
        if not state.layers[name].largest(scales.of(name)) < FP16_END / 2:
            weight = parameters[f"{name}.weight"]
            if np.isfinite(weight.asnumpy()).all() and not np.isfinite(merged(name)).all():
                raise UserError(
                    f"{path} at scale {scales.of(name):g}: {plain(name)} with it is beyond the range of "
                    f"{weight.dtype}: lower its weight"
                )
    for name in names:
        parameters[f"{name}.weight"].set_data(Tensor(merged(name)))
    return match


def unmerge_lora(net: nn.Cell, state: LoRA, scale: float | Strength = 1.0) -> LoRAMatch:
    """Take out what merge_lora(net, state, scale) put in, within rounding of the weights' type."""
    return merge_lora(net, state, -Strength.both(scale))


def refusal(match: LoRAMatch, path: str) -> str:
    """Why a LoRA does not fit, in one line: counts by network, what it was made for where that is known, an example."""
    if not (match.matched or match.unmatched or match.wrong_shape):
        return f"{path} holds no layers: there is nothing to merge"
    example = ""
    for wrong in match.wrong_shape.values():
        name, found, wanted = wrong[0]
        widths = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}
        if name.endswith(("attn2.to_k", "attn2.to_v")) and found[1] != wanted[1]:
            made = widths.get(found[1], f"a context of {found[1]}")
            example = f"; it was made for {made}, the model is {widths.get(wanted[1], f'of context {wanted[1]}')}"
            break
        example = example or f"; for example {name} is {found}, wanted {wanted}"
    if not example and match.unmatched:
        example = f"; for example {next(iter(match.unmatched.values()))[0]} is not in the model"
    what = "does not fit the model" if match.matched else "matches nothing in the model"
    return f"{path} {what} ({match}{example})"


def _listed(values: list) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
