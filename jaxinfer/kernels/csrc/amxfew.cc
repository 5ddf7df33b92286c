// Attention of a few queries of bfloat16 to a cache of it, or of int8, by tiles of AMX: QUAD queries of a row and kv
// head at once.
//
// Keys lie as a tile's lines want them, so scores come as [slots, QUAD]: a vector of them is LANES slots of all four
// queries, and no sum is taken across lanes but once a block. Values are interleaved, as the right side of a product
// is. Where keys and values are codes, queries and a block's weights become integers of 16 bits times a scale, finer
// than bfloat16, whose two digits meet codes exactly. Blocks are counted from slot 0, and what a query does not see
// counts as zero: its bits are the same in any company. Compiled with the flags of amx.cc.
#if defined(__x86_64__)
#include "amx.h"
#include "attend.h"
#include "avx512.h"

namespace {

using Soft = Attend<Floating>;  // its exp, tanh and merge
using V = __m512;

constexpr int64_t QUAD = 4;     // queries of a vector, and
constexpr int64_t LANES = 4;    // slots
constexpr int64_t READY = 4;    // ticks, see Ahead, while a query is made ready
constexpr int64_t TILE = SIDE * LINE;  // bytes

// Numbers below the normal ones count as zero, in and out, as they do in tiles: weights far below the largest are many
// of those, and each takes as long as a hundred others.
class Flushing {
 public:
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// e^x for x <= 0, within 2 ulp: Soft::exp by other instructions.
inline V power(V x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110), x);  // which is x where that is no number
  V n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  V f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  V y = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), f, _mm512_set1_ps(1.3981999507e-3f));
  constexpr float MORE[] = {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1, 1};
  EACH(i, 6)
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(MORE[i]));
  return _mm512_scalef_ps(y, n);
}
inline V largest(V x) {  // of the LANES of each query
  x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}
