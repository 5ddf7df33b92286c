// The XLA FFI handlers of caches: attention to what one holds, and writing into it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "machine.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t RUNS = 2;  // a thread takes spans that lie side by side: one part in so many of an even share of those left
constexpr int64_t SMALL_BYTES = 128 * 1024;  // of keys and values, that are read before a second thread wakes up

enum Form : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

const Attender& choose(int32_t isa, Form form, bool half) {  // half: whether queries are numbers of bfloat16
#if WITH_AMX
  if (isa == AMX && form == BF16 && half) return amx_attend_bf16;
  if (isa == AMX && form == INT8 && half) return amx_attend_int8;
#endif
#if WITH_AVX512
  if (isa == AVX512BF16 && form == BF16 && half) return avx512bf16_attend;
  if ((isa == AVX512BF16 || isa == best_isa()) && form == INT8 && half && has_vnni()) return avx512vnni_attend;
  static const Attender* const avx512[] = {&avx512_attend_f32, &avx512_attend_bf16, &avx512_attend_int8};
  if (isa >= AVX512) return *avx512[form];
#endif
#if defined(__x86_64__)
  static const Attender* const avx2[] = {&avx2_attend_f32, &avx2_attend_bf16, &avx2_attend_int8};
  if (isa == AVX2) return *avx2[form];
#endif
  static const Attender* const portable[] = {&portable_attend_f32, &portable_attend_bf16, &portable_attend_int8};
  return *portable[form];
}

struct Range {
  int64_t begin, end, first;  // slots; and the number of its first span

  int64_t spans() const { return begin < end ? (end - 1) / SPAN - begin / SPAN + 1 : 0; }
};

// The slots of row b that some query may see.
Range seen(const Attention& a, int64_t b) {
  int64_t low = PAST, high = -1;
  for (int64_t t = 0; t < a.T; t++) {
    int64_t position = a.position[b * a.T + t];
    if (position >= PAST || position < 0) continue;
    low = position < low ? position : low;
    high = position > high ? position : high;
  }
  if (high < 0) return {0, 0, 0};
  if (a.slot) return {0, a.S, 0};
  int64_t begin = a.window && !a.sinks && low - a.window + 1 > 0 ? low - a.window + 1 : 0;
  return {begin / SLOTS * SLOTS, high + 1 < a.S ? high + 1 : a.S, 0};
}

class Attending : public Job {
 public:
  // `sums` of every span of every row and kv head, and for each of these how many spans are left.
  Attending(const Attention& a, const Attender& kernel, std::vector<Range> ranges, int64_t spans, int64_t threads)
      : Job(spans * a.K, RUNS * threads), a_(a), kernel_(kernel), ranges_(std::move(ranges)),
        size_(a.queries() * (a.H + 2)), sums_(new (std::nothrow) float[spans * a.K * size_ + 1]),
        left_(new (std::nothrow) std::atomic<int64_t>[a.B * a.K]) {
    for (int64_t i = 0; left_ && i < a.B * a.K; i++) left_[i] = ranges_[i / a.K].spans();
  }
  bool possible() const { return sums_ && left_; }

 private:
  size_t scratch() override { return kernel_.scratch(a_); }

  struct Sight : Foresight {
    const Attending& job;
    const int64_t index, end;

    Sight(const Attending& job, int64_t index, int64_t end) : job(job), index(index), end(end) {}
    bool next(Span* span) const override {
      int64_t next = job.upcoming(index, end);
      if (next >= 0) *span = job.at(next);
      return next >= 0;
    }
  };

  void block(int64_t index, int64_t end, void* scratch) override {
    Span span = at(index);
    const Range& range = ranges_[span.b];
    kernel_.span(a_, span, Sight(*this, index, end), sums_.get() + index * size_, scratch);
    if (range.spans() > 1 && left_[span.b * a_.K + span.h].fetch_sub(1) > 1) return;  // the last to be done adds up all
    kernel_.merge(a_, span.b, span.h, range.spans(), sums_.get() + first(range, span.h) * size_);
  }

  int64_t first(const Range& range, int64_t h) const { return range.first * a_.K + h * range.spans(); }
  Span at(int64_t index) const {
    int64_t b = 0;
    while (b + 1 < a_.B && ranges_[b + 1].first * a_.K <= index) b++;
    const Range& range = ranges_[b];
    int64_t h = (index - range.first * a_.K) / range.spans();
    int64_t begin = (range.begin / SPAN + index - first(range, h)) * SPAN, end = begin + SPAN;
    return {b, h, begin > range.begin ? begin : range.begin, end < range.end ? end : range.end};
  }

  const Attention a_;
  const Attender& kernel_;
  const std::vector<Range> ranges_;
  const int64_t size_;
  const std::unique_ptr<float[]> sums_;
  const std::unique_ptr<std::atomic<int64_t>[]> left_;
};

class Crowding : public Job {
 public:
  Crowding(const Attention& a, const Crowd& crowd) : Job(a.B * a.K * crowd.blocks(a)), a_(a), crowd_(crowd) {}

 private:
  size_t scratch() override { return crowd_.scratch(a_); }
  void block(int64_t index, int64_t, void* scratch) override {  // the last ones, which see most, first
    int64_t row = index % (a_.B * a_.K), block = crowd_.blocks(a_) - 1 - index / (a_.B * a_.K);
    crowd_.block(a_, row / a_.K, row % a_.K, block, scratch);
  }

  const Attention a_;
  const Crowd& crowd_;
};

