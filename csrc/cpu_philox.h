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

// The words of `count` elements from `first` on. `words` has room for `count` and one more, rounded up to a multiple of
// kDrawn; the first element's word is where the result points: an odd one's stands behind that of the one before.
ADAMW_HD const uint32_t* draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* words) {
  Lanes pair[kChains];
  for (int j = 0; j < kChains; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) pair[j][lane] = static_cast<uint64_t>(j * kLanes + lane);
    pair[j] += static_cast<uint64_t>(first >> 1);
  }
  const Lanes multiplier = Lanes{} + kPhiloxMultiplier;
  const int64_t drawn = count + (first & 1);
  for (int64_t i = 0; i < drawn; i += kDrawn) {
    Lanes c0[kChains], c1[kChains];
    for (int j = 0; j < kChains; ++j) {
      c0[j] = pair[j];
      c1[j] = (pair[j] >> 32) ^ (key >> 32);
      pair[j] += kDrawn / 2;
    }
    auto k = static_cast<uint32_t>(key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int j = 0; j < kChains; ++j) {
        const Lanes whole = product(c0[j], multiplier);
        c0[j] = upper_half(whole) ^ static_cast<uint64_t>(k) ^ c1[j];
        c1[j] = whole;
      }
      k += kPhiloxWeyl;
    }
    for (int j = 0; j < kChains; ++j) {
      const Lanes both = (c0[j] & 0xffffffffu) | (c1[j] << 32);
      memcpy(words + i + 2 * j * kLanes, &both, sizeof(both));
    }
  }
  return words + (first & 1);
}

#else

constexpr int64_t kDrawn = 1;

ADAMW_HD const uint32_t* draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* words) {
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) words[i] = random_bits(key, first + i).word;
  return words;
}

#endif

}  // namespace
