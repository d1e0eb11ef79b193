"""Initial values of parameters, and how to skip drawing them."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.common.initializer import initializer

_draw_values = contextvars.ContextVar("draw_values", default=True)


@contextmanager
def no_init_weights() -> Iterator[None]:
    """Make large parameters zeros within the block, for networks that are loaded next.

    Drawing a billion random numbers takes ten seconds. Zeros take no memory either, because the system allocates their
    pages only when they are written.
    """
    token = _draw_values.set(False)
    try:
        yield
    finally:
        _draw_values.reset(token)


def drawn(shape: tuple[int, ...], draw: Callable[[], np.ndarray]) -> Tensor:
    """Return the result of `draw` as float32, or zeros within no_init_weights."""
    return Tensor(draw().astype(np.float32)) if _draw_values.get() else initializer("zeros", shape, ms.float32)


def uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Return values uniform in +-1/sqrt(fan_in), the default of PyTorch's layers.

    They come from numpy's global random state, which `ldm.runtime.device` seeds.
    """
    bound = 1.0 / math.sqrt(fan_in)
    return drawn(shape, lambda: np.random.uniform(-bound, bound, shape))


def normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Return values of a normal distribution with mean 0, from numpy's global random state."""
    return drawn(shape, lambda: np.random.normal(0.0, std, shape))
