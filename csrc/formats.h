// How a parameter, a gradient or a moment is stored: load -> compute type, compute type -> store.
//
// Rounding to 16 bits is integer arithmetic (nearest, ties to even), so that every CPU, the Triton
// interpreter and the GPU agree. Branch-free on purpose: each function must vectorise.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ADAMW_HD __host__ __device__ __forceinline__
#else
#define ADAMW_HD inline __attribute__((always_inline))
#endif

namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

ADAMW_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  return u;
}

ADAMW_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof(x));
  return x;
}

// --- bfloat16: the upper half of a float32 ---------------------------------------------------------

ADAMW_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

ADAMW_HD uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = u + (0x7fffu + ((u >> 16) & 1u));
  const uint32_t quiet = u | 0x400000u;  // rounding up a NaN could carry into the sign: keep it a NaN
  return static_cast<uint16_t>((x != x ? quiet : rounded) >> 16);
}

// Rounded up with the probability of the distance: unbiased. `random`: 16 bits.
ADAMW_HD uint16_t float_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = u + random;
  const uint32_t quiet = u | 0x400000u;
  return static_cast<uint16_t>((x != x ? quiet : rounded) >> 16);
}

// --- float16 ------------------------------------------------------------------------------------------

// To a float with 5 exponent and 23 fraction bits and back, signs aside: what multiplying with 2^-112 or 2^112 does, to
// nearest even or exactly. A GPU multiplies. x86 takes a microcode assist for a subnormal: with one in a hundred,
// loading 16 gradients takes 39 cycles in place of 5. Beside 2^-14, where the last bit of a float32 is that of a
// subnormal here, a sum does it in 8 whatever comes.
ADAMW_HD uint32_t narrow_exponent(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return float_bits(bits_float(bits) * bits_float(0x07800000u));
#else
  const uint32_t subnormal = float_bits(bits_float(bits) + bits_float(0x38800000u)) - 0x38800000u;
  return bits < 0x38800000u ? subnormal : bits - 0x38000000u;
#endif
}

ADAMW_HD uint32_t widen_exponent(uint32_t magnitude) {
#ifdef __CUDA_ARCH__
  return float_bits(bits_float(magnitude) * bits_float(0x77800000u));
#else
  const uint32_t subnormal = float_bits(bits_float(magnitude + 0x38800000u) - bits_float(0x38800000u));
  return magnitude < 0x00800000u ? subnormal : magnitude + 0x38000000u;
#endif
}

// A GPU converts in one instruction; by hand it would need registers that update does not have.
ADAMW_HD float fp16_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t finite = widen_exponent(magnitude);
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_float(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

ADAMW_HD uint16_t float_to_fp16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal results: drop 13 bits to nearest even and re-bias by 112.
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 lines the last float16 bit (2^-24) up with the last float32 bit.
  const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
  h = a > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(sign | h);
}

// --- a 16-bit weight and the rest of it --------------------------------------------------------------------------

// A split weight is one integer: float32's magnitude for bfloat16, and for float16 that of a float with 5 exponent and
// 23 fraction bits, in which a float32 below 2^-14 becomes a multiple of 2^-37. The weight is its upper part to
// nearest, ties upwards; the remainder is what must be added, so that a weight edited in place by the user keeps at
// most half a unit of an old one. Nothing but integer arithmetic, and one sum for float16.
struct SplitWeight {  // both fit 16 bits; in 32, the compiler need not choose between them in narrower lanes
  uint32_t weight;
  int32_t remainder;
};

template <typename P>
struct split_of;

template <>
struct split_of<bf16> {
  static constexpr int kBits = 16;  // of the magnitude below the weight
  static constexpr uint32_t kInfinity = 0x7f800000u;
  static constexpr uint32_t kLargest =
      0x7f7fffffu;  // rounds up to infinity in the weight, and is kept by the remainder
  static constexpr uint16_t kNan = 0x7fc0u;
  static ADAMW_HD uint32_t magnitude(uint32_t bits) { return bits; }
  static ADAMW_HD uint32_t bits(uint32_t magnitude) { return magnitude; }
};

