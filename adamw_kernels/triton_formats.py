"""How the Triton kernels load and store a parameter, a gradient or an average, and the random bits for rounding.

The twin of `csrc/formats.h` and `csrc/philox.h`. 16-bit values are rounded in integer arithmetic, because the
interpreter's own cast to bfloat16 truncates.
"""

import triton
import triton.language as tl


@triton.jit
def to_bfloat16(x):
    """float32 -> bfloat16 to nearest even; NaN stays NaN."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    quiet = (u >> 16) | 0x40
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16_stochastic(x, word):
    """float32 -> bfloat16, up with the probability of the distance; NaN stays NaN. Uses the low 16 bits of `word`."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + (word & 0xFFFF)) >> 16
    quiet = (u >> 16) | 0x40
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mix(z):
    """splitmix64's finalizer."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_word(key, element):
    """The random bits of elements (int64 indices) in a step with this uint64 key; see csrc/philox.h."""
    c0 = (element & 0xFFFFFFFF).to(tl.uint32)
    c1 = (element >> 32).to(tl.uint32) ^ (key >> 32).to(tl.uint32)
    k = (key & 0xFFFFFFFF).to(tl.uint32)
    for _round in tl.static_range(7):
        product = c0.to(tl.uint64) * 0xD256D193
        c0 = (product >> 32).to(tl.uint32) ^ k ^ c1
        c1 = (product & 0xFFFFFFFF).to(tl.uint32)
        k = (k.to(tl.uint64) + 0x9E3779B9 & 0xFFFFFFFF).to(tl.uint32)
    return c0


@triton.jit
def from_storage(x, COMPUTE: tl.constexpr):
    """A stored value in the compute type; always exact."""
    if x.dtype == tl.bfloat16:  # by hand: the interpreter's own cast is wrong for subnormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def to_storage(x, STORAGE: tl.constexpr):
    """The stored form of a value in its compute type: rounded once, to nearest even."""
    if STORAGE == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(STORAGE)  # float16's own cast is to nearest even everywhere; the others are exact
