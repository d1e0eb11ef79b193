// Convolutions with stride 1 that keep the size, whose weight is bf16, and their gradients for the input.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm_bf16.h"
#include "operator.h"
#include "product_bf16.h"
#include "threads.h"

namespace {

// y (N, out, H, W) from x (N, in, H, W), padded by zeros, and a weight (out, in, k, k), or (in, out, k, k) for the gradient,
// where the taps are in reverse order.
//
// This is a product of the weight with the matrix of each pixel's neighbours, which is made for `PIXELS` at a time. It is
// for 1x1 convolutions, and for 3x3 ones of few pixels: of many, Winograd's algorithm takes about 0.6 of the time.
struct ConvolutionBf16 {
  static constexpr int64_t PIXELS = 4 * PANEL;

  int64_t images, in, out, height, width, side, taps, channels;
  bool gradient;

  ConvolutionBf16(const int64_t *x, const int64_t *weight, bool gradient)
      : images(x[0]), in(x[1]), out(weight[gradient ? 1 : 0]), height(x[2]), width(x[3]), side(weight[2]),
        taps(side * side), channels(taps == 1 ? 256 : 28), gradient(gradient) {}

  int convolve(bool valid, const float *x, const Bf16 *weight, float *y) const {
    int64_t area = height * width, strips = (area + PIXELS - 1) / PIXELS;
    // If there are few pixels, the channels are divided among the threads too.
    int64_t parts = images * strips < 16 ? std::min<int64_t>(8, (out + 47) / 48) : 1;
    return run_products(valid, images * strips * parts, images * area * in * out, [&](int64_t start, int64_t end) {
      int64_t most_pairs = channels * taps / 2;
      Scratch scratch(PIXELS * most_pairs + 2 * taps * PANEL + (gradient ? channels / 2 * out * taps : 0));
      auto *panels = reinterpret_cast<Pair *>(scratch.data());
      float *neighbours = scratch.data() + PIXELS * most_pairs;
      auto *paired = reinterpret_cast<Pair *>(neighbours + 2 * taps * PANEL);
      for (int64_t item = start; item < end; item++) {
        int64_t image = item / parts / strips, pixel = item / parts % strips * PIXELS, part = item % parts;
        int64_t pixels = std::min(PIXELS, area - pixel);
        int64_t first = out * part / parts, count = out * (part + 1) / parts - first;
        float *to = y + (image * out + first) * area + pixel;
        for (int64_t channel = 0; channel < in; channel += channels) {
          int64_t block = std::min(channels, in - channel);
          pack_pixels(x + (image * in + channel) * area, block, pixel, pixels, neighbours, panels);
          Rows rows = gradient ? rows_of_gradient(weight, channel, block, first, count, paired)
                               : rows_of_weight(weight, channel, block, first);
          multiply(count, pixels, rows, panels, to, area, channel > 0);
        }
      }
    });
  }

 private:
  // A pair is two values in a row of the weight (out, in k k).
  Rows rows_of_weight(const Bf16 *weight, int64_t channel, int64_t block, int64_t first) const {
    const Bf16 *from = weight + (first * in + channel) * taps;
    return {reinterpret_cast<const Pair *>(from), in * taps / 2, 0, 1, block * taps / 2};
  }

  // A pair is the values of two input channels, two rows of the weight (in, out k k), for the same tap.
  Rows rows_of_gradient(const Bf16 *weight, int64_t channel, int64_t block, int64_t first, int64_t count,
                        Pair *paired) const {
    int64_t row = out * taps, values = count * taps;
    for (int64_t i = 0; i < block; i += 2) {
      const Bf16 *even = weight + (channel + i) * row + first * taps;
      pair_rows(even, even + row, values, paired + i / 2 * values);
    }
    return {paired, taps, values, block / 2, taps};
  }

  // Packs the neighbours of `pixels` pixels in `block` planes, in the order of the pairs above.
  void pack_pixels(const float *planes, int64_t block, int64_t pixel, int64_t pixels, float *neighbours,
                   Pair *panels) const {
    int64_t pairs = block * taps / 2, area = height * width;
    for (int64_t column = 0; column < pixels; column += PANEL, panels += PANEL * pairs) {
      int64_t columns = std::min(PANEL, pixels - column), vectors = (columns + 15) / 16 * 16;
      for (int64_t i = 0; i < block; i += 2) {
        for (int64_t j = 0; j < 2; j++)
          take_neighbours(planes + (i + j) * area, pixel + column, columns, neighbours + j * taps * PANEL);
        Pair *to = panels + i / 2 * taps * PANEL;
        const float *odd = neighbours + taps * PANEL;
        for (int64_t tap = 0; tap < taps; tap++, to += PANEL) {
          if (gradient)  // the taps in reverse order
            pair_rows(neighbours + (taps - 1 - tap) * PANEL, odd + (taps - 1 - tap) * PANEL, vectors, to);
          else
            pair_rows(neighbours + 2 * tap * PANEL, neighbours + (2 * tap + 1) * PANEL, vectors, to);
        }
      }
    }
  }

  // Writes, for each tap, the values beside `count` pixels of a plane, to rows of PANEL values. Beyond the plane they are 0.
  void take_neighbours(const float *plane, int64_t pixel, int64_t count, float *to) const {
    int64_t reach = side / 2;
    for (int64_t done = 0; done < count;) {
      int64_t row = (pixel + done) / width, column = (pixel + done) % width, length = std::min(count - done, width - column);
      float *tap = to + done;
      for (int64_t down = -reach; down <= reach; down++) {
        const float *line = plane + (row + down) * width;
        bool outside = row + down < 0 || row + down >= height;
        for (int64_t right = -reach; right <= reach; right++, tap += PANEL) {
          int64_t from = outside ? length : std::max<int64_t>(0, -(column + right));
          int64_t until = outside ? length : std::min(length, width - column - right);
          std::fill(tap, tap + std::min(from, length), 0.0f);
          if (from < until) std::copy(line + column + right + from, line + column + right + until, tap + from);
          std::fill(tap + std::max(from, until), tap + length, 0.0f);
        }
      }
      done += length;
    }
  }
};

int convolve_bf16(bool gradient, int count, float **p, int64_t **shapes, const char **types) {
  ConvolutionBf16 c(shapes[0], shapes[1], gradient);
  bool fits = shapes[1][gradient ? 0 : 1] == c.in && shapes[1][3] == c.side && (c.side == 1 || c.side == 3) && c.in % 2 == 0;
  return c.convolve(has_bf16_weight(count, types) && fits, p[0], reinterpret_cast<const Bf16 *>(p[1]), p[2]);
}

}  // namespace

extern "C" {

// x (N, in, H, W), weight (out, in, k, k) -> y (N, out, H, W), for k of 1 or 3 and an even number of inputs
int conv_bf16(ARGUMENTS) { return convolve_bf16(false, count, p, shapes, types); }

// dy (N, out, H, W), weight (out, in, k, k) -> dx (N, in, H, W), for k of 1 or 3 and an even number of outputs
int conv_bf16_dx(ARGUMENTS) { return convolve_bf16(true, count, p, shapes, types); }

}  // extern "C"
