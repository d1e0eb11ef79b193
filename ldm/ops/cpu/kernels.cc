// What the CPU computes in one operator where MindSpore 2.8 takes several, or one that is slow or keeps memory.
//
// Each function has the signature of MindSpore's custom operators of type "aot": `p` are the inputs and, after them,
// the outputs, all float32 and contiguous; `shapes` are theirs. It returns 0, or 1 for another type, for shapes that do
// not fit or where memory is short. library.py compiles this file.
//
// Sums over images run over PART values in float32 and go on in double: a mean of a million squares in float32 alone
// is off by 2e-5. Nothing depends on the number of threads, to the last bit, so a resumed training repeats itself.
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

// glibc has these for whole vectors, to 4 units in the last place, and declares so under -ffast-math alone.
#if defined __x86_64__ && defined __GLIBC__
#if __GLIBC_PREREQ(2, 35)
#pragma omp declare simd notinbranch
extern "C" float erff(float) noexcept;
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
#endif
#endif

// Of oneDNN, which MindSpore brings: C (M, N) = alpha A (M, K) B (K, N) + beta C, row after row, in this thread alone
// (oneDNN has threads only where it is lent some, and nobody does here).
extern "C" int dnnl_sgemm(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
                          const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

// MindSpore's threads, which its own operators compute in: func(content, task, ...) for each task.
namespace mindspore {
class ThreadPool {
 public:
  int ParallelLaunch(const std::function<int(void *, int, float, float)> &func, void *content, int tasks);
};
namespace kernel {
ThreadPool *GetActorMgrInnerThreadPool();
}
}  // namespace mindspore

#define ARGUMENTS int count, float **p, int *ranks, int64_t **shapes, const char **types, void *, void *

namespace {

constexpr int64_t PART = 1024, COLUMNS = 64, TILE = 32, BLOCK = 1 << 18, VALUES_OF_A_THREAD = 1 << 15;

int64_t product(const int64_t *shape, int rank) {
  return std::accumulate(shape, shape + rank, int64_t(1), std::multiplies<int64_t>());
}

bool all_float32(int count, const char **types) {
  return std::all_of(types, types + count, [](const char *type) { return std::strcmp(type, "float32") == 0; });
}

// `compute(first, end)` for all of `items`, in so many threads of MindSpore's that each has VALUES_OF_A_THREAD of the
// `values`. (Threads of our own would have to share a core with MindSpore's, which wait for work by turning.)
template <typename Compute>
int run(bool sound, int64_t items, int64_t values, const Compute &compute) {
  if (!sound) return 1;
  cpu_set_t processors;
  int64_t threads = sched_getaffinity(0, sizeof processors, &processors) == 0 ? CPU_COUNT(&processors) : 1;
  threads = std::max<int64_t>(1, std::min({threads, items, values / VALUES_OF_A_THREAD}));
  auto share = [&](void *, int thread, float, float) {
    try {
      compute(items * thread / threads, items * (thread + 1) / threads);
    } catch (const std::bad_alloc &) {
      return 1;
    }
    return 0;
  };
  if (threads == 1) return share(nullptr, 0, 0, 0);
  return mindspore::kernel::GetActorMgrInnerThreadPool()->ParallelLaunch(share, nullptr, int(threads));
}

// As run; an item is PART values, so that where a thread's share ends, and single values are computed otherwise than
// whole vectors, does not depend on the number of threads.
template <typename Compute>
int run_parts(bool sound, int64_t values, const Compute &compute) {
  return run(sound, (values + PART - 1) / PART, values, [&](int64_t first, int64_t end) {
    compute(first * PART, std::min(end * PART, values));
  });
}

// Memory for a thread to compute in, kept for the next time: what comes fresh from the system takes longer to be handed
// out than to be computed in. While one Scratch has it, another in the same thread has its own.
class Scratch {
 public:
  explicit Scratch(int64_t values) : memory(std::move(kept)) {
    if (int64_t(memory.size()) < values) memory.resize(values);
  }
  ~Scratch() { kept = std::move(memory); }
  float *data() { return memory.data(); }

 private:
  static thread_local std::vector<float> kept;
  std::vector<float> memory;
};
thread_local std::vector<float> Scratch::kept;

void multiply(char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  if (dnnl_sgemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) != 0) throw std::bad_alloc();
}

double sum(const float *x, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float of_part = 0;
    int64_t end = std::min(start + PART, n);
#pragma omp simd reduction(+ : of_part)
    for (int64_t i = start; i < end; i++) of_part += x[i];
    total += of_part;
  }
  return total;
}

