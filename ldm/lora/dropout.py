"""Dropout whose mask is a function of a key for the training step, so that a resumed run drops the same values."""

from __future__ import annotations

import zlib

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops


class StepDropout(nn.Cell):
    """Dropout on the input of a LoRA layer, a function of a key, the layer's name and the position alone.

    In a training step a share `rate` of the values of x is set to zero, and the others are divided by 1 - rate. There
    is no generator state, so a resumed run drops what an uninterrupted run drops. Two numbers for each row and two for
    each column are hashed from the key, and each value of x hashes its row's numbers with its column's. The rows and
    columns are those of x as (rows, last axis), or as (N * C, H * W) for images. In a data-parallel run the rows are
    counted over the processes, so that they drop what one process drops for all their images.

    Args:
        rate: Share of the values to drop.
        name: Full name of the layer.
        key: Parameter (2,) int32 that all layers share, see `make_dropout_key`. Nothing is dropped while it is zero.
            (The `training` flag alone would not do: MindSpore keeps using the graph that it compiled before set_train.)
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
        self.process_index = 0  # see set_process
        self.odd = tuple(_int32(number) for number in (0x2C1B3C6D, 0x297A2D39, 0x61C88647))

    def construct(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        columns = x.shape[-1] if x.ndim < 4 else x.shape[2] * x.shape[3]
        # The mask comes after x, so that gradient checkpointing draws it again with x (ldm.training.checkpointing).
        mask = self.mask(ops.depend(self.key, x), x.size // columns, columns)
        return x * ops.stop_gradient(mask.astype(x.dtype).reshape(x.shape))

    def mask(self, key: Tensor, rows: int, columns: int) -> Tensor:
        """Return (rows, columns) fp32 of zeros and 1 / (1 - rate), or of ones where the key (2,) is zero."""
        active = ops.not_equal(ops.bitwise_or(key[0], key[1]), 0)
        first = self.process_index * rows
        row, row2 = (self.hash(key, first, rows, salt).reshape(rows, 1) for salt in self.salts[:2])
        column, column2 = (self.hash(key, 0, columns, salt).reshape(1, columns) for salt in self.salts[2:])
        # The comparison depends on the highest bits, into which each product carries all lower ones.
        mixed = ops.bitwise_xor(row, column) * self.odd[2]
        mixed = ops.bitwise_xor(mixed, row2) * ops.bitwise_or(column2, self.one)
        kept = mixed >= self.lowest + active.astype(ms.int32) * self.share
        return kept.astype(ms.float32) * (1.0 + active.astype(ms.float32) * self.extra)

    def hash(self, key: Tensor, first: int, count: int, salt: Tensor) -> Tensor:
        """Return int32 numbers (count,) of the places from `first`, whose bits, but the highest, are independent."""
        h = ops.bitwise_xor(Tensor(np.arange(first, first + count, dtype=np.int32)) * self.odd[2] + key[0], salt)
        h = ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift)) * self.odd[0] + key[1]
        h = ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift)) * self.odd[1]
        return ops.bitwise_xor(h, ops.bitwise_right_shift(h, self.shift))


class UnitDropout(StepDropout):
    """Dropout of whole ranks, outputs or layers: count -> (count,) fp32 of zeros and ones.

    It follows LyCORIS, which does not lift what is kept. All images of a step drop the same. It reads the same key as
    StepDropout, and a name of its own.

    Args:
        rate: Probability that a unit is dropped.
        name: Full name of the layer and the kind of unit.
        key: As for StepDropout.
    """

    def construct(self, count: int) -> Tensor:
        key = self.key
        active = ops.not_equal(ops.bitwise_or(key[0], key[1]), 0).astype(ms.int32)
        # As in `mask`. The highest bit of a hash itself is always 0.
        kept = self.hash(key, 0, count, self.salts[0]) * self.odd[2] >= self.lowest + active * self.share
        return ops.stop_gradient(kept.astype(ms.float32))


def make_dropout_key() -> Parameter:
    """Return a new key for all StepDropouts of a model. Training sets it for each step, and back to zero at the end."""
    return Parameter(Tensor(np.zeros(2, np.int32)), name="lora_dropout.key", requires_grad=False)


def dropout_key(model: nn.Cell) -> Parameter | None:
    """Return the key of the StepDropouts in `model`, or None if there are none."""
    return next((cell.key for _, cell in model.cells_and_names() if isinstance(cell, StepDropout)), None)


def set_process(model: nn.Cell, process_index: int) -> None:
    """Let the StepDropouts in `model` drop the values of this process of a data-parallel run, before it is compiled."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, StepDropout):
            cell.process_index = process_index


def _int32(number: int) -> Tensor:
    """Return the lowest 32 bits of an integer as int32."""
    return Tensor(int(np.uint32(number & 0xFFFFFFFF).astype(np.int32)), ms.int32)
