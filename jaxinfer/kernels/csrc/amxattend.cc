// Attention of many queries of bfloat16 to a cache of it, by tiles of AMX: QUERIES of a row and kv head at once.
//
// Scores are made as [keys, queries], so that a query is a lane and its softmax takes no sums across lanes; weights,
// rounded to bfloat16, become [queries, keys] for the product with values. Keys are taken in spans of KEYS from slot 0
// on, each weighed by the largest score up to it, and what a query does not see counts as zero: its bits are the same
// in any company (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022). Compiled with the flags of amx.cc.
#if defined(__x86_64__)
#include "amx.h"
#include "attend.h"
#include "avx512.h"

namespace {

using Soft = Attend<Floating>;  // its exp and tanh

constexpr int64_t QUERIES = 2 * SIDE;
constexpr int64_t KEYS = 128;         // of a span: their scores, weights and values stay in the first caches
constexpr int64_t TILE = SIDE * LINE;  // bytes

struct Looking {
  const Attention& a;
  const int64_t b, h, first, num;  // of the queries, which are counted token by token
  const int64_t wide, steps;       // numbers of a head, filled up to whole steps
  char *q, *k, *p, *v;             // tiles: of queries [steps, 2], keys [2 x 16 rows], weights [2, spans], values
  float *s, *o;                    // scores [KEYS, QUERIES], sums [QUERIES, wide]
  alignas(64) int32_t position[QUERIES];
  alignas(64) float best[QUERIES], total[QUERIES];

  static int64_t padded(int64_t H) { return parts(H, STEP) * STEP; }
  static size_t scratch(int64_t H) {
    int64_t wide = padded(H), tiles = wide / STEP * 2 + wide / STEP * 2 + KEYS / STEP * (2 + wide / SIDE);
    return size_t(tiles * TILE + (KEYS + wide) * QUERIES * int64_t(sizeof(float)));
  }

  Looking(const Attention& a, int64_t b, int64_t h, int64_t first, void* scratch)
      : a(a), b(b), h(h), first(first), num(least(QUERIES, a.queries() - first)), wide(padded(a.H)),
        steps(wide / STEP) {
    q = (char*)scratch;
    k = q + steps * 2 * TILE;
    p = k + steps * 2 * TILE;
    v = p + KEYS / STEP * 2 * TILE;
    s = (float*)(v + KEYS / STEP * (wide / SIDE) * TILE);
    o = s + KEYS * QUERIES;
  }

  int64_t token(int64_t i) const { return (first + i) / (a.N / a.K); }
  int64_t row(int64_t i) const {  // of q and out, [B, T, N]
    return (b * a.T + token(i)) * a.N + h * (a.N / a.K) + (first + i) % (a.N / a.K);
  }

  void look() {
    int32_t low = PAST, high = -1;
    for (int64_t i = 0; i < QUERIES; i++) {
      int32_t own = i < num ? a.position[b * a.T + token(i)] : PAST;
      position[i] = own >= PAST ? -1 : own;
      best[i] = NOTHING, total[i] = 0;
      if (position[i] < 0) continue;
      low = own < low ? own : low;
      high = own > high ? own : high;
    }
    for (int64_t i = 0; i < QUERIES * wide; i++) o[i] = 0;
    if (high >= 0) {
      int64_t begin = !a.slot && a.window && !a.sinks && low - a.window + 1 > 0 ? low - a.window + 1 : 0;
      int64_t end = a.slot ? a.S : least(high + 1, a.S);
      ready();
      for (int64_t span = begin / KEYS * KEYS; span < end; span += KEYS) {
        int64_t n = least(KEYS, end - span);
        for (int64_t i = 0; i < n; i += STEP) scores(span + i, least(STEP, n - i), s + i * QUERIES);
        for (int64_t i = 0; i < 2; i++) weigh(span, n, i);
        values(span, n);
      }
    }
    for (int64_t i = 0; i < num; i++) give(a, row(i), o + i * wide, total[i]);
  }

  // Queries as the right side of a product.
  void ready() {
    for (int64_t step = 0; step < steps; step++)
      for (int64_t half = 0; half < 2; half++) {
        __m512i v[16];
        for (int64_t r = 0; r < SIDE; r++) {
          int64_t i = half * SIDE + r, n = i < num ? a.H - step * STEP : 0;
          v[r] = part((const uint16_t*)a.q + row(i < num ? i : 0) * a.H + step * STEP, n);
        }
        transpose(v);
        for (int64_t r = 0; r < SIDE; r++) _mm512_store_si512(q + (step * 2 + half) * TILE + r * LINE, v[r]);
      }
  }

  // Of up to STEP keys from a slot on, [STEP, QUERIES].
  void scores(int64_t slot, int64_t n, float* to) {
    const uint16_t* keys = (const uint16_t*)a.k;
    const char* from = (const char*)(keys + a.place(b, h, slot) * a.H);
    int64_t line = a.H * 2;
    if (n < STEP || a.H % STEP || a.together(slot) < STEP) {
      for (int64_t i = 0; i < STEP; i++)
        for (int64_t step = 0; step < steps; step++) {
          const uint16_t* key = keys + (i < n ? a.place(b, h, slot + i) : 0) * a.H + step * STEP;
          _mm512_store_si512(k + i * wide * 2 + step * LINE, part(key, i < n ? a.H - step * STEP : 0));
        }
      from = k, line = wide * 2;
    }
    stored(k);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
      _tile_loadd(4, from + step * LINE, line);
      _tile_loadd(5, from + step * LINE + SIDE * line, line);
      _tile_loadd(6, q + step * 2 * TILE, LINE);
      _tile_loadd(7, q + (step * 2 + 1) * TILE, LINE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, QUERIES * 4);
    _tile_stored(1, to + SIDE, QUERIES * 4);
    _tile_stored(2, to + SIDE * QUERIES, QUERIES * 4);
    _tile_stored(3, to + SIDE * QUERIES + SIDE, QUERIES * 4);
  }

