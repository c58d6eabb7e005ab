// The CUDA path: one step over one device's launch table.
#pragma once

#include <stdint.h>

namespace adamw_kernels {

// Chunks [begin, end) of a launch table whose tensors share the rule, both dtypes and the moments' format.
struct CudaBatch {
  int64_t is_sgd;
  int64_t param_dtype;
  int64_t grad_dtype;
  int64_t moment_format;
  int64_t begin;
  int64_t end;
};

// These stages (kMeasure, kDecide, kUpdate) of a step. `table`: a LaunchTable in host memory whose addresses are device
// addresses. Asynchronous on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t; 0 is success.
int cuda_step(const void* table, int64_t stages, const CudaBatch* batches, int64_t num_batches, int64_t stream);

// Loads every kernel that these batches launch, without launching any. Returns a cudaError_t.
int cuda_load(const CudaBatch* batches, int64_t num_batches);

const char* cuda_error_string(int error);

}  // namespace adamw_kernels
