"""vector_math.h: exp and erf, by glibc's vector forms (g++ on x86-64) and by polynomials (elsewhere)."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.ops.cpu.library import COMPILE, SOURCES
from tests.ops.helpers import needs_compiler

pytestmark = needs_compiler

erf = np.vectorize(math.erf)

SOURCE = """
#include "vector_math.h"
extern "C" void exponentials(const float *x, float *y, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] = exponential(x[i]);
}
extern "C" void error_functions(const float *x, float *y, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] = error_function(x[i]);
}
"""


@pytest.fixture(scope="module", params=[[], ["-DPOLYNOMIALS"]], ids=["as compiled", "polynomials"])
def functions(request, tmp_path_factory):
    """Both functions, of fp32 arrays."""
    source = tmp_path_factory.mktemp("vector_math") / "functions.cc"
    source.write_text(SOURCE)
    library = source.with_suffix(".so")
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *COMPILE, *request.param]
    subprocess.run([*compiler, f"-I{SOURCES}", str(source), "-lm", "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def over(function):
        def call(x):
            x, y = np.array(x, np.float32), np.empty(len(x), np.float32)
            function(x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), len(x))
            return y

        return call

    return SimpleNamespace(exp=over(loaded.exponentials), erf=over(loaded.error_functions))


def off(found, exact):
    """The largest error, in units of an fp32's last place."""
    return np.max(np.abs(found - exact) / np.ldexp(1.0, np.frexp(exact)[1] - 24))


def test_exp(functions):
    x = np.linspace(-87.3, 88.7, 1_000_003, dtype=np.float32)
    assert off(functions.exp(x), np.exp(x.astype(np.float64))) < 4.5


def test_erf(functions):
    x = np.concatenate([np.linspace(-5, 5, 100_003), np.geomspace(1e-30, 1, 10_000)]).astype(np.float32)
    assert off(functions.erf(x), erf(x.astype(np.float64))) < 4.5


def test_the_ends(functions):
    """Of scores that are masked by -inf, of values that overflow, and of NaN, which must not vanish."""
    inf, nan = np.inf, np.nan
    ends = [-inf, -1e30, -104, -0.0, 0.0, 89, 1e30, inf, nan] * 5  # some of them as vectors, some one by one
    np.testing.assert_array_equal(functions.exp(ends), np.array([0, 0, 0, 1, 1, inf, inf, inf, nan] * 5, np.float32))
    np.testing.assert_array_equal(functions.erf(ends), np.array([-1, -1, -1, -0.0, 0, 1, 1, 1, nan] * 5, np.float32))
    assert np.signbit(functions.erf([-0.0])) and not np.signbit(functions.erf([0.0]))
    assert (0 <= functions.exp([-103, -90, -87.4])).all() and (functions.exp([-103, -90, -87.4]) < 1.2e-38).all()
