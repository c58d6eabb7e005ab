// What tests/test_cuda_on_host.py calls.
#include "cuda_runtime.h"
#include "cuda_step.h"

// Stages of a step. Returns a cudaError_t. `counts`: basic blocks entered, pointers made.
extern "C" __attribute__((visibility("default"))) int step(const void* table, int64_t stages, const void* batches,
                                                           int64_t num_batches, int backwards, int64_t* counts) {
  last_thread_first = backwards != 0;
  basic_blocks_entered = pointers_made = 0;
  const int error =
      adamw_kernels::cuda_step(table, stages, static_cast<const adamw_kernels::CudaBatch*>(batches), num_batches,
                               /*stream=*/0);
  counts[0] = basic_blocks_entered;
  counts[1] = pointers_made;
  return error;
}