// The sum of (x - mean) * (y - shift).
double sum_of_products(const float *x, float mean, const float *y, float shift, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += PART) {
    float of_part = 0;
    int64_t end = std::min(start + PART, n);
#pragma omp simd reduction(+ : of_part)
    for (int64_t i = start; i < end; i++) of_part += (x[i] - mean) * (y[i] - shift);
    total += of_part;
  }
  return total;
}

struct Statistics {
  float mean, inverse;  // 1 / deviation

  Statistics(const float *x, int64_t n, double eps) {
    mean = float(sum(x, n) / n);
    inverse = float(1 / std::sqrt(sum_of_products(x, mean, x, mean, n) / n + eps));
  }
};

// x (N, C, H, W) in groups of channels, the values of a group one after the other. settings: the number of groups, eps.
struct Grouping {
  int64_t images, pixels, groups, in_group, values;
  double eps;

  Grouping(const int64_t *shape, const float *settings)
      : images(shape[0]), pixels(shape[2] * shape[3]), groups(int64_t(settings[0])), in_group(shape[1] / groups),
        values(in_group * pixels), eps(settings[1]) {}

  int64_t all() const { return images * groups * values; }
  bool fits(const int64_t *shape) const { return groups * in_group == shape[1]; }
};

float cumulative(float x) { return 0.5f + 0.5f * erff(x * float(M_SQRT1_2)); }
float density(float x) { return float(M_2_SQRTPI * M_SQRT1_2 / 2) * expf(-0.5f * x * x); }
float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// x -> `of` each value of x.
template <typename Of>
int pointwise(const Of &of, int count, float **p, int *ranks, int64_t **shapes, const char **types) {
  return run_parts(all_float32(count, types), product(shapes[0], ranks[0]), [&](int64_t first, int64_t end) {
    const float *x = p[0];
    float *y = p[1];
#pragma omp simd
    for (int64_t i = first; i < end; i++) y[i] = of(x[i]);
  });
}

// x, dy -> dy times the `slope` at each value of x.
template <typename Slope>
int pointwise_dx(const Slope &slope, int count, float **p, int *ranks, int64_t **shapes, const char **types) {
  return run_parts(all_float32(count, types), product(shapes[0], ranks[0]), [&](int64_t first, int64_t end) {
    const float *x = p[0], *dy = p[1];
    float *dx = p[2];
#pragma omp simd
    for (int64_t i = first; i < end; i++) dx[i] = dy[i] * slope(x[i]);
  });
}

// q (N tokens, C) and k, v (N keys, C), or (N, tokens, C): each head on its own C / heads channels of a row. settings:
// N, the number of heads, whether a token sees only those up to it. A block is as many rows of scores as come to BLOCK
// values, 1 MB, which the processor keeps near, or 16 rows. A row has room for whole vectors: text has 77 keys, and the
// exponentials of the last 13, one by one, would take as long as those of all others.
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

  // The place of a token of a head in q, and of its head's first in k.
  int64_t of_token(int64_t image, int64_t head, int64_t token) const {
    return (image * tokens + token) * channels + head * dim;
  }
  int64_t of_keys(int64_t image, int64_t head) const { return image * keys * channels + head * dim; }

  // How many keys a token sees.
  int64_t seen(int64_t token) const { return causal ? std::min(token + 1, keys) : keys; }

  // `values` and as many more as fill the last vector.
  static int64_t whole(int64_t values) { return (values + 15) / 16 * 16; }

  // In place of the scores of `count` tokens (count, width): exp(score - the row's largest), zeros where there is no
  // key or none that is seen, and 1 / each row's sum.
  void exponentials(float *scores, float *inverse, int64_t first, int64_t count) const {
    // Ahead of the loop below: what was just stored one by one is slow to load as a vector.
    for (int64_t row = 0; row < count; row++) {
      int64_t values = seen(first + row);
      std::fill(scores + row * width + values, scores + row * width + whole(values), -INFINITY);
    }
    for (int64_t row = 0; row < count; row++) {
      float *x = scores + row * width, most = -INFINITY, total = 0;
      int64_t values = whole(seen(first + row));  // not more: the exponential of -INFINITY takes 10 times as long
#pragma omp simd reduction(max : most)
      for (int64_t i = 0; i < values; i++) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < values; i++) total += x[i] = expf(x[i] - most);
      std::fill(x + values, x + width, 0.0f);
      inverse[row] = 1 / total;
    }
  }
};

