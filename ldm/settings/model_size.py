"""The number of parameters of the networks that a model YAML describes, and of a LoRA, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ldm.errors import UserError

MAX_PARAMETERS = 5_000_000_000  # Stable Diffusion 2.x has 1.3 billion


def check_parameters(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], source: str) -> None:
    """Check that the networks together have no more than MAX_PARAMETERS parameters.

    Args:
        unet, vae, text: The arguments of the networks. `vae` is empty in pixel space.
        source: Names the file in errors.

    Raises:
        UserError: They have more.
    """
    total = unet_parameters(**unet) + text_parameters(**text) + (vae_parameters(**vae) if vae else 0)
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
    total = _linear(model_channels, embedding) + _linear(embedding, embedding) + _conv(in_channels, model_channels)
    for part in _unet_parts(model_channels, num_res_blocks, attention_resolutions, channel_mult):
        if part.kind == "residual":
            total += _res_block(part.inputs, part.outputs, embedding)
        elif part.kind == "transformer":
            total += _transformer(part.outputs, context_dim, transformer_depth)
        else:
            total += _conv(part.inputs, part.outputs)
    width = channel_mult[0] * model_channels
    return total + _norm(width) + _conv(width, out_channels)


class _Part(NamedTuple):
    """A part of the UNet between its first and its last convolution."""

    kind: str  # "residual", "transformer", "downsampling" or "upsampling"
    inputs: int  # channels
    outputs: int


def _unet_parts(
    model_channels: int, num_res_blocks: int, attention_resolutions: Sequence[int], channel_mult: Sequence[int]
) -> Iterator[_Part]:
    widths = [mult * model_channels for mult in channel_mult]

    def block(inputs: int, level: int) -> Iterator[_Part]:
        yield _Part("residual", inputs, widths[level])
        if 2**level in attention_resolutions:
            yield _Part("transformer", widths[level], widths[level])

    width, skips = model_channels, [model_channels]
    for level in range(len(widths)):
        for _ in range(num_res_blocks):
            yield from block(width, level)
            width = widths[level]
            skips.append(width)
        if level < len(widths) - 1:
            yield _Part("downsampling", width, width)
            skips.append(width)
    yield _Part("residual", width, width)
    yield _Part("transformer", width, width)
    yield _Part("residual", width, width)
    for level in reversed(range(len(widths))):
        for _ in range(num_res_blocks + 1):
            yield from block(width + skips.pop(), level)
            width = widths[level]
        if level:
            yield _Part("upsampling", width, width)


class LoRASize(NamedTuple):
    """A layer that a LoRA may be added to. With rank r, the LoRA has r * (inputs + outputs) parameters."""

    name: str  # its last parts, as lora_targets names layers
    inputs: int  # values that an output is computed from
    outputs: int  # channels
    in_attention: bool  # whether it is one of the group "attention" of lora_targets; all are in the group "all"
    kernel_size: int = 1
    in_residual: bool = False  # whether it is one of the layers that conv_dim adds

    def parameters(self, algo: str, rank: int, factor: int = -1, tucker: bool = False) -> int:
        """Return the parameters of a LoRA of this layer, without DoRA's `outputs` magnitudes.

        Args:
            algo: "lora", "loha" or "lokr".
            rank: The rank.
            factor: LoKr's.
            tucker: Whether larger convolutions are in Tucker's form.
        """
        pixels = self.kernel_size**2
        channels = self.inputs // pixels
        if algo == "lokr":
            (out1, out2), (in1, in2) = factorization(self.outputs, factor), factorization(channels, factor)
            if rank >= max(out2, in2) / 2:
                return out1 * in1 + out2 * in2 * pixels
            return out1 * in1 + _pair_parameters(out2, in2, pixels, rank, tucker)
        return (2 if algo == "loha" else 1) * _pair_parameters(self.outputs, channels, pixels, rank, tucker)


def _pair_parameters(outputs: int, channels: int, pixels: int, rank: int, tucker: bool) -> int:
    if tucker and pixels > 1:
        return rank * (outputs + channels + rank * pixels)
    return rank * (outputs + channels * pixels)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Divide a number of channels into two factors m <= n, by the rule of LyCORIS.

    Args:
        size: The number.
        factor: One of them if it divides the number, else the largest m that is allowed. -1: the most equal ones.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    m = max(i for i in range(1, int(size**0.5) + 1) if size % i == 0 and i <= limit)
    return m, size // m


def unet_lora_sizes(
    model_channels: int,
    num_res_blocks: int,
    attention_resolutions: list[int],
    channel_mult: list[int],
    context_dim: int,
    transformer_depth: int = 1,
    **others: Any,
) -> Iterator[LoRASize]:
    """Return the layers of UNetModel that a LoRA may be added to."""
    for part in _unet_parts(model_channels, num_res_blocks, attention_resolutions, channel_mult):
        inputs, width = part.inputs, part.outputs
        if part.kind == "residual":
            yield LoRASize("in_layers.2", 9 * inputs, width, False, 3, True)
            yield LoRASize("emb_layers.1", 4 * model_channels, width, False, 1, True)
            yield LoRASize("out_layers.3", 9 * width, width, False, 3, True)
            if inputs != width:
                yield LoRASize("skip_connection", inputs, width, False, 1, True)
        elif part.kind == "transformer":
            yield LoRASize("proj_in", width, width, False)
            yield LoRASize("proj_out", width, width, False)
            for _ in range(transformer_depth):
                for attention, keys in (("attn1", width), ("attn2", context_dim)):
                    yield LoRASize(f"{attention}.to_q", width, width, True)
                    yield LoRASize(f"{attention}.to_k", keys, width, True)
                    yield LoRASize(f"{attention}.to_v", keys, width, True)
                    yield LoRASize(f"{attention}.to_out.0", width, width, True)
                yield LoRASize("ff.net.0.proj", width, 8 * width, False)
                yield LoRASize("ff.net.2", 4 * width, width, False)
        else:
            yield LoRASize("op" if part.kind == "downsampling" else "conv", 9 * inputs, width, False, 3, True)


def text_lora_sizes(width: int, num_layers: int, **others: Any) -> Iterator[LoRASize]:
    """Return the layers of CLIPTextEncoder that a LoRA may be added to."""
    for _ in range(num_layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield LoRASize(f"self_attn.{name}", width, width, True)
        yield LoRASize("mlp.fc1", width, 4 * width, False)
        yield LoRASize("mlp.fc2", 4 * width, width, False)


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
    bottom = widths[-1]

    def levels(inputs: list[int], outputs: list[int], blocks: int) -> int:
        pairs = zip(inputs, outputs)
        return sum(_res_block(before, after) + (blocks - 1) * _res_block(after, after) for before, after in pairs)

    encoder = _conv(in_channels, ch) + levels([ch, *widths], widths, num_res_blocks)
    encoder += sum(_conv(width, width) for width in widths[:-1]) + _norm(bottom) + _conv(bottom, 2 * z_channels)
    decoder = _conv(z_channels, bottom) + levels([bottom, *widths[::-1]], widths[::-1], num_res_blocks + 1)
    decoder += sum(_conv(width, width) for width in widths[1:]) + _norm(widths[0]) + _conv(widths[0], out_ch)
    middle = 2 * _res_block(bottom, bottom) + _norm(bottom) + 4 * _linear(bottom, bottom)  # of both
    return encoder + decoder + 2 * middle + _linear(2 * z_channels, 2 * embed_dim) + _linear(embed_dim, z_channels)


def text_parameters(width: int, num_layers: int, vocab_size: int = 49408, length: int = 77, **others: Any) -> int:
    """Return the number of parameters of CLIPTextEncoder."""
    layer = 4 * _linear(width, width) + _linear(width, 4 * width) + _linear(4 * width, width) + 2 * _norm(width)
    return (vocab_size + length) * width + num_layers * layer + _norm(width)


def _res_block(inputs: int, outputs: int, embedding: int = 0) -> int:
    """Return the parameters of a residual block, with a projection of the time embedding if that has a width."""
    count = _norm(inputs) + _conv(inputs, outputs) + _norm(outputs) + _conv(outputs, outputs)
    count += _linear(embedding, outputs) if embedding else 0
    return count + (_linear(inputs, outputs) if inputs != outputs else 0)


def _transformer(width: int, context_dim: int, depth: int) -> int:
    attention = width * width + _linear(width, width)  # to_q and to_out
    block = 2 * attention + 2 * width * width + 2 * context_dim * width  # to_k and to_v of both
    block += _linear(width, 8 * width) + _linear(4 * width, width) + 3 * _norm(width)
    return _norm(width) + 2 * _linear(width, width) + depth * block


def _conv(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def _linear(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a linear layer or a 1x1 convolution."""
    return inputs * outputs + outputs


def _norm(channels: int) -> int:
    return 2 * channels