// Which of LANES slots a number of a vector is of; and four numbers, one for each of them.
inline __m512i lane() { return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3); }
inline V spread(const float* four) {
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), lane());
}
// Rows of 16 bytes, four to a vector, become vectors of their own.
inline void regroup(__m512i v[4]) {
  __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, b, 0x88), v[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_i32x4(c, d, 0x88), v[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

struct Halves {
  using Elem = uint16_t;
  static constexpr int64_t DIGITS = 1, STEP = LINE / 2, WORD = 2;  // numbers of a line, and of four bytes

  static float ready(const float* from, int64_t H, int64_t wide, uint16_t* to) {
    for (int64_t i = 0; i < wide; i += 16) {
      __m512i bits = _mm512_maskz_loadu_epi32(::first(H - i), from + i);
      _mm256_store_si256((__m256i*)(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
    return 1;
  }
  static INLINE void first() { _tile_dpbf16ps(0, 2, 4); }
  static INLINE void second() { _tile_dpbf16ps(1, 3, 4); }
  static V score(const char* scores, int64_t i) { return _mm512_load_ps((const float*)scores + i * 16); }

  // Of STEP / LANES vectors of weights the lines of a tile, [QUAD, STEP].
  static V weights(const float* s, V, char* to) {
    const __m512i own = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17, 13,
                                         9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512i v[4];
    EACH(i, 4) {
      v[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(s + (2 * i + 1) * 16), _mm512_load_ps(s + 2 * i * 16));
      v[i] = _mm512_permutexvar_epi16(own, v[i]);
    }
    regroup(v);
    EACH(i, 4) _mm512_store_si512(to + i * LINE, v[i]);
    return V();
  }

  // LINE bytes of WORD slots, so that each slot's number lies beside the others' of its place.
  static void interleave(const char* from, int64_t line, char* to) {
    __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + line);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(a, b));
  }

  static INLINE void sum(const char* v, float* out, int64_t line, const V&, char*) {
    _tile_loadd(5, out, line);
    _tile_loadd(2, v, LINE);
    _tile_dpbf16ps(5, 6, 2);
    _tile_stored(5, out, line);
  }
};

struct Codes {
  using Elem = int8_t;
  static constexpr int64_t DIGITS = 2, STEP = LINE, WORD = 4;
  static constexpr float MOST = 127 * 256 + 127;

  // The first digit of integers of 16 bits; the second is what is left, and may be negative too.
  static __m512i high(__m512i x) { return _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8); }

  static float ready(const float* from, int64_t H, int64_t wide, int8_t* to) {
    V most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int64_t i = 0; i < wide; i += 16) {
      V x = _mm512_maskz_loadu_ps(::first(H - i), from + i);
      odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    float scale = odd ? __builtin_nanf("") : _mm512_reduce_max_ps(most) / MOST;
    V inverse = _mm512_set1_ps(scale >= LEAST ? 1 / scale : 0);
    for (int64_t i = 0; i < wide; i += 16) {
      __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(::first(H - i), from + i), inverse));
      __m512i top = high(x);
      _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtsepi32_epi8(top));
      x = _mm512_sub_epi32(x, _mm512_slli_epi32(top, 8));
      _mm_storeu_si128((__m128i*)(to + wide + i), _mm512_cvtsepi32_epi8(x));
    }
    return scale >= LEAST || odd ? scale : 0;
  }
  static INLINE void first() { _tile_dpbssd(0, 2, 4); }
  static INLINE void second() { _tile_dpbssd(1, 3, 4); }
  static V score(const char* scores, int64_t i) {
    __m512i a = _mm512_load_si512(scores + i * 2 * LINE), b = _mm512_load_si512(scores + (i * 2 + 1) * LINE);
    V top = _mm512_cvtepi32_ps(_mm512_shuffle_i32x4(a, b, 0x88));
    V low = _mm512_cvtepi32_ps(_mm512_shuffle_i32x4(a, b, 0xdd));
    return _mm512_fmadd_ps(top, _mm512_set1_ps(256), low);
  }

  static V weights(const float* s, V most, char* to) {
    const __m512i own = _mm512_set_epi8(63, 47, 31, 15, 59, 43, 27, 11, 55, 39, 23, 7, 51, 35, 19, 3,  //
                                        62, 46, 30, 14, 58, 42, 26, 10, 54, 38, 22, 6, 50, 34, 18, 2,  //
                                        61, 45, 29, 13, 57, 41, 25, 9, 53, 37, 21, 5, 49, 33, 17, 1,   //
                                        60, 44, 28, 12, 56, 40, 24, 8, 52, 36, 20, 4, 48, 32, 16, 0);
    V scale = _mm512_mul_ps(most, _mm512_set1_ps(1 / MOST));
    __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_set1_ps(LEAST), _CMP_GE_OQ);
    V inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), scale);
    __m512i digit[2][4];
    EACH(part, 4) {
      __m512i top[4], low[4];
      EACH(i, 4) {
        __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(s + (part * 4 + i) * 16), inverse));
        top[i] = high(x);
        low[i] = _mm512_sub_epi32(x, _mm512_slli_epi32(top[i], 8));
      }
      auto packed = [&](__m512i x[4]) {
        __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
        return _mm512_permutexvar_epi8(own, all);
      };
      digit[0][part] = packed(top);
      digit[1][part] = packed(low);
    }
    EACH(d, 2) {
      regroup(digit[d]);
      EACH(i, 4) _mm512_store_si512(to + (d * QUAD + i) * LINE, digit[d][i]);
    }
    return scale;
  }

  static void interleave(const char* from, int64_t line, char* to) {
    __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + line);
    __m512i c = _mm512_loadu_si512(from + 2 * line), d = _mm512_loadu_si512(from + 3 * line);
    __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(ab, cd));
    ab = _mm512_unpackhi_epi8(a, b), cd = _mm512_unpackhi_epi8(c, d);
    _mm512_store_si512(to + 2 * TILE, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(to + 3 * TILE, _mm512_unpackhi_epi16(ab, cd));
  }

  static INLINE void sum(const char* v, float* out, int64_t line, const V& scale, char* sums) {
    _tile_zero(5);
    _tile_loadd(2, v, LINE);
    _tile_dpbssd(5, 6, 2);
    _tile_stored(5, sums, LINE);
    stored(sums);
    EACH(r, QUAD) {
      float* to = (float*)((char*)out + r * line);
      __m512i x = _mm512_slli_epi32(_mm512_load_si512(sums + r * LINE), 8);
      x = _mm512_add_epi32(x, _mm512_load_si512(sums + (QUAD + r) * LINE));
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(scale[r]), _mm512_load_ps(to)));
    }
  }
};

