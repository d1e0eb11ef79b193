"""Layers with a LoHa or a LoKr, the updates of LyCORIS that are products of small matrices (Yeh et al. 2023).

LoHa is (w1_a w1_b) * (w2_a w2_b), element by element, and LoKr is the Kronecker product of w1 and w2. The parameters
are named `<layer>.lora_hada_w1_a` and so on, after LyCORIS's. In no case is anything of the size of the layer's weight
computed where less will do: see LoHaCell and LoKrCell.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.lora.cell import LoRACell
from ldm.lora.layers import TuckerProduct
from ldm.lora.products import LoHa, LoKr
from ldm.lora.updates import LayerUpdate
from ldm.models.layers import Linear
from ldm.ops import cast, conv2d, linear, shared_cell


class ProductCell(LoRACell):
    """Superclass: base(x) + update(x) for x (..., in) or (N, in, H, W). It drops outputs in place of ranks."""

    def update(self, x: Tensor, dtype: ms.Type) -> Tensor:
        """Return what is added to the base layer's output for the input x, in `dtype`."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        x, of_update = self.fork(x)
        y = self.base(x)
        dtype = y.dtype if self.fp16 else ms.float32
        update = self.update(self.lora_dropout(of_update), dtype)
        if self.drops_units:
            kept = self.kept(self.base.weight.shape[0])
            update = update * cast(kept, dtype).reshape((-1,) if self.is_linear else (1, -1, 1, 1))
        y = y + cast(update, y.dtype)
        return self.with_magnitude(y) if self.dora else y

    def delta(self) -> Tensor:
        delta = self.dense()
        return delta * self.kept(delta.shape[0]).reshape(-1, 1) if self.drops_units else delta

    def dense(self) -> Tensor:
        """Return `delta` with nothing dropped."""
        raise NotImplementedError

    def create_operators(self) -> None:
        self.is_linear = isinstance(self.base, Linear)
        self.matmul = ops.MatMul()
        self.tucker = shared_cell(TuckerProduct)

    def convolution(self, outputs: int) -> nn.Cell:
        """Return a linear layer without bias, or a convolution with the base's kernel size, stride and padding."""
        base = self.base
        if self.is_linear:
            return linear(has_bias=False)
        return conv2d(outputs, base.kernel_size, base.stride, base.padding, has_bias=False)

    def pointwise(self, outputs: int) -> nn.Cell:
        """Return a linear layer without bias, or a 1x1 convolution."""
        return linear(has_bias=False) if self.is_linear else conv2d(outputs, 1, 1, 0, has_bias=False)


class HadamardProduct(nn.Cell):
    """(a (out, r), b (r, n), c (out, r), d (r, n)) -> (a b) * (c d).

    The backward pass multiplies out both again, as LyCORIS does, so that no step keeps them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul()
        self.matmul_nt, self.matmul_tn = ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)

    def construct(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return self.matmul(a, b) * self.matmul(c, d)

    def bprop(
        self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Without `depend` the compiler would take the products of the forward pass.
        a, c = ops.depend(a, dout), ops.depend(c, dout)
        of_first, of_second = dout * self.matmul(c, d), dout * self.matmul(a, b)
        return (
            self.matmul_nt(of_first, b), self.matmul_tn(a, of_first),
            self.matmul_nt(of_second, d), self.matmul_tn(c, of_second),
        )  # fmt: skip


class LoHaCell(ProductCell):
    """base(x) + scale * alpha / rank * x ((w1_a w1_b) * (w2_a w2_b))^T, and the same for a convolution.

    The product of two matrices of rank r, element by element, is a matrix of rank r^2, whose factors are the products
    of each row of w1_b with each of w2_b, and of each column of w1_a with each of w2_a. Where these are smaller than
    the layer, they are the pair that x goes through. Otherwise the matrix itself is computed.

    Args:
        base, factors, name, rank, alpha, others: As in LoRACell. The factors are those of ldm.lora.updates.LoHa.
    """

    kind = LoHa
    rescaled = "hada_w1_a"
    second: Any  # None where there is no pair

    def create_operators(self) -> None:
        super().create_operators()
        out, fan_in = self.base.weight.shape[0], int(np.prod(self.base.weight.shape[1:]))
        self.has_core = "hada_t1" in self.part_names
        self.is_pair = self.rank**2 * (out + fan_in) < out * fan_in
        # w1_b and w2_b are drawn from N(0, 1). This power of 2, about the root of their columns, moves from the pair's
        # down to its up, so that what is between them stays as small as the inputs: fp16 ends at 65,504.
        self.balance = 2.0 ** round(np.log2(fan_in) / 2)
        self.first = self.convolution(self.rank**2 if self.is_pair else out)
        self.second = self.pointwise(out) if self.is_pair else None
        self.product = shared_cell(HadamardProduct)

    def halves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return w1_a (out, rank), w1_b (rank, in * k * k), w2_a and w2_b. In Tucker's form a core is multiplied in."""
        a, b, c, d = self.lora_hada_w1_a, self.lora_hada_w1_b, self.lora_hada_w2_a, self.lora_hada_w2_b
        if self.has_core:
            a, c = a.transpose(1, 0), c.transpose(1, 0)
            b = self.tucker(self.lora_hada_t1, b).reshape(self.rank, -1)
            d = self.tucker(self.lora_hada_t2, d).reshape(self.rank, -1)
        return a, b, c, d

    def update(self, x: Tensor, dtype: ms.Type) -> Tensor:
        shape, tail = self.base.weight.shape, self.base.weight.shape[2:]
        a, b, c, d = self.halves()
        if self.is_pair:
            r, out = self.rank, shape[0]
            down = (b / self.balance).reshape(r, 1, -1) * d.reshape(1, r, -1)
            up = (a * (self.balance * self.multiplier)).reshape(out, r, 1) * c.reshape(out, 1, r)
            hidden = self.first(x, down.reshape((r * r,) + shape[1:]), None, dtype)
            return self.second(hidden, up.reshape((out, r * r) + (1,) * len(tail)), None, dtype)
        # `depend` lets gradient checkpointing compute the matrix again (see ldm.training.checkpointing).
        matrix = self.product(ops.depend(a * self.multiplier, x), b, c, d)
        return self.first(x, matrix.reshape(shape), None, dtype)

    def dense(self) -> Tensor:
        a, b, c, d = self.halves()
        return self.matmul(a, b) * self.matmul(c, d) * self.multiplier

    def direction(self, factors: dict[str, np.ndarray], scale: float) -> LayerUpdate:
        shape = tuple(self.base.weight.shape)
        return LoHa(factors, self.alpha * scale, shape if len(shape) == 4 else None)


