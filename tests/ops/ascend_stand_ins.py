"""Ascend's forms of the operators on the CPU, with stand-ins for what MindSpore 2.8 has no CPU kernel for.

How the accuracy of each form of ldm/ops/ascend.py is held:

| form | operator | on the CPU |
| --- | --- | --- |
| Linear | Dense | the same operator |
| Fork | Add | the same operator |
| GroupNorm | GroupNorm | the same operator |
| Upsample2x | UpsampleNearest2D | the same operator |
| PaddedConvolution | ConstantPadND | the same operator |
| GELUGate | ChunkView | the same operator; `ops.chunk` with MindSpore 2.7, which has it on Ascend only |
| Mean, RowMeans | MeanExt | the same operator |
| GELU, GELUGate | GeluExt | its documented formula |
| TakeRows | IndexSelect | Gather |
| LayerNorm | LayerNormExt | its documented formula |
| Convolution | Conv2DExt, ConvolutionGrad | `ops.conv2d` and its gradient; the outputs outside output_mask are none |
| FlashAttention | FlashAttentionScore | its documented formula in NumPy (tests/ops/test_attention.py) |

A stand-in shows that the form gives the operator the right inputs. What CANN's kernel makes of them needs a device.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

from mindspore import Tensor, nn, ops

from ldm import ops as operators
from ldm.ops import ascend
from ldm.runtime.versions import splits_into_views

RUN_ON_THE_CPU = {"Dense", "Add", "GroupNorm", "UpsampleNearest2D", "ConstantPadND", "ChunkView", "MeanExt"}
STAND_INS = {"GeluExt", "IndexSelect", "LayerNormExt", "Conv2DExt", "ConvolutionGrad", "FlashAttentionScore"}


class Gelu(nn.Cell):
    """x * (1 + erf(x / sqrt(2))) / 2, for approximate="none"."""

    def __init__(self):
        super().__init__()
        self.erf = ops.Erf()

    def construct(self, x: Tensor, approximate: str) -> Tensor:
        assert approximate == "none"
        return x * (1 + self.erf(x / math.sqrt(2))) / 2


class Select(nn.Cell):
    """The entries of an axis at the indices."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, x: Tensor, axis: int, index: Tensor) -> Tensor:
        assert index.ndim == 1
        return self.gather(x, index, axis)


def layer_norm(x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    centred = x - ops.mean(x, -1, True)
    return centred * ops.rsqrt(ops.mean(centred * centred, -1, True) + eps) * weight + bias


class Conv2D(nn.Cell):
    """The convolution of Conv2DExt's arguments."""

    def construct(self, x, weight, bias, stride, padding, dilation, groups):
        assert dilation == (1, 1) and groups == 1
        return ops.conv2d(x, weight, bias, stride, "pad", padding, dilation, groups)


class ProductOfConvolution(nn.Cell):
    """A convolution without bias, for its derivative."""

    def construct(self, x, weight, stride, padding):
        return ops.conv2d(x, weight, None, stride, "pad", padding)


class ConvolutionGradient(nn.Cell):
    """The gradients for input, weight and bias where output_mask asks for them, and zeros elsewhere."""

    def __init__(self):
        super().__init__()
        self.convolution = ProductOfConvolution()
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, dout, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask):
        found = self.gradient(self.convolution)(x, weight, stride, padding, dout)
        return found[0] * mask[0], found[1] * mask[1], dout.sum((0, 2, 3)) * mask[2]


@contextmanager
def build_as_on_ascend(monkeypatch):
    """Build networks of Ascend's forms, which run on the CPU."""
    operators.shared_cell.cache_clear()  # cells with the real operators must not be used, nor these later
    with monkeypatch.context() as patch:
        patch.setattr(operators, "on_ascend", lambda: True)
        patch.setattr(ascend, "GeluExt", Gelu)
        patch.setattr(ascend, "IndexSelect", Select)
        patch.setattr(ascend, "layer_norm", layer_norm)
        patch.setattr(ascend, "Conv2DExt", Conv2D)
        patch.setattr(ascend, "ConvolutionGrad", ConvolutionGradient)
        if not splits_into_views():
            patch.setattr(ascend, "chunk", ops.chunk)
        yield
    operators.shared_cell.cache_clear()