ffi::Error attend(const Attention& a, Form form, ffi::ThreadPool& pool, int32_t isa, int32_t threads) {
  if (isa > best_isa()) return ffi::Error::InvalidArgument("this machine has no such instruction set");
  if (!a.B || !a.T || !a.N || !a.H) return ffi::Error::Success();
#if WITH_AMX
  if ((isa < 0 ? best_isa() : isa) == AMX && form == BF16 && a.half && a.T > FEW) {
    if (!Job::share(pool, std::make_shared<Crowding>(a, amx_crowd), threads > 0 ? threads : pool.num_threads()))
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention found no memory for its scratch");
    return ffi::Error::Success();
  }
#endif
  std::vector<Range> ranges(a.B);
  int64_t spans = 0, slots = 0, row = a.T * a.N * a.H * (a.half ? 2 : 4);  // bytes
  for (int64_t b = 0; b < a.B; b++) {
    ranges[b] = seen(a, b);
    ranges[b].first = spans;
    spans += ranges[b].spans();
    slots += ranges[b].end - ranges[b].begin;
    if (ranges[b].spans() == 0) std::memset((char*)a.out + b * row, 0, row);
  }
  if (spans == 0) return ffi::Error::Success();
  constexpr int64_t BYTES[] = {4, 2, 1};
  int64_t most = threads > 0 ? threads : slots * a.K * a.H * 2 * BYTES[form] < SMALL_BYTES ? 1 : pool.num_threads();
  auto job = std::make_shared<Attending>(a, choose(isa < 0 ? best_isa() : isa, form, a.half), ranges, spans, most);
  if (!job->possible() || !Job::share(pool, job, most))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention found no memory for its scratch");
  return ffi::Error::Success();
}

bool has(ffi::Span<const int64_t> dimensions, std::initializer_list<int64_t> sizes) {
  return dimensions.size() == sizes.size() && std::equal(dimensions.begin(), dimensions.end(), sizes.begin());
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> position, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out,
                     float scale, float cap, int64_t window, int64_t sinks, bool slots, bool paged, int32_t isa,
                     int32_t threads) {
  auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions();
  ffi::DataType kind = k.element_type();
  Form form = kind == ffi::F32 ? F32 : kind == ffi::BF16 || kind == ffi::U16 ? BF16 : INT8;
  if ((form == INT8 && kind != ffi::S8) || v.element_type() != kind)
    return ffi::Error::InvalidArgument("attention reads caches of float32, bfloat16 or int8");
  bool half = q.element_type() == ffi::BF16;
  if ((!half && q.element_type() != ffi::F32) || out->element_type() != q.element_type())
    return ffi::Error::InvalidArgument("queries are float32 or bfloat16, and so is what comes out");
  size_t extra = (form == INT8 ? 2 : 0) + (slots ? 1 : 0) + (paged ? 1 : 0), first = paged ? 2 : 1;
  if (qs.size() != 4 || ks.size() != first + 3 || !std::equal(ks.begin(), ks.end(), vs.begin(), vs.end()) ||
      more.size() != extra || !ks[first] || qs[2] % ks[first] || ks[first + 2] != qs[3] ||
      (paged ? slots || !ks[0] || !ks[1] || qs[0] % ks[0] || !ks[3] || ks[3] % FOUR : ks[0] != qs[0]) ||
      !has(position.dimensions(), {qs[0], qs[1]}) || !has(out->dimensions(), {qs[0], qs[1], qs[2], qs[3]}))
    return ffi::Error::InvalidArgument(
        "attention takes q [B, T, N, H], position [B, T], and k and v [B, K, S, H] or, in pages, [D, P, K, Z, H]");
  Attention a{q.untyped_data(), k.untyped_data(), v.untyped_data(), nullptr, nullptr, position.typed_data(), nullptr,
              nullptr, out->untyped_data(), qs[0], qs[1], qs[2], ks[first], ks[first + 1], qs[3], 0, 0, 0, 0, scale, cap,
              window, sinks, half};
  size_t next = 0;
  if (form == INT8) {
    auto k_scale = more.get<ffi::Buffer<ffi::F32>>(next++), v_scale = more.get<ffi::Buffer<ffi::F32>>(next++);
    auto fits = [&](const auto& scales) {
      return scales.has_value() && std::equal(ks.begin(), ks.end() - 1, scales->dimensions().begin(), scales->dimensions().end());
    };
    if (!fits(k_scale) || !fits(v_scale))
      return ffi::Error::InvalidArgument("the scales of int8 are float32, one of each key and value");
    a.k_scale = k_scale->typed_data(), a.v_scale = v_scale->typed_data();
  }
  if (slots) {
    auto slot = more.get<ffi::Buffer<ffi::S32>>(next++);
    if (!slot.has_value() || !has(slot->dimensions(), {a.B, a.S}))
      return ffi::Error::InvalidArgument("slots are int32 [B, S]");
    a.slot = slot->typed_data();
  }
  if (paged) {
    auto table = more.get<ffi::Buffer<ffi::S32>>(next++);
    if (!table.has_value() || table->dimensions().size() != 2 || table->dimensions()[0] != a.B)
      return ffi::Error::InvalidArgument("a table is int32 [B, M]");
    a.table = table->typed_data(), a.D = ks[0], a.P = ks[1], a.Z = ks[3], a.M = table->dimensions()[1];
    a.S = a.M * a.Z;
  }
  return attend(a, form, pool, isa, threads);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED XLA_FFI_Error* jaxinfer_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("sinks")
                                  .Attr<bool>("slots")
                                  .Attr<bool>("paged")
                                  .Attr<int32_t>("isa")
                                  .Attr<int32_t>("threads"));
