// Multi-head attention with products of bf16, and its gradients.
#pragma once
#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "gemm_bf16.h"
#include "operator.h"
#include "product_bf16.h"
#include "threads.h"

namespace {

// exp(x) for x <= 0, to 2e-6 of it: bf16 holds 4e-3. Below -87 it is 1e-38. A NaN stays one: of two operands, the maximum is
// the second if one is a NaN.
__m512 exponential(__m512 x) {
  x = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87), x), _mm512_set1_ps(float(M_LOG2E)));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 t = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(float(M_LN2)));
  __m512 sum = _mm512_set1_ps(1 / 120.0f);  // Taylor's series: |t| <= ln(2) / 2
  for (float factor : {1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

// Heads as in attention.h, never causal. A block has BLOCK_ROWS tokens. Queries, keys, values and probabilities are rounded
// to bf16; scores, the softmax and the sums are fp32.
struct HeadsBf16 : Heads {
  static constexpr int64_t BLOCK_ROWS = 48, KEYS = 256;  // keys that are summed over at a time

  int64_t pairs, panels, padded;  // of a head's channels; PANELs of them; keys rounded up to whole panels

  HeadsBf16(int *ranks, int64_t **shapes, const float *settings)
      : Heads(ranks, shapes, settings), pairs((dim + 1) / 2), panels((dim + PANEL - 1) / PANEL),
        padded((keys + PANEL - 1) / PANEL * PANEL) {
    rows = BLOCK_ROWS;
    blocks = (tokens + rows - 1) / rows;
  }

  bool fit() const { return Heads::fit() && !causal; }
  int64_t transposed_values() const { return padded * pairs; }           // of transposed()
  int64_t panel_values() const { return padded / 2 * panels * PANEL; }   // of in_panels()

  // Packs the transpose of a head's keys (or values), for products with rows of as many channels. `rounded` has as many.
  void transposed(const float *x, Pair *rounded, Pair *to) const {
    for (int64_t key = 0; key < keys; key++) round_row(x + key * channels, dim, 1, rounded + key * pairs);
    pack_transposed(rounded, pairs, keys, pairs, to);
  }

  // Packs a head's keys (or values), for products with rows of as many keys, KEYS at a time.
  void in_panels(const float *x, Pair *to) const {
    for (int64_t key = 0; key < keys; key += KEYS)
      pack_rows(x + key * channels, channels, dim, std::min(KEYS, keys - key), to + key / 2 * panels * PANEL);
  }

  // out (count, dim) = rows (count, keys) x, for x from in_panels. The rows are `width` pairs apart.
  void multiply_by_keys(int64_t count, const Pair *rows, const Pair *x, float *out, int64_t ldc) const {
    for (int64_t key = 0; key < keys; key += KEYS) {
      int64_t key_pairs = (std::min(KEYS, keys - key) + 1) / 2;
      multiply(count, dim, {rows + key / 2, width, 0, 1, key_pairs}, x + key / 2 * panels * PANEL, out, ldc, key > 0);
    }
  }

  // Replaces the scores (count, width) by exp(scale (score - the row's maximum)), and sets `inverse` to 1 / the sum of each
  // row. What is beyond the keys becomes 0.
  void exponentials(float *scores, float *inverse, int64_t count) const {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t row = 0; row < count; row++) {
      float *x = scores + row * width;
      __m512 maximum = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int64_t i = 0; i < keys; i += 16)
        maximum = _mm512_max_ps(maximum, _mm512_mask_loadu_ps(maximum, lanes(keys - i), x + i));
      maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maximum));
      for (int64_t i = 0; i < width; i += 16) {
        __m512 values = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), maximum), factor);
        values = _mm512_maskz_mov_ps(lanes(std::max<int64_t>(0, keys - i)), exponential(values));
        total = _mm512_add_ps(total, values);
        _mm512_storeu_ps(x + i, values);
      }
      inverse[row] = 1 / _mm512_reduce_add_ps(total);
    }
  }
};

}  // namespace

