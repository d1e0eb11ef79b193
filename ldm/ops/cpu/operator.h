// The interface of MindSpore's custom operators of type "aot", and what every kernel needs of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>

// `p` has the inputs and then the outputs, all contiguous. `ranks`, `shapes` and `types` describe them. They are float32,
// except for a weight that is bfloat16 where a kernel says so. A kernel returns 0, or 1 for another type, for shapes that do
// not fit each other, or if memory is short.
#define ARGUMENTS int count, float **p, int *ranks, int64_t **shapes, const char **types, void *, void *

namespace {

int64_t product(const int64_t *shape, int rank) {
  return std::accumulate(shape, shape + rank, int64_t(1), std::multiplies<int64_t>());
}

bool all_float32(int count, const char **types) {
  return std::all_of(types, types + count, [](const char *type) { return std::strcmp(type, "float32") == 0; });
}

bool is_bf16(const char *type) { return std::strcmp(type, "bfloat16") == 0; }

// Whether there are x, a weight in bf16 and a result, x and the result in fp32.
bool has_bf16_weight(int count, const char **types) {
  return count == 3 && all_float32(1, types) && is_bf16(types[1]) && all_float32(1, types + 2);
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
