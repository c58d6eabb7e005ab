// How a thread of an update kernel reads and writes a few neighbouring elements of a tensor's operands, and what the
// kernels for all formats of the moments share: weights with their remainders, and moving averages.
#pragma once

#include <cuda_runtime.h>

#include "philox.h"
#include "rule.h"

namespace {

constexpr int kThreads = 256;

// An address out of a table, as a pointer. That it is one into global memory the compiler cannot know; told so, it
// emits global instead of generic accesses, which takes some 10 registers a thread fewer.
template <typename T>
__device__ __forceinline__ T* global_pointer(int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
}

// The widest access a thread can make.
constexpr int64_t kVectorBytes = 16;

// N elements that move in 16-byte accesses (fewer bytes where N of them are less).
template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T at[N];
};

template <int N, typename T>
__device__ __forceinline__ bool starts_vector(const T* base, int64_t shift) {
  return (reinterpret_cast<uint64_t>(base - shift) & (alignof(Vector<T, N>) - 1)) == 0;
}

template <typename V, typename T>
__device__ __forceinline__ V& as_vector(T* element) {
  return *reinterpret_cast<V*>(element);
}

// Where the operands of one tensor lie. M, V: what its moments are stored as.
template <typename Param, typename Grad, typename First, typename Second>
struct Operands {
  using P = Param;
  using G = Grad;
  using M = First;
  using V = Second;
  using T = typename compute_type<P>::type;
  P* p;
  const G* g;
  M* m;
  V* v;
  int64_t flags;  // the tensor's, the same for the whole block
  int64_t max_exp_avg_sq;
  int64_t remainders;
  const LaunchTable& table;
  uint32_t tensor;

  // What is needed less often is found anew: pointers kept in registers throughout would make updates spill.
  __device__ __forceinline__ const TensorRow& row() const {
    return global_pointer<const TensorRow>(table.rows)[tensor];
  }
  __device__ __forceinline__ int64_t coefficients() const { return table.coefficients + tensor * kCoefficientRowBytes; }
  __device__ __forceinline__ V* v_max() const { return global_pointer<V>(max_exp_avg_sq); }
  __device__ __forceinline__ int64_t param_format() const { return (flags >> kParamFormatShift) & kFormatMask; }
  template <typename Remainder>
  __device__ __forceinline__ Remainder* remainder() const {
    return global_pointer<Remainder>(remainders);
  }
  // Beside float64 the average never is bfloat16, which spares those kernels its code.
  __device__ __forceinline__ bool averages_in_bf16() const {
    return sizeof(T) == sizeof(float) && (flags & kEmaBfloat16);
  }
  __device__ __forceinline__ const Coefficients<T>& of_tensor() const {
    return *global_pointer<const Coefficients<T>>(coefficients());
  }
};

// Whether every operand but the moments, `shift` elements before its first one, is where a vector may start.
template <int N, typename At>
__device__ __forceinline__ bool start_vectors(const At& at, int64_t shift) {
  bool result = starts_vector<N>(at.p, shift) && starts_vector<N>(at.g, shift);
  if constexpr (sizeof(typename At::P) == 2) {
    const int64_t format = at.param_format();
    if (format == kSplit24) result = result && starts_vector<N>(at.template remainder<int8_t>(), shift);
    if (format == kSplit32) result = result && starts_vector<N>(at.template remainder<int16_t>(), shift);
  }
  if (at.flags & kEma) {
    result = result &&
             (at.averages_in_bf16() ? starts_vector<N>(reinterpret_cast<const bf16*>(at.row().ema), shift)
                                    : starts_vector<N>(reinterpret_cast<const typename At::T*>(at.row().ema), shift));
  }
  return result;
}

// --- random bits ----------------------------------------------------------------------------------------------------

// Of elements [i, i + N), which begin inside a pair where their shard does, or where chunk boundaries are moved by an
// odd number of elements: throughout a tensor or never.
template <int N, typename At>
__device__ __forceinline__ void draw(const At& at, int64_t i, RandomBits (&random)[N]) {
  const uint64_t key = *global_pointer<const uint64_t>(at.coefficients() + kKeyOffset);
  const int64_t first = at.row().first_element + i;
  if constexpr (N == 1) {
    random[0] = random_bits(key, first);
  } else if (first & 1) {
    RandomPair pairs[N / 2 + 1];
#pragma unroll
    for (int k = 0; k <= N / 2; ++k) pairs[k] = counter_of(key, (first >> 1) + k);
    do_rounds(key, pairs);
#pragma unroll
    for (int k = 0; k < N; ++k) random[k].word = k & 1 ? pairs[(k + 1) / 2].even : pairs[k / 2].odd;
  } else {
    RandomPair pairs[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) pairs[k] = counter_of(key, (first >> 1) + k);
    do_rounds(key, pairs);
#pragma unroll
    for (int k = 0; k < N; ++k) random[k].word = k & 1 ? pairs[k / 2].odd : pairs[k / 2].even;
  }
}

