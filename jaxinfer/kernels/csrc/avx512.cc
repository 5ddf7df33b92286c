// Sixteen lanes; bfloat16 is widened to float32. Compiled with -mavx512f -mavx512bw -mavx512vl -mfma.
#if defined(__x86_64__)
#include "attend.h"
#include "avx512.h"

namespace {

struct Float : Sixteen {
  using Elem = float;
  static X load(const float* p) { return _mm512_loadu_ps(p); }
  static X load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
};

struct Coded : Float {
  static X codes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
};

struct Pair {
  __m512 low, high;
};

struct Unit : Lanes {
  using Elem = float;
  using X = Pair;
  using Ready = X;
  static constexpr int WIDTH = UNIT, ROWS = 4;
  static V step(V sum, const X& x, const X& w) {
    return _mm512_fmadd_ps(x.high, w.high, _mm512_fmadd_ps(x.low, w.low, sum));
  }
  static X load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static X load_part(const float* p, int) { return load(p); }
  static X units(const uint8_t* p, const float* scale, int) {  // a permutation looks at four bits of an index
    __m512 value = _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7),
                                 _mm512_set1_ps(*scale));
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm512_permutexvar_ps(codes, value), _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), value)};
  }
};

struct Half : Sixteen {
  using Elem = uint16_t;
  static X load(const uint16_t* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
  static X load_part(const uint16_t* p, int n) {
    return widened(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
};

}  // namespace

const Kernel avx512_f32 = Linear<Same<Float>>::kernel();
const Kernel avx512_bf16 = Linear<Same<Half>>::kernel();
const Kernel avx512_int8 = Linear<Int8<Coded>>::kernel();
const Kernel avx512_int4 = Linear<Int4<Unit>>::kernel();
const Attender avx512_attend_f32 = Attend<Float>::attender();
const Attender avx512_attend_bf16 = Attend<Half>::attender();
const Attender avx512_attend_int8 = Attend<Bytes<Coded>>::attender();
#endif
