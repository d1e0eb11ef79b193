// 3x3 convolutions with stride 1 and padding 1, and their gradients for the input.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "operator.h"
#include "threads.h"

namespace {

// A 3x3 convolution of x (N, in, H, W), padded by zeros, by Winograd's F(2x2, 3x3) (Lavin and Gray 2016).
//
// 2x2 pixels of y come from a tile of 4x4 pixels of x by 16 products for each pair of channels, instead of 36. The 16
// values of a tile are next to each other, as planes of a channel. Planes that are far apart are often a power of two
// apart, and evict each other from the processor's cache.
struct Winograd {
  int64_t images, in, out, height, width, down, across, tiles;

  Winograd(const int64_t *x, int64_t out)
      : images(x[0]), in(x[1]), out(out), height(x[2]), width(x[3]), down((height + 1) / 2), across((width + 1) / 2),
        tiles(images * down * across) {}

  // `transposed`: the weight is (in, out, 3, 3) and rotated by 180 degrees, which gives the gradient for the input.
  template <typename Weight>
  int convolve(bool valid, const float *x, const Weight *weight, bool transposed, float *u, float *y) const {
    int failed = run(valid, out, 16 * out * in, [&](int64_t first, int64_t end) {
      Scratch scratch(9 * in);
      for (int64_t o = first; o < end; o++) transform_weight(weight, transposed, o, scratch.data(), u + 16 * o * in);
    });
    if (failed) return failed;
    // If there are few chunks of tiles, the channels are divided among the threads too.
    int64_t chunks = (tiles + CHUNK - 1) / CHUNK, parts = chunks < 16 ? std::min<int64_t>(4, out) : 1;
    return run(true, chunks * parts, 16 * tiles * in, [&](int64_t start, int64_t end) {
      int64_t most_channels = (out + parts - 1) / parts;
      Scratch scratch(16 * CHUNK * (in + most_channels) + line_values());
      float *v = scratch.data(), *m = v + 16 * CHUNK * in;
      float *lines = m + 16 * CHUNK * most_channels;
      for (int64_t item = start; item < end; item++) {
        int64_t first = item / parts * CHUNK, part = item % parts, count = std::min(CHUNK, tiles - first);
        int64_t channel = out * part / parts, channels = out * (part + 1) / parts - channel;
        if (part == 0 || item == start) {
          clear(lines);
          for (int64_t i = 0; i < in; i++) transform_input(x, i, first, count, lines, v + 16 * i * count);
        }
        for (int64_t k = 0; k < 16; k++)
          multiply('N', 'N', channels, count, in, 1, u + (16 * channel + k) * in, 16 * in, v + k * count, 16 * count, 0,
                   m + k * count, 16 * count);
        transform_output(m, first, count, channel, channels, lines, y);
      }
    });
  }

 protected:
  static constexpr int64_t CHUNK = 96;  // tiles at a time: oneDNN is fastest with multiples of 48 columns

  int64_t line() const { return 2 * across + 2; }
  int64_t line_values() const { return 4 * line() + width; }

  // G g G^T of each 3x3 weight g of an output channel, to u (16, in). `planes` holds the nine values of g apart, for whole
  // vectors.
  template <typename Weight>
  void transform_weight(const Weight *weight, bool transposed, int64_t o, float *planes, float *u) const {
    const Weight *g = weight + (transposed ? o : o * in) * 9;
    for (int64_t i = 0; i < in; i++, g += transposed ? out * 9 : 9)
      for (int64_t k = 0; k < 9; k++) planes[(transposed ? 8 - k : k) * in + i] = to_float(g[k]);
#pragma omp simd
    for (int64_t i = 0; i < in; i++) {
      float t[4][3];
      for (int64_t k = 0; k < 3; k++) {
        float a = planes[k * in + i], b = planes[(3 + k) * in + i], c = planes[(6 + k) * in + i];
        t[0][k] = a, t[1][k] = (a + b + c) / 2, t[2][k] = (a - b + c) / 2, t[3][k] = c;
      }
      for (int64_t k = 0; k < 4; k++) {
        float *to = u + 4 * k * in + i, a = t[k][0], b = t[k][1], c = t[k][2];
        to[0] = a, to[in] = (a + b + c) / 2, to[2 * in] = (a - b + c) / 2, to[3 * in] = c;
      }
    }
  }

  // Calls visit(offset, image, row, column, length) for runs of `length` tiles side by side, from first to first + count.
  template <typename Visit>
  void for_strips(int64_t first, int64_t count, const Visit &visit) const {
    for (int64_t offset = 0; offset < count;) {
      int64_t tile = first + offset, column = tile % across, length = std::min(count - offset, across - column);
      visit(offset, tile / across / down, tile / across % down, column, length);
      offset += length;
    }
  }

