// y [M, O] = x [M, I] times w [O, I] transposed, summed in float32: what the instruction sets share.
//
// One order of summation, whatever M is and whoever works it out: the inner axis is cut into chunks of a fixed number
// of vectors. In a chunk each lane of an accumulator sums its own elements in order, then the lanes are summed by a
// fixed tree, and a chunk's sum is added to those of the chunks before it. No sum is ever shared between threads.
#pragma once

#include <cstddef>
#include <cstdint>

struct Product {
  const void* x;  // [rows, inner]
  const void* w;  // [outer, inner]
  float* y;       // [rows, outer]
  int64_t rows, inner, outer;
};

// How one instruction set multiplies one dtype. Every thread prepares a scratch of its own (64-byte aligned), then
// computes the columns [begin, end) of y, begin being a multiple of COLUMNS.
struct Kernel {
  size_t (*scratch)(const Product&);  // bytes
  void (*prepare)(const Product&, void* scratch);
  void (*columns)(const Product&, void* scratch, int64_t begin, int64_t end);
};

constexpr int COLUMNS = 4;  // rows of w that are multiplied together

extern const Kernel portable_f32, portable_bf16;
#if defined(__x86_64__)
extern const Kernel avx2_f32, avx2_bf16;
extern const Kernel avx512_f32, avx512_bf16;
extern const Kernel avx512bf16_bf16;
#endif
