// The CUDA kernels: which thread computes which element, and how the two stages are launched.
//
// What one element's update is stands in rule.h; how a value is stored, in formats.h. CMakeLists.txt turns
// contraction off for this file and keeps division, root and subnormals IEEE-754.
#include "cuda_moments8.h"
#include "cuda_step.h"
#include "cuda_vector.h"

namespace {

// --- index mapping --------------------------------------------------------------------------------------------

// Blocks a multiprocessor, at least: 5, 4 and 3 leave a thread 48, 64 and 80 registers, without spills. By itself ptxas
// would take more, mostly to interleave the random words of several elements. 0 leaves it alone: up to 72 for float64
// (1 would be taken as leave to use more).
template <typename P, typename G, typename M>
constexpr int kMinBlocks = sizeof(P) == 8                                       ? 0
                           : sizeof(P) + sizeof(G) == 8                         ? 5
                           : sizeof(P) == 4 && sizeof(M) == 4 && sizeof(G) == 2 ? 3
                                                                                : 4;
// Of some 1,150 instructions a round, on eight elements side by side, two blocks have enough to hide its loads'
// latency; three would spill on sm_90.
constexpr int kMinBlocks8 = 2;

// Elements a thread takes at once: 16 bytes of the narrower of weight and gradient; two of float64, of which four would
// be 80 registers.
template <typename P, typename G>
constexpr int kVectorLength = kVectorBytes / (sizeof(P) == 8 || sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));

// What a block works on.
struct Chunk {
  int64_t tensor;
  int64_t index;
  int64_t grad;  // 0: leave the tensor alone
};

__device__ __forceinline__ Chunk chunk_of_block(const LaunchTable& table, int64_t first_chunk) {
  const int64_t chunk = global_pointer<const int64_t>(table.chunks)[first_chunk + blockIdx.x];
  const int64_t tensor = chunk >> kChunkTensorShift;
  return {tensor, chunk & kChunkIndexMask, global_pointer<const int64_t>(table.grads)[tensor]};
}

template <typename P, typename G, typename M, typename V>
__device__ __forceinline__ Operands<P, G, M, V> operands(const LaunchTable& table, const Chunk& chunk) {
  const TensorRow& row = global_pointer<const TensorRow>(table.rows)[chunk.tensor];
  return {global_pointer<P>(row.param),
          global_pointer<const G>(chunk.grad),
          global_pointer<M>(row.exp_avg),
          global_pointer<V>(row.exp_avg_sq),
          row.flags,
          row.max_exp_avg_sq,
          row.remainder,
          table,
          static_cast<uint32_t>(chunk.tensor)};
}

template <bool kWithAmsgrad, bool kWithVariants, bool kWithBound, typename G, typename T, int N>
__device__ __forceinline__ void update_each(Vector<T, N>& weight, const Vector<G, N>& g, Vector<T, N>& m,
                                            Vector<T, N>& v, Vector<T, N>& v_max, const Coefficients<T>& c,
                                            int64_t flags) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    adamw<kWithAmsgrad, kWithVariants, kWithBound>(weight.at[k], load<T>(&g.at[k]), m.at[k], v.at[k], v_max.at[k], c,
                                                   flags);
  }
}

// SGD: the momentum buffer is all that it has beside the weight.
template <int N, typename At>
__device__ __forceinline__ void update_vector_of_sgd(const At& at, int64_t i, const Coefficients<typename At::T>& c) {
  using T = typename At::T;
  using M = typename At::M;
  constexpr bool kWide = sizeof(M) == sizeof(T);
  const bool has_buffer = (at.flags & kMomentum) != 0;
  Vector<T, N> weight;
  Vector<M, N> stored = {};
  load_weights(at, i, weight);
  const auto g = as_vector<const Vector<typename At::G, N>>(at.g + i);
  if (has_buffer) stored = as_vector<Vector<M, N>>(at.m + i);
  RandomBits random[N] = {};
  if (!kWide || rounds_weights_stochastically(at)) draw(at, i, random);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T buffer = load<T>(&stored.at[k]);
    sgdw(weight.at[k], load<T>(&g.at[k]), buffer, c, at.flags);
    if constexpr (kWide) {
      stored.at[k] = buffer;
    } else {
      store_stochastic(&stored.at[k], buffer, random[k].for_first_moment());
    }
  }
  if (has_buffer) as_vector<Vector<M, N>>(at.m + i) = stored;
  store_weights(at, i, weight, random);
  if (at.flags & kEma) average(at, i, weight);
}

