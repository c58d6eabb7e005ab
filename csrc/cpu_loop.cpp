// Plain loops over one chunk. This file is compiled once per ISA (baseline, AVX2, AVX-512); the compiler
// vectorises it, and -ffp-contract=off keeps the bits the same in all three.
//
// No STL here and nothing with external linkage but the table at the end: see rule.h.
#include "cpu_loop.h"

#include "cpu_norm.h"
#include "cpu_storage.h"
#include "cpu_tile.h"

namespace {

// --- index mapping: one chunk --------------------------------------------------------------------------

struct Chunk {
  const TensorRow* row;
  int64_t grad;
  const void* coefficients;
  int64_t begin;
  int64_t end;
};

// The rule's variants that a loop is compiled for; without one its code is left out.
template <bool kWithAmsgrad, bool kWithVariants, bool kWithBound>
struct Rule {
  static constexpr bool kAmsgradToo = kWithAmsgrad;
  template <typename T>
  static ADAMW_HD void apply(T& p, T g, T& m, T& v, T& v_max, const Coefficients<T>& c, int64_t flags) {
    adamw<kWithAmsgrad, kWithVariants, kWithBound>(p, g, m, v, v_max, c, flags);
  }
};
using PlainRule = Rule<false, false, false>;
using BoundedRule = Rule<false, false, true>;  // the bound is infinite where none is asked for

// One tensor's operands and coefficients, read once: in a loop over blocks they stay in registers.
template <typename TheRule, typename TheWeights, typename TheMoments, typename G>
struct Update {
  using T = typename compute_type<typename TheWeights::P>::type;
  using Weights = TheWeights;
  using Moments = TheMoments;
  const Weights weights;
  const Moments moments;
  const G* const g;
  T* const v_max;
  const Coefficients<T> c;
  const int64_t flags;

  explicit Update(const Chunk& chunk)
      : weights(*chunk.row),
        moments(*chunk.row),
        g(reinterpret_cast<const G*>(chunk.grad)),
        v_max(reinterpret_cast<T*>(chunk.row->max_exp_avg_sq)),
        c(*static_cast<const Coefficients<T>*>(chunk.coefficients)),
        flags(chunk.row->flags) {}

  // Elements [begin, end), whose random words, where any are used, begin at `words`.
  //
  // ivdep, not restrict: operands of one tensor never overlap across elements (the launch table refuses that), but a
  // gradient may be its parameter itself, which is read before the same element is written.
  ADAMW_HD void run(int64_t begin, int64_t end, const uint32_t* words) const {
    ADAMW_VECTORIZE
    for (int64_t i = begin; i < end; ++i) {
      // All loads before the first store: the four arrays often lie a multiple of 4 KiB apart, and a load behind a
      // store to the same offset in another page would wait for it.
      T weight = weights.get(i), first = moments.first(i), second = moments.second(i);
      T maximum = TheRule::kAmsgradToo ? v_max[i] : T(0);
      const RandomBits random = {Weights::kRandom || Moments::kRandom ? words[i - begin] : 0u};
      TheRule::apply(weight, load<T>(g + i), first, second, maximum, c, flags);
      weights.set(i, weight, random);
      moments.set(i, first, second, random);
      if (TheRule::kAmsgradToo) v_max[i] = maximum;
    }
  }

  // kPairs pairs of neighbours from element `begin` on, whose random words begin at `of_even` and `of_odd`. Likewise.
  template <int64_t kPairs>
  ADAMW_HD void run_two(int64_t begin, const uint32_t* of_even, const uint32_t* of_odd) const {
    ADAMW_VECTORIZE
    for (int64_t k = 0; k < kPairs; ++k) {
      const int64_t i = begin + 2 * k;
      Two<float> weight = weights.get_two(i), first = moments.first_two(i), second = moments.second_two(i);
      Two<float> no_maximum = {0.0f, 0.0f};
      const Two<float> gradient = load_two(g + i);
      const Two<RandomBits> random = {{of_even[k]}, {of_odd[k]}};
      TheRule::apply(weight.even, gradient.even, first.even, second.even, no_maximum.even, c, flags);
      TheRule::apply(weight.odd, gradient.odd, first.odd, second.odd, no_maximum.odd, c, flags);
      weights.set_two(i, weight, random);
      moments.set_two(i, first, second, random);
    }
  }

