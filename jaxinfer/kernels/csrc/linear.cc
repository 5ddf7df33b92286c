// The XLA FFI handlers of products: which kernel, how many threads, who does which columns.
#include <cstdlib>
#include <memory>
#include <new>

#include "machine.h"
#include "tile.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t SMALL_BYTES = 256 * 1024;  // of w, and
constexpr int64_t SMALL_WORK = 1 << 20;      // multiplications, that are done before a second thread wakes up
constexpr int64_t FEW_ROWS = 32;             // the time goes into reading w,
constexpr int64_t BLOCK_BYTES = 1 << 20;     // of which a thread takes so much at a time

// What w is kept in; and x rounded to codes too; or in bfloat16 beside codes, rounded or not; and two of bfloat16.
enum Form : int32_t {
  F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, ROUNDED8 = 4, ROUNDED4 = 5,
  HALF8 = 6, HALF4 = 7, ROUNDED_HALF8 = 8, ROUNDED_HALF4 = 9, GATED = 10
};
constexpr int64_t BITS[] = {32, 16, 8, 4, 8, 4, 8, 4, 8, 4, 32};

const Kernel& choose(int32_t isa, Form form) {
#if WITH_AMX
  if (isa == AMX && form == BF16) return amx_bf16;
  if (isa == AMX && form == INT8) return amx_bytes;
  if (form == HALF8) return amx_int8;
  if (form == HALF4) return amx_int4;
  if (form == ROUNDED_HALF8) return amx_rounded8;
  if (form == ROUNDED_HALF4) return amx_rounded4;
  if (form == GATED) return amx_gated;
#endif
#if WITH_AVX512
  static const Kernel* const avx512[] = {&avx512_f32, &avx512_bf16, &avx512_int8, &avx512_int4};
  if (form >= ROUNDED8 && isa > AVX2 && has_vnni()) return form == ROUNDED8 ? avx512vnni_int8 : avx512vnni_int4;
  if (form >= ROUNDED8) isa = AVX2;
  if (isa >= AVX512BF16 && form == BF16) return avx512bf16_bf16;
  if (isa >= AVX512) return *avx512[form];
#endif
#if defined(__x86_64__)
  static const Kernel* const avx2[] = {&avx2_f32, &avx2_bf16, &avx2_int8, &avx2_int4, &avx2_rounded8, &avx2_rounded4};
  if (isa == AVX2) return *avx2[form];
#endif
  static const Kernel* const portable[] = {&portable_f32, &portable_bf16, &portable_int8, &portable_int4};
  return *portable[form];
}

// Rows of x as what their codes say: to the nearest of -127 to 127 times a scale that BLOCK neighbours share.
void rounded(const float* x, float* out, int64_t rows, int64_t inner) {
  Rounding rounding;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t start = 0; start < inner; start += BLOCK) {
      const float* from = x + row * inner + start;
      float* to = out + row * inner + start;
      int64_t n = inner - start < BLOCK ? inner - start : BLOCK;
      float most = 0;
      bool odd = false;
      for (int64_t i = 0; i < n; i++) {
        float size = from[i] < 0 ? -from[i] : from[i];
        most = size > most ? size : most;
        odd = odd || from[i] != from[i];
      }
      float scale = odd ? __builtin_nanf("") : most / 127;
      float inverse = scale >= LEAST ? 1 / scale : 0;
      for (int64_t i = 0; i < n; i++)
        to[i] = inverse != 0 ? __builtin_nearbyintf(from[i] * inverse) * scale : odd || scale > 1 ? scale : 0;
    }
}

