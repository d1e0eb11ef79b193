// The interface of MindSpore's custom operators of type "aot", and what every kernel needs of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>

// `p` has the inputs and then the outputs, all float32 and contiguous. `ranks`, `shapes` and `types` describe them. A
// kernel returns 0, or 1 for another type, for shapes that do not fit each other, or if memory is short.
#define ARGUMENTS int count, float **p, int *ranks, int64_t **shapes, const char **types, void *, void *

namespace {

int64_t product(const int64_t *shape, int rank) {
  return std::accumulate(shape, shape + rank, int64_t(1), std::multiplies<int64_t>());
}

bool all_float32(int count, const char **types) {
  return std::all_of(types, types + count, [](const char *type) { return std::strcmp(type, "float32") == 0; });
}

using Bf16 = uint16_t;  // the upper half of a float

float to_float(float value) { return value; }

float to_float(Bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace
