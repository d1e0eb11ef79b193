"""The transformer of the UNet (Rombach et al. 2022, section 3.3), with the published names.

Tokens are kept as one matrix (N * tokens, channels), the form that linear layers and LayerNorm compute in. Only the
attention itself needs N.
"""

from __future__ import annotations

from mindspore import Tensor, nn

from ldm.models.layers import Conv2d, GroupNorm, LayerNorm, Linear
from ldm.ops import Sequential, add, attention, fork, gelu_gate, identity, pixels_to_tokens, tokens_to_pixels


class CrossAttention(nn.Cell):
    """Multi-head attention from x (N tokens, query_dim) to context (N context tokens, context_dim)."""

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        inner_dim = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = Linear(query_dim, inner_dim, has_bias=False)
        self.to_k = Linear(context_dim, inner_dim, has_bias=False)
        self.to_v = Linear(context_dim, inner_dim, has_bias=False)
        self.to_out = Sequential(Linear(inner_dim, query_dim), identity())
        self.attention = attention(num_heads, head_dim)
        self.fork = fork()

    def construct(self, x: Tensor, context: Tensor, n: int) -> Tensor:
        of_k, of_v = self.fork(context)
        return self.to_out(self.attention(self.to_q(x), self.to_k(of_k), self.to_v(of_v), n))


class GEGLU(nn.Cell):
    """x W1 * gelu(x W2), with both products in the layer `proj` (Shazeer 2020)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)
        self.gelu_gate = gelu_gate()

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu_gate(self.proj(x))


class FeedForward(nn.Cell):
    """GEGLU to four times the width and a linear layer back."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = Sequential(GEGLU(channels, 4 * channels), identity(), Linear(4 * channels, channels))

    def construct(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention to the text and a feed-forward network, each with a LayerNorm before it."""

    def __init__(self, channels: int, num_heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads, head_dim)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads, head_dim)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)
        self.fork = fork()

    def construct(self, x: Tensor, context: Tensor, n: int) -> Tensor:
        x, h = self.fork(x)
        x = add(x, self.attn1(*self.fork(self.norm1(h)), n))
        x, h = self.fork(x)
        x = add(x, self.attn2(self.norm2(h), context, n))
        x, h = self.fork(x)
        return add(x, self.ff(self.norm3(h)))


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the pixels of an image, added to it. The projections are 1x1 convolutions (SD1.x).

    construct(x (N, channels, H, W), emb (not used), context (N context tokens, context_dim)) -> (N, channels, H, W).

    Args:
        channels: Channels of the image.
        num_heads: Heads of each attention.
        head_dim: Channels of a head.
        depth: The number of transformer blocks.
        context_dim: Channels of the text embeddings.
        num_groups: Groups of the GroupNorm.
    """

    def __init__(
        self, channels: int, num_heads: int, head_dim: int, depth: int, context_dim: int, num_groups: int = 32
    ):
        super().__init__()
        inner_dim = num_heads * head_dim
        self.norm = GroupNorm(channels, num_groups, eps=1e-6)
        self.proj_in = self.projection(channels, inner_dim)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(inner_dim, num_heads, head_dim, context_dim) for _ in range(depth)]
        )
        self.proj_out = self.projection(inner_dim, channels)
        self.to_tokens, self.to_pixels, self.fork = pixels_to_tokens(), tokens_to_pixels(), fork()

    @staticmethod
    def projection(in_channels: int, out_channels: int) -> nn.Cell:
        """Build a projection of pixels."""
        return Conv2d(in_channels, out_channels, 1)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x, h = self.fork(x)
        tokens = self.to_tokens(self.proj_in(self.norm(h)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, x.shape[0])
        return add(x, self.proj_out(self.to_pixels(tokens, x)))


class LinearSpatialTransformer(SpatialTransformer):
    """The same with linear layers as projections (SD2.x).

    A class of its own, because each `if` in construct is three functions more for the compiler in every layer.
    """

    @staticmethod
    def projection(in_channels: int, out_channels: int) -> nn.Cell:
        """Build a projection of tokens."""
        return Linear(in_channels, out_channels)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x, h = self.fork(x)
        tokens = self.proj_in(self.to_tokens(self.norm(h)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, x.shape[0])
        return add(x, self.to_pixels(self.proj_out(tokens), x))


def set_attention(net: nn.Cell, flash: bool = False, bf16: bool = False) -> int:
    """Choose the attention of every CrossAttention of `net`, and return their number.

    Call it before the first run. A graph that is compiled already keeps what it has.

    Args:
        net: The network.
        flash: Use Ascend's fused operator. `ldm.runtime.device.decide_flash_attention` refuses it on the CPU.
        bf16: Multiply in bf16, on the CPU.
    """
    layers = [cell for _, cell in net.cells_and_names() if isinstance(cell, CrossAttention)]
    for layer in layers:
        layer.attention = attention(layer.num_heads, layer.head_dim, flash=flash, bf16=bf16)
    return len(layers)
