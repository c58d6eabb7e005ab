// What an ISA's object file offers to cpu.cpp: plain loops. External names would clash between the
// three objects, so each exports one table of function pointers.
#pragma once

#include <stdint.h>

namespace adamw_kernels {

struct CpuLoops {
  // Writes the partial sums of norm chunks [begin, end).
  void (*measure)(const void* table, int64_t begin, int64_t end);
  // Adds them up, domain by domain.
  void (*sum_up)(const void* table);
  // Makes the decision out of the totals.
  void (*decide)(const void* table);
  // Advances the steps of tensors [begin, end) and writes their coefficient rows; nothing if the step is skipped.
  void (*prepare)(const void* table, int64_t begin, int64_t end);
  // Updates the elements of chunks [begin, end).
  void (*update)(const void* table, int64_t begin, int64_t end);
};

extern const CpuLoops kBaselineLoops;
#ifdef ADAMW_KERNELS_X86
extern const CpuLoops kAvx2Loops;
extern const CpuLoops kAvx512Loops;
#endif

}  // namespace adamw_kernels