// The lines of keys and values that are read next, which memory is asked for a little at a time all the while that
// others are worked out: what is asked for at once holds all places that loads may wait in, and nothing is worked out
// meanwhile.
struct Ahead {
  const Attention& a;
  const int64_t size;  // bytes of a number
  Span rest = {};
  const char *k = nullptr, *v = nullptr;
  int64_t left = 0;  // lines that lie side by side
  int64_t lines = 0, ticks = 1, owed = 0;

  // What a span says, by so many ticks: so many eighths of it. Where it goes on from what is read now, the last eighth
  // is left to what the processor foresees itself: to ask for it when it is about to be read costs more.
  void start(const Span& span, int64_t many, int64_t eighths) {
    rest = span, left = owed = 0, ticks = many * 8;
    lines = span.begin < span.end ? parts((span.end - span.begin) * a.H * size, LINE) * eighths : 0;
  }
  INLINE void turn() {
    if (rest.begin >= rest.end) return;
    int64_t n = least(rest.end - rest.begin, a.together(rest.begin)), place = a.place(rest.b, rest.h, rest.begin);
    k = (const char*)a.k + place * a.H * size, v = (const char*)a.v + place * a.H * size;
    left = parts(n * a.H * size, LINE), rest.begin += n;
    for (int64_t i = place; a.k_scale && i < place + n; i += LINE / 4) {
      __builtin_prefetch(a.k_scale + i, 0, FIRST_CACHE);
      __builtin_prefetch(a.v_scale + i, 0, FIRST_CACHE);
    }
  }
  INLINE void tick(int64_t n) {
    for (owed += n * lines; owed >= ticks; owed -= ticks, k += LINE, v += LINE) {
      if (left-- == 0) turn();
      __builtin_prefetch(k, 0, FIRST_CACHE);
      __builtin_prefetch(v, 0, FIRST_CACHE);
    }
  }
};

// A Form, Halves or Codes, says: Elem; DIGITS, numbers of it that a query or a weight is; STEP, those of a line of
// memory, which are slots of a block too, and WORD, those of four bytes; ready, what a query becomes; first and second,
// sums of scores; score, LANES of them; weights, what scores become, and their scales; interleave; sum, of values.
template <class Form>
struct Few {
  using Elem = typename Form::Elem;
  static constexpr int64_t STEP = Form::STEP, WORD = Form::WORD, SIZE = sizeof(Elem);
  static constexpr int64_t SHORT = Form::DIGITS * QUAD, ROW = SHORT * 4;  // numbers, and bytes, of a line of scores

  struct Quad {  // each query's for all LANES
    alignas(64) float best[16], total[16], factor[16];
    int32_t position[16];
    int32_t low, high;  // of its positions
  };

  const Attention& a;
  const int64_t b, h, end;
  const Foresight* foresight;
  const int64_t steps, wide;  // lines of a head, and numbers of those
  const int64_t quads;
  Ahead ahead;
  Quad* quad;
  float *out, *s, *room;       // sums [quads, QUAD, wide], scores and then weights [STEP, QUAD], a query
  float *k_scale, *v_scale;    // of a block
  char *q, *k, *v;             // queries as the right side of a product; a block's keys and values side by side,
  char *tiles;                 // and values as the right side of one
  char *scores, *weights, *sums;  // as tiles give and take them

