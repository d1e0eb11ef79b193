// The kernels with the tiles of tile_model.h, or those of the processor, and functions by which test_tiles.py reaches what is
// inside.
#include "../../ldm/ops/cpu/kernels.cc"

extern "C" {

void product_by_tiles(int64_t m, int64_t n, const Rows *a, const Pair *b, float *c, int64_t ldc, int add) {
  ConfiguredTiles tiles;
  multiply_by_tiles(m, n, *a, b, c, ldc, add);
}

#ifdef TILES_ARE_MODELLED

int tiles_are_configured(void) { return tile_model::state.configured; }

// TDPBF16PS of tiles with these sizes: rows of a, pairs, columns of b.
void one_product(int rows, int pairs, int columns, const Pair *a, const Pair *b, float *c) {
  TileConfiguration sizes;
  sizes.rows[0] = sizes.rows[1] = uint8_t(rows), sizes.rows[2] = uint8_t(pairs);
  sizes.bytes_of_a_row[1] = uint16_t(4 * pairs), sizes.bytes_of_a_row[0] = sizes.bytes_of_a_row[2] = uint16_t(4 * columns);
  _tile_loadconfig(&sizes);
  _tile_loadd(0, c, 4 * columns);
  _tile_loadd(1, a, 4 * pairs);
  _tile_loadd(2, b, 4 * columns);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 4 * columns);
  _tile_release();
}

// What a processor answers with a fault.
void misuse(int number) {
  TileConfiguration sizes;
  switch (number) {
    case 0: _tile_zero(0); break;
    case 1: sizes.palette = 2; break;
    case 2: sizes.rows[3] = 17; break;
    case 3: sizes.bytes_of_a_row[3] = 68; break;
    case 4: sizes.rows[8] = 16, sizes.bytes_of_a_row[8] = 64; break;
    case 5: sizes.rows[3] = 0; break;
    case 6: sizes.rows[1] = 15; break;
    case 7: sizes.bytes_of_a_row[1] = 60; break;
    case 8: sizes.bytes_of_a_row[2] = 60; break;
    case 9: tile_model::permitted = false; break;
    case 10: sizes.reserved[5] = 1; break;
    case 11: sizes.rows[0] = 0, sizes.bytes_of_a_row[0] = 0; break;
  }
  _tile_loadconfig(&sizes);
  _tile_dpbf16ps(0, 1, 2);
#ifndef TILES_ARE_TRAPPED  // the assembler refuses it
  if (number == 12) _tile_dpbf16ps(0, 1, 1);
#endif
  _tile_release();
  if (number == 13) _tile_dpbf16ps(0, 1, 2);
}

#ifdef TILES_ARE_TRAPPED
// What the traps must not take for one of theirs: UD2, and instructions beside theirs that no processor has.
void execute_no_tile(int number) {
  tile_traps::install();  // again: faulthandler.disable() sets the handler of before
  _tile_loadconfig(&TILES);  // which is one of theirs
  if (number == 0) asm volatile("ud2");
  if (number == 1) asm volatile(".byte 0xc4, 0xe2, 0x78, 0x5c, 0xc1");  // TDPBF16PS without its prefix
  if (number == 2) asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc1");  // TILERELEASE of a register
  if (number == 3) asm volatile(".byte 0xc4, 0xe2, 0xf8, 0x49, 0xc0");  // or with W = 1
}
#endif

#endif

}  // extern "C"
