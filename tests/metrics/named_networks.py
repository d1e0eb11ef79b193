"""Inception and CLIP with weights that are functions of their names, so that both sides of a comparison make them."""

from __future__ import annotations

import zlib

import numpy as np

from ldm.weights.inception import published_modules
from tests.named_weights import named_weight

CLIP_ARGUMENTS = {
    "text": dict(width=32, num_layers=2, num_heads=2, activation="quick_gelu", vocab_size=49408),
    "vision": dict(width=48, num_layers=2, num_heads=3, activation="quick_gelu", patch_size=8, image_size=32),
    "projection_dim": 24,
}


def inception_weights() -> dict[str, np.ndarray]:
    """Return the arrays of the published file: weights that keep the size of activations, statistics near (0, 1)."""
    arrays = {}
    for module, (_, shape) in published_modules().items():
        arrays[f"{module}.conv.weight"] = _uniform(f"{module}.conv.weight", shape, np.sqrt(6.0 / np.prod(shape[1:])))
        middles_and_spreads = {"weight": (1, 0.3), "bias": (0, 0.3), "running_mean": (0, 0.3), "running_var": (1, 0.4)}
        for kind, (middle, spread) in middles_and_spreads.items():
            name = f"{module}.bn.{kind}"
            arrays[name] = (middle + _uniform(name, shape[:1], spread)).astype(np.float32)
    return arrays


def clip_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return name -> array for the parameters of a CLIP."""
    return {name: named_weight(name, shape) if shape else np.array(2.0, np.float32) for name, shape in shapes.items()}


def mindone_inception(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same arrays under the names of mindone's .ckpt."""
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    kinds = {"conv.weight": "conv.weight", **{f"bn.{ours}": f"bn.{theirs}" for ours, theirs in norm.items()}}
    modules = {ours: theirs for ours, (theirs, _) in published_modules().items()}
    return {f"{theirs}.{kinds[kind]}": arrays[f"{ours}.{kind}"] for ours, theirs in modules.items() for kind in kinds}


def openai_clip(arrays: dict[str, np.ndarray], mindone: bool = False) -> dict[str, np.ndarray]:
    """Return a CLIP under the names of OpenAI's state dictionary, or of mindone's .ckpt."""
    found = {"context_length": np.array(77, np.int64)} if not mindone else {}
    for tower, ours, theirs in (("text", "text_model.", ""), ("vision", "vision_model.", "visual.")):
        for i in range(CLIP_ARGUMENTS[tower]["num_layers"]):
            layer, block = f"{ours}encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                fused = np.concatenate([arrays[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"])
                found[f"{block}attn.in_proj{'.' if mindone else '_'}{kind}"] = fused
                for old, new in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                ):
                    found[f"{block}{new}.{kind}"] = arrays[f"{layer}{old}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = arrays[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = arrays[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = arrays[f"text_model.final_layer_norm.{kind}"]
    found.update(
        {
            "visual.class_embedding": arrays["vision_model.embeddings.class_embedding"],
            "visual.conv1.weight": arrays["vision_model.embeddings.patch_embedding.weight"],
            "visual.positional_embedding": arrays["vision_model.embeddings.position_embedding.weight"],
            "visual.proj": np.ascontiguousarray(arrays["visual_projection.weight"].T),
            "token_embedding.weight": arrays["text_model.embeddings.token_embedding.weight"],
            "positional_embedding": arrays["text_model.embeddings.position_embedding.weight"],
            "text_projection": np.ascontiguousarray(arrays["text_projection.weight"].T),
            "logit_scale": arrays["logit_scale"],
        }
    )
    if not mindone:
        return found
    renamed = {}
    for name, array in found.items():
        if "ln_" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        renamed[name.replace("token_embedding.weight", "token_embedding.embedding_table")] = array
    return renamed


def _uniform(name: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.uniform(-bound, bound, shape).astype(np.float32)
