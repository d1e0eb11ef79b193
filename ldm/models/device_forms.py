"""What has one form on the CPU and another on Ascend. The choice is made here, and for attention in
ldm.models.attention, when a network is built, by MindSpore's device target (`ldm.runtime.device` sets it before that).

On the CPU the forms below go around kernels that are slow or that hold memory, most by one of kernels.cc (docs/
performance.md has what each bought). On Ascend, or where kernels.cc cannot be compiled, MindSpore's own operators are
taken. All give the same numbers up to rounding.

The scheduler runs whatever has its inputs, and holds the result till it is wanted. So what is made of a parameter alone
must wait for its layer's turn, and a backward pass that computes something of the forward pass again, for the gradient
it is given (`depend`), unless one operator does both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.operations import _grad_ops, nn_ops

from ldm.models.kernels import kernel, library, like

# Of tensors, `x.astype(t)` is two functions for the compiler to read, at each of its uses.
cast = ops.Cast()


def on_ascend() -> bool:
    return ms.get_context("device_target") == "Ascend"


def kernels_in_use() -> Path | None:
    """The library that kernels.cc was compiled to; None where MindSpore's own operators are taken."""
    return None if on_ascend() else library()


def mindspores_own() -> bool:
    return kernels_in_use() is None


def by_channel(x, *_):
    return x[1:2]


def halved(x):
    return (*x[:-1], x[-1] // 2)


def swapped(x):
    return x[0], x[2], x[1], x[3]


def convolved(x, weight):
    return x[0], weight[0], *x[2:]


def transformed(_, weight):
    return weight[0], 16, weight[1]


def convolved_back(dy, weight):
    return dy[0], weight[1], *dy[2:]


def transformed_back(_, weight):
    return weight[1], 16, weight[0]


def one(cell: type, *settings):
    """The one `cell(*settings)` of all layers that want it: the compiler reads and differentiates a cell once for
    each cell. It must hold no parameters, nor anything else that changes. The training graph of three transformer
    blocks compiles in 4.7 s instead of 6.0, their forward graph in 2.4 instead of 3.4 (one core).
    """
    return _one(cell, settings, on_ascend(), mindspores_own())


@cache
def _one(cell: type, settings: tuple, *_forms: bool):  # what a cell holds may have several forms too
    return cell(*settings)


def row_bias():
    """A callable (x (rows, C), bias (C,)) -> x + bias."""
    return ops.BiasAdd() if on_ascend() else one(RowBias)


def channel_bias():
    """A callable (x (N, C, H, W), bias (C,)) -> x + bias."""
    return ops.BiasAdd(data_format="NCHW") if on_ascend() else one(ChannelBias)


def broadcast_add():
    """A callable (x, y) -> x + y, where y has ones in its shape."""
    return ops.Add() if on_ascend() else one(BroadcastAdd)


def convolution(out_channels: int, kernel_size: int, stride: int, padding):
    """A callable (x (N, C, H, W), weight (O, C, k, k)) -> the convolution; `padding` as of ldm.models.layers.Conv2d."""
    if mindspores_own() or (kernel_size, stride, padding) != (3, 1, 1):
        return ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)
    return one(KernelConv2D, out_channels)


def swap_middle():
    """A callable x (N, A, B, D) -> (N, B, A, D): how heads are split off the tokens and put back, and with D of 1 how
    pixels become tokens and tokens pixels.
    """
    return one(TransposedSwap if mindspores_own() else KernelSwap)


def group_norm(num_groups: int, eps: float):
    """A callable (x (N, C, H, W), weight (C,), bias (C,)) -> x normalised within each group of channels; all fp32."""
    return one(GroupNorm, num_groups, eps) if mindspores_own() else one(KernelNorm, "group_norm", num_groups, eps)


def layer_norm(eps: float):
    """A callable (x (rows, C), weight (C,), bias (C,)) -> x normalised within each row; all fp32."""
    return one(LayerNorm, eps) if mindspores_own() else one(KernelNorm, "layer_norm", eps)


def gelu():
    """A callable x -> x * (1 + erf(x / sqrt 2)) / 2: the exact form, which Stable Diffusion uses."""
    return one(GELU) if mindspores_own() else one(KernelPointwise, "gelu", like(0))


def gelu_gate():
    """A callable x (..., 2 C) -> its first half * gelu(its second half)."""
    return one(GELUGate) if mindspores_own() else one(KernelPointwise, "gelu_gate", halved)


def silu():
    """A callable x -> x * sigmoid(x)."""
    return one(SiLU) if mindspores_own() else one(KernelPointwise, "silu", like(0))


class GELU(nn.Cell):
    """MindSpore's own exact form (`nn.GELU` would be the one in tanh)."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate="none")


class SiLU(nn.Cell):
    """MindSpore's own."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.silu(x)