// A 3x3 convolution of x (N, in, H, W), with a pixel of zeros around it, by Winograd's F(2x2, 3x3) (Lavin and Gray
// 2016): 2x2 of y come from 4x4 of x by 16 products for each pair of channels instead of 36. A tile is such a 4x4; its
// 16 lie next to each other, as planes of a channel: 16 planes that are far apart are often a power of two apart, and
// push each other out of the processor's cache.
struct Winograd {
  int64_t images, in, out, height, width, down, across, tiles;

  Winograd(const int64_t *x, int64_t out)
      : images(x[0]), in(x[1]), out(out), height(x[2]), width(x[3]), down((height + 1) / 2), across((width + 1) / 2),
        tiles(images * down * across) {}

  // `turned`: the weight is (in, out, 3, 3) and convolves turned around, which gives the gradient for the input.
  int convolve(bool sound, const float *x, const float *weight, bool turned, float *u, float *y) const {
    int failed = run(sound, out, 16 * out * in, [&](int64_t first, int64_t end) {
      Scratch scratch(9 * in);
      of_weight(weight, turned, first, end, scratch.data(), u);
    });
    if (failed) return failed;
    // Few chunks of tiles are shared out by channels too.
    int64_t chunks = (tiles + CHUNK - 1) / CHUNK, parts = chunks < 16 ? std::min<int64_t>(4, out) : 1;
    return run(true, chunks * parts, 16 * tiles * in, [&](int64_t start, int64_t end) {
      int64_t most = (out + parts - 1) / parts;
      Scratch scratch(16 * CHUNK * (in + most) + line_values());
      float *v = scratch.data(), *m = v + 16 * CHUNK * in;
      float *lines = m + 16 * CHUNK * most;
      for (int64_t item = start; item < end; item++) {
        int64_t first = item / parts * CHUNK, part = item % parts, count = std::min(CHUNK, tiles - first);
        int64_t channel = out * part / parts, channels = out * (part + 1) / parts - channel;
        if (part == 0 || item == start) of_x(x, first, count, lines, v);
        for (int64_t k = 0; k < 16; k++)
          multiply('N', 'N', channels, count, in, 1, u + (16 * channel + k) * in, 16 * in, v + k * count, 16 * count, 0,
                   m + k * count, 16 * count);
        to_y(m, first, count, channel, channels, lines, y);
      }
    });
  }

 private:
  static constexpr int64_t CHUNK = 96;  // tiles at a time: oneDNN multiplies by 48 columns, other numbers more slowly

  int64_t line() const { return 2 * across + 2; }
  int64_t line_values() const { return 4 * line() + width; }

