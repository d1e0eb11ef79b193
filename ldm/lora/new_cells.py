"""A new LoRA layer for a layer of the model, with the initial values of its factors, which leave its output as it is.

Each generator is seeded by the run's seed and the layer's name, so a layer's values do not depend on which other layers
get a LoRA. The values are those of Hu et al. and of LyCORIS: uniform from +-1 / sqrt(fan-in), and normal for LoHa.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import Parameter

from ldm.lora.cell import LoRACell
from ldm.lora.dropout import StepDropout, UnitDropout
from ldm.lora.layers import HardLoRAConv2d, LoRAConv2d, LoRALinear, PairCell
from ldm.lora.product_layers import LoHaCell, LoKrCell
from ldm.lora.spec import LayerSpec, LoRASpec
from ldm.models.layers import Conv2d, Linear
from ldm.settings.model_size import factorization

Factors = dict[str, np.ndarray]


def new_lora_cell(
    base: Linear | Conv2d, name: str, layer: LayerSpec, spec: LoRASpec, key: Parameter | None
) -> LoRACell:
    """Build the LoRA layer for `base`. `key` is the model's dropout key."""
    random = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    alpha = layer.rank if layer.alpha is None else layer.alpha
    if layer.uses_rs_lora:
        alpha *= math.sqrt(layer.rank)
    settings: dict[str, Any] = dict(
        alpha=alpha,
        scale=layer.scale,
        fp16=spec.fp16,
        trainable_scale=layer.trainable_scale,
        dropout=StepDropout(layer.dropout, name, key) if layer.dropout else None,
        rank_dropout=UnitDropout(layer.rank_dropout, f"{name} ranks", key) if layer.rank_dropout else None,
        module_dropout=UnitDropout(layer.module_dropout, f"{name} module", key) if layer.module_dropout else None,
        dora=layer.uses_dora,
    )
    if layer.algo == "loha":
        return LoHaCell(base, _loha_factors(base, layer, random), name, rank=layer.rank, **settings)
    if layer.algo == "lokr":
        return LoKrCell(base, _lokr_factors(base, layer, random), name, rank=layer.rank, **settings)
    shape = tuple(base.weight.shape[1:])
    if is_tucker(base, layer):
        draw = _uniform(random)
        down, mid = draw(layer.rank, shape[0], 1, 1), draw(layer.rank, layer.rank, *shape[1:])
        return LoRAConv2d(base, down, name, mid=mid, **settings)
    down = _uniform(random)(layer.rank, *shape)
    if isinstance(base, Linear):
        cell_type: type[PairCell] = LoRALinear
    elif layer.hard:
        cell_type, down = HardLoRAConv2d, down.reshape(layer.rank, -1)
    else:
        cell_type = LoRAConv2d
    return cell_type(base, down, name, **settings)


def is_tucker(base: Linear | Conv2d, layer: LayerSpec) -> bool:
    """Whether the LoRA of a layer has Tucker's form, with a factor for the kernel's pixels."""
    return layer.use_tucker and isinstance(base, Conv2d) and base.kernel_size != 1


def _uniform(random: np.random.Generator) -> Callable[..., np.ndarray]:
    """Return a function that draws a factor of a shape, as PyTorch's linear layers and convolutions are drawn."""

    def draw(*shape: int) -> np.ndarray:
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        return random.uniform(-bound, bound, shape)

    return draw


def _loha_factors(base: Linear | Conv2d, layer: LayerSpec, random: np.random.Generator) -> Factors:
    out, inputs, *kernel = base.weight.shape
    rank, factors = layer.rank, {}
    tucker = is_tucker(base, layer)
    for half, std in (("1", 0.1), ("2", 0.0)):  # w2_a starts at zero
        if tucker:
            factors[f"hada_t{half}"] = random.normal(0, 0.1, (rank, rank, *kernel))
        factors[f"hada_w{half}_a"] = random.normal(0, std, (rank, out) if tucker else (out, rank))
        columns = inputs if tucker else inputs * math.prod(kernel)
        factors[f"hada_w{half}_b"] = random.normal(0, 1, (rank, columns))
    return factors


def _lokr_factors(base: Linear | Conv2d, layer: LayerSpec, random: np.random.Generator) -> Factors:
    out, inputs, *kernel = base.weight.shape
    (out1, out2), (in1, in2) = factorization(out, layer.factor), factorization(inputs, layer.factor)
    rank, draw = layer.rank, _uniform(random)
    factors = {"lokr_w1": draw(out1, in1)}
    if rank >= max(out2, in2) / 2:
        factors["lokr_w2"] = np.zeros((out2, in2, *kernel))
    elif is_tucker(base, layer):
        factors["lokr_t2"] = draw(rank, rank, *kernel)
        factors["lokr_w2_a"], factors["lokr_w2_b"] = draw(rank, out2), np.zeros((rank, in2))
    else:
        factors["lokr_w2_a"], factors["lokr_w2_b"] = draw(out2, rank), np.zeros((rank, in2 * math.prod(kernel)))
    return factors
