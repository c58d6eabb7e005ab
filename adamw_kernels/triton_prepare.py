"""The Triton kernel that turns hyperparameters into each tensor's coefficients, the twin of `csrc/rule.h`'s first part.

Everything is float64 until it is stored. Compiled as the kernels of `triton_kernels.py` are.
"""

import triton
import triton.language as tl

from adamw_kernels.triton_formats import mix
from adamw_kernels.triton_moments8 import advance_scale


@triton.jit
def _powers(base1, base2, base3, exponent):
    """Each base to the power of `exponent` in float64 by repeated squaring."""
    power1 = tl.full(base1.shape, 1.0, tl.float64)
    power2 = power1
    power3 = power1
    # As many rounds as the largest exponent has bits: a fixed number would be unrolled, at 160 registers a thread.
    bits = tl.max(exponent, axis=0)
    while bits > 0:
        odd = (exponent & 1) != 0
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        power3 = tl.where(odd, power3 * base3, power3)
        base1 = base1 * base1
        base2 = base2 * base2
        base3 = base3 * base3
        exponent = exponent >> 1
        bits = bits >> 1
    return power1, power2, power3


@triton.jit
def _hyper_field(hypers, row, source, active, FIELD: tl.constexpr):
    """A hyperparameter in float64: the row's own value, or that of the float32 or float64 tensor it points to."""
    word = tl.load(hypers + row * 9 + FIELD, mask=active, other=0)
    kind = (source >> (2 * FIELD)) & 3
    value = word.to(tl.float64, bitcast=True)
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=active & (kind == 1), other=0.0).to(tl.float64)
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=active & (kind == 2), other=0.0)
    return tl.where(kind == 1, single, tl.where(kind == 2, double, value))


