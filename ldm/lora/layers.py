"""Low-rank cells (Hu et al. 2021): a frozen layer plus scale * (alpha / rank) * up(down(x)).

A cell takes the place of a layer of ldm.models and goes on holding that layer's own parameters under their own names;
the two factors are added beside them as `<layer>.lora_down.weight` and `<layer>.lora_up.weight`, and where the scale is
trained it is `<layer>.lora_scale`, of shape (1,). All of these are kept in fp32 whatever the layer computes in, so that
small gradients are not lost.
"""

from __future__ import annotations

import zlib

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.models.device_forms import convolution, one
from ldm.models.layers import Conv2d, Dense, Identity


class Factor(nn.Cell):
    """Holds one factor as `weight`, fp32 and trainable; `name` is its full parameter name."""

    def __init__(self, array: np.ndarray, name: str):
        super().__init__()
        self.weight = Parameter(Tensor(array.astype(np.float32)), name=name)


class StepDropout(nn.Cell):
    """In a training step, x with a share `rate` of its values set to zero and the others divided by 1 - rate; else x.

    Which ones is a function of `key`, the layer's name and the place in x alone: no generator's state runs along, so
    a resumed run drops what an uninterrupted one would. Two numbers a row and two a column are hashed from `key`, and
    each value of x hashes its row's with its column's: x as (rows, its last axis), or (N * C, H * W) of images.

    key: a parameter of shape (2,) int32, see `make_dropout_key`; nothing is dropped while it is zero. (`training` alone
    would not do: MindSpore goes on with the graph that it made of this cell before set_train.)
    """

    def __init__(self, rate: float, name: str, key: Parameter):
        super().__init__()
        self.insert_param_to_cell("key", key)
        salt = zlib.crc32(name.encode())
        self.salts = tuple(_int32(salt * odd) for odd in (1, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))
        self.lowest, self.share = _int32(-(2**31)), _int32(round(rate * 2**32))
        self.extra = 1.0 / (1.0 - rate) - 1.0
        self.shift = Tensor(15, ms.int32)
        self.one = Tensor(1, ms.int32)
        self.odd = tuple(_int32(number) for number in (0x2C1B3C6D, 0x297A2D39, 0x61C88647))

    def construct(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        columns = x.shape[-1] if x.ndim < 4 else x.shape[2] * x.shape[3]
        return x * ops.stop_gradient(self.mask(x.size // columns, columns).astype(x.dtype).reshape(x.shape))

    def mask(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) fp32 of zeros and 1 / (1 - rate); of ones where the key is zero."""
        on = ops.not_equal(ops.bitwise_or(self.key[0], self.key[1]), 0)
        row, row2 = (self.hashed(rows, salt).reshape(rows, 1) for salt in self.salts[:2])
        column, column2 = (self.hashed(columns, salt).reshape(1, columns) for salt in self.salts[2:])
        # the comparison looks at the highest bits, which each product gathers from all below them
        mixed = ops.bitwise_xor(row, column) * self.odd[2]
        mixed = ops.bitwise_xor(mixed, row2) * ops.bitwise_or(column2, self.one)
        kept = mixed >= self.lowest + on.astype(ms.int32) * self.share
        return kept.astype(ms.float32) * (1.0 + on.astype(ms.float32) * self.extra)

    def hashed(self, count: int, salt: Tensor) -> Tensor:
        """(count,) int32, each bit like a coin's."""
        h = ops.bitwise_xor(Tensor(np.arange(count, dtype=np.int32)) * self.odd[2] + self.key[0], salt)
        h = ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift)) * self.odd[0] + self.key[1]
        h = ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift)) * self.odd[1]
        return ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift))