extern "C" {

// q, k, v, settings -> softmax(q k^T / sqrt(dim)) v, with the shape of q
int attention_bf16(ARGUMENTS) {
  HeadsBf16 h(ranks, shapes, p[3]);
  bool valid = all_float32(count, types) && h.fit();
  constexpr int64_t BLOCKS = 16;  // that share the packed keys and values
  int64_t chunks = (h.blocks + BLOCKS - 1) / BLOCKS;
  return run_products(valid, h.images * h.heads * chunks, h.all(), [&](int64_t start, int64_t end) {
    Scratch scratch(h.rows * (h.width + h.pairs + 1) + 2 * h.transposed_values() + h.panel_values());
    float *scores = scratch.data(), *inverse = scores + h.rows * h.width;
    auto *probabilities = reinterpret_cast<Pair *>(scores);  // of a row, in the place of its scores
    auto *queries = reinterpret_cast<Pair *>(inverse + h.rows), *keys = queries + h.rows * h.pairs;
    Pair *rounded = keys + h.transposed_values(), *values = rounded + h.transposed_values();
    for (int64_t item = start; item < end; item++) {
      int64_t head = item / chunks % h.heads, image = item / chunks / h.heads, c = h.channels;
      h.transposed(p[1] + h.keys_offset(image, head), rounded, keys);
      h.in_panels(p[2] + h.keys_offset(image, head), values);
      int64_t last = std::min(h.tokens, (item % chunks + 1) * BLOCKS * h.rows);
      for (int64_t first = item % chunks * BLOCKS * h.rows; first < last; first += h.rows) {
        int64_t rows = std::min(h.rows, last - first), offset = h.token_offset(image, head, first);
        for (int64_t row = 0; row < rows; row++) round_row(p[0] + offset + row * c, h.dim, 1, queries + row * h.pairs);
        multiply(rows, h.keys, {queries, h.pairs, 0, 1, h.pairs}, keys, scores, h.width, false);
        h.exponentials(scores, inverse, rows);
        for (int64_t row = 0; row < rows; row++)
          round_row(scores + row * h.width, h.width, 1, probabilities + row * h.width);
        float *out = p[4] + offset;
        h.multiply_by_keys(rows, probabilities, values, out, c);
        for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
          for (int64_t i = 0; i < h.dim; i++) out[row * c + i] *= inverse[row];
        }
      }
    }
  });
}

// q, k, v, out, dout, settings -> dq, dk, dv, as attention_dx. One thread computes a head.
int attention_bf16_dx(ARGUMENTS) {
  HeadsBf16 h(ranks, shapes, p[5]);
  bool valid = all_float32(count, types) && h.fit();
  return run_products(valid, h.images * h.heads, h.all(), [&](int64_t start, int64_t end) {
    int64_t c = h.channels, keys = h.keys, width = h.width, dim = h.dim, row_pairs = h.rows / 2;
    Scratch scratch(2 * h.rows * width + h.rows + h.rows * h.pairs + 3 * h.transposed_values() + h.panel_values() +
                    row_pairs * (h.panels * PANEL + width));
    float *probabilities = scratch.data(), *dscores = probabilities + h.rows * width;
    float *inverse = dscores + h.rows * width;
    auto *rounded = reinterpret_cast<Pair *>(inverse + h.rows), *k_transposed = rounded + h.transposed_values();
    Pair *v_transposed = k_transposed + h.transposed_values(), *k_panels = v_transposed + h.transposed_values();
    Pair *token_rows = k_panels + h.panel_values(), *token_panels = token_rows + h.rows * h.pairs;
    Pair *paired = token_panels + row_pairs * h.panels * PANEL;
    auto *dscore_rows = reinterpret_cast<Pair *>(dscores);  // of a row, in its place

    // x (keys, dim) += factor^T y for rows (rows, width) and tokens y (rows, dim)
    auto add_to_keys = [&](int64_t rows, const float *factor, const float *y, float *x, bool add) {
      for (int64_t row = 0; row < rows; row += 2)
        pair_rows(factor + row * width, row + 1 < rows ? factor + (row + 1) * width : nullptr, keys,
                  paired + row / 2 * width);
      pack_rows(y, c, dim, rows, token_panels);
      multiply(keys, dim, {paired, 1, width, (rows + 1) / 2, 1}, token_panels, x, c, add);
    };
    for (int64_t item = start; item < end; item++) {
      int64_t head = item % h.heads, image = item / h.heads;
      const float *k = p[1] + h.keys_offset(image, head), *v = p[2] + h.keys_offset(image, head);
      float *dk = p[7] + h.keys_offset(image, head), *dv = p[8] + h.keys_offset(image, head);
      h.transposed(k, rounded, k_transposed);
      h.transposed(v, rounded, v_transposed);
      h.in_panels(k, k_panels);
      for (int64_t first = 0; first < h.tokens; first += h.rows) {
        int64_t rows = std::min(h.rows, h.tokens - first), offset = h.token_offset(image, head, first);
        const float *q = p[0] + offset, *out = p[3] + offset, *dout = p[4] + offset;
        // (rows, keys) = tokens (rows, dim) times the transposed keys
        auto by_token = [&](const float *tokens, const Pair *transposed, float *result) {
          for (int64_t row = 0; row < rows; row++) round_row(tokens + row * c, dim, 1, token_rows + row * h.pairs);
          multiply(rows, keys, {token_rows, h.pairs, 0, 1, h.pairs}, transposed, result, width, false);
        };
        by_token(q, k_transposed, probabilities);
        h.exponentials(probabilities, inverse, rows);
        by_token(dout, v_transposed, dscores);
        h.softmax_dx(probabilities, inverse, dscores, out, dout, rows, h.scale);
        add_to_keys(rows, probabilities, dout, dv, first > 0);
        add_to_keys(rows, dscores, q, dk, first > 0);
        for (int64_t row = 0; row < rows; row++) round_row(dscores + row * width, width, 1, dscore_rows + row * width);
        h.multiply_by_keys(rows, dscore_rows, k_panels, p[6] + offset, c);
      }
    }
  });
}

}  // extern "C"