float activated(float x, Activation activation) {
  if (activation == RELU) return x < 0 ? 0 : x;
  if (activation == SILU) return x / (1 + __builtin_expf(-x));
  return 0.5f * x * (1 + __builtin_tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}

class Multiplication : public Job {
 public:
  Multiplication(const Product& product, const Kernel& kernel, int64_t columns)
      : Job((product.outer + columns - 1) / columns), product_(product), kernel_(kernel), columns_(columns) {}

 private:
  size_t scratch() override { return kernel_.scratch(product_); }
  void prepare(void* scratch) override { kernel_.prepare(product_, scratch); }
  void block(int64_t index, int64_t, void* scratch) override {
    int64_t begin = index * columns_, end = begin + columns_;
    kernel_.columns(product_, scratch, begin, end < product_.outer ? end : product_.outer);
  }

  const Product product_;
  const Kernel& kernel_;
  const int64_t columns_;
};

class Packing : public Job {
 public:
  Packing(const Product& product, const Kernel& kernel, void* shared)
      : Job((product.rows + kernel.rows - 1) / kernel.rows), product_(product), kernel_(kernel), shared_(shared) {}

 private:
  void block(int64_t index, int64_t, void*) override { kernel_.pack(product_, shared_, index); }

  const Product product_;
  const Kernel& kernel_;
  void* const shared_;
};

// isa: -1 for the best. threads: 0 for as many as the pool has, or 1 where that is faster.
ffi::Error multiply(ffi::ThreadPool& pool, Product p, Form form, int32_t isa, int32_t threads) {
  if (isa > best_isa()) return ffi::Error::InvalidArgument("this machine has no such instruction set");
  if (!p.rows || !p.outer) return ffi::Error::Success();
  if (!p.inner) {
    for (int64_t i = 0; i < p.rows * p.outer; i++) p.half ? void(p.half[i] = 0) : void(p.y[i] = 0);
    return ffi::Error::Success();
  }

  int64_t row_bytes = (p.inner * BITS[form] + 7) / 8;
  bool small = p.outer * row_bytes < SMALL_BYTES && p.rows * p.outer * p.inner < SMALL_WORK;
  int64_t most = threads > 0 ? threads : small ? 1 : pool.num_threads();
  // Many rows: blocks as large as leaves eight a thread, for each makes x ready anew.
  int64_t block = p.rows <= FEW_ROWS ? BLOCK_BYTES / row_bytes : MOST_COLUMNS;
  if (block > MOST_COLUMNS) block = MOST_COLUMNS;
  if (most > 1 && block > p.outer / (most * 8)) block = p.outer / (most * 8);
  if (block < 16) block = 16;
  const Kernel& kernel = choose(isa < 0 ? best_isa() : isa, form);
  block = (block + kernel.strip - 1) / kernel.strip * kernel.strip;

  std::unique_ptr<void, decltype(&std::free)> shared(nullptr, &std::free);
  bool done = true;
  if (kernel.pack) {
    shared.reset(std::aligned_alloc(64, (kernel.shared(p) + 63) / 64 * 64));
    done = shared && Job::share(pool, std::make_shared<Packing>(p, kernel, shared.get()), small ? 1 : most);
    p.shared = shared.get();
  }
  done = done && Job::share(pool, std::make_shared<Multiplication>(p, kernel, block), most);
  if (!done) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "linear found no memory for its scratch");
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y, int32_t isa,
                  int32_t threads) {
  auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  bool bf16 = w.element_type() == ffi::BF16;
  if ((!bf16 && w.element_type() != ffi::F32) || x.element_type() != w.element_type())
    return ffi::Error::InvalidArgument("linear multiplies two float32 or two bfloat16 arrays");
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[1] != ws[1] || ys[0] != xs[0] || ys[1] != ws[0])
    return ffi::Error::InvalidArgument("linear takes x [M, I] and w [O, I], and gives y [M, O]");
  Product p{x.untyped_data(), w.untyped_data(), y->typed_data(), xs[0], xs[1], ws[0]};
  return multiply(pool, p, bf16 ? BF16 : F32, isa, threads);
}

