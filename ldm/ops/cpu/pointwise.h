// Activations and their derivatives, value by value.
#pragma once
#include <cmath>
#include <cstdint>

#include "operator.h"
#include "threads.h"
#include "vector_math.h"

namespace {

// The normal distribution.
float cumulative(float x) { return 0.5f + 0.5f * error_function(x * float(M_SQRT1_2)); }
float density(float x) { return float(M_2_SQRTPI * M_SQRT1_2 / 2) * exponential(-0.5f * x * x); }
float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// x -> `function` of each value of x.
template <typename Function>
int pointwise(const Function &function, int count, float **p, int *ranks, int64_t **shapes, const char **types) {
  return run_parts(all_float32(count, types), product(shapes[0], ranks[0]), [&](int64_t first, int64_t end) {
    const float *x = p[0];
    float *y = p[1];
#pragma omp simd
    for (int64_t i = first; i < end; i++) y[i] = function(x[i]);
  });
}

// x, dy -> dy times the `derivative` at each value of x.
template <typename Derivative>
int pointwise_dx(const Derivative &derivative, int count, float **p, int *ranks, int64_t **shapes, const char **types) {
  return run_parts(all_float32(count, types), product(shapes[0], ranks[0]), [&](int64_t first, int64_t end) {
    const float *x = p[0], *dy = p[1];
    float *dx = p[2];
#pragma omp simd
    for (int64_t i = first; i < end; i++) dx[i] = dy[i] * derivative(x[i]);
  });
}

}  // namespace

extern "C" {

// A weight of bf16, x -> the weight in fp32. x makes the result depend on the layer's input.
int unpack_bf16(ARGUMENTS) {
  bool valid = count == 3 && !std::strcmp(types[0], "bfloat16") && all_float32(1, types + 2);
  return run_parts(valid, product(shapes[0], ranks[0]), [&](int64_t first, int64_t end) {
    auto *weight = reinterpret_cast<const Bf16 *>(p[0]);
#pragma omp simd
    for (int64_t i = first; i < end; i++) p[2][i] = to_float(weight[i]);
  });
}

// x (..., C), bias (C,) -> x + bias
int add_row_bias(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]), c = shapes[1][0];
  bool valid = all_float32(count, types) && shapes[0][ranks[0] - 1] == c;
  return run(valid, values / c, values, [&](int64_t first, int64_t end) {
    const float *bias = p[1];
    for (int64_t row = first; row < end; row++) {
      const float *x = p[0] + row * c;
      float *y = p[2] + row * c;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) y[i] = x[i] + bias[i];
    }
  });
}

// x (N, C, ...), bias (C,) -> x + bias
int add_channel_bias(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]), c = shapes[1][0], pixels = product(shapes[0] + 2, ranks[0] - 2);
  return run(all_float32(count, types) && shapes[0][1] == c, values / pixels, values, [&](int64_t first, int64_t end) {
    for (int64_t plane = first; plane < end; plane++) {
      const float *x = p[0] + plane * pixels, bias = p[1][plane % c];
      float *y = p[2] + plane * pixels;
#pragma omp simd
      for (int64_t i = 0; i < pixels; i++) y[i] = x[i] + bias;
    }
  });
}

// x -> x * (1 + erf(x / sqrt 2)) / 2
int gelu(ARGUMENTS) {
  return pointwise([](float x) { return x * cumulative(x); }, count, p, ranks, shapes, types);
}

// x, dy -> dx
int gelu_dx(ARGUMENTS) {
  return pointwise_dx([](float x) { return cumulative(x) + x * density(x); }, count, p, ranks, shapes, types);
}

// x -> x * sigmoid(x)
int silu(ARGUMENTS) {
  return pointwise([](float x) { return x * sigmoid(x); }, count, p, ranks, shapes, types);
}

// x, dy -> dx
int silu_dx(ARGUMENTS) {
  auto derivative = [](float x) {
    float s = sigmoid(x);
    return s * (1 + x * (1 - s));
  };
  return pointwise_dx(derivative, count, p, ranks, shapes, types);
}

// x (..., 2 C) -> y (..., C): the first half times gelu of the second half
int gelu_gate(ARGUMENTS) {
  int64_t values = product(shapes[1], ranks[1]), c = shapes[1][ranks[1] - 1];
  return run(all_float32(count, types), values / c, values, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const float *value = p[0] + row * 2 * c, *gate = value + c;
      float *y = p[1] + row * c;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) y[i] = value[i] * gate[i] * cumulative(gate[i]);
    }
  });
}

// x, dy (..., C) -> dx (..., 2 C)
int gelu_gate_dx(ARGUMENTS) {
  int64_t values = product(shapes[1], ranks[1]), c = shapes[1][ranks[1] - 1];
  return run(all_float32(count, types), values / c, values, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const float *value = p[0] + row * 2 * c, *gate = value + c, *dy = p[1] + row * c;
      float *dvalue = p[2] + row * 2 * c, *dgate = dvalue + c;
#pragma omp simd
      for (int64_t i = 0; i < c; i++) {
        float phi = cumulative(gate[i]);
        dvalue[i] = dy[i] * gate[i] * phi;
        dgate[i] = dy[i] * value[i] * (phi + gate[i] * density(gate[i]));
      }
    }
  });
}

}  // extern "C"
