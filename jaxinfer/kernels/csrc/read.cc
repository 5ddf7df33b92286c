// Every byte of some memory once, by one thread and the widest loads there are: no program reads it faster.
#include "machine.h"

namespace {

uint64_t sum(const uint64_t* from, int64_t num) {
  uint64_t all = 0;
  for (int64_t i = 0; i < num; i++) all += from[i];
  return all;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t sum_avx512(const uint64_t* from, int64_t num) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  int64_t whole = num / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) {
    a = _mm512_add_epi64(a, _mm512_loadu_si512(from + i));
    b = _mm512_add_epi64(b, _mm512_loadu_si512(from + i + 8));
    c = _mm512_add_epi64(c, _mm512_loadu_si512(from + i + 16));
    d = _mm512_add_epi64(d, _mm512_loadu_si512(from + i + 24));
  }
  uint64_t lanes[8];
  _mm512_storeu_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
  return sum(lanes, 8) + sum(from + whole, num - whole);
}

__attribute__((target("avx2"))) uint64_t sum_avx2(const uint64_t* from, int64_t num) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  int64_t whole = num / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const __m256i* at = (const __m256i*)(from + i);
    a = _mm256_add_epi64(a, _mm256_loadu_si256(at));
    b = _mm256_add_epi64(b, _mm256_loadu_si256(at + 1));
    c = _mm256_add_epi64(c, _mm256_loadu_si256(at + 2));
    d = _mm256_add_epi64(d, _mm256_loadu_si256(at + 3));
  }
  uint64_t lanes[4];
  _mm256_storeu_si256((__m256i*)lanes, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
  return sum(lanes, 4) + sum(from + whole, num - whole);
}
#endif

}  // namespace

// The sum of `num` words, which says that they were read.
extern "C" __attribute__((visibility("default"))) uint64_t jaxinfer_read(const uint64_t* from, int64_t num,
                                                                         int32_t isa) {
#if defined(__x86_64__)
  if (isa < 0) isa = best_isa();
  if (isa >= AVX512) return sum_avx512(from, num);
  if (isa == AVX2) return sum_avx2(from, num);
#endif
  return sum(from, num);
}
