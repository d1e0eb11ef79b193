// Matrix products of bf16 values with sums in fp32, by the tiles of Intel's AMX (AMX-TILE and AMX-BF16).
//
// A tile has 16 rows of 64 bytes: pairs of the left factor, 16 pairs by 16 columns of a panel, or sums. TDPBF16PS multiplies
// two tiles and adds to a third. On Sapphire Rapids it takes the place of 256 VDPBF16PS, and 16 cycles; loading a tile from
// the nearest cache takes 8. So a step of 16 pairs of 32 x 32 sums, with 4 products and 4 loads, waits for the products.
//
// Against these, packing weighs more than for vectors. Per row and 16 pairs of a linear layer, rounding takes about 4 cycles,
// and the products 16 for the 256 columns that share it. Transposing 16 x 16 pairs of the weight takes about 70, and the
// products 1,008 for as many rows that share it. Larger blocks than linear_bf16.h's would halve the former. They are as for
// vectors, because no time was measured: nobody ran this on such a processor yet.
#pragma once
#include "gemm_bf16.h"

#if (defined __AMX_TILE__ && defined __AMX_BF16__) || (defined __AMXTILE__ && defined __AMXBF16__)  // g++, or clang up to 14
#define HAS_TILES

namespace {

constexpr int64_t SIDE = 16;          // rows, pairs, and columns of sums
constexpr int64_t CHUNK = 16 * SIDE;  // pairs that are summed over before the sums are written

// What LDTILECFG reads. All tiles have the full size, at an edge too: configuring them takes longer than a small product, and
// sets the sums to 0.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);
const TileConfiguration TILES;

// The tiles of this thread, while it lives. What other code of the thread has in tiles is lost, so they are given back.
class ConfiguredTiles {
 public:
  ConfiguredTiles() { _tile_loadconfig(&TILES); }
  ~ConfiguredTiles() { _tile_release(); }
  ConfiguredTiles(const ConfiguredTiles &) = delete;
};

// g++ does not know that loading a tile reads memory. What was written before this is there.
//
// Whatever loads tiles calls this first. A test fails if Sums::load has none, where g++ does leave out what it writes. No test
// sees the two others: without them g++ 12 writes the gathered rows and the panels nevertheless.
void finish_writing() { asm volatile("" ::: "memory"); }

// A tile's number must be a literal.
#define WITH_TILE(tile, instruction, ...)     \
  switch (tile) {                             \
    case 0: instruction(0, __VA_ARGS__); break; \
    case 1: instruction(1, __VA_ARGS__); break; \
    case 2: instruction(2, __VA_ARGS__); break; \
    case 3: instruction(3, __VA_ARGS__); break; \
  }

// The sums of a tile, in a matrix where it may have fewer rows and columns.
struct Sums {
  float *c;
  int64_t ldc, rows, columns;

  Sums from(int64_t row, int64_t column) const { return {c + row * ldc + column, ldc, rows - row, columns - column}; }
  bool whole() const { return rows >= SIDE && columns >= SIDE; }

  // Sets tile 0, 1, 2 or 3 to what is in memory.
  void load(int tile) const {
    if (whole()) {
      WITH_TILE(tile, _tile_loadd, c, ldc * sizeof(float))
      return;
    }
    alignas(64) float values[SIDE * SIDE];
    for (int64_t row = 0; row < SIDE; row++)
      _mm512_store_ps(values + row * SIDE, _mm512_maskz_loadu_ps(row < rows ? lanes(columns) : 0, c + row * ldc));
    finish_writing();
    WITH_TILE(tile, _tile_loadd, values, SIDE * sizeof(float))
  }

