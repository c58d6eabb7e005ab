// The update rule: one tensor's coefficients, then one element's update. Host and device.
//
// Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithms 1 and 2.
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

// The largest |m_hat| / sqrt(v_hat) that t gradients can give, by Cauchy-Schwarz, and a thousandth more for rounding:
// 1 at t = 1; 7.27 in the limit for 0.9 / 0.999. Betas that never bound it give infinity or NaN.
ADAMW_HD double largest_update(double beta1, double beta2, int64_t t, double power1, double power2) {
  const double q = (beta1 * beta1) / beta2;
  const double one_minus_q = 1.0 - q;
  const bool sum_is_t = one_minus_q < 1e-10 && one_minus_q > -1e-10;
  const double sum = sum_is_t ? static_cast<double>(t) : (1.0 - integer_power(q, t)) / one_minus_q;
  const double first = (1.0 - beta1) / (1.0 - power1);
  const double second = (1.0 - power2) / (1.0 - beta2);
  return first * sqrt(second * sum) * 1.001;
}

// t = steps taken including this one. `norm`: of the gradients by which this tensor is clipped.
ADAMW_HD Coefficients<double> coefficients(const HyperRow& hyper, const TensorRow& row, int64_t t, double inv_scale,
                                           double norm) {
  const int64_t flags = row.flags;
  const double lr = hyper_value(hyper.lr, hyper.source & 3);
  const double beta1 = hyper_value(hyper.beta1, (hyper.source >> 2) & 3);
  const double beta2 = hyper_value(hyper.beta2, (hyper.source >> 4) & 3);
  const double eps = hyper_value(hyper.eps, (hyper.source >> 6) & 3);
  const double weight_decay = hyper_value(hyper.weight_decay, (hyper.source >> 8) & 3);
  const bool l2 = (flags & kL2) != 0;
  double clip = 1.0;
  if (flags & kClip) {
    const double limit = hyper_value(hyper.max_grad_norm, (hyper.source >> 10) & 3);
    clip = limit / (norm + 1e-6);
    clip = clip >= 1.0 || limit == INFINITY ? 1.0 : clip;  // a NaN stays
  }
  const double scale = inv_scale * clip;
  double ema = 0.0;
  if (flags & kEma) {
    double ema_decay = hyper_value(hyper.ema_decay, (hyper.source >> 12) & 3);
    const double warmup = (1.0 + static_cast<double>(t)) / (10.0 + static_cast<double>(t));
    if ((flags & kEmaWarmup) && !(ema_decay < warmup)) ema_decay = warmup;
    ema = 1.0 - ema_decay;
  }
  Coefficients<double> c = {};
  c.scale = (flags & kMaximize) ? -scale : scale;
  c.ema = ema;
  c.l2 = l2 ? weight_decay : 0.0;
  double rate = lr;
  if (flags & kScheduleDecay) rate = lr / hyper_value(hyper.initial_lr, (hyper.source >> 14) & 3);
  c.decay = l2 ? 0.0 : rate * weight_decay;
  c.bound = INFINITY;
  if (flags & kSgd) {
    const double dampening = (flags & kMomentum) && t > 1 ? beta2 : 0.0;  // the first gradient is the buffer
    const bool lr_in_momentum = (flags & kLrInMomentum) != 0;
    c.w1 = lr_in_momentum ? lr * (1.0 - dampening) : 1.0 - dampening;
    c.w2 = beta1;
    c.step_size = lr_in_momentum ? 1.0 : lr;
  } else {  // not an early return, at which nvcc 13 does not come to an end
    const double power1 = integer_power(beta1, t), power2 = integer_power(beta2, t);
    if (flags & kBound) {
      double update_bound = hyper_value(row.update_bound, kFromValue);
      if (update_bound < 0.0) update_bound = largest_update(beta1, beta2, t, power1, power2);
      c.bound = (lr < 0.0 ? -lr : lr) * update_bound;
    }
    c.w1 = 1.0 - beta1;
    c.w2 = 1.0 - beta2;
    c.step_size = lr / (1.0 - power1);
    c.inv_sqrt_bc2 = 1.0 / sqrt(1.0 - power2);
    c.eps = eps;
  }
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
  row[8] = static_cast<T>(c.ema);
  row[9] = static_cast<T>(c.bound);
}

// --- one element ------------------------------------------------------------------------------------------

