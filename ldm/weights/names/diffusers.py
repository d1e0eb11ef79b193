"""diffusers' UNet and VAE and transformers' text encoder: their names to and from the canonical ones.

diffusers numbers levels and layers where the published files number blocks in a row, so the table follows from the
model's configuration: `channel_mult`, `num_res_blocks`, `attention_resolutions` (ModelConfig.unet), `ch_mult`,
`num_res_blocks` (ModelConfig.vae). It holds for any size of network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Callable

from ldm.errors import UserError
from ldm.settings.model import ModelConfig
from ldm.weights.names.tables import TEXT_PREFIX, Concatenation, Target, rename

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_MODEL = "text_model."  # transformers 5 leaves it out

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
# Of a level or a layer: at most 63, a name with a larger number has no place.
_NUMBER = r"([0-9]|[1-5][0-9]|6[0-3])"


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


def key_mapper(names: Iterable[str]) -> Callable[[str], list[Target] | None]:
    """The function that says where a key of a diffusers folder (`component/name`) goes; `names` are all keys: they tell
    how many levels and layers the networks have.
    """
    names = list(names)
    tables = {
        "unet": {theirs: UNET_PREFIX + ours for theirs, ours in unet_modules(_unet_structure(names)).items()},
        "vae": {
            theirs: VAE_PREFIX + ours
            for attention in (VAE_ATTENTION_BEFORE_2023, VAE_ATTENTION)
            for theirs, ours in vae_modules(_vae_structure(names), attention).items()
        },
    }

    def place(key: str) -> list[Target] | None:
        component, _, name = key.partition("/")
        if component in tables:
            canonical = rename(name, tables[component])
            return None if canonical is None else [Target(canonical)]
        if component != "text_encoder":
            return None
        return [Target(TEXT_PREFIX + (name[len(TEXT_MODEL) :] if name.startswith(TEXT_MODEL) else name))]

    return place


def _unet_structure(names: list[str]) -> dict[str, Any]:
    levels = _count(names, rf"unet/down_blocks\.{_NUMBER}\.")
    attention = re.compile(rf"unet/down_blocks\.{_NUMBER}\.attentions\.")
    attends = {int(found[1]) for found in map(attention.match, names) if found}
    return {
        "channel_mult": [1] * levels,
        "num_res_blocks": _count(names, rf"unet/down_blocks\.0\.resnets\.{_NUMBER}\."),
        "attention_resolutions": [2**level for level in attends],
    }


def _vae_structure(names: list[str]) -> dict[str, Any]:
    return {
        "ch_mult": [1] * _count(names, rf"vae/encoder\.down_blocks\.{_NUMBER}\."),
        "num_res_blocks": _count(names, rf"vae/encoder\.down_blocks\.0\.resnets\.{_NUMBER}\."),
    }


def _count(names: list[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the beginning of a name."""
    found = re.compile(pattern)
    return max((int(match[1]) for match in map(found.match, names) if match), default=-1) + 1


def layout(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Concatenation]:
    """Key of a diffusers folder (`component/name`; names of diffusers 0.42 and transformers 4) -> what of the canonical
    arrays, given by name and shape, it is made of. Raises UserError for a name that `config` has no place for.
    """
    tables = {
        "unet": (UNET_PREFIX, {ours: theirs for theirs, ours in unet_modules(config.unet).items()}),
        "vae": (VAE_PREFIX, {ours: theirs for theirs, ours in vae_modules(config.vae).items()}),
    }
    made, unknown = {}, []
    for name, shape in shapes.items():
        if name.startswith(TEXT_PREFIX):
            made[f"text_encoder/{TEXT_MODEL}{name[len(TEXT_PREFIX) :]}"] = Concatenation((name,))
            continue
        component = "unet" if name.startswith(UNET_PREFIX) else "vae"
        prefix, table = tables[component]
        theirs = rename(name[len(prefix) :], table) if name.startswith(prefix) else None
        if theirs is None:
            unknown.append(name)
        else:
            made[f"{component}/{theirs}"] = Concatenation(
                (name,), tuple(shape[:2]) if is_vae_projection(name, shape) else None
            )
    if unknown:
        raise UserError(f"{len(unknown)} names do not fit the configuration {config.path}: {', '.join(unknown[:3])}")
    return made


def is_vae_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a canonical array is a 1x1 convolution of the VAE's attention, which diffusers has as a linear layer."""
    return ".attn_1." in name and len(shape) == 4
