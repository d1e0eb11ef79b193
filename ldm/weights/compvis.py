"""The published single files: CompVis's SD1 (Hugging Face text encoder) and Stability AI's SD2 (OpenCLIP).

This project's own checkpoints have these names too, all of a model or a part of it.
"""

from __future__ import annotations

import re

from ldm.weights.placing import TEXT_PREFIX, Ignored, Place, text_layer

SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
OPENCLIP = "cond_stage_model.model."
OPENCLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPENCLIP_LAYERS_USED = 23  # of ViT-H/14's 24: SD2 conditions on the penultimate layer
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$")


def place(name: str) -> list[Place] | Ignored | None:
    """Where a key of a CompVis or Stability AI single file goes."""
    if name.startswith(OPENCLIP):
        return _place_openclip(name[len(OPENCLIP) :])
    if name == f"{TEXT_PREFIX}embeddings.position_ids":
        return Ignored("position numbers")
    if name.startswith(("model.diffusion_model.", "first_stage_model.", TEXT_PREFIX)):
        return [Place(name)]
    if name in SCHEDULE_BUFFERS:
        return Ignored("noise schedule")
    if name.startswith("model_ema."):
        return Ignored("EMA copy")
    return None


def _place_openclip(name: str) -> list[Place] | Ignored | None:
    if name in OPENCLIP_NAMES:
        return [Place(TEXT_PREFIX + OPENCLIP_NAMES[name])]
    if name in ("text_projection", "logit_scale", "attn_mask"):
        return Ignored("text projection and scale of CLIP")
    layer = _LAYER.match(name)
    if layer is None:
        return None
    index, module, kind = layer.groups()
    if int(index) >= OPENCLIP_LAYERS_USED:
        return Ignored("the text encoder's last layer, unused by SD2")
    return text_layer(index, module[4:] if module.startswith("mlp.") else module, kind)
