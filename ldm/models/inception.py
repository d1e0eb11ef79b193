"""The Inception network of the FID: the graph of 2015-12-05, with the names of pytorch-fid's FIDInception blocks.

It differs from Inception v3 (Szegedy et al. 2015) in its poolings: the average poolings leave the padding out of their
mean, and the last block takes a maximum. Only the 2,048 pooled features are computed. The batch normalization after a
convolution is merged into it, and the 1x1 convolutions of the same input in a block are one. `Convolution.published`
names the published modules that a parameter is made of, and ldm.weights.inception merges them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

FEATURES = 2048
SIZE = 299  # pixels a side


class Conv(NamedTuple):
    """A published convolution, with a kernel of `height` x `width`."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    pad: bool = True  # keep the size
    pooled: bool = False  # followed by a 3x3 maximum with stride 2


class Branch(NamedTuple):
    """A chain of convolutions. Those of `fork` all take the output of the chain."""

    chain: tuple[Conv, ...]
    fork: tuple[Conv, ...] = ()


class Block(NamedTuple):
    """Branches of the same input and a pooling, whose outputs are concatenated.

    `pool` is "average" or "maximum", each followed by the 1x1 convolution `branch_pool`, or "stride", a maximum with
    stride 2 without a convolution.
    """

    name: str
    branches: tuple[Branch, ...]
    pool: str
    pool_channels: int = 0


def _inception_a(name: str, pool_channels: int) -> Block:
    return Block(
        name,
        (
            Branch((Conv("branch1x1", 64),)),
            Branch((Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5, 5))),
            Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3, 3), Conv("branch3x3dbl_3", 96, 3, 3))),
        ),
        "average",
        pool_channels,
    )


def _inception_c(name: str, channels: int) -> Block:
    return Block(
        name,
        (
            Branch((Conv("branch1x1", 192),)),
            Branch(
                (Conv("branch7x7_1", channels), Conv("branch7x7_2", channels, 1, 7), Conv("branch7x7_3", 192, 7, 1))
            ),
            Branch(
                (
                    Conv("branch7x7dbl_1", channels),
                    Conv("branch7x7dbl_2", channels, 7, 1),
                    Conv("branch7x7dbl_3", channels, 1, 7),
                    Conv("branch7x7dbl_4", channels, 7, 1),
                    Conv("branch7x7dbl_5", 192, 1, 7),
                )
            ),
        ),
        "average",
        192,
    )


def _inception_e(name: str, pool: str) -> Block:
    return Block(
        name,
        (
            Branch((Conv("branch1x1", 320),)),
            Branch((Conv("branch3x3_1", 384),), (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1))),
            Branch(
                (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3, 3)),
                (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1)),
            ),
        ),
        pool,
        192,
    )


STEM = (
    Conv("Conv2d_1a_3x3", 32, 3, 3, 2, pad=False), Conv("Conv2d_2a_3x3", 32, 3, 3, pad=False),
    Conv("Conv2d_2b_3x3", 64, 3, 3, pooled=True), Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, 3, pad=False, pooled=True),
)  # fmt: skip
BLOCKS = (
    _inception_a("Mixed_5b", 32), _inception_a("Mixed_5c", 64), _inception_a("Mixed_5d", 64),
    Block("Mixed_6a", (
        Branch((Conv("branch3x3", 384, 3, 3, 2, pad=False),)),
        Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3, 3),
                Conv("branch3x3dbl_3", 96, 3, 3, 2, pad=False))),
    ), "stride"),
    _inception_c("Mixed_6b", 128), _inception_c("Mixed_6c", 160), _inception_c("Mixed_6d", 160),
    _inception_c("Mixed_6e", 192),
    Block("Mixed_7a", (
        Branch((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 3, 2, pad=False))),
        Branch((Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, 1, 7), Conv("branch7x7x3_3", 192, 7, 1),
                Conv("branch7x7x3_4", 192, 3, 3, 2, pad=False))),
    ), "stride"),
    _inception_e("Mixed_7b", "average"), _inception_e("Mixed_7c", "maximum"),
)  # fmt: skip


def out_channels(block: Block, in_channels: int) -> int:
    """Return the channels of a block's output."""
    last = [conv for branch in block.branches for conv in (branch.fork or branch.chain[-1:])]
    return sum(conv.channels for conv in last) + (block.pool_channels or in_channels)


