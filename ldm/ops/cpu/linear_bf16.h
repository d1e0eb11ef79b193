// Linear layers whose weight is bf16, and their gradients for the input.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm_bf16.h"
#include "operator.h"
#include "product_bf16.h"
#include "threads.h"

namespace {

// y (m, n) = x (m, k) b, where x is rounded to bf16. b is the transpose of the weight (n, k) if `transposed`, else the
// weight (k, n). k is even if `transposed`.
int multiply_by_weight(bool valid, int64_t m, int64_t n, int64_t k, const float *x, const Bf16 *weight, bool transposed,
                       float *y) {
  constexpr int64_t ITEM_ROWS = 1008, BLOCK_ROWS = 96, BLOCK_PAIRS = 128;
  // A few rows are not divided, so the columns are: into eight parts, but not below a panel.
  int64_t part_columns = std::clamp<int64_t>((n + 8 * PANEL - 1) / (8 * PANEL) * PANEL, PANEL, 256);
  int64_t row_parts = (m + ITEM_ROWS - 1) / ITEM_ROWS, column_parts = (n + part_columns - 1) / part_columns;
  return run_products(valid, row_parts * column_parts, m * n * k, [&](int64_t start, int64_t end) {
    Scratch scratch((part_columns + BLOCK_ROWS) * BLOCK_PAIRS);
    auto *panels = reinterpret_cast<Pair *>(scratch.data()), *rows = panels + part_columns * BLOCK_PAIRS;
    for (int64_t item = start; item < end; item++) {
      int64_t column = item / row_parts * part_columns, columns = std::min(part_columns, n - column);
      int64_t first = item % row_parts * ITEM_ROWS, last = std::min(m, first + ITEM_ROWS);
      for (int64_t i = 0; i < k; i += 2 * BLOCK_PAIRS) {
        int64_t values = std::min(2 * BLOCK_PAIRS, k - i), pairs = (values + 1) / 2;
        if (transposed)
          pack_transposed(reinterpret_cast<const Pair *>(weight + column * k + i), k / 2, columns, pairs, panels);
        else
          pack_rows(weight + i * n + column, n, columns, values, panels);
        for (int64_t row = first; row < last; row += BLOCK_ROWS) {
          int64_t block_rows = std::min(BLOCK_ROWS, last - row);
          for (int64_t r = 0; r < block_rows; r++) round_row(x + (row + r) * k + i, values, 1, rows + r * BLOCK_PAIRS);
          multiply(block_rows, columns, {rows, BLOCK_PAIRS, 0, 1, pairs}, panels, y + row * n + column, n, i > 0);
        }
      }
    }
  });
}

}  // namespace

extern "C" {

// x (rows, in), weight (out, in) -> x weight^T (rows, out), for an even number of inputs
int linear_bf16(ARGUMENTS) {
  int64_t rows = shapes[0][0], in = shapes[0][1], out = shapes[1][0];
  bool valid = has_bf16_weight(count, types) && ranks[0] == 2 && shapes[1][1] == in && in % 2 == 0;
  return multiply_by_weight(valid, rows, out, in, p[0], reinterpret_cast<const Bf16 *>(p[1]), true, p[2]);
}

// dy (rows, out), weight (out, in) -> dy weight (rows, in)
int linear_bf16_dx(ARGUMENTS) {
  int64_t rows = shapes[0][0], out = shapes[0][1], in = shapes[1][1];
  bool valid = has_bf16_weight(count, types) && ranks[0] == 2 && shapes[1][0] == out;
  return multiply_by_weight(valid, rows, in, out, p[0], reinterpret_cast<const Bf16 *>(p[1]), false, p[2]);
}

}  // extern "C"
