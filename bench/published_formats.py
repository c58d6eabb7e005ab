"""Published formats of Adam's moments as NumPy reference models, each from its formula.

A format is one function `(m, v, noise) -> (m, v)`: what the next step reads after these float32 moments were stored.
The arrays are flat and their length is a multiple of 256; `noise` is uniform in [0, 1), one number an element, for
those that round stochastically. Codes are not kept: only what they decode to reaches an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
Stored = tuple[Array, Array]


@dataclass(frozen=True)
class PublishedFormat:
    """One format.

    Attributes:
        name: How rows call it.
        source: Where the formula was published.
        bytes_per_param: Bytes for both moments, scales included.
        store: The round trip through it.
    """

    name: str
    source: str
    bytes_per_param: float
    store: Callable[[Array, Array, Array], Stored]


def blocks(x: Array, size: int) -> Array:
    """A flat array as rows of one block each."""
    return x.reshape(-1, size)


def float32(x: npt.NDArray[np.floating]) -> Array:
    """A flat float32 array."""
    return np.asarray(x, np.float32).ravel()


# ------------------------------------------------------------------------------------------------ blockwise dynamic


def dynamic_map(*, signed: bool) -> Array:
    """The 256 values of the dynamic tree type: seven decades, each with twice the values of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade + 1 if signed else 2 ** (decade + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values, np.float32))


SIGNED_MAP, UNSIGNED_MAP = dynamic_map(signed=True), dynamic_map(signed=False)


def nearest(x: Array, values: Array) -> npt.NDArray[np.intp]:
    """Index of the nearest of the sorted values."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, x)


def blockwise_dynamic(m: Array, v: Array, noise: Array) -> Stored:
    """Nearest value of the dynamic map in blocks of 256, scaled by the block's largest.

    A negative m never becomes 0: its code moves on by one, so that the sign stays.
    """
    m, v = blocks(m, 256), blocks(v, 256)
    scale = np.abs(m).max(1, keepdims=True)
    codes = nearest(m / np.where(scale > 0, scale, 1), SIGNED_MAP)
    codes -= (m < 0) & (SIGNED_MAP[codes] >= 0)
    stored_m = np.where(scale > 0, SIGNED_MAP[codes] * scale, 0)
    scale = v.max(1, keepdims=True)
    codes = nearest(v / np.where(scale > 0, scale, 1), UNSIGNED_MAP)
    return float32(stored_m), float32(np.where(scale > 0, UNSIGNED_MAP[codes] * scale, 0))


# ----------------------------------------------------------------------------------------------------------- float8


def e4m3(x: Array) -> Array:
    """Nearest float8 e4m3 of values up to 448."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).float().numpy()


def float8_blocks(m: Array, v: Array, noise: Array) -> Stored:
    """Both moments as float8 e4m3 in blocks of 256, scaled so that the largest is 448."""

    def stored(x: Array) -> Array:
        scale = np.maximum(np.abs(blocks(x, 256)).max(1, keepdims=True), np.float32(1e-12)) / np.float32(448)
        return float32(e4m3(blocks(x, 256) / scale) * scale)

    return stored(m), stored(v)


# ------------------------------------------------------------------------------------------------- softsign and root


def softsign(m: Array, size: int, scale_dtype: type[np.floating]) -> Array:
    """Int8 of y = 2n / (1 + |n|), n = m over the block's largest; the scale is decoded from `scale_dtype`."""
    m = blocks(m, size)
    scale = np.maximum(np.abs(m).max(1, keepdims=True), np.float32(1e-12 if scale_dtype is np.float16 else 1e-30))
    n = m / scale
    y = np.floor(127 * (2 * n / (1 + np.abs(n))) + np.float32(0.5)) / np.float32(127)
    return float32(y / (2 - np.abs(y)) * scale.astype(scale_dtype).astype(np.float32))


def softsign_and_root(m: Array, v: Array, noise: Array) -> Stored:
    """Softsign int8 of m and linear uint8 of sqrt(v), groups of 32, float16 scales, rounded half up.

    Codes are taken against the float32 scale and decoded with the float16 one; scales below 6e-8 become 0.
    """
    root = np.sqrt(blocks(v, 32))
    scale = np.maximum(root.max(1, keepdims=True), np.float32(1e-12))
    codes = np.floor(255 * root / scale + np.float32(0.5))
    stored_root = codes * np.float32(1 / 255) * scale.astype(np.float16).astype(np.float32)
    return softsign(m, 32, np.float16), float32(stored_root**2)


# ----------------------------------------------------------------------------------------------------- adaptive log


