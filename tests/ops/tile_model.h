// The tile instructions of Intel's AMX in plain C++, for processors without them: as the Intel 64 and IA-32 Architectures
// Software Developer's Manual defines them, palette 1. What a processor would answer with a fault ends the process.
//
// With `g++ -include tile_model.h`, kernels that are written with the intrinsics compute with this.
#pragma once
#include <immintrin.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define TILES_ARE_MODELLED

namespace {
namespace tile_model {

constexpr int MOST_TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[MOST_ROWS][MOST_BYTES] = {};
};

// Of a thread.
struct State {
  bool configured = false;
  Tile tiles[MOST_TILES];
};
thread_local State state;
bool permitted = false;  // the process

void demand(bool condition, const char *what, int tile = -1) {
  if (condition) return;
  char message[128];  // without stdio: a child after fork() may not wait for its lock, which another thread held
  int length = std::snprintf(message, sizeof message, "tile_model: %s (tile %d)\n", what, tile);
  [[maybe_unused]] ssize_t written = write(STDERR_FILENO, message, size_t(length));
  std::abort();
}

Tile &tile(int i) {
  demand(state.configured, "no tiles are configured", i);
  demand(i >= 0 && i < MOST_TILES && state.tiles[i].rows > 0, "the tile is not configured", i);
  demand(state.tiles[i].bytes % 4 == 0, "bytes of a row that are no multiple of 4", i);
  return state.tiles[i];
}

void load_configuration(const void *memory) {
  uint8_t raw[64];
  std::memcpy(raw, memory, sizeof raw);
  demand(permitted, "tiles are configured, and Linux was not asked or refused");
  demand(raw[0] == 1, "a palette that is not 1");
  State next;
  next.configured = true;
  demand(raw[1] == 0, "a start in the midst of a tile");
  for (int i = 2; i < 16; i++) demand(raw[i] == 0, "a reserved byte");
  for (int i = 0; i < 16; i++) {
    int bytes = raw[16 + 2 * i] | raw[17 + 2 * i] << 8, rows = raw[48 + i];
    demand(i < MOST_TILES || (bytes == 0 && rows == 0), "a tile beyond the palette's", i);
    demand(bytes <= MOST_BYTES && rows <= MOST_ROWS && (bytes == 0) == (rows == 0), "a size that no tile has", i);
    if (i < MOST_TILES) next.tiles[i].rows = rows, next.tiles[i].bytes = bytes;
  }
  state = next;  // all tiles are zero
}

void release() { state = State(); }

void zero(int i) { std::memset(tile(i).data, 0, sizeof(Tile::data)); }

// A processor whose loads of rows that are so many bytes apart are wrong, which the kernels have to notice.
int64_t wrong_stride() {
  static const char *bytes = std::getenv("TILE_MODEL_WRONG_STRIDE");
  return bytes ? std::atoll(bytes) : 0;
}

void load(int i, const void *base, int64_t stride) {
  Tile &to = tile(i);
  uint8_t data[MOST_ROWS][MOST_BYTES] = {};
  for (int row = 0; row < to.rows; row++)
    std::memcpy(data[row], static_cast<const uint8_t *>(base) + row * stride, size_t(to.bytes));
  if (stride == wrong_stride()) std::swap(data[0], data[to.rows - 1]);
  std::memcpy(to.data, data, sizeof data);
}

void store(int i, void *base, int64_t stride) {
  const Tile &from = tile(i);
  for (int row = 0; row < from.rows; row++)
    std::memcpy(static_cast<uint8_t *>(base) + row * stride, from.data[row], size_t(from.bytes));
}

// Denormal numbers count as zero, before and after each operation.
float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

float upper_half(uint32_t pair) {
  uint32_t bits = pair & 0xffff0000;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flush(value);
}

// Even and odd values of the pairs are summed apart, each product rounded together with its addition.
void multiply(int c, int a, int b) {
  Tile &sums = tile(c);
  const Tile &left = tile(a), &right = tile(b);
  demand(c != a && c != b && a != b, "a tile that is named twice", c);
  demand(sums.rows == left.rows && sums.bytes == right.bytes && left.bytes / 4 == right.rows, "sizes that do not fit", c);
  for (int m = 0; m < sums.rows; m++) {
    float even[16] = {}, odd[16] = {}, row[16];
    for (int k = 0; k < right.rows; k++) {
      uint32_t pair, pairs[16];
      std::memcpy(&pair, left.data[m] + 4 * k, sizeof pair);
      std::memcpy(pairs, right.data[k], sizeof pairs);
      float first = upper_half(pair << 16), second = upper_half(pair);
      for (int n = 0; n < 16; n++) {
        even[n] = flush(std::fma(first, upper_half(pairs[n] << 16), even[n]));
        odd[n] = flush(std::fma(second, upper_half(pairs[n]), odd[n]));
      }
    }
    std::memcpy(row, sums.data[m], sizeof row);
    for (int n = 0; n < 16; n++) row[n] = n < sums.bytes / 4 ? flush(flush(row[n]) + flush(even[n] + odd[n])) : 0.0f;
    std::memcpy(sums.data[m], row, sizeof row);
  }
  for (int m = sums.rows; m < MOST_ROWS; m++) std::memset(sums.data[m], 0, MOST_BYTES);
  // A processor whose products are wrong, which the kernels have to notice.
  static const bool wrong = std::getenv("TILE_MODEL_WRONG") != nullptr;
  if (wrong) sums.data[sums.rows - 1][sums.bytes - 1] ^= 1;
}

}  // namespace tile_model

// In the place of asking the processor and Linux.
bool ask_for_tiles() {
  tile_model::permitted = std::getenv("TILE_MODEL_REFUSES") == nullptr;
  return tile_model::permitted;
}

}  // namespace

#ifndef TILES_ARE_TRAPPED
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig tile_model::load_configuration
#define _tile_release tile_model::release
#define _tile_zero tile_model::zero
#define _tile_loadd tile_model::load
#define _tile_stream_loadd tile_model::load
#define _tile_stored tile_model::store
#define _tile_dpbf16ps tile_model::multiply
#endif
