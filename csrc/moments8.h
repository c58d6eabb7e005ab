// Moments in 8 bits each: a code of v that is an adaptive, piecewise-linear logarithm, and a code of m / sqrt(v).
//
// Sixteen neighbours, in the order of the tensor's memory, share a word: e << 8 | mode << 4 | j.
//
// * v is held as x = v * scale. The scale grows by 1 / beta2 a step and falls by half where it reaches 2^25, so a v
//   that merely decays moves by nothing or one octave, but for a float32's last bits: what gradients add is rounded.
//   Codes 1 to 255 stand for the octaves from 2^(e-127) up, N of them an octave, N being 254 / (number of octaves that
//   `mode` says), at equal distances but for 3e-5 of one; the range follows the group's smallest and largest v. Always
//   rounded stochastically: at beta2 = 0.999 v moves a tenth of a code step. Code 0 is v = 0, to which no other v is
//   ever rounded.
// * m is held as a multiple of s = sqrt(x) to within 1 to 1.5, a power of two or 4/3 of one that the octave of v's code
//   tells, in 127ths of the group's largest ratio, which `j` tells to half an octave. So whatever is lost of v, the
//   update m / sqrt(v) stays bounded. Rounded to nearest where m moved by two steps of its code or more (gradient
//   noise dithers it), stochastically where it moved less. -128 is NaN: what was not finite stays where it was.
// * An element without gradients, whose m has become 0, is forgotten when its v falls 16 octaves behind its group's
//   largest: it would cost its neighbours their resolution.
//
// 2.125 bytes a parameter. Integer arithmetic on the bits of float32, and single IEEE-754 operations: the same bits
// everywhere. Ranges: |m| / sqrt(v) up to 21, 32 octaves of v within a group (what is smaller is kept larger, and its
// updates smaller), v up to 2^103 (what is larger counts as infinite). bench/quality.py measures it.
#pragma once

#include "formats.h"

