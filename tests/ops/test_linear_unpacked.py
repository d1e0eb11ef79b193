"""linear_unpacked.h, with a stand-in for 64 processors: how the work is divided among them, and the result."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess

import numpy as np
import pytest

from ldm.ops.cpu.library import COMPILE, SOURCES
from tests.ops.helpers import call, needs_compiler

pytestmark = needs_compiler

SOURCE = """
#include <sched.h>
int have_64_processors(int, size_t, cpu_set_t *set) {
  CPU_ZERO(set);
  for (int i = 0; i < 64; i++) CPU_SET(i, set);
  return 0;
}
#define sched_getaffinity have_64_processors
#include "linear_unpacked.h"

int launched = 1;

int mindspore::ThreadPool::ParallelLaunch(const std::function<int(void *, int, float, float)> &run, void *, int tasks) {
  launched = tasks;
  int failed = 0;
  for (int task = tasks - 1; task >= 0; task--) failed |= run(nullptr, task, 0, 0);
  return failed;
}

mindspore::ThreadPool *mindspore::kernel::GetActorMgrInnerThreadPool() {
  static mindspore::ThreadPool pool;
  return &pool;
}

int dnnl_sgemm(char, char transpose_b, int64_t m, int64_t n, int64_t k, float, const float *a, int64_t lda,
               const float *b, int64_t ldb, float, float *c, int64_t ldc) {
  std::vector<float> transposed(k * n);
  if (transpose_b == 'T') {
    for (int64_t i = 0; i < k * n; i++) transposed[i] = b[i % n * ldb + i / n];
    b = transposed.data(), ldb = n;
  }
  for (int64_t row = 0; row < m; row++, a += lda, c += ldc) {
    std::fill(c, c + n, 0.0f);
    for (int64_t i = 0; i < k; i++)
      for (int64_t column = 0; column < n; column++) c[column] += a[i] * b[i * ldb + column];
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    source = tmp_path_factory.mktemp("linear_unpacked") / "kernels.cc"
    source.write_text(SOURCE)
    library = source.with_suffix(".so")
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *COMPILE]
    subprocess.run([*compiler, f"-I{SOURCES}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "threads"),
    [
        (4096, 320, 320, 28),
        (1024, 640, 640, 7),
        (1024, 128, 128, 3),
        (77, 768, 320, 3),  # of 144 columns at least, which oneDNN multiplies faster for a few rows
        (77, 768, 1280, 9),
        (1, 1280, 1280, 14),
        (3, 10, 7, 1),
    ],
)
def test_many_processors_share_the_work(kernels, rows, inputs, outputs, threads):
    rng = np.random.default_rng(0)
    weight = rng.integers(-4, 5, (outputs, inputs)).astype(np.float32)
    held = (weight.view(np.uint32) >> 16).astype(np.uint16)
    launched = ctypes.c_int.in_dll(kernels, "launched")
    for name, width, matrix in (("linear_unpacked", inputs, weight.T), ("linear_unpacked_dx", outputs, weight)):
        launched.value = 1
        x = rng.integers(-4, 5, (rows, width)).astype(np.float32)
        y = np.full((rows, matrix.shape[1]), np.nan, np.float32)
        call(kernels, name, x, held, y)
        np.testing.assert_array_equal(y, x @ matrix)
        if name == "linear_unpacked":
            assert launched.value == threads


def test_no_outputs(kernels):
    call(
        kernels,
        "linear_unpacked",
        np.ones((3, 8), np.float32),
        np.ones((0, 8), np.uint16),
        np.empty((3, 0), np.float32),
    )
