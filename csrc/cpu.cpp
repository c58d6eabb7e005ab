// Picks the ISA's loops and splits tensors and chunks over threads. No arithmetic here.
#include "cpu.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "cpu_loop.h"
#include "launch_table.h"

#ifdef ADAMW_KERNELS_X86
#include <xmmintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace adamw_kernels {
namespace {

struct Isa {
  const char* name;
  const CpuLoops* loops;
  bool (*supported)();
};

const Isa kIsas[] = {
    {"baseline", &kBaselineLoops, [] { return true; }},
#ifdef ADAMW_KERNELS_X86
    {"avx2", &kAvx2Loops, [] { return static_cast<bool>(__builtin_cpu_supports("avx2")); }},
    {"avx512", &kAvx512Loops,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};

// torch.set_flush_denormal and other libraries change how a thread treats subnormals or rounds. The bits
// must not depend on that: every thread computes in the default environment and then restores its own.
class DefaultFloatEnvironment {
 public:
#ifdef ADAMW_KERNELS_X86
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// GNU OpenMP's worker threads do not survive fork(): a parallel region in the child waits for them for ever. They
// may be torch's, started before the first step, so the handler is registered when the module is loaded.
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });

// Threads are woken for twice this many elements (a few microseconds of work for each of two), and at least a quarter
// for each. All are woken or none: with teams of another size than torch's, GNU OpenMP ends threads and starts others
// again and again, which takes milliseconds where there are sixteen.
constexpr int64_t kElementsPerThread = 1 << 14;

// Chunks a thread takes at a time: enough to amortise the shared counter when tensors are tiny.
constexpr int64_t kMaxGrain = 16;

// Up to this many elements in all, each thread gets the same chunks on every step instead: its cache still holds what
// it wrote the step before. Only where no tensor is much larger than the others, or the load would be uneven.
constexpr int64_t kCachedElements = 1 << 18;

}  // namespace

std::vector<CpuIsa> cpu_isas() {
  std::vector<CpuIsa> result;
  for (const Isa& isa : kIsas) result.push_back({isa.name, isa.supported()});
  return result;
}

void cpu_step(const void* table_address, int64_t stages, int isa, [[maybe_unused]] int num_threads) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const CpuLoops& loops = *kIsas[isa].loops;
  const auto decide = [&] {
    if (stages & kMeasure) loops.sum_up(table_address);
    if (stages & kDecide) loops.decide(table_address);
  };

#ifdef _OPENMP
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const int64_t shared = std::max(2 * kElementsPerThread, num_threads * kElementsPerThread / 4);
  const int64_t enough = std::max(shared, kCachedElements + 1);
  int64_t elements = 0, largest = 0;
  for (int64_t i = 0; i < table.num_tensors && elements < enough; ++i) {
    const int64_t cost = rows[i].numel + 64;  // a tensor costs something even when it is tiny
    elements += cost;
    largest = std::max(largest, cost);
  }
  const bool is_even = elements <= kCachedElements && largest * table.num_tensors <= 2 * elements;
  const bool is_alone = elements < shared || in_forked_child.load(std::memory_order_relaxed);
  const int threads = is_alone ? 1 : num_threads;
  if (threads > 1) {
    const auto grain_of = [threads](int64_t chunks) {
      return std::clamp<int64_t>(chunks / (threads * 16), 1, kMaxGrain);
    };
    const int64_t norm_chunks = stages & kMeasure ? table.num_norm_chunks : 0;
    const int64_t norm_grain = grain_of(norm_chunks), grain = grain_of(table.num_chunks);
    const int64_t norm_grains = (norm_chunks + norm_grain - 1) / norm_grain;
    const int64_t grains = (table.num_chunks + grain - 1) / grain;
#pragma omp parallel num_threads(threads)
    {
      const DefaultFloatEnvironment environment;
      if (stages & (kMeasure | kDecide)) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < norm_grains; ++i) {
          loops.measure(table_address, i * norm_grain, std::min(norm_chunks, (i + 1) * norm_grain));
        }
#pragma omp single
        decide();
      }
      if (stages & kUpdate) {
        const int64_t count = omp_get_num_threads(), self = omp_get_thread_num();
        loops.prepare(table_address, table.num_tensors * self / count, table.num_tensors * (self + 1) / count);
#pragma omp barrier
        if (is_even) {
          loops.update(table_address, table.num_chunks * self / count, table.num_chunks * (self + 1) / count);
        } else {
#pragma omp for schedule(dynamic, 1) nowait
          for (int64_t i = 0; i < grains; ++i) {
            loops.update(table_address, i * grain, std::min(table.num_chunks, (i + 1) * grain));
          }
        }
      }
    }
    return;
  }
#endif
  const DefaultFloatEnvironment environment;
  if (stages & kMeasure) loops.measure(table_address, 0, table.num_norm_chunks);
  decide();
  if (stages & kUpdate) {
    loops.prepare(table_address, 0, table.num_tensors);
    loops.update(table_address, 0, table.num_chunks);
  }
}

}  // namespace adamw_kernels
