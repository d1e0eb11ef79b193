"""What the tests of operators share."""

from __future__ import annotations

import ctypes
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


def call(kernels: ctypes.CDLL, name: str, *arrays: np.ndarray) -> None:
    """Call a kernel of a library that is not MindSpore's operator. uint16 is bf16."""
    count = len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    types = [b"bfloat16" if array.dtype == np.uint16 else b"float32" for array in arrays]
    failed = getattr(kernels, name)(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.c_void_p * count)(*(ctypes.addressof(shape) for shape in shapes)),
        (ctypes.c_char_p * count)(*types),
        None,
        None,
    )
    assert failed == 0, name


class WithArguments(nn.Cell):
    """An operator of tensors alone: `operator(*tensors, *arguments)`."""

    def __init__(self, operator: nn.Cell, *arguments):
        super().__init__()
        self.operator, self.arguments = operator, arguments

    def construct(self, *tensors: Tensor) -> Tensor:
        return self.operator(*tensors, *self.arguments)