  template <int64_t kCount>
  ADAMW_HD void prefetch(int64_t i) const {
    weights.template prefetch<kCount>(i);
    moments.template prefetch<kCount>(i);
    prefetch_elements<kCount>(g + i);
  }
};

template <typename TheRule, typename Weights, typename G>
void update_wide(const Chunk& chunk) {
  using T = typename compute_type<typename Weights::P>::type;
  Update<TheRule, Weights, WideMoments<T>, G>(chunk).run(chunk.begin, chunk.end, nullptr);
}

uint64_t key_of(const Chunk& chunk) {
  uint64_t key;
  memcpy(&key, static_cast<const char*>(chunk.coefficients) + kKeyOffset, sizeof(key));
  return key;
}

// What is rounded stochastically. Words are drawn for few elements at a time, so that a core that looks some hundred
// instructions ahead computes the next ones while it waits for these elements' roots and quotients; while it draws it
// asks for no memory, so that is asked for ahead. Beside 512 elements at a time and nothing ahead: a seventh faster.
constexpr int64_t kRounded = 64;
constexpr int64_t kRoundedAhead = 512;
static_assert(kRounded % kDrawn == 0, "draw_words() fills whole rounds");

template <typename Weights, typename Moments, typename G>
void update_rounded(const Chunk& chunk) {
  const Update<BoundedRule, Weights, Moments, G> update(chunk);
  const uint64_t key = key_of(chunk);
  const int64_t first_element = chunk.row->first_element, whole = chunk.end - kRounded;
  alignas(64) uint32_t drawn[kRounded + kDrawn];
  int64_t begin = chunk.begin;
  for (; begin <= whole; begin += kRounded) {
    update.template prefetch<kRounded>(begin + kRoundedAhead);
    update.run(begin, begin + kRounded, draw_words(key, first_element + begin, kRounded, drawn));
  }
  if (begin < chunk.end) {
    update.run(begin, chunk.end, draw_words(key, first_element + begin, chunk.end - begin, drawn));
  }
}

// Beside bfloat16 moments, where weights (whatever is kept of them besides) and gradients are bfloat16 or both float32:
// neighbours in pairs, but for what is left at the end: a sixth fewer instructions (bench/results/counts/hot_path.csv).
template <typename Weights, typename G>
void update_rounded_in_pairs(const Chunk& chunk) {
  constexpr int64_t kPairs = kRounded / 2;
  static_assert(kRounded % kDrawn == 0, "draw_planes() fills whole rounds");
  const Update<BoundedRule, Weights, Bf16Moments, G> update(chunk);
  const uint64_t key = key_of(chunk);
  const int64_t first_element = chunk.row->first_element;
  alignas(64) uint32_t of_even[kPairs], of_odd[kPairs];
  Chunk rest = chunk;
  if ((first_element + rest.begin) & 1) {  // a pair's second half
    rest.end = rest.begin + 1;
    update_rounded<Weights, Bf16Moments, G>(rest);
    rest.begin = rest.end;
    rest.end = chunk.end;
  }
  for (; rest.begin + kRounded <= rest.end; rest.begin += kRounded) {
    update.template prefetch<kRounded>(rest.begin + kRoundedAhead);
    draw_planes(key, first_element + rest.begin, kPairs, of_even, of_odd);
    update.template run_two<kPairs>(rest.begin, of_even, of_odd);
  }
  if (rest.begin < rest.end) update_rounded<Weights, Bf16Moments, G>(rest);
}

template <bool kWithMomentum, typename P, typename G>
void update_elements_of_sgd(const Chunk& chunk) {
  using T = typename compute_type<P>::type;
  P* p = reinterpret_cast<P*>(chunk.row->param);
  const G* g = reinterpret_cast<const G*>(chunk.grad);
  T* m = reinterpret_cast<T*>(chunk.row->exp_avg);
  const Coefficients<T> c = *static_cast<const Coefficients<T>*>(chunk.coefficients);
  const int64_t flags = chunk.row->flags;
  ADAMW_VECTORIZE
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    T weight = load<T>(p + i), buffer = kWithMomentum ? m[i] : T(0);
    sgdw(weight, load<T>(g + i), buffer, c, flags);
    store(p + i, weight);
    if (kWithMomentum) m[i] = buffer;
  }
}

