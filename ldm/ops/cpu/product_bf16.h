// The choice between the two products of bf16: by tiles, where they work, or by vectors.
#pragma once
#include <cstdlib>
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

// Whether a product by tiles is the one by vectors, at edges of every kind. Of integers from -8 to 8 both are exact.
bool tiles_are_exact() {
  constexpr int64_t M = 35, N = 90, PAIRS = 266, PANELS = (N + PANEL - 1) / PANEL;
  auto bits = [](int64_t i) {
    auto value = float(i * i % 17 - 8);
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    return wide >> 16;
  };
  std::vector<Pair> a(M * PAIRS), b(PANELS * PANEL * PAIRS);
  for (size_t i = 0; i < a.size(); i++) a[i] = bits(i) | bits(i + 5) << 16;
  for (size_t i = 0; i < b.size(); i++) b[i] = bits(i + 3) | bits(3 * i) << 16;
  std::vector<float> by_vectors(M * N, 1), by_tiles(M * N, 1);
  Rows rows = {a.data(), PAIRS, 0, 1, PAIRS};
  multiply_by_vectors(M, N, rows, b.data(), by_vectors.data(), N, true);
  ConfiguredTiles tiles;
  multiply_by_tiles(M, N, rows, b.data(), by_tiles.data(), N, true);
  return by_tiles == by_vectors;
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