def adaptive_log(v: Array, size: int, noise: Array | None) -> Array:
    """Code 0 for 0, else 255 equal steps of log2(v) between the block's smallest and largest.

    Rounded to the nearest step, or with `noise` to one of the two neighbours such that v itself is unbiased.
    """
    padded = np.pad(v, (0, -len(v) % size)).astype(np.float64).reshape(-1, size)
    positive = padded > 0
    log = np.log2(padded, where=positive, out=np.zeros_like(padded))
    low = np.where(positive, log, np.inf).min(1, keepdims=True)
    high = np.where(positive, log, -np.inf).max(1, keepdims=True)
    empty = ~np.isfinite(low)
    low, high = np.where(empty, 0, low), np.where(empty, 1, high)
    low = np.where(high == low, high - 1, low)
    step = (high - low) / 254
    codes = np.where(positive, (log - low) / step, 0)
    if noise is None:
        codes = np.rint(codes)
    else:
        uniform = np.pad(noise, (0, -len(v) % size)).reshape(codes.shape)
        codes = np.minimum(np.floor(codes), 253)
        below = np.exp2(low + codes * step)
        codes += uniform * (np.exp2(step) - 1) * below < padded - below
    return float32(np.where(positive, np.exp2(low + codes * step), 0))[: len(v)]


def linear(m: Array, size: int) -> Array:
    """Offset-binary uint8: m over the block's largest, in steps of 1/128."""
    m = blocks(m, size)
    scale = np.abs(m).max(1, keepdims=True)
    codes = np.clip(np.rint(128 * (m / np.where(scale > 0, scale, 1))), -128, 127)
    return float32(codes / 128 * scale)


def adaptive_log_nearest(m: Array, v: Array, noise: Array) -> Stored:
    """As published: linear m in blocks of 256, adaptive log v in blocks of 2048, nearest."""
    return linear(m, 256), adaptive_log(v, 2048, None)


def adaptive_log_stochastic(m: Array, v: Array, noise: Array) -> Stored:
    """The best of such parts: softsign m in groups of 64; adaptive log v in blocks of 128, rounded stochastically."""
    return softsign(m, 64, np.float32), adaptive_log(v, 128, noise)


# -------------------------------------------------------------------------------------------------------- minifloats


def minifloat(x: Array, mantissa: int, exponents: tuple[int, int], noise: Array | float) -> Array:
    """Magnitudes as floats of `mantissa` bits with exponents from the first (its subnormals included) to the last."""
    low, high = exponents
    exponent = np.clip(np.frexp(np.maximum(x, np.float32(1e-38)))[1] - 1, low, high)
    unit = np.exp2((exponent - mantissa).astype(np.float32))
    return float32(np.minimum(np.floor(x / unit + noise) * unit, (2 - 2.0**-mantissa) * 2.0**high))


def ratio(m: Array, v: Array, noise: Array) -> Stored:
    """The ratio m / sqrt(v) as E3M4 without a scale; sqrt(v) as E3M5, scaled by a power of two a block, stochastic."""
    root = np.sqrt(v)
    largest = blocks(root, 128).max(1, keepdims=True)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1, 0).astype(np.float32)
    scaled = (blocks(root, 128) * np.exp2(-exponent)).ravel()
    root = float32(blocks(minifloat(scaled, 5, (-6, 0), noise), 128) * np.exp2(exponent))
    r = np.where(root > 0, m / np.where(root > 0, root, 1), 0).astype(np.float32)
    return np.sign(r) * minifloat(np.abs(r), 4, (-4, 2), 0.5) * root, root * root


PUBLISHED = (
    PublishedFormat(
        "blockwise dynamic int8",
        "Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861; bitsandbytes AdamW8bit",
        2 + 8 / 256,
        blockwise_dynamic,
    ),
    PublishedFormat("float8 blocks", "torchao AdamWFp8", 2 + 8 / 256, float8_blocks),
    PublishedFormat("softsign and root int8", "flashoptim FlashAdamW, arXiv:2602.23349", 2 + 4 / 32, softsign_and_root),
    PublishedFormat(
        "adaptive log", "adafactor8bit (UF8, AL8), arXiv:2608.22322", 2 + 4 / 256 + 8 / 2048, adaptive_log_nearest
    ),
    PublishedFormat(
        "adaptive log, small blocks",
        "AL8 of arXiv:2608.22322 in smaller blocks and stochastic, with the softsign of arXiv:2602.23349",
        2 + 4 / 64 + 8 / 128,
        adaptive_log_stochastic,
    ),
    PublishedFormat(
        "ratio E3M4 and root E3M5", "m relative to its own sqrt(v), as plain minifloats", 2 + 1 / 128, ratio
    ),
)
