"""Layers with a LoRA (Hu et al. 2021): the base layer's output plus scale * (alpha / rank) * up(down(x)).

A LoRA layer takes the place of a Linear or Conv2d and holds it as `base`, whose parameters keep their names. The
factors are `<layer>.lora_down.weight` and `<layer>.lora_up.weight`. A trainable scale is `<layer>.lora_scale`, of shape
(1,), and DoRA's magnitudes are `<layer>.lora_dora_scale`, (out,). All of these are fp32 whatever type the base layer
computes in, so that small updates are not lost. While they are trained, the factors that are only read in fp16 may be
fp16 copies of fp32 values (see `factors_cast_to`). ldm.lora.product_layers has the kinds with other factors.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.lora.cell import LoRACell
from ldm.lora.dropout import StepDropout
from ldm.lora.updates import LayerUpdate, LoRALayer, with_mid
from ldm.models.layers import Conv2d, Linear
from ldm.ops import cast, conv2d, shared_cell


class TuckerProduct(nn.Cell):
    """(core (r, s, k, k), matrix (s, n)) -> (r, n, k, k), the sum over s."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, core: Tensor, matrix: Tensor) -> Tensor:
        r, s, k, _ = core.shape
        rows = self.matmul(core.transpose(0, 2, 3, 1).reshape(-1, s), matrix)
        return rows.reshape(r, k, k, -1).transpose(0, 3, 1, 2)


class PairCell(LoRACell):
    """Superclass of the layers with a pair of factors. `up` starts at zero.

    Args:
        base: As in LoRACell.
        down: Initial values of the factor down.
        name, alpha, scale, fp16, trainable_scale, dropout, others: As in LoRACell.
        mid: Initial values of LoCon's third factor (rank, rank, k, k), for a down (rank, in, 1, 1) (`use_tucker`).
    """

    tucker: Any  # a TuckerProduct or None
    matmul_of_delta: Any  # None without DoRA

    def __init__(
        self,
        base: Linear | Conv2d,
        down: np.ndarray,
        name: str,
        alpha: float,
        scale: float = 1.0,
        fp16: bool = True,
        trainable_scale: bool = False,
        dropout: StepDropout | None = None,
        mid: np.ndarray | None = None,
        **others: Any,
    ):
        rank = len(down)
        up = np.zeros((base.out_channels, rank, *(1,) * (down.ndim - 2)))
        factors = {"lora_down.weight": down, "lora_up.weight": up}
        if mid is not None:
            factors["lora_mid.weight"] = mid
        super().__init__(base, factors, name, rank, alpha, scale, fp16, trainable_scale, dropout, **others)
        self.has_mid = mid is not None
        self.matmul_of_delta = ops.MatMul() if self.dora else None
        self.tucker = shared_cell(TuckerProduct) if self.has_mid else None

    def kept_up(self) -> Tensor:
        """Return `up` without the ranks that this step drops."""
        up = self.lora_up.weight
        return up * cast(self.kept(up.shape[1]), up.dtype).reshape((1, -1) + up.shape[2:])

    def delta(self) -> Tensor:
        up = self.kept_up() if self.drops_units else self.lora_up.weight
        down = self.lora_down.weight
        if self.tucker is not None:
            down = self.tucker(self.lora_mid.weight, down.reshape(down.shape[:2]))
        if self.trainable_scale:
            up = up * self.lora_scale.reshape((1,) * up.ndim)
        return self.matmul_of_delta(up.reshape(-1, self.rank), down.reshape(self.rank, -1)) * self.multiplier

    def factors_cast_to(self, dtype: ms.Type) -> list[Parameter]:
        if not self.fp16 or self.base.dtype != dtype or self.dora:
            return []
        # A trainable scale is multiplied into `up` before the cast, and a third factor into `down`.
        downs = [] if self.has_mid else [self.lora_down.weight]
        return downs if self.trainable_scale else [*downs, self.lora_up.weight]

    def direction(self, factors: dict[str, np.ndarray], scale: float) -> LayerUpdate:
        down, up = factors["lora_down.weight"], factors["lora_up.weight"]
        if self.has_mid:
            down = with_mid(down, factors["lora_mid.weight"])
        return LoRALayer(down, up, self.alpha * scale)


