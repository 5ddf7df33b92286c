// The product over any vector type. Included by one file per instruction set, each compiled with its own flags: all is
// in an anonymous namespace and uses no inline function of a library, so that no linker can mix them up.
//
// A Type says: Elem, an element of x in memory; X, WIDTH of them ready to be multiplied; V, the sums of LANES; ROWS, how
// many rows of x fit the registers; load, load_part (the rest are zeros), zero, step, sum4. And of w: Row, part of one
// from some element on; weight, weight_part, WIDTH of its elements ready to be multiplied, which is a W; BYTES, how far
// those lie apart; SCALED, whether a sum is to be multiplied by its row's scale. Same, Int8 and Int4 say this for a Type
// without.
#pragma once

#include "linear.h"

namespace {

typedef float F4 __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int64_t CHUNK = 32;            // vectors of a row that are summed up together: a tile's fit the first cache
constexpr int64_t X_BYTES = 384 * 1024;  // of x, ready to be multiplied: they stay in the second cache
constexpr int64_t PACKED_ROWS = 24;      // so many rows repay a copy of w's chunks
constexpr int64_t LINE = 64;             // bytes that memory gives at once
// Where memory that is asked for goes: mostly the first cache is full of what is being multiplied.
constexpr int FIRST_CACHE = 3, SECOND_CACHE = 2;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define EACH(i, n) UNROLL for (int i = 0; i < (n); i++)

// w is as x is.
template <class T>
struct Same : T {
  using W = typename T::X;
  using Row = const typename T::Elem*;
  static constexpr int64_t BYTES = T::WIDTH * sizeof(typename T::Elem);
  static constexpr bool SCALED = false;
  static Row row(const Product& p, int64_t o, int64_t start) { return (Row)p.w + o * p.inner + start; }
  static const char* start(const Product& p, int64_t o, int64_t start) { return (const char*)row(p, o, start); }
  static W weight(Row row, int64_t s) { return T::load(row + s * T::WIDTH); }
  static W weight_part(Row row, int64_t s, int n) { return T::load_part(row + s * T::WIDTH, n); }
};

// w is int8, x float32; T::codes(const int8_t*) makes them ready.
template <class T>
struct Int8 : T {
  using W = decltype(T::codes(nullptr));
  using Row = const int8_t*;
  static constexpr int64_t BYTES = T::WIDTH;
  static constexpr bool SCALED = true;
  static Row row(const Product& p, int64_t o, int64_t start) { return (Row)p.w + o * p.inner + start; }
  static const char* start(const Product& p, int64_t o, int64_t start) { return (const char*)row(p, o, start); }
  static W weight(Row row, int64_t s) { return T::codes(row + s * T::WIDTH); }
  static W weight_part(Row row, int64_t s, int n) {
    int8_t part[T::WIDTH] = {};
    for (int i = 0; i < n; i++) part[i] = row[s * T::WIDTH + i];
    return T::codes(part);
  }
};

inline float from_half(uint16_t half) {
  union {
    uint32_t bits;
    float value;
  } u = {uint32_t(half & 0x7fff) << 13}, scale = {uint32_t(239) << 23};  // 2^112, between the two biases
  u.value *= scale.value;
  u.bits |= uint32_t(half & 0x8000) << 16;
  return u.value;
}

// w is four bits a number, 0 to 15 for -8 to 7, times the scale of its group; x is float32. Where WIDTH is of whole units
// T::units(const uint8_t*, scales, how many) makes them ready; elsewhere T::nibbles(const uint8_t*, shift) widens WIDTH
// of them, less 8, and T::scaled multiplies. Rows are whole units.
template <class T>
struct Int4 : T {
  using W = typename T::Ready;
  struct Row {
    const uint8_t* codes;
    float scale[parts(CHUNK * T::WIDTH, UNIT)];  // of each unit of a chunk
  };
  static constexpr int64_t BYTES = T::WIDTH / 2;
  static constexpr bool SCALED = false;
  static const char* start(const Product& p, int64_t o, int64_t start) {
    return (const char*)p.w + (o * p.inner + start) / 2;
  }
  static Row row(const Product& p, int64_t o, int64_t start) {
    Row row{(const uint8_t*)Int4::start(p, o, start), {}};
    int64_t units = least(parts(p.inner - start, UNIT), parts(CHUNK * T::WIDTH, UNIT));
    int64_t first = start / UNIT, each = p.group / UNIT;
    const uint16_t* scale = (const uint16_t*)p.scale + o * (p.inner / p.group);
    if (each == 1) {
      T::halves(scale + first, row.scale, units);
    } else {
      for (int64_t u = 0, group = first / each; u < units; group++) {
        float value = from_half(scale[group]);
        for (int64_t end = least((group + 1) * each - first, units); u < end; u++) row.scale[u] = value;
      }
    }
    return row;
  }
  static W weight(const Row& row, int64_t s) {
    if constexpr (T::WIDTH >= UNIT) {
      return T::units(row.codes + s * (T::WIDTH / 2), row.scale + s * (T::WIDTH / UNIT), T::WIDTH / UNIT);
    } else {
      constexpr uint64_t HALF = UNIT / 2 / T::WIDTH;  // steps
      uint64_t unit = uint64_t(s) / (2 * HALF), place = uint64_t(s) % (2 * HALF);
      const uint8_t* bytes = row.codes + unit * (UNIT / 2) + place % HALF * T::WIDTH;
      return T::scaled(T::nibbles(bytes, int(place / HALF) * 4), row.scale[unit]);
    }
  }
  static W weight_part(const Row& row, int64_t s, int n) {
    if constexpr (T::WIDTH > UNIT) {
      return T::units(row.codes + s * (T::WIDTH / 2), row.scale + s * (T::WIDTH / UNIT), n / UNIT);
    } else {
      return weight(row, s);
    }
  }
};

template <class T>
struct Linear {
  using Elem = typename T::Elem;
  using X = typename T::X;
  using W = typename T::W;
  using Row = typename T::Row;
  static constexpr int64_t WIDTH = T::WIDTH;

