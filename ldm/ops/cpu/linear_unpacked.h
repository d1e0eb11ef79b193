// Linear layers in fp32 whose weight is held in bf16, and their gradients for the input.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "operator.h"
#include "threads.h"

namespace {

void unpack(const Bf16 *from, int64_t count, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) to[i] = to_float(from[i]);
}

// y (m, n) = x (m, k) b. b is the transpose of the weight (n, k) if `transposed`, else the weight (k, n).
//
// As many columns of b are unpacked at a time as fit into the processor's cache, and not more than an eighth of them, for many
// processors. An eighth of a few rows' products would be short: oneDNN takes up to 14 % longer for 77 rows.
int multiply_by_unpacked(bool valid, int64_t m, int64_t n, int64_t k, const float *x, const Bf16 *weight, bool transposed,
                         float *y) {
  constexpr int64_t ITEM_ROWS = 1024, FEW_ROWS = 256, CACHED = 1 << 17;
  constexpr int64_t STEP = 48;  // oneDNN is fastest with multiples of 48 columns
  int64_t cached = std::max(STEP, CACHED / std::max<int64_t>(1, k) / STEP * STEP);
  int64_t eighth = std::max(m < FEW_ROWS ? 3 * STEP : STEP, (n + 8 * STEP - 1) / (8 * STEP) * STEP);
  int64_t width = std::max<int64_t>(1, std::min({n, cached, eighth}));
  int64_t row_parts = (m + ITEM_ROWS - 1) / ITEM_ROWS, column_parts = (n + width - 1) / width;
  // Distance of unpacked columns. With a multiple of 4,096 bytes oneDNN takes 2.2 times as long for 77 rows.
  int64_t apart = k % 256 == 0 ? k + 16 : k;
  return run(valid, row_parts * column_parts, m * n * k, [&](int64_t start, int64_t end) {
    Scratch scratch(width * apart);
    float *b = scratch.data();
    for (int64_t item = start; item < end; item++) {
      int64_t column = item / row_parts * width, columns = std::min(width, n - column);
      int64_t row = item % row_parts * ITEM_ROWS, rows = std::min(ITEM_ROWS, m - row);
      if (item == start || row == 0) {
        if (transposed)
          for (int64_t i = 0; i < columns; i++) unpack(weight + (column + i) * k, k, b + i * apart);
        else
          for (int64_t i = 0; i < k; i++) unpack(weight + i * n + column, columns, b + i * columns);
      }
      multiply('N', transposed ? 'T' : 'N', rows, columns, k, 1, x + row * k, k, b, transposed ? apart : columns, 0,
               y + row * n + column, n);
    }
  });
}

}  // namespace

extern "C" {

// x (rows, in), weight (out, in) -> x weight^T (rows, out)
int linear_unpacked(ARGUMENTS) {
  int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
  bool valid = has_bf16_weight(count, types) && ranks[0] == 2 && shapes[1][1] == in;
  return multiply_by_unpacked(valid, rows, out, in, p[0], reinterpret_cast<const Bf16 *>(p[1]), true, p[2]);
}

// dy (rows, out), weight (out, in) -> dy weight (rows, in)
int linear_unpacked_dx(ARGUMENTS) {
  int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
  bool valid = has_bf16_weight(count, types) && ranks[0] == 2 && shapes[1][0] == out;
  return multiply_by_unpacked(valid, rows, in, out, p[0], reinterpret_cast<const Bf16 *>(p[1]), false, p[2]);
}

}  // extern "C"