  // G g G^T of each 3x3 g, to u (out, 16, in). `planes` has the nine of g apart, for whole vectors.
  void of_weight(const float *weight, bool turned, int64_t first, int64_t end, float *planes, float *u) const {
    for (int64_t o = first; o < end; o++) {
      const float *g = weight + (turned ? o : o * in) * 9;
      for (int64_t i = 0; i < in; i++, g += turned ? out * 9 : 9)
        for (int64_t k = 0; k < 9; k++) planes[(turned ? 8 - k : k) * in + i] = g[k];
#pragma omp simd
      for (int64_t i = 0; i < in; i++) {
        float t[4][3];
        for (int64_t k = 0; k < 3; k++) {
          float a = planes[k * in + i], b = planes[(3 + k) * in + i], c = planes[(6 + k) * in + i];
          t[0][k] = a, t[1][k] = (a + b + c) / 2, t[2][k] = (a - b + c) / 2, t[3][k] = c;
        }
        for (int64_t k = 0; k < 4; k++) {
          float *to = u + (16 * o + 4 * k) * in + i, a = t[k][0], b = t[k][1], c = t[k][2];
          to[0] = a, to[in] = (a + b + c) / 2, to[2 * in] = (a - b + c) / 2, to[3 * in] = c;
        }
      }
    }
  }

  // Calls each(offset, image, row, column, some) for tiles that lie side by side, from first to first + count.
  template <typename Each>
  void for_strips(int64_t first, int64_t count, const Each &each) const {
    for (int64_t offset = 0; offset < count;) {
      int64_t tile = first + offset, column = tile % across, some = std::min(count - offset, across - column);
      each(offset, tile / across / down, tile / across % down, column, some);
      offset += some;
    }
  }

  // B^T d B of each tile d, to v (in, 16, count)
  void of_x(const float *x, int64_t first, int64_t count, float *lines, float *v) const {
    float *zeros = lines + 4 * line();
    std::fill(lines, zeros + width, 0.0f);  // what the loops below do not write stays zero: the pixels around x
    for (int64_t i = 0; i < in; i++) {
      for_strips(first, count, [&](int64_t offset, int64_t image, int64_t row, int64_t column, int64_t some) {
        const float *plane = x + (image * in + i) * height * width, *d[4];
        for (int64_t k = 0; k < 4; k++) {
          int64_t above = 2 * row - 1 + k;
          d[k] = above < 0 || above >= height ? zeros : plane + above * width;
        }
        int64_t from = std::max<int64_t>(0, 2 * column - 1), end = std::min(width, 2 * (column + some) + 1);
        float *line0 = lines + 1, *line1 = line0 + line(), *line2 = line1 + line(), *line3 = line2 + line();
        const float *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
#pragma omp simd
        for (int64_t k = from; k < end; k++) {
          line0[k] = d0[k] - d2[k], line1[k] = d1[k] + d2[k], line2[k] = d2[k] - d1[k], line3[k] = d1[k] - d3[k];
        }
        for (int64_t k = 0; k < 4; k++) {
          const float *from_line = lines + k * line() + 2 * column;
          float *to = v + (16 * i + 4 * k) * count + offset;
#pragma omp simd
          for (int64_t j = 0; j < some; j++) {
            float a = from_line[2 * j], b = from_line[2 * j + 1], c = from_line[2 * j + 2], e = from_line[2 * j + 3];
            to[j] = a - c, to[count + j] = b + c, to[2 * count + j] = c - b, to[3 * count + j] = b - e;
          }
        }
      });
    }
  }

  // A^T m A of each tile of m (out, 16, count): 2x2 of y, or what of them lies within
  void to_y(const float *m, int64_t first, int64_t count, int64_t channel, int64_t channels, float *lines,
            float *y) const {
    for (int64_t o = 0; o < channels; o++) {
      for_strips(first, count, [&](int64_t offset, int64_t image, int64_t row, int64_t column, int64_t some) {
        float *upper = lines, *lower = lines + line();
#pragma omp simd
        for (int64_t j = 0; j < some; j++) {
          const float *from = m + 16 * o * count + offset + j;
          float above[4], below[4];
          for (int64_t k = 0; k < 4; k++) {
            float a = from[k * count], b = from[(4 + k) * count], c = from[(8 + k) * count], e = from[(12 + k) * count];
            above[k] = a + b + c, below[k] = b - c - e;
          }
          upper[2 * j] = above[0] + above[1] + above[2], upper[2 * j + 1] = above[1] - above[2] - above[3];
          lower[2 * j] = below[0] + below[1] + below[2], lower[2 * j + 1] = below[1] - below[2] - below[3];
        }
        float *to = y + ((image * out + channel + o) * height + 2 * row) * width + 2 * column;
        int64_t within = std::min(2 * some, width - 2 * column);
        std::copy(upper, upper + within, to);
        if (2 * row + 1 < height) std::copy(lower, lower + within, to + width);
      });
    }
  }
};

}  // namespace

