"""Names of diffusers' UNet and VAE and of transformers' text encoder, as `component/name`.

diffusers numbers levels and layers where the published files number blocks in a row, so the table follows from the
configuration of the model: `channel_mult`, `num_res_blocks` and `attention_resolutions` of ModelConfig.unet, `ch_mult`
and `num_res_blocks` of ModelConfig.vae. It holds for networks of any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm.errors import UserError
from ldm.settings.model import ModelConfig
from ldm.weights.names.tables import (
    NUMBER,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Concatenation,
    count_numbers,
    rename,
)

TEXT_MODEL = "text_model."  # transformers 5 omits it

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
    """Return the module paths of diffusers' UNet -> canonical ones without prefix, for a ModelConfig.unet."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }

    def add_resnet(path: str, canonical: str) -> None:
        table.update({f"{path}.{a}": f"{canonical}.{b}" for a, b in UNET_RESNET.items()})

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
    """Return the module paths of diffusers' AutoencoderKL -> canonical ones without prefix, for a ModelConfig.vae."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, depth = len(vae["ch_mult"]), vae["num_res_blocks"]
    for half, blocks, layers in (("encoder", "down", depth), ("decoder", "up", depth + 1)):
        table[f"{half}.conv_in"] = f"{half}.conv_in"
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table[f"{half}.conv_out"] = f"{half}.conv_out"
        table[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        table[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        for name, canonical in attention.items():
            table[f"{half}.mid_block.attentions.0.{name}"] = f"{half}.mid.attn_1.{canonical}"
        for level in range(levels):
            # Canonical names count the decoder's levels from the image, diffusers counts them from the latents.
            path = f"{half}.{blocks}_blocks.{level if blocks == 'down' else levels - 1 - level}"
            canonical = f"{half}.{blocks}.{level}"
            for layer in range(layers):
                table[f"{path}.resnets.{layer}"] = f"{canonical}.block.{layer}"
                table[f"{path}.resnets.{layer}.conv_shortcut"] = f"{canonical}.block.{layer}.nin_shortcut"
            table[f"{path}.{blocks}samplers.0.conv"] = f"{canonical}.{blocks}sample.conv"
    return table


def key_mapper(keys: Iterable[str]) -> Callable[[str], tuple[str, ...] | None]:
    """Return the map_key function (see ldm.weights.names.tables) for a folder.

    All keys of the folder tell how many levels and layers the networks have.
    """
    keys = list(keys)
    unet, vae = _unet_structure(keys), _vae_structure(keys)
    tables = {
        "unet": {path: UNET_PREFIX + canonical for path, canonical in unet_modules(unet).items()},
        "vae": {
            path: VAE_PREFIX + canonical
            for attention in (VAE_ATTENTION_BEFORE_2023, VAE_ATTENTION)
            for path, canonical in vae_modules(vae, attention).items()
        },
    }

    def map_key(key: str) -> tuple[str, ...] | None:
        component, _, name = key.partition("/")
        if component in tables:
            canonical = rename(name, tables[component])
            return None if canonical is None else (canonical,)
        if component != "text_encoder":
            return None
        return (TEXT_PREFIX + name.removeprefix(TEXT_MODEL),)

    return map_key


def layout(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Concatenation]:
    """Return how the arrays of a diffusers folder are made of canonical ones, given by name and shape.

    The names are those of diffusers 0.42 and transformers 4. Raises UserError if a name does not fit the configuration.
    """
    vae = vae_modules(config.vae) if config.vae else {}  # in pixel space there is none
    tables = {
        "unet": (UNET_PREFIX, {canonical: path for path, canonical in unet_modules(config.unet).items()}),
        "vae": (VAE_PREFIX, {canonical: path for path, canonical in vae.items()}),
    }
    made, unknown = {}, []
    for name, shape in shapes.items():
        if name.startswith(TEXT_PREFIX):
            made[f"text_encoder/{TEXT_MODEL}{name[len(TEXT_PREFIX) :]}"] = Concatenation((name,))
            continue
        component = "unet" if name.startswith(UNET_PREFIX) else "vae"
        prefix, table = tables[component]
        path = rename(name[len(prefix) :], table) if name.startswith(prefix) else None
        if path is None:
            unknown.append(name)
        else:
            # The projections in the VAE's attention are linear layers in diffusers, 1x1 convolutions here.
            linear = tuple(shape[:2]) if ".attn_1." in name and len(shape) == 4 else None
            made[f"{component}/{path}"] = Concatenation((name,), linear)
    if unknown:
        raise UserError(f"{len(unknown)} names do not fit the configuration {config.path}: {', '.join(unknown[:3])}")
    return made


def _unet_structure(keys: list[str]) -> dict[str, Any]:
    attention = re.compile(rf"unet/down_blocks\.{NUMBER}\.attentions\.")
    return {
        "channel_mult": [1] * count_numbers(keys, rf"unet/down_blocks\.{NUMBER}\."),
        "num_res_blocks": count_numbers(keys, rf"unet/down_blocks\.0\.resnets\.{NUMBER}\."),
        "attention_resolutions": {2 ** int(match[1]) for match in map(attention.match, keys) if match},
    }


def _vae_structure(keys: list[str]) -> dict[str, Any]:
    return {
        "ch_mult": [1] * count_numbers(keys, rf"vae/encoder\.down_blocks\.{NUMBER}\."),
        "num_res_blocks": count_numbers(keys, rf"vae/encoder\.down_blocks\.0\.resnets\.{NUMBER}\."),
    }
