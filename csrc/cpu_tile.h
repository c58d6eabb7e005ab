// The update of tensors whose weights or moments are stored in a form that arithmetic does not have: some
// hundred elements at a time are unpacked into float32, updated, and packed again, all within the first-level cache.
// SGD, AMSGrad and the rule's variants come here, and ragged ends of moments in 8 bits: the plain rule has loops for
// each form, in cpu_loop.cpp, which share the codes of 8 bits with this.
//
// Each stage is a loop of its own, which the compiler vectorises; a loop for every combination of formats would be a
// hundred of them, and would not be vectorised where groups of sixteen meet.
#pragma once

#include "cpu_philox.h"
#include "cpu_vectorize.h"
#include "moments8.h"
#include "philox.h"
#include "rule.h"

namespace {

// What leaves room in the first-level cache for the operands. Beside 512 elements, which fill it: a tenth faster.
constexpr int64_t kTile = 256;
constexpr int64_t kTileGroups = kTile / kGroup;
static_assert(kTile % kDrawn == 0, "draw_words() fills whole rounds");

// Elements [begin, begin + count) of one tensor; `count` is kTile but for the chunk's last tile.
struct Tile {
  const TensorRow* row;
  int64_t grad;
  const Coefficients<float>* coefficients;
  uint64_t key;
  int64_t begin;
  int64_t count;
  alignas(64) float weight[kTile];
  alignas(64) float gradient[kTile];
  alignas(64) float first[kTile];
  alignas(64) float second[kTile];
  alignas(64) uint32_t drawn[kTile + kDrawn];
  const uint32_t* random;  // of `drawn`, the word of the first element
  // Of moments in 8 bits: m as it was decoded, m / s, by how much that moved, and what is found on the way.
  alignas(64) float before[kTile];
  alignas(64) float ratio[kTile];
  alignas(64) float distance[kTile];
  alignas(64) uint32_t bits[kTile];
  alignas(64) int32_t first_code[kTile];
  alignas(64) uint32_t second_code[kTile];
  alignas(64) uint32_t rank[kTile];
  // Of its groups.
  alignas(64) uint32_t greatest[kTileGroups];
  alignas(64) uint32_t word[kTileGroups];
  alignas(64) float step[kTileGroups];
  alignas(64) float two_steps[kTileGroups];
  alignas(64) float steps_per_ratio[kTileGroups];
};

template <typename T>
T* elements(int64_t address, const Tile& tile) {
  return reinterpret_cast<T*>(address) + tile.begin;
}

int64_t format_of(int64_t flags, int shift) { return (flags >> shift) & kFormatMask; }

// --- weights --------------------------------------------------------------------------------------------------------

template <typename P>
void load_weights(Tile& tile) {
  const P* p = elements<P>(tile.row->param, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) tile.weight[i] = load<float>(p + i);
}

template <typename P, typename Remainder, int kShift>
void merge_weights(Tile& tile) {
  const P* p = elements<P>(tile.row->param, tile);
  const Remainder* remainder = elements<Remainder>(tile.row->remainder, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    tile.weight[i] = merge_weight<P>(p[i].bits, static_cast<int32_t>(remainder[i]) * (1 << kShift));
  }
}

template <typename P>
void store_weights(Tile& tile) {
  P* p = elements<P>(tile.row->param, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) store(p + i, tile.weight[i]);
}

template <typename P>
void store_weights_stochastically(Tile& tile) {
  P* p = elements<P>(tile.row->param, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    store_stochastic(p + i, tile.weight[i], RandomBits{tile.random[i]}.for_weight());
  }
}

template <typename P, typename Remainder, int kKept>
void split_weights(Tile& tile) {
  P* p = elements<P>(tile.row->param, tile);
  Remainder* remainder = elements<Remainder>(tile.row->remainder, tile);
  constexpr bool kRandom = kKept < split_of<P>::kBits;
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t random = kRandom ? RandomBits{tile.random[i]}.for_weight() : 0u;
    const SplitWeight split = split_weight<P, kKept>(tile.weight[i], random);
    p[i].bits = static_cast<uint16_t>(split.weight);
    remainder[i] = static_cast<Remainder>(split.remainder);
  }
}

using TileStage = void (*)(Tile&);