class LoKrCell(ProductCell):
    """base(x) + scale * alpha / rank * x kron(w1, w2)^T, and the same for a convolution.

    The Kronecker product is never computed: an input is a table of in1 rows of in2 values, w2 goes over its rows and w1
    over its columns. For a convolution w2 is the kernel, and the rows are images with in2 channels.

    Args:
        base, factors, name, rank, alpha, others: As in LoRACell. The factors are those of ldm.lora.updates.LoKr.
    """

    kind = LoKr
    rescaled = "lokr_w1"

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others)
        if self.is_whole:
            self.multiplier = self.scale  # as readers of the file have it, alpha has no effect

    def create_operators(self) -> None:
        super().create_operators()
        self.is_whole, self.has_core = "lokr_w2" in self.part_names, "lokr_t2" in self.part_names
        out1, in1 = self.lora_lokr_w1.shape
        self.sizes = in1, self.base.weight.shape[1] // in1, out1, self.base.weight.shape[0] // out1
        self.first = self.convolution(self.sizes[3] if self.is_whole else self.rank)
        self.second = self.pointwise(self.sizes[3])
        self.last = self.pointwise(out1)

    def factors_of_second(self) -> tuple[Tensor, Tensor]:
        """Return w2_a (out2, rank) and w2_b (rank, in2) or (rank, in2, k, k)."""
        in2, kernel = self.sizes[1], self.base.weight.shape[2:]
        a, b = self.lora_lokr_w2_a, self.lora_lokr_w2_b
        if self.has_core:
            return a.transpose(1, 0), self.tucker(self.lora_lokr_t2, b)
        return a, b.reshape((self.rank, in2) + kernel)

    def through_second(self, x: Tensor, dtype: ms.Type) -> Tensor:
        """Return what w2 makes of x, (rows, in2) or (rows, in2, H, W)."""
        if self.is_whole:
            return self.first(x, self.lora_lokr_w2, None, dtype)
        a, b = self.factors_of_second()
        a = a.reshape(a.shape + (1,) * (b.ndim - 2))
        return self.second(self.first(x, b, None, dtype), a, None, dtype)

    def update(self, x: Tensor, dtype: ms.Type) -> Tensor:
        in1, in2, out1, out2 = self.sizes
        w1 = self.lora_lokr_w1 * self.multiplier
        if self.is_linear:
            # Cast first, so that what is transposed is small.
            y = self.through_second(x.reshape(-1, in2), dtype).reshape(-1, in1, out2)
            y = self.last(y.transpose(0, 2, 1).reshape(-1, in1), w1, None, dtype).reshape(-1, out2, out1)
            return y.transpose(0, 2, 1).reshape(x.shape[:-1] + (out1 * out2,))
        n, _, height, width = x.shape
        y = self.through_second(x.reshape(n * in1, in2, height, width), dtype)
        height, width = y.shape[2:]
        y = self.last(y.reshape(n, in1, out2 * height, width), w1.reshape(out1, in1, 1, 1), None, dtype)
        return y.reshape(n, out1 * out2, height, width)

    def dense(self) -> Tensor:
        in1, _, out1, out2 = self.sizes
        if self.is_whole:
            w2 = self.lora_lokr_w2.reshape(out2, -1)
        else:
            a, b = self.factors_of_second()
            w2 = self.matmul(a, b.reshape(self.rank, -1))
        w1 = self.lora_lokr_w1 * self.multiplier
        product = w1.reshape(out1, 1, in1, 1) * w2.reshape(1, out2, 1, -1)
        return product.reshape(out1 * out2, -1)

    def direction(self, factors: dict[str, np.ndarray], scale: float) -> LayerUpdate:
        shape = tuple(self.base.weight.shape)
        alpha = self.alpha
        if self.is_whole:
            factors = {**factors, "lokr_w1": factors["lokr_w1"] * np.float32(scale)}
        else:
            alpha *= scale
        return LoKr(factors, alpha, shape if len(shape) == 4 else None)
