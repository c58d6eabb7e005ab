// The random words of many elements at once. philox.h says what they are; this says how a CPU's vectors draw them fast.
//
// A round needs the whole product of two 32-bit integers. x86 multiplies the lower halves of 64-bit lanes, one
// instruction with one result, but gcc 12 turns a loop over 32-bit words into 64 x 64-bit products, of three
// micro-operations on Intel, and sorts halves between lanes every round: four times the cycles with AVX-512 and AVX2,
// twice as many with SSE2. So a call stays in a 64-bit lane of its own for all rounds, and what garbage its upper half
// holds meanwhile is never looked at: three instructions a round and register, and two at the end, when both words take
// the lane's halves, which is the order of their elements.
#pragma once

#include "cpu_vectorize.h"
#include "philox.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#ifdef __SSE2__

constexpr int kLanes = kRegisterBytes / 8;
constexpr int kChains = 4;  // registers at a time: a product takes five cycles, and one may start in each
constexpr int64_t kDrawn = 2 * kChains * kLanes;  // words
typedef uint64_t Lanes __attribute__((vector_size(kRegisterBytes)));

// Of the lower halves, whole.
ADAMW_HD Lanes product(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // unmasked: gcc 12 warns of its own header
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// The upper half of a product where its lower half was. With AVX-512, products and shifts share one port of Intel's
// cores, which shuffles leave to the products: 7 % fewer cycles.
ADAMW_HD Lanes upper_half(Lanes whole) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_shuffle_epi32(0xffff, (__m512i)whole, _MM_PERM_DDBB);  // unmasked: as in product()
#else
  return whole >> 32;
#endif
}

// kChains registers of calls, one after the other or, for planes, every other one in every second register. Then the
// calls' words stand in the lower halves of `even` and `odd`.
template <bool kPlanes>
struct Calls {
  Lanes pair[kChains];
  uint64_t key;

  ADAMW_HD Calls(uint64_t the_key, int64_t first) : key(the_key) {
    for (int j = 0; j < kChains; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int call = kPlanes ? 2 * (j / 2 * kLanes + lane) + j % 2 : j * kLanes + lane;
        pair[j][lane] = static_cast<uint64_t>(call);
      }
      pair[j] += static_cast<uint64_t>(first >> 1);
    }
  }

  ADAMW_HD void next(Lanes (&even)[kChains], Lanes (&odd)[kChains]) {
    const Lanes multiplier = Lanes{} + kPhiloxMultiplier;
    for (int j = 0; j < kChains; ++j) {
      even[j] = pair[j];
      odd[j] = (pair[j] >> 32) ^ (key >> 32);
      pair[j] += kDrawn / 2;
    }
    auto k = static_cast<uint32_t>(key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int j = 0; j < kChains; ++j) {
        const Lanes whole = product(even[j], multiplier);
        even[j] = upper_half(whole) ^ static_cast<uint64_t>(k) ^ odd[j];
        odd[j] = whole;
      }
      k += kPhiloxWeyl;
    }
  }
};

ADAMW_HD void store_halves(Lanes lower, Lanes upper, uint32_t* words) {
  const Lanes both = (lower & 0xffffffffu) | (upper << 32);
  memcpy(words, &both, sizeof(both));
}

// The words of `count` elements from `first` on. `words` has room for `count` and one more, rounded up to a multiple of
// kDrawn; the first element's word is where the result points: an odd one's stands behind that of the one before.
ADAMW_HD const uint32_t* draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* words) {
  Calls<false> calls(key, first);
  const int64_t drawn = count + (first & 1);
  for (int64_t i = 0; i < drawn; i += kDrawn) {
    Lanes even[kChains], odd[kChains];
    calls.next(even, odd);
    for (int j = 0; j < kChains; ++j) store_halves(even[j], odd[j], words + i + 2 * j * kLanes);
  }
  return words + (first & 1);
}

// The same for `pairs` pairs of neighbours from the even element `first` on, those of even and of odd elements apart.
// `pairs` is a multiple of kDrawn / 2.
ADAMW_HD void draw_planes(uint64_t key, int64_t first, int64_t pairs, uint32_t* of_even, uint32_t* of_odd) {
  Calls<true> calls(key, first);
  for (int64_t i = 0; i < pairs; i += kDrawn / 2) {
    Lanes even[kChains], odd[kChains];
    calls.next(even, odd);
    for (int j = 0; j < kChains; j += 2) {
      store_halves(even[j], even[j + 1], of_even + i + j * kLanes);
      store_halves(odd[j], odd[j + 1], of_odd + i + j * kLanes);
    }
  }
}

#else

constexpr int64_t kDrawn = 1;

ADAMW_HD const uint32_t* draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* words) {
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) words[i] = random_bits(key, first + i).word;
  return words;
}

ADAMW_HD void draw_planes(uint64_t key, int64_t first, int64_t pairs, uint32_t* of_even, uint32_t* of_odd) {
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < pairs; ++i) {
    of_even[i] = random_bits(key, first + 2 * i).word;
    of_odd[i] = random_bits(key, first + 2 * i + 1).word;
  }
}

#endif

}  // namespace