  void store(int tile) const {
    if (whole()) {
      WITH_TILE(tile, _tile_stored, c, ldc * sizeof(float))
      return;
    }
    alignas(64) float values[SIDE * SIDE];
    WITH_TILE(tile, _tile_stored, values, SIDE * sizeof(float))
    for (int64_t row = 0; row < std::min(SIDE, rows); row++)
      _mm512_mask_storeu_ps(c + row * ldc, lanes(columns), _mm512_load_ps(values + row * SIDE));
  }
};
#undef WITH_TILE

// Rows of whole tiles of the left factor, and a panel. A step takes 16 pairs. The last one may begin in the midst of those
// of the step before, at `last_b`, and has zeros for them in `a`.
struct Factors {
  const Pair *a;
  int64_t row, steps;  // distance of two rows of a
  const Pair *b, *last_b;
};

// The sums of up to 2 x 2 tiles: 0 and 1 above 2 and 3. The second row has one at least.
void multiply_2x2_tiles(const Factors &factors, const Sums &sums, bool add) {
  finish_writing();
  const Pair *a = factors.a, *b = factors.b, *below = a + SIDE * factors.row;
  int64_t stride = factors.row * sizeof(Pair);
  bool wide = sums.columns > SIDE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add)
    for (int i = 0; i < 4; i++)
      if (i % 2 == 0 || wide) sums.from(i / 2 * SIDE, i % 2 * SIDE).load(i);
  for (int64_t step = 0; step < factors.steps; step++, a += SIDE, below += SIDE, b += SIDE * PANEL) {
    const Pair *rows = std::min(b, factors.last_b);
    _tile_loadd(4, a, stride);
    _tile_loadd(6, rows, PANEL * sizeof(Pair));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, below, stride);
    _tile_dpbf16ps(2, 5, 6);
    if (wide) {
      _tile_loadd(7, rows + SIDE, PANEL * sizeof(Pair));
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  for (int i = 0; i < 4; i++)
    if (i % 2 == 0 || wide) sums.from(i / 2 * SIDE, i % 2 * SIDE).store(i);
}

// The sums of up to 1 x 4 tiles. (With 1 x 2, a product would wait for the one before, which takes 52 cycles until its sums
// are there.)
void multiply_1x4_tiles(const Factors &factors, const Sums &sums, bool add) {
  finish_writing();
  const Pair *a = factors.a, *b = factors.b;
  int64_t stride = factors.row * sizeof(Pair), tiles = std::min<int64_t>(4, (sums.columns + SIDE - 1) / SIDE);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add)
    for (int i = 0; i < tiles; i++) sums.from(0, i * SIDE).load(i);
  for (int64_t step = 0; step < factors.steps; step++, a += SIDE, b += SIDE * PANEL) {
    const Pair *rows = std::min(b, factors.last_b);
    _tile_loadd(4, a, stride);
    _tile_loadd(5, rows, PANEL * sizeof(Pair));
    _tile_dpbf16ps(0, 4, 5);
    if (tiles > 1) {
      _tile_loadd(6, rows + SIDE, PANEL * sizeof(Pair));
      _tile_dpbf16ps(1, 4, 6);
    }
    if (tiles > 2) {
      _tile_loadd(7, rows + 2 * SIDE, PANEL * sizeof(Pair));
      _tile_dpbf16ps(2, 4, 7);
    }
    if (tiles > 3) {
      _tile_loadd(5, rows + 3 * SIDE, PANEL * sizeof(Pair));
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  for (int i = 0; i < tiles; i++) sums.from(0, i * SIDE).store(i);
}

// Copies 16 pairs of up to 16 rows, the first one `first`, to rows that are CHUNK apart. Pairs that are not in `wanted` become
// zero. (The rows below may hold anything: their sums are not stored.)
void gather_tile(const Rows &a, int64_t rows, int64_t first, __mmask16 wanted, Pair *to) {
  if (a.outers > 1 && a.inners == 1 && a.row == 1) {  // the transpose is in memory
    transpose_16x16(a.data + first * a.outer, a.outer, SIDE, rows, to, CHUNK);
    for (int64_t row = 0; row < rows; row++)
      _mm512_storeu_si512(to + row * CHUNK, _mm512_maskz_loadu_epi32(wanted, to + row * CHUNK));
  } else if (a.outers == 1) {
    for (int64_t row = 0; row < rows; row++)
      _mm512_storeu_si512(to + row * CHUNK, _mm512_maskz_loadu_epi32(wanted, a.data + row * a.row + first));
  } else {
    // One division for all rows: one for each pair would take longer than the products.
    int64_t offsets[SIDE], outer = first / a.inners, inner = first % a.inners;
    for (int64_t i = 0; i < SIDE; i++) {
      offsets[i] = outer * a.outer + inner;
      if (++inner == a.inners) inner = 0, outer++;
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < SIDE; i++) to[row * CHUNK + i] = wanted >> i & 1 ? a.data[row * a.row + offsets[i]] : 0;
  }
}

// As multiply_by_vectors, for 16 pairs at least, in a thread with ConfiguredTiles. The sum of a column and row depends on
// these alone, not on how many there are. For a single row it takes as long as by vectors, but from two on it is faster.
void multiply_by_tiles(int64_t m, int64_t n, const Rows &a, const Pair *b, float *c, int64_t ldc, bool add) {
  int64_t pairs = a.pairs();
  alignas(64) Pair gathered[2 * SIDE * CHUNK];
  for (int64_t row = 0; row < m; row += 2 * SIDE) {
    Rows block = a.from(row);
    int64_t rows = std::min(2 * SIDE, m - row);
    bool gathers = a.outers > 1 || rows % SIDE || pairs % SIDE;
    for (int64_t first = 0; first < pairs; first += CHUNK) {
      int64_t steps = (std::min(CHUNK, pairs - first) + SIDE - 1) / SIDE;
      for (int64_t step = 0; gathers && step < steps; step++) {
        int64_t pair = first + step * SIDE, from = std::min(pair, pairs - SIDE);
        auto wanted = __mmask16(0xffffu << (pair - from));
        for (int64_t r = 0; r < rows; r += SIDE)
          gather_tile(block.from(r), std::min(SIDE, rows - r), from, wanted, gathered + r * CHUNK + step * SIDE);
      }
      for (int64_t column = 0; column < n; column += PANEL) {
        const Pair *panel = b + column * pairs;
        Factors factors = {gathers ? gathered : block.data + first, gathers ? CHUNK : a.row, steps,
                           panel + first * PANEL, panel + (pairs - SIDE) * PANEL};
        Sums sums = {c + row * ldc + column, ldc, rows, std::min(PANEL, n - column)};
        if (rows <= SIDE) {
          multiply_1x4_tiles(factors, sums, add || first > 0);
          continue;
        }
        for (int64_t half = 0; half < sums.columns; half += 2 * SIDE) {
          multiply_2x2_tiles(factors, sums.from(0, half), add || first > 0);
          factors.b += 2 * SIDE, factors.last_b += 2 * SIDE;
        }
      }
    }
  }
}

}  // namespace

#endif
