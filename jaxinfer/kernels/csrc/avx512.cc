// Sixteen lanes; bfloat16 is widened to float32. Compiled with -mavx512f -mavx512bw -mavx512vl -mfma.
#if defined(__x86_64__)
#include "avx512.h"

namespace {

struct Base : Lanes {
  using X = __m512;
  static constexpr int WIDTH = 16;
  static V step(V sum, X x, X w) { return _mm512_fmadd_ps(x, w, sum); }
};

struct Float : Base {
  using Elem = float;
  static X load(const float* p) { return _mm512_loadu_ps(p); }
  static X load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
};

struct Half : Base {
  using Elem = uint16_t;
  static X widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static X load(const uint16_t* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
  static X load_part(const uint16_t* p, int n) {
    return widened(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
};

}  // namespace

const Kernel avx512_f32 = Linear<Float>::kernel();
const Kernel avx512_bf16 = Linear<Half>::kernel();
#endif