template <typename P, typename G>
void update_chunk(const Chunk& chunk) {
  const int64_t flags = chunk.row->flags;
  if (flags & kSgd) {
    return flags & kMomentum ? update_elements_of_sgd<true, P, G>(chunk) : update_elements_of_sgd<false, P, G>(chunk);
  }
  using Weights = NativeWeights<P>;
  const bool varied = (flags & (kVariants | kBound)) != 0;
  if (flags & kAmsgrad) {
    return varied ? update_wide<Rule<true, true, true>, Weights, G>(chunk)
                  : update_wide<Rule<true, false, false>, Weights, G>(chunk);
  }
  return varied ? update_wide<Rule<false, true, true>, Weights, G>(chunk) : update_wide<PlainRule, Weights, G>(chunk);
}

void update_chunk_by_tiles(const Chunk& chunk) {
  update_packed(*chunk.row, chunk.row->flags, chunk.grad, reinterpret_cast<int64_t>(chunk.coefficients), chunk.begin,
                chunk.end);
}

// Moments in 8 bits: whole tiles are decoded and encoded, the update between is as above. Decoding in that loop, too,
// takes longer: of so long a chain of instructions a core's scheduler holds no more than two or three groups' at a
// time. Weights are read and written by loops of their own: beside remainders of one byte gcc 12 makes no vectors of
// the update.
template <typename Weights, typename G>
void update_in_8_bits(const Chunk& chunk) {
  const Weights weights(*chunk.row);
  const auto* g = reinterpret_cast<const G*>(chunk.grad);
  const auto* m = reinterpret_cast<const int8_t*>(chunk.row->exp_avg);
  const auto* v = reinterpret_cast<const uint8_t*>(chunk.row->exp_avg_sq);
  const Coefficients<float> c = *static_cast<const Coefficients<float>*>(chunk.coefficients);
  Tile tile;
  tile.row = chunk.row;
  tile.coefficients = static_cast<const Coefficients<float>*>(chunk.coefficients);
  tile.key = key_of(chunk);
  tile.count = kTile;
  for (tile.begin = chunk.begin; tile.begin + kTile <= chunk.end; tile.begin += kTile) {
    load_moments8(tile);
    for (int64_t block = 0; block < kTile; block += kRounded) {
      const int64_t at = tile.begin + block;
      weights.template prefetch<kRounded>(at + kRoundedAhead);
      prefetch_elements<kRounded>(g + at + kRoundedAhead);
      prefetch_elements<kRounded>(m + at + kRoundedAhead);
      prefetch_elements<kRounded>(v + at + kRoundedAhead);
      const uint32_t* words = draw_words(tile.key, tile.row->first_element + at, kRounded, tile.drawn + block);
      if (block == 0) tile.random = words;
      ADAMW_VECTORIZE
      for (int64_t i = 0; i < kRounded; ++i) tile.weight[block + i] = weights.get(at + i);
      ADAMW_VECTORIZE
      for (int64_t i = block; i < block + kRounded; ++i) {
        float first = tile.first[i], second = tile.second[i], no_maximum = 0.0f;
        BoundedRule::apply(tile.weight[i], load<float>(g + tile.begin + i), first, second, no_maximum, c, 0);
        tile.bits[i] = bits_of_second(first, second, c.rescale);
        tile.rank[i] = rank_of(tile.bits[i]);
        tile.first[i] = first;
      }
      ADAMW_VECTORIZE
      for (int64_t i = 0; i < kRounded; ++i) weights.set(at + i, tile.weight[block + i], RandomBits{words[i]});
    }
    write_codes(tile);
  }
  if (tile.begin < chunk.end) {
    update_packed(*chunk.row, chunk.row->flags & ~kEma, chunk.grad, reinterpret_cast<int64_t>(chunk.coefficients),
                  tile.begin, chunk.end);
  }
}

