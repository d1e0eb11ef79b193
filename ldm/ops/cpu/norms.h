// Group and layer normalization and their gradients.
//
// Sums run over PART values in float32 and continue in double: the mean of a million squares in float32 alone is off by
// 2e-5.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "operator.h"
#include "threads.h"

namespace {

constexpr int64_t COLUMNS = 64;

double sum(const float *x, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float partial = 0;
    int64_t end = std::min(start + PART, n);
#pragma omp simd reduction(+ : partial)
    for (int64_t i = start; i < end; i++) partial += x[i];
    total += partial;
  }
  return total;
}

// The sum of (x - mean) * (y - shift).
double sum_of_products(const float *x, float mean, const float *y, float shift, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float partial = 0;
    int64_t end = std::min(start + PART, n);
#pragma omp simd reduction(+ : partial)
    for (int64_t i = start; i < end; i++) partial += (x[i] - mean) * (y[i] - shift);
    total += partial;
  }
  return total;
}

struct Statistics {
  float mean, inverse_std;

  Statistics(const float *x, int64_t n, double eps) {
    mean = float(sum(x, n) / n);
    inverse_std = float(1 / std::sqrt(sum_of_products(x, mean, x, mean, n) / n + eps));
  }
};

// Groups of channels of x (N, C, H, W). The values of a group are contiguous. settings: the number of groups, eps.
struct Grouping {
  int64_t images, pixels, groups, group_channels, values;
  double eps;

  Grouping(const int64_t *shape, const float *settings)
      : images(shape[0]), pixels(shape[2] * shape[3]), groups(int64_t(settings[0])), group_channels(shape[1] / groups),
        values(group_channels * pixels), eps(settings[1]) {}

  int64_t all() const { return images * groups * values; }
  bool fits(const int64_t *shape) const { return groups * group_channels == shape[1]; }
};

}  // namespace

extern "C" {

// x, weight (C,), bias (C,), settings -> y
int group_norm(ARGUMENTS) {
  Grouping g(shapes[0], p[3]);
  bool valid = all_float32(count, types) && g.fits(shapes[0]);
  return run(valid, g.images * g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      const float *x = p[0] + group * g.values;
      float *y = p[4] + group * g.values;
      Statistics s(x, g.values, g.eps);
      for (int64_t i = 0; i < g.group_channels; i++, x += g.pixels, y += g.pixels) {
        int64_t channel = group % g.groups * g.group_channels + i;
        float scale = s.inverse_std * p[1][channel], shift = p[2][channel];
#pragma omp simd
        for (int64_t k = 0; k < g.pixels; k++) y[k] = (x[k] - s.mean) * scale + shift;
      }
    }
  });
}

// x, weight, dy, settings -> dx. With g = dy * weight and x normalized to x^, over a group:
// dx = (g - mean(g) - x^ mean(g x^)) / std
int group_norm_dx(ARGUMENTS) {
  Grouping g(shapes[0], p[3]);
  bool valid = all_float32(count, types) && g.fits(shapes[0]);
  return run(valid, g.images * g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      const float *weight = p[1] + group % g.groups * g.group_channels;
      const float *x = p[0] + group * g.values, *dy = p[2] + group * g.values;
      float *dx = p[4] + group * g.values;
      Statistics s(x, g.values, g.eps);
      double sum_g = 0, sum_gx = 0;
      for (int64_t i = 0; i < g.group_channels; i++) {
        sum_g += weight[i] * sum(dy + i * g.pixels, g.pixels);
        sum_gx += weight[i] * sum_of_products(x + i * g.pixels, s.mean, dy + i * g.pixels, 0, g.pixels);
      }
      float shift = float(sum_g / g.values * s.inverse_std);
      float slope = float(sum_gx / g.values * s.inverse_std * s.inverse_std * s.inverse_std);
      for (int64_t i = 0; i < g.group_channels; i++, x += g.pixels, dy += g.pixels, dx += g.pixels) {
        float scale = weight[i] * s.inverse_std;
#pragma omp simd
        for (int64_t k = 0; k < g.pixels; k++) dx[k] = dy[k] * scale - (x[k] - s.mean) * slope - shift;
      }
    }
  });
}

