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

// out = the sum of x over each `lanes` neighbours, times the sum of that, three times over: a power of two of lanes.
__global__ void lane_sums_kernel(const uint32_t* x, unsigned lanes, uint32_t* out) {
  const unsigned t = threadIdx.x, lane = t % 32, first = blockIdx.x * 64;
  if (x[first + t / lanes * lanes] == 0) return;  // lanes that exchange return together
  const unsigned mask = (lanes == 32 ? ~0u : (1u << lanes) - 1u) << (lane / lanes * lanes);
  uint32_t product = x[first + t];
  for (int k = 0; k < 3; ++k) {
    uint32_t sum = product;
    for (unsigned other = 1; other < lanes; other *= 2) sum += __shfl_xor_sync(mask, sum, other);
    product *= sum;
  }
  out[first + t] = product;
}

enum Mistake {
  kLaneReturns,
  kLaneWaitsTwice,
  kOtherLine,
  kOtherMask,
  kOtherLane,
  kNotInMask,
  kPartnerNotInMask,
  kAtBarrier
};

// Lanes exchange with their neighbours; the odd one out makes a mistake.
__global__ void mistaken_exchange_kernel(Mistake kind, unsigned odd_one, uint32_t* out) {
  const bool odd = threadIdx.x == odd_one;
  if (kind == kLaneReturns && odd) return;
  const unsigned pair = 3u << (threadIdx.x % 32 & ~1u), lane = 1u << threadIdx.x % 32;
  const unsigned mask = !odd ? pair : kind == kOtherMask ? ~0u : kind == kNotInMask ? pair & ~lane : pair;
  uint32_t x = threadIdx.x;
  if (kind == kOtherLine && odd) {
    x = __shfl_xor_sync(mask, x, 1);
  } else if (kind == kAtBarrier && odd) {
    __syncthreads();
  } else {
    x = __shfl_xor_sync(kind == kPartnerNotInMask && odd ? lane : mask, x, kind == kOtherLane && odd ? 0 : 1);
  }
  if (kind == kLaneWaitsTwice && odd) x += __shfl_xor_sync(mask, x, 1);
  out[threadIdx.x] = x;
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

int lane_sums(int blocks, int threads, bool backwards, unsigned lanes, const uint32_t* x, uint32_t* out) {
  return launch(blocks, threads, backwards, lane_sums_kernel, x, lanes, out);
}

int mistaken_exchange(int blocks, int threads, bool backwards, int kind, unsigned odd_one, uint32_t* out) {
  return launch(blocks, threads, backwards, mistaken_exchange_kernel, static_cast<Mistake>(kind), odd_one, out);
}

int misaligned(int blocks, int threads, bool backwards, unsigned odd_one, const double* x, double* out) {
  return launch(blocks, threads, backwards, misaligned_kernel, reinterpret_cast<const char*>(x), odd_one, out);
}

}  // extern "C"
#pragma GCC visibility pop
