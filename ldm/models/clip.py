"""CLIP (Radford et al. 2021): an image tower and a text tower with features in common, with Hugging Face's names."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.models.layers import Conv2d, LayerNorm, Linear
from ldm.models.text_encoder import CLIPEncoder, CLIPTextTransformer, Embedding


def _arguments(
    text: tuple[int, int, int],
    vision: tuple[int, int, int, int, int],
    projection_dim: int,
    activation: str = "quick_gelu",
) -> dict[str, Any]:
    """Return CLIPModel's arguments.

    Args:
        text: Width, layers and heads of the text tower.
        vision: Width, layers, heads, patch size and image size of the image tower.
        projection_dim: Channels of the features.
        activation: "quick_gelu" or "gelu".
    """
    return {
        "text": dict(zip(("width", "num_layers", "num_heads"), text), activation=activation),
        "vision": dict(
            zip(("width", "num_layers", "num_heads", "patch_size", "image_size"), vision), activation=activation
        ),
        "projection_dim": projection_dim,
    }


# The published models that score images, and the nano model, whose text tower is that of configs/nano.yaml.
CLIP_MODELS = {
    "ViT-B/32": _arguments((512, 12, 8), (768, 12, 12, 32, 224), 512),
    "ViT-B/16": _arguments((512, 12, 8), (768, 12, 12, 16, 224), 512),
    "ViT-L/14": _arguments((768, 12, 12), (1024, 24, 16, 14, 224), 768),
    "ViT-H/14": _arguments((1024, 24, 16), (1280, 32, 16, 14, 224), 1024, "gelu"),
    "nano": _arguments((96, 3, 3), (144, 4, 4, 8, 64), 96),
}


class VisionEmbeddings(nn.Cell):
    """Images (N, 3, S, S) -> embeddings of the class token and the patches, (N, 1 + (S / patch)^2, width)."""

    def __init__(self, width: int, image_size: int, patch_size: int):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.width = width
        self.class_embedding = Parameter(
            Tensor(np.random.normal(0, 0.02, width).astype(np.float32)), name="class_embedding"
        )
        self.patch_embedding = Conv2d(3, width, patch_size, stride=patch_size, has_bias=False)
        self.position_embedding = Embedding(tokens, width)
        self.positions = Tensor(np.arange(tokens, dtype=np.int32))
        self.concat_tokens = ops.Concat(1)

    def construct(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images)
        n, width = patches.shape[:2]
        patches = patches.reshape(n, width, -1).transpose(0, 2, 1).astype(ms.float32)
        class_token = ops.broadcast_to(self.class_embedding.astype(ms.float32).reshape(1, 1, width), (n, 1, width))
        x = self.concat_tokens((class_token, patches))
        return x + ops.broadcast_to(self.position_embedding(self.positions), x.shape)


class CLIPVisionTransformer(nn.Cell):
    """Images (N, 3, S, S), normalized as in the model's training -> the class token's output (N, width)."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        image_size: int,
        patch_size: int,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        self.embeddings = VisionEmbeddings(width, image_size, patch_size)
        self.pre_layrnorm = LayerNorm(width)  # spelt as published
        self.encoder = CLIPEncoder(width, num_layers, num_heads, 4 * width, activation)
        self.post_layernorm = LayerNorm(width)

    def construct(self, images: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(images)))[:, 0])


class CLIPModel(nn.Cell):
    """Both towers and their projections.

    construct(images (N, 3, S, S), tokens (M, 77) int32) -> unit vectors (N, projection_dim), (M, projection_dim).
    """

    def __init__(self, text: dict[str, Any], vision: dict[str, Any], projection_dim: int):
        super().__init__()
        self.text_model = CLIPTextTransformer(**text)
        self.vision_model = CLIPVisionTransformer(**vision)
        self.visual_projection = Linear(vision["width"], projection_dim, has_bias=False)
        self.text_projection = Linear(text["width"], projection_dim, has_bias=False)
        self.logit_scale = Parameter(Tensor(np.float32(np.log(1 / 0.05))), name="logit_scale")
        self.normalise = ops.L2Normalize(-1)
        self.gather = ops.Gather()

    def image_features(self, images: Tensor) -> Tensor:
        return self.normalise(self.visual_projection(self.vision_model(images)))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Return the features of each text's first end token, which has the largest of all token numbers."""
        embeddings = self.text_model(tokens)
        n, length, width = embeddings.shape
        end = tokens.astype(ms.float32).argmax(1).astype(ms.int32)
        rows = end + ops.arange(n).astype(ms.int32) * length
        return self.normalise(self.text_projection(self.gather(embeddings.reshape(n * length, width), rows, 0)))

    def construct(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.image_features(images), self.text_features(tokens)


class ImageFeatures(nn.Cell):
    """`CLIPModel.image_features` as a graph: images (N, 3, S, S) -> unit vectors (N, projection_dim)."""

    def __init__(self, clip: CLIPModel):
        super().__init__(auto_prefix=False)
        self.clip = clip

    def construct(self, images: Tensor) -> Tensor:
        return self.clip.image_features(images)


class TextFeatures(nn.Cell):
    """`CLIPModel.text_features` as a graph: tokens (N, 77) int32 -> unit vectors (N, projection_dim)."""

    def __init__(self, clip: CLIPModel):
        super().__init__(auto_prefix=False)
        self.clip = clip

    def construct(self, tokens: Tensor) -> Tensor:
        return self.clip.text_features(tokens)