class LowRank(nn.Cell):
    """What all LoRADense layers add to their base's y (..., out), in one cell: y + multiplier * x down^T (up scale)^T.

    scale is the trained one, or None. fp16: compute in the type of y, otherwise in fp32.
    """

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.cast = ops.Cast()

    def construct(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale, multiplier: float, fp16: bool) -> Tensor:
        dtype = y.dtype if fp16 else ms.float32
        hidden = self.matmul(self.cast(x.reshape(-1, down.shape[1]), dtype), self.cast(down, dtype))
        if scale is None:
            update = self.matmul(hidden, self.cast(up, dtype)) * multiplier
        else:
            # into the factor: the scale's gradient is then a sum over (out, rank) in fp32, not over the batch
            update = self.matmul(hidden, self.cast(up * scale * multiplier, dtype))
        return y + self.cast(update, y.dtype).reshape(y.shape)


class LoRADense(Dense):
    """y = x W^T + b + scale * (alpha / rank) * x down^T up^T for x of shape (..., in_channels).

    down is (rank, in_channels), up is (out_channels, rank) and starts at zero, so y is the base's until it is trained.

    Args:
        base: the layer to take the place of; its parameters are shared, not copied.
        down: initial values of down.
        name: the layer's full name, for the parameter names of the factors.
        alpha: numerator of the factors' own scale, alpha / rank.
        scale: a further factor.
        fp16: let the factors compute in the layer's `dtype`; otherwise always in fp32.
        trainable_scale: `scale` is where a trained scale starts.
        dropout: on the update's inputs.
    """

    def __init__(
        self,
        base: Dense,
        down: np.ndarray,
        name: str,
        alpha: float,
        scale: float = 1.0,
        fp16: bool = True,
        trainable_scale: bool = False,
        dropout: StepDropout | None = None,
    ):
        nn.Cell.__init__(self)  # not Dense's: it would draw a weight of its own
        _share(self, base)
        up = np.zeros((self.out_channels, down.shape[0]))
        _add_factors(self, down, up, name, alpha, scale, fp16, trainable_scale, dropout)
        self.low_rank = one(LowRank)

    def construct(self, x: Tensor) -> Tensor:
        y = self.linear(x, self.weight, self.bias, self.dtype)
        return self.low_rank(
            y,
            self.lora_dropout(x),
            self.lora_down.weight,
            self.lora_up.weight,
            self.lora_scale,
            self.multiplier,
            self.fp16,
        )


class LoRAConv(Conv2d):
    """y = conv(x) + scale * (alpha / rank) * up(down(x)) for x of shape (N, in_channels, H, W).

    down is a convolution like the base's, (rank, in_channels, k, k) with its stride and padding; up is a 1x1
    convolution (out_channels, rank, 1, 1) and starts at zero. Arguments as for LoRADense. lora_wrapper calls this
    "soft", but gives up the kernel's size as well, which no single kernel could replace; kohya's and LoCon's up is 1x1.
    """

    def __init__(
        self,
        base: Conv2d,
        down: np.ndarray,
        name: str,
        alpha: float,
        scale: float = 1.0,
        fp16: bool = True,
        trainable_scale: bool = False,
        dropout: StepDropout | None = None,
    ):
        nn.Cell.__init__(self)
        _share(self, base)
        rank = down.shape[0]
        up = np.zeros((self.out_channels, rank, 1, 1))
        _add_factors(self, down, up, name, alpha, scale, fp16, trainable_scale, dropout)
        self.conv_down = convolution(rank, self.kernel_size, self.stride, self.padding)
        self.conv_up = ops.Conv2D(self.out_channels, 1)

    def construct(self, x: Tensor) -> Tensor:
        y = self.convolution(x, self.weight, self.bias, self.dtype)
        dtype = self.dtype if self.fp16 else ms.float32
        update = self.conv_down(self.lora_dropout(x).astype(dtype), self.lora_down.weight.astype(dtype))
        if self.trainable_scale:
            update = self.conv_up(update, (self.lora_up.weight * self.lora_scale * self.multiplier).astype(dtype))
        else:
            update = self.conv_up(update, self.lora_up.weight.astype(dtype)) * self.multiplier
        return y + update.astype(y.dtype)


