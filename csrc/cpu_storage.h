// Where one tensor's weights and moments lie, in every storage format: element by element, or two neighbours at a time.
//
// An accessor is made of a tensor's row. get(i) and first(i), second(i) read element i as float32 (float64 of float64
// weights); set() rounds and writes it, with the element's random word where the format rounds by chance. The `_two`
// kinds do so for elements i and i + 1. formats.h says how a value is stored; nothing here computes.
#pragma once

#include "formats.h"
#include "launch_table.h"
#include "philox.h"

namespace {

// Into the cache, if there is such memory: what lies behind an operand's end is no harm.
template <int64_t kCount, typename T>
ADAMW_HD void prefetch_elements(const T* first) {
  for (int64_t k = 0; k < kCount * static_cast<int64_t>(sizeof(T)); k += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(first) + k);
  }
}

// Two neighbours of 16 or of 8 bits as one integer, wherever they lie, the first in its lower half.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of two neighbours is the lower half");
typedef uint32_t TwoOf16 __attribute__((may_alias, aligned(2)));
typedef uint16_t TwoOf8 __attribute__((may_alias, aligned(1)));

template <typename T>
struct Two {
  T even, odd;
};

// Two bfloat16 are the halves of a register's lane, from which loops over single elements move each to a lane of its
// own and back.
ADAMW_HD Two<float> load_two(const bf16* x) {
  const uint32_t both = *reinterpret_cast<const TwoOf16*>(x);
  return {bits_float(both << 16), bits_float(both & 0xffff0000u)};
}
ADAMW_HD void store_two(bf16* x, uint32_t even, uint32_t odd) { *reinterpret_cast<TwoOf16*>(x) = even | odd << 16; }
ADAMW_HD void store_two(bf16* x, Two<float> value) {
  store_two(x, float_to_bf16(value.even), float_to_bf16(value.odd));
}
ADAMW_HD void store_two_stochastically(bf16* x, Two<float> value, uint32_t even, uint32_t odd) {
  store_two(x, float_to_bf16_stochastic(value.even, even), float_to_bf16_stochastic(value.odd, odd));
}

ADAMW_HD Two<float> load_two(const float* x) { return {x[0], x[1]}; }
ADAMW_HD void store_two(float* x, Two<float> value) {
  x[0] = value.even;
  x[1] = value.odd;
}

ADAMW_HD Two<int32_t> load_two(const int16_t* x) {
  const uint32_t both = *reinterpret_cast<const TwoOf16*>(x);
  return {static_cast<int32_t>(both << 16) >> 16, static_cast<int32_t>(both) >> 16};
}
ADAMW_HD void store_two(int16_t* x, int32_t even, int32_t odd) {
  *reinterpret_cast<TwoOf16*>(x) = (static_cast<uint32_t>(even) & 0xffffu) | static_cast<uint32_t>(odd) << 16;
}
ADAMW_HD Two<int32_t> load_two(const int8_t* x) {
  const uint32_t both = *reinterpret_cast<const TwoOf8*>(x);
  return {static_cast<int32_t>(both << 24) >> 24, static_cast<int32_t>(both << 16) >> 24};
}
ADAMW_HD void store_two(int8_t* x, int32_t even, int32_t odd) {
  *reinterpret_cast<TwoOf8*>(x) =
      static_cast<uint16_t>((static_cast<uint32_t>(even) & 0xffu) | static_cast<uint32_t>(odd) << 8);
}

// Where a tensor's weights are read from and written to, and whether with random bits.
template <typename Param>
struct NativeWeights {
  using P = Param;
  static constexpr bool kRandom = false;
  P* p;
  explicit NativeWeights(const TensorRow& row) : p(reinterpret_cast<P*>(row.param)) {}
  ADAMW_HD typename compute_type<P>::type get(int64_t i) const { return load<typename compute_type<P>::type>(p + i); }
  ADAMW_HD void set(int64_t i, typename compute_type<P>::type weight, RandomBits /*random*/) const {
    store(p + i, weight);
  }
  ADAMW_HD Two<float> get_two(int64_t i) const { return load_two(p + i); }
  ADAMW_HD void set_two(int64_t i, Two<float> weight, Two<RandomBits> /*random*/) const { store_two(p + i, weight); }
  template <int64_t kCount>
  ADAMW_HD void prefetch(int64_t i) const {
    prefetch_elements<kCount>(p + i);
  }
};

template <typename Param>
struct StochasticWeights : NativeWeights<Param> {
  static constexpr bool kRandom = true;
  using NativeWeights<Param>::NativeWeights;
  ADAMW_HD void set(int64_t i, float weight, RandomBits random) const {
    store_stochastic(this->p + i, weight, random.for_weight());
  }
  ADAMW_HD void set_two(int64_t i, Two<float> weight, Two<RandomBits> random) const {
    store_two_stochastically(this->p + i, weight, random.even.for_weight(), random.odd.for_weight());
  }
};