// [bfloat16, float16][ParamFormat]
constexpr TileStage kLoadWeights[2][4] = {
    {load_weights<bf16>, load_weights<bf16>, merge_weights<bf16, int8_t, split_of<bf16>::kBits - 8>,
     merge_weights<bf16, int16_t, 0>},
    {load_weights<fp16>, load_weights<fp16>, merge_weights<fp16, int8_t, split_of<fp16>::kBits - 8>,
     merge_weights<fp16, int16_t, 0>},
};
constexpr TileStage kStoreWeights[2][4] = {
    {store_weights<bf16>, store_weights_stochastically<bf16>, split_weights<bf16, int8_t, 8>,
     split_weights<bf16, int16_t, split_of<bf16>::kBits>},
    {store_weights<fp16>, store_weights_stochastically<fp16>, split_weights<fp16, int8_t, 8>,
     split_weights<fp16, int16_t, split_of<fp16>::kBits>},
};

TileStage weight_stage(const TensorRow& row, const TileStage (&of_16_bits)[2][4], TileStage of_float32) {
  const int64_t dtype = (row.flags >> kParamDtypeShift) & kDtypeMask;
  return dtype == kF32 ? of_float32 : of_16_bits[dtype == kF16][format_of(row.flags, kParamFormatShift)];
}

// --- gradients -----------------------------------------------------------------------------------------------------

template <typename G>
void load_gradients(Tile& tile) {
  const G* g = elements<G>(tile.grad, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) tile.gradient[i] = load<float>(g + i);
}

// In the order of DtypeCode.
constexpr TileStage kLoadGradients[kDtypes] = {load_gradients<float>, load_gradients<bf16>, load_gradients<fp16>,
                                               nullptr};

// --- moments -------------------------------------------------------------------------------------------------------

template <typename M>
void load_moments(Tile& tile) {
  const M* m = elements<M>(tile.row->exp_avg, tile);
  const M* v = elements<M>(tile.row->exp_avg_sq, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    tile.first[i] = load<float>(m + i);
    tile.second[i] = load<float>(v + i);
  }
}

// SGD's momentum buffer alone.
template <typename M>
void load_buffer(Tile& tile) {
  const M* m = elements<M>(tile.row->exp_avg, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) tile.first[i] = load<float>(m + i);
}

void store_buffer_wide(Tile& tile) {
  memcpy(elements<float>(tile.row->exp_avg, tile), tile.first, tile.count * sizeof(float));
}

void store_buffer_in_bf16(Tile& tile) {
  bf16* m = elements<bf16>(tile.row->exp_avg, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    store_stochastic(m + i, tile.first[i], RandomBits{tile.random[i]}.for_first_moment());
  }
}

void no_buffer(Tile& tile) { memset(tile.first, 0, sizeof(tile.first)); }

void keep_no_buffer(Tile& /*tile*/) {}

void store_moments_wide(Tile& tile) {
  store_buffer_wide(tile);
  memcpy(elements<float>(tile.row->exp_avg_sq, tile), tile.second, tile.count * sizeof(float));
}

void store_moments_in_bf16(Tile& tile) {
  bf16* m = elements<bf16>(tile.row->exp_avg, tile);
  bf16* v = elements<bf16>(tile.row->exp_avg_sq, tile);
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const RandomBits random = {tile.random[i]};
    store_stochastic(m + i, tile.first[i], random.for_first_moment());
    store_stochastic(v + i, tile.second[i], random.for_second_moment());
  }
}

// --- moments in 8 bits: loops over elements, and over groups of sixteen, all in 32 bits ------------------------------

// A loop over a group is one register of AVX-512, if nothing in it is narrower than 32 bits: gcc would take registers
// of 16 bytes, for sixteen codes, throughout, which also is what it makes of a loop that only widens or narrows them.

template <typename Code, typename Word>
void widen_codes(const Code* from, Word* to) {
#ifdef __AVX512F__
  const __m128i codes = _mm_loadu_si128((const __m128i*)from);
  const bool is_signed = static_cast<Code>(-1) < 0;
  _mm512_storeu_si512(to, is_signed ? _mm512_maskz_cvtepi8_epi32(0xffff, codes)  // unmasked: gcc 12 warns
                                    : _mm512_maskz_cvtepu8_epi32(0xffff, codes));
#else
  for (int64_t i = 0; i < kGroup; ++i) to[i] = from[i];
#endif
}