class LoRAHardConv(Conv2d):
    """A 1x1 convolution by W + scale * (alpha / rank) * up down, "hard" in lora_wrapper: one convolution, where
    LoRAConv has three. down is (rank, in_channels), up (out_channels, rank); the sum is formed in fp32.
    """

    def __init__(
        self,
        base: Conv2d,
        down: np.ndarray,
        name: str,
        alpha: float,
        scale: float = 1.0,
        fp16: bool = True,
        trainable_scale: bool = False,
    ):
        nn.Cell.__init__(self)
        _share(self, base)
        up = np.zeros((self.out_channels, down.shape[0]))
        _add_factors(self, down, up, name, alpha, scale, fp16, trainable_scale, None)
        self.product = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        up = self.lora_up.weight * self.multiplier
        if self.trainable_scale:
            up = up * self.lora_scale
        kernel = self.weight.astype(ms.float32)
        kernel = kernel + self.product(up, self.lora_down.weight).reshape(kernel.shape)
        return self.convolution(x, kernel, self.bias, self.dtype)


LORA_CELLS = (LoRADense, LoRAConv, LoRAHardConv)


def make_dropout_key() -> Parameter:
    """The key that all of a network's StepDropouts share: whoever trains sets it for each step, by set_data, and back
    to zero.
    """
    return Parameter(Tensor(np.zeros(2, np.int32)), name="lora_dropout.key", requires_grad=False)


def dropout_key(net: nn.Cell) -> Parameter | None:
    """The key of the StepDropouts in `net`; None if there are none."""
    return next((cell.key for _, cell in net.cells_and_names() if isinstance(cell, StepDropout)), None)


def base_layer(cell: nn.Cell) -> nn.Cell:
    """The layer that a low-rank cell took the place of, with what was set on the cell since."""
    base = vars(cell)["replaced"][0]
    base.dtype = cell.dtype
    return base.set_train(cell.training)


def _share(cell: nn.Cell, base: nn.Cell) -> None:
    """Give `cell` all that `base` has beyond any cell: settings, operators, parameters, inner cells."""
    own = vars(nn.Cell())
    for attributes in (vars(base), base._params, base._cells):
        for name, value in attributes.items():
            if name not in own and not name.startswith("_"):
                setattr(cell, name, value)
    vars(cell)["replaced"] = (base,)  # not through Cell.__setattr__: it is no part of the network any more


def _add_factors(
    cell: nn.Cell,
    down: np.ndarray,
    up: np.ndarray,
    name: str,
    alpha: float,
    scale: float,
    fp16: bool,
    trainable_scale: bool,
    dropout: StepDropout | None,
):
    cell.name, cell.rank, cell.alpha, cell.scale, cell.fp16 = name, down.shape[0], float(alpha), float(scale), fp16
    cell.trainable_scale = trainable_scale
    cell.multiplier = cell.alpha / cell.rank if trainable_scale else cell.scale * cell.alpha / cell.rank
    # Not through Cell.__setattr__, which would put the attribute's name before parameter names that are complete.
    cell.insert_child_to_cell("lora_down", Factor(down, f"{name}.lora_down.weight"))
    cell.insert_child_to_cell("lora_up", Factor(up, f"{name}.lora_up.weight"))
    if trainable_scale:
        start = Tensor(np.array([scale], np.float32))
        cell.insert_param_to_cell("lora_scale", Parameter(start, name=f"{name}.lora_scale"))
    else:
        cell.lora_scale = None
    cell.insert_child_to_cell("lora_dropout", one(Identity) if dropout is None else dropout)


def _int32(number: int) -> Tensor:
    """The lowest 32 bits of a whole number as int32."""
    return Tensor(int(np.uint32(number & 0xFFFFFFFF).astype(np.int32)), ms.int32)
