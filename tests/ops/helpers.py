"""What the tests of operators share."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
from mindspore import Tensor, nn

# By the compiler, not by the library: kernels that do not compile must fail the tests, not skip them.
COMPILER = shutil.which((os.environ.get("CXX") or "c++").split()[0])
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="no C++ compiler here")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normally distributed fp32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class WithArguments(nn.Cell):
    """An operator of tensors alone: `operator(*tensors, *arguments)`."""

    def __init__(self, operator: nn.Cell, *arguments):
        super().__init__()
        self.operator, self.arguments = operator, arguments

    def construct(self, *tensors: Tensor) -> Tensor:
        return self.operator(*tensors, *self.arguments)