// Elements [i, i + N) in one access an operand, or two where 16 bytes do not hold them. Branching on the flags here,
// between the loads and the stores, takes some 10 registers a thread fewer than a copy of the loops for each kind; two
// kinds, because every one more is 500 to 1,000 instructions to fetch. The average comes when the moments' registers
// are free again.
template <int N, typename At>
__device__ __forceinline__ void update_vector(const At& at, int64_t i, const Coefficients<typename At::T>& c) {
  using T = typename At::T;
  using M = typename At::M;
  constexpr bool kWide = sizeof(M) == sizeof(T);
  Vector<T, N> weight, m, v, v_max;
  load_weights(at, i, weight);
  const auto g = as_vector<const Vector<typename At::G, N>>(at.g + i);
  auto stored_m = as_vector<Vector<M, N>>(at.m + i);
  auto stored_v = as_vector<Vector<M, N>>(at.v + i);
  const bool amsgrad = kWide && (at.flags & kAmsgrad);
  if (amsgrad) {
    v_max = as_vector<Vector<T, N>>(at.v_max() + i);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) v_max.at[k] = T(-INFINITY);  // bounds nothing: the maximum is v itself, NaN or not
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    m.at[k] = load<T>(&stored_m.at[k]);
    v.at[k] = load<T>(&stored_v.at[k]);
  }
  if (at.flags & (kWide ? kVariants | kBound | kAmsgrad : kVariants)) {
    update_each<kWide, true, true>(weight, g, m, v, v_max, c, at.flags);
  } else {
    update_each<false, false, !kWide>(weight, g, m, v, v_max, c, at.flags);
  }
  RandomBits random[N] = {};
  if constexpr (kWide) {
    as_vector<Vector<T, N>>(at.m + i) = m;
    as_vector<Vector<T, N>>(at.v + i) = v;
    if (amsgrad) as_vector<Vector<T, N>>(at.v_max() + i) = v_max;
    if (rounds_weights_stochastically(at)) draw(at, i, random);
  } else {
    draw(at, i, random);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      store_stochastic(&stored_m.at[k], m.at[k], random[k].for_first_moment());
      store_stochastic(&stored_v.at[k], v.at[k], random[k].for_second_moment());
    }
    as_vector<Vector<M, N>>(at.m + i) = stored_m;
    as_vector<Vector<M, N>>(at.v + i) = stored_v;
  }
  store_weights(at, i, weight, random);
  if (at.flags & kEma) average(at, i, weight);
}

template <bool kIsSgd, int N, typename At>
__device__ __forceinline__ void update_some(const At& at, int64_t i, const Coefficients<typename At::T>& c) {
  if constexpr (kIsSgd) {
    update_vector_of_sgd<N>(at, i, c);
  } else {
    update_vector<N>(at, i, c);
  }
}