extern "C" {

// x, weight (C,), bias (C,), settings -> y
int group_norm(ARGUMENTS) {
  Grouping g(shapes[0], p[3]);
  bool sound = all_float32(count, types) && g.fits(shapes[0]);
  return run(sound, g.images * g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      const float *x = p[0] + group * g.values;
      float *y = p[4] + group * g.values;
      Statistics s(x, g.values, g.eps);
      for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, y += g.pixels) {
        int64_t channel = group % g.groups * g.in_group + i;
        float scale = s.inverse * p[1][channel], shift = p[2][channel];
#pragma omp simd
        for (int64_t k = 0; k < g.pixels; k++) y[k] = (x[k] - s.mean) * scale + shift;
      }
    }
  });
}

// x, weight, dy, settings -> dx. With g = dy * weight and the normalised x^, over a group:
// dx = (g - mean(g) - x^ mean(g x^)) / deviation
int group_norm_dx(ARGUMENTS) {
  Grouping g(shapes[0], p[3]);
  bool sound = all_float32(count, types) && g.fits(shapes[0]);
  return run(sound, g.images * g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      const float *weight = p[1] + group % g.groups * g.in_group;
      const float *x = p[0] + group * g.values, *dy = p[2] + group * g.values;
      float *dx = p[4] + group * g.values;
      Statistics s(x, g.values, g.eps);
      double sum_g = 0, sum_gx = 0;
      for (int64_t i = 0; i < g.in_group; i++) {
        sum_g += weight[i] * sum(dy + i * g.pixels, g.pixels);
        sum_gx += weight[i] * sum_of_products(x + i * g.pixels, s.mean, dy + i * g.pixels, 0, g.pixels);
      }
      float shift = float(sum_g / g.values * s.inverse);
      float slope = float(sum_gx / g.values * s.inverse * s.inverse * s.inverse);
      for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, dy += g.pixels, dx += g.pixels) {
        float scale = weight[i] * s.inverse;
#pragma omp simd
        for (int64_t k = 0; k < g.pixels; k++) dx[k] = dy[k] * scale - (x[k] - s.mean) * slope - shift;
      }
    }
  });
}

// x, dy, settings -> dweight (C,), dbias (C,)
int group_norm_dweight(ARGUMENTS) {
  Grouping g(shapes[0], p[2]);
  bool sound = all_float32(count, types) && g.fits(shapes[0]);
  return run(sound, g.groups, g.all(), [&](int64_t first, int64_t end) {
    for (int64_t group = first; group < end; group++) {
      float *dweight = p[3] + group * g.in_group, *dbias = p[4] + group * g.in_group;
      std::fill(dweight, dweight + g.in_group, 0.0f);
      std::fill(dbias, dbias + g.in_group, 0.0f);
      for (int64_t n = 0; n < g.images; n++) {
        const float *x = p[0] + (n * g.groups + group) * g.values, *dy = p[1] + (n * g.groups + group) * g.values;
        Statistics s(x, g.values, g.eps);
        for (int64_t i = 0; i < g.in_group; i++, x += g.pixels, dy += g.pixels) {
          dweight[i] += float(s.inverse * sum_of_products(x, s.mean, dy, 0, g.pixels));
          dbias[i] += float(sum(dy, g.pixels));
        }
      }
    }
  });
}

// x (rows, C), weight (C,), bias (C,), settings: eps -> y
int layer_norm(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), rows, rows * c, [&](int64_t first, int64_t end) {
    const float *weight = p[1], *bias = p[2];
    for (int64_t row = first; row < end; row++) {
      const float *x = p[0] + row * c;
      float *y = p[4] + row * c;
      Statistics s(x, c, p[3][0]);
#pragma omp simd
      for (int64_t i = 0; i < c; i++) y[i] = (x[i] - s.mean) * s.inverse * weight[i] + bias[i];
    }
  });
}

