// Matrix products by oneDNN, which MindSpore comes with.
#pragma once
#include <cstdint>
#include <new>

// C (M, N) = alpha A (M, K) B (K, N) + beta C, row-major, in the calling thread alone. (oneDNN uses only the threads that
// it is given, and it is given none here.)
extern "C" int dnnl_sgemm(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
                          const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

namespace {

void multiply(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  if (dnnl_sgemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) != 0) throw std::bad_alloc();
}

}  // namespace