// One block a chunk. Chunk boundaries are moved down by `past_boundary` elements, so that vectors start on 16-byte
// boundaries when all operands are the same number of elements past one; then only a tensor's first and last few
// elements go one by one. Operands that disagree go one by one throughout. M: what the moments are stored as.
template <typename P, typename G, typename M, bool kIsSgd>
__device__ __forceinline__ void update_chunk(const LaunchTable& table, int64_t first_chunk) {
  constexpr int N = kVectorLength<P, G>;
  static_assert(N * sizeof(P) >= kVectorBytes, "at most one vector lies partly before a tensor's first element");
  if (global_pointer<const Decision>(table.decision)->skip) return;
  const Chunk chunk = chunk_of_block(table, first_chunk);
  if (chunk.grad == 0) return;
  const auto at = operands<P, G, M, M>(table, chunk);
  const auto c = at.of_tensor();
  const int64_t numel = at.row().numel;

  const auto past_boundary = static_cast<int64_t>((reinterpret_cast<uint64_t>(at.p) & (kVectorBytes - 1)) / sizeof(P));
  const bool has_first = !kIsSgd || (at.flags & kMomentum), has_maximum = !kIsSgd && (at.flags & kAmsgrad);
  const bool aligned = start_vectors<N>(at, past_boundary) && (!has_first || starts_vector<N>(at.m, past_boundary)) &&
                       (kIsSgd || starts_vector<N>(at.v, past_boundary)) &&
                       (!has_maximum || starts_vector<N>(at.v_max(), past_boundary));
  const int64_t start = chunk.index * table.chunk_size - (aligned ? past_boundary : 0);
  const int64_t begin = start > 0 ? start : 0;
  const bool is_last = (chunk.index + 1) * table.chunk_size >= numel;
  const int64_t end = is_last ? numel : start + table.chunk_size;

  // Whole vectors are [body_begin, body_end); what lies before and after them goes one by one.
  int64_t body_begin = end;
  if (aligned && start + N <= end) body_begin = begin > start ? start + N : start;
  const int64_t body = (end - body_begin) / N * N;
  const int64_t edges = end - begin - body;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < edges; j += kThreads) {
    const int64_t i = begin + j;
    update_some<kIsSgd, 1>(at, i < body_begin ? i : i + body, c);
  }
  const int64_t body_end = body_begin + body;
#pragma unroll 1
  for (int64_t i = body_begin + static_cast<int64_t>(threadIdx.x) * N; i < body_end; i += kThreads * N) {
    update_some<kIsSgd, N>(at, i, c);
  }
}

// Adam's rule.
template <typename P, typename G, typename M>
__global__ void __launch_bounds__(kThreads, kMinBlocks<P, G, M>) update_kernel(LaunchTable table, int64_t first_chunk) {
  update_chunk<P, G, M, false>(table, first_chunk);
}

// SGD's.
template <typename P, typename G, typename M>
__global__ void __launch_bounds__(kThreads, kMinBlocks<P, G, M>) sgdw_kernel(LaunchTable table, int64_t first_chunk) {
  update_chunk<P, G, M, true>(table, first_chunk);
}

// Adam's rule for moments in 8 bits, whose groups of 16 start at the tensor's first element: a thread takes half a
// group where all operands start vectors there, else, and in a last group with elements missing, one element.
template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, kMinBlocks8) update8_kernel(LaunchTable table, int64_t first_chunk) {
  constexpr int N = kGroup / 2;
  if (global_pointer<const Decision>(table.decision)->skip) return;
  const Chunk chunk = chunk_of_block(table, first_chunk);
  if (chunk.grad == 0) return;
  const auto at = operands<P, G, int8_t, uint8_t>(table, chunk);
  const auto c = at.of_tensor();
  auto* words = global_pointer<uint16_t>(at.row().groups);
  const int64_t begin = chunk.index * table.chunk_size;
  const int64_t end = begin + table.chunk_size < at.row().numel ? begin + table.chunk_size : at.row().numel;
  const bool aligned = start_vectors<N>(at, 0) && starts_vector<N>(at.m, 0) && starts_vector<N>(at.v, 0);
  const int64_t body_end = aligned ? end / kGroup * kGroup : begin;
  const int64_t padded_end = (end + kGroup - 1) / kGroup * kGroup;
#pragma unroll 1
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * N; i < body_end; i += kThreads * N) {
    update_part_of_group<N>(at, words, i, true, c);
  }
