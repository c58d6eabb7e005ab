// Every float32 through the split weights of csrc/formats.h and back.
//
// What must come out is said here in integers alone, in other words than the header's: a float32's magnitude in units
// of the last bit that the format can hold, of which a weight and its remainder are the upper and the lower part.
#include <stdint.h>

#include <initializer_list>

#include "formats.h"

namespace {

// Of a magnitude in float16's units (2^-37 below 2^-14): the first infinite one, and the last that rounds to 65504.
constexpr uint32_t kHalfInfinity = 31u << 23, kHalfLargest = kHalfInfinity - (1u << 12) - 1;

// float32 bits -> units, to nearest, ties to even. `a`: finite, of biased exponent `e`.
template <typename P>
uint32_t units_of(uint32_t a, uint32_t e);

template <>
uint32_t units_of<bf16>(uint32_t a, uint32_t) {
  return a;
}

template <>
uint32_t units_of<fp16>(uint32_t a, uint32_t e) {
  if (e >= 113) return a - (112u << 23);
  const uint32_t mantissa = (a & 0x7fffffu) | (e > 0 ? 0x800000u : 0u);
  const uint32_t shift = e > 0 ? 113 - e : 112;
  if (shift > 25) return 0;
  const uint32_t whole = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  return whole + ((rest > half) | ((rest == half) & (whole & 1u)));
}

template <typename P>
uint32_t bits_of_units(uint32_t units);

template <>
uint32_t bits_of_units<bf16>(uint32_t units) {
  return units;
}

template <>
uint32_t bits_of_units<fp16>(uint32_t units) {
  const uint32_t small = float_bits(static_cast<float>(static_cast<int32_t>(units)) * 0x1p-37f);
  return units >= kHalfInfinity ? 0x7f800000u : units >= (1u << 23) ? units + (112u << 23) : small;
}

template <typename P>
struct format;
template <>
struct format<bf16> {
  static constexpr int kBits = 16;
  static constexpr uint32_t kInfinity = 0x7f800000u, kLargest = 0x7f7fffffu;
  static uint32_t stored(float x, uint32_t random) { return float_to_bf16_stochastic(x, random); }
};
template <>
struct format<fp16> {
  static constexpr int kBits = 13;
  static constexpr uint32_t kInfinity = kHalfInfinity, kLargest = kHalfLargest;
  static uint32_t stored(float x, uint32_t random) { return float_to_fp16_stochastic(x, random); }
};

// What is to be stored, in units without the dropped bits: the one below, or the one above where `random`, 16 bits,
// and what is cut off make a whole.
template <typename P, int kKept>
uint32_t expected_of(uint32_t a, uint32_t e, uint32_t random) {
  constexpr int kDropped = format<P>::kBits - kKept;
  constexpr bool kMayOverflow = kKept == 0 && format<P>::kBits == 16;  // a bfloat16 without a remainder
  if (a >= 0x7f800000u) return format<P>::kInfinity >> kDropped;
  const uint32_t units = units_of<P>(a, e), cut_off = units & ((1u << kDropped) - 1);
  const uint32_t up = cut_off + (kDropped ? random >> (16 - kDropped) : 0u) >= (1u << kDropped);
  const uint32_t nearby = (units >> kDropped) + up, largest = format<P>::kLargest >> kDropped;
  return nearby > largest && !kMayOverflow ? largest : nearby;
}

// One loop a stage over a few patterns, as in csrc/cpu_tile.h: each vectorises.
constexpr uint32_t kTile = 1024;

struct Tile {
  uint32_t a[kTile];         // patterns without their sign
  uint32_t random[kTile];    // 16 bits, where any are dropped
  uint32_t expected[kTile];  // without the dropped bits
  uint32_t stored[kTile];
  int32_t remainder[kTile];
  uint32_t merged[kTile];
};

template <typename P, int kKept>
void store_and_load(Tile& tile, uint32_t sign) {
  constexpr int kDropped = format<P>::kBits - kKept;
  for (uint32_t i = 0; i < kTile; ++i) {
    const float x = bits_float(tile.a[i] | sign);
    if constexpr (kKept == 0) {
      tile.stored[i] = format<P>::stored(x, tile.random[i]);
    } else {
      const SplitWeight split = split_weight<P, kKept>(x, tile.random[i]);
      tile.stored[i] = split.weight;
      tile.remainder[i] = split.remainder;
    }
  }
  if constexpr (kKept > 0) {
    for (uint32_t i = 0; i < kTile; ++i) {
      tile.merged[i] =
          float_bits(merge_weight<P>(static_cast<uint16_t>(tile.stored[i]), tile.remainder[i] * (1 << kDropped)));
    }
  }
}

// How many of the tile's patterns are stored otherwise than they must be.
template <typename P, int kKept>
uint32_t count_wrong(const Tile& tile, uint32_t sign) {
  constexpr int kDropped = format<P>::kBits - kKept;
  constexpr uint32_t kInfiniteWeight = format<P>::kInfinity >> format<P>::kBits;
  uint32_t count = 0;
  for (uint32_t i = 0; i < kTile; ++i) {
    const uint32_t nan = tile.a[i] > 0x7f800000u, weight = tile.stored[i] & 0x7fffu, expected = tile.expected[i];
    uint32_t wrong = (tile.stored[i] << 16 & 0x80000000u) != sign;
    if constexpr (kKept == 0) {
      wrong |= nan ? weight <= kInfiniteWeight : weight != expected;
    } else {
      const uint32_t lower = expected & ((1u << kKept) - 1), up = lower >> (kKept - 1);
      const int32_t below = static_cast<int32_t>(lower) - static_cast<int32_t>(up << kKept);
      const uint32_t merged = bits_of_units<P>(expected << kDropped) | sign;
      wrong |= nan ? weight <= kInfiniteWeight : weight != (expected >> kKept) + up;
      wrong |= tile.remainder[i] != (nan ? 0 : below);
      wrong |= nan ? (tile.merged[i] & 0x7fffffffu) <= 0x7f800000u : tile.merged[i] != merged;
    }
    count += wrong;
  }
  return count;
}

// A quarter of all patterns each: none, and all ones, which round down and up whatever is cut off; else any.
uint32_t random_of(uint32_t a) {
  const uint32_t hash = a * 0x9e3779b1u;
  return hash < 0x40000000u ? 0u : hash < 0x80000000u ? 0xffffu : hash >> 8 & 0xffffu;
}

template <typename P, int kKept>
uint64_t violations(uint32_t begin, uint32_t end, uint32_t every) {
  uint64_t count = 0;
  Tile tile;
  for (uint32_t e = begin; e < end; ++e) {
    for (uint32_t first = e << 23; first < (e + 1) << 23; first += every * kTile) {
      for (uint32_t i = 0; i < kTile; ++i) {
        tile.a[i] = first + i;
        tile.random[i] = random_of(first + i);
        tile.expected[i] = expected_of<P, kKept>(first + i, e, tile.random[i]);
      }
      for (const uint32_t sign : {0u, 0x80000000u}) {
        store_and_load<P, kKept>(tile, sign);
        count += count_wrong<P, kKept>(tile, sign);
      }
    }
  }
  return count;
}

}  // namespace

// How many patterns with biased exponents [begin, end), of either sign, are stored wrongly. `kept`: bits beyond the
// weight's own. Of `every` tiles of 1,024 neighbours one is looked at.
extern "C" uint64_t wrong_patterns(int is_float16, int kept, uint32_t begin, uint32_t end, uint32_t every) {
  if (is_float16) {
    return kept == 0   ? violations<fp16, 0>(begin, end, every)
           : kept == 8 ? violations<fp16, 8>(begin, end, every)
                       : violations<fp16, 13>(begin, end, every);
  }
  return kept == 0   ? violations<bf16, 0>(begin, end, every)
         : kept == 8 ? violations<bf16, 8>(begin, end, every)
                     : violations<bf16, 16>(begin, end, every);
}
