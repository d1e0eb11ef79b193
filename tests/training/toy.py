"""A loss small enough to know its gradients by hand, for the tests of the step."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.training.optimizers import adamw_scalars
from ldm.training.step import StepScalars


class Linear(nn.Cell):
    """mean((x w + b - noise)^2) with a frozen b, so that gradients are known; the other inputs only pass through."""

    def __init__(self, width=3, dtype=ms.float32):
        super().__init__()
        rng = np.random.default_rng(0)
        self.w = Parameter(Tensor(rng.standard_normal((width, width)).astype(np.float32)), name="w")
        self.b = Parameter(Tensor(rng.standard_normal(width).astype(np.float32)), name="b", requires_grad=False)
        self.dtype = dtype
        self.matmul, self.mean = ops.MatMul(), ops.ReduceMean()

    def construct(self, latents, noise, timesteps, text_embeddings):
        y = self.matmul(latents.astype(self.dtype), self.w.astype(self.dtype)).astype(ms.float32)
        difference = y + ops.broadcast_to(self.b, y.shape) - noise
        return self.mean(difference * difference)

    def by_hand(self, latents, noise):
        """(loss, gradient of w)"""
        difference = latents @ self.w.asnumpy() + self.b.asnumpy() - noise
        return np.mean(difference**2), latents.T @ difference * (2.0 / difference.size)


class Product(nn.Cell):
    """sum over parameters of sum(p * g): its gradient with respect to p is g, which is packed into the latents.

    The products with the first `in_fp16` parameters are computed in fp16.
    """

    def __init__(self, starts, in_fp16=0):
        super().__init__()
        self.dtypes = [ms.float16] * in_fp16 + [ms.float32] * (len(starts) - in_fp16)
        self.parameters = ms.ParameterTuple([Parameter(Tensor(s), name=f"p{i}") for i, s in enumerate(starts)])
        self.sum = ops.ReduceSum()

    def construct(self, latents, noise, timesteps, text_embeddings):
        total, first = 0.0, 0
        for parameter, dtype in zip(self.parameters, self.dtypes):
            gradient = latents[first : first + parameter.size].reshape(parameter.shape)
            total = total + self.sum((parameter.astype(dtype) * gradient.astype(dtype)).astype(ms.float32))
            first += parameter.size
        return total


def numbers(rows=4, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 3)).astype(np.float32), rng.standard_normal((rows, 3)).astype(np.float32)


def batch(latents, noise):
    return Tensor(latents), Tensor(noise), Tensor(np.zeros(len(latents), np.int32)), Tensor(np.zeros(1, np.float32))


def scalars(t=1, lr=0.1, scale=1.0, micro=1, norm=1e9, decay=0.0, ema_rate=0.5, betas=(0.9, 0.999), eps=1e-8):
    return StepScalars(scale, 1 / (scale * micro), norm, adamw_scalars(t, lr, betas, eps, decay), ema_rate)
