// Tiles of AMX: 16 rows of w times 16 rows of x, 32 numbers of each at once, at ten times the rate of vdpbf16ps.
//
// w is loaded as it lies, or widened where it is codes: eight bits are a number of bfloat16, and four bits times a scale
// of float16 are the sum of two, each of which is multiplied. x, of which every thread uses all, is packed once. A sum
// takes its terms in their order, two at a time, whatever lies beside it, so no cut below changes its bits. Numbers are
// rounded to nearest; denormal ones count as zero, in and out. Compiled with -mamx-tile -mamx-bf16 and the flags of
// avx512bf16.cc.
#if defined(__x86_64__)
#include "amx.h"
#include "attend.h"
#include "avx512.h"

namespace {

using Soft = Attend<Floating>;  // its exp and tanh

constexpr int64_t STREAMED = 2;       // up to so many tiles of x, w is read from memory at the pace that it is used
constexpr int64_t HIGH = 8;           // tiles of x, by
constexpr int64_t LONG = 64;          // steps, stay in the second cache, beside so much of a strip
constexpr int64_t RING = 8;           // steps that are widened from codes, half of them ahead

// How x is cut: into tiles of `wide` rows, the last one filled up with zeros, whose numbers lie in pairs; and into
// chunks of steps: [chunks, tiles, chunk, 16, wide, 2].
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

size_t shared(const Product& p) { return size_t(Cut(p).size()); }

// A step of bfloat16, which is as many numbers as share a scale, as what their codes say: see `rounded` of linear.cc.
inline __m512i rounded(__m512i step) {
  __m512 low = widened(_mm512_castsi512_si256(step)), high = widened(_mm512_extracti64x4_epi64(step, 1));
  float scale = scale_of(low, high);
  if (scale == 0) return _mm512_setzero_si512();
  __m512 by = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1 / scale);
  auto said = [&](__m512 x) { return _mm512_mul_ps(_mm512_roundscale_ps(_mm512_mul_ps(x, inverse), 8), by); };
  return (__m512i)_mm512_cvtne2ps_pbh(said(high), said(low));
}

template <bool ROUNDED>
void pack(const Product& p, void* shared, int64_t tile) {
  Cut cut(p);
  int64_t rows = least(cut.wide, p.rows - tile * cut.wide);
  const uint16_t* from = (const uint16_t*)p.x + tile * cut.wide * p.inner;
  auto one = [&](int64_t r, int64_t s) {
    __m512i x = part(from + r * p.inner + s * STEP, p.inner - s * STEP);
    return ROUNDED ? rounded(x) : x;
  };
  for (int64_t s = 0; s < cut.steps; s++) {
    char* to = (char*)shared + cut.place(tile, s);
    if (cut.wide == 1) {
      _mm512_storeu_si512(to, one(0, s));
      continue;
    }
    __m512i v[16];
    for (int r = 0; r < 16; r++) v[r] = r < rows ? one(r, s) : _mm512_setzero_si512();
    transpose(v);
    for (int r = 0; r < 16; r++) _mm512_mask_storeu_epi32(to + r * cut.line(), first(cut.wide), v[r]);
  }
}

// What a weight is kept in, and how a step of a row of it becomes numbers of bfloat16: PARTS lines that add up to it, so
// many bytes apart. BITS of a number; CODES, whether there is something to do; SCALED, whether an output has a scale.
struct Numbers {
  static constexpr int PARTS = 1, BITS = 16;
  static constexpr bool CODES = false, SCALED = false;
  static INLINE void widen(const Product& p, const char* row, int64_t, int64_t s, bool there, char* to, int64_t) {
    _mm512_store_si512(to, ::part((const uint16_t*)row + s * STEP, there ? p.inner - s * STEP : 0));
  }
};

