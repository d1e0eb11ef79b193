"""The number of parameters of the networks that a model YAML describes, checked before anything is built."""

from __future__ import annotations

from typing import Any

from ldm.errors import UserError

MAX_PARAMETERS = 5_000_000_000  # Stable Diffusion 2.x has 1.3 billion


def check_parameters(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], source: str) -> None:
    """Check that the networks together have no more than MAX_PARAMETERS parameters.

    Args:
        unet, vae, text: The arguments of the networks.
        source: Names the file in errors.

    Raises:
        UserError: They have more.
    """
    total = unet_parameters(**unet) + vae_parameters(**vae) + text_parameters(**text)
    if total > MAX_PARAMETERS:
        raise UserError(
            f"{source}: the networks would have {total:,} parameters; {MAX_PARAMETERS:,} is the most: lower "
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
    """Return the number of parameters of UNetModel."""
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
    """Return the number of parameters of AutoencoderKL."""
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
    """Return the number of parameters of CLIPTextEncoder."""
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
    """Return the number of parameters of a linear layer or a 1x1 convolution."""
    return inputs * outputs + outputs


def _norm(channels: int) -> int:
    return 2 * channels
