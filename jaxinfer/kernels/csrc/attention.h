// Attention of a few queries a row to the keys and values of a cache: what the instruction sets share.
//
// It reads the slots that some query sees, and no others. One order of summation: slots are taken in spans of SPAN, and
// these in blocks of SLOTS, both counted from slot 0; what a span comes to is added to those before it. A slot that a
// query does not see changes none of its bits. So they are the same for any number of rows, queries and threads.
#pragma once

#include <cstddef>
#include <cstdint>

struct Attention {
  const void* q;            // [B, T, N, H] float32, or bfloat16 where `half`
  const void* k;            // [B, K, S, H], or a pool [D, P, K, Z, H]
  const void* v;            // likewise
  const float* k_scale;     // [B, K, S] of int8, or [D, P, K, Z]; or null
  const float* v_scale;     // likewise
  const int32_t* position;  // [B, T]; past any slot for a query that sees nothing
  const int32_t* slot;      // [B, S], which slot of the text each is; null where that is its index
  const int32_t* table;     // [B, M], the page of each Z slots of a row, P or more for none; null where there is no pool
  void* out;                // [B, T, N, H], as q
  int64_t B, T, N, K, S, H;
  int64_t D, P, Z, M;     // of a pool: the rows of a D-th have pages in that part of it
  float scale, cap;       // of the scores; cap 0: none
  int64_t window, sinks;  // window 0: none
  bool half;

  int64_t queries() const { return N / K * T; }

  // Where a slot of row b and kv head h lies, in slots; and how many from it on lie side by side.
  int64_t place(int64_t b, int64_t h, int64_t s) const {
    if (!table) return (b * K + h) * S + s;
    int64_t page = table[b * M + s / Z], last = P - 1;
    return ((b / (B / D) * P + (page < last ? page : last)) * K + h) * Z + s % Z;
  }
  int64_t together(int64_t s) const { return table ? Z - s % Z : S - s; }
};

constexpr int64_t SLOTS = 32;   // whose scores are made together
constexpr int64_t FOUR = 4;     // of which a page has a multiple
constexpr int64_t SPAN = 1024;  // slots of which a thread makes one sum
constexpr int32_t PAST = 1 << 30;

struct Span {
  int64_t b, h, begin, end;  // a row, a kv head, and slots
};

// Knows which span the thread that asks will most likely take next; false: none.
struct Foresight {
  virtual bool next(Span* span) const = 0;
};

// One instruction set and dtype. `span` gives for each query the largest score, the sum of weights and H weighted sums,
// [queries, H + 2] floats; its scratch is 64-byte aligned.
struct Attender {
  size_t (*scratch)(const Attention&);  // bytes
  void (*span)(const Attention&, const Span&, const Foresight&, float* sums, void* scratch);
  void (*merge)(const Attention&, int64_t b, int64_t h, int64_t spans, float* sums);  // of all its spans
};

// Many queries of a row: a block of them, all of row b and kv head h, from their first slot to their last.
struct Crowd {
  int64_t (*blocks)(const Attention&);  // of a row and kv head
  size_t (*scratch)(const Attention&);  // bytes
  void (*block)(const Attention&, int64_t b, int64_t h, int64_t index, void* scratch);
};

constexpr int64_t FEW = 16;  // tokens of a row, whose queries are no crowd

extern const Attender portable_attend_f32, portable_attend_bf16, portable_attend_int8;
#if defined(__x86_64__)
extern const Attender avx2_attend_f32, avx2_attend_bf16, avx2_attend_int8;
extern const Attender avx512_attend_f32, avx512_attend_bf16, avx512_attend_int8;
extern const Crowd amx_crowd;
extern const Attender amx_attend_bf16, amx_attend_int8;
extern const Attender avx512bf16_attend, avx512vnni_attend;  // of queries that are numbers of bfloat16: bfloat16, int8
#endif