  static int64_t steps(const Product& p) { return parts(p.inner, WIDTH); }
  static int64_t tile_rows(int64_t rows) { return parts(rows, parts(rows, T::ROWS)); }
  // Few rows stay ready over their whole length while w is streamed past them once; many rows are taken by chunks.
  static bool few(const Product& p) { return p.rows * steps(p) * int64_t(sizeof(X)) <= X_BYTES; }
  static int64_t block_rows(const Product& p) {
    if (few(p)) return p.rows;
    int64_t most = X_BYTES / (CHUNK * int64_t(sizeof(X)));
    int64_t even = parts(p.rows, parts(p.rows, most));
    return parts(even, T::ROWS) * T::ROWS;
  }

  static size_t scratch(const Product& p) {
    int64_t length = few(p) ? steps(p) : least(steps(p), CHUNK);
    return COLUMNS * CHUNK * sizeof(W) + size_t(block_rows(p) * length) * sizeof(X);
  }

  static X* ready(void* scratch) { return (X*)((W*)scratch + COLUMNS * CHUNK); }

  // Copies elements [start, start + length) of `rows` rows to out [rows / tile, steps, tile].
  static void pack(const Elem* from, int64_t stride, int64_t rows, int64_t tile, int64_t length, X* out) {
    int64_t full = length / WIDTH, rest = length % WIDTH;
    for (int64_t row = 0; row < rows; row += tile) {
      int64_t here = least(tile, rows - row);
      for (int64_t r = 0; r < here; r++) {
        const Elem* source = from + (row + r) * stride;
        for (int64_t s = 0; s < full; s++) out[s * here + r] = T::load(source + s * WIDTH);
        if (rest) out[full * here + r] = T::load_part(source + full * WIDTH, int(rest));
      }
      out += here * (full + (rest != 0));
    }
  }

  // R rows of x times COLUMNS rows of w over one chunk, stored to y or added to it. Meanwhile it asks memory for as much
  // of the first FETCH rows of `next`.
  template <int R, bool PACKED, int FETCH>
  static void tile(const X* x, const W* packed, const Row* w, const char* const* next, int64_t length,
                   bool first, float* y, int64_t stride, int columns) {
    constexpr int STEPS = T::BYTES < LINE ? LINE / T::BYTES : 1;  // of a line of memory, which is asked for once
    typename T::V sum[R][COLUMNS];
    W v[COLUMNS];
    EACH(r, R) EACH(c, COLUMNS) sum[r][c] = T::zero();
    int64_t full = PACKED ? parts(length, WIDTH) : length / WIDTH;
    for (int64_t s = 0; s < full; s++) {
      EACH(c, COLUMNS) v[c] = PACKED ? packed[s * COLUMNS + c] : T::weight(w[c], s);
      EACH(i, parts(FETCH, STEPS)) {
        int c = int(s % STEPS) + i * STEPS;
        if (c < FETCH) __builtin_prefetch(next[c] + s / STEPS * STEPS * T::BYTES, 0, SECOND_CACHE);
      }
      EACH(r, R) {
        X row = x[s * R + r];
        EACH(c, COLUMNS) sum[r][c] = T::step(sum[r][c], row, v[c]);
      }
    }
    int rest = PACKED ? 0 : int(length % WIDTH);
    if (rest) {
      EACH(c, COLUMNS) v[c] = T::weight_part(w[c], full, rest);
      EACH(r, R) {
        X row = x[full * R + r];
        EACH(c, COLUMNS) sum[r][c] = T::step(sum[r][c], row, v[c]);
      }
    }
    EACH(r, R) {
      F4 total = T::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      float* out = y + r * stride;
      if (columns == COLUMNS) {
        *(F4*)out = first ? total : *(F4*)out + total;
      } else {
        for (int c = 0; c < columns; c++) out[c] = first ? total[c] : out[c] + total[c];
      }
    }
  }