// x, dy, settings -> dweight (C,), dbias (C,)
int group_norm_dweight(ARGUMENTS) {
  Grouping g(shapes[0], p[2]);
  bool valid = all_float32(count, types) && g.fits(shapes[0]);
  return run(valid, g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      float *dweight = p[3] + group * g.group_channels, *dbias = p[4] + group * g.group_channels;
      std::fill(dweight, dweight + g.group_channels, 0.0f);
      std::fill(dbias, dbias + g.group_channels, 0.0f);
      for (int64_t n = 0; n < g.images; n++) {
        const float *x = p[0] + (n * g.groups + group) * g.values, *dy = p[1] + (n * g.groups + group) * g.values;
        Statistics s(x, g.values, g.eps);
        for (int64_t i = 0; i < g.group_channels; i++, x += g.pixels, dy += g.pixels) {
          dweight[i] += float(s.inverse_std * sum_of_products(x, s.mean, dy, 0, g.pixels));
          dbias[i] += float(sum(dy, g.pixels));
        }
      }
    }
  });
}

// x (rows, C), weight (C,), bias (C,), settings: eps -> y
int layer_norm(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), rows, rows * c, [&](int64_t first, int64_t end) {
    const float *weight = p[1], *bias = p[2];
    for (int64_t row = first; row < end; row++) {
      const float *x = p[0] + row * c;
      float *y = p[4] + row * c;
      Statistics s(x, c, p[3][0]);
#pragma omp simd
      for (int64_t i = 0; i < c; i++) y[i] = (x[i] - s.mean) * s.inverse_std * weight[i] + bias[i];
    }
  });
}

// x, weight, dy, settings -> dx, as group_norm_dx, over a row
int layer_norm_dx(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), rows, rows * c, [&](int64_t first, int64_t end) {
    const float *weight = p[1];
    for (int64_t row = first; row < end; row++) {
      const float *x = p[0] + row * c, *dy = p[2] + row * c;
      float *dx = p[4] + row * c;
      Statistics s(x, c, p[3][0]);
      float sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
      for (int64_t i = 0; i < c; i++) {
        sum_g += dy[i] * weight[i];
        sum_gx += dy[i] * weight[i] * (x[i] - s.mean);
      }
      float shift = sum_g / c * s.inverse_std, slope = sum_gx / c * s.inverse_std * s.inverse_std * s.inverse_std;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) dx[i] = dy[i] * weight[i] * s.inverse_std - (x[i] - s.mean) * slope - shift;
    }
  });
}

// x, dy, settings -> dweight (C,), dbias (C,). An item is COLUMNS columns. Each thread computes the
// statistics of all rows.
int layer_norm_dweight(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), (c + COLUMNS - 1) / COLUMNS, rows * c, [&](int64_t first, int64_t end) {
    Scratch scratch(2 * rows);
    float *mean = scratch.data(), *inverse_std = mean + rows;
    for (int64_t row = 0; row < rows; row++) {
      Statistics s(p[0] + row * c, c, p[2][0]);
      mean[row] = s.mean, inverse_std[row] = s.inverse_std;
    }
    for (int64_t start = first * COLUMNS; start < std::min(end * COLUMNS, c); start += COLUMNS) {
      int64_t columns = std::min(COLUMNS, c - start);
      double sum_dy[COLUMNS] = {0}, sum_dy_x[COLUMNS] = {0};
      for (int64_t row = 0; row < rows; row++) {
        const float *x = p[0] + row * c + start, *dy = p[1] + row * c + start;
#pragma omp simd
        for (int64_t i = 0; i < columns; i++) {
          sum_dy[i] += dy[i];
          sum_dy_x[i] += dy[i] * (x[i] - mean[row]) * inverse_std[row];
        }
      }
      std::copy(sum_dy_x, sum_dy_x + columns, p[3] + start);
      std::copy(sum_dy, sum_dy + columns, p[4] + start);
    }
  });
}

}  // extern "C"
