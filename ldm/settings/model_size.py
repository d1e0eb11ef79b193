"""How large the networks of a model YAML would be: bounded before anything is built."""

from __future__ import annotations

from typing import Any

from ldm.errors import UserError, plain

# The largest value of each size, far above every published model's: what is beyond is a slip or a trap.
MOST = {
    "in_channels": 128, "out_channels": 128, "out_ch": 128, "embed_dim": 128, "z_channels": 512,
    "model_channels": 8192, "ch": 4096, "channel_mult": 64, "ch_mult": 64, "attention_resolutions": 1024,
    "num_res_blocks": 16, "transformer_depth": 32, "num_groups": 8192, "num_heads": 1024, "num_head_channels": 8192,
    "context_dim": 16384, "width": 16384, "num_layers": 128, "vocab_size": 1_000_000, "length": 1024,
}  # fmt: skip
MOST_LEVELS = 10  # entries of a list
MOST_PARAMETERS = 5_000_000_000  # Stable Diffusion 2.x has 1.3 billion


def check_size(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], where: str) -> None:
    """Raise UserError where a size is above MOST, or the networks together above MOST_PARAMETERS.

    unet, vae, text: arguments of the networks, whole numbers as ldm.settings.model reads them. where: for errors.
    """
    for name, params in (("unet_config", unet), ("ddconfig", vae), ("cond_stage_config", text)):
        for key, value in params.items():
            if isinstance(value, list) and len(value) > MOST_LEVELS:
                raise UserError(
                    f"{where}: {key} in {name} has {len(value):,} entries; it may have {MOST_LEVELS} at most"
                )
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int and number > MOST[key]:
                    raise UserError(f"{where}: {key} in {name} is {plain(number, 40)}; it may be {MOST[key]:,} at most")
    total = unet_parameters(**unet) + vae_parameters(**vae) + text_parameters(**text)
    if total > MOST_PARAMETERS:
        raise UserError(
            f"{where}: the networks would have {total:,} parameters; {MOST_PARAMETERS:,} is the most: lower "
            "model_channels, channel_mult, num_res_blocks or transformer_depth in unet_config, ch or ch_mult in "
            "ddconfig, or width or num_layers in cond_stage_config"
        )


def unet_parameters(
    in_channels: int,
    model_channels: int,
    out_channels: int,
    num_res_blocks: int,
    attention_resolutions: list[int],
    channel_mult: list[int],
    context_dim: int,
    transformer_depth: int = 1,
    **others: Any,
) -> int:
    """The number of parameters of UNetModel."""
    embedding = 4 * model_channels
    widths = [mult * model_channels for mult in channel_mult]

    def block(inputs: int, outputs: int, attends: bool) -> int:
        count = _norm(inputs) + _conv(inputs, outputs) + _dense(embedding, outputs) + _norm(outputs)
        count += _conv(outputs, outputs) + (_dense(inputs, outputs) if inputs != outputs else 0)
        return count + (_transformer(outputs, context_dim, transformer_depth) if attends else 0)

    total = _dense(model_channels, embedding) + _dense(embedding, embedding) + _conv(in_channels, model_channels)
    width, skips = model_channels, [model_channels]
    for level, outputs in enumerate(widths):
        for _ in range(num_res_blocks):
            total += block(width, outputs, 2**level in attention_resolutions)
            width = outputs
            skips.append(width)
        if level < len(widths) - 1:
            total += _conv(width, width)
            skips.append(width)
    total += block(width, width, True) + block(width, width, False)
    for level, outputs in reversed(list(enumerate(widths))):
        for _ in range(num_res_blocks + 1):
            total += block(width + skips.pop(), outputs, 2**level in attention_resolutions)
            width = outputs
        if level:
            total += _conv(width, width)
    return total + _norm(width) + _conv(width, out_channels)


def vae_parameters(
    embed_dim: int,
    in_channels: int,
    out_ch: int,
    ch: int,
    ch_mult: list[int],
    num_res_blocks: int,
    z_channels: int,
    **others: Any,
) -> int:
    """The number of parameters of AutoencoderKL."""
    widths = [mult * ch for mult in ch_mult]

    def block(inputs: int, outputs: int) -> int:
        count = _norm(inputs) + _conv(inputs, outputs) + _norm(outputs) + _conv(outputs, outputs)
        return count + (_dense(inputs, outputs) if inputs != outputs else 0)

    def middle(width: int) -> int:
        return 2 * block(width, width) + _norm(width) + 4 * _dense(width, width)

    total, width = _conv(in_channels, ch), ch
    for level, outputs in enumerate(widths):
        for _ in range(num_res_blocks):
            total += block(width, outputs)
            width = outputs
        if level < len(widths) - 1:
            total += _conv(width, width)
    total += middle(width) + _norm(width) + _conv(width, 2 * z_channels)
    width = widths[-1]
    total += _conv(z_channels, width) + middle(width)
    for level, outputs in reversed(list(enumerate(widths))):
        for _ in range(num_res_blocks + 1):
            total += block(width, outputs)
            width = outputs
        if level:
            total += _conv(width, width)
    total += _norm(width) + _conv(width, out_ch)
    return total + _dense(2 * z_channels, 2 * embed_dim) + _dense(embed_dim, z_channels)


def text_parameters(width: int, num_layers: int, vocab_size: int = 49408, length: int = 77, **others: Any) -> int:
    """The number of parameters of CLIPTextEncoder."""
    layer = 4 * _dense(width, width) + _dense(width, 4 * width) + _dense(4 * width, width) + 2 * _norm(width)
    return (vocab_size + length) * width + num_layers * layer + _norm(width)


def _transformer(width: int, context_dim: int, depth: int) -> int:
    attention = width * width + _dense(width, width)  # to_q and to_out
    block = 2 * attention + 2 * width * width + 2 * context_dim * width  # to_k and to_v of both
    block += _dense(width, 8 * width) + _dense(4 * width, width) + 3 * _norm(width)
    return _norm(width) + 2 * _dense(width, width) + depth * block


def _conv(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def _dense(inputs: int, outputs: int) -> int:
    """Of a 1x1 convolution too."""
    return inputs * outputs + outputs


def _norm(channels: int) -> int:
    return 2 * channels