  using Tile = decltype(&tile<1, false, 0>);
  template <bool PACKED, int FETCH>
  static Tile tile_of(int64_t rows) {
    if constexpr (T::ROWS > 3) {
      if (rows == 6) return tile<6, PACKED, FETCH>;
      if (rows == 5) return tile<5, PACKED, FETCH>;
      if (rows == 4) return tile<4, PACKED, FETCH>;
    }
    return rows == 3 ? tile<3, PACKED, FETCH> : rows == 2 ? tile<2, PACKED, FETCH> : tile<1, PACKED, FETCH>;
  }

  // One chunk of COLUMNS rows of w, from column o on, times `rows` rows of x, which are ready. The first tiles share in
  // asking for what the next strip will read, so that memory is at work all the time.
  static void strip(const Product& p, const X* x, W* packed, int64_t row, int64_t rows, int64_t o,
                    int64_t start) {
    Row w[COLUMNS];
    const char* next[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      w[c] = T::row(p, least(o + c, p.outer - 1), start);
      next[c] = T::start(p, least(o + COLUMNS + c, p.outer - 1), start);
    }
    int64_t length = least(CHUNK * WIDTH, p.inner - start), count = parts(length, WIDTH);
    bool copied = rows >= PACKED_ROWS;
    if (copied) {
      int64_t full = length / WIDTH, rest = length % WIDTH;
      for (int64_t s = 0; s < full; s++) EACH(c, COLUMNS) packed[s * COLUMNS + c] = T::weight(w[c], s);
      for (int c = 0; rest && c < COLUMNS; c++)
        packed[full * COLUMNS + c] = T::weight_part(w[c], full, int(rest));
    }
    int64_t high = tile_rows(rows), each = rows <= high ? COLUMNS : rows <= 3 * high && !copied ? 2 : 1;
    for (int64_t r = 0, asked = 0; r < rows; r += high, asked += each) {
      int64_t here = least(high, rows - r);
      Tile tile = asked >= COLUMNS ? (copied ? tile_of<true, 0>(here) : tile_of<false, 0>(here))
                  : copied         ? tile_of<true, 1>(here)
                  : each == 1      ? tile_of<false, 1>(here)
                  : each == 2      ? tile_of<false, 2>(here)
                                   : tile_of<false, COLUMNS>(here);
      tile(x + r * count, packed, w, next + least(asked, COLUMNS - 1), length, start == 0,
           p.y + (row + r) * p.outer + o, p.outer, int(least(COLUMNS, p.outer - o)));
    }
  }

  static void prepare(const Product& p, void* scratch) {
    if (!few(p)) return;
    X* x = ready(scratch);
    for (int64_t start = 0; start < p.inner; start += CHUNK * WIDTH) {
      int64_t length = least(CHUNK * WIDTH, p.inner - start);
      pack((const Elem*)p.x + start, p.inner, p.rows, tile_rows(p.rows), length, x + start / WIDTH * p.rows);
    }
  }

  static void columns(const Product& p, void* scratch, int64_t begin, int64_t end) {
    W* packed = (W*)scratch;
    X* x = ready(scratch);
    if (few(p)) {
      for (int64_t o = begin; o < end; o += COLUMNS)
        for (int64_t start = 0; start < p.inner; start += CHUNK * WIDTH)
          strip(p, x + start / WIDTH * p.rows, packed, 0, p.rows, o, start);
      scale(p, begin, end);
      return;
    }
    int64_t block = block_rows(p);
    for (int64_t row = 0; row < p.rows; row += block) {
      int64_t rows = least(block, p.rows - row);
      for (int64_t start = 0; start < p.inner; start += CHUNK * WIDTH) {
        int64_t length = least(CHUNK * WIDTH, p.inner - start);
        pack((const Elem*)p.x + row * p.inner + start, p.inner, rows, tile_rows(rows), length, x);
        for (int64_t o = begin; o < end; o += COLUMNS) strip(p, x, packed, row, rows, o, start);
      }
    }
    scale(p, begin, end);
  }

  static void scale(const Product& p, int64_t begin, int64_t end) {
    if (!T::SCALED) return;
    for (int64_t row = 0; row < p.rows; row++)
      for (int64_t o = begin; o < end; o++) p.y[row * p.outer + o] *= ((const float*)p.scale)[o];
  }

  static constexpr Kernel kernel() { return {scratch, prepare, columns}; }
};

inline float widen(uint16_t half) {
  union {
    uint32_t bits;
    float value;
  } u = {uint32_t(half) << 16};
  return u.value;
}
inline uint16_t narrow(float value) {  // to the nearest, of two the even one
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bool number = (bits & 0x7fffffff) <= 0x7f800000;
  return uint16_t((number ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16);
}

}  // namespace
