"""mindone's published .ckpt files of SD1.x and SD2.x: MindSpore's gamma and beta, wrapped convolutions, a fused text
encoder. The names are those of mindone's Stable Diffusion example (2023 to 2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldm.weights.names.tables import TEXT_PREFIX, Concatenation, Ignored, Target, fused_text_layer, text_layer

TEXT = "cond_stage_model.transformer."
TEXT_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "embedding_table": "embeddings.token_embedding.weight",
    "ln_final.gamma": "final_layer_norm.weight",
    "ln_final.beta": "final_layer_norm.bias",
}
NORM_KINDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
# A residual block's layers, by name there and by their place in a sequence here.
RESIDUAL = {
    "in_layers_norm": "in_layers.0",
    "in_layers_conv": "in_layers.2",
    "out_layers_norm": "out_layers.0",
    "out_layers_conv": "out_layers.3",
}
_LAYER = re.compile(r"transformer_layer\.resblocks\.(\d+)\.(.+)\.(weight|bias|gamma|beta)$")
_RESIDUAL = re.compile(r"\.({})\.".format("|".join(RESIDUAL)))


def is_typical(name: str) -> bool:
    """Whether only mindone has such a key."""
    return (
        name.endswith((".gamma", ".beta", ".conv.conv.weight"))
        or _RESIDUAL.search(name) is not None
        or name.startswith((f"{TEXT}transformer_layer.", f"{TEXT}embedding_table"))
    )


def map_key(name: str) -> list[Target] | Ignored | None:
    """Where a key of a mindone checkpoint goes."""
    if name.startswith(TEXT):
        return _place_text(name[len(TEXT) :])
    module, _, kind = name.rpartition(".")
    if kind not in NORM_KINDS:
        return None
    if name.startswith("first_stage_model."):
        return [Target(f"{module}.{NORM_KINDS[kind]}")]
    if name.startswith("model.diffusion_model."):
        # Every convolution of the UNet but the attention's projections sits in a cell that calls it `conv`.
        module = module[: -len(".conv")] if module.endswith(".conv") else module
        module = _RESIDUAL.sub(lambda found: f".{RESIDUAL[found.group(1)]}.", f"{module}.")[:-1]
        return [Target(f"{module}.{NORM_KINDS[kind]}")]
    return None


def _place_text(name: str) -> list[Target] | None:
    if name in TEXT_NAMES:
        return [Target(TEXT_PREFIX + TEXT_NAMES[name])]
    layer = _LAYER.match(name)
    if layer is None:
        return None
    index, module, kind = layer.groups()
    module = module[len("attn.") :] if module.startswith("attn.attn.") else module
    return text_layer(index, module, NORM_KINDS[kind])


def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Concatenation]:
    """Mindone's key -> what of the canonical arrays, given by name and shape, it is made of."""
    return dict(_key(name, shapes) for name in shapes)


def _key(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Concatenation]:
    module, _, kind = name.rpartition(".")
    weight = shapes.get(f"{module}.weight", ())
    if len(weight) == 1:  # only norms have a weight of one axis
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    if name.startswith(TEXT_PREFIX):
        theirs = {ours: theirs for theirs, ours in TEXT_NAMES.items()}
        tail = name[len(TEXT_PREFIX) :]
        fused = fused_text_layer(name)
        if fused is None:
            return TEXT + theirs[tail if tail in theirs else f"{tail.rpartition('.')[0]}.{kind}"], Concatenation(
                (name,)
            )
        index, layer, _, parts = fused
        layer = f"attn.{layer}" if layer.startswith("attn.") else layer
        return f"{TEXT}transformer_layer.resblocks.{index}.{layer}.{kind}", Concatenation(parts)
    if name.startswith("model.diffusion_model."):
        for theirs, ours in RESIDUAL.items():
            if module.endswith(f".{ours}"):
                module = module[: -len(ours)] + theirs
        if len(weight) == 4 and not module.endswith((".proj_in", ".proj_out")):
            module += ".conv"
    return f"{module}.{kind}", Concatenation((name,))