class TransposedSwap(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return x.transpose(0, 2, 1, 3)


class KernelSwap(nn.Cell):
    """By kernels.cc, and back likewise. MindSpore's Transpose keeps twice its output for the life of the process."""

    def __init__(self):
        super().__init__()
        self.swap = kernel("swap_middle", swapped)

    def construct(self, x: Tensor) -> Tensor:
        return cast(self.swap(cast(x, ms.float32)), x.dtype)

    def bprop(self, x, out, dout):
        return (cast(self.swap(cast(dout, ms.float32)), x.dtype),)


class KernelConv2D(nn.Cell):
    """A 3x3 convolution of stride 1 that keeps height and width, by kernels.cc where that is faster: Winograd's
    algorithm needs 16 products where MindSpore's needs 36, but the weight transformed. Its rounding errors are a few
    times as large, 4e-6 of numbers around 1.

    The gradient for x is such a convolution too. MindSpore's kernel for it keeps k * k values for each of x's, for the
    life of the process: 44 MB a layer of 320 channels at 64 x 64 pixels, in sum 1.4 GB in SD1.5's LoRA training there.
    """

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv = ops.Conv2D(out_channels, 3, pad_mode="pad", pad=1)
        settings = (out_channels, (3, 3), "pad", (1,) * 4, (1,) * 4)
        self.input_gradient = nn_ops.Conv2DBackpropInput(*settings)
        self.weight_gradient = _grad_ops.Conv2DBackpropFilter(*settings)
        self.winograd = kernel("convolution", convolved, transformed)
        self.winograd_dx = kernel("convolution_dx", convolved_back, transformed_back)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if few_pixels(x.shape) or few_channels(weight.shape):
            return self.conv(x, weight)
        weight = ops.depend(weight, x)  # for fp16, which is cast: not at the start of the graph
        return cast(self.winograd(cast(x, ms.float32), cast(weight, ms.float32))[0], x.dtype)

    def bprop(self, x, weight, out, dout):
        dweight = self.weight_gradient(dout, x, weight.shape)  # where the weight is frozen, no graph computes it
        if few_pixels(x.shape):  # few channels are not excepted here: MindSpore's kernel would keep memory for them
            return self.input_gradient(dout, weight, x.shape), dweight
        weight = ops.depend(weight, dout)
        return cast(self.winograd_dx(cast(dout, ms.float32), cast(weight, ms.float32))[0], x.dtype), dweight


@ops.constexpr
def few_pixels(x: tuple) -> bool:
    """Whether transforming a weight takes longer than it saves, as with two images of 8 x 8, not with four."""
    return x[0] * x[2] * x[3] < 256


@ops.constexpr
def few_channels(weight: tuple) -> bool:
    """Whether transforming the pixels takes longer than it saves: of 64 x 64 pixels, from 4 channels to 320, 1.3 ms
    instead of 0.7.
    """
    return min(weight[:2]) < 16


class GroupNorm(nn.Cell):
    """MindSpore's own."""

    def __init__(self, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.Cell):
    """MindSpore's own."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias)[0]


class KernelNorm(nn.Cell):
    """x (N, C, H, W) or (rows, C) normalised by `name` of kernels.cc, group by group or row by row, each of which the
    processor keeps near.
    """

    def __init__(self, name: str, *settings: float):
        super().__init__()
        self.settings = Tensor(np.array(settings, np.float32))
        self.norm, self.dx = kernel(name, like(0)), kernel(f"{name}_dx", like(0))
        self.dweight = kernel(f"{name}_dweight", by_channel, by_channel)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        dweight, dbias = self.dweight(x, dout, self.settings)
        return self.dx(x, weight, dout, self.settings), dweight, dbias


class KernelPointwise(nn.Cell):
    """x -> the function `name` of kernels.cc, whose derivative is `name`_dx."""

    def __init__(self, name: str, out_shape: Callable):
        super().__init__()
        self.function, self.dx = kernel(name, out_shape), kernel(f"{name}_dx", like(0))

    def construct(self, x: Tensor) -> Tensor:
        return cast(self.function(cast(x, ms.float32)), x.dtype)

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout)  # for fp16, which is cast again now
        return (cast(self.dx(cast(x, ms.float32), cast(dout, ms.float32)), x.dtype),)


class RowBias(nn.Cell):
    """x (rows, C) + bias (C,); the bias's gradient is a product with ones.

    MindSpore's own (BiasAddGrad) took 12 % of a nano UNet's whole training step on two CPU cores. Where the bias is
    frozen neither is computed.
    """

    def __init__(self):
        super().__init__()
        self.bias_add, self.ones_like = ops.BiasAdd(), ops.OnesLike()
        self.product_tn = ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        return dout, self.product_tn(self.ones_like(dout[:, :1]), dout).reshape(bias.shape)


class ChannelBias(nn.Cell):
    """x (N, C, H, W) + bias (C,), likewise."""

    def __init__(self):
        super().__init__()
        self.bias_add, self.ones_like = ops.BiasAdd(data_format="NCHW"), ops.OnesLike()
        self.product, self.product_tn = ops.BatchMatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        n, c, h, w = x.shape
        pixels = dout.reshape(n, c, h * w)
        by_image = self.product(pixels, self.ones_like(pixels[:, :1]).reshape(n, h * w, 1)).reshape(n, c)
        return dout, self.product_tn(self.ones_like(by_image[:, :1]), by_image).reshape(bias.shape)


class BroadcastAdd(nn.Cell):
    """Broadcast first: an addition of unequal shapes keeps about four times its output for the life of the process."""

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return x + ops.broadcast_to(y, x.shape)


class GELUGate(nn.Cell):
    def __init__(self):
        super().__init__()
        self.halves, self.gelu = ops.Split(-1, 2), gelu()

    def construct(self, x: Tensor) -> Tensor:
        value, gate = self.halves(x)
        return value * self.gelu(gate)