template <>
struct split_of<fp16> {
  static constexpr int kBits = 13;
  static constexpr uint32_t kInfinity = 0x0f800000u;
  static constexpr uint32_t kLargest = 0x0f7fefffu;  // the last that rounds to a finite weight: a master saturates here
  static constexpr uint16_t kNan = 0x7e00u;
  // The exponent is re-biased by 112, the bits of an infinity or NaN aside.
  static ADAMW_HD uint32_t magnitude(uint32_t bits) { return narrow_exponent(bits); }
  static ADAMW_HD uint32_t bits(uint32_t magnitude) {
    return magnitude >= kInfinity ? magnitude | 0x7f800000u : widen_exponent(magnitude);
  }
};

// `remainder`: in units of the magnitude. One that an edited weight cannot take leaves +-0.
template <typename P>
ADAMW_HD float merge_weight(uint16_t weight, int32_t remainder) {
  using split = split_of<P>;
  const uint32_t sign = static_cast<uint32_t>(weight & 0x8000u) << 16;
  const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(weight & 0x7fffu) << split::kBits) + remainder;
  return bits_float(sign | split::bits(static_cast<uint32_t>(sum < 0 ? 0 : sum)));
}

// The magnitude cut to its upper bits, all but `kDropped`; up with the probability of the distance (`random`: 16 bits)
// where any are dropped. Only what is infinite becomes infinite.
template <typename P, int kDropped>
ADAMW_HD uint32_t weight_magnitude(uint32_t magnitude, uint32_t random) {
  using split = split_of<P>;
  const bool finite = magnitude < 0x7f800000u;
  uint32_t m = split::magnitude(magnitude) + (kDropped ? random >> (16 - kDropped) : 0u);
  m = m > split::kLargest ? split::kLargest : m;
  return (finite ? m : split::kInfinity) >> kDropped;
}

// kKept: bits of the magnitude that the remainder keeps: 8, or all of them.
template <typename P, int kKept>
ADAMW_HD SplitWeight split_weight(float x, uint32_t random) {
  using split = split_of<P>;
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t magnitude = weight_magnitude<P, split::kBits - kKept>(a, random);
  const uint32_t upper = (magnitude + (1u << (kKept - 1))) >> kKept;
  const bool nan = a > 0x7f800000u;
  const int32_t remainder = static_cast<int32_t>(magnitude) - static_cast<int32_t>(upper << kKept);
  return {sign | (nan ? split::kNan : upper), nan ? 0 : remainder};
}

ADAMW_HD uint16_t float_to_fp16_stochastic(float x, uint32_t random) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t magnitude = weight_magnitude<fp16, split_of<fp16>::kBits>(a, random);
  return static_cast<uint16_t>(sign | (a > 0x7f800000u ? split_of<fp16>::kNan : magnitude));
}

// --- one interface for all of them -----------------------------------------------------------------------

template <typename Compute>
ADAMW_HD Compute load(const float* x) {
  return static_cast<Compute>(*x);
}
template <typename Compute>
ADAMW_HD Compute load(const double* x) {
  return static_cast<Compute>(*x);
}
template <typename Compute>
ADAMW_HD Compute load(const bf16* x) {
  return static_cast<Compute>(bf16_to_float(x->bits));
}
template <typename Compute>
ADAMW_HD Compute load(const fp16* x) {
  return static_cast<Compute>(fp16_to_float(x->bits));
}

ADAMW_HD void store(float* x, float value) { *x = value; }
ADAMW_HD void store(double* x, double value) { *x = value; }
ADAMW_HD void store(bf16* x, float value) { x->bits = float_to_bf16(value); }
ADAMW_HD void store(fp16* x, float value) { x->bits = float_to_fp16(value); }

ADAMW_HD void store_stochastic(bf16* x, float value, uint32_t random) {
  x->bits = float_to_bf16_stochastic(value, random);
}
ADAMW_HD void store_stochastic(fp16* x, float value, uint32_t random) {
  x->bits = float_to_fp16_stochastic(value, random);
}

// Arithmetic and moments are float32, or float64 for float64 parameters.
template <typename Param>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};

}  // namespace
