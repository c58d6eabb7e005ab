// The CUDA kernels: which thread computes which element, and how the two stages are launched.
//
// What one element's update is stands in rule.h; how a value is stored, in formats.h. CMakeLists.txt turns
// contraction off for this file and keeps division, root and subnormals IEEE-754.
#include <cuda_runtime.h>

#include "cuda_step.h"
#include "philox.h"
#include "rule.h"

namespace {

// --- index mapping --------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// Blocks a multiprocessor, at least: 5 and 4 leave a thread 48 and 64 registers, without spills. By itself ptxas would
// take up to 52 and 77, mostly to interleave the random words of several elements. 0 leaves it alone: up to 64 for
// float64 (1 would be taken as leave to use more, and with 4 some kernels spill).
template <typename P, typename G>
constexpr int kMinBlocks = sizeof(P) == 8               ? 0
                           : sizeof(P) + sizeof(G) == 8 ? 5
                                                        : 4;

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

// Elements a thread takes at once: 16 bytes of the narrowest operand; two of float64, of which four would be 80
// registers.
template <typename P, typename G>
constexpr int kVectorLength = kVectorBytes / (sizeof(P) == 8 || sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));

template <int N, typename T>
__device__ __forceinline__ bool starts_vector(const T* base, int64_t shift) {
  return (reinterpret_cast<uint64_t>(base - shift) & (alignof(Vector<T, N>) - 1)) == 0;
}

template <typename V, typename T>
__device__ __forceinline__ V& as_vector(T* element) {
  return *reinterpret_cast<V*>(element);
}

template <bool kWithAmsgrad, bool kWithVariants, typename P, typename G, typename T, int N>
__device__ __forceinline__ void update_each(Vector<P, N>& p, const Vector<G, N>& g, Vector<T, N>& m, Vector<T, N>& v,
                                            Vector<T, N>& v_max, const Coefficients<T>& c, int64_t flags) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T weight = load<T>(&p.at[k]);
    adamw<kWithAmsgrad, kWithVariants>(weight, load<T>(&g.at[k]), m.at[k], v.at[k], v_max.at[k], c, flags);
    store(&p.at[k], weight);
  }
}

// Where the operands of one tensor lie.
template <typename P, typename G, typename T>
struct Operands {
  P* p;
  const G* g;
  T* m;
  T* v;
  T* v_max;  // read and written under kAmsgrad only
  const TensorRow* row;
  int64_t coefficients;  // address of the tensor's row of them
};

// Whether the moving average is bfloat16. Beside float64 it never is, which spares those kernels its code.
template <typename T>
__device__ __forceinline__ bool averages_in_bf16(int64_t flags) {
  return sizeof(T) == sizeof(float) && (flags & kEmaBfloat16);
}

// The moving average of elements [i, i + N), whose weights have just been stored. What it alone needs is read here,
// from the L1 cache: kept in registers throughout, it would make update spill.
template <int N, typename P, typename G, typename T>
__device__ __forceinline__ void average_vector(const Operands<P, G, T>& at, int64_t i, int64_t flags,
                                               const Vector<P, N>& p) {
  const T weight_of_new = global_pointer<const Coefficients<T>>(at.coefficients)->ema;
  if (averages_in_bf16<T>(flags)) {
    const uint64_t key = *global_pointer<const uint64_t>(at.coefficients + kKeyOffset);
    bf16* element = global_pointer<bf16>(at.row->ema) + i;
    auto ema = as_vector<Vector<bf16, N>>(element);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T average = moving_average(load<T>(&ema.at[k]), load<T>(&p.at[k]), weight_of_new);
      ema.at[k].bits = float_to_bf16_stochastic(static_cast<float>(average), random_word(key, i + k));
    }
    as_vector<Vector<bf16, N>>(element) = ema;
  } else {
    T* element = global_pointer<T>(at.row->ema) + i;
    auto ema = as_vector<Vector<T, N>>(element);
#pragma unroll
    for (int k = 0; k < N; ++k) ema.at[k] = moving_average(ema.at[k], load<T>(&p.at[k]), weight_of_new);
    as_vector<Vector<T, N>>(element) = ema;
  }
}

