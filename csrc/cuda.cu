// The CUDA kernels: which thread computes which element, and how the two stages are launched.
//
// What one element's update is stands in rule.h; how a value is stored, in formats.h. CMakeLists.txt turns
// contraction off for this file and keeps division, root and subnormals IEEE-754.
#include <cuda_runtime.h>

#include "cuda_step.h"
#include "rule.h"

namespace {

// --- index mapping --------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// Blocks a multiprocessor, at least: 4 are 64 registers a thread, where ptxas by itself takes up to 70 beside a 16-bit
// operand. 0 leaves it alone: 44 for float32 throughout, up to 78 for float64 (1 would be taken as leave to use more).
template <typename P, typename G>
constexpr int kMinBlocks = sizeof(P) < 8 && sizeof(P) + sizeof(G) < 8 ? 4 : 0;

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

// Elements a thread takes at once: 16 bytes of the narrowest operand, but never more than 32 of the widest.
template <typename P, typename G>
struct vector_length {
  using T = typename compute_type<P>::type;
  static constexpr int narrow = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  static constexpr int by_narrow = kVectorBytes / narrow;
  static constexpr int by_wide = 2 * kVectorBytes / sizeof(T);
  static constexpr int value = by_narrow < by_wide ? by_narrow : by_wide;
};

template <int N, typename T>
__device__ __forceinline__ bool starts_vector(const T* base, int64_t shift) {
  return (reinterpret_cast<uint64_t>(base - shift) & (alignof(Vector<T, N>) - 1)) == 0;
}

template <typename V, typename T>
__device__ __forceinline__ V& as_vector(T* element) {
  return *reinterpret_cast<V*>(element);
}

template <bool kWithAmsgrad, bool kWithL2, typename P, typename G, typename T, int N>
__device__ __forceinline__ void update_each(Vector<P, N>& p, const Vector<G, N>& g, Vector<T, N>& m, Vector<T, N>& v,
                                            Vector<T, N>& v_max, const Coefficients<T>& c) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T weight = load<T>(&p.at[k]);
    adamw<kWithAmsgrad, kWithL2>(weight, load<T>(&g.at[k]), m.at[k], v.at[k], v_max.at[k], c);
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
};

// Elements [i, i + N) in one access an operand, or two where 16 bytes do not hold them. `kind`: the tensor's kAmsgrad
// and kL2, the same for the whole block. Branching on it here, between the loads and the stores, takes some 10
// registers a thread fewer than a copy of the loops for each kind.
template <int N, typename P, typename G, typename T>
__device__ __forceinline__ void update_vector(const Operands<P, G, T>& at, int64_t i, int64_t kind,
                                              const Coefficients<T>& c) {
  auto p = as_vector<Vector<P, N>>(at.p + i);
  const auto g = as_vector<const Vector<G, N>>(at.g + i);
  auto m = as_vector<Vector<T, N>>(at.m + i);
  auto v = as_vector<Vector<T, N>>(at.v + i);
  Vector<T, N> v_max = {};
  if (kind & kAmsgrad) v_max = as_vector<Vector<T, N>>(at.v_max + i);
  switch (kind) {
    case 0:
      update_each<false, false>(p, g, m, v, v_max, c);
      break;
    case kAmsgrad:
      update_each<true, false>(p, g, m, v, v_max, c);
      break;
    case kL2:
      update_each<false, true>(p, g, m, v, v_max, c);
      break;
    default:
      update_each<true, true>(p, g, m, v, v_max, c);
  }
  as_vector<Vector<P, N>>(at.p + i) = p;
  as_vector<Vector<T, N>>(at.m + i) = m;
  as_vector<Vector<T, N>>(at.v + i) = v;
  if (kind & kAmsgrad) as_vector<Vector<T, N>>(at.v_max + i) = v_max;
}

// One block a chunk. Chunk boundaries are moved down by `past_boundary` elements, so that vectors start on 16-byte
// boundaries when all operands are the same number of elements past one; then only a tensor's first and last few
// elements go one by one. Operands that disagree go one by one throughout.
template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, kMinBlocks<P, G>) update_kernel(LaunchTable table, int64_t first_chunk) {
  using T = typename compute_type<P>::type;
  constexpr int N = vector_length<P, G>::value;
  static_assert(N * sizeof(P) >= kVectorBytes, "at most one vector lies partly before a tensor's first element");
  const int64_t chunk = global_pointer<const int64_t>(table.chunks)[first_chunk + blockIdx.x];
  const int64_t tensor = chunk >> kChunkTensorShift;
  const int64_t index = chunk & kChunkIndexMask;
  const int64_t grad = global_pointer<const int64_t>(table.grads)[tensor];
  if (grad == 0) return;
  const TensorRow row = global_pointer<const TensorRow>(table.rows)[tensor];
  const auto c = *global_pointer<const Coefficients<T>>(table.coefficients + tensor * kCoefficientRowBytes);
  const Operands<P, G, T> at = {global_pointer<P>(row.param), global_pointer<const G>(grad),
                                global_pointer<T>(row.exp_avg), global_pointer<T>(row.exp_avg_sq),
                                global_pointer<T>(row.max_exp_avg_sq)};
  const int64_t kind = row.flags & (kAmsgrad | kL2);

  const auto past_boundary = static_cast<int64_t>((row.param & (kVectorBytes - 1)) / sizeof(P));
  const bool aligned = starts_vector<N>(at.p, past_boundary) && starts_vector<N>(at.g, past_boundary) &&
                       starts_vector<N>(at.m, past_boundary) && starts_vector<N>(at.v, past_boundary) &&
                       (!(kind & kAmsgrad) || starts_vector<N>(at.v_max, past_boundary));
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
    update_vector<1>(at, i < body_begin ? i : i + body, kind, c);
  }
#pragma unroll 1
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * N; j < body; j += kThreads * N) {
    update_vector<N>(at, body_begin + j, kind, c);
  }
}

// One thread a tensor.
__global__ void __launch_bounds__(kThreads) prepare_kernel(LaunchTable table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= table.num_tensors) return;
  if (global_pointer<const int64_t>(table.grads)[i] == 0) return;
  const TensorRow& row = global_pointer<const TensorRow>(table.rows)[i];
  float* step = global_pointer<float>(row.step);
  const float t = *step + 1.0f;
  *step = t;
  const Coefficients<double> c =
      coefficients(global_pointer<const HyperRow>(table.hypers)[row.hyper], row.flags, static_cast<int64_t>(t));
  const int64_t out = table.coefficients + i * kCoefficientRowBytes;
  if (row.flags & kFloat64) {
    write_coefficients(global_pointer<double>(out), c);
  } else {
    write_coefficients(global_pointer<float>(out), c);
  }
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

cudaLaunchConfig_t launch_config(int64_t blocks, int64_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  return config;
}

}  // namespace

namespace adamw_kernels {

int cuda_step(const void* table_address, const CudaBatch* batches, int64_t num_batches, int64_t stream) {
  const LaunchTable table = *static_cast<const LaunchTable*>(table_address);
  if (table.num_tensors == 0) return cudaSuccess;
  const auto prepare = launch_config((table.num_tensors + kThreads - 1) / kThreads, stream);
  cudaError_t error = cudaLaunchKernelEx(&prepare, prepare_kernel, table);
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
  cudaError_t error = cudaFuncGetAttributes(&attributes, prepare_kernel);
  for (int64_t i = 0; i < num_batches && error == cudaSuccess; ++i) {
    error = cudaFuncGetAttributes(&attributes, kUpdateKernels[batches[i].param_dtype][batches[i].grad_dtype]);
  }
  return error;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace adamw_kernels
