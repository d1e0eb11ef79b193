"""Forms for Ascend of operators whose MindSpore's own forms need more kernels there, or slower ones.

A kernel of CANN's is called through aclnn, or through the older aclop, whose launch takes the host about four times as
long (40 us and 10 us on paper). Every form here is made of aclnn kernels. The counts were taken by MindSpore's Ascend
back end without a device: nothing here was ever run on one.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.mint import chunk
from mindspore.mint.nn.functional import interpolate, layer_norm, pad
from mindspore.ops.auto_generate import Conv2DExt, ConvolutionGrad, Dense, GeluExt, IndexSelect, MeanExt

from ldm.ops.graph import cast

# The sizes of heads that CANN's fused attention is known to be right and fast for: those that mindone's diffusers pads
# to, without 120, which is not a multiple of 16 as MindSpore 2.8 asks for. Heads of 160 gave noise on a 910B with
# MindSpore 2.2 (mindone's issue 310).
FLASH_HEAD_SIZES = (64, 80, 96, 128, 256)

# How many attention probabilities, over all images and heads, the plain attention holds at a time: 1 GB in fp32. With
# its derivative a block takes 4.6 GB (memory planned for SD1.x's widest layer at 64 x 64 and batch 4), where the
# smallest device has 32 GB. That layer has 2 such blocks, and would have 32 of the CPU's 64 MB, one after the other.
BLOCK_ELEMENTS = 2**28


class Fork(nn.Cell):
    """x -> (x, x), with a gradient that is added by `Add`. MindSpore's own derivative adds by AddN, an aclop kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.add = ops.Add()

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def bprop(self, x: Tensor, out: tuple[Tensor, Tensor], dout: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (self.add(dout[0], dout[1]),)


class Linear(nn.Cell):
    """x W^T + b in one kernel. The gradients of a frozen weight and bias are removed from the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = Dense()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        shape, (out_channels, in_channels) = x.shape, weight.shape
        y = self.dense(cast(x.reshape(-1, in_channels), dtype), cast(weight, dtype), bias)
        return y.reshape(shape[:-1] + (out_channels,))


class BiasedLinear(Linear):
    """The same with a bias, which is a class of its own because an `if` costs the compiler three functions a layer."""

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        return super().construct(x, weight, cast(bias, dtype), dtype)


class Convolution(nn.Cell):
    """(x (N, C, H, W), weight (O, C, k, k), bias (O,) or None) -> (N, O, H', W') in one kernel, all of one type.

    MindSpore's own derivative computes the gradients for x, weight and bias in one kernel. Here those for weight and
    bias are a kernel of their own, which is removed from the graph if both are frozen, and their work with it.

    Args:
        kernel_size: k.
        stride: Pixels between two outputs.
        padding: Pixels of zeros on all sides.
        has_bias: Whether there is a bias.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int, has_bias: bool):
        super().__init__()
        self.settings = (stride, stride), (padding, padding), (1, 1)
        self.has_bias = has_bias
        self.convolution, self.gradient = Conv2DExt(), ConvolutionGrad()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = self.settings
        return self.convolution(x, weight, bias, stride, padding, dilation, 1)

    def bprop(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        stride, padding, dilation = self.settings
        rest = stride, padding, dilation, False, (0, 0), 1
        dx = self.gradient(dout, x, weight, bias, *rest, (1, 0, 0))[0]
        # By index: a name that is not used, such as `_, dweight, dbias = ...`, would keep the kernel in the graph.
        of_parameters = self.gradient(dout, x, weight, bias, *rest, (0, 1, int(self.has_bias)))
        return dx, of_parameters[1], of_parameters[2] if self.has_bias else bias


class Conv2d(nn.Cell):
    """Convolution and bias in one kernel."""

    def __init__(self, convolution: nn.Cell):
        super().__init__()
        self.convolution = convolution

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: ms.Type) -> Tensor:
        return self.convolution(cast(x, dtype), cast(weight, dtype), bias)


class BiasedConv2d(Conv2d):
    """The same with a bias, which is cast as well."""

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        return super().construct(x, weight, cast(bias, dtype), dtype)


class PaddedConvolution(nn.Cell):
    """A convolution of images that get zeros at their sides first: `padding` = (top, bottom, left, right)."""

    def __init__(self, convolution: nn.Cell, padding: tuple[int, int, int, int]):
        super().__init__()
        top, bottom, left, right = padding
        self.convolution, self.sides = convolution, (left, right, top, bottom)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.convolution(pad(x, self.sides), weight, bias)


