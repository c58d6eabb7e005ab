// What tests/test_cuda_on_host.py calls. csrc/cuda.cu is compiled with -fsanitize=alignment and
// -fsanitize-coverage=trace-pc; the two callbacks that this makes it call are defined here.
#include <setjmp.h>

#include "cuda_runtime.h"
#include "cuda_step.h"

namespace {

jmp_buf after_step;
int64_t blocks_entered = 0;

}  // namespace

// An access to an address that is no multiple of its type's alignment: a fault on a GPU. Nothing on the way back up has
// a destructor.
extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1(void*, void*) { longjmp(after_step, 1); }

// Every basic block, as it is entered.
extern "C" void __sanitizer_cov_trace_pc() { ++blocks_entered; }

// One step. Returns a cudaError_t, or -1 after a misaligned access. `*basic_blocks`: how many were entered.
extern "C" __attribute__((visibility("default"))) int step(const void* table, const void* batches, int64_t num_batches,
                                                           int backwards, int64_t* basic_blocks) {
  last_thread_first = backwards != 0;
  blocks_entered = 0;
  if (setjmp(after_step) != 0) return -1;
  const int error = adamw_kernels::cuda_step(table, static_cast<const adamw_kernels::CudaBatch*>(batches), num_batches,
                                             /*stream=*/0);
  *basic_blocks = blocks_entered;
  return error;
}
