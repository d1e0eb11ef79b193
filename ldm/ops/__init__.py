"""The operators that the networks are made of. What differs by device is chosen here, when a network is built.

Each function returns a callable for use in a cell. Callables with the same settings are one cell (`shared_cell`), which
holds no parameters. All forms of an operator give the same numbers up to rounding:

- `ldm.ops.portable`: MindSpore's own operators. They are used on a CPU without a C++ compiler, some on Ascend too.
- `ldm.ops.ascend`: forms of fewer and faster kernels on Ascend. Some of their operators exist there alone.
- `ldm.ops.cpu`: C++ kernels and faster combinations of MindSpore's operators for the CPU.
- `ldm.ops.composite`: operators that are the same everywhere except for an operator inside them.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import mindspore as ms
from mindspore import nn, ops

from ldm.ops import ascend, composite, cpu, portable
from ldm.ops.cpu.library import bf16_unit, kernel_library, multiplies_bf16
from ldm.ops.graph import Identity, RepeatedCell, Sequential, add, cast, free_graphs, shared_cell

__all__ = [
    "RepeatedCell",
    "Sequential",
    "add",
    "attention",
    "broadcast_add",
    "cast",
    "conv2d",
    "fork",
    "free_graphs",
    "gelu",
    "gelu_gate",
    "group_norm",
    "identity",
    "kernels_in_use",
    "layer_norm",
    "linear",
    "mean",
    "bf16_unit",
    "multiplies_bf16",
    "on_ascend",
    "pixels_to_tokens",
    "row_means",
    "shared_cell",
    "silu",
    "swap_middle_axes",
    "take_rows",
    "tokens_to_pixels",
    "upsample2x",
]

logger = logging.getLogger(__name__)


def on_ascend() -> bool:
    """Whether MindSpore's device target is Ascend. `ldm.runtime.device` sets it before a network is built."""
    return ms.get_context("device_target") == "Ascend"


def kernels_in_use() -> Path | None:
    """Return the library that kernels.cc was compiled to, or None on Ascend or if it cannot be compiled."""
    return None if on_ascend() else kernel_library()


def linear(has_bias: bool, bf16_weight: bool = False) -> nn.Cell:
    """Linear layer: (x (..., in), weight (out, in), bias (out,) or None, dtype) -> (..., out) in `dtype`.

    With `bf16_weight`, which the CPU has, the weight is bfloat16 and has no gradient, x is float32, and so is `dtype`.
    """
    if bf16_weight:
        _warn_of_bf16_without_kernels()
    if on_ascend():
        return shared_cell(ascend.BiasedLinear if has_bias else ascend.Linear)
    add_bias = add_row_bias() if has_bias else shared_cell(composite.NoBias)
    if bf16_weight:
        product = shared_cell(cpu.Bf16MatMul if multiplies_bf16() else cpu.UnpackedMatMul)
        return shared_cell(composite.LinearOfWeight, product, add_bias)
    return shared_cell(composite.Linear, add_bias)


@cache
def _warn_of_bf16_without_kernels() -> None:
    """Say once that bf16 costs memory and time here, if it does."""
    if kernel_library() is None:
        logger.warning(
            "precision bf16 takes more memory than fp32 here, and about twice the time: MindSpore has no product of "
            "bf16 weights on the CPU, and this project's kernels are not there, so all weights are unpacked at once. "
            "Install g++ on Linux, or begin a new run with --precision fp32"
        )


def add_row_bias() -> nn.Cell:
    """Bias of rows: (x (rows, C), bias (C,)) -> x + bias, in x's type. On Ascend `linear` adds it itself."""
    return shared_cell(cpu.AddRowBias, kernels_in_use() is not None)


def conv2d(
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int | tuple[int, int, int, int],
    has_bias: bool,
    bf16_weight: bool = False,
) -> nn.Cell:
    """Convolution: (x (N, C, H, W), weight (O, C, k, k), bias (O,) or None, dtype) -> (N, O, H', W') in `dtype`.

    `padding` is one number of pixels for all sides, or (top, bottom, left, right). `bf16_weight` is as in `linear`.
    """
    if bf16_weight:
        _warn_of_bf16_without_kernels()
    if on_ascend():
        return _ascend_conv2d(kernel_size, stride, padding, has_bias)
    add_bias = add_channel_bias() if has_bias else shared_cell(composite.NoBias)
    if bf16_weight:
        keeps_size = stride == 1 and kernel_size in (1, 3) and padding == kernel_size // 2
        if multiplies_bf16() and keeps_size:
            convolution = shared_cell(cpu.Bf16Conv2d, out_channels, kernel_size)
        else:
            convolution = shared_cell(cpu.UnpackedConv2d, out_channels, kernel_size, stride, padding)
        return shared_cell(composite.Conv2dOfWeight, convolution, add_bias)
    if kernels_in_use() and (kernel_size, stride, padding) == (3, 1, 1):
        convolution = shared_cell(cpu.Conv3x3, out_channels)
    else:
        convolution = shared_cell(ops.Conv2D, out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)
    return shared_cell(composite.Conv2d, convolution, add_bias)


def _ascend_conv2d(kernel_size: int, stride: int, padding: int | tuple[int, int, int, int], has_bias: bool) -> nn.Cell:
    if isinstance(padding, int):
        convolution = shared_cell(ascend.Convolution, kernel_size, stride, padding, has_bias)
    else:
        convolution = shared_cell(ascend.Convolution, kernel_size, stride, 0, has_bias)
        convolution = shared_cell(ascend.PaddedConvolution, convolution, padding)
    return shared_cell(ascend.BiasedConv2d if has_bias else ascend.Conv2d, convolution)