  // Lays all out from `at` on, which may be null; gives how many bytes that takes.
  size_t lay(char* at) {
    char* from = at;
    auto take = [&](auto*& to, int64_t bytes) {
      to = decltype(to + 0)(at);
      at += parts(bytes, LINE) * LINE;
    };
    take(quad, quads * int64_t(sizeof(Quad)));
    take(out, quads * QUAD * wide * 4);
    take(s, STEP * QUAD * 4);
    take(room, wide * 4);
    take(k_scale, STEP * 4);
    take(v_scale, STEP * 4);
    take(q, quads * steps * SIDE * ROW);
    take(k, STEP * wide * SIZE);
    take(v, STEP * wide * SIZE);
    take(tiles, STEP * wide * SIZE);
    take(scores, STEP * ROW);
    take(weights, SHORT * LINE);
    take(sums, SHORT * LINE);
    return size_t(at - from);
  }

  Few(const Attention& a, const Span& span, const Foresight* foresight)
      : a(a), b(span.b), h(span.h), end(span.end), foresight(foresight), steps(parts(a.H, STEP)), wide(steps * STEP),
        quads(parts(a.queries(), QUAD)), ahead{a, SIZE} {}

  static size_t scratch(const Attention& a) { return Few(a, {}, nullptr).lay(nullptr); }

  void ready() {
    int64_t R = a.queries();
    for (int64_t j = 0; j < quads; j++) {
      Quad& own = quad[j];
      own.low = PAST, own.high = -1;
      for (int64_t i = 0; i < QUAD; i++) {
        int64_t r = least(j * QUAD + i, R - 1);  // those too many are the last once more
        Elem* digits = (Elem*)k;
        float factor = Form::ready(floats(a, query(a, b, h, r), room), a.H, wide, digits);
        ahead.tick(READY);
        int32_t position = a.position[b * a.T + r % a.T];
        own.low = position < own.low ? position : own.low;
        own.high = position > own.high ? position : own.high;
        for (int64_t c = i; c < LANES * QUAD; c += QUAD) {
          own.best[c] = NOTHING, own.total[c] = 0, own.factor[c] = factor * a.scale;
          own.position[c] = position >= PAST ? -1 : position;
        }
        for (int64_t d = 0; d < Form::DIGITS; d++)
          for (int64_t g = 0; g < wide / WORD; g++)
            __builtin_memcpy(q + (j * wide / WORD + g) * ROW + (d * QUAD + i) * 4, digits + d * wide + g * WORD, 4);
      }
    }
    for (int64_t i = 0; i < quads * QUAD * wide; i++) out[i] = 0;
  }

  bool lies_so(int64_t first, int64_t n) const { return n == STEP && a.together(first) >= STEP; }

  // n slots from `first` on in whole lines, STEP of them, those after n zeros: where they lie, or else copied.
  const char* lines(const void* from, int64_t first, int64_t n, char* copy, int64_t* line) {
    const Elem* all = (const Elem*)from;
    *line = wide * SIZE;
    if (lies_so(first, n) && wide == a.H) return (const char*)(all + a.place(b, h, first) * a.H);
    for (int64_t i = 0; i < STEP; i++) {
      const Elem* row = all + (i < n ? a.place(b, h, first + i) * a.H : 0);
      for (int64_t step = 0; step < steps; step++) {
        int64_t bytes = i < n ? least(LINE, (a.H - step * STEP) * SIZE) : 0;
        __mmask64 there = bytes == LINE ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
        _mm512_store_si512(copy + i * *line + step * LINE, _mm512_maskz_loadu_epi8(there, row + step * STEP));
      }
    }
    return copy;
  }
  const float* scales(const float* from, int64_t first, int64_t n, float* copy) const {
    if (!from) return nullptr;
    if (lies_so(first, n)) return from + a.place(b, h, first);
    for (int64_t i = 0; i < STEP; i++) copy[i] = i < n ? from[a.place(b, h, first + i)] : 0;
    return copy;
  }