// Elements [i, i + N) in one access an operand, or two where 16 bytes do not hold them. `flags` are the tensor's, the
// same for the whole block. Branching on them here, between the loads and the stores, takes some 10 registers a thread
// fewer than a copy of the loops for each kind; two kinds, because every one more is 500 to 1,000 instructions to
// fetch. The average comes when the moments' registers are free again.
template <int N, typename P, typename G, typename T>
__device__ __forceinline__ void update_vector(const Operands<P, G, T>& at, int64_t i, int64_t flags,
                                              const Coefficients<T>& c) {
  auto p = as_vector<Vector<P, N>>(at.p + i);
  const auto g = as_vector<const Vector<G, N>>(at.g + i);
  auto m = as_vector<Vector<T, N>>(at.m + i);
  auto v = as_vector<Vector<T, N>>(at.v + i);
  Vector<T, N> v_max;
  if (flags & kAmsgrad) {
    v_max = as_vector<Vector<T, N>>(at.v_max + i);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) v_max.at[k] = T(-INFINITY);  // bounds nothing: the maximum is v itself, NaN or not
  }
  if (flags & (kVariants | kAmsgrad)) {
    update_each<true, true>(p, g, m, v, v_max, c, flags);
  } else {
    update_each<false, false>(p, g, m, v, v_max, c, flags);
  }
  as_vector<Vector<P, N>>(at.p + i) = p;
  as_vector<Vector<T, N>>(at.m + i) = m;
  as_vector<Vector<T, N>>(at.v + i) = v;
  if (flags & kAmsgrad) as_vector<Vector<T, N>>(at.v_max + i) = v_max;
  if (flags & kEma) average_vector(at, i, flags, p);
}

// One block a chunk. Chunk boundaries are moved down by `past_boundary` elements, so that vectors start on 16-byte
// boundaries when all operands are the same number of elements past one; then only a tensor's first and last few
// elements go one by one. Operands that disagree go one by one throughout.
template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, kMinBlocks<P, G>) update_kernel(LaunchTable table, int64_t first_chunk) {
  using T = typename compute_type<P>::type;
  constexpr int N = kVectorLength<P, G>;
  static_assert(N * sizeof(P) >= kVectorBytes, "at most one vector lies partly before a tensor's first element");
  if (global_pointer<const Decision>(table.decision)->skip) return;
  const int64_t chunk = global_pointer<const int64_t>(table.chunks)[first_chunk + blockIdx.x];
  const int64_t tensor = chunk >> kChunkTensorShift;
  const int64_t index = chunk & kChunkIndexMask;
  const int64_t grad = global_pointer<const int64_t>(table.grads)[tensor];
  if (grad == 0) return;
  const TensorRow* row_address = global_pointer<const TensorRow>(table.rows) + tensor;
  const TensorRow row = *row_address;
  const int64_t coefficients = table.coefficients + tensor * kCoefficientRowBytes;
  const auto c = *global_pointer<const Coefficients<T>>(coefficients);
  const int64_t flags = row.flags;
  const Operands<P, G, T> at = {global_pointer<P>(row.param),
                                global_pointer<const G>(grad),
                                global_pointer<T>(row.exp_avg),
                                global_pointer<T>(row.exp_avg_sq),
                                global_pointer<T>(row.max_exp_avg_sq),
                                row_address,
                                coefficients};

  const auto past_boundary = static_cast<int64_t>((row.param & (kVectorBytes - 1)) / sizeof(P));
  const bool ema_starts_vector = averages_in_bf16<T>(flags)
                                     ? starts_vector<N>(reinterpret_cast<const bf16*>(row.ema), past_boundary)
                                     : starts_vector<N>(reinterpret_cast<const T*>(row.ema), past_boundary);
  const bool aligned = starts_vector<N>(at.p, past_boundary) && starts_vector<N>(at.g, past_boundary) &&
                       starts_vector<N>(at.m, past_boundary) && starts_vector<N>(at.v, past_boundary) &&
                       (!(flags & kAmsgrad) || starts_vector<N>(at.v_max, past_boundary)) &&
                       (!(flags & kEma) || ema_starts_vector);
  const int64_t start = index * table.chunk_size - (aligned ? past_boundary : 0);
  const int64_t begin = start > 0 ? start : 0;
  const bool is_last = (index + 1) * table.chunk_size >= row.numel;
  const int64_t end = is_last ? row.numel : start + table.chunk_size;

  // Whole vectors are [body_begin, body_end); what lies before and after them goes one by one.
  int64_t body_begin = end;
  if (aligned && start + N <= end) body_begin = begin > start ? start + N : start;
  const int64_t body = (end - body_begin) / N * N;
  const int64_t edges = end - begin - body;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < edges; j += kThreads) {
    const int64_t i = begin + j;
    update_vector<1>(at, i < body_begin ? i : i + body, flags, c);
  }
  const int64_t body_end = body_begin + body;
