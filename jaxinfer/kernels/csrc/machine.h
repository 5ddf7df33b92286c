// What every handler needs: which instruction set there is, how numbers round, and how work is shared among threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(JAXINFER_AVX512)  // its files are compiled too
#define WITH_AVX512 1
#else
#define WITH_AVX512 0
#endif
#if defined(JAXINFER_AMX)
#define WITH_AMX 1
#else
#define WITH_AMX 0
#endif
#if WITH_AMX && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, AMX = 4 };

// Whether there are tiles of bfloat16 and int8, and the system lets this process have them, as it does if it is asked.
bool has_amx() {
#if WITH_AMX && defined(__linux__)
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return false;  // AMX-TILE
  if (!(d >> 22 & 1) || !(d >> 25 & 1) || !(c >> 1 & 1)) return false;  // AMX-BF16, AMX-INT8, AVX512-VBMI
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;                             // OSXSAVE
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

int32_t best_isa() {
#if defined(__x86_64__)
  static const int32_t best = [] {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = WITH_AVX512 && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? AMX : AVX512BF16;
    return avx512 ? AVX512 : avx2 ? AVX2 : PORTABLE;
  }();
  return best;
#else
  return PORTABLE;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return best_isa() >= AVX512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// XLA's threads do not all round and flush alike, and bits must not depend on who works them out: IEEE, in every one.
class Rounding {
 public:
#if defined(__x86_64__)
  Rounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~Rounding() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Rounding() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~Rounding() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Work cut into blocks that any thread may take. A thread of the pool that comes late finds no block left and touches
// nothing; the caller waits only for blocks that somebody is at work on, so it cannot wait forever, be the pool busy, or
// itself one of the pool's threads.
class Job {
 public:
  // A thread takes one block at a time; or, where `parts` is given, a run of that part of those left, while they last.
  explicit Job(int64_t blocks, int64_t parts = 0) : blocks_(blocks), parts_(parts > 0 ? parts : blocks + 1) {}
  virtual ~Job() = default;

  // Does the work of `job` on up to `most` threads; false where a thread found no memory for its scratch.
  static bool share(xla::ffi::ThreadPool& pool, std::shared_ptr<Job> job, int64_t most) {
    if (most > job->blocks_) most = job->blocks_;
    for (int64_t i = 1; i < most; i++) pool.Schedule([job] { job->work(); });
    job->work();
    job->wait();
    return !job->failed_;
  }

 protected:
  virtual size_t scratch() { return 64; }  // bytes that a thread needs, 64-byte aligned
  virtual void prepare(void* scratch) {}
  // Does a block, of a run that the same thread does to its `end`.
  virtual void block(int64_t index, int64_t end, void* scratch) = 0;
  // What a thread most likely takes when it is done with that block, or -1.
  int64_t upcoming(int64_t index, int64_t end) const {
    int64_t next = index + 1 < end ? index + 1 : next_.load();
    return next < blocks_ ? next : -1;
  }

 private:
  bool take(int64_t* begin, int64_t* end) {
    *begin = next_.load();
    do {
      int64_t left = blocks_ - *begin;
      if (left <= 0) return false;
      *end = *begin + (left > parts_ ? left / parts_ : 1);
    } while (!next_.compare_exchange_weak(*begin, *end));
    return true;
  }

  void work() {
    int64_t begin, end;
    if (!take(&begin, &end)) return;
    Rounding rounding;
    void* held = std::aligned_alloc(64, (scratch() + 63) / 64 * 64);
    if (held) prepare(held);
    do {
      for (int64_t i = begin; held && i < end; i++) block(i, end, held);
      if (!held) failed_ = true;
      int64_t num = end - begin;
      if (done_.fetch_add(num) + num == blocks_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    } while (take(&begin, &end));
    std::free(held);
  }

  void wait() {
    for (int spin = 0; spin < 4000; spin++) {
      if (done_.load() == blocks_) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == blocks_; });
  }

  const int64_t blocks_, parts_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
};

}  // namespace