class LowRankUpdate(nn.Cell):
    """(y (..., out), x (..., in), down (rank, in), up (out, rank)) -> y + multiplier * scale * x down^T up^T.

    `scale` is a Tensor or None. `fp16` computes in the type of y instead of fp32. All LoRALinear layers share one cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(
        self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None, multiplier: float, fp16: bool
    ) -> Tensor:
        dtype = y.dtype if fp16 else ms.float32
        hidden = self.matmul(cast(x.reshape(-1, down.shape[1]), dtype), cast(down, dtype))
        if scale is None:
            update = self.matmul(hidden, cast(up, dtype))
            if multiplier != 1.0:  # known when the graph is compiled; two kernels for each layer otherwise
                update = update * multiplier
        else:
            # Multiplied into the factor, so that the scale's gradient is an fp32 sum over (out, rank), not the batch.
            update = self.matmul(hidden, cast(up * scale * multiplier, dtype))
        return y + cast(update, y.dtype).reshape(y.shape)


class LoRALinear(PairCell):
    """y = base(x) + scale * (alpha / rank) * x down^T up^T for x of shape (..., in).

    down is (rank, in) and up is (out, rank). See PairCell for the arguments.
    """

    def create_operators(self) -> None:
        self.update = shared_cell(LowRankUpdate)

    def construct(self, x: Tensor) -> Tensor:
        x, of_update = self.fork(x)
        y = self.update(
            self.base(x),
            self.lora_dropout(of_update),
            self.lora_down.weight,
            self.kept_up() if self.drops_units else self.lora_up.weight,
            self.lora_scale,
            self.multiplier,
            self.fp16,
        )
        return self.with_magnitude(y) if self.dora else y


class LoRAConv2d(PairCell):
    """y = base(x) + scale * (alpha / rank) * up(down(x)) for x of shape (N, in, H, W).

    down is a convolution (rank, in, k, k) with the stride and padding of the base, up is a 1x1 convolution
    (out, rank, 1, 1), as in kohya's scripts and LoCon. With a third factor, its product with down (rank, in, 1, 1) is
    that convolution. lora_wrapper calls this "soft", but its up has the kernel size k as well, which no single kernel
    could replace. See PairCell for the arguments.
    """

    def create_operators(self) -> None:
        base = self.base
        self.conv_down = conv2d(self.rank, base.kernel_size, base.stride, base.padding, has_bias=False)
        self.conv_up = conv2d(base.out_channels, 1, 1, 0, has_bias=False)

    def construct(self, x: Tensor) -> Tensor:
        x, of_update = self.fork(x)
        y = self.base(x)
        dtype = y.dtype if self.fp16 else ms.float32
        down = self.lora_down.weight
        if self.tucker is not None:
            down = self.tucker(self.lora_mid.weight, down.reshape(down.shape[:2]))
        hidden = self.conv_down(self.lora_dropout(of_update), down, None, dtype)
        up = self.kept_up() if self.drops_units else self.lora_up.weight
        if self.trainable_scale:
            update = self.conv_up(hidden, up * self.lora_scale * self.multiplier, None, dtype)
        else:
            update = self.conv_up(hidden, up, None, dtype)
            if self.multiplier != 1.0:
                update = update * self.multiplier
        y = y + cast(update, y.dtype)
        return self.with_magnitude(y) if self.dora else y


class HardLoRAConv2d(PairCell):
    """A 1x1 convolution with the kernel W + scale * (alpha / rank) * up @ down, "hard" in lora_wrapper.

    It needs one convolution where LoRAConv2d needs three. down is (rank, in) and up is (out, rank). The sum is computed
    in fp32. See PairCell for the arguments.
    """

    def create_operators(self) -> None:
        self.matmul = ops.MatMul()
        base = self.base
        base.keeps_fp32 = True  # the kernel is rounded once, after the sum
        # The base layer's own operator may be one for a weight in bf16, and the kernel is fp32.
        self.conv2d = conv2d(base.out_channels, base.kernel_size, base.stride, base.padding, base.bias is not None)

    def construct(self, x: Tensor) -> Tensor:
        up = (self.kept_up() if self.drops_units else self.lora_up.weight) * self.multiplier
        if self.trainable_scale:
            up = up * self.lora_scale
        kernel = cast(self.base.weight, ms.float32)
        kernel = kernel + self.matmul(up, self.lora_down.weight).reshape(kernel.shape)
        y = self.conv2d(x, kernel, self.base.bias, self.base.dtype)
        return self.with_magnitude(y) if self.dora else y

    def factors_cast_to(self, dtype: ms.Type) -> list[Parameter]:
        return []

    def direction(self, factors: dict[str, np.ndarray], scale: float) -> LayerUpdate:
        return super().direction({part: factor[:, :, None, None] for part, factor in factors.items()}, scale)
