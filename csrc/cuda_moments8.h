// The update of elements whose moments are stored in 8 bits: neighbouring lanes agree on what their group shares. What
// a code stands for stands in moments8.h.
#pragma once

#include "cuda_vector.h"
#include "moments8.h"

namespace {

// The largest x among the 16 / N lanes of a group, which all call it together.
template <int N>
__device__ __forceinline__ uint32_t largest_of_group(uint32_t x) {
  constexpr unsigned kLanes = kGroup / N;
  const unsigned mask = ((1u << kLanes) - 1u) << (threadIdx.x % 32 & ~(kLanes - 1u));
#pragma unroll
  for (unsigned other = 1; other < kLanes; other *= 2) {
    const uint32_t y = __shfl_xor_sync(mask, x, other);
    x = x > y ? x : y;
  }
  return x;
}

__device__ const Codebooks kCodebooks = make_codebooks();

template <int N>
__device__ __forceinline__ void decode(uint32_t word, const Vector<int8_t, N>& first_code,
                                       const Vector<uint8_t, N>& second_code, float unscale, Vector<float, N>& m,
                                       Vector<float, N>& v) {
  const Codebook book = kCodebooks.of_mode[(word >> 4) & 15u];
  const float step = ratio_step(word & 15u);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t code = second_code.at[k], bits = bits_of_code(code, word >> 8, book);
    m.at[k] = decode_first(first_code.at[k], reference_of(code, bits), step);
    v.at[k] = decode_second(code, bits, unscale);
  }
}

// The smallest of a group's non-zero x; 0 if there is none.
template <int N>
__device__ __forceinline__ uint32_t smallest_of_group(const uint32_t (&bits)[N]) {
  uint32_t least = 0;  // ~(smallest - 1)
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t inverted = 0u - bits[k];
    least = least > inverted ? least : inverted;
  }
  return 0u - largest_of_group<N>(least);
}

// `before`: the first moment as it was decoded. An `m` that is not finite becomes NaN. Returns the group's word.
template <int N>
__device__ __forceinline__ uint32_t encode(Vector<float, N>& m, const Vector<float, N>& v,
                                           const Vector<float, N>& before, float rescale, const RandomBits (&random)[N],
                                           Vector<int8_t, N>& first_code, Vector<uint8_t, N>& second_code) {
  uint32_t bits[N], largest = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    bits[k] = bits_of_second(m.at[k], v.at[k], rescale);
    largest = largest > bits[k] ? largest : bits[k];
  }
  largest = largest_of_group<N>(largest);
  uint32_t smallest = smallest_of_group(bits);
  if (reaches_dead(smallest, largest)) {  // alike in all lanes of the group
#pragma unroll
    for (int k = 0; k < N; ++k) bits[k] = forget_dead(bits[k], m.at[k], largest);
    smallest = smallest_of_group(bits);
  }
  const uint32_t mode = mode_of(smallest, largest), e = first_octave(smallest, largest, mode);
  const Codebook book = kCodebooks.of_mode[mode];

  float ratio[N], distance[N], largest_ratio = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t code = encode_second(bits[k], e, book, random[k].word);
    const float inverse = inverse_of(code, e, book);
    second_code.at[k] = static_cast<uint8_t>(code);
    ratio[k] = m.at[k] * inverse;
    distance[k] = distance_of(m.at[k], before.at[k], inverse);
    largest_ratio = larger_ratio(largest_ratio, ratio[k]);
  }
  const uint32_t j = ratio_code(bits_float(largest_of_group<N>(float_bits(largest_ratio))));
  const RatioScale scale = ratio_scale(j);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    first_code.at[k] = static_cast<int8_t>(encode_first(ratio[k], distance[k], scale, random[k].word));
  }
  return e << 8 | mode << 4 | j;
}

// Elements [i, i + N), all of one group. All lanes of a group call this together, those also whose element lies behind
// the tensor's end (not `there`; N is 1 then): it counts as zero throughout.
template <int N, typename At>
__device__ __forceinline__ void update_part_of_group(const At& at, uint16_t* words, int64_t i, bool there,
                                                     const Coefficients<float>& c) {
  const int64_t from = there ? i : i / kGroup * kGroup;  // one that is there
  const uint32_t word = words[i / kGroup];
  auto g = as_vector<const Vector<typename At::G, N>>(at.g + from);
  auto first_code = as_vector<Vector<int8_t, N>>(at.m + from);
  auto second_code = as_vector<Vector<uint8_t, N>>(at.v + from);
  Vector<float, N> weight, m, v;
  load_weights(at, from, weight);
  if (!there) {
    g = {};
    first_code = {};
    second_code = {};
    weight = {};
  }
  decode(word, first_code, second_code, c.unscale, m, v);
  const auto before = m;
  float no_maximum = 0.0f;
  if (at.flags & kVariants) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      adamw<false, true, true>(weight.at[k], load<float>(&g.at[k]), m.at[k], v.at[k], no_maximum, c, at.flags);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      adamw<false, false, true>(weight.at[k], load<float>(&g.at[k]), m.at[k], v.at[k], no_maximum, c, at.flags);
    }
  }
  RandomBits random[N];
  draw(at, i, random);
  if (there) store_weights(at, i, weight, random);
  const uint32_t new_word = encode(m, v, before, c.rescale, random, first_code, second_code);
  if (!there) return;
  as_vector<Vector<int8_t, N>>(at.m + i) = first_code;
  as_vector<Vector<uint8_t, N>>(at.v + i) = second_code;
  if (i % kGroup == 0) words[i / kGroup] = static_cast<uint16_t>(new_word);
  if (at.flags & kEma) average(at, i, weight);
}

}  // namespace
