// Plain loops over one chunk. This file is compiled once per ISA (baseline, AVX2, AVX-512); the compiler
// vectorises it, and -ffp-contract=off keeps the bits the same in all three.
//
// No STL here and nothing with external linkage but the table at the end: see rule.h.
#include "cpu_loop.h"

#include "rule.h"

namespace {

// --- index mapping: one chunk --------------------------------------------------------------------------

struct Chunk {
  const TensorRow* row;
  int64_t grad;
  const void* coefficients;
  int64_t begin;
  int64_t end;
};

// ivdep, not restrict: operands of one tensor never overlap across elements (the launch table refuses that), but a
// gradient may be its parameter itself, which is read before the same element is written.
template <bool kWithAmsgrad, bool kWithL2, typename P, typename G>
void update_elements(const Chunk& chunk) {
  using T = typename compute_type<P>::type;
  P* p = reinterpret_cast<P*>(chunk.row->param);
  const G* g = reinterpret_cast<const G*>(chunk.grad);
  T* m = reinterpret_cast<T*>(chunk.row->exp_avg);
  T* v = reinterpret_cast<T*>(chunk.row->exp_avg_sq);
  T* v_max = reinterpret_cast<T*>(chunk.row->max_exp_avg_sq);
  const Coefficients<T> c = *static_cast<const Coefficients<T>*>(chunk.coefficients);
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    // All loads before the first store: the four arrays often lie a multiple of 4 KiB apart, and a load behind a
    // store to the same offset in another page would wait for it.
    T weight = load<T>(p + i), first = m[i], second = v[i], maximum = kWithAmsgrad ? v_max[i] : T(0);
    adamw<kWithAmsgrad, kWithL2>(weight, load<T>(g + i), first, second, maximum, c);
    store(p + i, weight);
    m[i] = first;
    v[i] = second;
    if (kWithAmsgrad) v_max[i] = maximum;
  }
}

template <typename P, typename G>
void update_chunk(const Chunk& chunk) {
  const int64_t flags = chunk.row->flags;
  switch (flags & (kAmsgrad | kL2)) {
    case 0:
      return update_elements<false, false, P, G>(chunk);
    case kAmsgrad:
      return update_elements<true, false, P, G>(chunk);
    case kL2:
      return update_elements<false, true, P, G>(chunk);
    default:
      return update_elements<true, true, P, G>(chunk);
  }
}

using UpdateChunk = void (*)(const Chunk&);

// [parameter dtype][gradient dtype], in the order of DtypeCode. A float64 gradient needs a float64 parameter.
constexpr UpdateChunk kUpdateChunk[kDtypes][kDtypes] = {
    {update_chunk<float, float>, update_chunk<float, bf16>, update_chunk<float, fp16>, nullptr},
    {update_chunk<bf16, float>, update_chunk<bf16, bf16>, update_chunk<bf16, fp16>, nullptr},
    {update_chunk<fp16, float>, update_chunk<fp16, bf16>, update_chunk<fp16, fp16>, nullptr},
    {update_chunk<double, float>, update_chunk<double, bf16>, update_chunk<double, fp16>, update_chunk<double, double>},
};

// --- the two stages ----------------------------------------------------------------------------------------

void prepare(const void* table_address, int64_t begin, int64_t end) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const auto* grads = reinterpret_cast<const int64_t*>(table.grads);
  const auto* hypers = reinterpret_cast<const HyperRow*>(table.hypers);
  // Neighbours mostly share group and step: two powers, a division and a root a tensor are then saved.
  Coefficients<double> c = {};
  int64_t known_hyper = -1, known_flags = -1, known_t = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (grads[i] == 0) continue;
    const TensorRow& row = rows[i];
    auto* step = reinterpret_cast<float*>(row.step);
    *step = *step + 1.0f;
    const auto t = static_cast<int64_t>(*step);
    if (row.hyper != known_hyper || row.flags != known_flags || t != known_t) {
      c = coefficients(hypers[row.hyper], row.flags, t);
      known_hyper = row.hyper, known_flags = row.flags, known_t = t;
    }
    const int64_t out = table.coefficients + i * kCoefficientRowBytes;
    if (row.flags & kFloat64) {
      write_coefficients(reinterpret_cast<double*>(out), c);
    } else {
      write_coefficients(reinterpret_cast<float*>(out), c);
    }
  }
}

void update(const void* table_address, int64_t begin, int64_t end) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const auto* grads = reinterpret_cast<const int64_t*>(table.grads);
  const auto* chunks = reinterpret_cast<const int64_t*>(table.chunks);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tensor = chunks[i] >> kChunkTensorShift;
    if (grads[tensor] == 0) continue;
    const TensorRow& row = rows[tensor];
    Chunk chunk;
    chunk.row = &row;
    chunk.grad = grads[tensor];
    chunk.coefficients = reinterpret_cast<const void*>(table.coefficients + tensor * kCoefficientRowBytes);
    chunk.begin = (chunks[i] & kChunkIndexMask) * table.chunk_size;
    chunk.end = chunk.begin + table.chunk_size < row.numel ? chunk.begin + table.chunk_size : row.numel;
    const int64_t param_dtype = (row.flags >> kParamDtypeShift) & kDtypeMask;
    const int64_t grad_dtype = (row.flags >> kGradDtypeShift) & kDtypeMask;
    kUpdateChunk[param_dtype][grad_dtype](chunk);
  }
}

}  // namespace

namespace adamw_kernels {
extern const CpuLoops ADAMW_KERNELS_LOOPS;
const CpuLoops ADAMW_KERNELS_LOOPS = {prepare, update};
}  // namespace adamw_kernels
