"""AdamW in NumPy: the judge of every backend.

Two spellings, for two questions:

* `adamw_float64` is AdamW as the paper writes it, in float64. It answers: how far from the truth?
* `coefficients`, `adamw_exact` and `step_exact` are the sequence of `csrc/rule.h`, operation by operation. They
  answer: the same bits? NumPy rounds every `+ - * / sqrt` to the array's dtype and never contracts two into one, so
  its result is what IEEE-754 prescribes.

Storage. A dtype is named 'float32', 'float64', 'float16' or 'bfloat16'. NumPy has no bfloat16, so those arrays hold
the raw bits as `np.uint16`. float16 arrays are plain `np.float16`. Both are what a torch tensor hands over without a
copy: `tensor.view(torch.uint16).numpy()` and `tensor.numpy()`.

No torch here: the judge must not share code with what it judges.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 2; Reddi, Kale & Kumar, On the
Convergence of Adam and Beyond (2018), for AMSGrad.
"""

from typing import Any, NamedTuple

import numpy as np

# What an array of each storage dtype looks like in NumPy.
ARRAY_DTYPE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (p, m, v, v_max) after step `t`, all float64, as Algorithm 2 of the paper writes it.

    The learning rate multiplies the decay too (the paper's schedule multiplier eta is `lr`, its alpha is 1). AMSGrad
    is torch's: the running maximum is taken before bias correction. `v_max` passes through unless `amsgrad`.

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
        if decoupled:
            update = update + weight_decay * p
        return p - lr * update, m, v, v_max


# --- the exact sequence: one tensor and step --------------------------------------------------------------


class Coefficients(NamedTuple):
    """What one tensor's step needs besides the tensors, in the compute dtype. The order is `launch_table.h`'s."""

    w1: np.floating[Any]  # 1 - beta1
    w2: np.floating[Any]  # 1 - beta2
    step_size: np.floating[Any]  # lr / (1 - beta1^t)
    inv_sqrt_bc2: np.floating[Any]  # 1 / sqrt(1 - beta2^t)
    decay: np.floating[Any]  # lr * weight_decay, or 0 for L2
    eps: np.floating[Any]
    scale: np.floating[Any]  # multiplies the gradient; -1 to maximize
    l2: np.floating[Any]  # weight_decay for L2, else 0


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
    """
    one = np.float64(1.0)
    lr, beta1, beta2, eps, weight_decay = (np.float64(x) for x in (lr, beta1, beta2, eps, weight_decay))
    with np.errstate(all="ignore"):
        return Coefficients(
            w1=compute(one - beta1),
            w2=compute(one - beta2),
            step_size=compute(lr / (one - integer_power(beta1, t))),
            inv_sqrt_bc2=compute(one / np.sqrt(one - integer_power(beta2, t))),
            decay=compute(lr * weight_decay if decoupled else 0.0),
            eps=compute(eps),
            scale=compute(-1.0 if maximize else 1.0),
            l2=compute(0.0 if decoupled else weight_decay),
        )


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (p, m, v, v_max) after the update, element by element in the compute dtype.

    One line here is one line of `adamw` in `csrc/rule.h`: every operation is rounded, in this order. All arrays and
    all of `c` have the compute dtype. `v_max` passes through unless `amsgrad`.
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
        p = p - (c.decay * p + (c.step_size * m) / d)
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
    )
    # store() refuses any other dtype than the compute dtype: an operation that had silently run in float64 fails here.
    return (
        store(p, param_dtype),
        store(m, moment_dtype),
        store(v, moment_dtype),
        store(v_max, moment_dtype) if amsgrad else v_max,
    )
