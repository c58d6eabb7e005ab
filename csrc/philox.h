// Counter-based random bits for stochastic rounding: two 32-bit words an element and step, which serve all its
// roundings.
//
// They depend on the seed, the tensor, the step and the element's index in the whole tensor alone, never on chunks,
// threads, launch geometry or shards. Philox2x32 with 7 rounds, the fewest that pass BigCrush. One call an element: the
// four-word variant would be cheaper only where neighbours share a call, and a tensor's alignment breaks that.
//
// Source: Salmon, Moraes, Dror, Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); the mixing function is
// splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014).
#pragma once

#include "formats.h"

namespace {

constexpr uint32_t kPhiloxMultiplier = 0xD256D193u;
constexpr uint32_t kPhiloxWeyl = 0x9E3779B9u;
constexpr int kPhiloxRounds = 7;

ADAMW_HD uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The key of step t of a tensor's stream.
ADAMW_HD uint64_t random_key(int64_t stream, int64_t t) {
  return mix(static_cast<uint64_t>(stream) + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(t));
}

// The bits of one element, 16 for each thing that may be rounded.
struct RandomBits {
  uint32_t word0, word1;
  ADAMW_HD uint32_t for_average() const { return word0 & 0xffffu; }
  ADAMW_HD uint32_t for_weight() const { return word0 >> 16; }
  ADAMW_HD uint32_t for_first_moment() const { return word1 & 0xffffu; }
  ADAMW_HD uint32_t for_second_moment() const { return word1 >> 16; }
};

ADAMW_HD RandomBits random_bits(uint64_t key, int64_t element) {
  auto c0 = static_cast<uint32_t>(element);
  uint32_t c1 = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32) ^ static_cast<uint32_t>(key >> 32);
  auto k = static_cast<uint32_t>(key);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier) * c0;
    c0 = static_cast<uint32_t>(product >> 32) ^ k ^ c1;
    c1 = static_cast<uint32_t>(product);
    k += kPhiloxWeyl;
  }
  return {c0, c1};
}

}  // namespace