#pragma unroll 1
  for (int64_t i = body_end + threadIdx.x; i < padded_end; i += kThreads) {
    update_part_of_group<1>(at, words, i, i < end, c);
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
  const Coefficients<double> c = coefficients(global_pointer<const HyperRow>(table.hypers)[row.hyper], row,
                                              static_cast<int64_t>(t), decision.inv_scale, decision.norms[row.norm]);
  const int64_t out = table.coefficients + i * kCoefficientRowBytes;
  if (row.flags & kFloat64) {
    write_coefficients(global_pointer<double>(out), c);
  } else {
    write_coefficients(global_pointer<float>(out), c);
  }
  // Read where anything is rounded stochastically.
  *global_pointer<uint64_t>(out + kKeyOffset) = random_key(row.random_stream, static_cast<int64_t>(t));
  if (row.scale != 0) {
    auto& scaling = *global_pointer<Coefficients<float>>(out);
    const HyperRow& hyper = global_pointer<const HyperRow>(table.hypers)[row.hyper];
    const double beta2 = hyper_value(hyper.beta2, (hyper.source >> 4) & 3);
    advance_scale(*global_pointer<float>(row.scale), beta2, scaling.unscale, scaling.rescale);
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

// [moments' format][parameter dtype][gradient dtype], in the order of MomentFormat and DtypeCode.
constexpr UpdateKernel kAdamwKernels[kMomentFormats][kDtypes][kDtypes] = {
    {
        {update_kernel<float, float, float>, update_kernel<float, bf16, float>, update_kernel<float, fp16, float>},
        {update_kernel<bf16, float, float>, update_kernel<bf16, bf16, float>, update_kernel<bf16, fp16, float>},
        {update_kernel<fp16, float, float>, update_kernel<fp16, bf16, float>, update_kernel<fp16, fp16, float>},
        {update_kernel<double, float, double>, update_kernel<double, bf16, double>, update_kernel<double, fp16, double>,
         update_kernel<double, double, double>},
    },
    {
        {update_kernel<float, float, bf16>, update_kernel<float, bf16, bf16>, update_kernel<float, fp16, bf16>},
        {update_kernel<bf16, float, bf16>, update_kernel<bf16, bf16, bf16>, update_kernel<bf16, fp16, bf16>},
        {update_kernel<fp16, float, bf16>, update_kernel<fp16, bf16, bf16>, update_kernel<fp16, fp16, bf16>},
    },
    {
        {update8_kernel<float, float>, update8_kernel<float, bf16>, update8_kernel<float, fp16>},
        {update8_kernel<bf16, float>, update8_kernel<bf16, bf16>, update8_kernel<bf16, fp16>},
        {update8_kernel<fp16, float>, update8_kernel<fp16, bf16>, update8_kernel<fp16, fp16>},
    },
};
constexpr UpdateKernel kSgdwKernels[kMomentFormats - 1][kDtypes][kDtypes] = {
    {
        {sgdw_kernel<float, float, float>, sgdw_kernel<float, bf16, float>, sgdw_kernel<float, fp16, float>},
        {sgdw_kernel<bf16, float, float>, sgdw_kernel<bf16, bf16, float>, sgdw_kernel<bf16, fp16, float>},
        {sgdw_kernel<fp16, float, float>, sgdw_kernel<fp16, bf16, float>, sgdw_kernel<fp16, fp16, float>},
        {sgdw_kernel<double, float, double>, sgdw_kernel<double, bf16, double>, sgdw_kernel<double, fp16, double>,
         sgdw_kernel<double, double, double>},
    },
    {
        {sgdw_kernel<float, float, bf16>, sgdw_kernel<float, bf16, bf16>, sgdw_kernel<float, fp16, bf16>},
        {sgdw_kernel<bf16, float, bf16>, sgdw_kernel<bf16, bf16, bf16>, sgdw_kernel<bf16, fp16, bf16>},
        {sgdw_kernel<fp16, float, bf16>, sgdw_kernel<fp16, bf16, bf16>, sgdw_kernel<fp16, fp16, bf16>},
    },
};

UpdateKernel update_kernel_of(const adamw_kernels::CudaBatch& batch) {
  const auto& kernels = batch.is_sgd ? kSgdwKernels[batch.moment_format] : kAdamwKernels[batch.moment_format];
  return kernels[batch.param_dtype][batch.grad_dtype];
}

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
    error = cudaLaunchKernelEx(&update, update_kernel_of(batch), table, batch.begin);
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
    error = cudaFuncGetAttributes(&attributes, update_kernel_of(batches[i]));
  }
  return error;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace adamw_kernels