struct Bytes8 {
  static constexpr int PARTS = 1, BITS = 8;
  static constexpr bool CODES = true, SCALED = true;
  static INLINE void widen(const Product& p, const char* row, int64_t, int64_t s, bool there, char* to, int64_t) {
    int64_t n = there ? p.inner - s * STEP : 0;
    const char* from = row + s * STEP;
    __m256i codes = n >= STEP ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskz_loadu_epi8(first32(n), from);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

// A step is a unit. Eleven bits of a scale times four are fifteen: eight of them and what they leave.
struct Nibbles {
  static constexpr int PARTS = 2, BITS = 4;
  static constexpr bool CODES = true, SCALED = false;
  static INLINE void widen(const Product& p, const char* row, int64_t o, int64_t s, bool there, char* to, int64_t apart) {
    if (!there || s * STEP >= p.inner) {
      for (int64_t i = 0; i < PARTS; i++) _mm512_store_si512(to + i * apart, _mm512_setzero_si512());
      return;
    }
    int64_t each = p.group / UNIT, group = each == 1 ? s : uint32_t(s) / uint32_t(each);
    __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(((const int16_t*)p.scale)[o * p.groups + group]));
    __m512 all = _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), scale);
    __m256i most = (__m256i)_mm512_cvtneps_pbh(all);
    __m512 kept = widened(most);
    __m256i rest = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(all, kept));
    __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(most), rest, 1);
    __m128i bytes = _mm_loadu_si128((const __m128i*)(row + s * (STEP / 2)));
    const __m128i ones = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(bytes, ones), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), ones);
    __m512i codes = _mm512_cvtepu8_epi16(_mm256_set_m128i(high, low));
    _mm512_store_si512(to, _mm512_permutexvar_epi16(codes, table));
    codes = _mm512_or_si512(codes, _mm512_set1_epi16(16));
    _mm512_store_si512(to + apart, _mm512_permutexvar_epi16(codes, table));
  }
};

// Of the rows from o on: how many outputs a strip has, and where it lies.
int64_t outputs(const Product& p) { return p.other ? SIDE : STRIP; }

template <class Form>
Strip strip_of(const Product& p, int64_t o) {
  int64_t bytes = p.inner * Form::BITS / 8;
  const char* one = (const char*)p.w + o * bytes;
  return {one, p.other ? (const char*)p.other + o * bytes : one + SIDE * bytes, bytes, LINE};
}

// Where the tiles of a step are: as they lie, while memory is asked for others;
struct Lying {
  Strip w;
  const Asking* asking;
  void prepare() {}
  const char* one(int64_t s, int64_t part) const { return w.one + s * w.step + part * STRIP * LINE; }
  const char* other(int64_t s, int64_t part) const { return w.other + s * w.step + part * STRIP * LINE; }
  int64_t line() const { return w.line; }
  INLINE void meanwhile(int64_t s) {
    if (asking) ask(*asking, s);
  }
};

// or codes, which are widened a few steps ahead, a line of them at a time.
template <class Form>
struct Widening {
  static constexpr int64_t EACH_LINE = LINE * 8 / Form::BITS / STEP;  // steps
  const Product& p;
  Strip w;
  Asking asking;
  int64_t o, steps;
  char* ring;  // [RING, PARTS, 2, 16, 32]
  void prepare() {
    for (int64_t s = 0; s < RING / 2; s += EACH_LINE) widen(s);
  }
  const char* one(int64_t s, int64_t part) const { return ring + (s % RING * Form::PARTS + part) * STRIP * LINE; }
  const char* other(int64_t s, int64_t part) const { return one(s, part) + SIDE * LINE; }
  int64_t line() const { return LINE; }
  INLINE void meanwhile(int64_t s) {
    if (s % EACH_LINE) return;
    ask(asking, s / EACH_LINE);
    widen(s + RING / 2);
  }
  INLINE void widen(int64_t first) {
    if (first >= steps) return;
    char* to = (char*)one(first, 0);
    for (int64_t r = 0; r < STRIP; r++, to += LINE)
      EACH(i, EACH_LINE)
        Form::widen(p, w.row(r), o + r, first + i, o + r < p.outer, to + i * Form::PARTS * STRIP * LINE, STRIP * LINE);
    stored(ring);
  }
};

