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

}  // namespace

const Kernel avx2_f32 = Linear<Same<Float>>::kernel();
const Kernel avx2_bf16 = Linear<Same<Half>>::kernel();
const Kernel avx2_int8 = Linear<Int8<Coded>>::kernel();
const Kernel avx2_int4 = Linear<Int4<Coded>>::kernel();
const Attender avx2_attend_f32 = Attend<Float>::attender();
const Attender avx2_attend_bf16 = Attend<Half>::attender();
const Attender avx2_attend_int8 = Attend<Bytes<Coded>>::attender();
#endif
