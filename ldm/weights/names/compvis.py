"""The published single files: CompVis's SD1 (Hugging Face text encoder) and Stability AI's SD2 (OpenCLIP).

This project's own checkpoints have these names too, all of a model or a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ldm.weights.names.tables import TEXT_PREFIX, Concatenation, Ignored, Target, fused_text_layer, text_layer

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
POSITION_IDS = f"{TEXT_PREFIX}embeddings.position_ids"
OPENCLIP = "cond_stage_model.model."
OPENCLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
TEXT_WITHOUT_MODEL = tuple(
    f"cond_stage_model.transformer.{part}." for part in ("embeddings", "encoder", "final_layer_norm")
)
OPENCLIP_LAYERS_USED = 23  # of ViT-H/14's 24: SD2 conditions on the penultimate layer
_LAYER = re.compile(r"transformer\.resblocks\.([0-9]{1,4})\.(.+?)[._](weight|bias)$")


def map_key(name: str) -> list[Target] | Ignored | None:
    """Where a key of a CompVis or Stability AI single file goes."""
    if name.startswith(OPENCLIP):
        return _place_openclip(name[len(OPENCLIP) :])
    if name == POSITION_IDS:
        return Ignored("position numbers")
    if name.startswith(("model.diffusion_model.", "first_stage_model.", TEXT_PREFIX)):
        return [Target(name)]
    if name.startswith(TEXT_WITHOUT_MODEL):  # as some tools that merge checkpoints write it
        return [Target(TEXT_PREFIX + name[len("cond_stage_model.transformer.") :])]
    if name in SCHEDULE_BUFFERS:
        return Ignored("noise schedule")
    return None


def ema_name(name: str) -> str:
    """The key of the moving average of a UNet parameter, given its key: LitEma leaves out the dots."""
    return "model_ema." + name[len("model.") :].replace(".", "")


def _place_openclip(name: str) -> list[Target] | Ignored | None:
    if name in OPENCLIP_NAMES:
        return [Target(TEXT_PREFIX + OPENCLIP_NAMES[name])]
    if name in ("text_projection", "logit_scale", "attn_mask"):
        return Ignored("text projection and scale of CLIP")
    layer = _LAYER.match(name)
    if layer is None:
        return None
    index, module, kind = layer.groups()
    if int(index) >= OPENCLIP_LAYERS_USED:
        return Ignored("the text encoder's last layer, unused by SD2")
    return text_layer(index, module[4:] if module.startswith("mlp.") else module, kind)


def is_published(name: str) -> bool:
    """Whether a key without use here belongs to the published files, other than as a moving average."""
    return isinstance(map_key(name), Ignored)


def layout(names: Iterable[str], openclip: bool) -> dict[str, Concatenation]:
    """Key of a published single file -> what of the canonical `names` it is made of; `openclip`: the text encoder as in
    SD2's files, q, k and v in one array.
    """
    return dict(_key(name) if openclip else (name, Concatenation((name,))) for name in names)


def _key(name: str) -> tuple[str, Concatenation]:
    fused = fused_text_layer(name)
    if fused is not None:
        index, module, kind, parts = fused
        module = f"mlp.{module}" if module.startswith("c_") else module
        joint = "_" if module == "attn.in_proj" else "."
        return f"{OPENCLIP}transformer.resblocks.{index}.{module}{joint}{kind}", Concatenation(parts)
    theirs = {ours: theirs for theirs, ours in OPENCLIP_NAMES.items()}
    tail = name[len(TEXT_PREFIX) :] if name.startswith(TEXT_PREFIX) else None
    return (OPENCLIP + theirs[tail] if tail in theirs else name), Concatenation((name,))


def schedule_buffers(linear_start: float, linear_end: float, timesteps: int) -> dict[str, np.ndarray]:
    """The noise schedule that published files hold beside the weights, 12 arrays (timesteps,) float32; readers compute
    it anew. Formulas: Ho et al. 2020, "Denoising diffusion probabilistic models"; betas linear in the square root.
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
    alphas = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alphas[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas)
    values = (
        betas,
        alphas,
        previous,
        np.sqrt(alphas),
        np.sqrt(1.0 - alphas),
        np.log(1.0 - alphas),
        np.sqrt(1.0 / alphas),
        np.sqrt(1.0 / alphas - 1.0),
        variance,
        np.log(np.maximum(variance, 1e-20)),
        betas * np.sqrt(previous) / (1.0 - alphas),
        (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas),
    )
    return {name: value.astype(np.float32) for name, value in zip(SCHEDULE_BUFFERS, values)}
