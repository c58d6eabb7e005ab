"""AdamW in NumPy: the judge of every backend.

Two spellings, for two questions:

* `adamw_float64` is AdamW as the paper writes it, in float64. It answers: how far from the truth?
* `coefficients`, `adamw_exact` and `step_exact` are the sequence of `csrc/rule.h`, operation by operation; so are
  `norm_partials`, `total` and `decide` for what precedes the update, and `ema_exact` for what follows it. They
  answer: the same bits? NumPy rounds every `+ - * / sqrt` to the array's dtype and never contracts two into one, so
  its result is what IEEE-754 prescribes. Weights and moments that are stored in parts or as codes are
  `reference_formats.py`'s.

Storage. A dtype is named 'float32', 'float64', 'float16' or 'bfloat16'. NumPy has no bfloat16, so those arrays hold
the raw bits as `np.uint16`. float16 arrays are plain `np.float16`. Both are what a torch tensor hands over without a
copy: `tensor.view(torch.uint16).numpy()` and `tensor.numpy()`.

No torch here: the judge must not share code with what it judges.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 2; Reddi, Kale & Kumar, On the
Convergence of Adam and Beyond (2018), for AMSGrad; Liang, Chen, Liu & Liu, Cautious Optimizers (2024); Chen et al.,
Cautious Weight Decay (2025); Salmon, Moraes, Dror & Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (2011), for
Philox; Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (2014), for the finalizer of the key.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# What an array of each storage dtype looks like in NumPy.
ARRAY_DTYPE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int16": np.dtype(np.int16),
}

# A gradient's squares are summed in this many lanes within chunks of this many elements, whatever the machine.
NORM_LANES = 1024
NORM_CHUNK = 16384

PHILOX_ROUNDS = 7


# --- the truth --------------------------------------------------------------------------------------------


def adamw_float64(
    p: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    v_max: np.ndarray | None,
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (p, m, v, v_max) after step `t`, all float64, as Algorithm 2 of the paper writes it.

    The learning rate multiplies the decay too (the paper's schedule multiplier eta is `lr`, its alpha is 1). AMSGrad
    is torch's: the running maximum is taken before bias correction. `v_max` passes through unless `amsgrad`.

    A loss scale or a clipping coefficient is the caller's: it multiplies `g`.

    Args:
        p: weights before the step.
        g: gradient; the other arrays have its shape.
        m: first moment before the step.
        v: second moment before the step.
        v_max: largest second moment so far, or None without `amsgrad`.
        t: steps taken including this one.
        lr: learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: lambda.
        amsgrad: divide by the root of the largest second moment so far.
        maximize: ascend.
        decoupled: True for AdamW; False for Adam with lambda * p added to the gradient.
        cautious: update only where update and gradient agree in sign; the paper's rescaling by the mask's mean is
            left out, so that an element's update depends on that element alone.
        cautious_weight_decay: decay only where the update does not pull the other way, as the decay does: where
            update and weight agree in sign, or one of them is 0.
    """
    p, g, m, v = (np.asarray(x, dtype=np.float64) for x in (p, g, m, v))
    with np.errstate(all="ignore"):
        if maximize:
            g = -g
        if not decoupled:
            g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        second_moment = v
        if amsgrad:
            v_max = np.maximum(np.asarray(v_max, dtype=np.float64), v)
            second_moment = v_max
        m_hat = m / (1 - beta1**t)
        root_v_hat = np.sqrt(second_moment) / np.sqrt(1 - beta2**t)
        update = m_hat / (root_v_hat + eps)
        if cautious:  # np.sign, for a product of tiny numbers would be 0; a NaN passes
            update = np.where(np.sign(update) * np.sign(g) <= 0, 0.0, update)
        if decoupled:
            decay = weight_decay * p
            if cautious_weight_decay:
                decay = np.where(np.sign(update) * np.sign(p) < 0, 0.0, decay)
            update = update + decay
        return p - lr * update, m, v, v_max


# --- the exact sequence: one tensor and step --------------------------------------------------------------


