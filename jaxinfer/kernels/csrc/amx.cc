// Tiles of AMX: 16 rows of w times 16 rows of x, 32 numbers of each at once, at ten times the rate of vdpbf16ps.
//
// w is loaded as it lies; x, of which every thread uses all, is packed once. A sum takes its terms in their order, two at
// a time, whatever lies beside it, so no cut below changes its bits. Numbers are rounded to nearest; denormal ones count
// as zero, in and out. Compiled with -mamx-tile -mamx-bf16 and the flags of avx512.cc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tile.h"

namespace {

constexpr int64_t SIDE = 16;         // rows of a tile
constexpr int64_t LINE = 64;         // bytes of a row of it, and
constexpr int64_t STEP = 32;         // numbers
constexpr int64_t STRIP = 2 * SIDE;  // rows of w that are multiplied together
constexpr int64_t STREAMED = 2;      // up to so many tiles of x, w is read from memory at the pace that it is used
constexpr int64_t HIGH = 8;          // tiles of x, by
constexpr int64_t LONG = 64;         // steps, stay in the second cache, beside so much of a strip
constexpr int64_t SHORT = 4;         // steps of a strip that are copied at once
constexpr int64_t BURST = 4;         // lines of a row that memory is asked for together
constexpr int64_t AHEAD = 2 * BURST;  // steps, before they are used

// How x is cut: into tiles of `wide` rows, the last one filled up with zeros, whose numbers lie in pairs; and into chunks
// of steps: [chunks, tiles, chunk, 16, wide, 2].
struct Cut {
  int64_t tiles, wide, steps, chunk;
  explicit Cut(const Product& p) {
    tiles = parts(p.rows, SIDE);
    wide = parts(p.rows, tiles);
    steps = parts(p.inner, STEP);
    chunk = tiles <= STREAMED ? steps : LONG;
  }
  int64_t line() const { return wide * 4; }  // bytes of a row of a tile of x, and of one of sums
  int64_t step() const { return SIDE * line(); }
  int64_t tile() const { return chunk * step(); }
  int64_t size() const { return parts(steps, chunk) * tiles * tile(); }
  int64_t place(int64_t t, int64_t s) const { return (s / chunk * tiles + t) * tile() + s % chunk * step(); }
  int64_t sums() const { return 4 * SIDE * wide; }  // floats of two tiles of w times two of x
};

// Compilers do not know that tiles and their configuration are loaded from memory: what was stored before must be there.
inline void stored(const void* at) { asm volatile("" ::"r"(at) : "memory"); }

// Tiles 0 to 3 are sums, 4 and 5 of w, 6 and 7 of x.
class Tiles {
 public:
  explicit Tiles(const Cut& cut) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.rows[i] = SIDE;
      config.bytes[i] = uint16_t(i == 4 || i == 5 ? LINE : cut.line());
    }
    stored(&config);
    _tile_loadconfig(&config);
  }
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

size_t shared(const Product& p) { return size_t(Cut(p).size()); }

void pack(const Product& p, void* shared, int64_t tile) {
  Cut cut(p);
  int64_t rows = least(cut.wide, p.rows - tile * cut.wide);
  const uint16_t* from = (const uint16_t*)p.x + tile * cut.wide * p.inner;
  for (int64_t s = 0; s < cut.steps; s++) {
    char* to = (char*)shared + cut.place(tile, s);
    int64_t n = p.inner - s * STEP;
    if (cut.wide == 1) {
      _mm512_storeu_si512(to, part(from + s * STEP, n));
      continue;
    }
    __m512i v[16];
    for (int r = 0; r < 16; r++) v[r] = r < rows ? part(from + r * p.inner + s * STEP, n) : _mm512_setzero_si512();
    transpose(v);
    for (int r = 0; r < 16; r++) _mm512_mask_storeu_epi32(to + r * cut.line(), first(cut.wide), v[r]);
  }
}

// What memory is asked for while a step is multiplied. One pair of tiles of x: bursts of lines down the rows of the strip,
// somewhat before they are used. More: each asks for some rows of the strip that comes next.
struct Asking {
  const char *strip, *next;  // null where none comes next
  int64_t line, steps;       // bytes from row to row; steps of a strip
  int64_t row, rows;         // of the next strip; rows 0: in bursts
};

#define ASK(at) __builtin_prefetch(at, 0, SECOND_CACHE)

inline __attribute__((always_inline)) void ask(const Asking& a, int64_t s) {
  if (a.rows) {
    if (a.next)
      for (int64_t r = a.row; r < a.row + a.rows; r++) ASK(a.next + r * a.line + s * LINE);
    return;
  }
  int64_t column = s / BURST * BURST + AHEAD;
  const char* at = column < a.steps ? a.strip + column * LINE : a.next ? a.next + (column - a.steps) * LINE : nullptr;
  if (at)
    for (int64_t r = s % BURST * STRIP / BURST, end = r + STRIP / BURST; r < end; r++)
      EACH(i, BURST) ASK(at + r * a.line + i * LINE);
}

// A strip of w: its first tile, bytes from row to row and from step to step.
struct Strip {
  const char* at;
  int64_t line, step;
};