ffi::Error coded(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                 ffi::ResultBuffer<ffi::F32> y, int32_t isa, int32_t threads, int32_t dynamic) {
  auto xs = x.dimensions(), ws = w.dimensions(), ss = scale.dimensions(), ys = y->dimensions();
  bool int8 = w.element_type() == ffi::S8;
  bool known = int8 ? scale.element_type() == ffi::F32
                    : w.element_type() == ffi::U8 && scale.element_type() == ffi::F16;
  if (!known) return ffi::Error::InvalidArgument("codes are int8 with float32 scales, or uint8 with float16 scales");
  bool fits = xs.size() == 2 && ws.size() == 2 && ys.size() == 2 && ss.size() == (int8 ? 1 : 2) && ss[0] == ws[0] &&
              xs[1] == ws[1] * (int8 ? 1 : 2) && ys[0] == xs[0] && ys[1] == ws[0];
  int64_t group = !fits || int8 || !ss[1] ? 0 : xs[1] / ss[1];
  if (!fits || (!int8 && xs[1] && (group % UNIT || group * ss[1] != xs[1])))
    return ffi::Error::InvalidArgument(
        "codes take x [M, I], w [O, I] and scale [O]; or w [O, I / 2] and scale [O, I / g], g a multiple of 32");
  bool half = x.element_type() == ffi::BF16;
  if (x.element_type() != ffi::F32 && !half)
    return ffi::Error::InvalidArgument("codes are multiplied with float32 or bfloat16");
  Product p{x.untyped_data(), w.untyped_data(), y->typed_data(), xs[0], xs[1], ws[0], scale.untyped_data(), group, ss.size() == 2 ? ss[1] : 0};
  int32_t own = isa < 0 ? best_isa() : isa;
  if (half && own == AMX) {
    Form form = dynamic ? int8 ? ROUNDED_HALF8 : ROUNDED_HALF4 : int8 ? HALF8 : HALF4;
    return multiply(pool, p, form, isa, threads);
  }
  bool codes = dynamic && own >= AVX2;  // meet codes
  std::unique_ptr<float[]> floats;
  if (half || (dynamic && !codes)) {
    floats.reset(new (std::nothrow) float[p.rows * p.inner]);
    if (!floats) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "linear found no memory for rows of float32");
    const uint16_t* halves = (const uint16_t*)p.x;
    for (int64_t i = 0; half && i < p.rows * p.inner; i++) floats[i] = widen(halves[i]);
    if (dynamic && !codes) rounded(half ? floats.get() : (const float*)p.x, floats.get(), p.rows, p.inner);
    p.x = floats.get();
  }
  return multiply(pool, p, codes ? int8 ? ROUNDED8 : ROUNDED4 : int8 ? INT8 : INT4, isa, threads);
}

ffi::Error gated(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> gate, ffi::Buffer<ffi::BF16> up,
                 ffi::ResultBuffer<ffi::BF16> y, int32_t activation, int32_t isa, int32_t threads) {
  auto xs = x.dimensions(), gs = gate.dimensions(), us = up.dimensions(), ys = y->dimensions();
  bool fits = xs.size() == 2 && gs.size() == 2 && us.size() == 2 && ys.size() == 2 && xs[1] == gs[1] &&
              gs[0] == us[0] && gs[1] == us[1] && ys[0] == xs[0] && ys[1] == gs[0];
  if (!fits) return ffi::Error::InvalidArgument("a gate takes x [M, I] and two weights [O, I], and gives y [M, O]");
  Product p{x.untyped_data(), gate.untyped_data(), nullptr, xs[0], xs[1], gs[0]};
  uint16_t* to = (uint16_t*)y->untyped_data();
  if ((isa < 0 ? best_isa() : isa) == AMX) {
    p.other = up.untyped_data(), p.half = to, p.activation = Activation(activation);
    return multiply(pool, p, GATED, isa, threads);
  }
  // A program may come to a machine without tiles from one that has them: by two products, then.
  int64_t size = p.rows * p.outer;
  std::unique_ptr<float[]> both(new (std::nothrow) float[2 * size + 1]);
  if (!both) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "a gated product found no memory for its parts");
  for (int i = 0; i < 2; i++) {
    p.w = i ? up.untyped_data() : gate.untyped_data(), p.y = both.get() + i * size;
    ffi::Error error = multiply(pool, p, BF16, isa, threads);
    if (error.failure()) return error;
  }
  for (int64_t i = 0; i < size; i++) to[i] = narrow(activated(both[i], Activation(activation)) * both[size + i]);
  return ffi::Error::Success();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int32_t jaxinfer_best_isa() { return best_isa(); }
EXPORTED XLA_FFI_Error* jaxinfer_linear(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("isa")
                                  .Attr<int32_t>("threads"));

EXPORTED XLA_FFI_Error* jaxinfer_coded(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_coded, coded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("isa")
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("dynamic"));

EXPORTED XLA_FFI_Error* jaxinfer_gated(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_gated, gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int32_t>("activation")
                                  .Attr<int32_t>("isa")
                                  .Attr<int32_t>("threads"));