class Coefficients(NamedTuple):
    """What one tensor's step needs besides the tensors, in the compute dtype. The order is `launch_table.h`'s."""

    w1: np.floating[Any]  # 1 - beta1
    w2: np.floating[Any]  # 1 - beta2
    step_size: np.floating[Any]  # lr / (1 - beta1^t)
    inv_sqrt_bc2: np.floating[Any]  # 1 / sqrt(1 - beta2^t)
    decay: np.floating[Any]  # lr or lr / initial_lr, times weight_decay; 0 for L2
    eps: np.floating[Any]
    scale: np.floating[Any]  # multiplies the gradient: inverse loss scale times clipping, negated to maximize
    l2: np.floating[Any]  # weight_decay for L2, else 0
    ema: np.floating[Any] = np.float32(0)  # what of the new weight enters the average; 0 without an EMA
    bound: np.floating[Any] = np.float32(np.inf)  # of the update: lr times update_bound; infinity without one


def integer_power(base: float, exponent: int) -> np.float64:
    """Return base^exponent by repeated squaring: the multiplications of `rule.h` in its order, unlike `pow`."""
    result, square = np.float64(1.0), np.float64(base)
    with np.errstate(all="ignore"):
        while exponent > 0:
            if exponent & 1:
                result = result * square
            square = square * square
            exponent >>= 1
    return result


def coefficients(
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    decoupled: bool = True,
    compute: type[np.floating[Any]] = np.float32,
    inv_scale: float = 1.0,
    norm: float | None = None,
    max_grad_norm: float | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    update_bound: float | str | None = None,
    initial_lr: float | None = None,
) -> Coefficients:
    """Return step t's coefficients: computed in float64, then rounded once to `compute`.

    Args:
        t: steps taken including this one.
        lr: learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: lambda.
        maximize: ascend.
        decoupled: True for AdamW; False for Adam with lambda * p added to the gradient.
        compute: np.float32, or np.float64 for float64 parameters.
        inv_scale: 1 / the loss scale, of `decide`.
        norm: norm of the unscaled gradients, of `decide`; read only for clipping.
        max_grad_norm: clip to this norm, or None.
        ema_decay: share of the average that stays, or None without an EMA.
        ema_warmup: average faster in the first steps: the decay is at most (1 + t) / (10 + t).
        update_bound: |m_hat| / sqrt(v_hat) at most; "auto": what exact moments cannot exceed; None: any.
        initial_lr: the weight decays by lr / initial_lr * lambda, or None: by lr * lambda.
    """
    one = np.float64(1.0)
    lr, beta1, beta2, eps, weight_decay = (np.float64(x) for x in (lr, beta1, beta2, eps, weight_decay))
    with np.errstate(all="ignore"):
        scale = np.float64(inv_scale) * clip_coefficient(norm, max_grad_norm)
        rate = lr if initial_lr is None else lr / np.float64(initial_lr)
        return Coefficients(
            w1=compute(one - beta1),
            w2=compute(one - beta2),
            step_size=compute(lr / (one - integer_power(beta1, t))),
            inv_sqrt_bc2=compute(one / np.sqrt(one - integer_power(beta2, t))),
            decay=compute(rate * weight_decay if decoupled else 0.0),
            eps=compute(eps),
            scale=compute(-scale if maximize else scale),
            l2=compute(0.0 if decoupled else weight_decay),
            ema=compute(ema_weight(t, ema_decay, ema_warmup)),
            bound=compute(np.inf if update_bound is None else np.abs(lr) * _as_number(update_bound, beta1, beta2, t)),
        )


def _as_number(update_bound: float | str, beta1: np.float64, beta2: np.float64, t: int) -> np.float64:
    return largest_update(t, beta1, beta2) if update_bound == "auto" else np.float64(update_bound)


def largest_update(t: int, beta1: float, beta2: float) -> np.float64:
    """Return what |m_hat| / sqrt(v_hat) cannot exceed after t gradients, and a thousandth more for rounding.

    By Cauchy-Schwarz: m is a sum of (1 - beta1) beta1^k g_k, v one of (1 - beta2) beta2^k g_k^2, and their quotient is
    largest where g_k grows like (beta1 / beta2)^k. The sum of q^k, q = beta1^2 / beta2, is t where q is 1.
    """
    one, beta1, beta2 = np.float64(1.0), np.float64(beta1), np.float64(beta2)
    with np.errstate(all="ignore"):
        q = (beta1 * beta1) / beta2
        one_minus_q = one - q
        if one_minus_q < 1e-10 and one_minus_q > -1e-10:
            geometric = np.float64(t)
        else:
            geometric = (one - integer_power(q, t)) / one_minus_q
        first = (one - beta1) / (one - integer_power(beta1, t))
        second = (one - integer_power(beta2, t)) / (one - beta2)
        return first * np.sqrt(second * geometric) * np.float64(1.001)


