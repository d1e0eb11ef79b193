"""Layers with a LoRA (Hu et al. 2021): the base layer's output plus scale * (alpha / rank) * up(down(x)).

A LoRA layer takes the place of a Linear or Conv2d and holds it as `base`, whose parameters keep their names. The
factors are `<layer>.lora_down.weight` and `<layer>.lora_up.weight`. A trainable scale is `<layer>.lora_scale`, of shape
(1,). All of these are fp32 whatever type the base layer computes in, so that small updates are not lost. While they are
trained, the factors that are only read in fp16 may be fp16 copies of fp32 values (see `factors_cast_to`).
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.lora.dropout import StepDropout
from ldm.models.layers import Conv2d, Linear
from ldm.ops import cast, conv2d, fork, identity, shared_cell


class Factor(nn.Cell):
    """One factor as `weight`, fp32 and trainable. `name` is the parameter's full name."""

    def __init__(self, array: np.ndarray, name: str):
        super().__init__()
        self.weight = Parameter(Tensor(array.astype(np.float32)), name=name)


class LoRACell(nn.Cell):
    """Superclass of the layers with a LoRA. `up` starts at zero, so the output is the base layer's until it is trained.

    Args:
        base: The layer to replace.
        down: Initial values of the factor down.
        name: Full name of the layer.
        alpha: The update is multiplied by alpha / rank.
        scale: The update is also multiplied by this.
        fp16: Compute the update in the base layer's type instead of always in fp32.
        trainable_scale: Train the scale, starting from `scale`.
        dropout: Dropout on the input of the update. HardLoRAConv2d has no such input.
    """

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
    ):
        super().__init__()
        self.name, self.rank, self.alpha, self.scale, self.fp16 = name, len(down), float(alpha), float(scale), fp16
        self.trainable_scale = trainable_scale
        self.multiplier = self.alpha / self.rank if trainable_scale else self.scale * self.alpha / self.rank
        # Assigning a child would put the attribute's name before parameter names that are complete already.
        self.insert_child_to_cell("base", base)
        for key, parameter in base.parameters_and_names(expand=False):
            self.insert_param_to_cell(key, parameter)  # so that its place in the model still agrees with its name
        up = np.zeros((base.out_channels, self.rank, *(1,) * (down.ndim - 2)))
        self.insert_child_to_cell("lora_down", Factor(down, f"{name}.lora_down.weight"))
        self.insert_child_to_cell("lora_up", Factor(up, f"{name}.lora_up.weight"))
        if trainable_scale:
            start = Tensor(np.array([scale], np.float32))
            self.insert_param_to_cell("lora_scale", Parameter(start, name=f"{name}.lora_scale"))
        else:
            self.lora_scale = None
        self.insert_child_to_cell("lora_dropout", dropout or identity())
        self.insert_child_to_cell("fork", fork())
        self.set_train(base.training)
        self.create_operators()

    def create_operators(self) -> None:
        """Create the operators that `construct` calls."""
        raise NotImplementedError

    def lora_parameters(self) -> list[Parameter]:
        """Return the parameters that are trained: both factors, and the scale if it is trainable."""
        factors = [self.lora_down.weight, self.lora_up.weight]
        return factors + [self.lora_scale] if self.trainable_scale else factors

    def factors_cast_to(self, dtype: ms.Type) -> list[Parameter]:
        """Return the factors that `construct` casts to `dtype` wherever it uses them.

        A factor that is of this type already gives the same results.
        """
        if not self.fp16 or self.base.dtype != dtype:
            return []
        # A trainable scale is multiplied into `up` before the cast.
        return [self.lora_down.weight] if self.trainable_scale else [self.lora_down.weight, self.lora_up.weight]


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


class LoRALinear(LoRACell):
    """y = base(x) + scale * (alpha / rank) * x down^T up^T for x of shape (..., in).

    down is (rank, in) and up is (out, rank). See LoRACell for the arguments.
    """

    def create_operators(self) -> None:
        self.update = shared_cell(LowRankUpdate)

    def construct(self, x: Tensor) -> Tensor:
        x, of_update = self.fork(x)
        return self.update(
            self.base(x),
            self.lora_dropout(of_update),
            self.lora_down.weight,
            self.lora_up.weight,
            self.lora_scale,
            self.multiplier,
            self.fp16,
        )


class LoRAConv2d(LoRACell):
    """y = base(x) + scale * (alpha / rank) * up(down(x)) for x of shape (N, in, H, W).

    down is a convolution (rank, in, k, k) with the stride and padding of the base, up is a 1x1 convolution
    (out, rank, 1, 1), as in kohya's scripts and LoCon. lora_wrapper calls this "soft", but its up has the kernel size k
    as well, which no single kernel could replace. See LoRACell for the arguments.
    """

    def create_operators(self) -> None:
        base = self.base
        self.conv_down = conv2d(self.rank, base.kernel_size, base.stride, base.padding, has_bias=False)
        self.conv_up = conv2d(base.out_channels, 1, 1, 0, has_bias=False)

    def construct(self, x: Tensor) -> Tensor:
        x, of_update = self.fork(x)
        y = self.base(x)
        dtype = y.dtype if self.fp16 else ms.float32
        hidden = self.conv_down(self.lora_dropout(of_update), self.lora_down.weight, None, dtype)
        if self.trainable_scale:
            update = self.conv_up(hidden, self.lora_up.weight * self.lora_scale * self.multiplier, None, dtype)
        else:
            update = self.conv_up(hidden, self.lora_up.weight, None, dtype)
            if self.multiplier != 1.0:
                update = update * self.multiplier
        return y + cast(update, y.dtype)


class HardLoRAConv2d(LoRACell):
    """A 1x1 convolution with the kernel W + scale * (alpha / rank) * up @ down, "hard" in lora_wrapper.

    It needs one convolution where LoRAConv2d needs three. down is (rank, in) and up is (out, rank). The sum is computed
    in fp32. See LoRACell for the arguments.
    """

    def create_operators(self) -> None:
        self.matmul = ops.MatMul()
        self.base.keeps_fp32 = True  # the kernel is rounded once, after the sum

    def construct(self, x: Tensor) -> Tensor:
        up = self.lora_up.weight * self.multiplier
        if self.trainable_scale:
            up = up * self.lora_scale
        kernel = cast(self.base.weight, ms.float32)
        kernel = kernel + self.matmul(up, self.lora_down.weight).reshape(kernel.shape)
        return self.base.conv2d(x, kernel, self.base.bias, self.base.dtype)

    def factors_cast_to(self, dtype: ms.Type) -> list[Parameter]:
        return []