  // Clears `lines`, of which transform_input does not write the padding.
  void clear(float *lines) const { std::fill(lines, lines + line_values(), 0.0f); }

  // B^T d B of each tile d of an input channel, to v (16, count)
  void transform_input(const float *x, int64_t channel, int64_t first, int64_t count, float *lines, float *v) const {
    const float *zeros = lines + 4 * line();
    for_strips(first, count, [&](int64_t offset, int64_t image, int64_t row, int64_t column, int64_t length) {
      const float *plane = x + (image * in + channel) * height * width, *d[4];
      for (int64_t k = 0; k < 4; k++) {
        int64_t above = 2 * row - 1 + k;
        d[k] = above < 0 || above >= height ? zeros : plane + above * width;
      }
      int64_t from = std::max<int64_t>(0, 2 * column - 1), end = std::min(width, 2 * (column + length) + 1);
      float *line0 = lines + 1, *line1 = line0 + line(), *line2 = line1 + line(), *line3 = line2 + line();
      const float *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
#pragma omp simd
      for (int64_t k = from; k < end; k++) {
        line0[k] = d0[k] - d2[k], line1[k] = d1[k] + d2[k], line2[k] = d2[k] - d1[k], line3[k] = d1[k] - d3[k];
      }
      for (int64_t k = 0; k < 4; k++) {
        const float *from_line = lines + k * line() + 2 * column;
        float *to = v + 4 * k * count + offset;
#pragma omp simd
        for (int64_t j = 0; j < length; j++) {
          float a = from_line[2 * j], b = from_line[2 * j + 1], c = from_line[2 * j + 2], e = from_line[2 * j + 3];
          to[j] = a - c, to[count + j] = b + c, to[2 * count + j] = c - b, to[3 * count + j] = b - e;
        }
      }
    });
  }

  // A^T m A of each tile of m (out, 16, count): 2x2 pixels of y, or those of them that lie within
  void transform_output(const float *m, int64_t first, int64_t count, int64_t channel, int64_t channels, float *lines,
            float *y) const {
    for (int64_t o = 0; o < channels; o++) {
      for_strips(first, count, [&](int64_t offset, int64_t image, int64_t row, int64_t column, int64_t length) {
        float *upper = lines, *lower = lines + line();
#pragma omp simd
        for (int64_t j = 0; j < length; j++) {
          const float *from = m + 16 * o * count + offset + j;
          float above[4], below[4];
          for (int64_t k = 0; k < 4; k++) {
            float a = from[k * count], b = from[(4 + k) * count], c = from[(8 + k) * count], e = from[(12 + k) * count];
            above[k] = a + b + c, below[k] = b - c - e;
          }
          upper[2 * j] = above[0] + above[1] + above[2], upper[2 * j + 1] = above[1] - above[2] - above[3];
          lower[2 * j] = below[0] + below[1] + below[2], lower[2 * j + 1] = below[1] - below[2] - below[3];
        }
        float *to = y + ((image * out + channel + o) * height + 2 * row) * width + 2 * column;
        int64_t within = std::min(2 * length, width - 2 * column);
        std::copy(upper, upper + within, to);
        if (2 * row + 1 < height) std::copy(lower, lower + within, to + width);
      });
    }
  }
};

// The weight is fp32, or bf16, of which the values are those that fp32 has for them.
int winograd(bool transposed, int count, float **p, int64_t **shapes, const char **types) {
  Winograd w(shapes[0], shapes[2][1]);
  bool fits = shapes[1][transposed ? 0 : 1] == w.in && shapes[1][2] == 3 && shapes[1][3] == 3;
  if (is_bf16(types[1])) {
    bool valid = count == 4 && has_bf16_weight(3, types) && all_float32(1, types + 3);
    return w.convolve(fits && valid, p[0], reinterpret_cast<const Bf16 *>(p[1]), transposed, p[3], p[2]);
  }
  return w.convolve(fits && all_float32(count, types), p[0], p[1], transposed, p[3], p[2]);
}

}  // namespace

extern "C" {

// x (N, in, H, W), weight (out, in, 3, 3) -> y, and u (out, 16, in) which is intermediate memory
int convolution(ARGUMENTS) { return winograd(false, count, p, shapes, types); }

// dy (N, out, H, W), weight (out, in, 3, 3) -> dx, and u (in, 16, out) which is intermediate memory
int convolution_dx(ARGUMENTS) { return winograd(true, count, p, shapes, types); }

}  // extern "C"
