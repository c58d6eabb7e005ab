// Sums of squares of gradients: a fixed tree over lanes, whatever the ISA, the threads and the chunks.
//
// Lane j of kNormLanes takes elements j, j + kNormLanes, ... of a chunk in float64, and lanes are added in halves; so
// are the chunks' partial sums.
#pragma once

#include "cpu_vectorize.h"
#include "rule.h"

namespace {

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

}  // namespace
