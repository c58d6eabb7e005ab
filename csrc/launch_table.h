// The structs that Python and C++ agree on: what one step reads besides the tensors themselves.
//
// Every field is 8 bytes wide, so that Python can keep a table in one int64 tensor and Triton can read
// it with int64 loads. `adamw_kernels/launch_table.py` declares the same layout; the compiled module
// exports `layout()` and the package refuses to load a module whose layout differs.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

// Bits of TensorRow::flags. The two dtype codes follow at bit 8 (parameter) and bit 12 (gradient).
constexpr int64_t kAmsgrad = 1;   // max_exp_avg_sq is valid and bounds the step
constexpr int64_t kMaximize = 2;  // ascend: the gradient enters with a minus sign
constexpr int64_t kL2 = 4;        // decay is added to the gradient (Adam) instead of to the weight (AdamW)
constexpr int64_t kFloat64 = 8;   // coefficients, moments and arithmetic are float64
constexpr int kParamDtypeShift = 8;
constexpr int kGradDtypeShift = 12;
constexpr int64_t kDtypeMask = 15;

// Codes of a storage dtype. The order is the order of the dispatch tables in cpu_loop.cpp and cuda.cu.
enum DtypeCode : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3, kDtypes = 4 };

// One tensor. Addresses are byte addresses on the tensor's own device.
struct TensorRow {
  int64_t param;
  int64_t exp_avg;
  int64_t exp_avg_sq;
  int64_t max_exp_avg_sq;  // 0 without AMSGrad
  int64_t step;            // float32 scalar: steps taken so far
  int64_t numel;
  int64_t hyper;  // index of the tensor's HyperRow
  int64_t flags;
};

// One parameter group's hyperparameters. A field holds the float64 value itself, or, where two bits of
// `source` say so, the address of a one-element float32 (1) or float64 (2) tensor on the same device.
struct HyperRow {
  int64_t lr;
  int64_t beta1;
  int64_t beta2;
  int64_t eps;
  int64_t weight_decay;
  int64_t source;
  int64_t reserved[2];
};
constexpr int64_t kFromValue = 0;
constexpr int64_t kFromFloat32 = 1;
constexpr int64_t kFromFloat64 = 2;

// What *prepare* hands to *update*: one 64-byte row a tensor, of float or of double (kFloat64).
template <typename T>
struct Coefficients {
  T w1;            // 1 - beta1
  T w2;            // 1 - beta2
  T step_size;     // lr / (1 - beta1^t)
  T inv_sqrt_bc2;  // 1 / sqrt(1 - beta2^t)
  T decay;         // lr * weight_decay, or 0 under kL2
  T eps;
  T scale;  // multiplies the gradient; -1 under kMaximize
  T l2;     // weight_decay under kL2, else 0
};
constexpr int64_t kCoefficientRowBytes = 64;

// A chunk is `tensor << 32 | index`: elements [index * chunk_size, (index + 1) * chunk_size) of that tensor.
constexpr int kChunkTensorShift = 32;
constexpr int64_t kChunkIndexMask = 0xffffffff;

// All of one device's tensors. A gradient address of 0 means: no gradient, leave this tensor alone.
struct LaunchTable {
  int64_t rows;          // TensorRow[num_tensors]
  int64_t grads;         // int64_t[num_tensors], addresses
  int64_t hypers;        // HyperRow[num_groups]
  int64_t coefficients;  // num_tensors rows of kCoefficientRowBytes
  int64_t chunks;        // int64_t[num_chunks]
  int64_t num_tensors;
  int64_t num_chunks;
  int64_t chunk_size;  // elements
};

static_assert(sizeof(TensorRow) == 64 && sizeof(HyperRow) == 64 && sizeof(LaunchTable) == 64, "rows are 64 bytes");
static_assert(sizeof(Coefficients<double>) == kCoefficientRowBytes, "a coefficient row holds eight doubles");

}  // namespace
