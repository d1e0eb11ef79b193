"""The layers that every network here is made of: parameters in fp32, arithmetic in the layer's `dtype`.

Each layer holds `weight` and `bias` under the names of the published checkpoints and casts its input and parameters to
`dtype` (a cast to the type they have costs nothing in a graph). Normalisations always compute in fp32 and return
`dtype`. `set_compute_dtype` chooses for a whole network, before it is compiled.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from ldm.models.device_forms import cast, channel_bias, convolution, group_norm, layer_norm, one, row_bias
from ldm.runtime.device import give_back_memory

# Of tensors, `x + y` is a function for the compiler to read, at each of its uses.
add = ops.Add()

_draws = contextvars.ContextVar("whether new parameters are drawn", default=True)


@contextmanager
def not_drawn() -> Iterator[None]:
    """Make large parameters zeros, for networks that are loaded next: a billion random numbers take ten seconds, and
    zeros take no memory, since the system gives a page of them only where it is written.
    """
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


def first_values(shape: tuple[int, ...], draw: Callable[[], np.ndarray]) -> Tensor:
    """What `draw` gives, float32; zeros within not_drawn."""
    return Tensor(draw().astype(np.float32)) if _draws.get() else initializer("zeros", shape, ms.float32)


def _uniform(rng_shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Uniform in +-1/sqrt(fan_in), the default of the published networks' layers; drawn from numpy's global state,
    which `ldm.runtime.device` seeds.
    """
    bound = 1.0 / math.sqrt(fan_in)
    return first_values(rng_shape, lambda: np.random.uniform(-bound, bound, rng_shape))


class RepeatedCell(nn.Cell):
    """A cell that is called again and again as one graph. At each call MindSpore writes the graph's name into every
    cell below, one by one in Python: 4 ms for a nano UNet of 670 cells, where its graph takes 200. Here it is written
    only where it is another. (Cells that several graphs use have the name of the last one compiled.).

    What compiling it has left free goes back to the system before the graph takes its own memory: 0.13 GB where
    SD1.5's LoRA training is compiled.
    """

    def compile(self, *args, **kwargs) -> None:
        count = len(self.compile_cache)
        super().compile(*args, **kwargs)
        if len(self.compile_cache) > count:
            give_back_memory()

    @property
    def compile_phase(self) -> str:
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)


class Bias(nn.Cell):
    """(x, bias) -> x + bias by a form of ldm.models.device_forms, in x's type."""

    def __init__(self, form: Callable):
        super().__init__()
        self.form = form()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.form(x, cast(bias, x.dtype))


class NoBias(nn.Cell):
    """(x, None) -> x."""

    def construct(self, x: Tensor, bias: None) -> Tensor:
        return x


class Linear(nn.Cell):
    """What all Dense layers compute, in one cell (see `one`): (x (..., in), weight (out, in), bias (out,) or None,
    dtype) -> x W^T + b.
    """

    def __init__(self, has_bias: bool):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.add_bias = one(Bias, row_bias) if has_bias else one(NoBias)

    def construct(self, x: Tensor, weight: Tensor, bias, dtype) -> Tensor:
        shape, (out_channels, in_channels) = x.shape, weight.shape
        y = self.matmul(cast(x.reshape(-1, in_channels), dtype), cast(weight, dtype))
        return self.add_bias(y, bias).reshape(shape[:-1] + (out_channels,))


