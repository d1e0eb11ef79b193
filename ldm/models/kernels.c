/* What the CPU computes in one operator where MindSpore 2.8 takes several, or one that is slow or keeps memory.
 *
 * Each function for MindSpore (its custom operators of type "aot") names a `part`, which computes some of the items
 * that the work consists of, and `run`s it in as many threads as are worth it. `p` are the inputs and, after them, the
 * outputs, all float32 and contiguous; `shapes` are theirs. ldm/models/kernels.py compiles this file;
 * ldm/models/device_forms.py and attention.py say where it is used.
 *
 * Long sums run over PART values in float32 and go on in double: a mean of a million squares in float32 alone is off by
 * 2e-5. No sum depends on the number of threads, so a resumed training repeats itself.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* glibc has these for whole vectors, to 4 units in the last place, and declares so under -ffast-math alone. */
#if defined __x86_64__ && defined __GLIBC__
#if __GLIBC_PREREQ(2, 35)
#pragma omp declare simd notinbranch
float erff(float);
#pragma omp declare simd notinbranch
float expf(float);
#endif
#endif

/* Of oneDNN, which MindSpore brings: C (M, N) = alpha A (M, K) B (K, N) + beta C, row after row, in this thread alone. */
int dnnl_sgemm(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
               int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

enum { PART = 1024, COLUMNS = 64, TILE = 32, BLOCK = 1 << 17, THREADS = 64, VALUES_OF_A_THREAD = 1 << 18 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t product(const int64_t *shape, int rank) {
  int64_t values = 1;
  for (int i = 0; i < rank; i++) values *= shape[i];
  return values;
}

/* ---- threads ---- */

/* Computes the items from `start` to `end`; returns 0, or 1 where memory is short. */
typedef int part(float **p, int *ranks, int64_t **shapes, int64_t start, int64_t end);

typedef struct {
  part *compute;
  float **p;
  int *ranks;
  int64_t **shapes, start, end;
  int failed;
  pthread_t thread;
} share;

static void *compute_share(void *of) {
  share *s = of;
  s->failed = s->compute(s->p, s->ranks, s->shapes, s->start, s->end);
  return NULL;
}

/* The items 0 to `items` in threads that each have at least VALUES_OF_A_THREAD of the `values` to compute, about 0.1 ms:
 * starting one takes 0.02. Threads of OpenMP would wait for work by turning, and slow MindSpore's own down to a third. */
static int run(part *compute, int count, float **p, int *ranks, int64_t **shapes, const char **types, int64_t items,
               int64_t values) {
  for (int i = 0; i < count; i++)
    if (strcmp(types[i], "float32") != 0) return 1;
  cpu_set_t processors;
  int64_t threads = sched_getaffinity(0, sizeof processors, &processors) ? 1 : CPU_COUNT(&processors);
  threads = smaller(smaller(threads, THREADS), smaller(items, values / VALUES_OF_A_THREAD));
  if (threads < 2) return compute(p, ranks, shapes, 0, items);
  share shares[THREADS];
  int failed = 0;
  for (int64_t i = threads - 1; i >= 0; i--) { /* the first is computed here, when the others run */
    shares[i] = (share){compute, p, ranks, shapes, items * i / threads, items * (i + 1) / threads, 0, 0};
    if (i == 0 || pthread_create(&shares[i].thread, NULL, compute_share, &shares[i])) {
      compute_share(&shares[i]);
      shares[i].thread = 0;
    }
  }
  for (int64_t i = 0; i < threads; i++) {
    if (shares[i].thread) pthread_join(shares[i].thread, NULL);
    failed |= shares[i].failed;
  }
  return failed;
}

#define ARGUMENTS int count, float **p, int *ranks, int64_t **shapes, const char **types, void *stream, void *extra
#define RUN(compute, items, values) ((void)stream, (void)extra, run(compute, count, p, ranks, shapes, types, items, values))

/* ---- normalisation ---- */

static double sum(const float *x, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float of_part = 0;
    int64_t end = smaller(start + PART, n);
#pragma omp simd reduction(+ : of_part)
    for (int64_t i = start; i < end; i++) of_part += x[i];
    total += of_part;
  }
  return total;
}

/* The sum of (x - mean) * (y - shift). */
static double sum_of_products(const float *x, float mean, const float *y, float shift, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float of_part = 0;
    int64_t end = smaller(start + PART, n);
#pragma omp simd reduction(+ : of_part)
    for (int64_t i = start; i < end; i++) of_part += (x[i] - mean) * (y[i] - shift);
    total += of_part;
  }
  return total;
}

