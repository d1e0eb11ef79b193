"""Operators of the CPU, most of them around a kernel in C++ (kernels.cc).

MindSpore's CPU kernels that are replaced here are slow, or keep memory for the life of the process. docs/performance.md
has what each replacement gained.

Two rules about memory. MindSpore's scheduler runs an operator as soon as its inputs exist and holds the result until it
is used. So an operator that depends on parameters alone, such as the cast of a weight, must be made to depend on the
layer's input, and a backward pass that computes a part of the forward pass again must be made to depend on the incoming
gradient (`ops.depend`).
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.operations import _grad_ops, nn_ops

from ldm.ops.cpu.library import kernel_library
from ldm.ops.graph import cast, shared_cell

Shape = tuple[int, ...]


def kernel(name: str, *output_shapes: Callable[..., Shape], dtype: ms.Type | None = None) -> ops.Custom:
    """Return a kernel of kernels.cc as an operator: tensors -> one or more float32 tensors.

    The inputs are float32, except for the weight of the kernels that take bfloat16.

    Args:
        name: The kernel's function.
        output_shapes: A function for each output that computes its shape from the shapes of the inputs.
        dtype: The type of a single output, None for that of the first input.
    """
    if len(output_shapes) == 1:
        return ops.Custom(f"{kernel_library()}:{name}", output_shapes[0], lambda *dtypes: dtype or dtypes[0], "aot")
    return ops.Custom(
        f"{kernel_library()}:{name}",
        lambda *shapes: tuple(output_shape(*shapes) for output_shape in output_shapes),
        lambda *dtypes: dtypes[:1] * len(output_shapes),
        "aot",
    )


def first_shape(first: Shape, *_: Shape) -> Shape:
    """Return the shape of the first input."""
    return first


def halved_last_axis(x: Shape) -> Shape:
    """Return the shape of a gate's output."""
    return (*x[:-1], x[-1] // 2)


class AddInFloat32(nn.Cell):
    """(x, bias (C,)) -> x + bias by the kernel `name`, in x's type."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add = kernel(name, first_shape)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return cast(self.add(cast(x, ms.float32), cast(bias, ms.float32)), x.dtype)


class AddRowBias(nn.Cell):
    """(x (rows, C), bias (C,)) -> x + bias, in x's type. The gradient of the bias is a product with ones.

    MindSpore's own operator for that gradient (BiasAddGrad) took 12 % of a nano UNet's training step on two CPU cores.
    Neither is computed if the bias is frozen. BiasAdd itself adds value by value, not in vectors.

    Args:
        in_vectors: Whether to add by the kernel, in fp32. The results are the same: rounding a sum of two numbers of
            fp16 to fp32 first changes nothing.
    """

    def __init__(self, in_vectors: bool) -> None:
        super().__init__()
        self.bias_add = shared_cell(AddInFloat32, "add_row_bias") if in_vectors else ops.BiasAdd()
        self.ones_like, self.product_tn = ops.OnesLike(), ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, cast(bias, x.dtype))

    def bprop(self, x: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        dbias = self.product_tn(self.ones_like(dout[:, :1]), dout).reshape(bias.shape)
        return dout, cast(dbias, bias.dtype)


class AddChannelBias(nn.Cell):
    """(x (N, C, H, W), bias (C,)) -> x + bias, in x's type, as AddRowBias."""

    def __init__(self, in_vectors: bool) -> None:
        super().__init__()
        self.bias_add = shared_cell(AddInFloat32, "add_channel_bias") if in_vectors else ops.BiasAdd(data_format="NCHW")
        self.ones_like = ops.OnesLike()
        self.product, self.product_tn = ops.BatchMatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(x, cast(bias, x.dtype))

    def bprop(self, x: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        pixels = dout.reshape(n, c, h * w)
        by_image = self.product(pixels, self.ones_like(pixels[:, :1]).reshape(n, h * w, 1)).reshape(n, c)
        dbias = self.product_tn(self.ones_like(by_image[:, :1]), by_image).reshape(bias.shape)
        return dout, cast(dbias, bias.dtype)


class BroadcastAdd(nn.Cell):
    """(x, y) -> x + y. y is broadcast first.

    MindSpore's addition of unequal shapes keeps about four times its output for the life of the process.
    """

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return x + ops.broadcast_to(y, x.shape)


class Pointwise(nn.Cell):
    """x -> the kernel `name`, whose derivative is the kernel `name`_dx. Computes in fp32 and returns x's type."""

    def __init__(self, name: str, output_shape: Callable[..., Shape] = first_shape):
        super().__init__()
        self.function, self.dx = kernel(name, output_shape), kernel(f"{name}_dx", first_shape)

    def construct(self, x: Tensor) -> Tensor:
        return cast(self.function(cast(x, ms.float32)), x.dtype)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        x = ops.depend(x, dout)  # for fp16, where the cast is computed again
        return (cast(self.dx(cast(x, ms.float32), cast(dout, ms.float32)), x.dtype),)


class SwapMiddleAxes(nn.Cell):
    """(N, A, B, D) -> (N, B, A, D). MindSpore's Transpose keeps twice its output for the life of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.swap = kernel("swap_middle_axes", lambda x: (x[0], x[2], x[1], x[3]))

    def construct(self, x: Tensor) -> Tensor:
        return cast(self.swap(cast(x, ms.float32)), x.dtype)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (cast(self.swap(cast(dout, ms.float32)), x.dtype),)


class Norm(nn.Cell):
    """(x (N, C, H, W) or (rows, C), weight (C,), bias (C,)) -> x normalized by the kernel `name`, all fp32.

    The kernel takes one group or row at a time, which stays in the processor's cache.
    """

    def __init__(self, name: str, *settings: float):
        super().__init__()
        self.settings = Tensor(np.array(settings, np.float32))
        self.norm, self.dx = kernel(name, first_shape), kernel(f"{name}_dx", first_shape)
        self.dweight = kernel(f"{name}_dweight", lambda x, *_: x[1:2], lambda x, *_: x[1:2])

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias, self.settings)

    def bprop(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dweight, dbias = self.dweight(x, dout, self.settings)
        return self.dx(x, weight, dout, self.settings), dweight, dbias


class Conv3x3(nn.Cell):
    """(x (N, C, H, W), weight (O, C, 3, 3)) -> (N, O, H, W): a 3x3 convolution with stride 1 and padding 1.

    The kernel uses Winograd's algorithm, which needs 16 products where MindSpore's needs 36, but has to transform the
    weight and the pixels. Small inputs are left to MindSpore. The rounding errors are a few times as large, 4e-6 for
    values around 1.

    The gradient for x is such a convolution too. MindSpore's kernel for it keeps k * k values for each value of x, for
    the life of the process: 44 MB for a layer of 320 channels at 64 x 64 pixels, and 1.4 GB in all for SD1.5's LoRA
    training there.
    """

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv = ops.Conv2D(out_channels, 3, pad_mode="pad", pad=1)
        settings = (out_channels, (3, 3), "pad", (1,) * 4, (1,) * 4)
        self.input_gradient = nn_ops.Conv2DBackpropInput(*settings)
        self.weight_gradient = _grad_ops.Conv2DBackpropFilter(*settings)
        self.winograd, self.winograd_dx = winograd_kernels()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if has_few_pixels(x.shape) or has_few_channels(weight.shape):
            return self.conv(x, weight)
        weight = ops.depend(weight, x)  # for fp16, where the weight is cast: not at the start of the graph
        return cast(self.winograd(cast(x, ms.float32), cast(weight, ms.float32))[0], x.dtype)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        dweight = self.weight_gradient(dout, x, weight.shape)  # removed from the graph if the weight is frozen
        if has_few_pixels(x.shape):  # Few channels make no difference: MindSpore's kernel would keep memory.
            return self.input_gradient(dout, weight, x.shape), dweight
        weight = ops.depend(weight, dout)
        return cast(self.winograd_dx(cast(dout, ms.float32), cast(weight, ms.float32))[0], x.dtype), dweight


def winograd_kernels() -> tuple[ops.Custom, ops.Custom]:
    """Return the kernel of Conv3x3 and that of its gradient for x. The weight is fp32 or bf16."""
    return (
        kernel(
            "convolution", lambda x, weight: (x[0], weight[0], *x[2:]), lambda _, weight: (weight[0], 16, weight[1])
        ),
        kernel(
            "convolution_dx",
            lambda dy, weight: (dy[0], weight[1], *dy[2:]),
            lambda _, weight: (weight[1], 16, weight[0]),
        ),
    )


@ops.constexpr
def has_few_pixels(x: Shape) -> bool:
    """Whether transforming a weight takes longer than it saves: for two images of 8 x 8, but not for four."""
    return x[0] * x[2] * x[3] < 256


@ops.constexpr
def has_few_channels(weight: Shape) -> bool:
    """Whether transforming the pixels takes longer than it saves.

    From 4 channels to 320 at 64 x 64 pixels it is 1.3 ms instead of 0.7 ms.
    """
    return min(weight[:2]) < 16


class UnpackWeight(nn.Cell):
    """(weight bf16, x fp32) -> the weight in fp32, when x exists and not at the start of the graph.

    A kernel takes x as an input. `ops.depend` would have MindSpore copy the weight by an operator that has no form for
    bf16. Without kernels all weights are cast when the graph starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unpack = kernel("unpack_bf16", first_shape, dtype=ms.float32) if kernel_library() else None

    def construct(self, weight: Tensor, x: Tensor) -> Tensor:
        return cast(weight, ms.float32) if self.unpack is None else self.unpack(weight, x)


class UnpackedMatMul(nn.Cell):
    """(x (rows, in) fp32, weight (out, in) bf16) -> x weight^T (rows, out), all in fp32.

    The kernel unpacks the weight by parts that stay in the processor's cache. Without kernels, MindSpore's operator
    takes the whole unpacked weight. The two may add up in different orders, so their results are the same up to
    rounding only. The weight has no gradient, because what is trained is fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_kernel = kernel_library() is not None
        if self.has_kernel:
            self.product = kernel("linear_unpacked", lambda x, weight: (x[0], weight[0]))
            self.product_dx = kernel("linear_unpacked_dx", lambda dy, weight: (dy[0], weight[1]))
        self.matmul, self.matmul_dx = ops.MatMul(transpose_b=True), ops.MatMul()
        self.zeros_like = ops.ZerosLike()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight) if self.has_kernel else self.matmul(x, cast(weight, ms.float32))

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        if self.has_kernel:
            dx = self.product_dx(dout, weight)
        else:
            dx = self.matmul_dx(dout, cast(weight, ms.float32))
        return dx, self.zeros_like(weight)  # the zeros are not computed: nothing uses them


class Bf16MatMul(nn.Cell):
    """(x (rows, in) fp32, weight (out, in) bf16) -> x weight^T (rows, out) fp32.

    The kernel rounds x to bf16 and adds up in fp32. An odd number of inputs or outputs is left to UnpackedMatMul.
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = kernel("linear_bf16", lambda x, weight: (x[0], weight[0]))
        self.dx = kernel("linear_bf16_dx", lambda dy, weight: (dy[0], weight[1]))
        self.unpacked, self.zeros_like = UnpackedMatMul(), ops.ZerosLike()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight) if has_whole_pairs(weight.shape) else self.unpacked(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        if not has_whole_pairs(weight.shape):
            return self.unpacked.bprop(x, weight, out, dout)
        return self.dx(dout, weight), self.zeros_like(weight)


class UnpackedConv2d(nn.Cell):
    """(x (N, C, H, W) fp32, weight (O, C, k, k) bf16) -> (N, O, H', W'), all in fp32. The weight has no gradient.

    The kernel of Conv3x3 takes the weight as it is. Otherwise the weight is unpacked at each use.
    """

    def __init__(self, out_channels: int, kernel_size: int, stride: int, padding: int | tuple[int, int, int, int]):
        super().__init__()
        sides = (padding,) * 4 if isinstance(padding, int) else padding
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)
        self.conv_dx = nn_ops.Conv2DBackpropInput(
            out_channels, (kernel_size,) * 2, "pad", sides, sides, stride=(stride, stride)
        )
        self.has_winograd = kernel_library() is not None and (kernel_size, stride, padding) == (3, 1, 1)
        if self.has_winograd:
            self.winograd, self.winograd_dx = winograd_kernels()
        self.unpack, self.zeros_like = UnpackWeight(), ops.ZerosLike()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.has_winograd or has_few_pixels(x.shape) or has_few_channels(weight.shape):
            return self.conv(x, self.unpack(weight, x))
        return self.winograd(x, weight)[0]

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        if not self.has_winograd or has_few_pixels(x.shape):
            dx = self.conv_dx(dout, self.unpack(weight, dout), x.shape)
        else:
            dx = self.winograd_dx(dout, weight)[0]
        return dx, self.zeros_like(weight)


class Bf16Conv2d(nn.Cell):
    """(x (N, C, H, W) fp32, weight (O, C, k, k) bf16) -> (N, O, H, W) fp32, for k of 1 or 3.

    The weight has no gradient. The kernels round x to bf16 and add up in fp32. An odd number of channels is left to
    UnpackedConv2d. Winograd's algorithm rounds the transformed x and weight, so its errors are 1.8 times those of the
    other kernel. It takes 0.6 of its time, except for few pixels.
    """

    def __init__(self, out_channels: int, kernel_size: int):
        super().__init__()
        self.is_3x3 = kernel_size == 3
        self.direct = kernel("conv_bf16", lambda x, weight: (x[0], weight[0], *x[2:]))
        self.direct_dx = kernel("conv_bf16_dx", lambda dy, weight: (dy[0], weight[1], *dy[2:]))
        if self.is_3x3:
            self.winograd = kernel(
                "convolution_bf16",
                lambda x, weight: (x[0], weight[0], *x[2:]),
                lambda _, weight: (weight[0], 16, weight[1] // 2),
            )
            self.winograd_dx = kernel(
                "convolution_bf16_dx",
                lambda dy, weight: (dy[0], weight[1], *dy[2:]),
                lambda _, weight: (weight[1], 16, weight[0] // 2),
            )
        self.unpacked = UnpackedConv2d(out_channels, kernel_size, 1, kernel_size // 2)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if not has_whole_pairs(weight.shape):
            return self.unpacked(x, weight)
        if self.is_3x3 and x.shape[0] * x.shape[2] * x.shape[3] > FEW_PIXELS:
            return self.winograd(x, weight)[0]
        return self.direct(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        if not has_whole_pairs(weight.shape):
            return self.unpacked.bprop(x, weight, out, dout)
        if self.is_3x3 and x.shape[0] * x.shape[2] * x.shape[3] > FEW_PIXELS:
            return self.winograd_dx(dout, weight)[0], self.zeros_like(weight)
        return self.direct_dx(dout, weight), self.zeros_like(weight)


FEW_PIXELS = 128  # of a batch: two images of 8 x 8, for which transforming a weight takes as long as it saves


@ops.constexpr
def has_whole_pairs(weight: Shape) -> bool:
    """Whether inputs and outputs are even numbers, as the kernels of bf16 take pairs of values."""
    return weight[0] % 2 == 0 and weight[1] % 2 == 0


class MultiHeadAttention(nn.Cell):
    """Attention by one kernel, which reads the channels of a head from the rows without splitting them off.

    Each thread holds 1 MB of probabilities at a time, and twice that in the backward pass. With `bf16`, the factors of
    the products are rounded to bf16.
    """

    def __init__(self, num_heads: int, causal: bool, bf16: bool = False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        name = "attention_bf16" if bf16 else "attention"
        self.attention = kernel(name, first_shape)
        self.dx = kernel(f"{name}_dx", lambda q, *_: q, lambda q, k, *_: k, lambda q, k, v, *_: v)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        settings = attention_settings(n, self.num_heads, self.causal)
        fp32 = ms.float32
        return cast(self.attention(cast(q, fp32), cast(k, fp32), cast(v, fp32), settings), q.dtype)

    def bprop(
        self, q: Tensor, k: Tensor, v: Tensor, n: int, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        settings = attention_settings(n, self.num_heads, self.causal)
        fp32 = ms.float32
        q, k, v = ops.depend(q, dout), ops.depend(k, dout), ops.depend(v, dout)  # for fp16: the casts are repeated
        dq, dk, dv = self.dx(cast(q, fp32), cast(k, fp32), cast(v, fp32), cast(out, fp32), cast(dout, fp32), settings)
        return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), 0


@ops.constexpr
def attention_settings(n: int, num_heads: int, causal: bool) -> Tensor:
    """Return the attention kernel's last input, a constant of the graph."""
    return Tensor(np.array([n, num_heads, causal], np.float32))
