"""The architecture of a model, read from a YAML of the published Stable Diffusion form.

`target:` names are looked up in a closed table and never imported; a published YAML (CompVis's v1-inference.yaml,
Stability AI's v2-inference*.yaml) reads unchanged. Two keys are this project's own, both under `model:`:
`architecture` (a name that LoRA files carry; derived where it is absent) and `pad_token`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError

DIFFUSION_TARGETS = ("ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
UNET_TARGETS = ("ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.unet.UNetModel")
VAE_TARGETS = ("ldm.models.autoencoder.AutoencoderKL",)
VIT_L14 = dict(width=768, num_layers=12, num_heads=12, activation="quick_gelu")
VIT_H14 = dict(width=1024, num_layers=24, num_heads=16, activation="gelu")
TEXT_TARGETS = {
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": VIT_L14,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": VIT_H14,
    "ldm.models.text_encoder.CLIPTextEncoder": {},
}

# Settings of published YAMLs that this project has no use for: they choose memory tricks, or repeat the only choice.
UNET_IGNORED = ("image_size", "use_checkpoint", "legacy", "use_spatial_transformer", "use_fp16", "dropout",
                "conv_resample", "dims", "num_classes", "use_scale_shift_norm", "resblock_updown",
                "use_new_attention_order", "enable_flash_attention", "enable_fa_with_pad")
VAE_IGNORED = ("lossconfig", "monitor", "ckpt_path")
DD_IGNORED = ("resolution", "attn_resolutions", "dropout")
TEXT_IGNORED = ("freeze", "layer", "device", "max_length", "version", "arch", "use_fp16")

UNET_KEYS = {"in_channels": int, "model_channels": int, "out_channels": int, "num_res_blocks": int,
             "attention_resolutions": list, "channel_mult": list, "num_heads": int, "num_head_channels": int,
             "transformer_depth": int, "context_dim": int, "use_linear_in_transformer": bool, "num_groups": int}
VAE_KEYS = {"embed_dim": int, "ddconfig": dict}
DD_KEYS = {"double_z": bool, "z_channels": int, "in_channels": int, "out_ch": int, "ch": int, "ch_mult": list,
           "num_res_blocks": int, "num_groups": int}
TEXT_KEYS = {"width": int, "num_layers": int, "num_heads": int, "activation": str, "vocab_size": int, "length": int}
OPTIONAL = ("num_heads", "num_head_channels", "transformer_depth", "use_linear_in_transformer", "num_groups",
            "double_z", "vocab_size", "length")
KINDS = {int: "a whole number", bool: "true or false", list: "a list of whole numbers", str: "a word",
         dict: "a section"}
PAD_TOKENS = ("end", "zero")


@dataclass(frozen=True)
class ModelConfig:
    """What the networks are made of, and the numbers that training and sampling must share."""

    path: str
    architecture: str  # "sd1", "sd2", "nano" or "custom"
    prediction_type: str  # "epsilon" or "v_prediction"
    linear_start: float  # first beta
    linear_end: float  # last beta
    timesteps: int
    beta_schedule: str  # "scaled_linear": linear in the square root of beta
    scale_factor: float  # latents are the autoencoder's times this
    image_size: int  # pixels
    latent_channels: int
    vae_factor: int  # pixels a latent pixel, along one side
    context_dim: int
    pad_token: str  # "end": texts are padded with the end token; "zero": with token 0
    unet: dict[str, Any]  # arguments of UNetModel
    vae: dict[str, Any]  # arguments of AutoencoderKL
    text: dict[str, Any]  # arguments of CLIPTextEncoder


def load_model_config(path: str | Path) -> ModelConfig:
    """Read a model YAML.

    Raises:
        UserError: the file is missing or not YAML, a `target` is not in the table, a key is missing or unknown.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model configuration {path}: {error.strerror}; --model_config (or --config) wants a YAML such "
                        "as configs/v1-inference.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"model configuration {path} is not YAML: {' '.join(str(error).split())}") from None
    model = _section(document, "model", path)
    params = _section(model, "params", path, "model.")
    _target(model, DIFFUSION_TARGETS, path, "model")

    unet_section = _section(params, "unet_config", path, "model.params.")
    vae_section = _section(params, "first_stage_config", path, "model.params.")
    text_section = _section(params, "cond_stage_config", path, "model.params.")
    _target(unet_section, UNET_TARGETS, path, "unet_config")
    _target(vae_section, VAE_TARGETS, path, "first_stage_config")
    text_target = _target(text_section, TEXT_TARGETS, path, "cond_stage_config")

    unet = _pick(_section(unet_section, "params", path, "unet_config."), UNET_KEYS, UNET_IGNORED, path, "unet_config")
    vae_params = dict(_section(vae_section, "params", path, "first_stage_config."))
    ddconfig = _section(vae_params, "ddconfig", path, "first_stage_config.params.")
    if ddconfig.get("attn_resolutions"):
        raise UserError(f"model configuration {path}: first_stage_config.params.ddconfig.attn_resolutions must be "
                        "empty, as in every published Stable Diffusion; attention inside the levels is not supported")
    vae = _pick(ddconfig, DD_KEYS, DD_IGNORED, path, "ddconfig")
    vae["embed_dim"] = _pick(vae_params, VAE_KEYS, VAE_IGNORED, path, "first_stage_config")["embed_dim"]
    given = text_section.get("params") or {}
    text = _pick({**TEXT_TARGETS[text_target], **given}, TEXT_KEYS, TEXT_IGNORED, path, "cond_stage_config")
    if given.get("layer") == "penultimate":
        text["num_layers"] -= 1

    parameterization = params.get("parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise UserError(f"model configuration {path}: parameterization is {parameterization!r}; it must be eps or v")
    if "num_heads" not in unet and "num_head_channels" not in unet:
        raise UserError(f"model configuration {path}: unet_config needs num_heads (SD1.x) or num_head_channels (SD2.x)")
    is_openclip = text_target.endswith("FrozenOpenCLIPEmbedder")
    pad_token = model.get("pad_token", "zero" if is_openclip else "end")
    if pad_token not in PAD_TOKENS:
        raise UserError(f"model configuration {path}: pad_token is {pad_token!r}; it must be end or zero")
    vae_factor = 2 ** (len(vae["ch_mult"]) - 1)
    width, context_dim = text["width"], unet["context_dim"]
    if width != context_dim:
        raise UserError(f"model configuration {path}: the text encoder's width {width} is not the UNet's "
                        f"context_dim {context_dim}")
    derived = {768: "sd1", 1024: "sd2"}.get(context_dim, "custom") if unet["model_channels"] == 320 else "custom"
    return ModelConfig(
        path=str(path),
        architecture=model.get("architecture", derived),
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[parameterization],
        linear_start=_number(params, "linear_start", path), linear_end=_number(params, "linear_end", path),
        timesteps=int(_number(params, "timesteps", path)), beta_schedule="scaled_linear",
        scale_factor=_number(params, "scale_factor", path),
        image_size=int(_number(params, "image_size", path)) * vae_factor, latent_channels=vae["embed_dim"],
        vae_factor=vae_factor, context_dim=context_dim, pad_token=pad_token, unet=unet, vae=vae, text=text)


def _section(parent: Any, key: str, path: Path, prefix: str = "") -> dict:
    if not isinstance(parent, dict) or not isinstance(parent.get(key), dict):
        raise UserError(f"model configuration {path}: there is no section {prefix}{key}; is this a model YAML such as "
                        "configs/v1-inference.yaml?")
    return parent[key]


def _target(section: dict, known, path: Path, name: str) -> str:
    target = section.get("target")
    if target not in known:
        raise UserError(f"model configuration {path}: {name}.target is {target!r}; known: {', '.join(known)}")
    return target


def _number(params: dict, key: str, path: Path) -> float:
    if key not in params:
        raise UserError(f"model configuration {path}: the key {key} is missing in model.params")
    try:
        number = float(params[key])  # YAML reads 1e-4 as a word
    except (TypeError, ValueError):
        number = 0.0
    if number <= 0:
        raise UserError(f"model configuration {path}: {key} is {params[key]!r}; it must be a number above 0")
    return number


def _pick(params: dict, kinds: dict[str, type], ignored, path: Path, name: str) -> dict:
    """The keys of `params` that are in `kinds`, each of its kind; all that are not OPTIONAL must be there."""
    for key in params:
        if key not in kinds and key not in ignored:
            raise UserError(f"model configuration {path}: unknown key {key} in {name}")
    for key, kind in kinds.items():
        if key not in params:
            if key not in OPTIONAL:
                raise UserError(f"model configuration {path}: the key {key} is missing in {name}")
            continue
        value = params[key]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is list:
            fits = fits and bool(value) and all(type(entry) is int for entry in value)
        if not fits:
            raise UserError(f"model configuration {path}: {key} in {name} is {value!r}; it must be {KINDS[kind]}")
    return {key: params[key] for key in kinds if key in params}
