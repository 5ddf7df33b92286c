// vdpbf16ps: two products a lane and step, twice the rate of float32. It counts denormal numbers as zero, in and out,
// and rounds each addition to nearest. Compiled with -mavx512bf16 and the flags of avx512.cc.
#if defined(__x86_64__)
#include "avx512.h"

namespace {

struct Half : Lanes {
  using Elem = uint16_t;
  using X = __m512i;
  static constexpr int WIDTH = 32;
  static V step(V sum, X x, X w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
  static X load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static X load_part(const uint16_t* p, int n) { return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p); }
};

}  // namespace

const Kernel avx512bf16_bf16 = Linear<Same<Half>>::kernel();
#endif
