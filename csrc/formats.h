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
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;  // rounding up a NaN could carry into the sign: keep it a NaN
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Rounded up with the probability of the distance: unbiased. Uses the low 16 bits of `word`.
ADAMW_HD uint16_t float_to_bf16_stochastic(float x, uint32_t word) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + (word & 0xffffu)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// --- float16 ------------------------------------------------------------------------------------------

// The exponent is re-biased by an exact multiplication with 2^112, which also normalises subnormals. A GPU converts in
// one instruction, as exactly; by hand it would need registers that update does not have.
ADAMW_HD float fp16_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * bits_float(0x77800000u));
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
