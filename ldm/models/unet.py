"""The denoising UNet of latent diffusion (Rombach et al. 2022), with the published names."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.models.attention import SpatialTransformer
from ldm.models.layers import Conv2d, GroupNorm, Identity, Linear, Upsample2x
from ldm.ops import RepeatedCell, add, broadcast_add, silu

# Every member of a block takes (x, emb, context) and uses what it needs, so that a block calls them all alike.


class InputConv(Conv2d):
    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return super().construct(x)


class ResBlock(nn.Cell):
    """x (N, in, H, W) and the time embedding emb (N, emb_channels) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, emb_channels: int, out_channels: int, num_groups: int = 32):
        super().__init__()
        self.silu = silu()
        self.in_layers = nn.SequentialCell(
            [GroupNorm(in_channels, num_groups), self.silu, Conv2d(in_channels, out_channels, 3, padding=1)]
        )
        self.emb_layers = nn.SequentialCell([self.silu, Linear(emb_channels, out_channels)])
        self.out_layers = nn.SequentialCell(
            [
                GroupNorm(out_channels, num_groups),
                self.silu,
                Identity(),
                Conv2d(out_channels, out_channels, 3, padding=1),
            ]
        )
        self.skip_connection = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else Identity()
        self.add_shift = broadcast_add()

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        # cell by cell: walking over a SequentialCell is three functions a cell for the compiler
        h = self.in_layers[2](self.silu(self.in_layers[0](x)))
        shift = self.emb_layers[1](self.silu(emb))
        h = self.add_shift(h, shift.reshape(shift.shape + (1, 1)))
        return add(self.skip_connection(x), self.out_layers[3](self.silu(self.out_layers[0](h))))


class Downsample(nn.Cell):
    """Strided 3x3 convolution that halves height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Cell):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.double = Upsample2x()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.conv(self.double(x))


class Block(nn.SequentialCell):
    """One entry of input_blocks, middle_block or output_blocks; `block_of` makes it. Each number of members has its own
    class, because a walk over them would be three functions a member for the compiler.
    """


class BlockOfOne(Block):
    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.cell_list[0](x, emb, context)


class BlockOfTwo(Block):
    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.cell_list[1](self.cell_list[0](x, emb, context), emb, context)


class BlockOfThree(Block):
    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.cell_list[1](self.cell_list[0](x, emb, context), emb, context)
        return self.cell_list[2](x, emb, context)


def block_of(*members: nn.Cell) -> Block:
    """The block of one to three members."""
    kinds = {1: BlockOfOne, 2: BlockOfTwo, 3: BlockOfThree}
    return kinds[len(members)](list(members))


class TimestepEmbedding(nn.Cell):
    """Timesteps (N,) -> [cos, sin] of t / 10000^(i / half), (N, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.half = half
        self.frequencies = Tensor(
            np.exp(-math.log(10000.0) * np.arange(half, dtype=np.float64) / half).astype(np.float32).reshape(1, half)
        )
        self.cos, self.sin, self.concat = ops.Cos(), ops.Sin(), ops.Concat(-1)

    def construct(self, timesteps: Tensor) -> Tensor:
        shape = (timesteps.shape[0], self.half)
        angles = ops.broadcast_to(timesteps.astype(ms.float32).reshape(-1, 1), shape) * ops.broadcast_to(
            self.frequencies, shape
        )
        return self.concat((self.cos(angles), self.sin(angles)))


class UNetModel(RepeatedCell):
    """Predicts noise or velocity from a noised latent.

    The parameters are those of `unet_config.params` in the published YAMLs. `num_heads` heads a layer (SD1.x), or
    `num_head_channels` channels a head (SD2.x).

    construct(latents (N, in_channels, h, w), timesteps (N,), context (N, tokens, context_dim)) -> fp32
    (N, out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions,
        channel_mult=(1, 2, 4, 8),
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        use_linear_in_transformer: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()

        def transformer(channels: int) -> SpatialTransformer:
            head_dim = num_head_channels if num_head_channels > 0 else channels // num_heads
            return SpatialTransformer(
                channels,
                channels // head_dim,
                head_dim,
                transformer_depth,
                context_dim,
                use_linear_in_transformer,
                num_groups,
            )

        emb = 4 * model_channels
        self.dtype = ms.float32
        self.embed_timesteps = TimestepEmbedding(model_channels)
        self.time_embed = nn.SequentialCell([Linear(model_channels, emb), silu(), Linear(emb, emb)])

        channels = model_channels
        input_blocks, skips, downsampling = [block_of(InputConv(in_channels, channels, 3, padding=1))], [channels], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                members = [ResBlock(channels, emb, mult * model_channels, num_groups)]
                channels = mult * model_channels
                if downsampling in attention_resolutions:
                    members.append(transformer(channels))
                input_blocks.append(block_of(*members))
                skips.append(channels)
            if level != len(channel_mult) - 1:
                input_blocks.append(block_of(Downsample(channels)))
                skips.append(channels)
                downsampling *= 2
        self.input_blocks = nn.CellList(input_blocks)

        self.middle_block = block_of(
            ResBlock(channels, emb, channels, num_groups),
            transformer(channels),
            ResBlock(channels, emb, channels, num_groups),
        )

        output_blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                members = [ResBlock(channels + skips.pop(), emb, mult * model_channels, num_groups)]
                channels = mult * model_channels
                if downsampling in attention_resolutions:
                    members.append(transformer(channels))
                if level and i == num_res_blocks:
                    members.append(Upsample(channels))
                    downsampling //= 2
                output_blocks.append(block_of(*members))
        self.output_blocks = nn.CellList(output_blocks)

        self.out = nn.SequentialCell(
            [GroupNorm(channels, num_groups), silu(), Conv2d(channels, out_channels, 3, padding=1)]
        )
        self.concat_channels = ops.Concat(1)

    def construct(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(self.embed_timesteps(timesteps))
        # By the number of latents: a context for another number of images fails here.
        context = context.astype(self.dtype).reshape(latents.shape[0] * context.shape[1], context.shape[2])
        h = latents.astype(self.dtype)
        skips = ()
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips = skips + (h,)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(self.concat_channels((h, skips[-1])), emb, context)
            skips = skips[:-1]
        return self.out(h).astype(ms.float32)
