// The random words of many elements at once. philox.h says what they are; this says how a CPU's vectors draw them fast.
//
// A round needs the whole product of two 32-bit integers. x86 multiplies the lower halves of 64-bit lanes, one
// instruction with one result, but gcc 12 turns a loop over 32-bit words into 64 x 64-bit products, of three
// micro-operations on Intel, and sorts halves between lanes every round. So an element stays in a 64-bit lane of its
// own for all rounds, and what garbage its upper half holds meanwhile is never looked at: three instructions a round
// and register, and one shuffle at the end. Cycles for 16 elements, Sapphire Rapids with both cores busy: 29 with
// AVX-512 where the loop takes 120, 52 with AVX2 (216), 102 with SSE2 (232).
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
constexpr int64_t kDrawn = kChains * kLanes;
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

// Lower halves of the lanes of `a`, then those of `b`.
ADAMW_HD void store_lower_halves(uint32_t* to, Lanes a, Lanes b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b));
#elif defined(__AVX2__)
  const __m256d halves = (__m256d)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm256_permute4x64_pd(halves, 0xd8));
#else
  _mm_storeu_ps((float*)to, _mm_shuffle_ps((__m128)a, (__m128)b, 0x88));
#endif
}

// `count` is rounded up to a multiple of kDrawn: room for so many words. A word that is not wanted is not written,
// which saves an eighth.
template <bool kWord0, bool kWord1>
void draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* word0, uint32_t* word1) {
  Lanes element[kChains];
  for (int j = 0; j < kChains; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) element[j][lane] = static_cast<uint64_t>(j * kLanes + lane);
    element[j] += static_cast<uint64_t>(first);
  }
  const Lanes multiplier = Lanes{} + kPhiloxMultiplier;
  for (int64_t i = 0; i < count; i += kDrawn) {
    Lanes c0[kChains], c1[kChains];
    for (int j = 0; j < kChains; ++j) {
      c0[j] = element[j];
      c1[j] = (element[j] >> 32) ^ (key >> 32);
      element[j] += kDrawn;
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
    for (int j = 0; j < kChains; j += 2) {
      if (kWord0) store_lower_halves(word0 + i + j * kLanes, c0[j], c0[j + 1]);
      if (kWord1) store_lower_halves(word1 + i + j * kLanes, c1[j], c1[j + 1]);
    }
  }
}

#else

constexpr int64_t kDrawn = 1;

template <bool kWord0, bool kWord1>
void draw_words(uint64_t key, int64_t first, int64_t count, uint32_t* word0, uint32_t* word1) {
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const RandomBits random = random_bits(key, first + i);
    if (kWord0) word0[i] = random.word0;
    if (kWord1) word1[i] = random.word1;
  }
}

#endif

}  // namespace
