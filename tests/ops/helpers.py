"""What the tests of operators share."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn

from ldm.ops.cpu.library import kernel_library

needs_compiler = pytest.mark.skipif(kernel_library() is None, reason="no C++ compiler here")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns normally distributed fp32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class WithArguments(nn.Cell):
    """An operator of tensors alone: `operator(*tensors, *arguments)`."""

    def __init__(self, operator: nn.Cell, *arguments):
        super().__init__()
        self.operator, self.arguments = operator, arguments

    def construct(self, *tensors: Tensor) -> Tensor:
        return self.operator(*tensors, *self.arguments)