// x, weight, dy, settings -> dx: as group_norm_dx, over a row
int layer_norm_dx(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), rows, rows * c, [&](int64_t first, int64_t end) {
    const float *weight = p[1];
    for (int64_t row = first; row < end; row++) {
      const float *x = p[0] + row * c, *dy = p[2] + row * c;
      float *dx = p[4] + row * c;
      Statistics s(x, c, p[3][0]);
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
  });
}

// x, dy, settings -> dweight (C,), dbias (C,). An item is COLUMNS columns; each thread takes the rows' statistics anew.
int layer_norm_dweight(ARGUMENTS) {
  int64_t rows = shapes[0][0], c = shapes[0][1];
  return run(all_float32(count, types), (c + COLUMNS - 1) / COLUMNS, rows * c, [&](int64_t first, int64_t end) {
    Scratch scratch(2 * rows);
    float *mean = scratch.data(), *inverse = mean + rows;
    for (int64_t row = 0; row < rows; row++) {
      Statistics s(p[0] + row * c, c, p[2][0]);
      mean[row] = s.mean, inverse[row] = s.inverse;
    }
    for (int64_t start = first * COLUMNS; start < std::min(end * COLUMNS, c); start += COLUMNS) {
      int64_t columns = std::min(COLUMNS, c - start);
      double sum_dy[COLUMNS] = {0}, sum_dy_x[COLUMNS] = {0};
      for (int64_t row = 0; row < rows; row++) {
        const float *x = p[0] + row * c + start, *dy = p[1] + row * c + start;
#pragma omp simd
        for (int64_t i = 0; i < columns; i++) {
          sum_dy[i] += dy[i];
          sum_dy_x[i] += dy[i] * (x[i] - mean[row]) * inverse[row];
        }
      }
      std::copy(sum_dy_x, sum_dy_x + columns, p[3] + start);
      std::copy(sum_dy, sum_dy + columns, p[4] + start);
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
  auto slope = [](float x) {
    float open = sigmoid(x);
    return open * (1 + x * (1 - open));
  };
  return pointwise_dx(slope, count, p, ranks, shapes, types);
}

// x (..., 2 C) -> y (..., C): its first half * gelu(its second half)
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
        float below = cumulative(gate[i]);
        dvalue[i] = dy[i] * gate[i] * below;
        dgate[i] = dy[i] * value[i] * (below + gate[i] * density(gate[i]));
      }
    }
  });
}

// x (N, A, B, D) -> (N, B, A, D), in tiles: rows of one number would each miss the processor's cache.
int swap_middle_axes(ARGUMENTS) {
  int64_t a = shapes[0][1], b = shapes[0][2], d = shapes[0][3], tiles = (b + TILE - 1) / TILE;
  return run(all_float32(count, types), shapes[0][0] * tiles, product(shapes[0], 4), [&](int64_t first, int64_t end) {
    for (int64_t item = first; item < end; item++) {
      const float *x = p[0] + item / tiles * a * b * d;
      float *y = p[1] + item / tiles * a * b * d;
      int64_t j0 = item % tiles * TILE, j1 = std::min(j0 + TILE, b);
      for (int64_t i0 = 0; i0 < a; i0 += TILE) {
        int64_t i1 = std::min(i0 + TILE, a);
        for (int64_t j = j0; j < j1; j++) {
          if (d == 1) {
            for (int64_t i = i0; i < i1; i++) y[j * a + i] = x[i * b + j];
          } else {
            for (int64_t i = i0; i < i1; i++) std::memcpy(y + (j * a + i) * d, x + (i * b + j) * d, d * sizeof *y);
          }
        }
      }
    }
  });
}

// x (N, in, H, W), weight (out, in, 3, 3) -> y, and u (out, 16, in) of no further use
int convolution(ARGUMENTS) {
  Winograd w(shapes[0], shapes[2][1]);
  return w.convolve(all_float32(count, types) && shapes[1][1] == w.in, p[0], p[1], false, p[3], p[2]);
}

