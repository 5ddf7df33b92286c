// Codes times codes: x is rounded to eight bits, BLOCK neighbours to a scale, and vpdpbusd sums 64 products exactly, in
// integers. It takes one side without sign: w, to which an offset is added that x's own sums take away again. Compiled
// with -mavx512vnni and the flags of avx512.cc.
#if defined(__x86_64__)
#include "avx512.h"

namespace {

struct Base : Lanes {
  using Elem = float;
  static constexpr int ROWS = 4;
  // BLOCK numbers, low and high, as codes; their scale. See `rounded` of linear.cc.
  static float round(__m512 low, __m512 high, __m256i* codes) {
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    bool odd = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
    float scale = odd ? __builtin_nanf("") : most / 127;
    __m512 inverse = _mm512_set1_ps(scale >= LEAST ? 1 / scale : 0);
    __m128i a = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
    __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
    *codes = _mm256_set_m128i(b, a);
    return scale >= LEAST || odd ? scale : 0;
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

}  // namespace

const Kernel avx512vnni_int8 = Linear<Int8<Eight>>::kernel();
const Kernel avx512vnni_int4 = Linear<Int4<Four>>::kernel();
#endif