// Two tiles of w times one of x or BOTH, over some steps; sums [2, 2, 16, wide], begun ANEW or gone on with.
template <bool BOTH, bool ANEW, int PARTS, class Weights>
void multiply(Weights& w, const char* x, const Cut& cut, int64_t steps, float* to) {
  char* sums = (char*)to;
  int64_t line = cut.line(), size = cut.step();
  w.prepare();
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
  for (int64_t s = 0; s < steps; s++)
    for (int part = 0; part < PARTS; part++) {
      _tile_loadd(4, w.one(s, part), w.line());
      _tile_loadd(5, w.other(s, part), w.line());
      if (part == 0) {
        w.meanwhile(s);
        _tile_loadd(6, x + s * size, line);
        if (BOTH) _tile_loadd(7, x + cut.tile() + s * size, line);
      }
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

template <int PARTS, class Weights>
void multiply(bool both, bool anew, Weights w, const char* x, const Cut& cut, int64_t steps, float* to) {
  auto chosen = both ? anew ? multiply<true, true, PARTS, Weights> : multiply<true, false, PARTS, Weights>
                     : anew ? multiply<false, true, PARTS, Weights> : multiply<false, false, PARTS, Weights>;
  chosen(w, x, cut, steps, to);
}

// Steps of a strip as tiles side by side, [steps, PARTS, 2, 16, 32], filled up with zeros.
template <class Form>
void copy(const Product& p, int64_t o, int64_t start, int64_t steps, char* to) {
  Strip strip = strip_of<Form>(p, o);
  for (int64_t r = 0; r < STRIP; r++)
    for (int64_t s = 0; s < steps; s++)
      Form::widen(p, strip.row(r), o + r, start + s, o + r % outputs(p) < p.outer,
                  to + (s * Form::PARTS * STRIP + r) * LINE, STRIP * LINE);
}

// Sums of one tile of w and one of x become a part of y.
template <class Form>
void put(const Product& p, const Cut& cut, const float* sums, int64_t o, int64_t row) {
  __m512i v[16];
  const float* scale = (const float*)p.scale + o;
  for (int r = 0; r < 16; r++) {
    __m512 sum = _mm512_maskz_loadu_ps(first(cut.wide), sums + r * cut.wide);
    if (Form::SCALED && o + r < p.outer) sum = _mm512_mul_ps(sum, _mm512_set1_ps(scale[r]));
    v[r] = (__m512i)sum;
  }
  transpose(v);
  for (int64_t r = 0; r < least(cut.wide, p.rows - row); r++)
    _mm512_mask_storeu_epi32(p.y + (row + r) * p.outer + o, first(p.outer - o), v[r]);
}

__m512 activated(__m512 x, Activation activation) {
  const __m512 one = _mm512_set1_ps(1);
  if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x);  // of a number that is none, x
  if (activation == SILU) {
    __m512 e = Soft::exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __m512 above = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), one, e);
    return _mm512_mul_ps(x, _mm512_div_ps(above, _mm512_add_ps(one, e)));
  }
  __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
  __m512 y = Soft::tanh(_mm512_mul_ps(_mm512_set1_ps(0.7978845608f), _mm512_add_ps(x, cube)));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x), _mm512_add_ps(one, y));
}

// The same of a gate's tile and the one that it opens: activation(gate) * up, rounded to bfloat16.
void put_gated(const Product& p, const Cut& cut, const float* gate, const float* up, int64_t o, int64_t row) {
  __m512i v[16];
  for (int r = 0; r < 16; r++) {
    __m512 one = _mm512_maskz_loadu_ps(first(cut.wide), gate + r * cut.wide);
    __m512 other = _mm512_maskz_loadu_ps(first(cut.wide), up + r * cut.wide);
    v[r] = (__m512i)_mm512_mul_ps(activated(one, p.activation), other);
  }
  transpose(v);
  for (int64_t r = 0; r < least(cut.wide, p.rows - row); r++) {
    __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v[r]);
    _mm256_mask_storeu_epi16(p.half + (row + r) * p.outer + o, first(p.outer - o), half);
  }
}

// Sums of a strip and of tile t of x, or of it and the one after.
template <class Form>
void put(const Product& p, const Cut& cut, const float* sums, int64_t o, int64_t t, bool both) {
  for (int64_t i = 0; i < (both ? 2 : 1); i++) {
    const float *one = sums + i * SIDE * cut.wide, *other = one + 2 * SIDE * cut.wide;
    int64_t row = (t + i) * cut.wide;
    if (p.other) {
      put_gated(p, cut, one, other, o, row);
      continue;
    }
    put<Form>(p, cut, one, o, row);
    if (o + SIDE < p.outer) put<Form>(p, cut, other, o + SIDE, row);
  }
}

template <class Form>
constexpr int64_t COPIED = LONG * Form::PARTS * STRIP * LINE;  // bytes

