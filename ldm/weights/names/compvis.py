"""Names of the published single files: CompVis's SD1 (Hugging Face text encoder) and Stability AI's SD2 (OpenCLIP).

Checkpoints of this project, of a whole model or a part, have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ldm.weights.names.tables import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Concatenation,
    Ignored,
    openclip_layer,
    split_layer,
    text_layer,
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
OPENCLIP_LAYERS_USED = 23  # of ViT-H/14's 24: SD2 uses the output of the penultimate layer
_OPENCLIP_KEY = {name: key for key, name in OPENCLIP_NAMES.items()}


def map_key(key: str) -> tuple[str, ...] | Ignored | None:
    """Map a key to canonical names, see ldm.weights.names.tables."""
    if key.startswith(OPENCLIP):
        return _map_openclip_key(key[len(OPENCLIP) :])
    if key == POSITION_IDS:
        return Ignored("position numbers")
    if key.startswith((UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX)):
        return (key,)
    if key.startswith(TEXT_WITHOUT_MODEL):  # written by some tools that merge checkpoints
        return (TEXT_PREFIX + key[len("cond_stage_model.transformer.") :],)
    if key in _SCHEDULE_BUFFERS:
        return Ignored("noise schedule")
    return None


def ema_name(key: str) -> str:
    """Return the key of the moving average of a UNet parameter. CompVis's LitEma drops the dots."""
    return "model_ema." + key[len("model.") :].replace(".", "")


def is_published(key: str) -> bool:
    """Whether an unused key is part of the published files. Moving averages do not count."""
    return isinstance(map_key(key), Ignored)


def layout(names: Iterable[str], openclip: bool) -> dict[str, Concatenation]:
    """Return how the arrays of a published single file are made of canonical ones.

    Args:
        names: All canonical names.
        openclip: Use OpenCLIP's names for the text encoder, as SD2's files do. Queries, keys and values are one array.
    """
    return dict(_openclip_key(name) if openclip else (name, Concatenation((name,))) for name in names)


def _map_openclip_key(key: str) -> tuple[str, ...] | Ignored | None:
    if key in OPENCLIP_NAMES:
        return (TEXT_PREFIX + OPENCLIP_NAMES[key],)
    if key in ("text_projection", "logit_scale", "attn_mask"):
        return Ignored("text projection and scale of CLIP")
    layer = split_layer(key)
    if layer is not None and int(layer[0]) >= OPENCLIP_LAYERS_USED:
        return Ignored("the text encoder's last layer, unused by SD2")
    return text_layer(*layer) if layer is not None else None


def _openclip_key(name: str) -> tuple[str, Concatenation]:
    layer = openclip_layer(name)
    if layer is not None:
        index, module, kind, names = layer
        module = f"mlp.{module}" if module.startswith("c_") else module
        separator = "_" if module == "attn.in_proj" else "."
        return f"{OPENCLIP}transformer.resblocks.{index}.{module}{separator}{kind}", Concatenation(names)
    tail = name.removeprefix(TEXT_PREFIX)
    return (OPENCLIP + _OPENCLIP_KEY[tail] if tail in _OPENCLIP_KEY else name), Concatenation((name,))


def schedule_buffers(linear_start: float, linear_end: float, timesteps: int) -> dict[str, np.ndarray]:
    """Compute the arrays of the noise schedule that published files hold beside the weights.

    Programs that read the files compute them again. The betas are linear in the square root; the formulas are those of
    Ho et al. 2020, "Denoising diffusion probabilistic models".

    Returns:
        Key -> array (timesteps,), float32.
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
    alphas = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alphas[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alphas),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alphas),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - alphas),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas),
    }
    return {name: value.astype(np.float32) for name, value in buffers.items()}


_SCHEDULE_BUFFERS = frozenset(schedule_buffers(0.1, 0.2, timesteps=2))
