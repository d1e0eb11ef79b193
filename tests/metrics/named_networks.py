"""Inception and CLIP with weights that are functions of their names, so that both sides of a comparison make them."""

from __future__ import annotations

import zlib

import numpy as np

from ldm.weights.inception import published_modules
from tests.named_weights import named_weight

CLIP_FORM = {
    "text": {"width": 32, "num_layers": 2, "num_heads": 2, "activation": "quick_gelu", "vocab_size": 49408},
    "vision": {"width": 48, "num_layers": 2, "num_heads": 3, "patch_size": 8, "image_size": 32,
               "activation": "quick_gelu"},
    "projection_dim": 24,
}


def inception_weights() -> dict[str, np.ndarray]:
    """The published file's arrays: kernels that keep the size of what goes through them, statistics near (0, 1)."""
    arrays = {}
    for module, (_, shape) in published_modules().items():
        arrays[f"{module}.conv.weight"] = _uniform(f"{module}.conv.weight", shape, np.sqrt(6.0 / np.prod(shape[1:])))
        for kind, middle, spread in (("weight", 1.0, 0.3), ("bias", 0.0, 0.3), ("running_mean", 0.0, 0.3),
                                     ("running_var", 1.0, 0.4)):
            name = f"{module}.bn.{kind}"
            arrays[name] = (middle + _uniform(name, shape[:1], spread)).astype(np.float32)
    return arrays


def clip_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Canonical name -> array for the parameters of a CLIP."""
    return {name: np.float32(2.0) if not shape else named_weight(name, shape) for name, shape in shapes.items()}


def _uniform(name: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.uniform(-bound, bound, shape).astype(np.float32)