typedef struct {
  float mean, inverse; /* 1 / deviation */
} statistics;

static statistics statistics_of(const float *x, int64_t n, double eps) {
  float mean = (float)(sum(x, n) / n);
  return (statistics){mean, (float)(1 / sqrt(sum_of_products(x, mean, x, mean, n) / n + eps))};
}

/* x (N, C, H, W) in groups of channels, the values of a group one after the other. */
typedef struct {
  int64_t pictures, pixels, groups, in_group, values;
  double eps;
} grouping;

/* settings: the number of groups, eps */
static grouping grouping_of(const int64_t *shape, const float *settings) {
  int64_t groups = (int64_t)settings[0], in_group = shape[1] / groups, pixels = shape[2] * shape[3];
  return (grouping){shape[0], pixels, groups, in_group, in_group * pixels, settings[1]};
}

static int group_norm_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  grouping g = grouping_of(shapes[0], p[3]);
  for (int64_t group = first; group < end; group++) {
    const float *x = p[0] + group * g.values;
    float *y = p[4] + group * g.values;
    statistics s = statistics_of(x, g.values, g.eps);
    for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, y += g.pixels) {
      int64_t channel = group % g.groups * g.in_group + i;
      float scale = s.inverse * p[1][channel], shift = p[2][channel];
#pragma omp simd
      for (int64_t k = 0; k < g.pixels; k++) y[k] = (x[k] - s.mean) * scale + shift;
    }
  }
  return 0;
}

/* x, weight (C,), bias (C,), settings -> y */
int group_norm(ARGUMENTS) {
  grouping g = grouping_of(shapes[0], p[3]);
  return RUN(group_norm_part, g.pictures * g.groups, product(shapes[0], 4));
}

static int group_norm_dx_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  grouping g = grouping_of(shapes[0], p[3]);
  for (int64_t group = first; group < end; group++) {
    const float *weight = p[1] + group % g.groups * g.in_group;
    const float *x = p[0] + group * g.values, *dy = p[2] + group * g.values;
    float *dx = p[4] + group * g.values;
    statistics s = statistics_of(x, g.values, g.eps);
    double sum_g = 0, sum_gx = 0;
    for (int64_t i = 0; i < g.in_group; i++) {
      sum_g += weight[i] * sum(dy + i * g.pixels, g.pixels);
      sum_gx += weight[i] * sum_of_products(x + i * g.pixels, s.mean, dy + i * g.pixels, 0, g.pixels);
    }
    float shift = (float)(sum_g / g.values * s.inverse);
    float slope = (float)(sum_gx / g.values * s.inverse * s.inverse * s.inverse);
    for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, dy += g.pixels, dx += g.pixels) {
      float scale = weight[i] * s.inverse;
#pragma omp simd
      for (int64_t k = 0; k < g.pixels; k++) dx[k] = dy[k] * scale - (x[k] - s.mean) * slope - shift;
    }
  }
  return 0;
}

/* x, weight, dy, settings -> dx. With g = dy * weight and the normalised x^, over a group:
 * dx = (g - mean(g) - x^ mean(g x^)) / deviation */
int group_norm_dx(ARGUMENTS) {
  grouping g = grouping_of(shapes[0], p[3]);
  return RUN(group_norm_dx_part, g.pictures * g.groups, product(shapes[0], 4));
}

