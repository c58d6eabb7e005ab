// The update of tensors whose weights or moments are stored in a form that arithmetic does not have: some
// hundred elements at a time are unpacked into float32, updated, and packed again, all within the first-level cache.
// Only moments in 8 bits, SGD and the rule's variants come here: the plain rule has one loop for each of the other
// forms, in cpu_loop.cpp.
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

// Elements [begin, begin + count) of one tensor; `count` is kTile but for the tensor's last tile.
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
  alignas(64) uint32_t word0[kTile];
  alignas(64) uint32_t word1[kTile];
  // Of moments in 8 bits: m as it was decoded, s, m / s, and what is found on the way.
  alignas(64) float before[kTile];
  alignas(64) float reference[kTile];
  alignas(64) float ratio[kTile];
  alignas(64) uint32_t bits[kTile];
  alignas(64) uint32_t not_finite[kTile];
  alignas(64) int32_t first_code[kTile];
  alignas(64) uint32_t second_code[kTile];
  alignas(64) uint32_t rank[kTile];
  // Of its groups.
  alignas(64) uint32_t greatest[kTileGroups];
  alignas(64) uint32_t word[kTileGroups];
  alignas(64) float step[kTileGroups];
  alignas(64) RatioScale scale[kTileGroups];
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
    store_stochastic(p + i, tile.weight[i], RandomBits{tile.word0[i], 0}.for_weight());
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
    const uint32_t random = kRandom ? RandomBits{tile.word0[i], 0}.for_weight() : 0u;
    const SplitWeight split = split_weight<P, kKept>(tile.weight[i], random);
    p[i].bits = split.weight;
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
    store_stochastic(m + i, tile.first[i], RandomBits{0, tile.word1[i]}.for_first_moment());
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
    const RandomBits random = {0, tile.word1[i]};
    store_stochastic(m + i, tile.first[i], random.for_first_moment());
    store_stochastic(v + i, tile.second[i], random.for_second_moment());
  }
}

// --- moments in 8 bits: loops over elements, and over groups of sixteen, all in 32 bits ------------------------------

// A loop over a group is one register of AVX-512, if nothing in it is narrower than 32 bits: gcc would take registers
// of 16 bytes, for sixteen codes, throughout. So codes are widened and narrowed by loops of their own.

// Codebooks by mode: a division a group is then saved.
struct Codebooks {
  Codebook of_mode[16];
};
constexpr Codebooks make_codebooks() {
  Codebooks books = {};
  for (uint32_t mode = 0; mode < 16; ++mode) books.of_mode[mode] = make_codebook(0, mode);
  return books;
}
constexpr Codebooks kCodebooks = make_codebooks();

Codebook codebook(uint32_t e, uint32_t mode) {
  const Codebook& book = kCodebooks.of_mode[mode];
  return {e, book.per_octave, book.reciprocal, book.inverse};
}
Codebook codebook_of_word(uint32_t word) { return codebook(word >> 8, (word >> 4) & 15u); }

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

void load_moments8(Tile& tile) {
  const uint16_t* words = reinterpret_cast<const uint16_t*>(tile.row->groups) + tile.begin / kGroup;
  const int8_t* first_code = elements<int8_t>(tile.row->exp_avg, tile);
  const uint8_t* second_code = elements<uint8_t>(tile.row->exp_avg_sq, tile);
  const int64_t count = tile.count, end = padded(tile);
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    tile.first_code[i] = first_code[i];
    tile.second_code[i] = second_code[i];
  }
  for (int64_t i = count; i < end; ++i) {
    tile.first_code[i] = 0;
    tile.second_code[i] = 0;
    tile.weight[i] = tile.gradient[i] = 0.0f;
  }
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) {
    const uint32_t word = words[group];
    tile.word[group] = word;
    tile.step[group] = ratio_step(word & 15u);
  }
  const float unscale = tile.coefficients->unscale;
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const Codebook book = codebook_of_word(tile.word[begin / kGroup]);
    const float step = tile.step[begin / kGroup];
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const uint32_t code = tile.second_code[i];
      const Position at = position(code, book);
      tile.second[i] = decode_second(code, at, unscale);
      tile.first[i] = tile.before[i] = decode_first(tile.first_code[i], reference_of(code, at), step);
    }
  }
}

// The words of groups, but for `j`, out of their elements' `bits`, of which dead ones are forgotten.
void choose_ranges(Tile& tile) {
  const int64_t end = padded(tile);
  find_greatest(tile, tile.bits);
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const uint32_t largest = tile.greatest[begin / kGroup];
    tile.word[begin / kGroup] = largest;
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const uint32_t bits = forget_dead(tile.bits[i], tile.first[i], largest);
      tile.bits[i] = bits;
      tile.rank[i] = (0u - bits) & 0x7fffffffu;  // the smallest is the greatest, 0 stays 0
    }
  }
  find_greatest(tile, tile.rank);
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) {
    const uint32_t upper = tile.word[group], lower = (0u - tile.greatest[group]) & 0x7fffffffu;
    const uint32_t mode = mode_of(lower, upper);
    tile.word[group] = first_octave(lower, upper, mode) << 8 | mode << 4;
  }
}