class GroupNorm(nn.Cell):
    """Group normalization that takes and gives `dtype`. The kernel computes in fp32 inside.

    Weight and bias are cast to `dtype`, because aclnnGroupNorm is documented for those of x's type alone. In fp16 that
    changes the output by as much as the rounding of the output itself: by 1.5e-4 on average and 4e-3 at most, so that
    the relative error is 2.9e-4, and 2.1e-4 with fp32 weights (NumPy, 320 channels, weights of 1 +- 0.3, biases of
    +- 0.3, outputs up to 7). Weights of a checkpoint in fp16 are not changed.
    """

    def __init__(self, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        return ops.group_norm(cast(x, dtype), self.num_groups, cast(weight, dtype), cast(bias, dtype), self.eps)


class LayerNorm(nn.Cell):
    """Layer normalization over the last axis that takes and gives `dtype`. The kernel computes in fp32 inside.

    Weight and bias are cast to `dtype` as in GroupNorm, with the same error (320 and 1,280 channels). aclnnLayerNorm is
    documented for fp32 weights of an fp16 x as well, but no device has shown it.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: ms.Type) -> Tensor:
        return layer_norm(cast(x, dtype), weight.shape, cast(weight, dtype), cast(bias, dtype), self.eps)


class GELU(nn.Cell):
    """The exact form in one kernel each way, where `ops.gelu` takes 5 forward and 13 backward."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = GeluExt()

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu(x, "none")


class GELUGate(nn.Cell):
    """(..., 2 C) -> (..., C): the first half times the exact GELU of the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = GeluExt()

    def construct(self, x: Tensor) -> Tensor:
        value, gate = chunk(x, 2, -1)
        return value * self.gelu(gate, "none")


class TakeRows(nn.Cell):
    """(table (entries, ...), index (...)) -> the rows of the table at these indices. Gather is an aclop kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.index_select = IndexSelect()

    def construct(self, table: Tensor, index: Tensor) -> Tensor:
        return self.index_select(table, 0, index.reshape(-1)).reshape(index.shape + table.shape[1:])


class Mean(nn.Cell):
    """Mean of all elements. ReduceMean and its derivative are aclop kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanExt()

    def construct(self, x: Tensor) -> Tensor:
        return self.mean(x)


class RowMeans(nn.Cell):
    """Mean of each row of (N, ...). ReduceMean is an aclop kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanExt()

    def construct(self, x: Tensor) -> Tensor:
        return self.mean(x.reshape(x.shape[0], -1), 1)


class Upsample2x(nn.Cell):
    """Nearest-neighbour doubling of height and width of (N, C, H, W), one kernel each way."""

    def construct(self, x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=(2.0, 2.0), mode="nearest")


class FlashAttention(nn.Cell):
    """softmax(Q K^T / sqrt(head_dim)) V by `ops.flash_attention_score`: (q (N tokens, C), k, v, N) -> (N tokens, C).

    The kernel reads the heads from (N, tokens, C) itself (layout "BSH"), so that nothing is transposed. Heads whose
    size is not in FLASH_HEAD_SIZES get channels of zeros, which change neither the scores nor the other channels, and
    which are removed from the result. These go as (N, tokens, heads, head_dim), the layout "BSND".

    Args:
        num_heads: Heads, at most 256.
        head_dim: Channels of a head.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = 1.0 / math.sqrt(head_dim)
        self.padding = flash_head_size(head_dim) - head_dim
        self.layout = "BSND" if self.padding else "BSH"

    def split_heads(self, x: Tensor, n: int) -> Tensor:
        if not self.padding:
            return x.reshape(n, -1, self.num_heads * self.head_dim)
        return pad(x.reshape(n, -1, self.num_heads, self.head_dim), (0, self.padding))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        out = ops.flash_attention_score(
            self.split_heads(q, n),
            self.split_heads(k, n),
            self.split_heads(v, n),
            self.num_heads,
            scalar_value=self.scale,
            input_layout=self.layout,
        )
        if self.padding:
            out = pad(out, (0, -self.padding))  # a slice would be an aclop kernel
        return out.reshape(q.shape)


def flash_head_size(head_dim: int) -> int:
    """Return the size that heads are padded to: the next of FLASH_HEAD_SIZES, or beyond those a multiple of 16."""
    larger = [size for size in FLASH_HEAD_SIZES if size >= head_dim]
    return larger[0] if larger else -(-head_dim // 16) * 16