def add_channel_bias() -> nn.Cell:
    """Bias of channels: (x (N, C, H, W), bias (C,)) -> x + bias, in x's type. On Ascend `conv2d` adds it itself."""
    return shared_cell(cpu.AddChannelBias, kernels_in_use() is not None)


def group_norm(num_groups: int, eps: float) -> nn.Cell:
    """Group normalization in fp32: (x (N, C, H, W), weight (C,), bias (C,), dtype) -> (N, C, H, W) in `dtype`."""
    if on_ascend():
        return shared_cell(ascend.GroupNorm, num_groups, eps)
    if kernels_in_use():
        norm = shared_cell(cpu.Norm, "group_norm", num_groups, eps)
    else:
        norm = shared_cell(portable.GroupNorm, num_groups, eps)
    return shared_cell(composite.GroupNormInFloat32, norm)


def layer_norm(eps: float) -> nn.Cell:
    """Layer normalization in fp32: (x (..., C), weight (C,), bias (C,), dtype) -> (..., C) in `dtype`."""
    if on_ascend():
        return shared_cell(ascend.LayerNorm, eps)
    norm = shared_cell(cpu.Norm, "layer_norm", eps) if kernels_in_use() else shared_cell(portable.LayerNorm, eps)
    return shared_cell(composite.LayerNormInFloat32, norm)


def silu() -> nn.Cell:
    """SiLU: x -> x * sigmoid(x)."""
    return shared_cell(cpu.Pointwise, "silu") if kernels_in_use() else shared_cell(portable.SiLU)


def gelu() -> nn.Cell:
    """Exact GELU, which Stable Diffusion uses: x -> x * (1 + erf(x / sqrt(2))) / 2."""
    if on_ascend():
        return shared_cell(ascend.GELU)
    return shared_cell(cpu.Pointwise, "gelu") if kernels_in_use() else shared_cell(portable.GELU)


def gelu_gate() -> nn.Cell:
    """Gate of GEGLU: x (..., 2 C) -> (..., C), the first half times GELU of the second half."""
    if on_ascend():
        return shared_cell(ascend.GELUGate)
    if kernels_in_use():
        return shared_cell(cpu.Pointwise, "gelu_gate", cpu.halved_last_axis)
    return shared_cell(portable.GELUGate)


def broadcast_add() -> nn.Cell:
    """Addition with broadcasting: (x, y) -> x + y, where y has ones in its shape."""
    return add if on_ascend() else shared_cell(cpu.BroadcastAdd)


def fork() -> nn.Cell:
    """Value with two readers: x -> (x, x). Where both readers have a gradient, this says how the two are added."""
    return shared_cell(ascend.Fork if on_ascend() else portable.Fork)


def mean() -> nn.Cell:
    """Mean of all elements: x (...) -> scalar, in x's type."""
    return shared_cell(ascend.Mean if on_ascend() else ops.ReduceMean)


def row_means() -> nn.Cell:
    """Mean of each row: x (N, ...) -> (N,), in x's type."""
    return shared_cell(ascend.RowMeans if on_ascend() else portable.RowMeans)


def take_rows() -> nn.Cell:
    """Rows of a table: (table (entries, ...), index (...) int32) -> (*index.shape, *table.shape[1:])."""
    return shared_cell(ascend.TakeRows if on_ascend() else portable.TakeRows)


def upsample2x() -> nn.Cell:
    """Nearest-neighbour doubling: x (N, C, H, W) -> (N, C, 2 H, 2 W)."""
    return shared_cell(ascend.Upsample2x if on_ascend() else portable.Upsample2x)


def identity() -> nn.Cell:
    """Identity: x -> x. It stands for the dropouts of the published networks, so that later cells keep their index."""
    return shared_cell(Identity)


def attention(
    num_heads: int, head_dim: int, causal_length: int = 0, flash: bool = False, bf16: bool = False
) -> nn.Cell:
    """Multi-head attention: (q (N tokens, C), k and v (N key tokens, C), N) -> (N tokens, C).

    (N, tokens, C) is accepted for all three as well.

    Args:
        num_heads: Heads, where C = num_heads * head_dim.
        head_dim: Channels of a head.
        causal_length: The number of tokens of a text whose tokens attend only to themselves and those before, or 0.
        flash: Use Ascend's fused operator, which takes fp16 and has no causal mask here.
        bf16: On a CPU that multiplies bfloat16, round the factors of the products to it, unless the attention is
            causal. Inputs and output are float32.
    """
    if kernels_in_use() and not flash:
        in_bf16 = bf16 and multiplies_bf16() and not causal_length
        return shared_cell(cpu.MultiHeadAttention, num_heads, causal_length > 0, in_bf16)
    if flash:
        return shared_cell(ascend.FlashAttention, num_heads, head_dim)
    block_elements = ascend.BLOCK_ELEMENTS if on_ascend() else portable.BLOCK_ELEMENTS
    attention = shared_cell(portable.ScaledDotProductAttention, head_dim, causal_length, block_elements)
    return shared_cell(composite.MultiHeadAttention, num_heads, head_dim, attention, swap_middle_axes())


def swap_middle_axes() -> nn.Cell:
    """Swap of axes: x (N, A, B, D) -> (N, B, A, D), as between tokens and heads, or channels and pixels."""
    return shared_cell(cpu.SwapMiddleAxes if kernels_in_use() else portable.SwapMiddleAxes)


def pixels_to_tokens() -> nn.Cell:
    """Tokens of an image: x (N, C, H, W) -> (N H W, C)."""
    return shared_cell(composite.PixelsToTokens, swap_middle_axes())


def tokens_to_pixels() -> nn.Cell:
    """Image of tokens: (tokens (N H W, C), image (N, any, H, W)) -> (N, C, H, W)."""
    return shared_cell(composite.TokensToPixels, swap_middle_axes())