// Two tiles of w times one of x or BOTH, over some steps; sums [2, 2, 16, wide], begun ANEW or gone on with.
template <bool BOTH, bool ANEW>
void multiply(const Strip& w, const char* x, const Cut& cut, int64_t steps, float* to, const Asking* asking) {
  char* sums = (char*)to;
  int64_t line = cut.line(), size = cut.step();
  stored(to);
  if (ANEW) {
    _tile_zero(0);
    _tile_zero(2);
    if (BOTH) _tile_zero(1);
    if (BOTH) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, line);
    _tile_loadd(2, sums + 2 * size, line);
    if (BOTH) _tile_loadd(1, sums + size, line);
    if (BOTH) _tile_loadd(3, sums + 3 * size, line);
  }
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(6, x + s * size, line);
    _tile_loadd(4, w.at + s * w.step, w.line);
    _tile_loadd(5, w.at + s * w.step + SIDE * w.line, w.line);
    if (BOTH) _tile_loadd(7, x + cut.tile() + s * size, line);
    if (asking) ask(*asking, s);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (BOTH) _tile_dpbf16ps(1, 4, 7);
    if (BOTH) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, line);
  _tile_stored(2, sums + 2 * size, line);
  if (BOTH) _tile_stored(1, sums + size, line);
  if (BOTH) _tile_stored(3, sums + 3 * size, line);
}

using Multiply = decltype(&multiply<true, true>);
Multiply chosen(bool both, bool anew) {
  if (both) return anew ? multiply<true, true> : multiply<true, false>;
  return anew ? multiply<false, true> : multiply<false, false>;
}

// Steps of a strip as tiles side by side, [steps, 2, 16, 32], filled up with zeros.
void copy(const Product& p, int64_t o, int64_t start, int64_t steps, char* to) {
  for (int64_t r = 0; r < STRIP; r++) {
    const uint16_t* from = (const uint16_t*)p.w + (o + r) * p.inner;
    for (int64_t s = 0; s < steps; s++) {
      int64_t n = o + r < p.outer ? p.inner - (start + s) * STEP : 0;
      _mm512_store_si512(to + (s * STRIP + r) * LINE, part(from + (start + s) * STEP, n));
    }
  }
}

// Sums of one tile of w and one of x become a part of y.
void put(const Product& p, const Cut& cut, const float* sums, int64_t o, int64_t row) {
  __m512i v[16];
  for (int r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi32(first(cut.wide), sums + r * cut.wide);
  transpose(v);
  for (int64_t r = 0; r < least(cut.wide, p.rows - row); r++)
    _mm512_mask_storeu_epi32(p.y + (row + r) * p.outer + o, first(p.outer - o), v[r]);
}

constexpr int64_t COPIED = SHORT * STRIP * LINE;  // bytes

// Sums of a strip and two tiles of x wait for the next chunk; where there is one only, they have one place.
int64_t places(const Cut& cut) { return cut.steps <= cut.chunk ? 1 : MOST_COLUMNS / STRIP * HIGH / 2; }

size_t scratch(const Product& p) {
  Cut cut(p);
  return size_t(COPIED + places(cut) * cut.sums() * int64_t(sizeof(float)));
}

void prepare(const Product&, void*) {}

// The strip from row o on and the chunk from step `start` on, times tile t of x and the one after it, if BOTH.
void add(const Product& p, const Cut& cut, char* copied, float* sums, int64_t o, int64_t start, int64_t t, bool both,
         const Asking& asking) {
  const char* x = (const char*)p.shared;
  int64_t end = least(start + cut.chunk, cut.steps), whole = start + asking.steps;
  if (start < whole)
    chosen(both, start == 0)({asking.strip, asking.line, LINE}, x + cut.place(t, start), cut, whole - start, sums, &asking);
  for (int64_t s = whole; s < end; s += SHORT) {
    int64_t steps = least(SHORT, end - s);
    copy(p, o, s, steps, copied);
    chosen(both, s == 0)({copied, LINE, STRIP * LINE}, x + cut.place(t, s), cut, steps, sums, nullptr);
  }
}

void columns(const Product& p, void* scratch, int64_t begin, int64_t end) {
  Cut cut(p);
  Tiles configured(cut);
  char* copied = (char*)scratch;
  int64_t bytes = p.inner * 2, apart = places(cut) == 1 ? 0 : cut.sums();
  for (int64_t tile = 0; tile < cut.tiles; tile += HIGH) {
    int64_t last = least(tile + HIGH, cut.tiles), pairs = parts(last - tile, 2);
    for (int64_t start = 0; start < cut.steps; start += cut.chunk)
      for (int64_t o = begin; o < end; o += STRIP) {
        const char* w = (const char*)p.w + o * bytes + start * LINE;
        int64_t steps = o + STRIP <= p.outer ? least(cut.chunk, p.inner / STEP - start) : 0;
        Asking asking{w, o + 2 * STRIP <= p.outer ? w + STRIP * bytes : nullptr, bytes, steps, 0, 0};
        if (pairs > 1) asking.rows = parts(STRIP, pairs);
        float* sums = (float*)(copied + COPIED) + (o - begin) / STRIP * (HIGH / 2) * apart;
        for (int64_t t = tile; t < last; t += 2, sums += apart, asking.row += asking.rows) {
          bool both = t + 1 < last;
          add(p, cut, copied, sums, o, start, t, both, asking);
          for (int64_t i = 0; start + cut.chunk >= cut.steps && i < (both ? 2 : 1); i++)
            for (int64_t j = 0; j < 2 && o + j * SIDE < p.outer; j++)
              put(p, cut, sums + (2 * j + i) * SIDE * cut.wide, o + j * SIDE, (t + i) * cut.wide);
        }
      }
  }
}

}  // namespace

const Kernel amx_bf16 = {scratch, prepare, columns, shared, pack, STRIP, SIDE};
#endif