// kKept: bits of the weight's magnitude that the remainder keeps.
template <typename Param, typename Remainder, int kKept>
struct SplitWeights {
  using P = Param;
  static constexpr bool kRandom = kKept < split_of<P>::kBits;
  static constexpr int32_t kUnit = 1 << (split_of<P>::kBits - kKept);  // of the remainder
  P* p;
  Remainder* remainder;
  explicit SplitWeights(const TensorRow& row)
      : p(reinterpret_cast<P*>(row.param)), remainder(reinterpret_cast<Remainder*>(row.remainder)) {}
  ADAMW_HD float get(int64_t i) const { return merge_weight<P>(p[i].bits, static_cast<int32_t>(remainder[i]) * kUnit); }
  ADAMW_HD void set(int64_t i, float weight, RandomBits random) const {
    const SplitWeight split = split_weight<P, kKept>(weight, kRandom ? random.for_weight() : 0u);
    p[i].bits = static_cast<uint16_t>(split.weight);
    remainder[i] = static_cast<Remainder>(split.remainder);
  }
  ADAMW_HD Two<float> get_two(int64_t i) const {
    const uint32_t both = *reinterpret_cast<const TwoOf16*>(p + i);
    const Two<int32_t> rest = load_two(remainder + i);
    return {merge_weight<P>(static_cast<uint16_t>(both & 0xffffu), rest.even * kUnit),
            merge_weight<P>(static_cast<uint16_t>(both >> 16), rest.odd * kUnit)};
  }
  ADAMW_HD void set_two(int64_t i, Two<float> weight, Two<RandomBits> random) const {
    const SplitWeight even = split_weight<P, kKept>(weight.even, kRandom ? random.even.for_weight() : 0u);
    const SplitWeight odd = split_weight<P, kKept>(weight.odd, kRandom ? random.odd.for_weight() : 0u);
    store_two(p + i, even.weight, odd.weight);
    store_two(remainder + i, even.remainder, odd.remainder);
  }
  template <int64_t kCount>
  ADAMW_HD void prefetch(int64_t i) const {
    prefetch_elements<kCount>(p + i);
    prefetch_elements<kCount>(remainder + i);
  }
};
template <typename P>
using Split24Weights = SplitWeights<P, int8_t, 8>;
template <typename P>
using Split32Weights = SplitWeights<P, int16_t, split_of<P>::kBits>;

// Where its moments are.
template <typename T>
struct WideMoments {
  static constexpr bool kRandom = false;
  T *m, *v;
  explicit WideMoments(const TensorRow& row)
      : m(reinterpret_cast<T*>(row.exp_avg)), v(reinterpret_cast<T*>(row.exp_avg_sq)) {}
  ADAMW_HD T first(int64_t i) const { return m[i]; }
  ADAMW_HD T second(int64_t i) const { return v[i]; }
  ADAMW_HD void set(int64_t i, T first, T second, RandomBits /*random*/) const {
    m[i] = first;
    v[i] = second;
  }
  template <int64_t kCount>
  ADAMW_HD void prefetch(int64_t i) const {
    prefetch_elements<kCount>(m + i);
    prefetch_elements<kCount>(v + i);
  }
};

struct Bf16Moments {
  static constexpr bool kRandom = true;
  bf16 *m, *v;
  explicit Bf16Moments(const TensorRow& row)
      : m(reinterpret_cast<bf16*>(row.exp_avg)), v(reinterpret_cast<bf16*>(row.exp_avg_sq)) {}
  ADAMW_HD float first(int64_t i) const { return load<float>(m + i); }
  ADAMW_HD float second(int64_t i) const { return load<float>(v + i); }
  ADAMW_HD void set(int64_t i, float first, float second, RandomBits random) const {
    store_stochastic(m + i, first, random.for_first_moment());
    store_stochastic(v + i, second, random.for_second_moment());
  }
  ADAMW_HD Two<float> first_two(int64_t i) const { return load_two(m + i); }
  ADAMW_HD Two<float> second_two(int64_t i) const { return load_two(v + i); }
  ADAMW_HD void set_two(int64_t i, Two<float> first, Two<float> second, Two<RandomBits> random) const {
    store_two_stochastically(m + i, first, random.even.for_first_moment(), random.odd.for_first_moment());
    store_two_stochastically(v + i, second, random.even.for_second_moment(), random.odd.for_second_moment());
  }
  template <int64_t kCount>
  ADAMW_HD void prefetch(int64_t i) const {
    prefetch_elements<kCount>(m + i);
    prefetch_elements<kCount>(v + i);
  }
};

}  // namespace