static int group_norm_dweight_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  grouping g = grouping_of(shapes[0], p[2]);
  for (int64_t group = first; group < end; group++) {
    float *dweight = p[3] + group * g.in_group, *dbias = p[4] + group * g.in_group;
    for (int64_t i = 0; i < g.in_group; i++) dweight[i] = dbias[i] = 0;
    for (int64_t n = 0; n < g.pictures; n++) {
      const float *x = p[0] + (n * g.groups + group) * g.values, *dy = p[1] + (n * g.groups + group) * g.values;
      statistics s = statistics_of(x, g.values, g.eps);
      for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, dy += g.pixels) {
        dweight[i] += s.inverse * sum_of_products(x, s.mean, dy, 0, g.pixels);
        dbias[i] += sum(dy, g.pixels);
      }
    }
  }
  return 0;
}

/* x, dy, settings -> dweight (C,), dbias (C,) */
int group_norm_dweight(ARGUMENTS) {
  return RUN(group_norm_dweight_part, grouping_of(shapes[0], p[2]).groups, product(shapes[0], 4));
}

static int layer_norm_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  const float *weight = p[1], *bias = p[2];
  int64_t c = shapes[0][1];
  for (int64_t row = first; row < end; row++) {
    const float *x = p[0] + row * c;
    float *y = p[4] + row * c;
    statistics s = statistics_of(x, c, p[3][0]);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) y[i] = (x[i] - s.mean) * s.inverse * weight[i] + bias[i];
  }
  return 0;
}

/* x (rows, C), weight (C,), bias (C,), settings: eps -> y */
int layer_norm(ARGUMENTS) { return RUN(layer_norm_part, shapes[0][0], product(shapes[0], 2)); }

static int layer_norm_dx_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  const float *weight = p[1];
  int64_t c = shapes[0][1];
  for (int64_t row = first; row < end; row++) {
    const float *x = p[0] + row * c, *dy = p[2] + row * c;
    float *dx = p[4] + row * c;
    statistics s = statistics_of(x, c, p[3][0]);
    float sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t i = 0; i < c; i++) {
      sum_g += dy[i] * weight[i];
      sum_gx += dy[i] * weight[i] * (x[i] - s.mean);
    }
    float shift = sum_g / c * s.inverse, slope = sum_gx / c * s.inverse * s.inverse * s.inverse;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) dx[i] = dy[i] * weight[i] * s.inverse - (x[i] - s.mean) * slope - shift;
  }
  return 0;
}

/* x, weight, dy, settings -> dx: as group_norm_dx, over a row */
int layer_norm_dx(ARGUMENTS) { return RUN(layer_norm_dx_part, shapes[0][0], product(shapes[0], 2)); }

/* An item is COLUMNS columns. */
static int layer_norm_dweight_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  int64_t rows = shapes[0][0], c = shapes[0][1];
  statistics *of_row = malloc(rows * sizeof *of_row);
  if (of_row == NULL) return 1;
  for (int64_t row = 0; row < rows; row++) of_row[row] = statistics_of(p[0] + row * c, c, p[2][0]);
  for (int64_t start = first * COLUMNS; start < smaller(end * COLUMNS, c); start += COLUMNS) {
    int64_t columns = smaller(COLUMNS, c - start);
    double sum_dy[COLUMNS] = {0}, sum_dy_x[COLUMNS] = {0};
    for (int64_t row = 0; row < rows; row++) {
      const float *x = p[0] + row * c + start, *dy = p[1] + row * c + start;
      statistics s = of_row[row];
#pragma omp simd
      for (int64_t i = 0; i < columns; i++) {
        sum_dy[i] += dy[i];
        sum_dy_x[i] += dy[i] * (x[i] - s.mean) * s.inverse;
      }
    }
    for (int64_t i = 0; i < columns; i++) p[3][start + i] = sum_dy_x[i], p[4][start + i] = sum_dy[i];
  }
  free(of_row);
  return 0;
}

