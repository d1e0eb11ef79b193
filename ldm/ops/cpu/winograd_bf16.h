// 3x3 convolutions with stride 1 and padding 1, whose weight is bf16, and their gradients for the input.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm_bf16.h"
#include "operator.h"
#include "product_bf16.h"
#include "threads.h"
#include "winograd.h"

namespace {

// Winograd's algorithm with products of bf16: the transformed weight and pixels are rounded to it.
struct WinogradBf16 : Winograd {
  static constexpr int64_t CHUNK = 2 * PANEL;  // tiles at a time
  static constexpr int64_t M_CHANNELS = 48;    // of the products, which stay in the processor's cache

  using Winograd::Winograd;

  // As Winograd::convolve. u is (16, out, pairs) and intermediate memory.
  int convolve(bool valid, const float *x, const Bf16 *weight, bool transposed, Pair *u, float *y) const {
    int64_t pairs = (in + 1) / 2;
    int failed = run(valid, out, 16 * out * in, [&](int64_t first, int64_t end) {
      Scratch scratch((9 + 16) * in);
      float *planes = scratch.data(), *rows = planes + 9 * in;
      for (int64_t o = first; o < end; o++) {
        transform_weight(weight, transposed, o, planes, rows);
        for (int64_t k = 0; k < 16; k++) round_row(rows + k * in, in, 1, u + (k * out + o) * pairs);
      }
    });
    if (failed) return failed;
    int64_t chunks = (tiles + CHUNK - 1) / CHUNK, parts = chunks < 16 ? std::min<int64_t>(4, out) : 1;
    return run_products(true, chunks * parts, 16 * tiles * in, [&](int64_t start, int64_t end) {
      Scratch scratch(16 * CHUNK * (pairs + M_CHANNELS + 2) + line_values());
      auto *v = reinterpret_cast<Pair *>(scratch.data());
      float *m = scratch.data() + 16 * CHUNK * pairs, *planes = m + 16 * CHUNK * M_CHANNELS;
      float *lines = planes + 16 * CHUNK * 2;
      for (int64_t item = start; item < end; item++) {
        int64_t first = item / parts * CHUNK, part = item % parts, count = std::min(CHUNK, tiles - first);
        if (part == 0 || item == start) transform_pixels(x, first, count, pairs, lines, planes, v);
        int64_t last = out * (part + 1) / parts;
        for (int64_t channel = out * part / parts; channel < last; channel += M_CHANNELS) {
          int64_t channels = std::min(M_CHANNELS, last - channel);
          for (int64_t k = 0; k < 16; k++)
            multiply(channels, count, {u + (k * out + channel) * pairs, pairs, 0, 1, pairs}, v + k * pairs * CHUNK,
                     m + k * count, 16 * count, false);
          transform_output(m, first, count, channel, channels, lines, y);
        }
      }
    });
  }

 private:
  // Transforms the tiles of all input channels, to v: 16 times the panels of `count` columns. `planes` holds two channels.
  void transform_pixels(const float *x, int64_t first, int64_t count, int64_t pairs, float *lines, float *planes,
                        Pair *v) const {
    clear(lines);
    for (int64_t i = 0; i < in; i += 2) {
      transform_input(x, i, first, count, lines, planes);
      if (i + 1 < in) transform_input(x, i + 1, first, count, lines, planes + 16 * count);
      for (int64_t k = 0; k < 16; k++)
        for (int64_t column = 0; column < count; column += PANEL) {
          const float *even = planes + k * count + column, *odd = i + 1 < in ? even + 16 * count : nullptr;
          pair_rows(even, odd, std::min(PANEL, count - column), v + (k * CHUNK + column) * pairs + i / 2 * PANEL);
        }
    }
  }
};

int winograd_bf16(bool transposed, int count, float **p, int64_t **shapes, const char **types) {
  WinogradBf16 w(shapes[0], shapes[2][1]);
  bool valid = count == 4 && has_bf16_weight(3, types) && shapes[1][transposed ? 0 : 1] == w.in &&
               shapes[1][2] == 3 && shapes[1][3] == 3;
  return w.convolve(valid, p[0], reinterpret_cast<const Bf16 *>(p[1]), transposed, reinterpret_cast<Pair *>(p[3]), p[2]);
}

}  // namespace

extern "C" {

// x (N, in, H, W), weight (out, in, 3, 3) -> y, and u (out, 16, ceil(in / 2)) which is intermediate memory
int convolution_bf16(ARGUMENTS) { return winograd_bf16(false, count, p, shapes, types); }

// dy (N, out, H, W), weight (out, in, 3, 3) -> dx, and u (in, 16, ceil(out / 2)) which is intermediate memory
int convolution_bf16_dx(ARGUMENTS) { return winograd_bf16(true, count, p, shapes, types); }

}  // extern "C"