// The plain rule, on what is stored in some packed form: one loop that reads, updates and writes, but for codes of 8
// bits. By tiles it waits for memory and computes in turn, in up to 1.5 times the time.
bool has_a_loop(int64_t flags) {
  const int64_t moments = format_of(flags, kMomentFormatShift);
  const bool is_exact = format_of(flags, kParamFormatShift) == kSplit32 && moments == kMomentsWide;
  return !(flags & (kSgd | kAmsgrad | kVariants | (is_exact ? kBound : 0)));
}

// The moving average of elements whose weights have just been stored and still are in the cache.
template <typename Weights>
void average_chunk(const Chunk& chunk) {
  using T = typename compute_type<typename Weights::P>::type;
  const Weights p(*chunk.row);
  T* ema = reinterpret_cast<T*>(chunk.row->ema);
  const T weight_of_new = static_cast<const Coefficients<T>*>(chunk.coefficients)->ema;
  ADAMW_VECTORIZE
  for (int64_t i = chunk.begin; i < chunk.end; ++i) ema[i] = moving_average(ema[i], p.get(i), weight_of_new);
}

template <typename Weights>
void average_chunk_in_bf16(const Chunk& chunk) {
  const Weights p(*chunk.row);
  bf16* ema = reinterpret_cast<bf16*>(chunk.row->ema);
  const float weight_of_new = static_cast<const Coefficients<float>*>(chunk.coefficients)->ema;
  const int64_t first_element = chunk.row->first_element;
  const uint64_t key = key_of(chunk);
  alignas(64) uint32_t drawn[kTile + kDrawn];
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kTile) {
    const int64_t count = begin + kTile < chunk.end ? kTile : chunk.end - begin;
    const uint32_t* words = draw_words(key, first_element + begin, count, drawn);
    ADAMW_VECTORIZE
    for (int64_t i = 0; i < count; ++i) {
      const float average = moving_average(load<float>(ema + begin + i), p.get(begin + i), weight_of_new);
      store_stochastic(ema + begin + i, average, RandomBits{words[i]}.for_average());
    }
  }
}

using UpdateChunk = void (*)(const Chunk&);

// [parameter dtype][gradient dtype], in the order of DtypeCode. A float64 gradient needs a float64 parameter.
constexpr UpdateChunk kUpdateChunk[kDtypes][kDtypes] = {
    {update_chunk<float, float>, update_chunk<float, bf16>, update_chunk<float, fp16>, nullptr},
    {update_chunk<bf16, float>, update_chunk<bf16, bf16>, update_chunk<bf16, fp16>, nullptr},
    {update_chunk<fp16, float>, update_chunk<fp16, bf16>, update_chunk<fp16, fp16>, nullptr},
    {update_chunk<double, float>, update_chunk<double, bf16>, update_chunk<double, fp16>, update_chunk<double, double>},
};

// Of weights stored as they are in one dtype: [MomentFormat], gradients in the order of DtypeCode.
struct Loops {
  UpdateChunk update[kMomentFormats][kF64];
  UpdateChunk average[2];  // [in bfloat16]
};

