"""DoRA's magnitudes (Liu et al. 2024): each output of a layer is scaled to a norm that is trained by itself.

W' = m * (W + dW) / |W + dW|, where | | is the norm of what an output is computed from, a row of the weight. The norm
counts as a constant for the gradients, as in section 4.3 of the paper and in PEFT.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.ops import cast

EPSILON = float(np.finfo(np.float32).eps)  # the least norm that is divided by
_square, _sqrt, _maximum = ops.Square(), ops.Sqrt(), ops.Maximum()
_sum = ops.ReduceSum()


def row_norms(rows: Tensor) -> Tensor:
    """Compute the norms (out,) of fp32 rows (out, n).

    A new layer's magnitudes are computed by it, and the norms in its graph too, so that both are equal bit for bit.
    """
    return _sqrt(_sum(_square(rows), 1))


class ApplyMagnitude(nn.Cell):
    """Scales the outputs of a layer with a LoRA, y = (W + dW) x + b, to m / |W + dW| (W + dW) x + b.

    It adds (m / |W + dW| - 1) (y - b) to y, so that y stays as it is, bit for bit, where m is the norm.

    Args:
        channels_last: Whether y is (..., out) instead of (N, out, H, W).
    """

    def __init__(self, channels_last: bool):
        super().__init__()
        self.shape = (-1,) if channels_last else (1, -1, 1, 1)

    def construct(
        self,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        magnitude: Tensor,
        kept: Tensor | None,
        fp16: bool,
    ) -> Tensor:
        """Return y with the magnitudes (out,).

        Args:
            y: The output before.
            weight: W, (out, in) or (out, in, k, k).
            bias: b, (out,) or None.
            delta: dW as (out, in * k * k), fp32.
            magnitude: m.
            kept: (1,), 0 where the layer is dropped in this step, or None.
            fp16: Compute in y's type instead of fp32.
        """
        dtype = y.dtype if fp16 else ms.float32
        norms = row_norms(cast(weight, ms.float32).reshape(delta.shape) + delta)
        factor = magnitude / ops.stop_gradient(_maximum(norms, EPSILON)) - 1.0
        if kept is not None:
            factor = factor * kept
        product = cast(y, dtype)
        if bias is not None:
            product = product - cast(bias, dtype).reshape(self.shape)
        return y + cast(product * cast(factor, dtype).reshape(self.shape), y.dtype)
