// Multi-head attention and its gradients.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gemm.h"
#include "operator.h"
#include "threads.h"
#include "vector_math.h"

namespace {

constexpr int64_t BLOCK = 1 << 18;  // scores held at a time, 1 MB, which stay in the processor's cache
constexpr int64_t VECTOR = 16;      // float32 values of the largest vector

// The heads of q (N tokens, C) and k, v (N keys, C), or (N, tokens, C): each has its own C / heads channels of a row.
// settings: N, the number of heads, whether the attention is causal.
//
// A block has as many rows of scores as BLOCK values make, but at least 16. Each row is filled up to whole vectors: a text
// has 77 keys, and the exponentials of the last 13, one by one, would take as long as those of all others.
struct Heads {
  int64_t images, heads, tokens, keys, width, channels, dim, rows, blocks;
  bool causal;
  float scale;

  Heads(int *ranks, int64_t **shapes, const float *settings)
      : images(int64_t(settings[0])), heads(int64_t(settings[1])), causal(settings[2] != 0) {
    channels = shapes[0][ranks[0] - 1];
    tokens = product(shapes[0], ranks[0]) / channels / images;
    keys = product(shapes[1], ranks[1]) / channels / images;
    dim = channels / heads;
    width = whole(keys);
    scale = float(1 / std::sqrt(double(dim)));
    rows = std::min(tokens, std::max<int64_t>(16, BLOCK / std::max<int64_t>(1, width)));
    blocks = rows == 0 ? 0 : (tokens + rows - 1) / rows;
  }

  int64_t all() const { return images * heads * tokens * keys; }
  bool fit() const { return heads * dim == channels && keys > 0; }

  // The offset of a token of a head in q, and of the head's first key in k.
  int64_t token_offset(int64_t image, int64_t head, int64_t token) const {
    return (image * tokens + token) * channels + head * dim;
  }
  int64_t keys_offset(int64_t image, int64_t head) const { return image * keys * channels + head * dim; }

  // The number of keys that a token attends to.
  int64_t visible_keys(int64_t token) const { return causal ? std::min(token + 1, keys) : keys; }

  // `values` rounded up to whole vectors.
  static int64_t whole(int64_t values) { return (values + VECTOR - 1) / VECTOR * VECTOR; }

  // Replaces the scores of `count` tokens (count, width) by exp(score - the row's maximum), or 0 for keys that do not
  // exist or are not visible, and sets `inverse` to 1 / the sum of each row.
  void exponentials(float *scores, float *inverse, int64_t first, int64_t count) const {
    // Before the loop below, because values that were just stored one by one are slow to load as a vector.
    for (int64_t row = 0; row < count; row++) {
      int64_t values = visible_keys(first + row);
      std::fill(scores + row * width + values, scores + row * width + whole(values), -INFINITY);
    }
    for (int64_t row = 0; row < count; row++) {
      float *x = scores + row * width, maxima[VECTOR], total = 0;
      // Not `width` values: the exponential of -INFINITY takes 10 times as long.
      int64_t values = whole(visible_keys(first + row));
      std::fill(maxima, maxima + VECTOR, -INFINITY);  // not one maximum: clang would compute it value by value
      for (int64_t i = 0; i < values; i += VECTOR) {
#pragma omp simd
        for (int64_t j = 0; j < VECTOR; j++) maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
      }
      float maximum = *std::max_element(maxima, maxima + VECTOR);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < values; i++) total += x[i] = exponential(x[i] - maximum);
      std::fill(x + values, x + width, 0.0f);
      inverse[row] = 1 / total;
    }
  }