/* x, dy, settings -> dweight (C,), dbias (C,) */
int layer_norm_dweight(ARGUMENTS) {
  return RUN(layer_norm_dweight_part, (shapes[0][1] + COLUMNS - 1) / COLUMNS, product(shapes[0], 2));
}

/* ---- functions of each value ---- */

static const float SQRT_HALF = 0.70710678f, DENSITY_AT_0 = 0.39894228f; /* 1 / sqrt(2 pi) */

static int gelu_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks, (void)shapes;
  const float *x = p[0];
  float *y = p[1];
#pragma omp simd
  for (int64_t i = first; i < end; i++) y[i] = x[i] * (0.5f + 0.5f * erff(x[i] * SQRT_HALF));
  return 0;
}

/* x -> x * (1 + erf(x / sqrt 2)) / 2 */
int gelu(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]);
  return RUN(gelu_part, values, values);
}

static int gelu_dx_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks, (void)shapes;
  const float *x = p[0], *dy = p[1];
  float *dx = p[2];
#pragma omp simd
  for (int64_t i = first; i < end; i++) {
    float density = DENSITY_AT_0 * expf(-0.5f * x[i] * x[i]);
    dx[i] = dy[i] * (0.5f + 0.5f * erff(x[i] * SQRT_HALF) + x[i] * density);
  }
  return 0;
}

/* x, dy -> dx */
int gelu_dx(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]);
  return RUN(gelu_dx_part, values, values);
}

/* An item is a row. */
static int gelu_gate_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  int64_t c = shapes[1][ranks[1] - 1];
  for (int64_t row = first; row < end; row++) {
    const float *value = p[0] + row * 2 * c, *gate = value + c;
    float *y = p[1] + row * c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) y[i] = value[i] * gate[i] * (0.5f + 0.5f * erff(gate[i] * SQRT_HALF));
  }
  return 0;
}

/* x (..., 2 C) -> y (..., C): its first half * gelu(its second half) */
int gelu_gate(ARGUMENTS) {
  int64_t values = product(shapes[1], ranks[1]);
  return RUN(gelu_gate_part, values / shapes[1][ranks[1] - 1], values);
}

static int gelu_gate_dx_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  int64_t c = shapes[1][ranks[1] - 1];
  for (int64_t row = first; row < end; row++) {
    const float *value = p[0] + row * 2 * c, *gate = value + c, *dy = p[1] + row * c;
    float *dvalue = p[2] + row * 2 * c, *dgate = dvalue + c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
      float cumulative = 0.5f + 0.5f * erff(gate[i] * SQRT_HALF);
      float density = DENSITY_AT_0 * expf(-0.5f * gate[i] * gate[i]);
      dvalue[i] = dy[i] * gate[i] * cumulative;
      dgate[i] = dy[i] * value[i] * (cumulative + gate[i] * density);
    }
  }
  return 0;
}

/* x, dy (..., C) -> dx (..., 2 C) */
int gelu_gate_dx(ARGUMENTS) {
  int64_t values = product(shapes[1], ranks[1]);
  return RUN(gelu_gate_dx_part, values / shapes[1][ranks[1] - 1], values);
}

static int silu_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks, (void)shapes;
  const float *x = p[0];
  float *y = p[1];
#pragma omp simd
  for (int64_t i = first; i < end; i++) y[i] = x[i] / (1 + expf(-x[i]));
  return 0;
}

/* x -> x / (1 + exp(-x)) */
int silu(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]);
  return RUN(silu_part, values, values);
}

static int silu_dx_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks, (void)shapes;
  const float *x = p[0], *dy = p[1];
  float *dx = p[2];
#pragma omp simd
  for (int64_t i = first; i < end; i++) {
    float sigmoid = 1 / (1 + expf(-x[i]));
    dx[i] = dy[i] * sigmoid * (1 + x[i] * (1 - sigmoid));
  }
  return 0;
}

/* x, dy -> dx */
int silu_dx(ARGUMENTS) {
  int64_t values = product(shapes[0], ranks[0]);
  return RUN(silu_dx_part, values, values);
}

