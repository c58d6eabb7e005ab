"""Weights that are stored in two parts, and moments in 16 or 8 bits, in NumPy: the judge of every storage format.

The sequences of `csrc/formats.h` and `csrc/moments8.h`, operation by operation, for whole tensors: flat arrays in the
order of the tensor's memory. Where those headers take a short cut for speed (a reciprocal, a table in a word), this
module says what it stands for. `step_packed` is one step: load, the update of `reference.py`, store.

Integers are computed in int64, where nothing wraps, and read as float32 bits where a formula says so.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from reference import (
    ARRAY_DTYPE,
    adamw_exact,
    bits_for_first_moment,
    bits_for_second_moment,
    bits_for_weight,
    coefficients,
    compute_dtype,
    load,
    stochastic_bfloat16,
    store,
)

PARAM_FORMATS = ("native", "stochastic", "split24", "split32")
MOMENT_FORMATS = ("float32", "bfloat16", "8bit")

INFINITY = 0x7F800000  # bits of float32


def bits_of(x: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values, as int64."""
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise TypeError(f"float32 values are needed, got {x.dtype}")
    return np.ascontiguousarray(x).view(np.uint32).reshape(x.shape).astype(np.int64)


def float_of(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bits."""
    return np.asarray(bits).astype(np.uint32).view(np.float32)


# --- a 16-bit weight and the rest of it -----------------------------------------------------------------------------


class Split(NamedTuple):
    """How a weight's magnitude, an integer, is made of the weight's own bits and those below.

    For bfloat16 the magnitude is that of float32. For float16 it is that of a float with 5 exponent and 23 fraction
    bits: float32 times 2^-112, in which what lies below 2^-14 is a multiple of 2^-37.
    """

    bits: int  # below the weight's own
    infinity: int
    largest: int  # that is stored: for float16 the last one whose weight is finite
    nan: int  # the weight's bits
    rebias: np.float32


SPLITS = {
    "bfloat16": Split(16, INFINITY, 0x7F7FFFFF, 0x7FC0, np.float32(1)),
    "float16": Split(13, 0x1F << 23, (0x1F << 23) - (1 << 12) - 1, 0x7E00, np.float32(2.0**-112)),
}


def remainder_bits(dtype: str, param_format: str) -> int:
    """Return how many of the magnitude's bits below the weight a remainder of 'split24' or 'split32' keeps."""
    return 8 if param_format == "split24" else SPLITS[dtype].bits


def cut_magnitude(x: np.ndarray, dtype: str, kept: int, random: np.ndarray) -> np.ndarray:
    """Return the magnitude of finite or infinite weights without its last bits, rounded up where `random` says so.

    Args:
        x: float32 weights.
        dtype: 'bfloat16' or 'float16'.
        kept: bits below the weight's own that are kept.
        random: 16 bits an element; of no effect where nothing is dropped.
    """
    split = SPLITS[dtype]
    dropped = split.bits - kept
    magnitude = bits_of(x) & 0x7FFFFFFF
    finite = magnitude < INFINITY
    with np.errstate(all="ignore"):
        units = bits_of(float_of(magnitude) * split.rebias)
    units = np.minimum(units + (np.asarray(random, dtype=np.int64) >> (16 - dropped)), split.largest)
    return np.where(finite, units, split.infinity) >> dropped


def split_weight(
    x: np.ndarray, dtype: str, param_format: str, random: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return stored weights, to nearest, ties upwards, and their remainders: what is to be added to the magnitude.

    Args:
        x: float32 weights.
        dtype: 'bfloat16' or 'float16'.
        param_format: 'split24' or 'split32'.
        random: 16 bits an element, for 'split24'.
    """
    kept = remainder_bits(dtype, param_format)
    magnitude = cut_magnitude(x, dtype, kept, np.zeros(x.shape, np.int64) if random is None else random)
    upper = (magnitude + (1 << (kept - 1))) >> kept
    remainder = magnitude - (upper << kept)
    nan = (bits_of(x) & 0x7FFFFFFF) > INFINITY
    weight = (bits_of(x) >> 16) & 0x8000 | np.where(nan, SPLITS[dtype].nan, upper)
    remainder = np.where(nan, 0, remainder).astype(np.int8 if param_format == "split24" else np.int16)
    return weight.astype(np.uint16).view(ARRAY_DTYPE[dtype]), remainder


def merge_weight(weight: np.ndarray, remainder: np.ndarray, dtype: str, param_format: str) -> np.ndarray:
    """Return the float32 weights of stored weights and remainders; what would be less than 0 is 0, its sign kept.

    Args:
        weight: stored, of NumPy dtype `ARRAY_DTYPE[dtype]`.
        remainder: int8 for 'split24', int16 for 'split32'.
        dtype: 'bfloat16' or 'float16'.
        param_format: 'split24' or 'split32'.
    """
    split = SPLITS[dtype]
    weight = weight.view(np.uint16).astype(np.int64)
    unit = 1 << (split.bits - remainder_bits(dtype, param_format))
    magnitude = np.maximum(((weight & 0x7FFF) << split.bits) + remainder.astype(np.int64) * unit, 0)
    with np.errstate(all="ignore"):
        finite = bits_of(float_of(magnitude) / split.rebias)  # a power of two: exact either way
    special = magnitude | INFINITY
    return float_of((weight & 0x8000) << 16 | np.where(magnitude < split.infinity, finite, special))


def store_stochastically(x: np.ndarray, dtype: str, random: np.ndarray) -> np.ndarray:
    """Return stored weights, up in magnitude with the probability of what is cut off.

    A bfloat16 weight may so become infinite, a float16 one stays finite unless it was infinite.

    Args:
        x: float32 weights.
        dtype: 'bfloat16' or 'float16'.
        random: 16 bits an element, uint32.
    """
    if dtype == "bfloat16":
        return stochastic_bfloat16(x, random)
    magnitude = np.where((bits_of(x) & 0x7FFFFFFF) > INFINITY, SPLITS[dtype].nan, cut_magnitude(x, dtype, 0, random))
    return ((bits_of(x) >> 16) & 0x8000 | magnitude).astype(np.uint16).view(np.float16)


def load_weight(param: np.ndarray, remainder: np.ndarray | None, dtype: str, param_format: str) -> np.ndarray:
    """Return the weights as they are remembered, in the compute dtype."""
    if param_format in ("split24", "split32"):
        return merge_weight(param, remainder, dtype, param_format)
    return load(param, dtype, compute_dtype(dtype))


def store_weight(
    x: np.ndarray, dtype: str, param_format: str, random: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the stored weights and, where the format has them, the remainders. `random`: 16 bits an element."""
    if param_format == "native":
        return store(x, dtype), None
    if param_format == "stochastic":
        return store_stochastically(x, dtype, random), None
    return split_weight(x, dtype, param_format, random)


# --- moments in 8 bits ----------------------------------------------------------------------------------------------

GROUP = 16
FIRST_SCALE = np.float32(2.0**24)

# What `mode` stands for: octaves that the codes of a group's second moments span, and codes in each of them.
OCTAVES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32])
CODES_PER_OCTAVE = 254 // OCTAVES
# From one code to the next: 2^23 / N units of float32's bits, rounded up to a multiple of 2^-shift, so that
# 254 of them take no more than 32 bits.
SHIFT = np.array([8, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3])
SPACING = -(-(1 << (23 + SHIFT)) // CODES_PER_OCTAVE)

EIGHT_NINTHS = np.float32(8) / np.float32(9)
NOT_FINITE = -128


class Scaling(NamedTuple):
    """By what second moments are multiplied when they are loaded and stored, and the scale after the step."""

    unscale: np.float32
    rescale: np.float32


def advance_scale(scale: np.float32, beta2: float) -> Scaling:
    """Return the scaling of a step: the scale grows by 1 / beta2, modulo powers of two from 2^24 up to 2^25."""
    with np.errstate(all="ignore"):  # beta2 may be 0
        grown = np.float32(np.float64(scale) / np.float64(beta2))
    mantissa = bits_of(grown) & 0x7FFFFF
    return Scaling(np.float32(1.0 / np.float64(scale)), np.float32(float_of(mantissa | bits_of(FIRST_SCALE))))


def in_groups(x: np.ndarray) -> np.ndarray:
    """Return a flat array as rows of 16 neighbours, the last row filled up with zeros."""
    whole = np.zeros(-(-x.size // GROUP) * GROUP, x.dtype)
    whole[: x.size] = x
    return whole.reshape(-1, GROUP)


class Codebook(NamedTuple):
    """What each group's codes stand for; columns of int64."""

    e: np.ndarray  # biased exponent of the first octave
    mode: np.ndarray
    j: np.ndarray  # half octaves by which the largest ratio lies below what could be held


def read_words(groups: np.ndarray) -> Codebook:
    """Return what the groups' words say: e << 8 | mode << 4 | j, stored as int16."""
    word = groups.view(np.uint16).astype(np.int64)[:, None]
    return Codebook(word >> 8, word >> 4 & 15, word & 15)


def position(code: np.ndarray, book: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """Return what codes of a second moment stand for: bits of the scaled value, and its octave. Not for code 0."""
    q = np.maximum(code - 1, 0)
    return (book.e << 23) + ((q * SPACING[book.mode]) >> SHIFT[book.mode]), book.e + q // CODES_PER_OCTAVE[book.mode]


def reference_of(code: np.ndarray, octave: np.ndarray) -> np.ndarray:
    """Return s, by multiples of which a first moment is held: about the root of the scaled v, 0 for code 0.

    2^(octave / 2), or 4/3 of the power of two below it.
    """
    s = float_of((octave + 127) << 22) * np.where((octave + 127) & 1, EIGHT_NINTHS, np.float32(1))
    return np.where(code > 0, s, np.float32(0))


def ratio_step(j: np.ndarray) -> np.ndarray:
    """Return the ratio m / s that one step of a first moment's code is: 2^-7, 1.5 * 2^-8, 2^-8, ..., over 127.

    s is about the root of v times a scale from 2^24 to 2^25, and so m / sqrt(v) at most 2^5.
    """
    return float_of((240 - j) << 22) * (np.float32(1) / np.float32(127))


def steps_per_ratio(j: np.ndarray) -> np.ndarray:
    """Return the inverse of `ratio_step`."""
    per_unit = np.where((240 - j) & 1, np.float32(127) * EIGHT_NINTHS, np.float32(127))
    return float_of((508 - (240 - j)) << 22) * per_unit


def decode_moments(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, unscale: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Return both moments in float32, flat.

    Args:
        first: int8 codes.
        second: uint8 codes.
        groups: int16, one word for 16 elements.
        unscale: inverse of the scale that they were stored with.
    """
    book, size = read_words(groups), first.size
    first, second = in_groups(first).astype(np.int64), in_groups(second).astype(np.int64)
    bits, octave = position(second, book)
    with np.errstate(all="ignore"):
        v = np.where(second > 0, float_of(bits) * unscale, np.float32(0))
        m = first.astype(np.float32) * (reference_of(second, octave) * ratio_step(book.j))
    return np.where(first == NOT_FINITE, np.float32(np.nan), m).ravel()[:size], v.ravel()[:size]


def encode_moments(
    m: np.ndarray, v: np.ndarray, before: np.ndarray, words: np.ndarray, rescale: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of both moments and the groups' words.

    Args:
        m: first moments, float32, flat.
        v: second moments.
        before: first moments of the step before, as decoded.
        words: uint32, of which the lower 16 bits decide about first moments, the upper 23 about second ones; the first
            bit breaks ties of first moments.
        rescale: the scale to store with.
    """
    size = m.size
    m, v, before, words = (in_groups(x) for x in (m, v, before, words.astype(np.int64)))
    with np.errstate(all="ignore"):
        bits = bits_of(v * rescale)
    not_finite = (bits >= 254 << 23) | ((bits_of(m) & 0x7FFFFFFF) >= INFINITY)
    bits = np.where(not_finite, 0, bits)
    largest = bits.max(axis=1, keepdims=True)
    forgotten = (m == 0) & (bits < np.maximum(largest - (16 << 23), 0))
    bits = np.where(forgotten, 0, bits)
    smallest = np.where(bits > 0, bits, 1 << 32).min(axis=1, keepdims=True)
    smallest = np.where(largest > 0, smallest, 0)
    # The first mode that spans all octaves, else the last, from the largest downwards.
    span = (largest >> 23) - (smallest >> 23) + 1
    mode = np.minimum(np.searchsorted(OCTAVES, span), 15)
    e = np.maximum(smallest >> 23, (largest >> 23) + 1 - OCTAVES[mode])
    book = Codebook(e, mode, np.zeros_like(e))

    per_octave = CODES_PER_OCTAVE[mode]
    within = ((bits & 0x7FFFFF) * per_octave + (words >> 9)) >> 23
    second = np.where(bits > 0, np.clip(((bits >> 23) - e) * per_octave + within, 0, 254) + 1, 0)

    _, octave = position(second, book)
    # 1 / s is 2^-k, or 3/4 of it, which is exact where 4/3 is not.
    inverse = np.where(second > 0, float_of((508 - (octave + 127)) << 22), np.float32(0))
    with np.errstate(all="ignore"):
        ratio = np.where(not_finite, np.float32(0), m * inverse)
        distance = np.abs(m - before) * inverse
        largest_ratio = (bits_of(ratio) & 0x7FFFFFFF).max(axis=1, keepdims=True)
        j = np.clip(240 - ((largest_ratio + 0x3FFFFF) >> 22), 0, 15)
        still = distance < np.float32(2) * ratio_step(j)
        threshold = np.where(still, words & 0xFFFF, 0x7FFF + (words >> 31)).astype(np.float32) * np.float32(2.0**-16)
        z = np.clip(ratio * steps_per_ratio(j), np.float32(-127), np.float32(127))
        first = np.where(not_finite, NOT_FINITE, (z + (threshold + np.float32(128))).astype(np.int64) - 128)
    return (
        first.astype(np.int8).ravel()[:size],
        second.astype(np.uint8).ravel()[:size],
        (e << 8 | mode << 4 | j).astype(np.uint16).view(np.int16).ravel(),
    )


# --- one step -------------------------------------------------------------------------------------------------------


def step_packed(
    state: Mapping[str, np.ndarray],
    grad: np.ndarray,
    t: int,
    words: np.ndarray,
    *,
    param_dtype: str,
    grad_dtype: str,
    param_format: str = "native",
    moment_format: str = "float32",
    amsgrad: bool = False,
    decoupled: bool = True,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
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
        moment_format: one of `MOMENT_FORMATS`.
        amsgrad: divide by the root of the largest second moment so far.
        decoupled: True for AdamW; False for Adam with lambda * p added to the gradient.
        cautious: update only where first moment and gradient agree in sign.
        cautious_weight_decay: decay only where the update does not pull the other way.
        options: of `coefficients`.
    """
    compute = compute_dtype(param_dtype)
    moment_dtype = "bfloat16" if moment_format == "bfloat16" else np.dtype(compute).name
    c = coefficients(t, decoupled=decoupled, compute=compute, **options)
    p = load_weight(state["param"], state.get("param_remainder"), param_dtype, param_format)
    if moment_format == "8bit":
        scaling = advance_scale(np.float32(state["exp_avg_sq_scale"]), options["beta2"])
        m, v = decode_moments(state["exp_avg"], state["exp_avg_sq"], state["moment_groups"], scaling.unscale)
    else:
        m, v = (load(state[key], moment_dtype, compute) for key in ("exp_avg", "exp_avg_sq"))
    before = m
    p, m, v, v_max = adamw_exact(
        p,
        load(grad, grad_dtype, compute),
        m,
        v,
        state["max_exp_avg_sq"] if amsgrad else None,
        c,
        amsgrad=amsgrad,
        l2=not decoupled,
        cautious=cautious,
        cautious_weight_decay=cautious_weight_decay,
    )
    after: dict[str, np.ndarray] = {}
    after["param"], remainder = store_weight(p, param_dtype, param_format, bits_for_weight(words))
    if remainder is not None:
        after["param_remainder"] = remainder
    if amsgrad:
        after["max_exp_avg_sq"] = store(v_max, moment_dtype)
    if moment_format == "8bit":
        codes = encode_moments(m, v, before, words, scaling.rescale)
        after |= zip(("exp_avg", "exp_avg_sq", "moment_groups"), codes, strict=True)
        after["exp_avg_sq_scale"] = np.array(scaling.rescale, np.float32)
    elif moment_format == "bfloat16":
        after["exp_avg"] = stochastic_bfloat16(m, bits_for_first_moment(words))
        after["exp_avg_sq"] = stochastic_bfloat16(v, bits_for_second_moment(words))
    else:
        after["exp_avg"], after["exp_avg_sq"] = store(m, moment_dtype), store(v, moment_dtype)
    return after
