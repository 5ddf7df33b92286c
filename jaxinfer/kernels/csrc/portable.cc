// Four lanes of plain C++ (GCC's vector types, which clang shares): SSE2 on x86, NEON on Arm, anything elsewhere.
#include "attend.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

struct Base {
  using X = F4;
  using V = F4;
  static constexpr int WIDTH = 4;
#if defined(__aarch64__)
  static constexpr int ROWS = 6;
  static V step(V sum, X x, X w) { return (F4)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)w); }
#else
  static constexpr int ROWS = 3;
  static V step(V sum, X x, X w) { return sum + x * w; }
#endif
  static V zero() { return V{0, 0, 0, 0}; }
  static V all(float x) { return V{x, x, x, x}; }
  static F4 sum4(V a, V b, V c, V d) {
    return F4{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
              (d[0] + d[2]) + (d[1] + d[3])};
  }
};

struct Float : Base {
  using Elem = float;
  static X load(const float* p) { return *(const F4*)p; }
  static X load_part(const float* p, int n) {
    X v = zero();
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
  }
};

struct Coded : Float {
  using Ready = X;
  static X codes(const int8_t* p) { return X{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  static X nibbles(const uint8_t* p, int shift) {
    auto one = [shift](uint8_t byte) { return float(int(byte >> shift & 15) - 8); };
    return X{one(p[0]), one(p[1]), one(p[2]), one(p[3])};
  }
  static X scaled(X x, float scale) { return x * X{scale, scale, scale, scale}; }
  static void halves(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from_half(from[i]);
  }
};

struct Half : Base {
  using Elem = uint16_t;
  static X load(const uint16_t* p) { return X{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
  static X load_part(const uint16_t* p, int n) {
    X v = zero();
    for (int i = 0; i < n; i++) v[i] = widen(p[i]);
    return v;
  }
};

}  // namespace

const Kernel portable_f32 = Linear<Same<Float>>::kernel();
const Kernel portable_bf16 = Linear<Same<Half>>::kernel();
const Kernel portable_int8 = Linear<Int8<Coded>>::kernel();
const Kernel portable_int4 = Linear<Int4<Coded>>::kernel();
const Attender portable_attend_f32 = Attend<Float>::attender();
const Attender portable_attend_bf16 = Attend<Half>::attender();
const Attender portable_attend_int8 = Attend<Bytes<Coded>>::attender();
