// The native CPU path: which ISAs this machine has, and one step over a launch table.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace adamw_kernels {

// Every ISA compiled in, best last, and whether this CPU can run it.
struct CpuIsa {
  std::string name;
  bool supported;
};
std::vector<CpuIsa> cpu_isas();

// These stages (kMeasure, kDecide, kUpdate) of a step on up to `num_threads` threads. `isa` indexes cpu_isas().
void cpu_step(const void* table, int64_t stages, int isa, int num_threads);

}  // namespace adamw_kernels