namespace {

constexpr int kGroup = 16;

constexpr uint32_t kLargestRatio = 240;       // half octaves: 2^-7 times the root of the least scale, 2^12
constexpr uint32_t kForgetBelow = 16u << 23;  // octaves
constexpr uint32_t kOverflow = 254u << 23;    // of x: bits of 2^127
constexpr float kScale = 16777216.0f;         // of a new tensor: 2^24 to 2^25, where no v that matters is subnormal
constexpr int8_t kNotFinite = -128;

// The scale after a step.
ADAMW_HD float next_scale(float scale, double beta2) {
  const auto grown = static_cast<float>(static_cast<double>(scale) / beta2);
  return bits_float((float_bits(grown) & 0x7fffffu) | float_bits(kScale));
}

// Moves a tensor's scale on, as *prepare* does with every step.
ADAMW_HD void advance_scale(float& scale, double beta2, float& unscale, float& rescale) {
  unscale = static_cast<float>(1.0 / static_cast<double>(scale));
  rescale = scale = next_scale(scale, beta2);
}

// --- what a group's elements share ------------------------------------------------------------------------------

// How codes of v lie within octaves, whatever the first one is. What decoding takes is one access for a GPU, and what
// encoding takes.
struct alignas(16) Codebook {
  uint32_t spacing;     // 2^23 / N, from one code to the next, times 2^shift and rounded up
  uint32_t shift;       // as much as 254 spacings, in 32 bits, allow
  uint32_t per_octave;  // N: codes an octave
  uint32_t inverse;     // 2^22 / N, rounded up
};

// 1, 2, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32
ADAMW_HD uint32_t octaves_of(uint32_t mode) {
  const uint32_t shift = mode < 4 ? 0u : (mode >> 2) - 1u;
  return ((mode & 3u) + (mode < 4 ? 1u : 5u)) << shift;
}

ADAMW_HD constexpr Codebook make_codebook(uint32_t mode) {
  // 254 / octaves_of(mode), four to a word.
  const uint32_t low = mode < 4 ? 0x3f547ffeu : 0x1f242a32u, high = mode < 12 ? 0x0f121519u : 0x07090a0cu;
  const uint32_t n = ((mode < 8 ? low : high) >> (8 * (mode & 3))) & 255u;
  const uint32_t shift = mode < 4 ? 8u - (mode + 1u) / 2u : 7u - (mode + 1u) / 4u;
  const uint32_t reciprocal = 0xffffffffu / n;  // 2^32 / N, rounded down: N is no power of two
  return {(reciprocal >> (9u - shift)) + 1u, shift, n, (reciprocal >> 10) + 1u};
}

// By mode: a table saves each group a division.
struct Codebooks {
  Codebook of_mode[16];
};
ADAMW_HD constexpr Codebooks make_codebooks() {
  Codebooks books = {};
  for (uint32_t mode = 0; mode < 16; ++mode) books.of_mode[mode] = make_codebook(mode);
  return books;
}

// `smallest`, `largest`: bits of the group's non-zero x; 0 where there is none.
ADAMW_HD uint32_t mode_of(uint32_t smallest, uint32_t largest) {
  const uint32_t beyond = (largest >> 23) - (smallest >> 23);  // octaves, beyond one
  // The bits of a float: twice its logarithm and the two bits that follow.
  const uint32_t logarithm = (float_bits(static_cast<float>(static_cast<int32_t>(beyond))) >> 21) - 512u;
  const uint32_t at_most_15 = logarithm < 15 ? logarithm : 15u;
  return beyond < 4 ? beyond : at_most_15;
}

// Where 32 octaves do not reach, the smallest are left out.
ADAMW_HD uint32_t first_octave(uint32_t smallest, uint32_t largest, uint32_t mode) {
  const auto reached = static_cast<int32_t>((largest >> 23) + 1u - octaves_of(mode));
  const auto lowest = static_cast<int32_t>(smallest >> 23);
  return static_cast<uint32_t>(lowest > reached ? lowest : reached);
}

// Half octaves by which the group's largest |m| / s lies below what can be held.
ADAMW_HD uint32_t ratio_code(float largest_ratio) {
  const int32_t above = static_cast<int32_t>(kLargestRatio - ((float_bits(largest_ratio) + 0x3fffffu) >> 22));
  return static_cast<uint32_t>(above < 0 ? 0 : above > 15 ? 15 : above);
}

// The ratio that 127 stands for, a power of two or 1.5 times one, over 127; and the inverse.
ADAMW_HD float ratio_step(uint32_t j) { return bits_float((kLargestRatio - j) << 22) * (1.0f / 127.0f); }
ADAMW_HD float steps_per_ratio(uint32_t j) {
  const uint32_t half_octave = kLargestRatio - j;
  return bits_float((508u - half_octave) << 22) * (half_octave & 1u ? 127.0f * (8.0f / 9.0f) : 127.0f);
}

// What encoding needs of it. `two_steps`: of m / s.
struct RatioScale {
  float two_steps;
  float steps_per_ratio;
};

ADAMW_HD RatioScale ratio_scale(uint32_t j) { return {2.0f * ratio_step(j), steps_per_ratio(j)}; }

// --- one element ----------------------------------------------------------------------------------------------------

// x, or 0 where not `kept`. On CPUs an integer mask: of selects that depend on each other, gcc 12 makes twenty
// instructions that combine masks instead of one.
ADAMW_HD uint32_t keep(bool kept, uint32_t x) {
#ifdef __CUDA_ARCH__
  return kept ? x : 0u;
#else
  return x & (0u - static_cast<uint32_t>(kept));
#endif
}

// The bits of x that a code of v stands for, of nothing for code 0. `e`: biased exponent of the group's first octave.
ADAMW_HD uint32_t bits_of_code(uint32_t code, uint32_t e, const Codebook& book) {
  return (e << 23) + ((code * book.spacing - book.spacing) >> book.shift);
}

// s, or 0 for code 0: 1.5 times a power of two becomes 4/3 of it.
ADAMW_HD float reference_of(uint32_t code, uint32_t bits) {
  const uint32_t half_octave = ((bits >> 1) & 0x7fc00000u) + (127u << 22), odd = half_octave & 0x400000u;
  return bits_float(keep(code > 0, half_octave - keep(odd != 0, 0x155555u)));
}

// 1 / s, or 0 for code 0: 3/4 of a power of two is exact where 4/3 of one is not.
ADAMW_HD float inverse_of(uint32_t code, uint32_t e, const Codebook& book) {
  const uint32_t octave = (code * book.inverse - book.inverse) & 0xffc00000u;  // above the first one, times 2^22
  return bits_float(keep(code > 0, ((381u - e) << 22) - octave));
}

ADAMW_HD float decode_second(uint32_t code, uint32_t bits, float unscale) {
  return bits_float(keep(code > 0, bits)) * unscale;
}

ADAMW_HD float decode_first(int32_t code, float reference, float step) {
  return code == kNotFinite ? bits_float(0x7fc00000u) : static_cast<float>(code) * (reference * step);
}

// The bits of x. What cannot be held is taken out of its group: its x counts as 0, its m is NaN.
ADAMW_HD uint32_t bits_of_second(float& m, float v, float rescale) {
  const uint32_t bits = float_bits(v * rescale);
  // | and not ||: no branches in vectorised loops. A v below 0, which no step gives, is no number either.
  const bool not_finite = (bits >= kOverflow) | ((float_bits(m) & 0x7fffffffu) >= 0x7f800000u);
  m = not_finite ? bits_float(0x7fc00000u) : m;
  return keep(!not_finite, bits);
}

// Whether elements as small as a group's smallest are forgotten, if they are dead. `smallest`, `largest`: as above.
ADAMW_HD bool reaches_dead(uint32_t smallest, uint32_t largest) {
  return static_cast<int32_t>(largest - smallest) > static_cast<int32_t>(kForgetBelow);
}

ADAMW_HD uint32_t forget_dead(uint32_t bits, float m, uint32_t largest) {
  return keep((m != 0.0f) | !reaches_dead(bits, largest), bits);
}

// `random`: the element's word, of which the upper 23 bits decide. Octaves and what lies within one are one number,
// as no group holds more than 254 codes of 2^23.
ADAMW_HD uint32_t encode_second(uint32_t bits, uint32_t e, const Codebook& book, uint32_t random) {
  const auto above = static_cast<int32_t>(bits - (e << 23));
  const uint32_t inside = static_cast<uint32_t>(above < 0 ? 0 : above);
  const uint32_t code = (inside * book.per_octave + ((random >> 9) + (1u << 23))) >> 23;
  return keep(bits > 0, code);
}

// The larger of |m| / s, of which what is no number is none.
ADAMW_HD float larger_ratio(float largest, float ratio) {
#ifdef __CUDA_ARCH__
  return fmaxf(largest, fabsf(ratio));
#else
  const float magnitude = bits_float(float_bits(ratio) & 0x7fffffffu);
  return magnitude > largest ? magnitude : largest;
#endif
}

// By how much m / s moved in this step. `before`: m as it was decoded.
ADAMW_HD float distance_of(float m, float before, float inverse) {
  return bits_float(float_bits(m - before) & 0x7fffffffu) * inverse;
}

// `ratio`: m / s. `distance`: by how much it moved. `random`: as above, of which the lower 16 bits decide.
ADAMW_HD int32_t encode_first(float ratio, float distance, const RatioScale& scale, uint32_t random) {
  // 128, and in its last 16 bits what is to be added before the rest is cut off. To nearest: the chance bit breaks
  // ties, else an m that decays by a fixed factor would lag behind.
  const uint32_t by_chance = 0x43000000u | (random & 0xffffu), to_nearest = 0x43007fffu + (random >> 31);
  float z = ratio * scale.steps_per_ratio;
  z = z > 127.0f ? 127.0f : z;
  z = z + bits_float(distance < scale.two_steps ? by_chance : to_nearest);
  z = z < 1.0f ? 1.0f : z;  // -127
  // Truncation of what is above 0: SSE2 has no floor.
#ifdef __CUDA_ARCH__
  return __float2int_rz(z) - 128;  // NaN becomes 0
#else
  return ratio == ratio ? static_cast<int32_t>(z) - 128 : kNotFinite;
#endif
}

}  // namespace
