// The update rule: one tensor's coefficients, then one element's update. Host and device.
//
// Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 2.
// The order of operations is part of the contract: only IEEE-754 + - * / sqrt, no contraction, no pow.
// NumPy (tests/reference.py) and Triton (adamw_kernels/triton_kernels.py) spell the same sequence.
//
// Everything here sits in an anonymous namespace: an inline function shared by a baseline and an AVX-512
// object could be resolved to the AVX-512 copy, an illegal instruction on an older CPU.
#pragma once

#include <math.h>

#include "formats.h"
#include "launch_table.h"

namespace {

// --- one tensor and step: coefficients, in float64 ----------------------------------------------------

// beta^t by repeated squaring: the same multiplications in the same order on every machine, unlike pow.
ADAMW_HD double integer_power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

ADAMW_HD double hyper_value(int64_t field, int64_t source) {
  if (source == kFromFloat32) return static_cast<double>(*reinterpret_cast<const float*>(field));
  if (source == kFromFloat64) return *reinterpret_cast<const double*>(field);
  double value;
  memcpy(&value, &field, sizeof(value));
  return value;
}

// t = steps taken including this one.
ADAMW_HD Coefficients<double> coefficients(const HyperRow& hyper, int64_t flags, int64_t t) {
  const double lr = hyper_value(hyper.lr, hyper.source & 3);
  const double beta1 = hyper_value(hyper.beta1, (hyper.source >> 2) & 3);
  const double beta2 = hyper_value(hyper.beta2, (hyper.source >> 4) & 3);
  const double eps = hyper_value(hyper.eps, (hyper.source >> 6) & 3);
  const double weight_decay = hyper_value(hyper.weight_decay, (hyper.source >> 8) & 3);
  const bool l2 = (flags & kL2) != 0;
  Coefficients<double> c;
  c.w1 = 1.0 - beta1;
  c.w2 = 1.0 - beta2;
  c.step_size = lr / (1.0 - integer_power(beta1, t));
  c.inv_sqrt_bc2 = 1.0 / sqrt(1.0 - integer_power(beta2, t));
  c.decay = l2 ? 0.0 : lr * weight_decay;
  c.eps = eps;
  c.scale = (flags & kMaximize) ? -1.0 : 1.0;
  c.l2 = l2 ? weight_decay : 0.0;
  return c;
}

// Rounded once, here, to the compute type.
template <typename T>
ADAMW_HD void write_coefficients(T* row, const Coefficients<double>& c) {
  row[0] = static_cast<T>(c.w1);
  row[1] = static_cast<T>(c.w2);
  row[2] = static_cast<T>(c.step_size);
  row[3] = static_cast<T>(c.inv_sqrt_bc2);
  row[4] = static_cast<T>(c.decay);
  row[5] = static_cast<T>(c.eps);
  row[6] = static_cast<T>(c.scale);
  row[7] = static_cast<T>(c.l2);
}

// --- one element ------------------------------------------------------------------------------------------

ADAMW_HD float square_root(float x) { return sqrtf(x); }
ADAMW_HD double square_root(double x) { return sqrt(x); }

// Adam with decoupled weight decay (AdamW), or with L2 in the gradient (kL2).
template <bool kWithAmsgrad, bool kWithL2, typename T>
ADAMW_HD void adamw(T& p, T grad, T& m, T& v, T& v_max, const Coefficients<T>& c) {
  T g = c.scale * grad;
  if (kWithL2) g = g + c.l2 * p;
  m = m + c.w1 * (g - m);
  v = v + c.w2 * (g * g - v);
  T s = v;
  if (kWithAmsgrad) {
    v_max = (v > v_max || v != v) ? v : v_max;  // a NaN in either stays
    s = v_max;
  }
  const T d = square_root(s) * c.inv_sqrt_bc2 + c.eps;
  p = p - (c.decay * p + (c.step_size * m) / d);
}

}  // namespace
