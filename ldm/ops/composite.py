"""Operators composed of smaller ones that differ by device, which `ldm.ops` passes in."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from ldm.ops.graph import cast


class NoBias(nn.Cell):
    """(x, None) -> x, in the place of an operator that adds a bias."""

    def construct(self, x: Tensor, bias: None) -> Tensor:
        return x


class Linear(nn.Cell):
    """x W^T + b by a matrix product of all rows."""

    def __init__(self, add_bias: nn.Cell):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.add_bias = add_bias

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        shape, (out_channels, in_channels) = x.shape, weight.shape
        y = self.matmul(cast(x.reshape(-1, in_channels), dtype), cast(weight, dtype))
        return self.add_bias(y, bias).reshape(shape[:-1] + (out_channels,))


class LinearOfWeight(nn.Cell):
    """As Linear, by a product that takes the weight in the weight's own type."""

    def __init__(self, product: nn.Cell, add_bias: nn.Cell):
        super().__init__()
        self.product, self.add_bias = product, add_bias

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        shape, (out_channels, in_channels) = x.shape, weight.shape
        y = self.product(cast(x.reshape(-1, in_channels), dtype), weight)
        return self.add_bias(y, bias).reshape(shape[:-1] + (out_channels,))


class Conv2d(nn.Cell):
    """Convolution and bias."""

    def __init__(self, convolution: nn.Cell, add_bias: nn.Cell):
        super().__init__()
        self.convolution, self.add_bias = convolution, add_bias

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        return self.add_bias(self.convolution(cast(x, dtype), cast(weight, dtype)), bias)


class Conv2dOfWeight(nn.Cell):
    """As Conv2d, by a convolution that takes the weight in the weight's own type."""

    def __init__(self, convolution: nn.Cell, add_bias: nn.Cell):
        super().__init__()
        self.convolution, self.add_bias = convolution, add_bias

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        return self.add_bias(self.convolution(cast(x, dtype), weight), bias)


class GroupNormInFloat32(nn.Cell):
    """Casts x to fp32, normalizes it and casts the result to `dtype`."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm = norm

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        return cast(self.norm(cast(x, ms.float32), weight, bias), dtype)


class LayerNormInFloat32(nn.Cell):
    """Casts the rows of x to fp32, normalizes them and casts the result to `dtype`."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm = norm

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        rows = cast(x.reshape(-1, x.shape[-1]), ms.float32)
        return cast(self.norm(rows, weight, bias).reshape(x.shape), dtype)


class MultiHeadAttention(nn.Cell):
    """Attention over (N, heads, tokens, head_dim) between a split into heads and their concatenation."""

    def __init__(self, num_heads: int, head_dim: int, attention: nn.Cell, swap_middle_axes: nn.Cell):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.attention, self.swap_middle_axes = attention, swap_middle_axes

    def split_heads(self, x: Tensor, n: int) -> Tensor:
        return self.swap_middle_axes(x.reshape(n, -1, self.num_heads, self.head_dim))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        out = self.attention(self.split_heads(q, n), self.split_heads(k, n), self.split_heads(v, n))
        return self.swap_middle_axes(out).reshape(q.shape)


class PixelsToTokens(nn.Cell):
    """(N, C, H, W) -> (N H W, C)."""

    def __init__(self, swap_middle_axes: nn.Cell):
        super().__init__()
        self.swap_middle_axes = swap_middle_axes

    def construct(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.swap_middle_axes(x.reshape(n, c, h * w, 1)).reshape(-1, c)


class TokensToPixels(nn.Cell):
    """(tokens (N H W, C), image (N, any, H, W)) -> (N, C, H, W)."""

    def __init__(self, swap_middle_axes: nn.Cell):
        super().__init__()
        self.swap_middle_axes = swap_middle_axes

    def construct(self, tokens: Tensor, image: Tensor) -> Tensor:
        n, _, h, w = image.shape
        return self.swap_middle_axes(tokens.reshape(n, h * w, -1, 1)).reshape(n, -1, h, w)
