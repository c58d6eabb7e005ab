"""NumPy reference of SGD with decoupled weight decay (SGDW): the judge of its kernels' bits.

One line of `sgdw_exact` is one line of `sgdw` in `csrc/rule.h`. What surrounds it (storage formats, averages, clipping,
the decision to skip) is `reference.py`'s and `reference_formats.py`'s.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from reference import (
    Coefficients,
    bits_for_first_moment,
    bits_for_weight,
    clip_coefficient,
    compute_dtype,
    ema_weight,
    load,
    stochastic_bfloat16,
    store,
)
from reference_formats import load_weight, store_weight


def sgd_coefficients(
    t: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled: bool = True,
    lr_in_momentum: bool = False,
    initial_lr: float | None = None,
    compute: type[np.floating[Any]] = np.float32,
    inv_scale: float = 1.0,
    norm: float | None = None,
    max_grad_norm: float | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
) -> Coefficients:
    """Return step t's coefficients: computed in float64, then rounded once to `compute`.

    Args:
        t: steps taken including this one.
        lr: learning rate.
        momentum: share of the buffer that stays.
        dampening: 1 less the share of a gradient that enters the buffer, but for the first one, which enters whole.
        weight_decay: lambda.
        maximize: ascend.
        decoupled: True for SGDW; False for SGD with lambda * p added to the gradient.
        lr_in_momentum: what enters the buffer is multiplied by lr, not what leaves it (the paper's Algorithm 1).
        initial_lr: the weight decays by lr / initial_lr * lambda, or None: by lr * lambda.
        compute: np.float32, or np.float64 for float64 parameters.
        inv_scale: 1 / the loss scale, of `decide`.
        norm: norm of the unscaled gradients, of `decide`; read only for clipping.
        max_grad_norm: clip to this norm, or None.
        ema_decay: share of the average that stays, or None without an EMA.
        ema_warmup: average faster in the first steps.
    """
    one, zero = np.float64(1.0), np.float64(0.0)
    lr, weight_decay = np.float64(lr), np.float64(weight_decay)
    entering = one - (np.float64(dampening) if momentum != 0.0 and t > 1 else zero)
    with np.errstate(all="ignore"):
        scale = np.float64(inv_scale) * clip_coefficient(norm, max_grad_norm)
        rate = lr if initial_lr is None else lr / np.float64(initial_lr)
        return Coefficients(
            w1=compute(lr * entering if lr_in_momentum else entering),
            w2=compute(momentum),
            step_size=compute(one if lr_in_momentum else lr),
            inv_sqrt_bc2=compute(zero),
            decay=compute(rate * weight_decay if decoupled else zero),
            eps=compute(zero),
            scale=compute(-scale if maximize else scale),
            l2=compute(zero if decoupled else weight_decay),
            ema=compute(ema_weight(t, ema_decay, ema_warmup)),
        )


def sgdw_exact(
    p: np.ndarray, grad: np.ndarray, m: np.ndarray, c: Coefficients, *, l2: bool = False, nesterov: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return (p, m) after the update, element by element in the compute dtype; `m` is the momentum buffer."""
    with np.errstate(all="ignore"):
        g = c.scale * grad
        if l2:
            g = g + c.l2 * p
        entering = c.w1 * g
        m = c.w2 * m + entering
        direction = entering + c.w2 * m if nesterov else m
        u = c.step_size * direction
        r = c.decay * p
        return p - (r + u), m


def step_sgd(
    state: Mapping[str, np.ndarray],
    grad: np.ndarray,
    t: int,
    words: np.ndarray,
    *,
    param_dtype: str,
    grad_dtype: str,
    param_format: str = "native",
    moment_format: str = "float32",
    nesterov: bool = False,
    decoupled: bool = True,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return the stored state after step `t`; what the step leaves alone is not among it.

    Args:
        state: flat arrays in memory order by the names of the optimizer's state, `param` beside them.
        grad: stored gradient, flat, in the parameter's memory order.
        t: steps taken including this one.
        words: of `random_words`, for every element.
        param_dtype: storage dtype of the weights.
        grad_dtype: storage dtype of the gradient.
        param_format: one of `PARAM_FORMATS`; 'native' for float32 weights and wider.
        moment_format: 'float32' or 'bfloat16', of the momentum buffer.
        nesterov: step along the gradient and the buffer that it has just entered.
        decoupled: True for SGDW; False for SGD with lambda * p added to the gradient.
        options: of `sgd_coefficients`.
    """
    compute = compute_dtype(param_dtype)
    buffer_dtype = "bfloat16" if moment_format == "bfloat16" else np.dtype(compute).name
    c = sgd_coefficients(t, decoupled=decoupled, compute=compute, **options)
    p = load_weight(state["param"], state.get("param_remainder"), param_dtype, param_format)
    has_buffer = options.get("momentum", 0.0) != 0.0
    m = load(state["momentum_buffer"], buffer_dtype, compute) if has_buffer else np.zeros_like(p)
    p, m = sgdw_exact(p, load(grad, grad_dtype, compute), m, c, l2=not decoupled, nesterov=nesterov)
    after: dict[str, np.ndarray] = {}
    after["param"], remainder = store_weight(p, param_dtype, param_format, bits_for_weight(words))
    if remainder is not None:
        after["param_remainder"] = remainder
    if has_buffer and moment_format == "bfloat16":
        after["momentum_buffer"] = stochastic_bfloat16(m, bits_for_first_moment(words))
    elif has_buffer:
        after["momentum_buffer"] = store(m, buffer_dtype)
    return after