def clip_coefficient(norm: float | None, max_grad_norm: float | None) -> np.float64:
    """Return what clips gradients of `norm` to `max_grad_norm`: at most 1, and a NaN for a norm that is one.

    An infinite limit clips nothing, not even an infinite norm.

    The 1e-6 is torch.nn.utils.clip_grad_norm_'s: a norm within it of the limit is clipped too.

    Raises:
        ValueError: there is a limit and no norm.
    """
    one = np.float64(1.0)
    if max_grad_norm is None:
        return one
    if norm is None:
        raise ValueError("max_grad_norm clips by a norm, and norm is None")
    with np.errstate(all="ignore"):
        clip = np.float64(max_grad_norm) / (np.float64(norm) + np.float64(1e-6))
    return one if clip >= one or max_grad_norm == np.inf else clip


def ema_weight(t: int, ema_decay: float | None, ema_warmup: bool = False) -> np.float64:
    """Return the share of step t's weight in the average: 1 - decay, in float64; 0 without an EMA.

    Args:
        t: steps taken including this one.
        ema_decay: share of the average that stays, or None.
        ema_warmup: the decay is at most (1 + t) / (10 + t).
    """
    if ema_decay is None:
        return np.float64(0.0)
    decay = np.float64(ema_decay)
    if ema_warmup:
        limit = (np.float64(1.0) + np.float64(t)) / (np.float64(10.0) + np.float64(t))
        decay = decay if decay < limit else limit
    return np.float64(1.0) - decay


def step_count_after(step: np.float32) -> np.float32:
    """Return the stored step count after one more step.

    It is a float32, as torch stores it, and so stays at 2^24: by then every bias correction in use is exactly 1.
    """
    return np.float32(step) + np.float32(1.0)


# --- the exact sequence: one element ----------------------------------------------------------------------


