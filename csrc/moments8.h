// Moments in 8 bits each: a code of v that is an adaptive, piecewise-linear logarithm, and a code of m / sqrt(v).
//
// Sixteen neighbours, in the order of the tensor's memory, share a word: e << 8 | mode << 4 | j.
//
// * v is held as x = v * scale. The scale grows by 1 / beta2 a step and falls by half where it reaches 2^25, so a v
//   that merely decays moves by nothing or one octave, but for a float32's last bits: what gradients add is rounded.
//   Codes 1 to 255 stand for the octaves from 2^(e-127) up, N of them an octave, N being 254 / (number of octaves that
//   `mode` says); the range follows the group's smallest and largest v. Always rounded stochastically: at beta2 = 0.999
//   v moves a tenth of a code step. Code 0 is v = 0, to which no other v is ever rounded.
// * m is held as a multiple of s = sqrt(x) to within 1 to 1.5, a power of two or 4/3 of one that the octave of v's code
//   tells, in 127ths of the group's largest ratio, which `j` tells to half an octave. So whatever is lost of v, the
//   update m / sqrt(v) stays bounded. Rounded to nearest where m moved by two steps of its code or more (gradient
//   noise dithers it), stochastically where it moved less. -128 is NaN: what was not finite stays where
//   it was.
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

struct Codebook {
  uint32_t e;           // biased exponent of the first octave
  uint32_t per_octave;  // N: codes an octave
  uint32_t reciprocal;  // 2^32 / N, rounded up
  uint32_t inverse;     // 2^16 / N, rounded up
};

// 1, 2, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32
ADAMW_HD uint32_t octaves_of(uint32_t mode) {
  const uint32_t shift = mode < 4 ? 0u : (mode >> 2) - 1u;
  return ((mode & 3u) + (mode < 4 ? 1u : 5u)) << shift;
}

ADAMW_HD constexpr Codebook make_codebook(uint32_t e, uint32_t mode) {
  // 254 / octaves_of(mode), four to a word.
  const uint32_t low = mode < 4 ? 0x3f547ffeu : 0x1f242a32u, high = mode < 12 ? 0x0f121519u : 0x07090a0cu;
  const uint32_t n = ((mode < 8 ? low : high) >> (8 * (mode & 3))) & 255u;
  const uint32_t reciprocal = 0xffffffffu / n + 1u;
  return {e, n, reciprocal, (reciprocal >> 16) + 1u};
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

// What encoding needs of it.
struct RatioScale {
  float two_steps;
  float steps_per_ratio;
};

ADAMW_HD RatioScale ratio_scale(uint32_t j) { return {2.0f * ratio_step(j), steps_per_ratio(j)}; }

// --- one element ----------------------------------------------------------------------------------------------------

// x, or 0 where not `kept`. An integer mask: of selects that depend on each other, gcc 12 makes twenty instructions
// that combine masks instead of one.
ADAMW_HD uint32_t keep(bool kept, uint32_t x) { return x & (0u - static_cast<uint32_t>(kept)); }

// What a code of v stands for: the bits of x, and the half octave of s. Nothing of it holds for code 0.
struct Position {
  uint32_t bits;
  uint32_t half_octave;
};

ADAMW_HD Position position(uint32_t code, const Codebook& book) {
  const uint32_t q = code - 1u;
  const uint32_t octave = (q * book.inverse) >> 16;  // q / N
  const uint32_t within = q - octave * book.per_octave;
  const uint32_t bits = ((book.e + octave) << 23) + ((within * book.reciprocal + 256u) >> 9);
  return {bits, book.e + octave + 127u};
}

// 1.5 times a power of two becomes 4/3 of it.
ADAMW_HD float reference_of(uint32_t code, const Position& at) {
  const uint32_t odd = 0u - (at.half_octave & 1u);
  return bits_float(keep(code > 0, (at.half_octave << 22) - (odd & 0x155555u)));
}

// 1 / s: 3/4 of a power of two is exact where 4/3 of one is not.
ADAMW_HD float inverse_of(uint32_t code, const Position& at) {
  return bits_float(keep(code > 0, (508u - at.half_octave) << 22));
}

ADAMW_HD float decode_second(uint32_t code, const Position& at, float unscale) {
  return bits_float(keep(code > 0, at.bits)) * unscale;
}

ADAMW_HD float decode_first(int32_t code, float reference, float step) {
  return code == kNotFinite ? bits_float(0x7fc00000u) : static_cast<float>(code) * (reference * step);
}

// The bits of x; what cannot be held is marked, and x and m count as 0.
ADAMW_HD uint32_t bits_of_second(float& m, float v, float rescale, bool& not_finite) {
  const uint32_t bits = float_bits(v * rescale);
  // & and |, not && and ||: no branches in vectorised loops. A v below 0, which no step gives, is no number either.
  not_finite = (bits >= kOverflow) | ((float_bits(m) & 0x7fffffffu) >= 0x7f800000u);
  m = bits_float(keep(!not_finite, float_bits(m)));
  return keep(!not_finite, bits);
}

ADAMW_HD uint32_t forget_dead(uint32_t bits, float m, uint32_t largest) {
  const uint32_t far = largest > kForgetBelow ? largest - kForgetBelow : 0u;
  return keep((m != 0.0f) | (bits >= far), bits);
}

// `random`: 16 bits. Octaves and what lies within one are one number, as no group holds more than 254 codes of 2^23.
ADAMW_HD uint32_t encode_second(uint32_t bits, const Codebook& book, uint32_t random) {
  const auto above = static_cast<int32_t>(bits - (book.e << 23));
  const uint32_t inside = static_cast<uint32_t>(above < 0 ? 0 : above);
  const uint32_t code = (inside * book.per_octave + (random << 7) + (64u + (1u << 23))) >> 23;
  return keep(bits > 0, code);
}

// `ratio`: m / s. `before`: m of the step before, as it was decoded. `random`: 16 bits.
ADAMW_HD int32_t encode_first(float ratio, float m, float before, float reference, const RatioScale& scale,
                              bool not_finite, uint32_t random) {
  const float distance = bits_float(float_bits(m - before) & 0x7fffffffu);
  const float two_steps = reference * scale.two_steps;
  // To nearest: the chance bit breaks ties, else an m that decays by a fixed factor would lag behind.
  const uint32_t threshold = distance < two_steps ? random : 0x7fffu + (random & 1u);
  float z = ratio * scale.steps_per_ratio;
  z = z > 127.0f ? 127.0f : z;
  z = z + (static_cast<float>(static_cast<int32_t>(threshold)) * 0x1p-16f + 128.0f);
  z = z < 1.0f ? 1.0f : z;  // -127
  // Truncation of what is above 0: SSE2 has no floor.
  const int32_t code = static_cast<int32_t>(z) - 128;
  return not_finite ? kNotFinite : code;
}

}  // namespace