// Beside bfloat16 moments.
template <typename Weights, typename P, typename G>
struct BesideBf16 {
  static constexpr UpdateChunk kUpdate = update_rounded<Weights, Bf16Moments, G>;
};
template <typename Weights>
struct BesideBf16<Weights, bf16, bf16> {
  static constexpr UpdateChunk kUpdate = update_rounded_in_pairs<Weights, bf16>;
};
template <typename Weights>
struct BesideBf16<Weights, float, float> {
  static constexpr UpdateChunk kUpdate = update_rounded_in_pairs<Weights, float>;
};

template <typename Weights>
constexpr Loops loops_of(UpdateChunk beside_float32, UpdateChunk beside_bf16, UpdateChunk beside_fp16) {
  return {{{beside_float32, beside_bf16, beside_fp16},
           {BesideBf16<Weights, typename Weights::P, float>::kUpdate,
            BesideBf16<Weights, typename Weights::P, bf16>::kUpdate,
            BesideBf16<Weights, typename Weights::P, fp16>::kUpdate},
           {update_in_8_bits<Weights, float>, update_in_8_bits<Weights, bf16>, update_in_8_bits<Weights, fp16>}},
          {average_chunk<Weights>, average_chunk_in_bf16<Weights>}};
}

template <typename Weights>
constexpr Loops loops_of_exact() {
  return loops_of<Weights>(update_wide<PlainRule, Weights, float>, update_wide<PlainRule, Weights, bf16>,
                           update_wide<PlainRule, Weights, fp16>);
}

template <typename Weights>
constexpr Loops loops_of_rounded() {
  using Moments = WideMoments<float>;
  return loops_of<Weights>(update_rounded<Weights, Moments, float>, update_rounded<Weights, Moments, bf16>,
                           update_rounded<Weights, Moments, fp16>);
}

// [bfloat16, float16][ParamFormat], and of float32, which has one format.
constexpr Loops kLoops[2][4] = {
    {loops_of_exact<NativeWeights<bf16>>(), loops_of_rounded<StochasticWeights<bf16>>(),
     loops_of_rounded<Split24Weights<bf16>>(), loops_of_exact<Split32Weights<bf16>>()},
    {loops_of_exact<NativeWeights<fp16>>(), loops_of_rounded<StochasticWeights<fp16>>(),
     loops_of_rounded<Split24Weights<fp16>>(), loops_of_exact<Split32Weights<fp16>>()},
};
constexpr Loops kLoopsOfFloat32 = loops_of_exact<NativeWeights<float>>();

// [parameter dtype][bfloat16 average]. A float64 parameter has no bfloat16 average.
constexpr UpdateChunk kAverageChunk[kDtypes][2] = {
    {average_chunk<NativeWeights<float>>, average_chunk_in_bf16<NativeWeights<float>>},
    {average_chunk<NativeWeights<bf16>>, average_chunk_in_bf16<NativeWeights<bf16>>},
    {average_chunk<NativeWeights<fp16>>, average_chunk_in_bf16<NativeWeights<fp16>>},
    {average_chunk<NativeWeights<double>>, nullptr},
};

// How a chunk is updated, and what then averages its weights: nullptr where nothing does, or the update has done it.
struct Pass {
  UpdateChunk update;
  UpdateChunk average;
};

Pass pass_of(int64_t flags) {
  const int64_t param_dtype = (flags >> kParamDtypeShift) & kDtypeMask;
  const int64_t grad_dtype = (flags >> kGradDtypeShift) & kDtypeMask;
  const bool averaged = (flags & kEma) != 0, in_bf16 = (flags & kEmaBfloat16) != 0;
  if (!is_packed(flags)) {
    return {kUpdateChunk[param_dtype][grad_dtype], averaged ? kAverageChunk[param_dtype][in_bf16] : nullptr};
  }
  if (!has_a_loop(flags)) return {update_chunk_by_tiles, nullptr};
  const Loops& loops =
      param_dtype == kF32 ? kLoopsOfFloat32 : kLoops[param_dtype == kF16][format_of(flags, kParamFormatShift)];
  return {loops.update[format_of(flags, kMomentFormatShift)][grad_dtype], averaged ? loops.average[in_bf16] : nullptr};
}