ADAMW_HD float square_root(float x) { return sqrtf(x); }
ADAMW_HD double square_root(double x) { return sqrt(x); }

// Adam with decoupled weight decay (AdamW). kWithVariants: any of kVariants may be among `flags`; kWithBound: kBound.
template <bool kWithAmsgrad, bool kWithVariants, bool kWithBound, typename T>
ADAMW_HD void adamw(T& p, T grad, T& m, T& v, T& v_max, const Coefficients<T>& c, int64_t flags) {
  T g = c.scale * grad;
  if (kWithVariants) g = (flags & kL2) ? g + c.l2 * p : g;
  m = m + c.w1 * (g - m);
  v = v + c.w2 * (g * g - v);
  T s = v;
  if (kWithAmsgrad) {
    v_max = (v > v_max || v != v) ? v : v_max;  // a NaN in either stays
    s = v_max;
  }
  const T d = square_root(s) * c.inv_sqrt_bc2 + c.eps;
  T u = (c.step_size * m) / d;
  if (kWithBound) {  // a NaN passes
    u = u > c.bound ? c.bound : u;
    u = u < -c.bound ? -c.bound : u;
  }
  T r = c.decay * p;
  if (kWithVariants) {
    // & and |, not && and ||: a branch for each element would keep the loop from being vectorised.
    const bool update_disagrees = ((m > T(0)) & (g <= T(0))) | ((m < T(0)) & (g >= T(0)));
    u = ((flags & kCautious) != 0) & update_disagrees ? T(0) : u;
    const bool decay_disagrees = ((u > T(0)) & (p < T(0))) | ((u < T(0)) & (p > T(0)));
    r = ((flags & kCautiousDecay) != 0) & decay_disagrees ? T(0) : r;
  }
  p = p - (r + u);
}

// SGD with decoupled weight decay (SGDW). `m`: the momentum buffer; 0 where there is none.
template <typename T>
ADAMW_HD void sgdw(T& p, T grad, T& m, const Coefficients<T>& c, int64_t flags) {
  T g = c.scale * grad;
  g = (flags & kL2) ? g + c.l2 * p : g;
  const T entering = c.w1 * g;
  m = c.w2 * m + entering;
  const T direction = (flags & kNesterov) ? entering + c.w2 * m : m;
  const T u = c.step_size * direction;
  const T r = c.decay * p;
  p = p - (r + u);
}

// The exponential moving average of the weight as it is stored.
template <typename T>
ADAMW_HD T moving_average(T ema, T stored, T weight_of_new) {
  return ema + weight_of_new * (stored - ema);
}

// --- the step as a whole: sums of squares, apply or skip ---------------------------------------------------

// One term of a sum of squares. float32 and narrower square exactly in float64, and cannot overflow it: the sum is
// finite if and only if every gradient is.
template <typename G>
ADAMW_HD double square(const G* x) {
  const double value = load<double>(x);
  return value * value;
}

// found_inf as a sum over devices or processes can carry it.
ADAMW_HD double skip_is_signalled(const Signals& signals) { return signals.found_inf == 0.0 ? 0.0 : 1.0; }

// `totals`: of the whole step, over all devices and processes.
ADAMW_HD void decide(const Signals& signals, const NormDomain* domains, int64_t num_domains, const double* totals,
                     Decision* out) {
  const double inv_scale = 1.0 / signals.grad_scale;
  double total = 0.0, total_of_norm = 0.0;
  for (int64_t i = 0; i < num_domains; ++i) {
    total_of_norm = total_of_norm + totals[i];
    if (i + 1 < num_domains && domains[i + 1].norm == domains[i].norm) continue;
    out->norms[domains[i].norm] = sqrt(total_of_norm) * inv_scale;
    total = total + total_of_norm;
    total_of_norm = 0.0;
  }
  const double norm = sqrt(total) * inv_scale;
  const bool finite = total < INFINITY && norm < INFINITY;  // false for NaN too
  const bool skip = totals[num_domains] != 0.0 || (signals.skip_nonfinite != 0.0 && !finite) ||
                    (signals.max_skip_norm != -INFINITY && !(norm <= signals.max_skip_norm));
  out->skip = skip;
  out->skipped_steps += skip;
  out->norm = norm;
  out->inv_scale = inv_scale;
}

}  // namespace