class Convolution(nn.Cell):
    """Convolution and bias of (N, C, H, W). `published` names the modules whose rows make up the weight, in order."""

    def __init__(self, in_channels: int, conv: Conv, published: tuple[str, ...]):
        super().__init__()
        self.published = published
        pads = (conv.height // 2, conv.height // 2, conv.width // 2, conv.width // 2) if conv.pad else 0
        shape = (conv.channels, in_channels, conv.height, conv.width)
        std = np.sqrt(2.0 / np.prod(shape[1:]))
        self.weight = Parameter(Tensor(np.random.normal(0.0, std, shape).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(conv.channels, np.float32)), name="bias")
        self.conv = ops.Conv2D(conv.channels, (conv.height, conv.width), pad_mode="pad", pad=pads, stride=conv.stride)
        self.bias_add = ops.BiasAdd(data_format="NCHW")

    def construct(self, x: Tensor) -> Tensor:
        return self.bias_add(self.conv(x, self.weight), self.bias)


class RectifiedConvolution(Convolution):
    """Convolution, bias and ReLU.

    A maximum pooling that follows is computed before bias and ReLU. The result is the same, and a quarter of the pixels
    is left for them.
    """

    def __init__(self, in_channels: int, conv: Conv, published: tuple[str, ...]):
        super().__init__(in_channels, conv, published)
        self.pooled = conv.pooled
        self.pool = ops.MaxPool(3, 2, "valid")
        self.relu = ops.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        y = self.conv(x, self.weight)
        if self.pooled:
            y = self.pool(y)
        return self.relu(self.bias_add(y, self.bias))


class MixedBranch(nn.Cell):
    """The convolutions of a branch that are not merged with those of other branches."""

    def __init__(self, block: str, branch: Branch, in_channels: int, chain: tuple[Conv, ...]):
        super().__init__()
        cells = []
        for conv in chain:
            cells.append(RectifiedConvolution(in_channels, conv, (f"{block}.{conv.name}",)))
            in_channels = conv.channels
        self.chain = nn.CellList(cells)
        self.fork = nn.CellList(
            [RectifiedConvolution(in_channels, conv, (f"{block}.{conv.name}",)) for conv in branch.fork]
        )
        self.forks = bool(branch.fork)
        self.concat = ops.Concat(1)

    def construct(self, x: Tensor) -> Tensor:
        for conv in self.chain:
            x = conv(x)
        if not self.forks:
            return x
        sides: tuple[Tensor, ...] = ()
        for conv in self.fork:
            sides += (conv(x),)
        return self.concat(sides)


class Mixed(nn.Cell):
    """A block, whose branches that begin with a 1x1 convolution share one.

    The last rows of that convolution are the one after an average pooling. A mean over pixels and a sum over channels
    can be exchanged, so that only `pool_channels` are averaged.
    """

    def __init__(self, block: Block, in_channels: int):
        super().__init__()
        self.pool = block.pool
        self.shared = tuple((branch.chain[0].height, branch.chain[0].width) == (1, 1) for branch in block.branches)
        firsts = [branch.chain[0] for branch, shared in zip(block.branches, self.shared) if shared]
        edges = np.cumsum([0] + [conv.channels for conv in firsts])
        self.places = tuple((int(a), int(b - a)) for a, b in zip(edges, edges[1:]))
        self.rectified = int(edges[-1])
        names = [conv.name for conv in firsts]
        if block.pool == "average":
            names.append("branch_pool")
        merged = Conv("first", self.rectified + (block.pool_channels if block.pool == "average" else 0))
        self.first = Convolution(in_channels, merged, tuple(f"{block.name}.{name}" for name in names))
        self.slice = ops.Slice()  # copies blocks, where indexing copies value by value
        self.rest = nn.CellList(
            [
                MixedBranch(
                    block.name,
                    branch,
                    branch.chain[0].channels if shared else in_channels,
                    branch.chain[1:] if shared else branch.chain,
                )
                for branch, shared in zip(block.branches, self.shared)
            ]
        )
        self.average = ops.AvgPool(3, 1, "same")  # without the padding
        self.maximum = ops.MaxPool(3, 1, "same")
        self.stride = ops.MaxPool(3, 2, "valid")
        self.branch_pool: nn.Cell = None
        if block.pool == "maximum":
            self.branch_pool = RectifiedConvolution(
                in_channels, Conv("branch_pool", block.pool_channels), (f"{block.name}.branch_pool",)
            )
        self.relu = ops.ReLU()
        self.concat = ops.Concat(1)

    def construct(self, x: Tensor) -> Tensor:
        first = self.first(x)
        n, channels, height, width = first.shape
        outputs: tuple[Tensor, ...] = ()
        used = 0
        for i in range(len(self.shared)):
            branch_input = x
            if self.shared[i]:
                begin, count = self.places[used]
                branch_input = self.relu(self.slice(first, (0, begin, 0, 0), (n, count, height, width)))
                used += 1
            outputs += (self.rest[i](branch_input),)
        if self.pool == "average":
            size = (n, channels - self.rectified, height, width)
            pooled = self.relu(self.average(self.slice(first, (0, self.rectified, 0, 0), size)))
        elif self.pool == "maximum":
            pooled = self.branch_pool(self.maximum(x))
        else:
            pooled = self.stride(x)
        return self.concat(outputs + (pooled,))


class InceptionFeatures(nn.Cell):
    """Images (N, 3, 299, 299) in [-1, 1] -> pooled features (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        cells, channels = [], 3
        for conv in STEM:
            cells.append(RectifiedConvolution(channels, conv, (conv.name,)))
            channels = conv.channels
        for block in BLOCKS:
            cells.append(Mixed(block, channels))
            channels = out_channels(block, channels)
        self.layers = nn.SequentialCell(cells)
        self.mean = ops.ReduceMean()

    def construct(self, images: Tensor) -> Tensor:
        return self.mean(self.layers(images), (2, 3))
