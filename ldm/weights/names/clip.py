"""Names of CLIP with both towers: OpenAI's and OpenCLIP's, and those of mindone, to Hugging Face's."""

from __future__ import annotations

from ldm.weights.names.tables import KINDS, Ignored, split_layer, text_layer

TEXT, VISION = "text_model.", "vision_model."
# Modules and parameters of OpenAI's CLIP -> those of Hugging Face's.
_MODULES = {
    "visual.conv1": f"{VISION}embeddings.patch_embedding",
    "visual.ln_pre": f"{VISION}pre_layrnorm",
    "visual.ln_post": f"{VISION}post_layernorm",
    "token_embedding": f"{TEXT}embeddings.token_embedding",
    "ln_final": f"{TEXT}final_layer_norm",
}
_PARAMETERS = {
    "visual.class_embedding": f"{VISION}embeddings.class_embedding",
    "visual.positional_embedding": f"{VISION}embeddings.position_embedding.weight",
    "positional_embedding": f"{TEXT}embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")  # (width, projection) in OpenAI's, the reverse in Hugging Face's
_KINDS = {**KINDS, "embedding_table": "weight"}
_UNUSED = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def map_key(key: str) -> tuple[str, ...] | Ignored | None:
    """Map a key to Hugging Face's names, see ldm.weights.names.tables."""
    if key in _UNUSED:
        return Ignored("constant")
    if key in _PARAMETERS:
        return (_PARAMETERS[key],)
    layer = split_layer(key.removeprefix("visual."))
    if layer is not None:
        return text_layer(*layer, prefix=VISION if key.startswith("visual.") else TEXT)
    module, _, kind = key.rpartition(".")
    return (f"{_MODULES[module]}.{_KINDS[kind]}",) if module in _MODULES and kind in _KINDS else None
