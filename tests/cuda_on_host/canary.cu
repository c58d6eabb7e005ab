// Kernels that tests/test_cuda_stand_in.py runs: right ones, and ones with a mistake that the stand-in must show.
#include <cuda_runtime.h>

namespace {

constexpr int kMaxThreads = 1024;

enum Barrier { kNone, kAfterStore, kInFold, kAfterRead };  // kInFold: between its rounds

// out = x * S^3 with S the sum of x over the block: x times the sum of x, then times the sum of that, each by a tree in
// the same shared memory. A block whose first x is negative returns. The barrier `left_out` is missing. `mirrored`:
// threads swap places, the first with the last.
__global__ void sums_kernel(const double* x, int threads, Barrier left_out, bool mirrored, double* out) {
  __shared__ double lanes[kMaxThreads];
  const int t = mirrored ? threads - 1 - static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * threads;
  if (x[first] < 0) return;
  double product = x[first + t];
  for (int k = 0; k < 2; ++k) {
    lanes[t] = product;
    if (left_out != kAfterStore) __syncthreads();
    for (int h = threads / 2; h > 0; h /= 2) {
      if (t < h) lanes[t] += lanes[t + h];
      if (left_out != kInFold || h == 1) __syncthreads();
    }
    product *= lanes[0];
    if (left_out != kAfterRead) __syncthreads();
  }
  out[first + t] = product;
}

// Hands on what only the first block stored.
__global__ void unset_kernel(double* out) {
  __shared__ double value;
  if (blockIdx.x == 0 && threadIdx.x == 0) value = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

enum Divergence { kReturns, kWaitsTwice, kOtherBarrier };

// One thread does not reach the barrier that the others wait at, or they do not reach its own.
__global__ void divergent_kernel(Divergence kind, unsigned odd_one) {
  const bool odd = threadIdx.x == odd_one;
  if (kind == kReturns && odd) return;
  if (kind == kOtherBarrier && odd) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (kind == kWaitsTwice && odd) __syncthreads();
}

// Between two barriers, one thread reads from an odd address.
__global__ void misaligned_kernel(const char* address, unsigned odd_one, double* out) {
  __syncthreads();
  if (threadIdx.x == odd_one) *out = *reinterpret_cast<const double*>(address + 1);
  __syncthreads();
}

template <typename... Parameters, typename... Arguments>
int launch(int blocks, int threads, bool backwards, void (*kernel)(Parameters...), Arguments... arguments) {
  last_thread_first = backwards;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int sums(int blocks, int threads, bool backwards, int left_out, bool mirrored, const double* x, double* out) {
  return launch(blocks, threads, backwards, sums_kernel, x, threads, static_cast<Barrier>(left_out), mirrored, out);
}

int unset(int blocks, int threads, bool backwards, double* out) {
  return launch(blocks, threads, backwards, unset_kernel, out);
}

int divergent(int blocks, int threads, bool backwards, int kind, unsigned odd_one) {
  return launch(blocks, threads, backwards, divergent_kernel, static_cast<Divergence>(kind), odd_one);
}

int misaligned(int blocks, int threads, bool backwards, unsigned odd_one, const double* x, double* out) {
  return launch(blocks, threads, backwards, misaligned_kernel, reinterpret_cast<const char*>(x), odd_one, out);
}

}  // extern "C"
#pragma GCC visibility pop
