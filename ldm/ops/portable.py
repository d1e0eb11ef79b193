"""Operators made of MindSpore's own, for every device."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.ops.graph import cast

# How many attention probabilities, over all images and heads, are held at a time: 64 MB in fp32.
BLOCK_ELEMENTS = 2**24


class AddRowBias(nn.Cell):
    """(x (rows, C), bias (C,)) -> x + bias, in x's type."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, cast(bias, x.dtype))


class AddChannelBias(nn.Cell):
    """(x (N, C, H, W), bias (C,)) -> x + bias, in x's type."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd(data_format="NCHW")

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, cast(bias, x.dtype))


class RowMeans(nn.Cell):
    """Mean of each row of (N, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = ops.ReduceMean()

    def construct(self, x: Tensor) -> Tensor:
        return self.mean(x.reshape(x.shape[0], -1), 1)


class Fork(nn.Cell):
    """x -> (x, x)."""

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class TakeRows(nn.Cell):
    """(table (entries, ...), index (...)) -> the rows of the table at these indices."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, table: Tensor, index: Tensor) -> Tensor:
        return self.gather(table, index, 0)


class Upsample2x(nn.Cell):
    """Nearest-neighbour doubling of height and width of (N, C, H, W)."""

    def construct(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # 0.2 ms forward and backward, where `ops.interpolate` took 5.7 ms on the CPU (16x64x16x16).
        return ops.broadcast_to(x.reshape(n, c, h, 1, w, 1), (n, c, h, 2, w, 2)).reshape(n, c, 2 * h, 2 * w)


class GELU(nn.Cell):
    """The exact form, with erf (`nn.GELU` defaults to the approximation with tanh)."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate="none")


class GELUGate(nn.Cell):
    """(..., 2 C) -> (..., C): the first half times the exact GELU of the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = ops.Split(-1, 2)

    def construct(self, x: Tensor) -> Tensor:
        value, gate = self.halves(x)
        return value * ops.gelu(gate, approximate="none")


class SiLU(nn.Cell):
    """x * sigmoid(x)."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.silu(x)


class SwapMiddleAxes(nn.Cell):
    """(N, A, B, D) -> (N, B, A, D)."""

    def construct(self, x: Tensor) -> Tensor:
        return x.transpose(0, 2, 1, 3)


class GroupNorm(nn.Cell):
    """(x (N, C, H, W), weight (C,), bias (C,)) -> x normalized within each group of channels."""

    def __init__(self, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.Cell):
    """(x (rows, C), weight (C,), bias (C,)) -> x normalized within each row."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias)[0]


class ScaledDotProductAttention(nn.Cell):
    """softmax(Q K^T / sqrt(head_dim)) V over (N, heads, tokens, head_dim), with its own backward pass.

    The backward pass computes the probabilities again and keeps none from the forward pass. The derivative of the
    softmax is p * (dO V^T - delta) with delta = sum(dO * O). -delta is appended to dO as a column, and V gets a column
    of ones, so that one batched product also subtracts delta and nothing is broadcast. Forward and backward of 256
    tokens and 32x2 heads of 32 channels take 25 ms, and 42 ms with MindSpore's own derivative (two CPU cores).

    If there are more than BLOCK_ELEMENTS probabilities, they are computed in blocks of query rows. Each block depends
    on the one before (`ops.depend`), because the scheduler would otherwise hold all of them at once. Two layers of
    4,096 tokens and 8 heads of 40 channels take 0.2 GB instead of 1.6 GB forward and 1.0 GB instead of 2.7 GB in
    training, in the same time forward and 1.5 times the time in training (0.85 s a layer on one core, where PyTorch's
    scaled_dot_product_attention takes 1.2 s).

    The softmax is computed in fp32, the products in the type of q, k and v.

    Args:
        head_dim: Channels of a head.
        causal_length: The number of tokens of a text whose tokens attend only to themselves and those before, or 0.
        block_elements: Take this number in the place of BLOCK_ELEMENTS.
    """

    def __init__(self, head_dim: int, causal_length: int = 0, block_elements: int = BLOCK_ELEMENTS):
        super().__init__()
        self.scale = 1.0 / math.sqrt(head_dim)
        self.causal = causal_length > 0
        mask = np.triu(np.full((causal_length, causal_length), -1e9, np.float32), 1)
        self.mask = Tensor(mask) if self.causal else None
        self.block_elements = block_elements
        self.product = ops.BatchMatMul()
        self.product_nt = ops.BatchMatMul(transpose_b=True)
        self.product_tn = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum_last = ops.ReduceSum(keep_dims=True)
        self.concat_last, self.concat_rows = ops.Concat(-1), ops.Concat(2)
        self.ones_like = ops.OnesLike()

    def rows(self, q: Tensor, k: Tensor) -> int:
        """Return the number of query rows in a block. A causal mask is not divided."""
        n, heads, tokens, _ = q.shape
        return tokens if self.causal else block_rows(tokens, n * heads * k.shape[2], self.block_elements)

    def probabilities(self, scaled_q: Tensor, k: Tensor) -> Tensor:
        """Return fp32 probabilities (N, heads, query tokens, key tokens)."""
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
        blocks: tuple[Tensor, ...] = (out,)
        for start in range(rows, tokens, rows):
            block = ops.depend(q[:, :, start : start + rows], blocks[-1])
            blocks = blocks + (self.forward_block(block, k, v),)
        return self.concat_rows(blocks)

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Without `depend` the scheduler would compute the probabilities ahead of time and hold them until now.
        q, v = ops.depend(q, dout), ops.depend(v, dout)
        tokens, rows = q.shape[2], self.rows(q, k)
        delta = self.sum_last(dout * out, -1)
        v = self.concat_last((v, self.ones_like(v[..., :1])))
        dout_delta = self.concat_last((dout, -delta))
        scaled_q = q * self.scale
        if rows == tokens:
            return self.backward_block(scaled_q, k, v, dout, dout_delta)
        dq, dk, dv = self.backward_block(scaled_q[:, :, :rows], k, v, dout[:, :, :rows], dout_delta[:, :, :rows])
        blocks: tuple[Tensor, ...] = (dq,)
        for start in range(rows, tokens, rows):
            end = start + rows
            block = ops.depend(scaled_q[:, :, start:end], (blocks[-1], dk, dv))
            dq, more_dk, more_dv = self.backward_block(block, k, v, dout[:, :, start:end], dout_delta[:, :, start:end])
            blocks, dk, dv = blocks + (dq,), dk + more_dk, dv + more_dv
        return self.concat_rows(blocks), dk, dv

    def backward_block(
        self, scaled_q: Tensor, k: Tensor, v_ones: Tensor, dout: Tensor, dout_delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq of the rows in scaled_q and their part of dk and dv.

        `v_ones` is v with a column of ones, `dout_delta` is dout with the column -delta.
        """
        p = self.probabilities(scaled_q, k)
        dp = self.product_nt(dout_delta, v_ones)
        ds = (p * dp.astype(ms.float32)).astype(scaled_q.dtype)
        p = p.astype(scaled_q.dtype)
        return self.product(ds, k) * self.scale, self.product_tn(ds, scaled_q), self.product_tn(p, dout)


@ops.constexpr
def block_rows(rows: int, elements_per_row: int, block_elements: int) -> int:
    """Return how many of `rows` make one of several blocks of about equal size, at most `block_elements` each.

    A block has at least one row, even if that is more than `block_elements`.
    """
    blocks = min(rows, -(-rows * elements_per_row // block_elements))
    return -(-rows // blocks)
