// The structs that Python and C++ agree on: what one step reads besides the tensors themselves.
//
// Every field is 8 bytes wide, so that Python can keep a table in one int64 tensor and Triton can read
// it with int64 loads. `adamw_kernels/launch_table.py` declares the same layout; the compiled module
// exports `layout()` and the package refuses to load a module whose layout differs.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

// Bits of TensorRow::flags. The two dtype codes lie at bit 8 (parameter) and bit 12 (gradient).
constexpr int64_t kAmsgrad = 1;         // max_exp_avg_sq is valid and bounds the step
constexpr int64_t kMaximize = 2;        // ascend: the gradient enters with a minus sign
constexpr int64_t kL2 = 4;              // decay is added to the gradient (Adam) instead of to the weight (AdamW)
constexpr int64_t kFloat64 = 8;         // coefficients, moments and arithmetic are float64
constexpr int64_t kCautious = 16;       // no update where it disagrees with the gradient's sign
constexpr int64_t kCautiousDecay = 32;  // no decay where it disagrees with the update's sign
constexpr int64_t kClip = 64;           // max_grad_norm bounds the gradient
constexpr int64_t kEma = 128;           // ema is valid
constexpr int kParamDtypeShift = 8;
constexpr int kGradDtypeShift = 12;
constexpr int64_t kDtypeMask = 15;
constexpr int64_t kEmaBfloat16 = 1 << 16;    // ema is bfloat16, rounded stochastically; else of the compute type
constexpr int64_t kEmaWarmup = 1 << 17;      // ema_decay grows from 2/11 at the first step: (1 + t) / (10 + t) at most
constexpr int64_t kBound = 1 << 18;          // update_bound limits the update
constexpr int64_t kScheduleDecay = 1 << 19;  // the weight decays with lr / initial_lr instead of lr
constexpr int kParamFormatShift = 20;        // two bits each
constexpr int kMomentFormatShift = 22;
constexpr int64_t kFormatMask = 3;
constexpr int64_t kSgd = 1 << 24;           // the rule is SGD's; else Adam's
constexpr int64_t kMomentum = 1 << 25;      // of SGD: exp_avg is valid and holds the momentum buffer
constexpr int64_t kNesterov = 1 << 26;      // of SGD: step along the gradient and the buffer it has just entered
constexpr int64_t kLrInMomentum = 1 << 27;  // of SGD: what enters the buffer is multiplied by lr, not what leaves it
// Variants of the rule that a plain AdamW loop need not look at.
constexpr int64_t kVariants = kL2 | kCautious | kCautiousDecay;

// Codes of a storage dtype. The order is the order of the dispatch tables in cpu_loop.cpp and cuda.cu.
enum DtypeCode : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3, kDtypes = 4 };

// How a 16-bit weight remembers what its dtype cannot hold. Wider weights are native.
enum ParamFormat : int64_t {
  kNative = 0,      // nothing: to nearest even
  kStochastic = 1,  // nothing: up or down by chance, unbiased
  kSplit24 = 2,     // an int8 of 8 more bits
  kSplit32 = 3,     // an int16 of all other bits of a float32
};

// How the moments are stored.
enum MomentFormat : int64_t {
  kMomentsWide = 0,  // in the compute type
  kMomentsBf16 = 1,  // bfloat16, rounded stochastically
  kMoments8 = 2,     // codes of 8 bits and a word for 16 neighbours: moments8.h
  kMomentFormats = 3,
};

// One tensor. Addresses are byte addresses on the tensor's own device.
struct TensorRow {
  int64_t param;
  int64_t exp_avg;         // 0 for SGD without momentum
  int64_t exp_avg_sq;      // 0 for SGD
  int64_t max_exp_avg_sq;  // 0 without AMSGrad
  int64_t step;            // float32 scalar: steps taken so far
  int64_t numel;
  int64_t hyper;  // index of the tensor's HyperRow
  int64_t flags;
  int64_t ema;            // 0 without kEma
  int64_t norm;           // index of the gradient norm by which it is clipped
  int64_t random_stream;  // of its random bits; a step's key is made of it and of t
  int64_t remainder;      // of the weight: int8 or int16, under kSplit24 or kSplit32; else 0
  int64_t groups;         // uint16, one for 16 elements, under kMoments8; else 0
  int64_t scale;          // float32 scalar by which the second moment is multiplied under kMoments8; else 0
  int64_t first_element;  // index, in the whole tensor, of this shard's first element: counts its random bits
  int64_t update_bound;   // float64: |update| / lr at most, under kBound; negative: what exact moments cannot exceed
};

// One parameter group's hyperparameters. A field holds the float64 value itself, or, where two bits of
// `source` say so, the address of a one-element float32 (1) or float64 (2) tensor on the same device.
struct HyperRow {
  int64_t lr;
  int64_t beta1;  // SGD: momentum
  int64_t beta2;  // SGD: dampening
  int64_t eps;    // not of SGD
  int64_t weight_decay;
  int64_t max_grad_norm;  // read under kClip
  int64_t ema_decay;      // read under kEma
  int64_t initial_lr;     // read under kScheduleDecay
  int64_t source;
};
constexpr int64_t kFromValue = 0;
constexpr int64_t kFromFloat32 = 1;
constexpr int64_t kFromFloat64 = 2;

