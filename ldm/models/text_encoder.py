"""CLIP's text transformer (Radford et al. 2021), and the encoder layers that CLIP's image tower shares.

SD1.x uses the text tower of ViT-L/14, with 12 layers and quick GELU. SD2.x uses the first 23 of the 24 layers of
ViT-H/14, with exact GELU. The final LayerNorm follows in both. The names are Hugging Face's for both architectures: the
fused projections of OpenCLIP are split when a checkpoint is read.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.models.initial_values import normal
from ldm.models.layers import LayerNorm, Linear, QuickGELU
from ldm.ops import attention, fork, gelu, take_rows


class CLIPAttention(nn.Cell):
    """Multi-head self-attention over (N, tokens, width).

    If `causal_length` is the number of tokens and not 0, each token attends only to itself and those before.
    """

    def __init__(self, width: int, num_heads: int, causal_length: int = 0):
        super().__init__()
        self.k_proj, self.v_proj = Linear(width, width), Linear(width, width)
        self.q_proj, self.out_proj = Linear(width, width), Linear(width, width)
        self.attention = attention(num_heads, width // num_heads, causal_length)
        self.fork = fork()

    def construct(self, x: Tensor) -> Tensor:
        of_q, x = self.fork(x)
        of_k, of_v = self.fork(x)
        return self.out_proj(self.attention(self.q_proj(of_q), self.k_proj(of_k), self.v_proj(of_v), x.shape[0]))


class CLIPMLP(nn.Cell):
    """The feed-forward network of a layer."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.activation = QuickGELU() if activation == "quick_gelu" else gelu()

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Cell):
    """A transformer layer with LayerNorms before attention and MLP."""

    def __init__(self, width: int, num_heads: int, hidden: int, activation: str, causal_length: int = 0):
        super().__init__()
        self.self_attn = CLIPAttention(width, num_heads, causal_length)
        self.layer_norm1, self.layer_norm2 = LayerNorm(width), LayerNorm(width)
        self.mlp = CLIPMLP(width, hidden, activation)
        self.fork = fork()

    def construct(self, x: Tensor) -> Tensor:
        x, h = self.fork(x)
        x, h = self.fork(x + self.self_attn(self.layer_norm1(h)))
        return x + self.mlp(self.layer_norm2(h))


class CLIPEncoder(nn.Cell):
    """The transformer layers of a tower.

    Attributes:
        depth: How many of them run, all unless `run_layers` says otherwise.
    """

    def __init__(
        self, width: int, num_layers: int, num_heads: int, hidden: int, activation: str, causal_length: int = 0
    ):
        super().__init__()
        self.layers = nn.CellList(
            [CLIPEncoderLayer(width, num_heads, hidden, activation, causal_length) for _ in range(num_layers)]
        )
        self.depth = num_layers

    def construct(self, x: Tensor) -> Tensor:
        for i in range(self.depth):  # a slice of a CellList renames the parameters in pynative mode
            x = self.layers[i](x)
        return x


class Embedding(nn.Cell):
    """Looks up rows of `weight` (entries, width): index (...) int32 -> (..., width) fp32."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = Parameter(normal((entries, width), std=0.02), name="weight")
        self.take_rows = take_rows()

    def construct(self, index: Tensor) -> Tensor:
        return self.take_rows(self.weight, index).astype(ms.float32)


class TextEmbeddings(nn.Cell):
    """The sum of token and position embeddings: tokens (N, length) int32 -> (N, length, width) fp32."""

    def __init__(self, vocab_size: int, length: int, width: int):
        super().__init__()
        self.token_embedding, self.position_embedding = Embedding(vocab_size, width), Embedding(length, width)
        self.positions = Tensor(np.arange(length, dtype=np.int32))

    def construct(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        return x + ops.broadcast_to(self.position_embedding(self.positions), x.shape)


class CLIPTextTransformer(nn.Cell):
    """Tokens (N, length) int32 -> text embeddings (N, length, width), after the final LayerNorm."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        activation: str = "quick_gelu",
        vocab_size: int = 49408,
        length: int = 77,
    ):
        super().__init__()
        self.embeddings = TextEmbeddings(vocab_size, length, width)
        self.encoder = CLIPEncoder(width, num_layers, num_heads, 4 * width, activation, causal_length=length)
        self.final_layer_norm = LayerNorm(width)

    def construct(self, tokens: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class TextModel(nn.Cell):
    """Holds the transformer under its published name, `text_model`."""

    def __init__(self, **params: Any):
        super().__init__()
        self.text_model = CLIPTextTransformer(**params)

    def construct(self, tokens: Tensor) -> Tensor:
        return self.text_model(tokens)


class CLIPTextEncoder(nn.Cell):
    """The text encoder of Stable Diffusion: tokens (N, 77) int32 -> text embeddings (N, 77, width) fp32.

    The arguments are those of CLIPTextTransformer.
    """

    def __init__(self, **params: Any):
        super().__init__()
        self.transformer = TextModel(**params)

    def construct(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens).astype(ms.float32)


def run_layers(text_encoder: CLIPTextEncoder, count: int) -> None:
    """Run the first `count` layers alone, and the final LayerNorm. The weights of the others stay.

    A graph that is compiled already is not changed.
    """
    encoder = text_encoder.transformer.text_model.encoder
    if not 1 <= count <= len(encoder.layers):
        raise ValueError(f"{count} of {len(encoder.layers)} layers")
    encoder.depth = count
