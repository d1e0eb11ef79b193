"""What has one form on the CPU and another on Ascend. The choice is made here and nowhere else, when a network is
built, by MindSpore's device target (`ldm.runtime` sets it before that).

On the CPU the forms below go around kernels that are slow or that hold memory; what each bought stands beside it. On
Ascend MindSpore's own operators are taken. Either gives the same numbers up to rounding.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops


def on_ascend() -> bool:
    return ms.get_context("device_target") == "Ascend"


def row_bias():
    """A callable (x (rows, C), bias (C,)) -> x + bias."""
    return ops.BiasAdd() if on_ascend() else RowBias()


def channel_bias():
    """A callable (x (N, C, H, W), bias (C,)) -> x + bias."""
    return ops.BiasAdd(data_format="NCHW") if on_ascend() else ChannelBias()


def broadcast_add():
    """A callable (x, y) -> x + y, where y has ones in its shape."""
    return ops.Add() if on_ascend() else BroadcastAdd()


def gelu():
    """A callable x -> x * (1 + erf(x / sqrt 2)) / 2: the exact form, which Stable Diffusion uses."""
    return GELU() if on_ascend() else ErfGELU()


class GELU(nn.Cell):
    """MindSpore's own exact form (`nn.GELU` would be the one in tanh)."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate="none")


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
        by_picture = self.product(pixels, self.ones_like(pixels[:, :1]).reshape(n, h * w, 1)).reshape(n, c)
        return dout, self.product_tn(self.ones_like(by_picture[:, :1]), by_picture).reshape(bias.shape)


class BroadcastAdd(nn.Cell):
    """Broadcast first: an addition of unequal shapes keeps about four times its output for the life of the process."""

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return x + ops.broadcast_to(y, x.shape)


class ErfGELU(nn.Cell):
    """Written out because MindSpore's own exact kernel keeps about four times its output for the life of the process on
    the CPU, while these operators keep nothing. The derivative too: erf's own goes through Pow, which took 9 % of a
    nano UNet's training step.
    """

    def __init__(self):
        super().__init__()
        self.erf, self.exp = ops.Erf(), ops.Exp()

    def construct(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + self.erf(x * (1.0 / math.sqrt(2.0))))

    def bprop(self, x, out, dout):
        cumulative = 0.5 * (1.0 + self.erf(x * (1.0 / math.sqrt(2.0))))
        density = self.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dout * (cumulative + x * density),)