// Elements of an update after which their averages and copies follow: the weights are read again from the first-level
// cache.
constexpr int64_t kAverageTile = 1 << 10;

// --- copies of the weights in 16 bits ------------------------------------------------------------------

template <typename P, typename C>
void copy_weights(int64_t from, int64_t to, int64_t begin, int64_t end) {
  const P* p = reinterpret_cast<const P*>(from);
  C* copy = reinterpret_cast<C*>(to);
  ADAMW_VECTORIZE
  for (int64_t i = begin; i < end; ++i) store(copy + i, load<float>(p + i));
}

using CopyWeights = void (*)(int64_t, int64_t, int64_t, int64_t);

// [parameter dtype][copy dtype], in the order of DtypeCode.
constexpr CopyWeights kCopyWeights[kF64][kF64] = {
    {nullptr, copy_weights<float, bf16>, copy_weights<float, fp16>},
    {nullptr, copy_weights<bf16, bf16>, copy_weights<bf16, fp16>},
    {nullptr, copy_weights<fp16, bf16>, copy_weights<fp16, fp16>},
};

// --- the stages --------------------------------------------------------------------------------------------

void measure(const void* table_address, int64_t begin, int64_t end) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const auto* grads = reinterpret_cast<const int64_t*>(table.grads);
  const auto* chunks = reinterpret_cast<const int64_t*>(table.norm_chunks);
  auto* partials = reinterpret_cast<double*>(table.partials);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tensor = chunks[i] >> kChunkTensorShift;
    const int64_t first = (chunks[i] & kChunkIndexMask) * kNormChunk;
    const int64_t numel = rows[tensor].numel;
    const int64_t last = first + kNormChunk < numel ? first + kNormChunk : numel;
    const int64_t grad_dtype = (rows[tensor].flags >> kGradDtypeShift) & kDtypeMask;
    partials[i] = grads[tensor] == 0 ? 0.0 : kSumOfSquares[grad_dtype](grads[tensor], first, last);
  }
}

void sum_up(const void* table_address) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* domains = reinterpret_cast<const NormDomain*>(table.domains);
  const auto* partials = reinterpret_cast<const double*>(table.partials);
  auto* totals = reinterpret_cast<double*>(table.totals);
  for (int64_t i = 0; i < table.num_domains; ++i) {
    totals[i] = sum_of_partials(partials + domains[i].begin, domains[i].end - domains[i].begin);
  }
  totals[table.num_domains] = skip_is_signalled(*reinterpret_cast<const Signals*>(table.signals));
}

void decide_step(const void* table_address) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  decide(*reinterpret_cast<const Signals*>(table.signals), reinterpret_cast<const NormDomain*>(table.domains),
         table.num_domains, reinterpret_cast<const double*>(table.totals), reinterpret_cast<Decision*>(table.decision));
}

// Where tensors are tiny, it is their first lines that a step waits for.
constexpr int64_t kTensorsAhead = 4;

void prefetch_tensor(const TensorRow& row, int64_t grad) {
  __builtin_prefetch(reinterpret_cast<const void*>(row.param));
  __builtin_prefetch(reinterpret_cast<const void*>(row.exp_avg));
  __builtin_prefetch(reinterpret_cast<const void*>(row.exp_avg_sq));
  __builtin_prefetch(reinterpret_cast<const void*>(grad));
}