void store_moments8(Tile& tile) {
  const int64_t count = tile.count, end = padded(tile);
  const float rescale = tile.coefficients->rescale;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < end; ++i) {
    bool not_finite;
    tile.bits[i] = bits_of_second(tile.first[i], tile.second[i], rescale, not_finite);
    tile.not_finite[i] = not_finite;
  }
  choose_ranges(tile);
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const Codebook book = codebook_of_word(tile.word[begin / kGroup]);
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      const uint32_t code = encode_second(tile.bits[i], book, RandomBits{0, tile.word1[i]}.for_second_moment());
      const Position at = position(code, book);
      const float ratio = tile.first[i] * inverse_of(code, at);
      tile.second_code[i] = code;
      tile.reference[i] = reference_of(code, at);
      tile.ratio[i] = ratio;
      tile.rank[i] = float_bits(ratio) & 0x7fffffffu;
    }
  }
  find_greatest(tile, tile.rank);
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) {
    const uint32_t j = ratio_code(bits_float(tile.greatest[group]));
    tile.word[group] |= j;
    tile.scale[group] = ratio_scale(j);
  }
  for (int64_t begin = 0; begin < end; begin += kGroup) {
    const RatioScale scale = tile.scale[begin / kGroup];
    ADAMW_VECTORIZE_GROUP
    for (int64_t i = begin; i < begin + kGroup; ++i) {
      tile.first_code[i] = encode_first(tile.ratio[i], tile.first[i], tile.before[i], tile.reference[i], scale,
                                        tile.not_finite[i] != 0, RandomBits{0, tile.word1[i]}.for_first_moment());
    }
  }
  int8_t* first_code = elements<int8_t>(tile.row->exp_avg, tile);
  uint8_t* second_code = elements<uint8_t>(tile.row->exp_avg_sq, tile);
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < count; ++i) {
    first_code[i] = static_cast<int8_t>(tile.first_code[i]);
    second_code[i] = static_cast<uint8_t>(tile.second_code[i]);
  }
  uint16_t* words = reinterpret_cast<uint16_t*>(tile.row->groups) + tile.begin / kGroup;
  ADAMW_VECTORIZE
  for (int64_t group = 0; group < end / kGroup; ++group) words[group] = static_cast<uint16_t>(tile.word[group]);
}

// --- moments of all formats
// -------------------------------------------------------------------------------------------

// In the order of MomentFormat.
constexpr TileStage kLoadMoments[kMomentFormats] = {load_moments<float>, load_moments<bf16>, load_moments8};
constexpr TileStage kStoreMoments[kMomentFormats] = {store_moments_wide, store_moments_in_bf16, store_moments8};

// SGD's has none of 8 bits.
constexpr TileStage kLoadBuffer[] = {load_buffer<float>, load_buffer<bf16>};
constexpr TileStage kStoreBuffer[] = {store_buffer_wide, store_buffer_in_bf16};

// --- a tile --------------------------------------------------------------------------------------------------------

template <bool kWord0, bool kWord1>
void draw(Tile& tile) {
  draw_words<kWord0, kWord1>(tile.key, tile.row->first_element + tile.begin, tile.count, tile.word0, tile.word1);
}

void draw_nothing(Tile& /*tile*/) {}

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
      store_stochastic(ema + i, average, RandomBits{tile.word0[i], 0}.for_average());
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

// Whether weights or their averages are rounded stochastically, by an element's first random word; whether moments are,
// by its second.
bool uses_word0(int64_t flags) {
  const int64_t param_format = format_of(flags, kParamFormatShift);
  return (flags & kEmaBfloat16) || param_format == kStochastic || param_format == kSplit24;
}
bool uses_word1(int64_t flags) { return format_of(flags, kMomentFormatShift) != kMomentsWide; }

TileStage draw_stage(int64_t flags) {
  if (uses_word0(flags)) return uses_word1(flags) ? draw<true, true> : draw<true, false>;
  return uses_word1(flags) ? draw<false, true> : draw_nothing;
}

// Elements [begin, end) of a tensor; `begin` is a multiple of kGroup.
void update_packed(const TensorRow& row, int64_t grad, int64_t coefficients, int64_t begin, int64_t end) {
  const int64_t flags = row.flags, moment_format = format_of(flags, kMomentFormatShift);
  const TileStage load_weight = weight_stage(row, kLoadWeights, load_weights<float>);
  const TileStage store_weight = weight_stage(row, kStoreWeights, store_weights<float>);
  const TileStage draw_words_of = draw_stage(flags);
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
    draw_words_of(tile);
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
