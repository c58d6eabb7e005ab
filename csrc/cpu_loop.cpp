// Plain loops over one chunk. This file is compiled once per ISA (baseline, AVX2, AVX-512); the compiler
// vectorises it, and -ffp-contract=off keeps the bits the same in all three.
//
// No STL here and nothing with external linkage but the table at the end: see rule.h.
#include "cpu_loop.h"

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

// Where a tensor's weights are read from and written to.
template <typename Param>
struct NativeWeights {
  using P = Param;
  P* p;
  explicit NativeWeights(const TensorRow& row) : p(reinterpret_cast<P*>(row.param)) {}
  ADAMW_HD typename compute_type<P>::type get(int64_t i) const { return load<typename compute_type<P>::type>(p + i); }
  ADAMW_HD void set(int64_t i, typename compute_type<P>::type weight) const { store(p + i, weight); }
};

template <typename Param>
struct Split32Weights {
  using P = Param;
  P* p;
  int16_t* remainder;
  explicit Split32Weights(const TensorRow& row)
      : p(reinterpret_cast<P*>(row.param)), remainder(reinterpret_cast<int16_t*>(row.remainder)) {}
  ADAMW_HD float get(int64_t i) const { return merge_weight<P>(p[i].bits, remainder[i]); }
  ADAMW_HD void set(int64_t i, float weight) const {
    const SplitWeight split = split_weight<P, split_of<P>::kBits>(weight, 0);
    p[i].bits = split.weight;
    remainder[i] = split.remainder;
  }
};

// ivdep, not restrict: operands of one tensor never overlap across elements (the launch table refuses that), but a
// gradient may be its parameter itself, which is read before the same element is written.
template <bool kWithAmsgrad, bool kWithVariants, bool kWithBound, typename Weights, typename G>
void update_elements(const Chunk& chunk) {
  using T = typename compute_type<typename Weights::P>::type;
  const Weights p(*chunk.row);
  const G* g = reinterpret_cast<const G*>(chunk.grad);
  T* m = reinterpret_cast<T*>(chunk.row->exp_avg);
  T* v = reinterpret_cast<T*>(chunk.row->exp_avg_sq);
  T* v_max = reinterpret_cast<T*>(chunk.row->max_exp_avg_sq);
  const Coefficients<T> c = *static_cast<const Coefficients<T>*>(chunk.coefficients);
  const int64_t flags = chunk.row->flags;
  ADAMW_VECTORIZE
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    // All loads before the first store: the four arrays often lie a multiple of 4 KiB apart, and a load behind a
    // store to the same offset in another page would wait for it.
    T weight = p.get(i), first = m[i], second = v[i], maximum = kWithAmsgrad ? v_max[i] : T(0);
    adamw<kWithAmsgrad, kWithVariants, kWithBound>(weight, load<T>(g + i), first, second, maximum, c, flags);
    p.set(i, weight);
    m[i] = first;
    v[i] = second;
    if (kWithAmsgrad) v_max[i] = maximum;
  }
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
    return varied ? update_elements<true, true, true, Weights, G>(chunk)
                  : update_elements<true, false, false, Weights, G>(chunk);
  }
  return varied ? update_elements<false, true, true, Weights, G>(chunk)
                : update_elements<false, false, false, Weights, G>(chunk);
}

// What 16-bit weights are stored as by default: a loop of its own where the rule has no variants, since by tiles it
// waits for memory and computes in turn, in 1.5 times the time.
bool is_plain_split32(int64_t flags) {
  constexpr int64_t kElse = kSgd | kAmsgrad | kVariants | kBound | kFormatMask << kMomentFormatShift;
  return format_of(flags, kParamFormatShift) == kSplit32 && (flags & kElse) == 0;
}

void update_chunk_by_tiles(const Chunk& chunk) {
  update_packed(*chunk.row, chunk.grad, reinterpret_cast<int64_t>(chunk.coefficients), chunk.begin, chunk.end);
}

