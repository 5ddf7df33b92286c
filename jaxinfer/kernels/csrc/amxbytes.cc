// Codes of eight bits as they are, by tiles of AMX, times rows of float32: these become integers of 30 bits times a
// power of two of the whole row, DIGITS of eight bits each, whose products with codes are summed exactly. So nothing is
// widened, a row has the same bits in any company, and a number is off by 2^-30 of the largest in its row. Compiled
// with -mamx-int8 and the flags of amx.cc.
#if defined(__x86_64__)
#include "amx.h"
#include "avx512.h"

namespace {

constexpr int64_t DIGITS = 4;
constexpr int64_t GROUP = SIDE / DIGITS;  // rows of x in a tile, DIGITS columns each
constexpr int BITS = 30;
constexpr int64_t LONGEST = 1024;         // steps whose sums fit 32 bits: 1024 * 64 * 128 * 128 is 2^30

// How x is cut: into groups of up to `wide` rows, the last one filled up with zeros: [groups, steps, 16, DIGITS, wide,
// 4], behind the exponents of all rows.
struct Cut {
  int64_t groups, wide, steps;
  explicit Cut(const Product& p) {
    groups = parts(p.rows, GROUP);
    wide = parts(p.rows, groups);
    steps = parts(p.inner, LINE);
  }
  int64_t columns() const { return DIGITS * wide; }
  int64_t line() const { return columns() * 4; }
  int64_t step() const { return SIDE * line(); }
  int64_t exponents() const { return parts(groups * wide * 4, LINE) * LINE; }
  int64_t size() const { return exponents() + groups * steps * step(); }
  char* place(const void* shared, int64_t group, int64_t s) const {
    return (char*)shared + exponents() + (group * steps + s) * step();
  }
};

size_t shared(const Product& p) { return size_t(Cut(p).size()); }

// The last digit of integers; they become what is left.
inline __m512i last(__m512i& x) {
  __m512i rest = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  __m512i digit = _mm512_sub_epi32(x, _mm512_slli_epi32(rest, 8));
  x = rest;
  return digit;
}

// Which power of two the integers of a row are times; no number, if there is none for them.
float exponent_of(const float* row, int64_t n) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 odd = 0;
  for (int64_t i = 0; i < n; i += 16) {
    __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), row + i));
    odd |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, size);
  }
  float peak = _mm512_reduce_max_ps(most);
  if (odd) return __builtin_nanf("");
  return peak == 0 ? 0 : _mm512_cvtss_f32(_mm512_getexp_ps(_mm512_set1_ps(peak))) + 1 - BITS;
}

void pack(const Product& p, void* shared, int64_t group) {
  Cut cut(p);
  for (int64_t r = 0; r < cut.wide; r++) {
    int64_t row = group * cut.wide + r;
    bool there = row < p.rows;
    const float* from = (const float*)p.x + (there ? row * p.inner : 0);
    float exponent = there ? exponent_of(from, p.inner) : 0;
    ((float*)shared)[row] = exponent;
    for (int64_t i = 0; i < cut.steps * LINE; i += SIDE) {
      __m512 x = _mm512_maskz_loadu_ps(first(there && exponent == exponent ? p.inner - i : 0), from + i);
      __m512i whole = _mm512_cvtps_epi32(_mm512_scalef_ps(x, _mm512_set1_ps(-exponent)));
      char* to = cut.place(shared, group, i / LINE) + i % LINE / 4 * cut.line() + r * 4;
      for (int64_t d = DIGITS - 1; d >= 0; d--) {
        alignas(16) char four[4][4];
        _mm_store_si128((__m128i*)four, _mm512_cvtepi32_epi8(last(whole)));
        EACH(g, 4) __builtin_memcpy(to + g * cut.line() + d * cut.wide * 4, four[g], 4);
      }
    }
  }
}

// A strip of codes times one group of x or BOTH, over some steps; sums [2, 2, 16, columns].
template <bool BOTH>
void multiply(const Strip& w, const Asking* asking, const char* x, const Cut& cut, int64_t steps, char* sums) {
  int64_t line = cut.line(), size = cut.step(), apart = cut.steps * size;
  stored(w.one);
  _tile_zero(0);
  _tile_zero(2);
  if (BOTH) _tile_zero(1);
  if (BOTH) _tile_zero(3);
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, w.one + s * w.step, w.line);
    _tile_loadd(5, w.other + s * w.step, w.line);
    if (asking) ask(*asking, s);
    _tile_loadd(6, x + s * size, line);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    if (!BOTH) continue;
    _tile_loadd(7, x + apart + s * size, line);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, line);
  _tile_stored(2, sums + 2 * size, line);
  if (BOTH) _tile_stored(1, sums + size, line);
  if (BOTH) _tile_stored(3, sums + 3 * size, line);
  stored(sums);
}

