// What tests/test_cuda_on_host.py calls.
#include "cuda_runtime.h"
#include "cuda_step.h"

// Stages of a step. Returns a cudaError_t. `*basic_blocks`: how many were entered.
extern "C" __attribute__((visibility("default"))) int step(const void* table, int64_t stages, const void* batches,
                                                           int64_t num_batches, int backwards, int64_t* basic_blocks) {
  last_thread_first = backwards != 0;
  basic_blocks_entered = 0;
  const int error =
      adamw_kernels::cuda_step(table, stages, static_cast<const adamw_kernels::CudaBatch*>(batches), num_batches,
                               /*stream=*/0);
  *basic_blocks = basic_blocks_entered;
  return error;
}