// The lower bytes.
template <typename Code, typename Word>
void narrow_codes(const Word* from, Code* to) {
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_loadu_si512(from)));
#else
  for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<Code>(from[i]);
#endif
}

constexpr Codebooks kCodebooks = make_codebooks();

// Elements of a tile's groups: `count` and what lies behind a tensor's end, which is zero throughout.
int64_t padded(const Tile& tile) { return (tile.count + kGroup - 1) / kGroup * kGroup; }

void halve(const uint32_t* from, uint32_t* to, int64_t count) {
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    const auto a = static_cast<int32_t>(from[2 * i]), b = static_cast<int32_t>(from[2 * i + 1]);
    to[i] = static_cast<uint32_t>(a > b ? a : b);
  }
}

// The greatest of each group, neighbour by neighbour: three instructions a group of what every ISA can shuffle, where
// sixteen elements on their own would take a dozen. `x` is below 2^31: SSE2 compares signed integers only.
void find_greatest(Tile& tile, const uint32_t* x) {
  const int64_t groups = padded(tile) / kGroup;
  alignas(64) uint32_t eight[kTile / 2], four[kTile / 4], two[kTile / 8];
  halve(x, eight, 8 * groups);
  halve(eight, four, 4 * groups);
  halve(four, two, 2 * groups);
  halve(two, tile.greatest, groups);
}

// What lies behind a tensor's end is zero throughout.
void load_moments8(Tile& tile) {
  const uint16_t* words = reinterpret_cast<const uint16_t*>(tile.row->groups) + tile.begin / kGroup;
  const int8_t* first_code = elements<int8_t>(tile.row->exp_avg, tile);
  const uint8_t* second_code = elements<uint8_t>(tile.row->exp_avg_sq, tile);
  const int64_t count = tile.count, whole = count / kGroup * kGroup, end = padded(tile);
  for (int64_t i = 0; i < whole; i += kGroup) {
    widen_codes(first_code + i, tile.first_code + i);
    widen_codes(second_code + i, tile.second_code + i);
  }
  for (int64_t i = whole; i < end; ++i) {
    const bool there = i < count;
    tile.first_code[i] = there ? first_code[i] : 0;
    tile.second_code[i] = there ? second_code[i] : 0;
    if (!there) tile.weight[i] = tile.gradient[i] = 0.0f;
  }
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) {
    const uint32_t word = words[group];
    tile.word[group] = word;
    tile.step[group] = ratio_step(word & 15u);
  }
  const float unscale = tile.coefficients->unscale;
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const uint32_t word = tile.word[begin / kGroup], e = word >> 8;
    const Codebook book = kCodebooks.of_mode[(word >> 4) & 15u];
    const float step = tile.step[begin / kGroup];
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const uint32_t code = tile.second_code[i], bits = bits_of_code(code, e, book);
      tile.second[i] = decode_second(code, bits, unscale);
      tile.first[i] = tile.before[i] = decode_first(tile.first_code[i], reference_of(code, bits), step);
    }
  }
}

// Of a second moment's bits: the smallest has the greatest rank, 0 has none.
ADAMW_HD uint32_t rank_of(uint32_t bits) { return (0u - bits) & 0x7fffffffu; }

// The greatest rank of a group without its dead elements.
uint32_t forget_dead_of_group(Tile& tile, int64_t begin, uint32_t largest) {
  uint32_t greatest = 0;
  for (int64_t i = begin; i < begin + kGroup; ++i) {
    tile.bits[i] = forget_dead(tile.bits[i], tile.first[i], largest);
    const uint32_t rank = rank_of(tile.bits[i]);
    greatest = greatest > rank ? greatest : rank;
  }
  return greatest;
}

