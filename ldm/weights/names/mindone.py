"""Names of mindone's published .ckpt files of SD1.x and SD2.x, as its Stable Diffusion example had them (2023 to 2025).

Norms have MindSpore's gamma and beta, convolutions are wrapped in a cell, and the text encoder has queries, keys and
values in one array.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldm.weights.names.tables import (
    KINDS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Concatenation,
    openclip_layer,
    split_layer,
    text_layer,
)

TEXT = "cond_stage_model.transformer."
TEXT_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "embedding_table": "embeddings.token_embedding.weight",
    "ln_final.gamma": "final_layer_norm.weight",
    "ln_final.beta": "final_layer_norm.bias",
}
_MINDONE_KEY = {name: key for key, name in TEXT_NAMES.items()}
# Layers of a residual block -> their numbers in the canonical sequences.
RESIDUAL = {
    "in_layers_norm": "in_layers.0",
    "in_layers_conv": "in_layers.2",
    "out_layers_norm": "out_layers.0",
    "out_layers_conv": "out_layers.3",
}
_RESIDUAL = re.compile(r"\.({})\.".format("|".join(RESIDUAL)))


def is_typical(key: str) -> bool:
    """Whether only mindone has such a key."""
    return (
        key.endswith((".gamma", ".beta", ".conv.conv.weight"))
        or _RESIDUAL.search(key) is not None
        or key.startswith((f"{TEXT}transformer_layer.", f"{TEXT}embedding_table"))
    )


def map_key(key: str) -> tuple[str, ...] | None:
    """Map a key to canonical names, see ldm.weights.names.tables."""
    if key.startswith(TEXT):
        name = key[len(TEXT) :]
        layer = split_layer(name)
        if layer is not None:
            return text_layer(*layer)
        return (TEXT_PREFIX + TEXT_NAMES[name],) if name in TEXT_NAMES else None
    module, _, kind = key.rpartition(".")
    if kind not in KINDS or not key.startswith((UNET_PREFIX, VAE_PREFIX)):
        return None
    if key.startswith(UNET_PREFIX):
        # Every convolution of the UNet, except the projections around attention, is in a cell under the name `conv`.
        module = module.removesuffix(".conv")
        module = _RESIDUAL.sub(lambda match: f".{RESIDUAL[match[1]]}.", f"{module}.")[:-1]
    return (f"{module}.{KINDS[kind]}",)


def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Concatenation]:
    """Return how the arrays of a mindone checkpoint are made of canonical ones, given by name and shape."""
    return dict(_mindone_key(name, shapes) for name in shapes)


def _mindone_key(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Concatenation]:
    module, _, kind = name.rpartition(".")
    weight = shapes.get(f"{module}.weight", ())
    if len(weight) == 1:  # only norms have a weight with one axis
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    if name.startswith(TEXT_PREFIX):
        layer = openclip_layer(name)
        if layer is None:
            return TEXT + _MINDONE_KEY[name[len(TEXT_PREFIX) :]], Concatenation((name,))
        index, layer_module, _, names = layer
        layer_module = f"attn.{layer_module}" if layer_module.startswith("attn.") else layer_module
        return f"{TEXT}transformer_layer.resblocks.{index}.{layer_module}.{kind}", Concatenation(names)
    if name.startswith(UNET_PREFIX):
        for mindone, canonical in RESIDUAL.items():
            if module.endswith(f".{canonical}"):
                module = module.removesuffix(canonical) + mindone
        if len(weight) == 4 and not module.endswith((".proj_in", ".proj_out")):
            module += ".conv"
    return f"{module}.{kind}", Concatenation((name,))