@triton.jit(do_not_specialize=["num_tensors"])
def prepare_kernel(rows, grads, hypers, coefficients, decision, num_tensors, BLOCK: tl.constexpr):
    """Advance every tensor's step and write its coefficient row, unless skipped; BLOCK tensors a program."""
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < num_tensors
    inside = inside & (tl.load(decision + tensor * 0, mask=inside, other=1) == 0)  # the same word for all
    active = inside & (tl.load(grads + tensor, mask=inside, other=0) != 0)
    row = rows + tensor * 16
    step = tl.load(row + 4, mask=active, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(row + 6, mask=active, other=0)
    flags = tl.load(row + 7, mask=active, other=0)
    norm_index = tl.load(row + 9, mask=active, other=0)
    stream = tl.load(row + 10, mask=active, other=0).to(tl.uint64, bitcast=True)
    scale_address = tl.load(row + 13, mask=active, other=0)
    update_bound = tl.load(row + 15, mask=active, other=0).to(tl.float64, bitcast=True)

    taken = tl.load(step, mask=active, other=0.0) + 1.0
    tl.store(step, taken, mask=active)
    t = taken.to(tl.int64)

    source = tl.load(hypers + group * 9 + 8, mask=active, other=0)
    lr = _hyper_field(hypers, group, source, active, 0)
    beta1 = _hyper_field(hypers, group, source, active, 1)
    beta2 = _hyper_field(hypers, group, source, active, 2)
    eps = _hyper_field(hypers, group, source, active, 3)
    weight_decay = _hyper_field(hypers, group, source, active, 4)
    max_grad_norm = _hyper_field(hypers, group, source, active, 5)
    ema_decay = _hyper_field(hypers, group, source, active, 6)
    initial_lr = _hyper_field(hypers, group, source, active, 7)

    one = tl.full((BLOCK,), 1.0, tl.float64)
    zero = tl.full((BLOCK,), 0.0, tl.float64)
    maximize = (flags & 2) != 0
    l2 = (flags & 4) != 0
    w1 = one - beta1
    w2 = one - beta2
    # The largest |m_hat| / sqrt(v_hat) is the root of a sum of powers of q: see largest_update in csrc/rule.h.
    q = (beta1 * beta1) / beta2
    power1, power2, power_q = _powers(beta1, beta2, q, t)
    step_size = lr / (one - power1)
    inv_sqrt_bc2 = one / tl.sqrt(one - power2)
    follows_schedule = (flags & 0x80000) != 0
    rate = tl.where(follows_schedule, lr / tl.where(follows_schedule, initial_lr, one), lr)
    decay = tl.where(l2, zero, rate * weight_decay)
    l2_decay = tl.where(l2, weight_decay, zero)

    inv_scale = tl.load(decision + 3).to(tl.float64, bitcast=True)
    norm = tl.load(decision + 4 + norm_index, mask=active, other=0).to(tl.float64, bitcast=True)
    # In float64 throughout: a bare 1e-6 would be a float32 literal.
    clip = tl.where((flags & 64) != 0, max_grad_norm / (norm + tl.full((BLOCK,), 1e-6, tl.float64)), one)
    clip = tl.where((clip >= one) | (max_grad_norm == float("inf")), one, clip)  # a NaN stays
    scale = inv_scale * clip
    scale = tl.where(maximize, -scale, scale)

    taken64 = taken.to(tl.float64)
    one_minus_q = one - q
    tiny = tl.full((BLOCK,), 1e-10, tl.float64)
    sum_is_t = (one_minus_q < tiny) & (one_minus_q > -tiny)
    sum_of_powers = tl.where(sum_is_t, taken64, (one - power_q) / one_minus_q)
    largest_update = w1 / (one - power1) * tl.sqrt((one - power2) / w2 * sum_of_powers)
    largest_update = largest_update * tl.full((BLOCK,), 1.001, tl.float64)
    bound = tl.where(lr < 0, -lr, lr) * tl.where(update_bound < 0, largest_update, update_bound)
    bound = tl.where((flags & 0x40000) != 0, bound, float("inf"))

    # SGD: beta1 is the momentum, beta2 the dampening; the first gradient is the buffer.
    sgd = (flags & 0x1000000) != 0
    lr_in_momentum = (flags & 0x8000000) != 0
    dampening = tl.where(((flags & 0x2000000) != 0) & (t > 1), beta2, zero)
    entering = tl.where(lr_in_momentum, lr * (one - dampening), one - dampening)
    w1 = tl.where(sgd, entering, w1)
    w2 = tl.where(sgd, beta1, w2)
    step_size = tl.where(sgd, tl.where(lr_in_momentum, one, lr), step_size)

    warmup = (one + taken64) / (one * 10.0 + taken64)
    ema_decay = tl.where(((flags & 0x20000) != 0) & ((ema_decay < warmup) == 0), warmup, ema_decay)
    ema = tl.where((flags & 128) != 0, one - ema_decay, zero)
    key = mix(stream + t.to(tl.uint64) * 0x9E3779B97F4A7C15)

    is_double = (flags & 8) != 0
    _store_coefficient(coefficients, tensor, 0, w1, active, is_double)
    _store_coefficient(coefficients, tensor, 1, w2, active, is_double)
    _store_coefficient(coefficients, tensor, 2, step_size, active, is_double)
    _store_coefficient(coefficients, tensor, 3, inv_sqrt_bc2, active, is_double)
    _store_coefficient(coefficients, tensor, 4, decay, active, is_double)
    _store_coefficient(coefficients, tensor, 5, eps, active, is_double)
    _store_coefficient(coefficients, tensor, 6, scale, active, is_double)
    _store_coefficient(coefficients, tensor, 7, l2_decay, active, is_double)
    _store_coefficient(coefficients, tensor, 8, ema, active, is_double)
    _store_coefficient(coefficients, tensor, 9, bound, active, is_double)
    tl.store(coefficients + tensor * 16 + 15, key.to(tl.int64, bitcast=True), mask=active)

    has_scale = scale_address != 0  # beside float32 only
    scale_pointer = scale_address.to(tl.pointer_type(tl.float32))
    unscale, rescale = advance_scale(tl.load(scale_pointer, mask=has_scale, other=1.0), beta2)
    single = coefficients.to(tl.pointer_type(tl.float32)) + tensor * 32
    tl.store(single + 10, unscale, mask=has_scale)
    tl.store(single + 11, rescale, mask=has_scale)
    tl.store(scale_pointer, rescale, mask=has_scale)


@triton.jit
def _store_coefficient(coefficients, tensor, position, value, active, is_double):
    """Round once to the compute type. A row is of float64, or of float32 in its first half."""
    double = coefficients.to(tl.pointer_type(tl.float64)) + tensor * 16 + position
    single = coefficients.to(tl.pointer_type(tl.float32)) + tensor * 32 + position
    tl.store(double, value, mask=active & is_double)
    tl.store(single, value.to(tl.float32), mask=active & (is_double == 0))