  // Makes probabilities of the exponentials of `count` tokens (count, width), and of `dscores`, which are dout v^T, `factor`
  // times the gradients of the scores. The derivative of the softmax p is p (dout v^T - delta) with delta = sum(dout out).
  // What is beyond the keys becomes 0.
  void softmax_dx(float *exponentials, const float *inverse, float *dscores, const float *out, const float *dout,
                  int64_t count, float factor) const {
    for (int64_t row = 0; row < count; row++) {
      float delta = 0, *probability = exponentials + row * width, *dscore = dscores + row * width;
#pragma omp simd reduction(+ : delta)
      for (int64_t i = 0; i < dim; i++) delta += dout[row * channels + i] * out[row * channels + i];
      std::fill(dscore + keys, dscore + width, 0.0f);
#pragma omp simd
      for (int64_t i = 0; i < width; i++) {
        probability[i] *= inverse[row];
        dscore[i] = probability[i] * (dscore[i] - delta) * factor;
      }
    }
  }
};

}  // namespace

extern "C" {

// q, k, v, settings -> softmax(q k^T / sqrt(dim)) v, with the shape of q
int attention(ARGUMENTS) {
  Heads h(ranks, shapes, p[3]);
  bool valid = all_float32(count, types) && h.fit();
  return run(valid, h.images * h.heads * h.blocks, h.all(), [&](int64_t start, int64_t end) {
    Scratch scratch(h.rows * h.width + h.rows);
    float *scores = scratch.data(), *inverse = scores + h.rows * h.width;
    for (int64_t item = start; item < end; item++) {
      int64_t head = item / h.blocks % h.heads, image = item / h.blocks / h.heads;
      int64_t first = item % h.blocks * h.rows, rows = std::min(h.rows, h.tokens - first), c = h.channels;
      const float *q = p[0] + h.token_offset(image, head, first);
      const float *k = p[1] + h.keys_offset(image, head), *v = p[2] + h.keys_offset(image, head);
      float *out = p[4] + h.token_offset(image, head, first);
      multiply('N', 'T', rows, h.keys, h.dim, h.scale, q, c, k, c, 0, scores, h.width);
      h.exponentials(scores, inverse, first, rows);
      multiply('N', 'N', rows, h.dim, h.keys, 1, scores, h.width, v, c, 0, out, c);
      for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
        for (int64_t i = 0; i < h.dim; i++) out[row * c + i] *= inverse[row];
      }
    }
  });
}

// q, k, v, out, dout, settings -> dq, dk, dv. The probabilities are computed again. dk and dv are sums over the blocks, so
// one thread computes a head.
int attention_dx(ARGUMENTS) {
  Heads h(ranks, shapes, p[5]);
  bool valid = all_float32(count, types) && h.fit();
  return run(valid, h.images * h.heads, h.all(), [&](int64_t start, int64_t end) {
    int64_t c = h.channels, keys = h.keys, width = h.width, dim = h.dim;
    Scratch scratch(2 * h.rows * width + h.rows);
    float *probabilities = scratch.data(), *dscores = probabilities + h.rows * width;
    float *inverse = dscores + h.rows * width;
    for (int64_t item = start; item < end; item++) {
      int64_t head = item % h.heads, image = item / h.heads;
      const float *k = p[1] + h.keys_offset(image, head), *v = p[2] + h.keys_offset(image, head);
      float *dk = p[7] + h.keys_offset(image, head), *dv = p[8] + h.keys_offset(image, head);
      for (int64_t first = 0; first < h.tokens; first += h.rows) {
        int64_t rows = std::min(h.rows, h.tokens - first), offset = h.token_offset(image, head, first);
        const float *q = p[0] + offset, *out = p[3] + offset, *dout = p[4] + offset;
        float beta = first ? 1 : 0;
        multiply('N', 'T', rows, keys, dim, h.scale, q, c, k, c, 0, probabilities, width);
        h.exponentials(probabilities, inverse, first, rows);
        multiply('N', 'T', rows, keys, dim, 1, dout, c, v, c, 0, dscores, width);
        h.softmax_dx(probabilities, inverse, dscores, out, dout, rows, 1);  // the products multiply by the scale
        multiply('T', 'N', keys, dim, rows, 1, probabilities, width, dout, c, beta, dv, c);
        multiply('N', 'N', rows, dim, keys, h.scale, dscores, width, k, c, 0, p[6] + offset, c);
        multiply('T', 'N', keys, dim, rows, h.scale, dscores, width, q, c, beta, dk, c);
      }
    }
  });
}

}  // extern "C"