void prepare(const void* table_address, int64_t begin, int64_t end) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const auto* grads = reinterpret_cast<const int64_t*>(table.grads);
  const auto* hypers = reinterpret_cast<const HyperRow*>(table.hypers);
  const auto& decision = *reinterpret_cast<const Decision*>(table.decision);
  if (decision.skip) return;
  // Neighbours mostly share group and step: two powers, a division and a root a tensor are then saved.
  Coefficients<double> c = {};
  int64_t known_hyper = -1, known_flags = -1, known_norm = -1, known_bound = -1, known_t = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTensorsAhead < end) __builtin_prefetch(reinterpret_cast<const void*>(rows[i + kTensorsAhead].step));
    if (grads[i] == 0) continue;
    const TensorRow& row = rows[i];
    auto* step = reinterpret_cast<float*>(row.step);
    *step = *step + 1.0f;
    const auto t = static_cast<int64_t>(*step);
    if (row.hyper != known_hyper || row.flags != known_flags || row.norm != known_norm || t != known_t ||
        row.update_bound != known_bound) {
      c = coefficients(hypers[row.hyper], row, t, decision.inv_scale, decision.norms[row.norm]);
      known_hyper = row.hyper, known_flags = row.flags, known_norm = row.norm, known_t = t;
      known_bound = row.update_bound;
    }
    const int64_t out = table.coefficients + i * kCoefficientRowBytes;
    if (row.flags & kFloat64) {
      write_coefficients(reinterpret_cast<double*>(out), c);
    } else {
      write_coefficients(reinterpret_cast<float*>(out), c);
    }
    if (is_rounded_stochastically(row.flags))
      *reinterpret_cast<uint64_t*>(out + kKeyOffset) = random_key(row.random_stream, t);
    if (row.scale != 0) {
      auto& scaling = *reinterpret_cast<Coefficients<float>*>(out);
      const double beta2 = hyper_value(hypers[row.hyper].beta2, (hypers[row.hyper].source >> 4) & 3);
      advance_scale(*reinterpret_cast<float*>(row.scale), beta2, scaling.unscale, scaling.rescale);
    }
  }
}

void update(const void* table_address, int64_t begin, int64_t end) {
  const auto& table = *static_cast<const LaunchTable*>(table_address);
  const auto* rows = reinterpret_cast<const TensorRow*>(table.rows);
  const auto* grads = reinterpret_cast<const int64_t*>(table.grads);
  const auto* chunks = reinterpret_cast<const int64_t*>(table.chunks);
  const auto* copies = reinterpret_cast<const ParamCopy*>(table.copies);
  if (reinterpret_cast<const Decision*>(table.decision)->skip) return;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTensorsAhead < end) {
      const int64_t later = chunks[i + kTensorsAhead] >> kChunkTensorShift;
      prefetch_tensor(rows[later], grads[later]);
    }
    const int64_t tensor = chunks[i] >> kChunkTensorShift;
    if (grads[tensor] == 0) continue;
    const TensorRow& row = rows[tensor];
    const int64_t first = (chunks[i] & kChunkIndexMask) * table.chunk_size;
    const int64_t last = first + table.chunk_size < row.numel ? first + table.chunk_size : row.numel;
    const int64_t coefficients = table.coefficients + tensor * kCoefficientRowBytes;
    const ParamCopy copy = copies == nullptr ? ParamCopy{0, 0} : copies[tensor];
    const int64_t param_dtype = (row.flags >> kParamDtypeShift) & kDtypeMask;
    const Pass pass = pass_of(row.flags);
    const int64_t tile = (row.flags & kEma) || copy.address != 0 ? kAverageTile : last - first;
    Chunk chunk;
    chunk.row = &row;
    chunk.grad = grads[tensor];
    chunk.coefficients = reinterpret_cast<const void*>(coefficients);
    for (chunk.begin = first; chunk.begin < last; chunk.begin = chunk.end) {
      chunk.end = chunk.begin + tile < last ? chunk.begin + tile : last;
      pass.update(chunk);
      if (pass.average != nullptr) pass.average(chunk);
      if (copy.address != 0) {
        kCopyWeights[param_dtype][copy.dtype](row.param, copy.address, chunk.begin, chunk.end);
      }
    }
  }
}

}  // namespace

namespace adamw_kernels {
extern const CpuLoops ADAMW_KERNELS_LOOPS;
const CpuLoops ADAMW_KERNELS_LOOPS = {measure, sum_up, decide_step, prepare, update};
}  // namespace adamw_kernels