  // Which of 16 queries see a slot.
  __mmask16 sees(__m512i own, int64_t slot) const {
    int32_t place = a.slot ? a.slot[b * a.S + slot] : int32_t(slot);
    __m512i at = _mm512_set1_epi32(place);
    __mmask16 seen = _mm512_cmple_epi32_mask(at, own);
    if (!a.window || place < a.sinks) return seen;
    return seen & _mm512_cmpgt_epi32_mask(at, _mm512_sub_epi32(own, _mm512_set1_epi32(int32_t(a.window))));
  }

  // Scores of 16 queries and n keys become weights; what was summed before fades to the new largest.
  void weigh(int64_t span, int64_t n, int64_t half) {
    float* own = s + half * SIDE;
    __m512i at = _mm512_load_si512(position + half * SIDE);
    __m512 scale = _mm512_set1_ps(a.scale), before = _mm512_load_ps(best + half * SIDE), most = before;
    for (int64_t i = 0; i < n; i++) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(own + i * QUERIES), scale);
      if (a.cap != 0) x = _mm512_mul_ps(Soft::tanh(_mm512_div_ps(x, _mm512_set1_ps(a.cap))), _mm512_set1_ps(a.cap));
      x = _mm512_mask_blend_ps(sees(at, span + i), _mm512_set1_ps(NOTHING), x);
      _mm512_store_ps(own + i * QUERIES, x);
      most = _mm512_max_ps(most, x);
    }
    __m512 base = _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(most, _mm512_set1_ps(NOTHING)), most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += STEP) {
      __m512i pair[16];
      for (int64_t j = 0; j < SIDE; j++) {
        __m512 x[2];
        for (int64_t c = 0; c < 2; c++) {
          int64_t key = i + 2 * j + c;
          x[c] = _mm512_setzero_ps();
          if (key < n) x[c] = Soft::exp(_mm512_sub_ps(_mm512_load_ps(own + key * QUERIES), base));
          sum = _mm512_add_ps(sum, x[c]);
        }
        const __m512i order =
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                             19, 3, 18, 2, 17, 1, 16, 0);
        pair[j] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
      }
      transpose(pair);
      char* to = p + (half * (KEYS / STEP) + i / STEP) * TILE;
      for (int64_t j = 0; j < SIDE; j++) _mm512_store_si512(to + j * LINE, pair[j]);
    }
    __m512 fade = Soft::exp(_mm512_sub_ps(before, base));
    _mm512_store_ps(best + half * SIDE, most);
    _mm512_store_ps(total + half * SIDE, _mm512_fmadd_ps(_mm512_load_ps(total + half * SIDE), fade, sum));
    if (_mm512_cmpneq_ps_mask(fade, _mm512_set1_ps(1)) == 0) return;
    alignas(64) float by[SIDE];
    _mm512_store_ps(by, fade);
    for (int64_t r = 0; r < SIDE; r++)
      for (int64_t j = 0; j < wide; j += 16) {
        float* sums = o + (half * SIDE + r) * wide + j;
        _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(by[r])));
      }
  }

  // Adds the values of n keys, each with its weight.
  void values(int64_t span, int64_t n) {
    const uint16_t* all = (const uint16_t*)a.v;
    int64_t across = wide / SIDE, spans = parts(n, STEP);
    for (int64_t i = 0; i < spans * STEP; i += 2) {
      const uint16_t* row[2];
      for (int64_t c = 0; c < 2; c++) row[c] = i + c < n ? all + a.place(b, h, span + i + c) * a.H : nullptr;
      for (int64_t j = 0; j < across; j++) {
        __m512i x[2];
        for (int64_t c = 0; c < 2; c++) {
          __mmask16 there = ::first(row[c] ? a.H - j * SIDE : 0);
          x[c] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row[c] + j * SIDE));
        }
        char* to = v + (i / STEP * across + j) * TILE + i % STEP / 2 * LINE;
        _mm512_store_si512(to, _mm512_or_si512(x[0], _mm512_slli_epi32(x[1], 16)));
      }
    }
    stored(v);
    int64_t line = wide * 4;
    for (int64_t j = 0; j < across; j += 2) {
      float* to = o + j * SIDE;
      _tile_loadd(0, to, line);
      _tile_loadd(1, to + SIDE, line);
      _tile_loadd(2, to + SIDE * wide, line);
      _tile_loadd(3, to + SIDE * wide + SIDE, line);
      for (int64_t i = 0; i < spans; i++) {
        _tile_loadd(4, p + i * TILE, LINE);
        _tile_loadd(5, p + (KEYS / STEP + i) * TILE, LINE);
        _tile_loadd(6, v + (i * across + j) * TILE, LINE);
        _tile_loadd(7, v + (i * across + j + 1) * TILE, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, line);
      _tile_stored(1, to + SIDE, line);
      _tile_stored(2, to + SIDE * wide, line);
      _tile_stored(3, to + SIDE * wide + SIDE, line);
    }
  }
};

int64_t blocks(const Attention& a) { return parts(a.queries(), QUERIES); }
size_t scratch(const Attention& a) { return Looking::scratch(a.H); }

void block(const Attention& a, int64_t b, int64_t h, int64_t index, void* scratch) {
  Tiles configured(SIDE);
  Looking(a, b, h, index * QUERIES, scratch).look();
}

}  // namespace

const Crowd amx_crowd = {blocks, scratch, block};
#endif
