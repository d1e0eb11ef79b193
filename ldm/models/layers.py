"""The layers with parameters that every network is made of.

Each layer holds `weight` and `bias` in fp32 under the names of the published checkpoints and computes in its `dtype`.
Normalizations compute in fp32 and return `dtype`. `set_compute_dtype` sets `dtype` for a whole network, and
`hold_frozen_weights` the type in which weights are held.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.models.initial_values import uniform
from ldm.ops import conv2d, group_norm, layer_norm, linear, on_ascend


class Linear(nn.Cell):
    """y = x W^T + b for x of shape (..., in_channels). `weight` is (out_channels, in_channels)."""

    keeps_fp32 = False  # whether `hold_frozen_weights` must leave it, because another layer computes with the weight

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dtype = ms.float32
        self.weight = Parameter(uniform((out_channels, in_channels), in_channels), name="weight")
        self.bias = Parameter(uniform((out_channels,), in_channels), name="bias") if has_bias else None
        self.linear = linear(has_bias)

    def multiply_in_bf16(self) -> None:
        """Take a weight in bf16. See `hold_frozen_weights`."""
        self.linear = linear(self.bias is not None, bf16_weight=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias, self.dtype)


class Conv2d(nn.Cell):
    """Convolution over (N, in_channels, H, W). `weight` is (out_channels, in_channels, k, k).

    `padding` is one number of pixels for all sides, or (top, bottom, left, right).
    """

    keeps_fp32 = False  # as in Linear

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
        has_bias: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dtype = ms.float32
        fan_in = in_channels * kernel_size * kernel_size
        self.weight = Parameter(uniform((out_channels, in_channels, kernel_size, kernel_size), fan_in), name="weight")
        self.bias = Parameter(uniform((out_channels,), fan_in), name="bias") if has_bias else None
        self.conv2d = conv2d(out_channels, kernel_size, stride, padding, has_bias)

    def multiply_in_bf16(self) -> None:
        """Take a weight in bf16. See `hold_frozen_weights`."""
        has_bias = self.bias is not None
        self.conv2d = conv2d(self.out_channels, self.kernel_size, self.stride, self.padding, has_bias, bf16_weight=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv2d(x, self.weight, self.bias, self.dtype)


class GroupNorm(nn.Cell):
    """Group normalization of (N, C, H, W) in fp32."""

    def __init__(self, num_channels: int, num_groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.dtype = ms.float32
        self.weight = Parameter(Tensor(np.ones(num_channels, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(num_channels, np.float32)), name="bias")
        self.norm = group_norm(num_groups, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias, self.dtype)


class LayerNorm(nn.Cell):
    """Layer normalization over the last axis in fp32."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.dtype = ms.float32
        self.weight = Parameter(Tensor(np.ones(num_channels, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(num_channels, np.float32)), name="bias")
        self.norm = layer_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias, self.dtype)


class QuickGELU(nn.Cell):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(1.702 * x)


def hold_frozen_weights(net: nn.Cell, dtype: ms.Type) -> int:
    """Hold the frozen parameters of every layer that computes in `dtype` in this type, and return their number.

    A layer casts its parameters to its type at each use, so its results are bit for bit the same, without a kernel for
    each cast and with half the memory in fp16. Normalizations keep fp32, except on Ascend, whose kernels take inputs of
    one type. What is trained stays as it is. The values are rounded: a network that is saved or merged into afterwards
    has the rounded ones.

    bf16 is for the weights of the linear layers and convolutions alone, on the CPU. Layers go on to take and return
    fp32, with operators that multiply in bf16 and add up in fp32. Their biases keep fp32. So the results are others.

    Call it after `set_compute_dtype` and after the trained parameters are chosen, and before the first run. If it is
    called before the weights are loaded, they are never in memory in fp32.
    """
    count = 0
    for _, cell in net.cells_and_names():
        layers = (Linear, Conv2d, GroupNorm, LayerNorm) if on_ascend() else (Linear, Conv2d)
        if not isinstance(cell, layers) or cell.dtype != compute_dtype(dtype) or getattr(cell, "keeps_fp32", False):
            continue
        for parameter in (cell.weight,) if dtype == ms.bfloat16 else (cell.weight, cell.bias):
            if parameter is not None and not parameter.requires_grad and parameter.dtype != dtype:
                parameter.set_dtype(dtype)
                count += 1
        if isinstance(cell, (Linear, Conv2d)) and cell.weight.dtype == ms.bfloat16:
            cell.multiply_in_bf16()
    return count


def set_compute_dtype(net: nn.Cell, dtype: ms.Type) -> None:
    """Make every layer of `net` compute in `dtype`, ms.float16 or ms.float32. ms.bfloat16 stands for fp32.

    Call it before the first run. A graph that is compiled already keeps the type that it was compiled with.
    """
    for _, cell in net.cells_and_names():
        if hasattr(cell, "dtype"):
            cell.dtype = compute_dtype(dtype)


def compute_dtype(dtype: ms.Type) -> ms.Type:
    """Return the type that layers take and return where their weights are held in `dtype`: fp32 for bf16."""
    return ms.float32 if dtype == ms.bfloat16 else dtype