// Sums of 16 outputs from o on and a group become a part of y, or are added to it.
void put(const Product& p, const Cut& cut, const char* sums, int64_t o, int64_t group, bool more) {
  if (o >= p.outer) return;
  __m512i v[16];
  for (int r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi32(first(cut.columns()), sums + r * cut.line());
  transpose(v);
  __mmask16 there = first(p.outer - o);
  __m512 scale = _mm512_maskz_loadu_ps(there, (const float*)p.scale + o);
  for (int64_t r = 0, row = group * cut.wide; r < cut.wide && row < p.rows; r++, row++) {
    __m512 y = _mm512_setzero_ps();
    EACH(d, DIGITS) y = _mm512_fmadd_ps(y, _mm512_set1_ps(256), _mm512_cvtepi32_ps(v[d * cut.wide + r]));
    y = _mm512_mul_ps(_mm512_scalef_ps(y, _mm512_set1_ps(((const float*)p.shared)[row])), scale);
    float* to = p.y + row * p.outer + o;
    if (more) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, to));
    _mm512_mask_storeu_ps(to, there, y);
  }
}

// A strip that does not lie in whole lines, or not wholly there, is copied, filled up with zeros: [32, steps, 64].
bool lies_so(const Product& p, int64_t o) { return p.inner % LINE == 0 && o + STRIP <= p.outer; }

size_t scratch(const Product& p) {
  Cut cut(p);
  int64_t copied = p.inner % LINE || p.outer % STRIP ? STRIP * cut.steps * LINE : 0;
  return size_t(4 * cut.step() + copied);
}

void copy(const Product& p, int64_t o, int64_t steps, char* to) {
  for (int64_t r = 0; r < STRIP; r++)
    for (int64_t s = 0; s < steps; s++) {
      int64_t n = o + r < p.outer ? p.inner - s * LINE : 0;
      __mmask64 there = n >= LINE ? ~__mmask64(0) : n > 0 ? (__mmask64(1) << n) - 1 : 0;
      const char* from = (const char*)p.w + (n > 0 ? (o + r) * p.inner + s * LINE : 0);
      _mm512_store_si512(to + (r * steps + s) * LINE, _mm512_maskz_loadu_epi8(there, from));
    }
}

void prepare(const Product&, void*) {}

void columns(const Product& p, void* scratch, int64_t begin, int64_t end) {
  Cut cut(p);
  Tiles configured(cut.columns());
  char *sums = (char*)scratch, *copied = sums + 4 * cut.step();
  for (int64_t o = begin; o < end; o += STRIP) {
    const char* one = (const char*)p.w + o * p.inner;
    Strip strip = {one, one + SIDE * p.inner, p.inner, LINE}, next = strip.moved(STRIP * p.inner);
    Asking asking{strip, next, o + 2 * STRIP <= p.outer, p.inner / LINE, 0, 0};
    bool there = lies_so(p, o);
    if (!there) {
      copy(p, o, cut.steps, copied);
      strip = {copied, copied + SIDE * cut.steps * LINE, cut.steps * LINE, LINE};
    }
    for (int64_t group = 0; group < cut.groups; group += 2)
      for (int64_t s = 0; s < cut.steps; s += LONGEST) {
        bool both = group + 1 < cut.groups, asks = there && group == 0 && s == 0;
        auto chosen = both ? multiply<true> : multiply<false>;
        const char* x = cut.place(p.shared, group, s);
        chosen(strip.moved(s * LINE), asks ? &asking : nullptr, x, cut, least(LONGEST, cut.steps - s), sums);
        for (int64_t i = 0; i < (both ? 2 : 1); i++) {
          put(p, cut, sums + i * cut.step(), o, group + i, s > 0);
          put(p, cut, sums + (2 + i) * cut.step(), o + SIDE, group + i, s > 0);
        }
      }
  }
}

}  // namespace

const Kernel amx_bytes = {scratch, prepare, columns, shared, pack, STRIP, GROUP};
#endif
