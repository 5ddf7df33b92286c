// Codes times codes: x is rounded to eight bits, BLOCK neighbours to a scale, and vpdpbusd sums 64 products exactly, in
// integers. It takes one side without sign: w, to which an offset is added that x's own sums take away again. Compiled
// with -mavx512vnni and the flags of avx512.cc.
#if defined(__x86_64__)
#include "attend.h"
#include "avx512.h"

namespace {

struct Base : Lanes {
  using Elem = float;
  static constexpr int ROWS = 4;
  // BLOCK numbers, low and high, as codes; their scale. See `rounded` of linear.cc.
  static float round(__m512 low, __m512 high, __m256i* codes) {
    float scale = scale_of(low, high);
    __m512 inverse = _mm512_set1_ps(scale >= LEAST ? 1 / scale : 0);
    __m128i a = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
    __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
    *codes = _mm256_set_m128i(b, a);
    return scale;
  }
  static __m512i both(const float* p, int n, float scale[2]) {
    __m256i codes[2];
    for (int i = 0; i < 2; i++) {
      int rest = n - i * BLOCK;
      __mmask16 low = __mmask16(rest >= 16 ? 0xffff : rest > 0 ? (1u << rest) - 1 : 0);
      __mmask16 high = __mmask16(rest >= 32 ? 0xffff : rest > 16 ? (1u << (rest - 16)) - 1 : 0);
      const float* from = p + i * BLOCK;
      scale[i] = round(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16), codes + i);
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(codes[0]), codes[1], 1);
  }
  static __m512i less(__m512i codes, char offset) {
    __m512i zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(offset), codes));
  }
};

struct Eight : Base {
  static constexpr int WIDTH = 2 * BLOCK;
  struct X {
    __m512i codes;
    __m512i less;  // what w's offset adds to each sum of four, negated
    __m512 scale;  // of each sum of four
  };
  static X load_part(const float* p, int n) {
    float scale[2];
    __m512i codes = both(p, n, scale);
    __m512 each = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scale[0]), _mm512_set1_ps(scale[1]));
    return {codes, less(codes, char(128)), each};
  }
  static X load(const float* p) { return load_part(p, WIDTH); }
  static __m512i codes(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(128))); }
  static V step(V sum, const X& x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.less, w, x.codes)), x.scale, sum);
  }
};

struct Four : Base {  // four units at once: a sum of eight products is of one unit, four from each of its halves
  static constexpr int WIDTH = 4 * BLOCK;
  struct X {
    __m512i low, high;  // the first and the second half of each unit
    __m512i less;       // as for eight bits, of each sum of eight
    __m512 scale;
  };
  struct Ready {
    __m512i low, high;
    __m512 scale;
  };
  static __m512 each_unit(const float* scale) {  // of four units, for the four sums of each
    const __m512i unit = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(unit, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
  }
  static X load_part(const float* p, int n) {
    float scale[4];
    __m512i a = both(p, n, scale), b = both(p + 2 * BLOCK, n - 2 * BLOCK, scale + 2);
    __m512i low = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0));
    __m512i high = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1));
    return {low, high, _mm512_add_epi32(less(low, 8), less(high, 8)), each_unit(scale)};
  }
  static X load(const float* p) { return load_part(p, WIDTH); }
  static Ready units(const uint8_t* p, const float* scale, int n) {
    __m512i bytes = n == 4 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(__mmask16((1u << 4 * n) - 1), p);
    const __m512i ones = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, ones), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), ones), each_unit(scale)};
  }
  static V step(V sum, const X& x, const Ready& w) {
    __m512i total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x.less, w.low, x.low), w.high, x.high);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(x.scale, w.scale), sum);
  }
};

// Attention where queries are numbers of bfloat16: they, and the weights of a block, become integers of 16 bits times a
// scale, which is finer than bfloat16 is, and vpdpwssd sums their products with codes exactly, two a lane and step. The
// codes of two slots are interleaved within 16 bytes, so sums lie in another order.
struct Words {
  using Query = int16_t;
  using Elem = int8_t;
  static constexpr int64_t WIDTH = 32, LINE = 64;
  static constexpr int MANY = 4;
  static constexpr float MOST = 32767;

  static int64_t width(int64_t H) { return parts(H, WIDTH) * WIDTH; }
  static int64_t place(int64_t i) { return i / WIDTH * WIDTH + i % 16 / 8 * 16 + i % WIDTH / 16 * 8 + i % 8; }