#pragma unroll 1
  for (int64_t i = body_begin + static_cast<int64_t>(threadIdx.x) * N; i < body_end; i += kThreads * N) {
    update_vector<N>(at, i, flags, c);
  }
}

// One thread a tensor.
__global__ void __launch_bounds__(kThreads) prepare_kernel(LaunchTable table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= table.num_tensors) return;
  const auto& decision = *global_pointer<const Decision>(table.decision);
  if (decision.skip || global_pointer<const int64_t>(table.grads)[i] == 0) return;
  const TensorRow& row = global_pointer<const TensorRow>(table.rows)[i];
  float* step = global_pointer<float>(row.step);
  const float t = *step + 1.0f;
  *step = t;
  const Coefficients<double> c = coefficients(global_pointer<const HyperRow>(table.hypers)[row.hyper], row.flags,
                                              static_cast<int64_t>(t), decision.inv_scale, decision.norms[row.norm]);
  const int64_t out = table.coefficients + i * kCoefficientRowBytes;
  if (row.flags & kFloat64) {
    write_coefficients(global_pointer<double>(out), c);
  } else {
    write_coefficients(global_pointer<float>(out), c);
  }
  if (row.flags & kEmaBfloat16) {
    *global_pointer<uint64_t>(out + kKeyOffset) = random_key(row.random_stream, static_cast<int64_t>(t));
  }
}

// --- sums of squares and the decision --------------------------------------------------------------------------------

// Lanes a thread keeps in registers: neighbours, which lie in one access.
constexpr int kLanesPerThread = kNormLanes / kThreads;
static_assert(kThreads * kLanesPerThread == kNormLanes, "every lane has a thread");

// Adds the upper half of the lanes to the lower half until one is left.
__device__ __forceinline__ double fold(double* lanes) {
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int j = threadIdx.x; j < half; j += kThreads) lanes[j] = lanes[j] + lanes[j + half];
  }
  __syncthreads();
  return lanes[0];
}

// One thread's lanes of elements [0, count).
template <typename G>
__device__ __forceinline__ void add_squares(const G* x, int64_t count, double* lanes) {
  using Row = Vector<G, kLanesPerThread>;
  int64_t i = static_cast<int64_t>(threadIdx.x) * kLanesPerThread;
  if (starts_vector<kLanesPerThread>(x, 0)) {
#pragma unroll 4
    for (; i + kLanesPerThread <= count; i += kNormLanes) {
      const auto row = as_vector<const Row>(x + i);
#pragma unroll
      for (int k = 0; k < kLanesPerThread; ++k) lanes[k] = lanes[k] + square(&row.at[k]);
    }
  }
#pragma unroll 1
  for (; i < count; i += kNormLanes) {
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      if (i + k < count) lanes[k] = lanes[k] + square(x + i + k);
    }
  }
}

// One block a norm chunk.
__global__ void __launch_bounds__(kThreads) measure_kernel(LaunchTable table) {
  __shared__ double shared_lanes[kNormLanes];
  const int64_t chunk = global_pointer<const int64_t>(table.norm_chunks)[blockIdx.x];
  const int64_t tensor = chunk >> kChunkTensorShift;
  const int64_t first = (chunk & kChunkIndexMask) * kNormChunk;
  const int64_t grad = global_pointer<const int64_t>(table.grads)[tensor];
  const TensorRow& row = global_pointer<const TensorRow>(table.rows)[tensor];
  const int64_t rest = row.numel - first;
  const int64_t count = grad == 0 ? 0 : rest < kNormChunk ? rest : kNormChunk;
  double lanes[kLanesPerThread] = {};
  switch ((row.flags >> kGradDtypeShift) & kDtypeMask) {
    case kF32:
      add_squares(global_pointer<const float>(grad) + first, count, lanes);
      break;
    case kBF16:
      add_squares(global_pointer<const bf16>(grad) + first, count, lanes);
      break;
    case kF16:
      add_squares(global_pointer<const fp16>(grad) + first, count, lanes);
      break;
    default:
      add_squares(global_pointer<const double>(grad) + first, count, lanes);
  }
#pragma unroll
  for (int k = 0; k < kLanesPerThread; ++k) shared_lanes[threadIdx.x * kLanesPerThread + k] = lanes[k];
  const double sum = fold(shared_lanes);
  if (threadIdx.x == 0) global_pointer<double>(table.partials)[blockIdx.x] = sum;
}