class Dense(nn.Cell):
    """y = x W^T + b for x of shape (..., in_channels); weight (out_channels, in_channels)."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dtype = ms.float32
        self.weight = Parameter(_uniform((out_channels, in_channels), in_channels), name="weight")
        self.bias = Parameter(_uniform((out_channels,), in_channels), name="bias") if has_bias else None
        self.linear = one(Linear, has_bias)

    def construct(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias, self.dtype)


class Convolution(nn.Cell):
    """What all Conv2d layers of these settings compute, likewise: (x (N, in, H, W), weight (out, in, k, k), bias (out,)
    or None, dtype) -> (N, out, H', W').
    """

    def __init__(self, out_channels: int, kernel_size: int, stride: int, padding, has_bias: bool):
        super().__init__()
        self.conv = convolution(out_channels, kernel_size, stride, padding)
        self.add_bias = one(Bias, channel_bias) if has_bias else one(NoBias)

    def construct(self, x: Tensor, weight: Tensor, bias, dtype) -> Tensor:
        return self.add_bias(self.conv(cast(x, dtype), cast(weight, dtype)), bias)


class Conv2d(nn.Cell):
    """Convolution over (N, C, H, W); weight (out_channels, in_channels, k, k). `padding` is one number for all sides,
    or (top, bottom, left, right).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding=0, has_bias: bool = True
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dtype = ms.float32
        fan_in = in_channels * kernel_size * kernel_size
        self.weight = Parameter(_uniform((out_channels, in_channels, kernel_size, kernel_size), fan_in), name="weight")
        self.bias = Parameter(_uniform((out_channels,), fan_in), name="bias") if has_bias else None
        self.convolution = one(Convolution, out_channels, kernel_size, stride, padding, has_bias)

    def construct(self, x: Tensor) -> Tensor:
        return self.convolution(x, self.weight, self.bias, self.dtype)


class GroupNormalisation(nn.Cell):
    """What all GroupNorm layers of these settings compute, likewise: x (N, C, H, W), weight (C,), bias (C,), dtype."""

    def __init__(self, num_groups: int, eps: float):
        super().__init__()
        self.norm = group_norm(num_groups, eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype) -> Tensor:
        return cast(self.norm(cast(x, ms.float32), weight, bias), dtype)


class GroupNorm(nn.Cell):
    """Group normalisation of (N, C, H, W) in fp32."""

    def __init__(self, num_channels: int, num_groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.dtype = ms.float32
        self.weight = Parameter(Tensor(np.ones(num_channels, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(num_channels, np.float32)), name="bias")
        self.normalisation = one(GroupNormalisation, num_groups, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalisation(x, self.weight, self.bias, self.dtype)


class LayerNormalisation(nn.Cell):
    """What all LayerNorm layers of this setting compute, likewise: x (..., C), weight (C,), bias (C,), dtype."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = layer_norm(eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype) -> Tensor:
        rows = cast(x.reshape(-1, x.shape[-1]), ms.float32)
        return cast(self.norm(rows, weight, bias).reshape(x.shape), dtype)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis in fp32."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.dtype = ms.float32
        self.weight = Parameter(Tensor(np.ones(num_channels, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(num_channels, np.float32)), name="bias")
        self.normalisation = one(LayerNormalisation, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalisation(x, self.weight, self.bias, self.dtype)


class Identity(nn.Cell):
    """x; stands where the published networks have a dropout of rate 0, so that the names after it keep their index."""

    def construct(self, x: Tensor) -> Tensor:
        return x


class QuickGELU(nn.Cell):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def __init__(self):
        super().__init__()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(1.702 * x)


class Upsample2x(nn.Cell):
    """Nearest-neighbour doubling of height and width of (N, C, H, W).

    By reshape and broadcast: 0.2 ms forward and backward where `ops.interpolate` took 5.7 ms on the CPU (16x64x16x16).
    """

    def construct(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return ops.broadcast_to(x.reshape(n, c, h, 1, w, 1), (n, c, h, 2, w, 2)).reshape(n, c, 2 * h, 2 * w)


def set_compute_dtype(net: nn.Cell, dtype) -> None:
    """Let every layer of `net` compute in `dtype` (ms.float16 or ms.float32). Call it before the first run: a graph
    that is compiled already keeps the type it was compiled with.
    """
    for _, cell in net.cells_and_names():
        if hasattr(cell, "dtype"):
            cell.dtype = dtype
