// What the AMX files share: tiles of 16 lines of 64 bytes, and how numbers come to lie in them.
#pragma once

#include <immintrin.h>

#include "tile.h"

#define INLINE inline __attribute__((always_inline))  // GCC leaves out a call of what only asks: it has no effect

namespace {

constexpr int64_t SIDE = 16;  // lines of a tile, of LINE bytes each, and
constexpr int64_t STEP = 32;  // numbers
constexpr int64_t STRIP = 2 * SIDE;   // rows of w that are multiplied together
constexpr int64_t BURST = 4;          // lines of a row that memory is asked for together
constexpr int64_t AHEAD = 2 * BURST;  // lines, before they are used

// Compilers do not know that tiles and their configuration are loaded from memory: what was stored before must be
// there.
inline void stored(const void* at) { asm volatile("" ::"r"(at) : "memory"); }

struct Shape {
  int64_t lines, bytes;  // of a tile, and of each of its lines
};

// The eight tiles, in shapes of their own as long as this lives.
class Tiles {
 public:
  explicit Tiles(const Shape (&shape)[8]) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.rows[i] = uint8_t(shape[i].lines), config.bytes[i] = uint16_t(shape[i].bytes);
    stored(&config);
    _tile_loadconfig(&config);
  }
  // Of a product: 0 to 3 are sums, 4 and 5 left of it, 6 and 7 right of it: so many columns, of four bytes, have these,
  // and the sums.
  explicit Tiles(int64_t columns) : Tiles({{SIDE, columns * 4}, {SIDE, columns * 4}, {SIDE, columns * 4},
                                           {SIDE, columns * 4}, {SIDE, LINE}, {SIDE, LINE}, {SIDE, columns * 4},
                                           {SIDE, columns * 4}}) {}
  ~Tiles() { _tile_release(); }
};

// Rows become columns.
inline void transpose(__m512i v[16]) {
  __m512i t[16];
  EACH(i, 8) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  EACH(i, 4) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  EACH(i, 4) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  EACH(i, 4) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline __mmask16 first(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0); }
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0; }

// One step of `rows` rows of bfloat16 numbers, n of each; what is not there is zero.
inline __m512i part(const uint16_t* row, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), row); }

// Rows of w that are multiplied together: a tile, and another below it or of a second weight.
struct Strip {
  const char *one, *other;
  int64_t line, step;  // bytes from row to row, and from step to step
  const char* row(int64_t r) const { return r < SIDE ? one + r * line : other + (r - SIDE) * line; }
  Strip moved(int64_t bytes) const { return {one + bytes, other + bytes, line, step}; }
};

// What memory is asked for while a step is multiplied. One pair of tiles of x: bursts of lines down the rows of the
// strip, somewhat before they are used. More: each asks for some rows of the strip that comes next.
struct Asking {
  Strip strip, next;
  bool more;          // whether there is a next one
  int64_t lines;      // of a row
  int64_t row, rows;  // of the next strip; rows 0: in bursts
};

#define ASK(at) __builtin_prefetch(at, 0, FIRST_CACHE)

INLINE void ask(const Asking& a, int64_t line) {
  if (a.rows) {
    for (int64_t r = a.row; a.more && r < a.row + a.rows; r++) ASK(a.next.row(r) + line * LINE);
    return;
  }
  int64_t column = line / BURST * BURST + AHEAD, r = line % BURST * STRIP / BURST;
  if (column >= a.lines && !a.more) return;
  const char* at = column < a.lines ? a.strip.row(r) + column * LINE : a.next.row(r) + (column - a.lines) * LINE;
  for (int64_t i = 0; i < STRIP / BURST; i++) EACH(j, BURST) ASK(at + i * a.strip.line + j * LINE);
}

}  // namespace
