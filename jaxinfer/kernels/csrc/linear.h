// y [M, O] = x [M, I] times w [O, I] transposed, summed in float32: what the instruction sets share.
//
// One order of summation, whatever M is and whoever works it out: the inner axis is cut into chunks of a fixed number
// of vectors. In a chunk each lane of an accumulator sums its own elements in order, then the lanes are summed by a
// fixed tree, and a chunk's sum is added to those of the chunks before it. No sum is ever shared between threads.
#pragma once

#include <cstddef>
#include <cstdint>

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, RELU = 2 };

struct Product {
  const void* x;  // [rows, inner]
  const void* w;  // [outer, inner]; of four bits [outer, inner / 2], see UNIT
  float* y;       // [rows, outer]
  int64_t rows, inner, outer;
  const void* scale = nullptr;  // of int8 [outer] float32; of four bits [outer, inner / group] float16
  int64_t group = 0, groups = 0;  // a multiple of UNIT; and how many a row has
  const void* shared = nullptr;  // x as the kernel packed it
  const void* other = nullptr;   // a second weight: the first is a gate, and what they make is [rows, outer] bfloat16
  uint16_t* half = nullptr;
  Activation activation = SILU;
};

constexpr int COLUMNS = 4;              // rows of w that are multiplied together
constexpr int64_t MOST_COLUMNS = 512;  // of which a thread takes a block

// How one instruction set multiplies one dtype. Every thread prepares a scratch of its own (64-byte aligned), then
// computes the columns [begin, end) of y, begin being a multiple of `strip`. Where there is a `pack`, x was packed
// before, once for all threads, in parts of up to `rows` rows, all parts alike.
struct Kernel {
  size_t (*scratch)(const Product&);  // bytes
  void (*prepare)(const Product&, void* scratch);
  void (*columns)(const Product&, void* scratch, int64_t begin, int64_t end);
  size_t (*shared)(const Product&) = nullptr;  // bytes
  void (*pack)(const Product&, void* shared, int64_t part) = nullptr;
  int64_t strip = COLUMNS, rows = 0;
};

constexpr int BLOCK = 32;   // numbers of x that share a scale, where x is rounded to codes too
constexpr float LEAST = 1.17549435e-38f;  // a smaller scale is none: the block is zeros
constexpr int UNIT = 32;    // codes of four bits lie together: the first half in the low bits of 16 bytes

extern const Kernel portable_f32, portable_bf16, portable_int8, portable_int4;
#if defined(__x86_64__)
extern const Kernel avx2_f32, avx2_bf16, avx2_int8, avx2_int4, avx2_rounded8, avx2_rounded4;
extern const Kernel avx512_f32, avx512_bf16, avx512_int8, avx512_int4;
extern const Kernel avx512bf16_bf16;
extern const Kernel avx512vnni_int8, avx512vnni_int4;
extern const Kernel amx_bf16, amx_gated, amx_int8, amx_int4, amx_rounded8, amx_rounded4, amx_bytes;
#endif