// Sums of a strip and two tiles of x wait for the next chunk; where there is one only, they have one place.
int64_t places(const Product& p, const Cut& cut) {
  return cut.steps <= cut.chunk ? 1 : MOST_COLUMNS / outputs(p) * HIGH / 2;
}

template <class Form>
size_t scratch(const Product& p) {
  Cut cut(p);
  return size_t(COPIED<Form> + places(p, cut) * cut.sums() * int64_t(sizeof(float)));
}

void prepare(const Product&, void*) {}

// The strip from output o on and the chunk from step `start` on, times tile t of x and the one after it, if BOTH.
template <class Form>
void add(const Product& p, const Cut& cut, char* copied, float* sums, int64_t o, int64_t start, int64_t t, bool both,
         bool fresh, const Asking& asking) {
  constexpr int PARTS = Form::PARTS;
  const char* x = (const char*)p.shared;
  int64_t end = least(start + cut.chunk, cut.steps), whole = Form::CODES ? start : start + asking.lines;
  if constexpr (Form::CODES) {
    if (cut.tiles <= STREAMED) {
      Widening<Form> w{p, asking.strip, asking, o, cut.steps, copied};
      return multiply<PARTS>(both, true, w, x, cut, cut.steps, sums);
    }
  }
  if (start < whole)
    multiply<1>(both, start == 0, Lying{asking.strip, &asking}, x + cut.place(t, start), cut, whole - start, sums);
  for (int64_t s = whole; s < end; s += LONG) {  // the rest of a row, the last rows, or codes for all tiles of x
    int64_t steps = least(LONG, end - s);
    if (fresh || cut.tiles <= STREAMED) copy<Form>(p, o, s, steps, copied);
    Strip copy{copied, copied + SIDE * LINE, LINE, PARTS * STRIP * LINE};
    multiply<PARTS>(both, s == 0, Lying{copy, nullptr}, x + cut.place(t, s), cut, steps, sums);
  }
}

template <class Form>
void columns(const Product& p, void* scratch, int64_t begin, int64_t end) {
  Cut cut(p);
  Tiles configured(cut.wide);
  char* copied = (char*)scratch;
  int64_t high = outputs(p), apart = places(p, cut) == 1 ? 0 : cut.sums();
  for (int64_t tile = 0; tile < cut.tiles; tile += HIGH) {
    int64_t last = least(tile + HIGH, cut.tiles), pairs = parts(last - tile, 2);
    for (int64_t start = 0; start < cut.steps; start += cut.chunk)
      for (int64_t o = begin; o < end; o += high) {
        Strip strip = strip_of<Form>(p, o), next = strip.moved(high * strip.line);
        int64_t lines = Form::CODES ? strip.line / LINE : least(cut.chunk, p.inner / STEP - start), skipped = start * LINE;
        if (o + high > p.outer) lines = 0;  // no whole strip
        Asking asking{strip.moved(skipped), next.moved(skipped), o + 2 * high <= p.outer, lines, 0, 0};
        if (pairs > 1) asking.rows = parts(STRIP, pairs);
        float* sums = (float*)(copied + COPIED<Form>) + (o - begin) / high * (HIGH / 2) * apart;
        for (int64_t t = tile; t < last; t += 2, sums += apart, asking.row += asking.rows) {
          bool both = t + 1 < last;
          add<Form>(p, cut, copied, sums, o, start, t, both, t == tile, asking);
          if (start + cut.chunk >= cut.steps) put<Form>(p, cut, sums, o, t, both);
        }
      }
  }
}

template <class Form, bool ROUNDED = false>
constexpr Kernel kernel(int64_t strip) {
  return {scratch<Form>, prepare, columns<Form>, shared, pack<ROUNDED>, strip, SIDE};
}

}  // namespace

const Kernel amx_bf16 = kernel<Numbers>(STRIP);
const Kernel amx_gated = kernel<Numbers>(SIDE);
const Kernel amx_int8 = kernel<Bytes8>(STRIP);
const Kernel amx_int4 = kernel<Nibbles>(STRIP);
const Kernel amx_rounded8 = kernel<Bytes8, true>(STRIP);
const Kernel amx_rounded4 = kernel<Nibbles, true>(STRIP);
#endif