/* ---- attention ---- */

/* An item is TILE of the B: in tiles, or rows of one number would each miss the processor's cache. */
static int swap_middle_part(float **p, int *ranks, int64_t **shapes, int64_t first, int64_t end) {
  (void)ranks;
  int64_t a = shapes[0][1], b = shapes[0][2], d = shapes[0][3], tiles = (b + TILE - 1) / TILE;
  for (int64_t item = first; item < end; item++) {
    const float *x = p[0] + item / tiles * a * b * d;
    float *y = p[1] + item / tiles * a * b * d;
    int64_t j0 = item % tiles * TILE, j1 = smaller(j0 + TILE, b);
    for (int64_t i0 = 0; i0 < a; i0 += TILE) {
      int64_t i1 = smaller(i0 + TILE, a);
      for (int64_t j = j0; j < j1; j++)
        if (d == 1)
          for (int64_t i = i0; i < i1; i++) y[j * a + i] = x[i * b + j];
        else
          for (int64_t i = i0; i < i1; i++) memcpy(y + (j * a + i) * d, x + (i * b + j) * d, d * sizeof *y);
    }
  }
  return 0;
}

/* x (N, A, B, D) -> (N, B, A, D) */
int swap_middle(ARGUMENTS) {
  return RUN(swap_middle_part, shapes[0][0] * ((shapes[0][2] + TILE - 1) / TILE), product(shapes[0], 4));
}

/* q (N tokens, C) and k, v (N keys, C), or (N, tokens, C), each head on its own C / heads channels of a row. */
typedef struct {
  int64_t pictures, heads, tokens, keys, channels, dim, rows, blocks;
  int causal;
  float scale;
} heads_of;

/* settings: N, the number of heads, whether a token sees only those up to it. A block is as many rows of scores as come
 * to BLOCK values, 512 KB, which the processor keeps near. */
static heads_of heads_from(int *ranks, int64_t **shapes, const float *settings) {
  heads_of h = {.pictures = (int64_t)settings[0], .heads = (int64_t)settings[1], .causal = settings[2] != 0};
  h.channels = shapes[0][ranks[0] - 1];
  h.tokens = product(shapes[0], ranks[0]) / h.channels / h.pictures;
  h.keys = product(shapes[1], ranks[1]) / h.channels / h.pictures;
  h.dim = h.channels / h.heads, h.scale = (float)(1 / sqrt((double)h.dim));
  h.rows = smaller(h.tokens, larger(16, BLOCK / h.keys)), h.blocks = (h.tokens + h.rows - 1) / h.rows;
  return h;
}

/* In place of scores (rows, keys), the first of them of token `first`: exp(score - the row's largest), and the inverse of
 * each row's sum. */
static void exponentials(float *scores, float *inverse, int64_t rows, heads_of h, int64_t first) {
  for (int64_t row = 0; row < rows; row++) {
    float *x = scores + row * h.keys, most = -INFINITY, total = 0;
    int64_t seen = h.causal ? smaller(first + row + 1, h.keys) : h.keys;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < seen; i++) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < seen; i++) total += x[i] = expf(x[i] - most);
    for (int64_t i = seen; i < h.keys; i++) x[i] = 0;
    inverse[row] = 1 / total;
  }
}

