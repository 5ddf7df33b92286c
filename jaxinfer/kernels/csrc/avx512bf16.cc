// vdpbf16ps: two products a lane and step, twice the rate of float32. It counts denormal numbers as zero, in and out,
// and rounds each addition to nearest. Compiled with -mavx512bf16 and the flags of avx512.cc.
#if defined(__x86_64__)
#include "attend.h"
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

// Attention where queries are numbers of bfloat16: a step takes two of their products, or the values of two slots, whose
// weights are rounded. The words of two rows are interleaved within 16 bytes, so sums lie in another order.
struct Pairs {
  using Query = uint16_t;
  using Elem = uint16_t;
  static constexpr int64_t WIDTH = 32;
  static constexpr int MANY = 4;

  static int64_t width(int64_t H) { return parts(H, WIDTH) * WIDTH; }
  static int64_t place(int64_t i) { return i / WIDTH * WIDTH + i % 8 / 4 * 16 + i % WIDTH / 8 * 4 + i % 4; }
  static float ready(const float* from, int64_t H, uint16_t* to) {
    for (int64_t i = 0; i < width(H); i++) {
      uint32_t bits = 0;
      if (i < H) __builtin_memcpy(&bits, from + i, sizeof bits);
      to[i] = uint16_t(bits >> 16);
    }
    return 1;
  }

  static __m512i row(const uint16_t* p, int64_t i, int64_t H) {
    return i + WIDTH <= H ? Half::load(p + i) : Half::load_part(p + i, int(H - i));
  }

  template <int R>
  static void scores(const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* next, int64_t n,
                     int64_t H, float* to) {
    for (int64_t s = 0; s < n; s += 4) {
      const uint16_t* from[4];
      EACH(c, 4) from[c] = k + least(s + c, n - 1) * H;
      for (int64_t i = s * H; next && i < (s + 4) * H; i += WIDTH) {
        __builtin_prefetch(v + i, 0, SECOND_CACHE);
        __builtin_prefetch(next + i, 0, SECOND_CACHE);
      }
      __m512 sum[R][4];
      __m512i part[4];
      EACH(r, R) EACH(c, 4) sum[r][c] = Half::zero();
      for (int64_t i = 0; i < H; i += WIDTH) {
        EACH(c, 4) part[c] = row(from[c], i, H);
        EACH(r, R) {
          __m512i x = Half::load(q + r * width(H) + i);
          EACH(c, 4) sum[r][c] = Half::step(sum[r][c], x, part[c]);
        }
      }
      EACH(r, R) *(F4*)(to + r * SLOTS + s) = Half::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
  }

  template <int R>
  static void values(const float* weights, const uint16_t* v, const Block& block, int64_t H, float* sums) {
    int32_t pair[R][SLOTS / 2];
    EACH(r, R) for (int64_t s = 0; s < SLOTS; s += 16) {
      __m256bh both = _mm512_cvtneps_pbh(_mm512_loadu_ps(weights + r * SLOTS + s));
      __builtin_memcpy(pair[r] + s / 2, &both, sizeof both);
    }
    for (int64_t i = 0; i < H; i += WIDTH) {
      __m512 low[R], high[R];
      EACH(r, R) low[r] = _mm512_loadu_ps(sums + r * width(H) + i);
      EACH(r, R) high[r] = _mm512_loadu_ps(sums + r * width(H) + i + 16);
      for (int j = 0; j < block.count; j++) {
        const Piece& own = block.piece[j];
        const uint16_t* from = v + own.place * H;
        for (int64_t s = 0; s < own.n; s += 2) {
          __m512i a = row(from + s * H, i, H), b = row(from + least(s + 1, own.n - 1) * H, i, H);
          __m512i one = _mm512_unpacklo_epi16(a, b), other = _mm512_unpackhi_epi16(a, b);
          EACH(r, R) {
            __m512i weight = _mm512_set1_epi32(pair[r][(own.start + s) / 2]);
            low[r] = Half::step(low[r], weight, one);
            high[r] = Half::step(high[r], weight, other);
          }
        }
      }
      EACH(r, R) _mm512_storeu_ps(sums + r * width(H) + i, low[r]);
      EACH(r, R) _mm512_storeu_ps(sums + r * width(H) + i + 16, high[r]);
    }
  }
};

}  // namespace

const Attender avx512bf16_attend = Attend<Sixteen, Pairs>::attender();
const Kernel avx512bf16_bf16 = Linear<Same<Half>>::kernel();
#endif
