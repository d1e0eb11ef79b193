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

UNET_KEYS = ("in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions",
             "channel_mult", "num_heads", "num_head_channels", "transformer_depth", "context_dim",
             "use_linear_in_transformer", "num_groups")
DD_KEYS = ("double_z", "z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "num_groups")
TEXT_KEYS = ("width", "num_layers", "num_heads", "activation", "vocab_size", "length")


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
    outer = _pick(vae_params, ("embed_dim", "ddconfig"), VAE_IGNORED, path, "first_stage_config")
    given = text_section.get("params") or {}
    text = {**TEXT_TARGETS[text_target], **_pick(given, TEXT_KEYS, TEXT_IGNORED, path, "cond_stage_config")}
    if given.get("layer") == "penultimate":
        text["num_layers"] -= 1

    parameterization = params.get("parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise UserError(f"model configuration {path}: parameterization is {parameterization!r}; it must be eps or v")
    try:
        vae["embed_dim"] = outer["embed_dim"]
        vae_factor = 2 ** (len(vae["ch_mult"]) - 1)
        width, context_dim = text["width"], unet["context_dim"]
        if width != context_dim:
            raise UserError(f"model configuration {path}: the text encoder's width {width} is not the UNet's "
                            f"context_dim {context_dim}")
        derived = {768: "sd1", 1024: "sd2"}.get(context_dim, "custom") if unet["model_channels"] == 320 else "custom"
        is_openclip = text_target.endswith("FrozenOpenCLIPEmbedder")
        return ModelConfig(
            path=str(path),
            architecture=model.get("architecture", derived),
            prediction_type={"eps": "epsilon", "v": "v_prediction"}[parameterization],
            linear_start=float(params["linear_start"]), linear_end=float(params["linear_end"]),
            timesteps=int(params["timesteps"]), beta_schedule="scaled_linear",
            scale_factor=float(params["scale_factor"]),
            image_size=int(params["image_size"]) * vae_factor, latent_channels=vae["embed_dim"], vae_factor=vae_factor,
            context_dim=context_dim, pad_token=model.get("pad_token", "zero" if is_openclip else "end"),
            unet=unet, vae=vae, text=text)
    except KeyError as error:
        raise UserError(f"model configuration {path}: the key {error.args[0]} is missing") from None


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


def _pick(params: dict, keys, ignored, path: Path, name: str) -> dict:
    for key in params:
        if key not in keys and key not in ignored:
            raise UserError(f"model configuration {path}: unknown key {key} in {name}")
    return {key: params[key] for key in keys if key in params}
