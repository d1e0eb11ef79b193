"""Low-rank cells (Hu et al. 2021): a frozen layer plus scale * (alpha / rank) * up(down(x)).

A cell takes the place of a layer of ldm.models and goes on holding that layer's own parameters under their own names;
the two factors are added beside them as `<layer>.lora_down.weight` and `<layer>.lora_up.weight`. The factors are kept
in fp32 whatever the layer computes in, so that small gradients are not lost.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.models.layers import Conv2d, Dense


class Factor(nn.Cell):
    """Holds one factor as `weight`, fp32 and trainable; `name` is its full parameter name."""

    def __init__(self, array: np.ndarray, name: str):
        super().__init__()
        self.weight = Parameter(Tensor(array.astype(np.float32)), name=name)


class LoRADense(Dense):
    """y = x W^T + b + scale * (alpha / rank) * x down^T up^T for x of shape (..., in_channels).

    down is (rank, in_channels), up is (out_channels, rank) and starts at zero, so y is the base's until it is trained.

    Args:
        base: the layer to take the place of; its parameters are shared, not copied.
        down: initial values of down.
        name: the layer's full name, for the parameter names of the factors.
        alpha: numerator of the factors' own scale, alpha / rank.
        scale: a further factor.
        fp16: let the factors compute in the layer's `dtype`; otherwise always in fp32.
    """

    def __init__(self, base: Dense, down: np.ndarray, name: str, alpha: float, scale: float = 1.0, fp16: bool = True):
        nn.Cell.__init__(self)  # not Dense's: it would draw a weight of its own
        _share(self, base)
        _add_factors(self, down, np.zeros((self.out_channels, down.shape[0])), name, alpha, scale, fp16)

    def construct(self, x: Tensor) -> Tensor:
        y = super().construct(x)
        dtype = self.dtype if self.fp16 else ms.float32
        update = self.matmul(x.reshape(-1, self.in_channels).astype(dtype), self.lora_down.weight.astype(dtype))
        update = self.matmul(update, self.lora_up.weight.astype(dtype)) * self.multiplier
        return y + update.astype(y.dtype).reshape(y.shape)


class LoRAConv(Conv2d):
    """y = conv(x) + scale * (alpha / rank) * up(down(x)) for x of shape (N, in_channels, H, W).

    down is a convolution like the base's, (rank, in_channels, k, k) with its stride and padding; up is a 1x1
    convolution (out_channels, rank, 1, 1) and starts at zero. Arguments as for LoRADense.
    """

    def __init__(self, base: Conv2d, down: np.ndarray, name: str, alpha: float, scale: float = 1.0, fp16: bool = True):
        nn.Cell.__init__(self)
        _share(self, base)
        rank = down.shape[0]
        _add_factors(self, down, np.zeros((self.out_channels, rank, 1, 1)), name, alpha, scale, fp16)
        self.conv_down = ops.Conv2D(rank, self.kernel_size, pad_mode="pad", pad=self.padding, stride=self.stride)
        self.conv_up = ops.Conv2D(self.out_channels, 1)

    def construct(self, x: Tensor) -> Tensor:
        y = super().construct(x)
        dtype = self.dtype if self.fp16 else ms.float32
        update = self.conv_down(x.astype(dtype), self.lora_down.weight.astype(dtype))
        update = self.conv_up(update, self.lora_up.weight.astype(dtype)) * self.multiplier
        return y + update.astype(y.dtype)


LORA_CELLS = (LoRADense, LoRAConv)


def _share(cell: nn.Cell, base: nn.Cell) -> None:
    """Give `cell` all that `base` has beyond any cell: settings, operators, parameters, inner cells."""
    own = vars(nn.Cell())
    for attributes in (vars(base), base._params, base._cells):
        for name, value in attributes.items():
            if name not in own and not name.startswith("_"):
                setattr(cell, name, value)


def _add_factors(cell: nn.Cell, down: np.ndarray, up: np.ndarray, name: str, alpha: float, scale: float, fp16: bool):
    cell.name, cell.rank, cell.alpha, cell.scale, cell.fp16 = name, down.shape[0], float(alpha), float(scale), fp16
    cell.multiplier = cell.scale * cell.alpha / cell.rank
    # Not through Cell.__setattr__, which would put the attribute's name before parameter names that are complete.
    cell.insert_child_to_cell("lora_down", Factor(down, f"{name}.lora_down.weight"))
    cell.insert_child_to_cell("lora_up", Factor(up, f"{name}.lora_up.weight"))