// --- weights --------------------------------------------------------------------------------------------------------

// Only 16-bit weights have formats, which branch for the whole block alike.
template <typename Remainder, int N, typename At>
__device__ __forceinline__ void merge(const At& at, int64_t i, const Vector<typename At::P, N>& p,
                                      Vector<float, N>& weight) {
  using P = typename At::P;
  constexpr int kShift = sizeof(Remainder) == 1 ? split_of<P>::kBits - 8 : 0;
  const auto remainder = as_vector<const Vector<Remainder, N>>(at.template remainder<Remainder>() + i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    weight.at[k] = merge_weight<P>(p.at[k].bits, static_cast<int32_t>(remainder.at[k]) * (1 << kShift));
  }
}

template <int N, typename At>
__device__ __forceinline__ void load_weights(const At& at, int64_t i, Vector<typename At::T, N>& weight) {
  const auto p = as_vector<const Vector<typename At::P, N>>(at.p + i);
  if constexpr (sizeof(typename At::P) == 2) {
    const int64_t format = at.param_format();
    if (format == kSplit24) return merge<int8_t>(at, i, p, weight);
    if (format == kSplit32) return merge<int16_t>(at, i, p, weight);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) weight.at[k] = load<typename At::T>(&p.at[k]);
}

template <typename Remainder, int N, typename At>
__device__ __forceinline__ void split(const At& at, int64_t i, const Vector<float, N>& weight,
                                      const RandomBits (&random)[N], Vector<typename At::P, N>& p) {
  using P = typename At::P;
  constexpr int kKept = sizeof(Remainder) == 1 ? 8 : split_of<P>::kBits;
  Vector<Remainder, N> remainder;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const SplitWeight parts = split_weight<P, kKept>(weight.at[k], random[k].for_weight());
    p.at[k].bits = static_cast<uint16_t>(parts.weight);
    remainder.at[k] = static_cast<Remainder>(parts.remainder);
  }
  as_vector<Vector<Remainder, N>>(at.template remainder<Remainder>() + i) = remainder;
}

// Whether storing the weights takes random bits.
template <typename At>
__device__ __forceinline__ bool rounds_weights_stochastically(const At& at) {
  return sizeof(typename At::P) == 2 && (at.param_format() == kStochastic || at.param_format() == kSplit24);
}

template <int N, typename At>
__device__ __forceinline__ void store_weights(const At& at, int64_t i, const Vector<typename At::T, N>& weight,
                                              const RandomBits (&random)[N]) {
  Vector<typename At::P, N> p;
  const int64_t format = sizeof(typename At::P) == 2 ? at.param_format() : kNative;
  if constexpr (sizeof(typename At::P) == 2) {
    if (format == kSplit24) split<int8_t>(at, i, weight, random, p);
    if (format == kSplit32) split<int16_t>(at, i, weight, random, p);
    if (format == kStochastic) {
#pragma unroll
      for (int k = 0; k < N; ++k) store_stochastic(&p.at[k], weight.at[k], random[k].for_weight());
    }
  }
  if (format == kNative) {
#pragma unroll
    for (int k = 0; k < N; ++k) store(&p.at[k], weight.at[k]);
  }
  as_vector<Vector<typename At::P, N>>(at.p + i) = p;
}

// --- moving averages ------------------------------------------------------------------------------------------------

// The moving average of elements [i, i + N), whose weights have just been stored. What a 16-bit weight is remembered
// as, and all that the average alone needs, is read here, from the L1 cache, and random bits are drawn again: kept in
// registers throughout, they would make updates spill.
template <int N, typename At>
__device__ __forceinline__ void average(const At& at, int64_t i, Vector<typename At::T, N> weight) {
  using T = typename At::T;
  const T weight_of_new = at.of_tensor().ema;
  if constexpr (sizeof(typename At::P) == 2) load_weights(at, i, weight);
  if (at.averages_in_bf16()) {
    bf16* element = global_pointer<bf16>(at.row().ema) + i;
    auto ema = as_vector<Vector<bf16, N>>(element);
    RandomBits random[N];
    draw(at, i, random);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T mean = moving_average(load<T>(&ema.at[k]), weight.at[k], weight_of_new);
      store_stochastic(&ema.at[k], static_cast<float>(mean), random[k].for_average());
    }
    as_vector<Vector<bf16, N>>(element) = ema;
  } else {
    T* element = global_pointer<T>(at.row().ema) + i;
    auto ema = as_vector<Vector<T, N>>(element);
#pragma unroll
    for (int k = 0; k < N; ++k) ema.at[k] = moving_average(ema.at[k], weight.at[k], weight_of_new);
    as_vector<Vector<T, N>>(element) = ema;
  }
}

}  // namespace