// One block a domain, and one for the signal.
__global__ void __launch_bounds__(kThreads) sum_up_kernel(LaunchTable table) {
  __shared__ double shared_lanes[kNormLanes];
  double* totals = global_pointer<double>(table.totals);
  if (blockIdx.x == table.num_domains) {
    if (threadIdx.x == 0) totals[blockIdx.x] = skip_is_signalled(*global_pointer<const Signals>(table.signals));
    return;
  }
  const NormDomain domain = global_pointer<const NormDomain>(table.domains)[blockIdx.x];
  const double* partials = global_pointer<const double>(table.partials);
  double lanes[kLanesPerThread] = {};
  for (int64_t i = domain.begin + threadIdx.x; i < domain.end; i += kNormLanes) {
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      if (i + k * kThreads < domain.end) lanes[k] = lanes[k] + partials[i + k * kThreads];
    }
  }
#pragma unroll
  for (int k = 0; k < kLanesPerThread; ++k) shared_lanes[threadIdx.x + k * kThreads] = lanes[k];
  const double sum = fold(shared_lanes);
  if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

// One thread.
__global__ void decide_kernel(LaunchTable table) {
  decide(*global_pointer<const Signals>(table.signals), global_pointer<const NormDomain>(table.domains),
         table.num_domains, global_pointer<const double>(table.totals), global_pointer<Decision>(table.decision));
}

// --- launchers ----------------------------------------------------------------------------------------------------

using UpdateKernel = void (*)(LaunchTable, int64_t);

// [parameter dtype][gradient dtype], in the order of DtypeCode.
constexpr UpdateKernel kUpdateKernels[kDtypes][kDtypes] = {
    {update_kernel<float, float>, update_kernel<float, bf16>, update_kernel<float, fp16>, nullptr},
    {update_kernel<bf16, float>, update_kernel<bf16, bf16>, update_kernel<bf16, fp16>, nullptr},
    {update_kernel<fp16, float>, update_kernel<fp16, bf16>, update_kernel<fp16, fp16>, nullptr},
    {update_kernel<double, float>, update_kernel<double, bf16>, update_kernel<double, fp16>,
     update_kernel<double, double>},
};

cudaLaunchConfig_t launch_config(int64_t blocks, int64_t stream, int threads = kThreads) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  return config;
}

}  // namespace

namespace adamw_kernels {

int cuda_step(const void* table_address, int64_t stages, const CudaBatch* batches, int64_t num_batches,
              int64_t stream) {
  const LaunchTable table = *static_cast<const LaunchTable*>(table_address);
  cudaError_t error = cudaSuccess;
  if ((stages & kMeasure) && table.num_norm_chunks > 0) {
    const auto measure = launch_config(table.num_norm_chunks, stream);
    error = cudaLaunchKernelEx(&measure, measure_kernel, table);
  }
  if ((stages & kMeasure) && error == cudaSuccess) {
    const auto sum_up = launch_config(table.num_domains + 1, stream);
    error = cudaLaunchKernelEx(&sum_up, sum_up_kernel, table);
  }
  if ((stages & kDecide) && error == cudaSuccess) {
    const auto decide = launch_config(1, stream, 1);
    error = cudaLaunchKernelEx(&decide, decide_kernel, table);
  }
  if (!(stages & kUpdate) || table.num_tensors == 0 || error != cudaSuccess) return error;
  const auto prepare = launch_config((table.num_tensors + kThreads - 1) / kThreads, stream);
  error = cudaLaunchKernelEx(&prepare, prepare_kernel, table);
  for (int64_t i = 0; i < num_batches && error == cudaSuccess; ++i) {
    const CudaBatch& batch = batches[i];
    if (batch.begin == batch.end) continue;  // nothing but empty tensors
    const auto update = launch_config(batch.end - batch.begin, stream);
    error = cudaLaunchKernelEx(&update, kUpdateKernels[batch.param_dtype][batch.grad_dtype], table, batch.begin);
  }
  return error;
}

int cuda_load(const CudaBatch* batches, int64_t num_batches) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  for (const auto kernel : {measure_kernel, sum_up_kernel, decide_kernel, prepare_kernel}) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  }
  for (int64_t i = 0; i < num_batches && error == cudaSuccess; ++i) {
    error = cudaFuncGetAttributes(&attributes, kUpdateKernels[batches[i].param_dtype][batches[i].grad_dtype]);
  }
  return error;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace adamw_kernels
