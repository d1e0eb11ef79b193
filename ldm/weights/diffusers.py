"""diffusers' UNet and VAE and transformers' text encoder: their names to and from the canonical ones.

diffusers numbers levels and layers where the published files number blocks in a row, so the table follows from the
model's configuration: `channel_mult`, `num_res_blocks`, `attention_resolutions` (ModelConfig.unet), `ch_mult`,
`num_res_blocks` (ModelConfig.vae). It holds for any size of network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm.config.model import ModelConfig
from ldm.errors import UserError
from ldm.weights.placing import TEXT_PREFIX, rename

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ATTENTION_BEFORE_2023 = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def unet_modules(unet: Mapping[str, Any]) -> dict[str, str]:
    """Leading module paths of diffusers' UNet -> the canonical ones without their prefix, for ModelConfig.unet."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }

    def add_resnet(theirs: str, ours: str) -> None:
        table.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in UNET_RESNET.items()})

    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    levels, layers = len(unet["channel_mult"]), unet["num_res_blocks"]
    block = 1
    for level in range(levels):
        for layer in range(layers):
            add_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            if 2**level in unet["attention_resolutions"]:
                table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        if level < levels - 1:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for up, level in enumerate(reversed(range(levels))):
        attends = 2**level in unet["attention_resolutions"]
        for layer in range(layers + 1):
            add_resnet(f"up_blocks.{up}.resnets.{layer}", f"output_blocks.{block}.0")
            if attends:
                table[f"up_blocks.{up}.attentions.{layer}"] = f"output_blocks.{block}.1"
            if level and layer == layers:
                table[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{block}.{2 if attends else 1}.conv"
            block += 1
    return table


def vae_modules(vae: Mapping[str, Any], attention: Mapping[str, str] = VAE_ATTENTION) -> dict[str, str]:
    """Leading module paths of diffusers' AutoencoderKL -> the canonical ones without their prefix."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, depth = len(vae["ch_mult"]), vae["num_res_blocks"]
    for half, blocks, layers in (("encoder", "down", depth), ("decoder", "up", depth + 1)):
        table[f"{half}.conv_in"] = f"{half}.conv_in"
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table[f"{half}.conv_out"] = f"{half}.conv_out"
        table[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        table[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        for theirs, ours in attention.items():
            table[f"{half}.mid_block.attentions.0.{theirs}"] = f"{half}.mid.attn_1.{ours}"
        for level in range(levels):
            # The decoder's levels are counted from the image here, from the latent there.
            theirs = f"{half}.{blocks}_blocks.{level if blocks == 'down' else levels - 1 - level}"
            ours = f"{half}.{blocks}.{level}"
            for layer in range(layers):
                table[f"{theirs}.resnets.{layer}"] = f"{ours}.block.{layer}"
                table[f"{theirs}.resnets.{layer}.conv_shortcut"] = f"{ours}.block.{layer}.nin_shortcut"
            table[f"{theirs}.{blocks}samplers.0.conv"] = f"{ours}.{blocks}sample.conv"
    return table


def diffusers_to_canonical(
    unet: Mapping[str, np.ndarray], vae: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray], config: ModelConfig
) -> dict[str, np.ndarray]:
    """State dictionaries of diffusers' UNet2DConditionModel and AutoencoderKL and of transformers' CLIPTextModel (with
    or without its `text_model.`), under their canonical names. Any of the three may be empty.

    The VAE's attention comes as linear layers (a, b) where the canonical one is a 1x1 convolution: reshaped here, as
    are older files the other way round. Raises UserError if a key is not known.
    """
    unet_table = unet_modules(config.unet)
    vae_table = {**vae_modules(config.vae, VAE_ATTENTION_BEFORE_2023), **vae_modules(config.vae)}
    canonical, unknown = {}, []
    for prefix, table, arrays in ((UNET_PREFIX, unet_table, unet), (VAE_PREFIX, vae_table, vae)):
        for key, array in arrays.items():
            name = rename(key, table)
            if name is None:
                unknown.append(key)
            else:
                canonical[prefix + name] = _as_1x1(array) if ".attn_1." in name else array
    for key, array in text.items():
        if not key.endswith("embeddings.position_ids"):
            canonical[TEXT_PREFIX + (key[len("text_model.") :] if key.startswith("text_model.") else key)] = array
    if unknown:
        raise UserError(
            f"{len(unknown)} names do not fit the configuration {config.path}: {', '.join(unknown[:3])}; "
            "is this another architecture?"
        )
    return canonical


def canonical_to_diffusers(
    canonical: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The reverse: (unet, vae, text) state dictionaries with the names of diffusers 0.42 and transformers 4
    (`text_model.` in front). Raises UserError if a key is not known."""
    unet_table = {ours: theirs for theirs, ours in unet_modules(config.unet).items()}
    vae_table = {ours: theirs for theirs, ours in vae_modules(config.vae).items()}
    unet, vae, text, unknown = {}, {}, {}, []
    for key, array in canonical.items():
        if key.startswith(TEXT_PREFIX):
            text["text_model." + key[len(TEXT_PREFIX) :]] = array
            continue
        is_unet = key.startswith(UNET_PREFIX)
        name = rename(key[len(UNET_PREFIX) :], unet_table) if is_unet else rename(key[len(VAE_PREFIX) :], vae_table)
        if name is None or not (is_unet or key.startswith(VAE_PREFIX)):
            unknown.append(key)
        elif is_unet:
            unet[name] = array
        else:
            vae[name] = array.reshape(array.shape[:2]) if ".attn_1." in key and array.ndim == 4 else array
    if unknown:
        raise UserError(f"{len(unknown)} names do not fit the configuration {config.path}: {', '.join(unknown[:3])}")
    return unet, vae, text


def _as_1x1(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape, 1, 1) if array.ndim == 2 else array