// The words of groups, but for `j`, out of their elements' bits and ranks.
void choose_ranges(Tile& tile) {
  const int64_t groups = padded(tile) / kGroup;
  uint32_t largest[kTileGroups];
  find_greatest(tile, tile.bits);
  memcpy(largest, tile.greatest, sizeof(largest));
  find_greatest(tile, tile.rank);
  // Few groups reach so far that any may be dead.
  uint32_t far = 0;
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < groups; ++group) {
    far |= reaches_dead(rank_of(tile.greatest[group]), largest[group]) ? 1u : 0u;
  }
  if (far != 0) {
    for (int64_t group = 0; group < groups; ++group) {
      if (!reaches_dead(rank_of(tile.greatest[group]), largest[group])) continue;
      tile.greatest[group] = forget_dead_of_group(tile, group * kGroup, largest[group]);
    }
  }
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < groups; ++group) {
    const uint32_t upper = largest[group], lower = rank_of(tile.greatest[group]);
    const uint32_t mode = mode_of(lower, upper);
    tile.word[group] = first_octave(lower, upper, mode) << 8 | mode << 4;
  }
}

// Codes and words out of the bits and ranks of second moments, and of first moments.
void write_codes(Tile& tile) {
  const int64_t count = tile.count, whole = count / kGroup * kGroup, end = padded(tile);
  choose_ranges(tile);
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const uint32_t word = tile.word[begin / kGroup], e = word >> 8;
    const Codebook book = kCodebooks.of_mode[(word >> 4) & 15u];
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const uint32_t code = encode_second(tile.bits[i], e, book, tile.random[i]);
      const float inverse = inverse_of(code, e, book);
      const float ratio = tile.first[i] * inverse;
      tile.second_code[i] = code;
      tile.distance[i] = distance_of(tile.first[i], tile.before[i], inverse);
      tile.ratio[i] = ratio;
      tile.rank[i] = float_bits(larger_ratio(0.0f, ratio));
    }
  }
  find_greatest(tile, tile.rank);
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) {
    const uint32_t j = ratio_code(bits_float(tile.greatest[group]));
    tile.word[group] |= j;
    const RatioScale scale = ratio_scale(j);
    tile.two_steps[group] = scale.two_steps;
    tile.steps_per_ratio[group] = scale.steps_per_ratio;
  }
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const RatioScale scale = {tile.two_steps[begin / kGroup], tile.steps_per_ratio[begin / kGroup]};
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      tile.first_code[i] = encode_first(tile.ratio[i], tile.distance[i], scale, tile.random[i]);
    }
  }
  int8_t* first_code = elements<int8_t>(tile.row->exp_avg, tile);
  uint8_t* second_code = elements<uint8_t>(tile.row->exp_avg_sq, tile);
  for (int64_t i = 0; i < whole; i += kGroup) {
    narrow_codes(tile.first_code + i, first_code + i);
    narrow_codes(tile.second_code + i, second_code + i);
  }
  for (int64_t i = whole; i < count; ++i) {
    first_code[i] = static_cast<int8_t>(tile.first_code[i]);
    second_code[i] = static_cast<uint8_t>(tile.second_code[i]);
  }
  uint16_t* words = reinterpret_cast<uint16_t*>(tile.row->groups) + tile.begin / kGroup;
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) words[group] = static_cast<uint16_t>(tile.word[group]);
}

void store_moments8(Tile& tile) {
  const int64_t end = padded(tile);
  const float rescale = tile.coefficients->rescale;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < end; ++i) {
    tile.bits[i] = bits_of_second(tile.first[i], tile.second[i], rescale);
    tile.rank[i] = rank_of(tile.bits[i]);
  }
  write_codes(tile);
}

// --- moments of all formats ------------------------------------------------------------------------------------------

// In the order of MomentFormat.
constexpr TileStage kLoadMoments[kMomentFormats] = {load_moments<float>, load_moments<bf16>, load_moments8};
constexpr TileStage kStoreMoments[kMomentFormats] = {store_moments_wide, store_moments_in_bf16, store_moments8};

// SGD's has none of 8 bits.
constexpr TileStage kLoadBuffer[] = {load_buffer<float>, load_buffer<bf16>};
constexpr TileStage kStoreBuffer[] = {store_buffer_wide, store_buffer_in_bf16};

// --- a tile --------------------------------------------------------------------------------------------------------

void draw(Tile& tile) {
  tile.random = draw_words(tile.key, tile.row->first_element + tile.begin, padded(tile), tile.drawn);
}

