"""The transformer of the UNet: attention from pixels to pixels and to the text."""

from __future__ import annotations

from mindspore import Tensor, nn

from ldm.models.layers import Conv2d, GroupNorm, Identity, LayerNorm, Linear
from ldm.ops import add, attention, gelu_gate, pixels_to_tokens, shared_cell, tokens_to_pixels


class CrossAttention(nn.Cell):
    """Multi-head attention from x (N tokens, query_dim) to context (N context tokens, context_dim). Published names:
    to_q, to_k, to_v (no bias), to_out.0.
    """

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = Linear(query_dim, inner, has_bias=False)
        self.to_k = Linear(context_dim, inner, has_bias=False)
        self.to_v = Linear(context_dim, inner, has_bias=False)
        self.to_out = nn.SequentialCell([Linear(inner, query_dim), Identity()])
        self.attention = attention(num_heads, head_dim)

    def construct(self, x: Tensor, context: Tensor, n: int) -> Tensor:
        return self.to_out[0](self.attention(self.to_q(x), self.to_k(context), self.to_v(context), n))


class GEGLU(nn.Cell):
    """x W1 * gelu(x W2), both products in one layer `proj`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)
        self.gate = gelu_gate()

    def construct(self, x: Tensor) -> Tensor:
        return self.gate(self.proj(x))


class FeedForward(nn.Cell):
    """GEGLU to four times the width and back. Published names: net.0.proj, net.2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.SequentialCell([GEGLU(channels, 4 * channels), Identity(), Linear(4 * channels, channels)])

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
        self.proj_in = Linear(channels, inner) if use_linear else Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(inner, num_heads, head_dim, context_dim) for _ in range(depth)]
        )
        self.proj_out = Linear(inner, channels) if use_linear else Conv2d(inner, channels, 1)
        # No `if` in construct: each is three functions for the compiler, in each layer.
        to_tokens, to_pixels = pixels_to_tokens(), tokens_to_pixels()
        self.before_in, self.after_in = (
            (to_tokens, shared_cell(Identity)) if use_linear else (shared_cell(Identity), to_tokens)
        )
        self.before_out, self.after_out = (
            (shared_cell(First), to_pixels) if use_linear else (to_pixels, shared_cell(First))
        )

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
            cell.attention = attention(cell.num_heads, cell.head_dim, flash=enable)
            count += 1
    return count