def adamw_exact(
    p: np.ndarray,
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    v_max: np.ndarray | None,
    c: Coefficients,
    *,
    amsgrad: bool,
    l2: bool,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (p, m, v, v_max) after the update, element by element in the compute dtype.

    One line here is one line of `adamw` in `csrc/rule.h`: every operation is rounded, in this order. All arrays and
    all of `c` have the compute dtype. `v_max` passes through unless `amsgrad`. What a cautious mask takes away is +0.0.
    A comparison with a NaN is false, so that a NaN is never masked.
    """
    with np.errstate(all="ignore"):
        g = c.scale * grad
        if l2:
            g = g + c.l2 * p
        m = m + c.w1 * (g - m)
        v = v + c.w2 * (g * g - v)
        s = v
        if amsgrad:
            v_max = np.where((v > v_max) | (v != v), v, v_max)  # a NaN in either stays
            s = v_max
        d = np.sqrt(s) * c.inv_sqrt_bc2 + c.eps
        u = (c.step_size * m) / d
        u = np.where(u > c.bound, c.bound, u)
        u = np.where(u < -c.bound, -c.bound, u)
        if cautious:
            u = np.where(((m > 0) & (g <= 0)) | ((m < 0) & (g >= 0)), np.zeros_like(u), u)
        r = c.decay * p
        if cautious_weight_decay:
            r = np.where(((u > 0) & (p < 0)) | ((u < 0) & (p > 0)), np.zeros_like(r), r)
        p = p - (r + u)
    return p, m, v, v_max


# --- storage ----------------------------------------------------------------------------------------------


def compute_dtype(param_dtype: str) -> type[np.floating[Any]]:
    """Return the dtype of the arithmetic and of the moments for parameters stored as `param_dtype`."""
    return np.float64 if param_dtype == "float64" else np.float32


def load(array: np.ndarray, dtype: str, compute: type[np.floating[Any]] = np.float32) -> np.ndarray:
    """Return a stored array in the compute dtype; always exact, for float64 storage needs float64 arithmetic.

    Args:
        array: what is stored, of NumPy dtype `ARRAY_DTYPE[dtype]`.
        dtype: the storage dtype's name.
        compute: np.float32 or np.float64.

    Raises:
        TypeError: the array is not of the storage dtype, or loading would round.
    """
    array = _check_stored(array, dtype)
    if dtype == "float64" and compute is not np.float64:
        raise TypeError("a float64 array loads into float64 only: float32 arithmetic would round it unseen")
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN turns quiet
        return array.astype(compute)


def store(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the stored form of an array in its compute dtype: rounded once, to nearest, ties to even.

    bfloat16 is integer arithmetic, the twin of `float_to_bf16` in `csrc/formats.h`. float16 is NumPy's own cast, an
    independent check of the integer arithmetic in `float_to_fp16`. A NaN stays a NaN.

    Args:
        array: float32, or float64 where `dtype` is 'float64'.
        dtype: the storage dtype's name.

    Raises:
        TypeError: the array is not of the compute dtype; storing it would round twice.
    """
    array = np.asarray(array)
    compute = compute_dtype(dtype)
    if array.dtype != compute:
        raise TypeError(f"{dtype} is stored from {np.dtype(compute)} arrays, got {array.dtype}")
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding up a NaN could carry into the sign
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        return np.where(is_nan, quiet, rounded).astype(np.uint16)
    with np.errstate(all="ignore"):
        return array.astype(ARRAY_DTYPE[dtype])


def _check_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != ARRAY_DTYPE[dtype]:
        raise TypeError(f"{dtype} is held in arrays of {ARRAY_DTYPE[dtype]}, got {array.dtype}")
    return array


# --- load, compute, store ---------------------------------------------------------------------------------


def step_exact(
    p: np.ndarray,
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    v_max: np.ndarray | None,
    t: int,
    *,
    param_dtype: str,
    grad_dtype: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
    inv_scale: float = 1.0,
    norm: float | None = None,
    max_grad_norm: float | None = None,
    update_bound: float | str | None = None,
    initial_lr: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the stored (p, m, v, v_max) after step `t`, bit for bit what every backend must store.

    Moments are kept in the compute dtype: float64 for float64 parameters, else float32.

    Args:
        p: stored weights, of NumPy dtype `ARRAY_DTYPE[param_dtype]`.
        grad: stored gradient, of NumPy dtype `ARRAY_DTYPE[grad_dtype]`.
        m: first moment.
        v: second moment.
        v_max: largest second moment so far, or None without `amsgrad`.
        t: steps taken including this one.
        param_dtype: storage dtype of the weights.
        grad_dtype: storage dtype of the gradient.
        lr: learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: lambda.
        amsgrad: divide by the root of the largest second moment so far.
        maximize: ascend.
        decoupled: True for AdamW; False for Adam with lambda * p added to the gradient.
        cautious: update only where first moment and gradient agree in sign.
        cautious_weight_decay: decay only where the update does not pull the other way.
        inv_scale: 1 / the loss scale, of `decide`.
        norm: norm of the unscaled gradients, of `decide`; read only for clipping.
        max_grad_norm: clip to this norm, or None.
        update_bound: of `coefficients`.
        initial_lr: likewise.

    Raises:
        TypeError: an array is not of the NumPy dtype that its storage dtype asks for.
    """
    compute = compute_dtype(param_dtype)
    moment_dtype = np.dtype(compute).name
    c = coefficients(
        t,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        decoupled=decoupled,
        compute=compute,
        inv_scale=inv_scale,
        norm=norm,
        max_grad_norm=max_grad_norm,
        update_bound=update_bound,
        initial_lr=initial_lr,
    )
    p, m, v, v_max = adamw_exact(
        load(p, param_dtype, compute),
        load(grad, grad_dtype, compute),
        load(m, moment_dtype, compute),
        load(v, moment_dtype, compute),
        load(v_max, moment_dtype, compute) if amsgrad else v_max,
        c,
        amsgrad=amsgrad,
        l2=not decoupled,
        cautious=cautious,
        cautious_weight_decay=cautious_weight_decay,
    )
    # store() refuses any other dtype than the compute dtype: an operation that had silently run in float64 fails here.
    return (
        store(p, param_dtype),
        store(m, moment_dtype),
        store(v, moment_dtype),
        store(v_max, moment_dtype) if amsgrad else v_max,
    )


# --- before the update: norm and decision -----------------------------------------------------------------


def norm_chunks(numel: int) -> int:
    """Return how many norm chunks, and so partial sums, a tensor of `numel` elements has."""
    return -(-numel // NORM_CHUNK)


def lane_sums(values: np.ndarray) -> np.ndarray:
    """Return `NORM_LANES` sums: value i joins lane i mod `NORM_LANES`, in ascending order, from +0.0."""
    lanes = np.zeros(NORM_LANES)
    with np.errstate(all="ignore"):
        for start in range(0, values.size, NORM_LANES):
            row = values[start : start + NORM_LANES]
            lanes[: row.size] += row
    return lanes


def fold_lanes(lanes: np.ndarray) -> np.float64:
    """Return the lanes' sum: the upper half is added to the lower until one is left."""
    with np.errstate(all="ignore"):
        while lanes.size > 1:
            half = lanes.size // 2
            lanes = lanes[:half] + lanes[half:]
    return np.float64(lanes[0])


def norm_partials(grad: np.ndarray, dtype: str) -> np.ndarray:
    """Return the sums of squares of a stored gradient, one float64 a norm chunk.

    A tensor without a gradient takes part with `np.zeros(norm_chunks(numel))`.

    Args:
        grad: stored gradient, flat, in the memory order of the parameter.
        dtype: its storage dtype's name.

    Raises:
        TypeError: the array is not of the NumPy dtype that its storage dtype asks for.
        ValueError: the array is not flat.
    """
    grad = np.asarray(grad)
    if grad.ndim != 1:
        raise ValueError(f"a flat gradient in memory order is needed, got shape {grad.shape}")
    partials = np.empty(norm_chunks(grad.size))
    for chunk in range(partials.size):
        x = load(grad[chunk * NORM_CHUNK : (chunk + 1) * NORM_CHUNK], dtype, np.float64)
        with np.errstate(all="ignore"):
            squares = x * x
        partials[chunk] = fold_lanes(lane_sums(squares))
    return partials


def total(partials: np.ndarray | Sequence[float]) -> np.float64:
    """Return the sum of squares of a norm domain.

    Args:
        partials: of all its tensors in the optimizer's order, and of each in the order of its chunks.
    """
    return fold_lanes(lane_sums(np.asarray(partials, dtype=np.float64)))


class Decision(NamedTuple):
    """What is known before the update, in float64 where it is a number."""

    skip: bool
    norm: np.float64  # of all unscaled gradients
    norms: np.ndarray  # one entry a norm: one for the optimizer, or one a group
    inv_scale: np.float64


def decide(
    totals_by_norm: Sequence[float | Sequence[float]],
    grad_scale: float | None = None,
    found_inf: float | None = None,
    skip_nonfinite: bool = False,
    max_skip_norm: float | None = None,
) -> Decision:
    """Return whether to skip the step, the norms of the unscaled gradients, and 1 / the loss scale.

    Args:
        totals_by_norm: for each norm the total of its domain, or its domains' totals in order.
        grad_scale: the loss scale, or None for 1.
        found_inf: what a gradient scaler found: skip unless it is 0. A NaN skips.
        skip_nonfinite: skip unless the sum of squares and the unscaled norm are finite.
        max_skip_norm: skip unless the norm is at most this. A NaN skips.
    """
    with np.errstate(all="ignore"):
        inv_scale = np.float64(1.0) / np.float64(1.0 if grad_scale is None else grad_scale)
        sums = [_sum_in_order(np.atleast_1d(domains)) for domains in totals_by_norm]
        everything = _sum_in_order(sums)
        norms = np.sqrt(np.array(sums, dtype=np.float64)) * inv_scale
        norm = np.sqrt(everything) * inv_scale
    skip = found_inf is not None and bool(np.any(np.asarray(found_inf) != 0))
    skip = skip or (skip_nonfinite and not (everything < np.inf and norm < np.inf))
    skip = skip or (max_skip_norm is not None and not norm <= max_skip_norm)
    return Decision(bool(skip), norm, norms, inv_scale)


def _sum_in_order(values: Sequence[float] | np.ndarray) -> np.float64:
    result = np.float64(0.0)
    for value in values:
        result = result + np.float64(value)
    return result


# --- after the update: exponential moving average ---------------------------------------------------------


def ema_exact(
    ema: np.ndarray,
    p: np.ndarray,
    ema_w: np.floating[Any],
    param_dtype: str,
    ema_dtype: str,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Return the stored average after the weight that this step stored has entered it.

    Args:
        ema: stored average, of NumPy dtype `ARRAY_DTYPE[ema_dtype]`.
        p: stored weights after the step, of NumPy dtype `ARRAY_DTYPE[param_dtype]`: what is averaged is what is kept.
        ema_w: the share of the new weight, `Coefficients.ema`, in the compute dtype.
        param_dtype: storage dtype of the weights.
        ema_dtype: the compute dtype's name, or 'bfloat16' for stochastic rounding; a float64 average is first rounded
            to the nearest float32.
        words: one random word an element, of `random_words`; for 'bfloat16' only.

    Raises:
        TypeError: an array is not of the NumPy dtype that its storage dtype asks for, or the average is kept in
            another dtype than those above.
    """
    compute = compute_dtype(param_dtype)
    e, q = load(ema, ema_dtype, compute), load(p, param_dtype, compute)
    with np.errstate(all="ignore"):
        e = e + ema_w * (q - e)
    if ema_dtype == "bfloat16":
        if e.dtype != compute:
            raise TypeError(
                f"the average is computed in {np.dtype(compute)}, got a weight of {np.asarray(ema_w).dtype}"
            )
        with np.errstate(all="ignore"):
            return stochastic_bfloat16(e.astype(np.float32), bits_for_average(np.asarray(words)))
    if ema_dtype != np.dtype(compute).name:
        raise TypeError(f"the average of {param_dtype} weights is {np.dtype(compute)} or bfloat16, got {ema_dtype}")
    return store(e, ema_dtype)


def stochastic_bfloat16(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Return float32 values as stored bfloat16, rounded up in magnitude with the probability of what is cut off.

    Adding a uniform 16-bit number to the bits carries into the kept half in `cut off` of 65536 cases. A NaN stays a
    NaN, an infinity and any value that bfloat16 holds stay themselves.

    Args:
        x: float32 array.
        random: uint32 array of its shape, of which the lower 16 bits are read.

    Raises:
        TypeError: an array is of another dtype.
    """
    x, random = np.asarray(x), np.asarray(random)
    if x.dtype != np.float32 or random.dtype != np.uint32:
        raise TypeError(f"stochastic rounding takes float32 values and uint32 words, got {x.dtype} and {random.dtype}")
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    # Only a NaN could carry out of the 32 bits, and it is replaced.
    rounded = (np.where(is_nan, np.uint32(0), bits) + (random & np.uint32(0xFFFF))) >> np.uint32(16)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


# --- random words -----------------------------------------------------------------------------------------


def random_key(seed: int, tensor: int, t: int) -> int:
    """Return the 64-bit key of a tensor's random words in a step.

    Args:
        seed: the optimizer's; any integer, taken modulo 2^64.
        tensor: the parameter's position over all groups.
        t: steps taken including this one.
    """
    golden = 0x9E3779B97F4A7C15
    stream = mix(seed + golden * (tensor + 1))
    return mix(stream + golden * t)


def mix(z: int) -> int:
    """Return splitmix64's finalizer of z modulo 2^64: a bijection in which every input bit reaches every output bit."""
    z &= 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def random_words(key: int, indices: np.ndarray) -> np.ndarray:
    """Return one uint32 word an element, which serves all its roundings: a call's two words are two neighbours'.

    Args:
        key: of `random_key`. Its upper half enters the counter: Philox2x32 has a 32-bit key.
        indices: positions of the elements in the parameter's memory order, of any integer dtype and shape.
    """
    indices = np.asarray(indices).astype(np.uint64)
    pairs = indices >> np.uint64(1)
    low = (pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (pairs >> np.uint64(32)).astype(np.uint32) ^ np.uint32(key >> 32)
    even, odd = philox2x32(low, high, key & 0xFFFFFFFF)
    return np.where(indices & np.uint64(1), odd, even)


def bits_for_first_moment(words: np.ndarray) -> np.ndarray:
    """Return 16 bits of each word: its lower half."""
    return words & np.uint32(0xFFFF)


def bits_for_second_moment(words: np.ndarray) -> np.ndarray:
    """Return 16 bits of each word: its upper half."""
    return words >> np.uint32(16)


def bits_for_weight(words: np.ndarray) -> np.ndarray:
    """Return 16 bits of each word, independent of either half: both, added without carries."""
    return (words ^ (words >> np.uint32(16))) & np.uint32(0xFFFF)


def bits_for_average(words: np.ndarray) -> np.ndarray:
    """Return 16 bits of each word, independent of the weight's: those in its middle."""
    return (words >> np.uint32(8)) & np.uint32(0xFFFF)


def philox2x32(c0: np.ndarray, c1: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both words of Philox2x32 with 7 rounds, the fewest that pass BigCrush.

    Args:
        c0: uint32 array, the counter's first word.
        c1: uint32 array of its shape, the counter's second word.
        key: 32 bits.
    """
    c0, c1 = np.asarray(c0, dtype=np.uint32), np.asarray(c1, dtype=np.uint32)
    for _ in range(PHILOX_ROUNDS):
        product = c0.astype(np.uint64) * np.uint64(0xD256D193)  # below 2^64
        c0, c1 = (product >> np.uint64(32)).astype(np.uint32) ^ np.uint32(key) ^ c1, product.astype(np.uint32)
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return c0, c1