template <typename P, typename G>
void update_chunk_of_split32(const Chunk& chunk) {
  update_elements<false, false, false, Split32Weights<P>, G>(chunk);
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
  uint64_t key;
  memcpy(&key, static_cast<const char*>(chunk.coefficients) + kKeyOffset, sizeof(key));
  alignas(64) uint32_t word0[kTile], word1[kTile];
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kTile) {
    const int64_t count = begin + kTile < chunk.end ? kTile : chunk.end - begin;
    draw_words(key, first_element + begin, count, word0, word1);
    ADAMW_VECTORIZE
    for (int64_t i = 0; i < count; ++i) {
      const float average = moving_average(load<float>(ema + begin + i), p.get(begin + i), weight_of_new);
      store_stochastic(ema + begin + i, average, RandomBits{word0[i], 0}.for_average());
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

// [bfloat16, float16][gradient dtype]
constexpr UpdateChunk kUpdateChunkOfSplit32[2][kF64] = {
    {update_chunk_of_split32<bf16, float>, update_chunk_of_split32<bf16, bf16>, update_chunk_of_split32<bf16, fp16>},
    {update_chunk_of_split32<fp16, float>, update_chunk_of_split32<fp16, bf16>, update_chunk_of_split32<fp16, fp16>},
};

// [parameter dtype][bfloat16 average]. A float64 parameter has no bfloat16 average.
constexpr UpdateChunk kAverageChunk[kDtypes][2] = {
    {average_chunk<NativeWeights<float>>, average_chunk_in_bf16<NativeWeights<float>>},
    {average_chunk<NativeWeights<bf16>>, average_chunk_in_bf16<NativeWeights<bf16>>},
    {average_chunk<NativeWeights<fp16>>, average_chunk_in_bf16<NativeWeights<fp16>>},
    {average_chunk<NativeWeights<double>>, nullptr},
};

// [bfloat16, float16][bfloat16 average]
constexpr UpdateChunk kAverageChunkOfSplit32[2][2] = {
    {average_chunk<Split32Weights<bf16>>, average_chunk_in_bf16<Split32Weights<bf16>>},
    {average_chunk<Split32Weights<fp16>>, average_chunk_in_bf16<Split32Weights<fp16>>},
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
  if (is_plain_split32(flags)) {
    const bool is_fp16 = param_dtype == kF16;
    return {kUpdateChunkOfSplit32[is_fp16][grad_dtype], averaged ? kAverageChunkOfSplit32[is_fp16][in_bf16] : nullptr};
  }
  if (is_packed(flags)) return {update_chunk_by_tiles, nullptr};
  return {kUpdateChunk[param_dtype][grad_dtype], averaged ? kAverageChunk[param_dtype][in_bf16] : nullptr};
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

// --- sums of squares -------------------------------------------------------------------------------------

// Adds the upper half of the lanes to the lower half until one is left.
double fold(double* lanes, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) {
    ADAMW_VECTORIZE
    for (int64_t j = 0; j < half; ++j) lanes[j] = lanes[j] + lanes[j + half];
  }
  return lanes[0];
}

// Lanes above the first power of two that holds `count` elements stay zero; leaving them out changes no bit.
int64_t lanes_in_use(int64_t count) {
  int64_t width = 1;
  while (width < count && width < kNormLanes) width *= 2;
  return width;
}

template <typename G>
double sum_of_squares(int64_t address, int64_t begin, int64_t end) {
  const G* x = reinterpret_cast<const G*>(address) + begin;
  const int64_t count = end - begin, width = lanes_in_use(count);
  alignas(64) double lanes[kNormLanes];
  int64_t i = count < width ? count : width;
  ADAMW_VECTORIZE
  for (int64_t j = 0; j < i; ++j) lanes[j] = square(x + j);
  for (int64_t j = i; j < width; ++j) lanes[j] = 0.0;
  // Four rows of lanes at a time: a lane is then loaded and stored once for four elements.
  for (; i + 4 * kNormLanes <= count; i += 4 * kNormLanes) {
    const G* row = x + i;
    ADAMW_VECTORIZE
    for (int64_t j = 0; j < kNormLanes; ++j) {
      lanes[j] = (((lanes[j] + square(row + j)) + square(row + j + kNormLanes)) + square(row + j + 2 * kNormLanes)) +
                 square(row + j + 3 * kNormLanes);
    }
  }
  for (; i < count; i += kNormLanes) {
    const G* row = x + i;
    const int64_t rest = count - i < kNormLanes ? count - i : kNormLanes;
    ADAMW_VECTORIZE
    for (int64_t j = 0; j < rest; ++j) lanes[j] = lanes[j] + square(row + j);
  }
  return fold(lanes, width);
}

using SumOfSquares = double (*)(int64_t, int64_t, int64_t);

// In the order of DtypeCode.
constexpr SumOfSquares kSumOfSquares[kDtypes] = {sum_of_squares<float>, sum_of_squares<bf16>, sum_of_squares<fp16>,
                                                 sum_of_squares<double>};

double sum_of_partials(const double* partials, int64_t count) {
  alignas(64) double lanes[kNormLanes];
  const int64_t width = lanes_in_use(count);
  for (int64_t j = 0; j < width; ++j) lanes[j] = 0.0;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t rest = count - i < width ? count - i : width;
    for (int64_t j = 0; j < rest; ++j) lanes[j] = lanes[j] + partials[i + j];
  }
  return fold(lanes, width);
}

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
    if (is_random(row.flags)) *reinterpret_cast<uint64_t*>(out + kKeyOffset) = random_key(row.random_stream, t);
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
