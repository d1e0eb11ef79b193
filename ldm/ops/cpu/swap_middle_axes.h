// The swap of the two middle axes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "operator.h"
#include "threads.h"

namespace {

constexpr int64_t TILE = 32;

}  // namespace

extern "C" {

// x (N, A, B, D) -> (N, B, A, D), in tiles, because each value of a whole column would miss the processor's cache.
int swap_middle_axes(ARGUMENTS) {
  int64_t a = shapes[0][1], b = shapes[0][2], d = shapes[0][3], tiles = (b + TILE - 1) / TILE;
  return run(all_float32(count, types), shapes[0][0] * tiles, product(shapes[0], 4), [&](int64_t first, int64_t end) {
    for (int64_t item = first; item < end; item++) {
      const float *x = p[0] + item / tiles * a * b * d;
      float *y = p[1] + item / tiles * a * b * d;
      int64_t j0 = item % tiles * TILE, j1 = std::min(j0 + TILE, b);
      for (int64_t i0 = 0; i0 < a; i0 += TILE) {
        int64_t i1 = std::min(i0 + TILE, a);
        for (int64_t j = j0; j < j1; j++) {
          if (d == 1) {
            for (int64_t i = i0; i < i1; i++) y[j * a + i] = x[i * b + j];
          } else {
            for (int64_t i = i0; i < i1; i++) std::memcpy(y + (j * a + i) * d, x + (i * b + j) * d, d * sizeof *y);
          }
        }
      }
    }
  });
}

}  // extern "C"
