"""The denoising UNet of latent diffusion (Rombach et al. 2022), with the published names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.models.attention import LinearSpatialTransformer, SpatialTransformer
from ldm.models.layers import Conv2d, GroupNorm, Linear
from ldm.ops import RepeatedCell, Sequential, add, broadcast_add, fork, identity, shared_cell, silu, upsample2x


class InputBlock(nn.SequentialCell):
    """The first convolution, with the arguments of a TimestepBlock."""

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.cell_list[0](x)


class ResBlock(nn.Cell):
    """Two convolutions with the time embedding added between them. The result is added to the input.

    construct(x (N, in_channels, H, W), emb (N, emb_channels), context (not used)) -> (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, emb_channels: int, out_channels: int, num_groups: int = 32):
        super().__init__()
        self.in_layers = Sequential(
            GroupNorm(in_channels, num_groups), silu(), Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = Sequential(silu(), Linear(emb_channels, out_channels))
        self.out_layers = Sequential(
            GroupNorm(out_channels, num_groups), silu(), identity(), Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip_connection = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else identity()
        self.broadcast_add, self.fork = broadcast_add(), fork()

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x, h = self.fork(x)
        shift = self.emb_layers(emb)
        h = self.broadcast_add(self.in_layers(h), shift.reshape(shift.shape + (1, 1)))
        return add(self.skip_connection(x), self.out_layers(h))


class Downsample(nn.Cell):
    """A 3x3 convolution with stride 2, which halves height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Cell):
    """Nearest-neighbour doubling of height and width, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.double = upsample2x()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.conv(self.double(x))


class PassThrough(nn.Cell):
    """(x, emb, context) -> x."""

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return x


class TimestepBlock(nn.SequentialCell):
    """One to three cells that are called one after the other with (x, emb, context).

    They are filled up to three with PassThrough and called without a loop, as in `ldm.ops.Sequential`.
    """

    def __init__(self, *cells: nn.Cell):
        super().__init__([*cells, *[shared_cell(PassThrough)] * (3 - len(cells))])

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.cell_list[0](x, emb, context)
        x = self.cell_list[1](x, emb, context)
        return self.cell_list[2](x, emb, context)


class TimestepEmbedding(nn.Cell):
    """Sinusoidal embedding: timesteps (N,) -> [cos, sin] of t / 10000^(i / half) for i < half = dim / 2, (N, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.half = dim // 2
        frequencies = np.exp(-math.log(10000.0) * np.arange(self.half, dtype=np.float64) / self.half)
        self.frequencies = Tensor(frequencies.astype(np.float32).reshape(1, self.half))
        self.cos, self.sin, self.concat = ops.Cos(), ops.Sin(), ops.Concat(-1)

    def construct(self, timesteps: Tensor) -> Tensor:
        shape = (timesteps.shape[0], self.half)
        # Both are broadcast explicitly, as in `ldm.ops.broadcast_add`.
        timesteps = ops.broadcast_to(timesteps.astype(ms.float32).reshape(-1, 1), shape)
        angles = timesteps * ops.broadcast_to(self.frequencies, shape)
        return self.concat((self.cos(angles), self.sin(angles)))


class UNetModel(RepeatedCell):
    """Predicts noise or velocity from noisy latents.

    construct(latents (N, in_channels, h, w), timesteps (N,), context (N, tokens, context_dim)) -> fp32
    (N, out_channels, h, w).

    The arguments are those of `unet_config.params` in the published YAMLs.

    Args:
        in_channels: Channels of the noisy latents.
        model_channels: Channels of the first level.
        out_channels: Channels of the prediction.
        num_res_blocks: ResBlocks of a level, one more in the second half.
        attention_resolutions: Factors of downsampling at which there is a transformer after each ResBlock.
        channel_mult: Channels of each level as multiples of model_channels.
        num_heads: Heads of each attention (SD1.x).
        num_head_channels: Channels of a head (SD2.x), instead of num_heads.
        transformer_depth: Blocks of a transformer.
        context_dim: Channels of the text embeddings.
        use_linear_in_transformer: Whether the transformers' projections are linear layers (SD2.x).
        num_groups: Groups of each GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        context_dim: int,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int = 1,
        use_linear_in_transformer: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        emb_channels = 4 * model_channels

        def res_block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, emb_channels, out_channels, num_groups)

        def transformer(channels: int) -> SpatialTransformer:
            head_dim = num_head_channels if num_head_channels > 0 else channels // num_heads
            cell_type = LinearSpatialTransformer if use_linear_in_transformer else SpatialTransformer
            return cell_type(channels, channels // head_dim, head_dim, transformer_depth, context_dim, num_groups)

        self.dtype = ms.float32
        self.embed_timesteps = TimestepEmbedding(model_channels)
        self.time_embed = Sequential(Linear(model_channels, emb_channels), silu(), Linear(emb_channels, emb_channels))

        channels, downsampling = model_channels, 1
        input_blocks: list[nn.Cell] = [InputBlock([Conv2d(in_channels, channels, 3, padding=1)])]
        skip_channels = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                cells: list[nn.Cell] = [res_block(channels, mult * model_channels)]
                channels = mult * model_channels
                if downsampling in attention_resolutions:
                    cells.append(transformer(channels))
                input_blocks.append(TimestepBlock(*cells))
                skip_channels.append(channels)
            if level != len(channel_mult) - 1:
                input_blocks.append(TimestepBlock(Downsample(channels)))
                skip_channels.append(channels)
                downsampling *= 2
        self.input_blocks = nn.CellList(input_blocks)

        self.middle_block = TimestepBlock(
            res_block(channels, channels), transformer(channels), res_block(channels, channels)
        )

        output_blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                cells = [res_block(channels + skip_channels.pop(), mult * model_channels)]
                channels = mult * model_channels
                if downsampling in attention_resolutions:
                    cells.append(transformer(channels))
                if level and i == num_res_blocks:
                    cells.append(Upsample(channels))
                    downsampling //= 2
                output_blocks.append(TimestepBlock(*cells))
        self.output_blocks = nn.CellList(output_blocks)

        self.out = Sequential(GroupNorm(channels, num_groups), silu(), Conv2d(channels, out_channels, 3, padding=1))
        self.concat_channels, self.fork = ops.Concat(1), fork()

    def construct(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        h, emb, context = self.block_inputs(latents, timesteps, context)
        skips: tuple[Tensor, ...] = ()
        for block in self.input_blocks:
            h, skip = self.fork(block(h, emb, context))
            skips = skips + (skip,)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(self.concat_channels((h, skips[-1])), emb, context)
            skips = skips[:-1]
        return self.out(h).astype(ms.float32)

    def block_inputs(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the blocks take, in the network's type.

        These are the latents, the time embeddings (N, 4 * model_channels), and the context (N * tokens, context_dim).
        """
        emb = self.time_embed(self.embed_timesteps(timesteps))
        # The number of latents gives the shape, so that a context for another number of images is an error.
        context = context.astype(self.dtype).reshape(latents.shape[0] * context.shape[1], context.shape[2])
        return latents.astype(self.dtype), emb, context
