"""The variational autoencoder between images and latents (Rombach et al. 2022), with the published names."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, nn

from ldm.models.layers import Conv2d, GroupNorm
from ldm.ops import attention, identity, pixels_to_tokens, silu, tokens_to_pixels, upsample2x


class ResnetBlock(nn.Cell):
    """Two convolutions added to their input: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, num_groups, eps=1e-6)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, num_groups, eps=1e-6)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else identity()
        self.silu = silu()

    def construct(self, x: Tensor) -> Tensor:
        h = self.conv1(self.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(self.silu(self.norm2(h)))


class AttnBlock(nn.Cell):
    """Self-attention with one head over the pixels, added to its input."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, eps=1e-6)
        self.q, self.k = Conv2d(channels, channels, 1), Conv2d(channels, channels, 1)
        self.v, self.proj_out = Conv2d(channels, channels, 1), Conv2d(channels, channels, 1)
        self.attention = attention(1, channels)
        self.to_tokens, self.to_pixels = pixels_to_tokens(), tokens_to_pixels()

    def construct(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.to_tokens(self.q(h)), self.to_tokens(self.k(h)), self.to_tokens(self.v(h))
        return x + self.proj_out(self.to_pixels(self.attention(q, k, v, x.shape[0]), x))


class Middle(nn.Cell):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def construct(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Cell):
    """A 3x3 convolution with stride 2, padded at the bottom and right only, as in the published encoder."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Cell):
    """Nearest-neighbour doubling of height and width, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.double = upsample2x()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(self.double(x))


class Level(nn.Cell):
    """The residual blocks of one resolution, then a change of resolution, except at the ends."""

    def __init__(self, blocks: list[ResnetBlock], downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.CellList(blocks)
        channels = blocks[-1].conv2.out_channels
        self.downsample = Downsample(channels) if downsample else identity()
        self.upsample = Upsample(channels) if upsample else identity()

    def construct(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Cell):
    """Images (N, in_channels, H, W) -> moments before quant_conv (N, 2 z_channels, H/f, W/f)."""

    def __init__(
        self,
        in_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        double_z: bool,
        num_groups: int,
    ):
        super().__init__()
        self.conv_in = Conv2d(in_channels, ch, 3, padding=1)
        channels = ch
        down = []
        for level, mult in enumerate(ch_mult):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, num_groups))
                channels = ch * mult
            down.append(Level(blocks, downsample=level != len(ch_mult) - 1))
        self.down = nn.CellList(down)
        self.mid = Middle(channels, num_groups)
        self.norm_out = GroupNorm(channels, num_groups, eps=1e-6)
        self.conv_out = Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)
        self.silu = silu()

    def construct(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Cell):
    """Latents after post_quant_conv (N, z_channels, h, w) -> images (N, out_ch, h f, w f)."""

    def __init__(
        self,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        num_groups: int,
    ):
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in = Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, num_groups)
        up: list[Level] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, ch * mult, num_groups))
                channels = ch * mult
            up.insert(0, Level(blocks, upsample=level != 0))
        self.up = nn.CellList(up)
        self.order = tuple(reversed(range(len(ch_mult))))
        self.norm_out = GroupNorm(channels, num_groups, eps=1e-6)
        self.conv_out = Conv2d(channels, out_ch, 3, padding=1)
        self.silu = silu()

    def construct(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.order:
            h = self.up[level](h)
        return self.conv_out(self.silu(self.norm_out(h)))


class AutoencoderKL(nn.Cell):
    """The autoencoder, which is called through `VAEEncode` and `VAEDecode`, one graph each.

    The arguments are `first_stage_config.params` of the published YAMLs.
    """

    def __init__(
        self,
        embed_dim: int,
        in_channels: int,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        double_z: bool = True,
        num_groups: int = 32,
    ):
        super().__init__()
        self.encoder = Encoder(in_channels, ch, ch_mult, num_res_blocks, z_channels, double_z, num_groups)
        self.decoder = Decoder(out_ch, ch, ch_mult, num_res_blocks, z_channels, num_groups)
        self.quant_conv = Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = Conv2d(embed_dim, z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> mean and log variance as one tensor (N, 2 embed_dim, H/f, W/f), not scaled."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, embed_dim, h, w), already divided by the scale factor -> images of about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def construct(self, images: Tensor) -> Tensor:
        """Images -> their reconstruction from the mean of their latents."""
        moments = self.encode(images)
        return self.decode(moments[:, : moments.shape[1] // 2])


class IdentityFirstStage(nn.Cell):
    """Stands for the autoencoder of a model in pixel space: the latents are the pixels. It has no parameters."""

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] (N, C, H, W) -> the same. They are no distribution, so there is no log variance."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) -> the same."""
        return latents

    def construct(self, images: Tensor) -> Tensor:
        return images


class VAEEncode(nn.Cell):
    """`encode` of the autoencoder as a graph."""

    def __init__(self, vae: AutoencoderKL | IdentityFirstStage):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)


class VAEDecode(nn.Cell):
    """`decode` of the autoencoder as a graph."""

    def __init__(self, vae: AutoencoderKL | IdentityFirstStage):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)
