// Counter-based random bits for stochastic rounding: one 32-bit word an element and step, which serves all its
// roundings.
//
// They depend on the seed, the tensor, the step and the element's index in the whole tensor alone, never on chunks,
// threads, launch geometry or shards. Philox2x32 with 7 rounds, the fewest that pass BigCrush; a call gives the words
// of two neighbours, of which the first has an even index.
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

// The word of one element: 16 bits for each thing that may be rounded. The weight's are the sum without carries of both
// moments', independent of either. The average's, which lie across both, are independent of the weight's, and of a
// moment's but for eight bits that they share: last ones of the one, first ones of the other.
struct RandomBits {
  uint32_t word;
  ADAMW_HD uint32_t for_first_moment() const { return word & 0xffffu; }
  ADAMW_HD uint32_t for_second_moment() const { return word >> 16; }
  ADAMW_HD uint32_t for_weight() const { return (word ^ (word >> 16)) & 0xffffu; }
  ADAMW_HD uint32_t for_average() const { return (word >> 8) & 0xffffu; }
};

// The words of elements 2 * pair and 2 * pair + 1, when all rounds are done.
struct RandomPair {
  uint32_t even, odd;
};

ADAMW_HD RandomPair counter_of(uint64_t key, int64_t pair) {
  return {static_cast<uint32_t>(pair),
          static_cast<uint32_t>(static_cast<uint64_t>(pair) >> 32) ^ static_cast<uint32_t>(key >> 32)};
}

// The rounds of kCalls calls, side by side: the round's key is then computed once for all of them.
template <int kCalls>
ADAMW_HD void do_rounds(uint64_t key, RandomPair (&pairs)[kCalls]) {
  auto k = static_cast<uint32_t>(key);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier) * pairs[i].even;
      pairs[i] = {static_cast<uint32_t>(product >> 32) ^ k ^ pairs[i].odd, static_cast<uint32_t>(product)};
    }
    k += kPhiloxWeyl;
  }
}

ADAMW_HD RandomBits random_bits(uint64_t key, int64_t element) {
  RandomPair pair[1] = {counter_of(key, element >> 1)};
  do_rounds(key, pair);
  return {element & 1 ? pair[0].odd : pair[0].even};
}

}  // namespace