template <bool kWithAmsgrad, bool kWithVariants>
void update_tile(Tile& tile) {
  const Coefficients<float> c = *tile.coefficients;
  const int64_t flags = tile.row->flags;
  float* v_max = kWithAmsgrad ? elements<float>(tile.row->max_exp_avg_sq, tile) : nullptr;
  const int64_t count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    float maximum = kWithAmsgrad ? v_max[i] : 0.0f;
    adamw<kWithAmsgrad, kWithVariants, true>(tile.weight[i], tile.gradient[i], tile.first[i], tile.second[i], maximum,
                                             c, flags);
    if (kWithAmsgrad) v_max[i] = maximum;
  }
}

void update_tile_of_sgd(Tile& tile) {
  const Coefficients<float> c = *tile.coefficients;
  const int64_t flags = tile.row->flags, count = tile.count;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) sgdw(tile.weight[i], tile.gradient[i], tile.first[i], c, flags);
}

// The moving average of the weights as they now are remembered.
void average_tile(Tile& tile) {
  const float weight_of_new = tile.coefficients->ema;
  const int64_t count = tile.count;
  if (tile.row->flags & kEmaBfloat16) {
    bf16* ema = elements<bf16>(tile.row->ema, tile);
    ADAMW_VECTORIZE
    for (int64_t i = 0; i < count; ++i) {
      const float average = moving_average(load<float>(ema + i), tile.weight[i], weight_of_new);
      store_stochastic(ema + i, average, RandomBits{tile.random[i]}.for_average());
    }
  } else {
    float* ema = elements<float>(tile.row->ema, tile);
    ADAMW_VECTORIZE
    for (int64_t i = 0; i < count; ++i) ema[i] = moving_average(ema[i], tile.weight[i], weight_of_new);
  }
}

// Whether these tensors take this way at all.
bool is_packed(int64_t flags) {
  return format_of(flags, kParamFormatShift) != kNative || format_of(flags, kMomentFormatShift) != kMomentsWide;
}

// Whether weights, moments or averages are rounded stochastically.
bool is_rounded_stochastically(int64_t flags) {
  const int64_t param_format = format_of(flags, kParamFormatShift);
  return (flags & kEmaBfloat16) || param_format == kStochastic || param_format == kSplit24 ||
         format_of(flags, kMomentFormatShift) != kMomentsWide;
}

// Elements [begin, end) of a tensor; `begin` is a multiple of kGroup. `flags`: the row's, or some of them.
void update_packed(const TensorRow& row, int64_t flags, int64_t grad, int64_t coefficients, int64_t begin,
                   int64_t end) {
  const int64_t moment_format = format_of(flags, kMomentFormatShift);
  const TileStage load_weight = weight_stage(row, kLoadWeights, load_weights<float>);
  const TileStage store_weight = weight_stage(row, kStoreWeights, store_weights<float>);
  const bool is_rounded = is_rounded_stochastically(flags);
  TileStage load_moments = kLoadMoments[moment_format], store_moments = kStoreMoments[moment_format];
  if (flags & kSgd) {
    load_moments = flags & kMomentum ? kLoadBuffer[moment_format] : no_buffer;
    store_moments = flags & kMomentum ? kStoreBuffer[moment_format] : keep_no_buffer;
  }
  Tile tile;
  tile.row = &row;
  tile.grad = grad;
  tile.coefficients = reinterpret_cast<const Coefficients<float>*>(coefficients);
  memcpy(&tile.key, reinterpret_cast<const char*>(coefficients) + kKeyOffset, sizeof(tile.key));
  for (tile.begin = begin; tile.begin < end; tile.begin += kTile) {
    tile.count = tile.begin + kTile < end ? kTile : end - tile.begin;
    load_weight(tile);
    kLoadGradients[(flags >> kGradDtypeShift) & kDtypeMask](tile);
    load_moments(tile);
    if (is_rounded) draw(tile);
    if (flags & kSgd) {
      update_tile_of_sgd(tile);
    } else if (flags & kAmsgrad) {
      update_tile<true, true>(tile);
    } else if (flags & kVariants) {
      update_tile<false, true>(tile);
    } else {
      update_tile<false, false>(tile);
    }
    store_weight(tile);
    store_moments(tile);
    if (flags & kEma) {
      load_weight(tile);
      average_tile(tile);
    }
  }
}

}  // namespace
