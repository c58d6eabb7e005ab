// As much of the CUDA runtime as csrc/cuda.cu uses, for a plain C++ compiler; launch.cpp says how a launch runs. Stands
// in for the toolkit's header of the same name; see tests/test_cuda_on_host.py, and tests/test_cuda_stand_in.py for
// what it can be trusted with.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Blocks run one after another, so one copy serves them all. The section is where a launch finds it, to write over it
// before each block (GCC 12 ignores the section in templates: there a block finds what the one before left); `used`
// keeps the compiler from taking the kernel's stores for the only ones.
#define __shared__ static __attribute__((section("shared_memory"), used))

// The line tells barriers apart that threads of one block reach in different branches.
#define __syncthreads() wait_at_barrier(__LINE__)
void wait_at_barrier(int line);

// What the lane whose number differs in the bits of `xor_lane` offers: the lanes of `mask` wait for one another. All of
// them must name the same mask, and the line must be the same.
#define __shfl_xor_sync(mask, value, xor_lane) exchange(mask, value, xor_lane, __LINE__)
uint32_t exchange(unsigned mask, uint32_t value, unsigned xor_lane, int line);

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the CUDA stand-in"; }

struct cudaFuncAttributes {};

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel* kernel) {
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

// One launch at a time, on one thread of the CPU.
inline dim3 blockIdx;
inline dim3 threadIdx;

// Whether launches run their last thread first. A GPU promises no order, so none may matter.
inline bool last_thread_first = false;

// How many basic blocks code compiled with -fsanitize-coverage=trace-pc has entered.
inline int64_t basic_blocks_entered = 0;

// How many addresses out of tables have become pointers. A kernel that does so for every vector shows how many it made.
inline int64_t pointers_made = 0;

inline void* __cvta_global_to_generic(size_t address) {
  ++pointers_made;
  return reinterpret_cast<void*>(address);
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  return run_grid(*config, [&] { kernel(arguments...); });
}
