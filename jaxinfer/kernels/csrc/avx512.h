// What the AVX-512 files share: sixteen lanes and their sum.
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace {

inline __m512 widened(__m256i halves) {  // numbers of bfloat16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Of the codes that BLOCK numbers are rounded to, as `rounded` of linear.cc says; 0 where it is none.
inline float scale_of(__m512 low, __m512 high) {
  if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q)) return __builtin_nanf("");
  float scale = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high))) / 127;
  return scale >= LEAST ? scale : 0;
}

struct Lanes {
  using V = __m512;
  static constexpr int ROWS = 6;
  static void halves(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      __mmask16 mask = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
      _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
    }
  }
  static V zero() { return _mm512_setzero_ps(); }
  static V all(float x) { return _mm512_set1_ps(x); }
  static V pair(V a, V b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static F4 sum4(V a, V b, V c, V d) {
    __m512d ab = _mm512_castps_pd(pair(a, b)), cd = _mm512_castps_pd(pair(c, d));
    V low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    __m512d all = _mm512_castps_pd(_mm512_add_ps(low, high));
    __m256 half = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(all)),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(all, 1)));
    return (F4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

struct Sixteen : Lanes {  // numbers of float32
  using X = __m512;
  static constexpr int WIDTH = 16;
  static V step(V sum, X x, X w) { return _mm512_fmadd_ps(x, w, sum); }
};

struct Floating : Sixteen {
  using Elem = float;
};

}  // namespace
