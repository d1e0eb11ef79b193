// The choice between the two products of bf16: by tiles, where they work, or by vectors.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "gemm_bf16.h"
#include "threads.h"
#include "tiles_bf16.h"

#if defined HAS_TILES && !defined TILES_ARE_MODELLED
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef HAS_TILES

#ifndef TILES_ARE_MODELLED  // by the tests, which define this function
// Whether the processor has tiles, and Linux lets this process use them: their state makes the frames of signals larger.
bool ask_for_tiles() {
  constexpr unsigned AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_BF16 && d & AMX_TILE &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

// Whether a product by tiles is the one by vectors. Of integers from -8 to 8 both are exact.
bool is_exact(int64_t m, int64_t n, const Rows &rows, const std::vector<Pair> &b, bool add) {
  std::vector<float> by_vectors(m * n, add ? 1 : NAN), by_tiles = by_vectors;
  multiply_by_vectors(m, n, rows, b.data(), by_vectors.data(), n, add);
  ConfiguredTiles tiles;
  multiply_by_tiles(m, n, rows, b.data(), by_tiles.data(), n, add);
  return by_tiles == by_vectors;
}

// Whether products by tiles are exact: of rows that are gathered, with edges of every kind, of rows that are loaded as they
// are, and of columns that are transposed.
bool tiles_are_exact() {
  constexpr int64_t PAIRS = 288, ROW = 300, M = 48;
  auto integers = [state = uint32_t(1)](int64_t count) mutable {
    auto next = [&] {
      state = 1664525 * state + 1013904223;  // Numerical Recipes
      auto value = float(int(state >> 16) % 17 - 8);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      return bits;
    };
    std::vector<Pair> pairs(count);
    for (Pair &pair : pairs) pair = next() >> 16, pair |= next();
    return pairs;
  };
  std::vector<Pair> a = integers(M * ROW), b = integers(2 * PANEL * PAIRS);
  return is_exact(35, 90, {a.data(), ROW, 0, 1, 266}, b, true) && is_exact(M, 80, {a.data(), ROW, 0, 1, PAIRS}, b, false) &&
         is_exact(35, 50, {a.data(), 1, M, PAIRS, 1}, b, false);
}

// Whether products are by tiles: where that works, unless LDM_AMX is 0.
bool uses_tiles() {
  static const bool uses = [] {
    const char *wanted = std::getenv("LDM_AMX");
    return !(wanted && std::string(wanted) == "0") && ask_for_tiles() && tiles_are_exact();
  }();
  return uses;
}

#else

bool uses_tiles() { return false; }
struct ConfiguredTiles {};

#endif

// As `run`, for a `compute` that calls `multiply`. A thread has its tiles configured from the first product to the last.
template <typename Compute>
int run_products(bool valid, int64_t items, int64_t values, const Compute &compute) {
  return run(valid, items, values, [&](int64_t first, int64_t end) {
    std::optional<ConfiguredTiles> tiles;
    if (uses_tiles()) tiles.emplace();
    compute(first, end);
  });
}

// c (m, n) = a b, or c += a b, as multiply_by_vectors. Fewer pairs than a tile has, as of four channels, are left to vectors.
void multiply(int64_t m, int64_t n, const Rows &a, const Pair *b, float *c, int64_t ldc, bool add) {
#ifdef HAS_TILES
  if (uses_tiles() && a.pairs() >= SIDE) return multiply_by_tiles(m, n, a, b, c, ldc, add);
#endif
  multiply_by_vectors(m, n, a, b, c, ldc, add);
}

}  // namespace