// Where the weights of one tensor are also written in 16 bits; on CPUs only.
struct ParamCopy {
  int64_t address;  // 0: nowhere
  int64_t dtype;    // kBF16 or kF16
};

// What *prepare* hands to *update*: one 128-byte row a tensor, of float or of double (kFloat64).
template <typename T>
struct Coefficients {
  T w1;            // 1 - beta1; SGD: what of the gradient enters the buffer
  T w2;            // 1 - beta2; SGD: momentum
  T step_size;     // lr / (1 - beta1^t); SGD: lr, or 1 under kLrInMomentum
  T inv_sqrt_bc2;  // 1 / sqrt(1 - beta2^t)
  T decay;         // of the weight: lr or lr / initial_lr, times weight_decay; 0 under kL2
  T eps;
  T scale;  // multiplies the gradient: 1 / loss scale x clip coefficient, negative under kMaximize
  T l2;     // weight_decay under kL2, else 0
  T ema;    // 1 - ema_decay under kEma, else 0
  T bound;  // of the update, times lr; infinity without kBound
  // Under kMoments8, what the second moment was, and now is, multiplied by in storage: inverse of the old, the new.
  T unscale;
  T rescale;
};
constexpr int64_t kCoefficientRowBytes = 128;
constexpr int64_t kKeyOffset = 120;  // bytes into the row: uint64, the key of this step's random bits

// A chunk is `tensor << 32 | index`: elements [index * chunk_size, (index + 1) * chunk_size) of that tensor.
constexpr int kChunkTensorShift = 32;
constexpr int64_t kChunkIndexMask = 0xffffffff;

// The gradient norm is a sum of fixed shape, so that no thread count, launch geometry or chunk size shows in it.
// A norm chunk is kNormChunk elements, written like a chunk. Its element i goes to lane i % kNormLanes; a lane
// adds in the elements' order, and the lanes are folded by halves. Everything in float64.
constexpr int64_t kNormChunk = 1 << 14;
constexpr int64_t kNormLanes = 1 << 10;

// Norm chunks [begin, end) that are added up on this device, and the norm that they are part of.
struct NormDomain {
  int64_t begin;
  int64_t end;
  int64_t norm;
  int64_t reserved;
};

// What a step is told about the gradients from outside, in device memory.
struct Signals {
  double grad_scale;      // gradients are this many times too large
  double found_inf;       // non-zero or NaN: skip
  double max_skip_norm;   // skip unless the norm is at most this; -infinity: no limit
  double skip_nonfinite;  // non-zero: skip when a gradient holds inf or NaN
};

// What *decide* makes of it, in device memory; the norms follow, as many as there are.
struct Decision {
  int64_t skip;  // 1: this step changes nothing else
  int64_t skipped_steps;
  double norm;  // of all unscaled gradients
  double inv_scale;
  double norms[1];
};

// All of one device's tensors. A gradient address of 0 means: no gradient, leave this tensor alone.
struct LaunchTable {
  int64_t rows;          // TensorRow[num_tensors]
  int64_t grads;         // int64_t[num_tensors], addresses
  int64_t hypers;        // HyperRow[num_groups]
  int64_t coefficients;  // num_tensors rows of kCoefficientRowBytes
  int64_t chunks;        // int64_t[num_chunks]
  int64_t num_tensors;
  int64_t num_chunks;
  int64_t chunk_size;   // elements
  int64_t decision;     // Decision
  int64_t signals;      // Signals; read where the stages are more than kUpdate
  int64_t norm_chunks;  // int64_t[num_norm_chunks], in the order of the parameters
  int64_t num_norm_chunks;
  int64_t partials;  // double[num_norm_chunks]: sums of squares
  int64_t domains;   // NormDomain[num_domains], in the order of their norms
  int64_t num_domains;
  int64_t totals;  // double[num_domains + 1]: sums of squares, then 1 where found_inf says skip, else 0
  int64_t copies;  // ParamCopy[num_tensors]; 0 where no tensor has one
};

// Stages of a step, as bits. Between the first two the totals may be added up over devices and processes.
constexpr int64_t kMeasure = 1;  // partials, then totals
constexpr int64_t kDecide = 2;   // apply or skip
constexpr int64_t kUpdate = 4;   // prepare, then update

static_assert(sizeof(TensorRow) == 128 && sizeof(HyperRow) == 72 && sizeof(LaunchTable) == 136,
              "as Python lays them out");
static_assert(sizeof(NormDomain) == 32 && sizeof(Signals) == 32 && sizeof(Decision) == 40 && sizeof(ParamCopy) == 16,
              "as Python lays them out");
static_assert(sizeof(Coefficients<double>) <= kKeyOffset, "a coefficient row holds twelve doubles and the key");

}  // namespace
