// How a launch runs: block after block, and in a block thread after thread, each up to its next barrier or exchange.
//
// A thread needs a stack of its own only while it waits. So one fiber runs thread after thread until one of them waits;
// that fiber then stays with that thread, and the next fiber goes on with the threads that have not started. A kernel
// that never waits runs on one fiber alone, at the cost of plain calls.
//
// ucontext makes a fiber, but setjmp switches: 26 ns there and back, against 320 by swapcontext, which makes a system
// call each way to save the signal mask.
#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another stack for a mistake
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "cuda_runtime.h"

// Where all __shared__ variables lie. The linker defines both if there are any.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_shared_memory[];

namespace {

constexpr unsigned kMaxBlocks = 0x7fffffff, kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  bool made;
  jmp_buf here;  // where it goes on
};

Fiber fibers[kMaxThreads];
alignas(16) char stacks[kMaxThreads][kStackBytes];  // pages that no thread has used take no memory
jmp_buf scheduler;
Fiber* running = nullptr;  // null outside of kernels

// The fibers that hold no thread, those whose thread can go on, and those whose thread waits at `barrier`.
struct FiberStack {
  Fiber* at[kMaxThreads];
  unsigned size;
  void push(Fiber* fiber) { at[size++] = fiber; }
  Fiber& pop() { return *at[--size]; }
};
FiberStack idle, ready, waiting;
int barrier;

// What a thread offers to the other lanes of its warp, while `fiber` is not null; then what it gets.
struct Offer {
  Fiber* fiber;
  int line;
  unsigned mask;
  unsigned xor_lane;
  uint32_t value;
};
Offer offers[kMaxThreads];
unsigned num_offers;  // that wait

const std::function<void()>* thread_body;
unsigned num_threads;  // of a block
unsigned num_started;  // of the block's threads, in their order
cudaError_t error;

[[noreturn]] void fail(cudaError_t reason) {
  error = reason;
  _longjmp(scheduler, 1);  // for good: nothing on the fiber's stack has a destructor
}

// Back to the scheduler, until it resumes this fiber.
void yield() {
  if (_setjmp(running->here) == 0) _longjmp(scheduler, 1);
}

// What every fiber does, block after block.
void run_threads() {
  for (;;) {
    while (num_started < num_threads) {
      threadIdx.x = last_thread_first ? num_threads - 1 - num_started : num_started;
      ++num_started;
      (*thread_body)();
    }
    idle.push(running);
    yield();
  }
}

// Returns when a thread of this fiber waits, or the fiber finds no more threads to start.
void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.made) _longjmp(fiber.here, 1);
    fiber.made = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[&fiber - fibers];
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, run_threads, 0);
    setcontext(&context);
  }
  running = nullptr;
}

void run_block() {
  // What the block before left there must not be relied on: all ones are a NaN, or -1.
  memset(__start_shared_memory, 0xff, static_cast<size_t>(__stop_shared_memory - __start_shared_memory));
  num_started = num_offers = ready.size = waiting.size = idle.size = 0;
  for (unsigned i = num_threads; i-- > 0;) {
    idle.push(&fibers[i]);
    offers[i].fiber = nullptr;
  }
  while (error == cudaSuccess) {
    if (ready.size > 0) {
      resume(ready.pop());
    } else if (num_started < num_threads) {
      resume(idle.pop());
    } else if (waiting.size == num_threads) {
      while (waiting.size > 0) ready.push(&waiting.pop());  // the first to have come goes on first
    } else {
      break;
    }
  }
  // A barrier or an exchange that some threads wait at and others never reach.
  if (error == cudaSuccess && waiting.size + num_offers != 0) error = cudaErrorLaunchFailure;
}

}  // namespace

void wait_at_barrier(int line) {
  if (waiting.size == 0) barrier = line;
  if (barrier != line) fail(cudaErrorLaunchFailure);
  waiting.push(running);
  const dim3 index = threadIdx;
  yield();
  threadIdx = index;
}

uint32_t exchange(unsigned mask, uint32_t value, unsigned xor_lane, int line) {
  const dim3 index = threadIdx;
  const unsigned lane = index.x % kWarp, first_of_warp = index.x - lane;
  const auto in_mask = [&](unsigned i) { return i < kWarp && (mask >> i & 1) != 0; };
  if (!in_mask(lane) || !in_mask(lane ^ xor_lane)) fail(cudaErrorLaunchFailure);
  offers[index.x] = {running, line, mask, xor_lane, value};
  ++num_offers;
  bool complete = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!in_mask(i)) continue;
    if (first_of_warp + i >= num_threads) fail(cudaErrorLaunchFailure);
    const Offer& other = offers[first_of_warp + i];
    complete = complete && other.fiber != nullptr;
    if (other.fiber != nullptr && (other.line != line || other.mask != mask || other.xor_lane != xor_lane)) {
      fail(cudaErrorLaunchFailure);
    }
  }
  if (complete) {
    uint32_t values[kWarp];
    for (unsigned i = 0; i < kWarp; ++i) values[i] = in_mask(i) ? offers[first_of_warp + i].value : 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!in_mask(i)) continue;
      Offer& other = offers[first_of_warp + i];
      other.value = values[i ^ xor_lane];
      if (i != lane) ready.push(other.fiber);
      other.fiber = nullptr;
      --num_offers;
    }
  } else {
    yield();
    threadIdx = index;
  }
  return offers[index.x].value;
}

// Calls `kernel` as every thread of every block.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned blocks = config.gridDim.x;
  num_threads = config.blockDim.x;
  const bool fits = blocks > 0 && blocks <= kMaxBlocks && num_threads > 0 && num_threads <= kMaxThreads;
  if (!fits || config.dynamicSmemBytes != 0) return cudaErrorInvalidConfiguration;
  thread_body = &kernel;
  error = cudaSuccess;
  for (unsigned i = 0; i < blocks && error == cudaSuccess; ++i) {
    blockIdx.x = last_thread_first ? blocks - 1 - i : i;
    run_block();
  }
  // Threads that an error left waiting are given up, with their fibers.
  if (error != cudaSuccess) {
    for (Fiber& fiber : fibers) fiber.made = false;
  }
  return error;
}

// What -fsanitize=alignment calls at an access to an address that is no multiple of its type's alignment: a fault on a
// GPU.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) {
  if (running != nullptr) fail(cudaErrorMisalignedAddress);
  fputs("misaligned access outside of a kernel\n", stderr);
  abort();
}

// What -fsanitize-coverage=trace-pc calls as it enters a basic block.
extern "C" void __sanitizer_cov_trace_pc() { ++basic_blocks_entered; }
