"""Attention as the UNet uses it: softmax(Q K^T / sqrt d) V, the transformer block, and its place in an image."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.models.device_forms import cast, gelu_gate, mindspores_own, one, swap_middle
from ldm.models.kernels import kernel, like
from ldm.models.layers import Conv2d, Dense, GroupNorm, Identity, LayerNorm, add

# Elements of (query rows x key rows) over all heads and images that are held at a time: 64 MB in fp32.
BLOCK_ELEMENTS = 2**24


class ScaledDotProductAttention(nn.Cell):
    """softmax(Q K^T * scale) V over (N, heads, tokens, head_dim), with its own backward pass.

    The probabilities are computed again in the backward pass rather than kept. The derivative of the softmax is
    p * (dO V^T - delta) with delta = sum(dO * O); -delta rides as one more column of dO against a column of ones in V,
    so that one batched product subtracts it and nothing is broadcast. Forward and backward of 256 tokens, 32x2 heads of
    32: 25 ms against 42 ms for the operators' own derivative (two CPU cores); no (tokens x tokens) tensor is held.

    Where the probabilities would be more than BLOCK_ELEMENTS, they are computed in blocks of query rows, each of which
    waits for the one before (Depend), or the scheduler would hold them all: two layers of 4,096 tokens, 8 heads of 40,
    take 0.2 GB instead of 1.6 forward and 1.0 instead of 2.7 in training, in the same time forward and 1.5 times the
    time in training (0.85 s a layer on one core, where PyTorch's scaled_dot_product_attention takes 1.2).

    `causal_length` tokens see only those before them (for text). The softmax is computed in fp32, the products in the
    type of q, k and v, which the projections before choose.
    """

    def __init__(self, head_dim: int, causal_length: int = 0):
        super().__init__()
        self.scale = 1.0 / math.sqrt(head_dim)
        self.causal = causal_length > 0
        mask = np.triu(np.full((causal_length, causal_length), -1e9, np.float32), 1)
        self.mask = Tensor(mask) if self.causal else None
        self.block_elements = BLOCK_ELEMENTS
        self.product = ops.BatchMatMul()
        self.product_nt = ops.BatchMatMul(transpose_b=True)
        self.product_tn = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum_last = ops.ReduceSum(keep_dims=True)
        self.concat_last, self.concat_rows = ops.Concat(-1), ops.Concat(2)
        self.ones_like = ops.OnesLike()

    def rows(self, q: Tensor, k: Tensor) -> int:
        """Query rows in a block: all for text, whose mask is one piece."""
        n, heads, tokens, _ = q.shape
        return tokens if self.causal else block_rows(tokens, n * heads * k.shape[2], self.block_elements)

    def probabilities(self, scaled_q: Tensor, k: Tensor) -> Tensor:
        """fp32 probabilities (N, heads, query tokens, key tokens)."""
        scores = self.product_nt(scaled_q, k).astype(ms.float32)
        if self.causal:
            scores = scores + ops.broadcast_to(self.mask, scores.shape)
        return self.softmax(scores)

    def forward_block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.product(self.probabilities(q * self.scale, k).astype(v.dtype), v)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, rows = q.shape[2], self.rows(q, k)
        out = self.forward_block(q[:, :, :rows], k, v) if rows < tokens else self.forward_block(q, k, v)
        if rows == tokens:
            return out
        blocks = (out,)
        for start in range(rows, tokens, rows):
            block = ops.depend(q[:, :, start : start + rows], blocks[-1])
            blocks = blocks + (self.forward_block(block, k, v),)
        return self.concat_rows(blocks)

    def bprop(self, q, k, v, out, dout):
        q, v = ops.depend(q, dout), ops.depend(v, dout)  # computed again now, not ahead of time and kept till now
        tokens, rows = q.shape[2], self.rows(q, k)
        delta = self.sum_last(dout * out, -1)
        v = self.concat_last((v, self.ones_like(v[..., :1])))
        dout_delta = self.concat_last((dout, -delta))
        scaled_q = q * self.scale
        if rows == tokens:
            return self.backward_block(scaled_q, k, v, dout, dout_delta)
        dq, dk, dv = self.backward_block(scaled_q[:, :, :rows], k, v, dout[:, :, :rows], dout_delta[:, :, :rows])
        blocks = (dq,)
        for start in range(rows, tokens, rows):
            end = start + rows
            block = ops.depend(scaled_q[:, :, start:end], (blocks[-1], dk, dv))
            dq, more_dk, more_dv = self.backward_block(block, k, v, dout[:, :, start:end], dout_delta[:, :, start:end])
            blocks, dk, dv = blocks + (dq,), dk + more_dk, dv + more_dv
        return self.concat_rows(blocks), dk, dv

    def backward_block(self, scaled_q, k, v_ones, dout, dout_delta):
        """Dq of the rows in scaled_q and their share of dk and dv; v_ones and dout_delta have the column more."""
        p = self.probabilities(scaled_q, k)
        dp = self.product_nt(dout_delta, v_ones)
        ds = (p * dp.astype(ms.float32)).astype(scaled_q.dtype)
        p = p.astype(scaled_q.dtype)
        return self.product(ds, k) * self.scale, self.product_tn(ds, scaled_q), self.product_tn(p, dout)


@ops.constexpr
def block_rows(rows: int, elements_of_row: int, block_elements: int) -> int:
    """How many of `rows` make a block of about equal blocks, none above `block_elements` unless one row is."""
    blocks = min(rows, -(-rows * elements_of_row // block_elements))
    return -(-rows // blocks)


class FlashAttention(nn.Cell):
    """The same function through `ops.flash_attention_score`, which exists on Ascend only and wants fp16 or bf16.

    The operator's head size must be a multiple of 16 (MindSpore 2.8), which SD1.x's 40 is not: channels of zeros are
    added, which change neither the scores nor the other channels, and taken off the result.
    """

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        self.scale, self.num_heads = 1.0 / math.sqrt(head_dim), num_heads
        self.head_dim, self.added = head_dim, -head_dim % 16
        self.concat_last, self.zeros = ops.Concat(-1), ops.Zeros()

    def pad(self, x: Tensor) -> Tensor:
        return self.concat_last((x, self.zeros(x.shape[:-1] + (self.added,), x.dtype))) if self.added else x

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.flash_attention_score(
            self.pad(q), self.pad(k), self.pad(v), self.num_heads, scalar_value=self.scale, input_layout="BNSD"
        )
        return out[:, :, :, : self.head_dim] if self.added else out


class MultiHeadAttention(nn.Cell):
    """What all attention layers of these settings compute between their projections, in one cell (see `one`)."""

    def __init__(self, num_heads: int, head_dim: int, causal_length: int, flash: bool):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.attention = (
            FlashAttention(head_dim, num_heads) if flash else one(ScaledDotProductAttention, head_dim, causal_length)
        )
        self.swap_middle = swap_middle()

    def split_heads(self, x: Tensor, n: int) -> Tensor:
        return self.swap_middle(x.reshape(n, -1, self.num_heads, self.head_dim))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        out = self.attention(self.split_heads(q, n), self.split_heads(k, n), self.split_heads(v, n))
        return self.swap_middle(out).reshape(q.shape)


class KernelAttention(nn.Cell):
    """MultiHeadAttention of the CPU, by one operator of kernels.cc, which reads the rows as they are: no head is split
    off, and each thread holds 1 MB of probabilities at a time, twice that in the backward pass.
    """

    def __init__(self, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.attention = kernel("attention", like(0))
        self.dx = kernel("attention_dx", like(0), like(1), like(2))

    def construct(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        settings = kernel_settings(n, self.num_heads, self.causal)
        fp32 = ms.float32
        return cast(self.attention(cast(q, fp32), cast(k, fp32), cast(v, fp32), settings), q.dtype)

    def bprop(self, q, k, v, n, out, dout):
        settings = kernel_settings(n, self.num_heads, self.causal)
        fp32 = ms.float32
        q, k, v = ops.depend(q, dout), ops.depend(k, dout), ops.depend(v, dout)  # for fp16, which is cast again now
        dq, dk, dv = self.dx(cast(q, fp32), cast(k, fp32), cast(v, fp32), cast(out, fp32), cast(dout, fp32), settings)
        return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), 0


@ops.constexpr
def kernel_settings(n: int, num_heads: int, causal: bool) -> Tensor:
    """A constant of the graph."""
    return Tensor(np.array([n, num_heads, causal], np.float32))


def multi_head_attention(num_heads: int, head_dim: int, causal_length: int = 0, flash: bool = False):
    """A callable (q (N tokens, C), k and v (N key tokens, C), N) -> like q, where each head attends on its own
    channels; (N, tokens, C) will do too. The one place where the attention of a device is chosen.
    """
    if flash or mindspores_own():
        return one(MultiHeadAttention, num_heads, head_dim, causal_length, flash)
    return one(KernelAttention, num_heads, causal_length > 0)


class CrossAttention(nn.Cell):
    """Multi-head attention from x (N tokens, query_dim) to context (N context tokens, context_dim). Published names:
    to_q, to_k, to_v (no bias), to_out.0.
    """

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = Dense(query_dim, inner, has_bias=False)
        self.to_k = Dense(context_dim, inner, has_bias=False)
        self.to_v = Dense(context_dim, inner, has_bias=False)
        self.to_out = nn.SequentialCell([Dense(inner, query_dim), Identity()])
        self.attention = multi_head_attention(num_heads, head_dim)

    def construct(self, x: Tensor, context: Tensor, n: int) -> Tensor:
        return self.to_out[0](self.attention(self.to_q(x), self.to_k(context), self.to_v(context), n))


class GEGLU(nn.Cell):
    """x W1 * gelu(x W2), both products in one layer `proj`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = Dense(in_channels, 2 * out_channels)
        self.gate = gelu_gate()

    def construct(self, x: Tensor) -> Tensor:
        return self.gate(self.proj(x))


class FeedForward(nn.Cell):
    """GEGLU to four times the width and back. Published names: net.0.proj, net.2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.SequentialCell([GEGLU(channels, 4 * channels), Identity(), Dense(4 * channels, channels)])

    def construct(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Cell):
    """Self-attention (attn1), cross-attention to the text (attn2), feed-forward; each after a LayerNorm, each added.

    x (N tokens, channels), context (N context tokens, context_dim): a matrix for all images, which the dense layers
    need anyway.
    """

    def __init__(self, channels: int, num_heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads, head_dim)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads, head_dim)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)

    def construct(self, x: Tensor, context: Tensor, n: int) -> Tensor:
        normed = self.norm1(x)
        x = add(x, self.attn1(normed, normed, n))
        x = add(x, self.attn2(self.norm2(x), context, n))
        return add(x, self.ff(self.norm3(x)))


class PixelsToTokens(nn.Cell):
    """(N, C, H, W) -> (N H W, C), in one cell for all."""

    def __init__(self):
        super().__init__()
        self.swap_middle = swap_middle()

    def construct(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.swap_middle(x.reshape(n, c, h * w, 1)).reshape(-1, c)


class TokensToPixels(nn.Cell):
    """(N H W, C) and x of (N, any, H, W) -> (N, C, H, W), in one cell for all."""

    def __init__(self):
        super().__init__()
        self.swap_middle = swap_middle()

    def construct(self, tokens: Tensor, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return self.swap_middle(tokens.reshape(n, h * w, -1, 1)).reshape(n, -1, h, w)


class First(nn.Cell):
    """(y, x) -> y, where the other projection has TokensToPixels."""

    def construct(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the pixels of x (N, C, H, W), added to it; context (N tokens, context_dim). The
    projections before and after are 1x1 convolutions in SD1.x, of pixels, and linear layers in SD2.x (`use_linear`), of
    tokens.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int,
        context_dim: int,
        use_linear: bool,
        num_groups: int = 32,
    ):
        super().__init__()
        inner = num_heads * head_dim
        self.norm = GroupNorm(channels, num_groups, eps=1e-6)
        self.proj_in = Dense(channels, inner) if use_linear else Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(inner, num_heads, head_dim, context_dim) for _ in range(depth)]
        )
        self.proj_out = Dense(inner, channels) if use_linear else Conv2d(inner, channels, 1)
        # No `if` in construct: each is three functions for the compiler, in each layer.
        to_tokens, to_pixels = one(PixelsToTokens), one(TokensToPixels)
        self.before_in, self.after_in = (to_tokens, one(Identity)) if use_linear else (one(Identity), to_tokens)
        self.before_out, self.after_out = (one(First), to_pixels) if use_linear else (to_pixels, one(First))

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        y = self.after_in(self.proj_in(self.before_in(self.norm(x))))
        for block in self.transformer_blocks:
            y = block(y, context, x.shape[0])
        return add(x, self.after_out(self.proj_out(self.before_out(y, x)), x))


def use_flash_attention(net: nn.Cell, enable: bool) -> int:
    """Put Ascend's fused attention into every CrossAttention of `net` (or take it out); returns how many were changed.
    On the CPU the operator does not exist: `ldm.runtime.device` decides, the graph compiler refuses.
    """
    count = 0
    for _, cell in net.cells_and_names():
        if isinstance(cell, CrossAttention):
            cell.attention = multi_head_attention(cell.num_heads, cell.head_dim, flash=enable)
            count += 1
    return count
