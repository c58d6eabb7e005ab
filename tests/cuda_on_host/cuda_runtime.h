// As much of the CUDA runtime as csrc/cuda.cu uses, for a plain C++ compiler: a launch runs every thread of every block
// in turn. Stands in for the toolkit's header of the same name; see tests/test_cuda_on_host.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDeviceFunction = 98 };

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

inline thread_local dim3 blockIdx;
inline thread_local dim3 threadIdx;

// Whether launches run their last thread first. A GPU promises no order, so none may matter.
inline thread_local bool last_thread_first = false;

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  constexpr uint64_t kMaxBlocks = 0x7fffffff, kMaxThreads = 1024;
  const uint64_t blocks = config->gridDim.x, threads = config->blockDim.x;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (blocks == 0 || blocks > kMaxBlocks || threads == 0 || threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  for (uint64_t i = 0; i < blocks * threads; ++i) {
    const uint64_t thread = last_thread_first ? blocks * threads - 1 - i : i;
    blockIdx = dim3(static_cast<unsigned>(thread / threads), 0, 0);
    threadIdx = dim3(static_cast<unsigned>(thread % threads), 0, 0);
    kernel(arguments...);
  }
  return cudaSuccess;
}
