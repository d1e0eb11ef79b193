// Matrix products of bf16 values with sums in fp32, by the instructions of AVX512-BF16, and the packing of their factors.
//
// They multiply and add the values that are summed over in pairs, 32 bits each, the first one in the lower half. So do the
// tiles of tiles_bf16.h, for which factors are packed alike.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "operator.h"

namespace {

using Pair = uint32_t;

constexpr int64_t PANEL = 64;  // columns that are computed together: four vectors

// The left matrix of a product: the pair `outer` * `inners` + `inner` of a row.
struct Rows {
  const Pair *data;
  int64_t row, outer;  // distances of two rows, and of two `outer`
  int64_t outers, inners;

  Rows from(int64_t first) const { return {data + first * row, row, outer, outers, inners}; }
  int64_t pairs() const { return outers * inners; }
};

// c (ROWS, 16 VECTORS) = a b, or c += a b. b has a row of PANEL columns for each pair. The last vector of c has the columns
// of `mask` alone.
template <int ROWS, int VECTORS>
void multiply_tile(const Rows &a, const Pair *b, float *c, int64_t ldc, bool add, __mmask16 mask) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) {
      __mmask16 columns = v == VECTORS - 1 ? mask : __mmask16(-1);
      sums[r][v] = add ? _mm512_maskz_loadu_ps(columns, c + r * ldc + 16 * v) : _mm512_setzero_ps();
    }
  for (int64_t outer = 0; outer < a.outers; outer++) {
    const Pair *row = a.data + outer * a.outer;
    for (int64_t inner = 0; inner < a.inners; inner++, row++, b += PANEL) {
      __m512bh columns[VECTORS];
      for (int v = 0; v < VECTORS; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
      for (int r = 0; r < ROWS; r++) {
        __m512bh value = (__m512bh)_mm512_set1_epi32(int(row[r * a.row]));
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], value, columns[v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      _mm512_mask_storeu_ps(c + r * ldc + 16 * v, v == VECTORS - 1 ? mask : __mmask16(-1), sums[r][v]);
}

// The sums of ROWS x VECTORS tiles are in registers: 24 of the 32.
template <int ROWS, int VECTORS>
void multiply_panel(int64_t m, const Rows &a, const Pair *b, float *c, int64_t ldc, bool add, __mmask16 mask) {
  int64_t row = 0;
  for (; row + ROWS <= m; row += ROWS)
    multiply_tile<ROWS, VECTORS>(a.from(row), b, c + row * ldc, ldc, add, mask);
  for (; row + 2 <= m; row += 2) multiply_tile<2, VECTORS>(a.from(row), b, c + row * ldc, ldc, add, mask);
  if (row < m) multiply_tile<1, VECTORS>(a.from(row), b, c + row * ldc, ldc, add, mask);
}

// c (m, n) = a b, or c += a b. b is in panels of PANEL columns, one after the other. The last one's rows have as many
// columns too, of which whole vectors are read.
void multiply_by_vectors(int64_t m, int64_t n, const Rows &a, const Pair *b, float *c, int64_t ldc, bool add) {
  for (int64_t column = 0; column < n; column += PANEL, b += PANEL * a.pairs(), c += PANEL) {
    int64_t columns = std::min(PANEL, n - column), vectors = (columns + 15) / 16;
    auto mask = __mmask16((1u << (columns - 16 * (vectors - 1))) - 1);
    auto multiply = vectors == 4   ? multiply_panel<6, 4>
                    : vectors == 3 ? multiply_panel<8, 3>
                    : vectors == 2 ? multiply_panel<12, 2>
                                   : multiply_panel<12, 1>;
    multiply(m, a, b, c, ldc, add, mask);
  }
}

// The first `columns` of 16 lanes.
__mmask16 lanes(int64_t columns) { return columns >= 16 ? __mmask16(-1) : __mmask16((1u << columns) - 1); }

// Rounds `count` floats times `scale` to pairs. An odd one is paired with zero.
void round_row(const float *x, int64_t count, float scale, Pair *pairs) {
  __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 32) {
    __m512 low = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - i), x + i), factor);
    __m512 high = _mm512_setzero_ps();
    if (count - i > 16) high = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - i - 16), x + i + 16), factor);
    _mm512_mask_storeu_epi32(pairs + i / 2, lanes((count - i + 1) / 2), (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Pairs the values of a vector's lower 16 values with those of its upper 16.
__m512i interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Rounds two rows of `count` floats, and pairs the values of one with those of the other. `odd` may be null, for zeros.
void pair_rows(const float *even, const float *odd, int64_t count, Pair *pairs) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 columns = lanes(count - i);
    __m512 low = _mm512_maskz_loadu_ps(columns, even + i);
    __m512 high = odd ? _mm512_maskz_loadu_ps(columns, odd + i) : _mm512_setzero_ps();
    _mm512_mask_storeu_epi32(pairs + i, columns, interleave((__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }
}

// As above, of values that are bf16 already.
void pair_rows(const Bf16 *even, const Bf16 *odd, int64_t count, Pair *pairs) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 columns = lanes(count - i);
    __m256i low = _mm256_maskz_loadu_epi16(columns, even + i);
    __m256i high = odd ? _mm256_maskz_loadu_epi16(columns, odd + i) : _mm256_setzero_si256();
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_mask_storeu_epi32(pairs + i, columns, interleave(both));
  }
}

// Packs b of `k` rows of n values, `stride` apart, to panels of (k + 1) / 2 rows.
template <typename Value>
void pack_rows(const Value *rows, int64_t stride, int64_t n, int64_t k, Pair *panels) {
  int64_t pairs = (k + 1) / 2;
  for (int64_t i = 0; i < k; i += 2)
    for (int64_t column = 0; column < n; column += PANEL) {
      const Value *even = rows + i * stride + column, *odd = i + 1 < k ? even + stride : nullptr;
      pair_rows(even, odd, std::min(PANEL, n - column), panels + column * pairs + i / 2 * PANEL);
    }
}

// Transposes 16 rows of 16 pairs, to rows that are `apart`. Rows from `rows` on count as zeros.
void transpose_16x16(const Pair *from, int64_t stride, int64_t rows, int64_t columns, Pair *to, int64_t apart = PANEL) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++)
    r[i] = i < rows ? _mm512_maskz_loadu_epi32(lanes(columns), from + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
  for (int i = 0; i < std::min<int64_t>(16, columns); i++) _mm512_storeu_si512(to + i * apart, r[i]);
}

// Packs b whose transpose has n rows of `pairs` pairs, `stride` apart, to panels. The columns of the last panel are filled
// up to a whole vector with zeros.
void pack_transposed(const Pair *rows, int64_t stride, int64_t n, int64_t pairs, Pair *panels) {
  for (int64_t column = 0; column < n; column += 16)
    for (int64_t k = 0; k < pairs; k += 16) {
      Pair *to = panels + column / PANEL * PANEL * pairs + k * PANEL + column % PANEL;
      transpose_16x16(rows + column * stride + k, stride, n - column, pairs - k, to);
    }
}

}  // namespace