  // n numbers as integers, filled up with zeros to `width`; gives their scale, NaN where one of them is none.
  static float round(const float* from, int64_t n, int64_t width, int16_t* to) {
    auto part = [&](int64_t i) {
      int64_t rest = least(16, n - i);
      return _mm512_maskz_loadu_ps(rest > 0 ? __mmask16((1u << rest) - 1) : __mmask16(0), from + i);
    };
    __m512 most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int64_t i = 0; i < width; i += 16) {
      __m512 x = part(i);
      odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    float scale = odd ? __builtin_nanf("") : _mm512_reduce_max_ps(most) / MOST;
    __m512 inverse = _mm512_set1_ps(scale >= LEAST ? 1 / scale : 0);
    for (int64_t i = 0; i < width; i += 16) {
      __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(part(i), inverse));
      _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtsepi32_epi16(x));
    }
    return scale >= LEAST || odd ? scale : 0;
  }
  static float ready(const float* from, int64_t H, int16_t* to) { return round(from, H, width(H), to); }

  static __m256i row(const int8_t* p, int64_t i, int64_t H) {
    if (i + WIDTH <= H) return _mm256_loadu_si256((const __m256i*)(p + i));
    return _mm256_maskz_loadu_epi8(__mmask32((1ull << (H - i)) - 1), p + i);
  }

  template <int R>
  static void scores(const int16_t* q, const int8_t* k, const int8_t* v, const int8_t* next, int64_t n, int64_t H,
                     float* to) {
    for (int64_t s = 0; s < n; s += 4) {
      const int8_t* from[4];
      EACH(c, 4) from[c] = k + least(s + c, n - 1) * H;
      for (int64_t i = s * H; next && i < (s + 4) * H; i += LINE) {
        __builtin_prefetch(v + i, 0, SECOND_CACHE);
        __builtin_prefetch(next + i, 0, SECOND_CACHE);
      }
      __m512i sum[R][4], part[4];
      EACH(r, R) EACH(c, 4) sum[r][c] = _mm512_setzero_si512();
      for (int64_t i = 0; i < H; i += WIDTH) {
        EACH(c, 4) part[c] = _mm512_cvtepi8_epi16(row(from[c], i, H));
        EACH(r, R) {
          __m512i x = _mm512_loadu_si512(q + r * width(H) + i);
          EACH(c, 4) sum[r][c] = _mm512_dpwssd_epi32(sum[r][c], x, part[c]);
        }
      }
      EACH(r, R) {
        __m512 whole[4];
        EACH(c, 4) whole[c] = _mm512_cvtepi32_ps(sum[r][c]);
        *(F4*)(to + r * SLOTS + s) = Lanes::sum4(whole[0], whole[1], whole[2], whole[3]);
      }
    }
  }

  template <int R>
  static void values(const float* weights, const int8_t* v, const Block& block, int64_t H, float* sums) {
    int16_t codes[R][SLOTS];
    int32_t pair[R][SLOTS / 2];
    __m512 scale[R];
    EACH(r, R) scale[r] = _mm512_set1_ps(round(weights + r * SLOTS, SLOTS, SLOTS, codes[r]));
    __builtin_memcpy(pair, codes, sizeof pair);
    for (int64_t i = 0; i < H; i += WIDTH) {
      __m512i low[R], high[R];
      EACH(r, R) low[r] = high[r] = _mm512_setzero_si512();
      for (int j = 0; j < block.count; j++) {
        const Piece& own = block.piece[j];
        const int8_t* from = v + own.place * H;
        for (int64_t s = 0; s < own.n; s += 2) {
          __m256i a = row(from + s * H, i, H), b = row(from + least(s + 1, own.n - 1) * H, i, H);
          __m512i one = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b));
          __m512i other = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b));
          EACH(r, R) {
            __m512i weight = _mm512_set1_epi32(pair[r][(own.start + s) / 2]);
            low[r] = _mm512_dpwssd_epi32(low[r], weight, one);
            high[r] = _mm512_dpwssd_epi32(high[r], weight, other);
          }
        }
      }
      EACH(r, R) add(low[r], scale[r], sums + r * width(H) + i);
      EACH(r, R) add(high[r], scale[r], sums + r * width(H) + i + 16);
    }
  }

  static void add(__m512i x, __m512 scale, float* to) {
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), scale, _mm512_loadu_ps(to)));
  }
};

}  // namespace

const Attender avx512vnni_attend = Attend<Sixteen, Words>::attender();
const Kernel avx512vnni_int8 = Linear<Int8<Eight>>::kernel();
const Kernel avx512vnni_int4 = Linear<Int4<Four>>::kernel();
#endif
