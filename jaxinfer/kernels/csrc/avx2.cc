// Eight lanes, with FMA. Compiled with -mavx2 -mfma.
#if defined(__x86_64__)
#include <immintrin.h>

#include "attend.h"

namespace {

struct Base {
  using X = __m256;
  using V = __m256;
  static constexpr int WIDTH = 8, ROWS = 3;
  static V zero() { return _mm256_setzero_ps(); }
  static V all(float x) { return _mm256_set1_ps(x); }
  static V step(V sum, X x, X w) { return _mm256_fmadd_ps(x, w, sum); }
  static V pair(V a, V b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
  static F4 sum4(V a, V b, V c, V d) {
    __m256d ab = _mm256_castps_pd(pair(a, b)), cd = _mm256_castps_pd(pair(c, d));
    V low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    V all = _mm256_add_ps(low, high);
    return (F4)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  }
};

struct Float : Base {
  using Elem = float;
  static X load(const float* p) { return _mm256_loadu_ps(p); }
  static X load_part(const float* p, int n) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
};

struct Coded : Float {
  using Ready = X;
  static X codes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static X nibbles(const uint8_t* p, int shift) {
    __m256i code = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_set1_epi32(shift));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(code, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
  }
  static X scaled(X x, float scale) { return _mm256_mul_ps(x, _mm256_set1_ps(scale)); }
  static void halves(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from_half(from[i]);
  }
};

struct Half : Base {
  using Elem = uint16_t;
  static X widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static X load(const uint16_t* p) { return widened(_mm_loadu_si128((const __m128i*)p)); }
  static X load_part(const uint16_t* p, int n) {
    alignas(16) uint16_t part[8] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return widened(_mm_load_si128((const __m128i*)part));
  }
};

// Codes times codes: x is rounded to eight bits, BLOCK neighbours to a scale, and their products are summed exactly, in
// integers: pairs of them in 16 bits, which hold the sum of two where one side has no sign.
struct Rounded : Float {
  static constexpr int ROWS = 2;
  static __m256 size(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  // n numbers, 32 at most, as codes; gives their scale. See `rounded` of linear.cc.
  static float round(const float* p, int n, __m256i* codes) {
    __m256 x[4], most = zero(), odd = zero();
    EACH(i, 4) {
      x[i] = n >= 8 * i + 8 ? load(p + 8 * i) : n > 8 * i ? load_part(p + 8 * i, n - 8 * i) : zero();
      odd = _mm256_or_ps(odd, _mm256_cmp_ps(x[i], x[i], _CMP_UNORD_Q));
      most = _mm256_max_ps(most, size(x[i]));
    }
    F4 four = (F4)_mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    float largest = four[0];
    for (int i = 1; i < 4; i++) largest = four[i] > largest ? four[i] : largest;
    bool none = _mm256_movemask_ps(odd);
    float scale = none ? __builtin_nanf("") : largest / 127;
    __m256 inverse = all(scale >= LEAST ? 1 / scale : 0);
    __m256i code[4];
    EACH(i, 4) code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
    *codes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return scale >= LEAST || none ? scale : 0;
  }
  static __m256i quads(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
};

struct Eight : Rounded {
  static constexpr int WIDTH = BLOCK;
  struct X {
    __m256i codes;
    float scale;
  };
  static X load_part(const float* p, int n) {
    X x;
    x.scale = round(p, n, &x.codes);
    return x;
  }
  static X load(const float* p) { return load_part(p, WIDTH); }
  static __m256i codes(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static V step(V sum, const X& x, __m256i w) {
    __m256i total = quads(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x.codes, w)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), all(x.scale), sum);
  }
};

struct Four : Rounded {  // two units at once: a sum of eight products is of one unit, four from each of its halves
  static constexpr int WIDTH = 2 * BLOCK;
  struct X {
    __m256i low, high;  // the first and the second half of each unit
    __m256i less;       // what w's offset of 8 adds to each sum of eight, negated
    __m256 scale;
  };
  struct Ready {
    __m256i low, high;
    __m256 scale;
  };
  static __m256 each_unit(float first, float second) { return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first)); }
  static X load_part(const float* p, int n) {
    __m256i a, b;
    float first = round(p, n, &a), second = round(p + BLOCK, n - BLOCK, &b);
    __m256i low = _mm256_permute2x128_si256(a, b, 0x20), high = _mm256_permute2x128_si256(a, b, 0x31);
    __m256i eight = _mm256_set1_epi8(8);
    __m256i more = quads(_mm256_add_epi16(_mm256_maddubs_epi16(eight, low), _mm256_maddubs_epi16(eight, high)));
    return {low, high, _mm256_sub_epi32(_mm256_setzero_si256(), more), each_unit(first, second)};
  }
  static X load(const float* p) { return load_part(p, WIDTH); }
  static Ready units(const uint8_t* p, const float* scale, int n) {
    __m256i bytes = n == 2 ? _mm256_loadu_si256((const __m256i*)p)
                           : _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128((const __m128i*)p), 0);
    const __m256i ones = _mm256_set1_epi8(15);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), ones);
    return {_mm256_and_si256(bytes, ones), high, each_unit(scale[0], n == 2 ? scale[1] : 0)};
  }
  static V step(V sum, const X& x, const Ready& w) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, x.low), _mm256_maddubs_epi16(w.high, x.high));
    __m256i total = _mm256_add_epi32(quads(pairs), x.less);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(x.scale, w.scale), sum);
  }
  static void halves(const uint16_t* from, float* to, int64_t n) { Coded::halves(from, to, n); }
};

}  // namespace

const Kernel avx2_rounded8 = Linear<Int8<Eight>>::kernel();
const Kernel avx2_rounded4 = Linear<Int4<Four>>::kernel();
const Kernel avx2_f32 = Linear<Same<Float>>::kernel();
const Kernel avx2_bf16 = Linear<Same<Half>>::kernel();
const Kernel avx2_int8 = Linear<Int8<Coded>>::kernel();
const Kernel avx2_int4 = Linear<Int4<Coded>>::kernel();
const Attender avx2_attend_f32 = Attend<Float>::attender();
const Attender avx2_attend_bf16 = Attend<Half>::attender();
const Attender avx2_attend_int8 = Attend<Bytes<Coded>>::attender();
#endif