/* An item is a block of rows of a head. */
static int attention_part(float **p, int *ranks, int64_t **shapes, int64_t start, int64_t end) {
  heads_of h = heads_from(ranks, shapes, p[3]);
  float *scores = malloc((h.rows * h.keys + h.rows) * sizeof *scores), *inverse = scores + h.rows * h.keys;
  if (scores == NULL) return 1;
  for (int64_t item = start; item < end; item++) {
    int64_t head = item / h.blocks % h.heads, picture = item / h.blocks / h.heads, first = item % h.blocks * h.rows;
    int64_t rows = smaller(h.rows, h.tokens - first);
    int64_t place = (picture * h.tokens + first) * h.channels + head * h.dim;
    int64_t place_k = picture * h.keys * h.channels + head * h.dim;
    dnnl_sgemm('N', 'T', rows, h.keys, h.dim, h.scale, p[0] + place, h.channels, p[1] + place_k, h.channels, 0, scores,
               h.keys);
    exponentials(scores, inverse, rows, h, first);
    float *out = p[4] + place;
    dnnl_sgemm('N', 'N', rows, h.dim, h.keys, 1, scores, h.keys, p[2] + place_k, h.channels, 0, out, h.channels);
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
      for (int64_t i = 0; i < h.dim; i++) out[row * h.channels + i] *= inverse[row];
  }
  free(scores);
  return 0;
}

/* q, k, v, settings -> softmax(q k^T / sqrt(dim)) v like q */
int attention(ARGUMENTS) {
  heads_of h = heads_from(ranks, shapes, p[3]);
  return RUN(attention_part, h.pictures * h.heads * h.blocks, h.pictures * h.heads * h.tokens * h.keys);
}

/* An item is a head: its dk and dv are sums over its blocks. */
static int attention_dx_part(float **p, int *ranks, int64_t **shapes, int64_t start, int64_t end) {
  heads_of h = heads_from(ranks, shapes, p[5]);
  float *probabilities = malloc((2 * h.rows * h.keys + h.rows) * sizeof *probabilities);
  float *by_scores = probabilities + h.rows * h.keys, *inverse = by_scores + h.rows * h.keys;
  if (probabilities == NULL) return 1;
  for (int64_t item = start; item < end; item++) {
    int64_t head = item % h.heads, picture = item / h.heads;
    int64_t place_k = picture * h.keys * h.channels + head * h.dim;
    const float *k = p[1] + place_k, *v = p[2] + place_k;
    float *dk = p[7] + place_k, *dv = p[8] + place_k;
    for (int64_t first = 0; first < h.tokens; first += h.rows) {
      int64_t rows = smaller(h.rows, h.tokens - first), c = h.channels, keys = h.keys, dim = h.dim;
      int64_t place = (picture * h.tokens + first) * c + head * dim;
      const float *q = p[0] + place, *out = p[3] + place, *dout = p[4] + place;
      float so_far = first ? 1 : 0;
      dnnl_sgemm('N', 'T', rows, keys, dim, h.scale, q, c, k, c, 0, probabilities, keys);
      exponentials(probabilities, inverse, rows, h, first);
      dnnl_sgemm('N', 'T', rows, keys, dim, 1, dout, c, v, c, 0, by_scores, keys);
      for (int64_t row = 0; row < rows; row++) {
        float delta = 0, *probability = probabilities + row * keys, *by_score = by_scores + row * keys;
#pragma omp simd reduction(+ : delta)
        for (int64_t i = 0; i < dim; i++) delta += dout[row * c + i] * out[row * c + i];
#pragma omp simd
        for (int64_t i = 0; i < keys; i++) {
          probability[i] *= inverse[row];
          by_score[i] = probability[i] * (by_score[i] - delta);
        }
      }
      dnnl_sgemm('T', 'N', keys, dim, rows, 1, probabilities, keys, dout, c, so_far, dv, c);
      dnnl_sgemm('N', 'N', rows, dim, keys, h.scale, by_scores, keys, k, c, 0, p[6] + place, c);
      dnnl_sgemm('T', 'N', keys, dim, rows, h.scale, by_scores, keys, q, c, so_far, dk, c);
    }
  }
  free(probabilities);
  return 0;
}

/* q, k, v, out, dout, settings -> dq, dk, dv. The derivative of the softmax p is p (dout v^T - delta) with
 * delta = sum(dout out), and p is computed again. */
int attention_dx(ARGUMENTS) {
  heads_of h = heads_from(ranks, shapes, p[5]);
  return RUN(attention_dx_part, h.pictures * h.heads, h.pictures * h.heads * h.tokens * h.keys);
}
