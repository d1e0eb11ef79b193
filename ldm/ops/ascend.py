"""Operators that exist on Ascend alone."""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops


class FlashAttention(nn.Cell):
    """softmax(Q K^T / sqrt(head_dim)) V over (N, heads, tokens, head_dim) by `ops.flash_attention_score`.

    The operator takes fp16 or bf16, and head sizes that are multiples of 16 (MindSpore 2.8), which the 40 of SD1.x is
    not. Zero channels are appended, which change neither the scores nor the other channels, and removed from the
    result.
    """

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        self.scale, self.num_heads = 1.0 / math.sqrt(head_dim), num_heads
        self.head_dim, self.padding = head_dim, -head_dim % 16
        self.concat_last, self.zeros = ops.Concat(-1), ops.Zeros()

    def pad(self, x: Tensor) -> Tensor:
        return self.concat_last((x, self.zeros(x.shape[:-1] + (self.padding,), x.dtype))) if self.padding else x

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.flash_attention_score(
            self.pad(q), self.pad(k), self.pad(v), self.num_heads, scalar_value=self.scale, input_layout="BNSD"
        )
        return out[:, :, :, : self.head_dim] if self.padding else out