// dy (N, out, H, W), weight (out, in, 3, 3) -> dx, and u (in, 16, out) of no further use
int convolution_dx(ARGUMENTS) {
  Winograd w(shapes[0], shapes[2][1]);
  return w.convolve(all_float32(count, types) && shapes[1][0] == w.in, p[0], p[1], true, p[3], p[2]);
}

// q, k, v, settings -> softmax(q k^T / sqrt(dim)) v like q
int attention(ARGUMENTS) {
  Heads h(ranks, shapes, p[3]);
  bool sound = all_float32(count, types) && h.fit();
  return run(sound, h.images * h.heads * h.blocks, h.all(), [&](int64_t start, int64_t end) {
    Scratch scratch(h.rows * h.width + h.rows);
    float *scores = scratch.data(), *inverse = scores + h.rows * h.width;
    for (int64_t item = start; item < end; item++) {
      int64_t head = item / h.blocks % h.heads, image = item / h.blocks / h.heads;
      int64_t first = item % h.blocks * h.rows, rows = std::min(h.rows, h.tokens - first), c = h.channels;
      const float *q = p[0] + h.of_token(image, head, first);
      const float *k = p[1] + h.of_keys(image, head), *v = p[2] + h.of_keys(image, head);
      float *out = p[4] + h.of_token(image, head, first);
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

// q, k, v, out, dout, settings -> dq, dk, dv. The derivative of the softmax p is p (dout v^T - delta) with
// delta = sum(dout out), and p is computed again. dk and dv are sums over the blocks, so a head is one thread's.
int attention_dx(ARGUMENTS) {
  Heads h(ranks, shapes, p[5]);
  bool sound = all_float32(count, types) && h.fit();
  return run(sound, h.images * h.heads, h.all(), [&](int64_t start, int64_t end) {
    int64_t c = h.channels, keys = h.keys, width = h.width, dim = h.dim;
    Scratch scratch(2 * h.rows * width + h.rows);
    float *probabilities = scratch.data(), *by_scores = probabilities + h.rows * width;
    float *inverse = by_scores + h.rows * width;
    for (int64_t item = start; item < end; item++) {
      int64_t head = item % h.heads, image = item / h.heads;
      const float *k = p[1] + h.of_keys(image, head), *v = p[2] + h.of_keys(image, head);
      float *dk = p[7] + h.of_keys(image, head), *dv = p[8] + h.of_keys(image, head);
      for (int64_t first = 0; first < h.tokens; first += h.rows) {
        int64_t rows = std::min(h.rows, h.tokens - first), place = h.of_token(image, head, first);
        const float *q = p[0] + place, *out = p[3] + place, *dout = p[4] + place;
        float so_far = first ? 1 : 0;
        multiply('N', 'T', rows, keys, dim, h.scale, q, c, k, c, 0, probabilities, width);
        h.exponentials(probabilities, inverse, first, rows);
        multiply('N', 'T', rows, keys, dim, 1, dout, c, v, c, 0, by_scores, width);
        for (int64_t row = 0; row < rows; row++) {
          float delta = 0, *probability = probabilities + row * width, *by_score = by_scores + row * width;
#pragma omp simd reduction(+ : delta)
          for (int64_t i = 0; i < dim; i++) delta += dout[row * c + i] * out[row * c + i];
#pragma omp simd
          for (int64_t i = 0; i < width; i++) {
            probability[i] *= inverse[row];
            by_score[i] = probability[i] * (by_score[i] - delta);
          }
        }
        multiply('T', 'N', keys, dim, rows, 1, probabilities, width, dout, c, so_far, dv, c);
        multiply('N', 'N', rows, dim, keys, h.scale, by_scores, width, k, c, 0, p[6] + place, c);
        multiply('T', 'N', keys, dim, rows, h.scale, by_scores, width, q, c, so_far, dk, c);
      }
    }
  });
}

}  // extern "C"