  // Of a quad and a block of keys: [STEP, SHORT].
  void score(const char* q, const char* keys, int64_t line) {
    for (int64_t i = 0; i < STEP; i += 2 * SIDE) {
      const char* from = keys + i * line;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, q + step * SIDE * ROW, ROW);
        _tile_loadd(2, from + step * LINE, line);
        Form::first();
        _tile_loadd(3, from + SIDE * line + step * LINE, line);
        Form::second();
      }
      _tile_stored(0, scores + i * ROW, ROW);
      _tile_stored(1, scores + (i + SIDE) * ROW, ROW);
    }
    stored(scores);
    ahead.tick(8);
  }

  // Which of four queries see which of the slots first + i to first + i + LANES - 1, of a block of n.
  __mmask16 sees(const Quad& own, int64_t first, int64_t i, int64_t n) const {
    __mmask16 there = ::first((n - i) * QUAD);
    __m512i at = _mm512_add_epi32(lane(), _mm512_set1_epi32(int32_t(first + i)));
    if (a.slot) at = _mm512_mask_i32gather_epi32(at, there, at, a.slot + b * a.S, 4);
    __m512i position = _mm512_load_si512(own.position);
    __mmask16 seen = _mm512_mask_cmple_epi32_mask(there, at, position);
    if (!a.window) return seen;
    __m512i since = _mm512_sub_epi32(position, _mm512_set1_epi32(int32_t(a.window)));
    __mmask16 sunk = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(int32_t(a.sinks)));
    return seen & (sunk | _mm512_cmpgt_epi32_mask(at, since));
  }

  // Scores of a quad become weights; what was summed before fades to the new largest. Gives the weights' scales.
  V weigh(Quad& own, int64_t first, int64_t n, const float* ks, const float* vs, float* out) {
    bool whole = !a.slot && n == STEP && own.high < PAST && first + STEP - 1 <= own.low &&
                 (!a.window || first > own.high - a.window);
    V factor = _mm512_load_ps(own.factor), before = _mm512_load_ps(own.best), most = before;
    EACH(i, STEP / LANES) {
      ahead.tick(1);
      V x = _mm512_mul_ps(Form::score(scores, i), factor);
      if (ks) x = _mm512_mul_ps(x, spread(ks + i * LANES));
      if (a.cap != 0) x = _mm512_mul_ps(Soft::tanh(_mm512_div_ps(x, _mm512_set1_ps(a.cap))), _mm512_set1_ps(a.cap));
      if (!whole) x = _mm512_mask_blend_ps(sees(own, first, i * LANES, n), _mm512_set1_ps(NOTHING), x);
      _mm512_store_ps(s + i * 16, x);
      most = _mm512_max_ps(x, most);
    }
    most = largest(most);
    V base = _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(most, _mm512_set1_ps(NOTHING)), most);
    V total = _mm512_load_ps(own.total);
    if (_mm512_cmp_ps_mask(most, before, _CMP_GT_OQ)) {
      V by = power(_mm512_sub_ps(before, base));
      total = _mm512_mul_ps(total, by);
      _mm512_store_ps(own.best, most);
      EACH(r, QUAD) for (float* to = out + r * wide; to < out + (r + 1) * wide; to += 16)
        _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), _mm512_set1_ps(by[r])));
    }
    V peak = _mm512_setzero_ps();
    __mmask16 odd = 0;
    EACH(i, STEP / LANES) {
      ahead.tick(1);
      V x = power(_mm512_sub_ps(_mm512_load_ps(s + i * 16), base));
      total = _mm512_add_ps(total, x);
      if (vs) {
        x = _mm512_mul_ps(x, spread(vs + i * LANES));
        peak = _mm512_max_ps(peak, x);
        odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      }
      _mm512_store_ps(s + i * 16, x);
    }
    _mm512_store_ps(own.total, total);
    unsigned none = (odd | odd >> 4 | odd >> 8 | odd >> 12) & 15;  // queries, one of whose weights is no number
    peak = _mm512_mask_blend_ps(__mmask16(none * 0x1111), largest(peak), _mm512_set1_ps(__builtin_nanf("")));
    return Form::weights(s, peak, weights);
  }

  // Asks for the block after that from `first` on: of this span, or the first of the next. What is worked out with it
  // are a block's ticks, and so many more.
  void foresee(int64_t first, int64_t more) {
    Span next = {b, h, first + STEP, end};
    bool other = next.begin >= end;
    if (other && foresight->next(&next)) next.begin = next.begin / STEP * STEP;
    next.end = least(next.end, next.begin + STEP);
    ahead.start(next, quads * (8 + 2 * STEP / LANES + wide / 16) + STEP / WORD + more, other ? 8 : 7);
  }

  void look(int64_t opening) {
    for (int64_t first = opening; first < end; first += STEP) {
      int64_t n = least(STEP, end - first), line;
      const char *keys = lines(a.k, first, n, k, &line), *values = lines(a.v, first, n, v, &line);
      const float *ks = scales(a.k_scale, first, n, k_scale), *vs = scales(a.v_scale, first, n, v_scale);
      stored(k);
      if (first != opening) foresee(first, 0);
      for (int64_t j = 0; j < quads; j++) {
        float* to = out + j * QUAD * wide;
        score(q + j * wide / WORD * ROW, keys, line);
        V scale = weigh(quad[j], first, n, ks, vs, to);
        for (int64_t g = 0; j == 0 && g < STEP / WORD; g++) {
          for (int64_t step = 0; step < steps; step++)
            Form::interleave(values + g * WORD * line + step * LINE, line,
                             tiles + step * (STEP / 16) * TILE + g * LINE);
          ahead.tick(1);
        }
        stored(tiles);
        _tile_loadd(6, weights, LINE);
        for (int64_t i = 0; i < wide / 16; i++) {
          Form::sum(tiles + i * TILE, to + i * 16, wide * 4, scale, sums);
          ahead.tick(1);
        }
        stored(to);
      }
    }
  }

  void give(float* sums) const {
    constexpr int64_t PART = STEP / LANES;  // of a line, which interleaving leaves together
    for (int64_t r = 0; r < a.queries(); r++) {
      const Quad& own = quad[r / QUAD];
      const float* from = out + r * wide;
      float *to = sums + r * (a.H + 2), total = 0;
      for (int64_t c = r % QUAD; c < LANES * QUAD; c += QUAD) total += own.total[c];
      to[0] = own.best[r % QUAD], to[1] = total;
      auto at = [&](int64_t i) { return from + i / STEP * STEP + i % PART / 4 * 16 + i % STEP / PART * 4; };
      int64_t whole = a.H / 4 * 4;
      for (int64_t i = 0; i < whole; i += 4) __builtin_memcpy(to + 2 + i, at(i), 4 * sizeof(float));
      for (int64_t i = whole; i < a.H; i++) to[2 + i] = at(i)[i % 4];
    }
  }

  static void span(const Attention& a, const Span& span, const Foresight& foresight, float* sums, void* scratch) {
    // Sums of scores, two; lines of keys or values, two; queries; a sum of values; weights.
    Tiles configured({{SIDE, ROW}, {SIDE, ROW}, {SIDE, LINE}, {SIDE, LINE}, {SIDE, ROW}, {SHORT, LINE}, {SHORT, LINE},
                      {SHORT, LINE}});
    Flushing flushing;
    Few few(a, span, &foresight);
    few.lay((char*)scratch);
    int64_t opening = span.begin / STEP * STEP;
    few.foresee(opening, few.quads * QUAD * READY);
    few.ready();
    few.look(opening);
    few.give(sums);
  }

  static constexpr Attender attender() { return {scratch, span, Soft::merge}; }
};

}  // namespace

const Attender amx_attend_bf16 = Few<Halves>::attender();
const Attender amx_attend_int8 = Few<Codes>::attender();
#endif
