"""How the Triton kernels load and store a weight, a gradient or an average, and the random bits for rounding.

The twin of `csrc/formats.h` and `csrc/philox.h`. 16-bit values are rounded in integer arithmetic, because the
interpreter's own cast to bfloat16 truncates.
"""

import triton
import triton.language as tl

# --- random bits ------------------------------------------------------------------------------------------------------


@triton.jit
def mix(z):
    """splitmix64's finalizer."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_words(key, first, within):
    """The words of random bits of elements `first` (a scalar) + `within` (int32), in a step with this uint64 key.

    See csrc/philox.h. A call gives the words of two neighbours, and here each makes its own: a branch for tensors that
    begin with a whole pair, in which LLVM finds half of the calls to be the others', makes SGD's kernels spill. So do a
    select instead of the mask at the end, and asking for the parity of 64-bit indices: registers are that scarce.
    """
    from_pair = within + (first & 1).to(tl.int32)
    pair = (first >> 1) + (from_pair >> 1).to(tl.int64)
    c0 = (pair & 0xFFFFFFFF).to(tl.uint32)
    c1 = (pair >> 32).to(tl.uint32) ^ (key >> 32).to(tl.uint32)
    k = (key & 0xFFFFFFFF).to(tl.uint32)
    for _round in tl.static_range(7):
        product = c0.to(tl.uint64) * 0xD256D193
        c0 = (product >> 32).to(tl.uint32) ^ k ^ c1
        c1 = (product & 0xFFFFFFFF).to(tl.uint32)
        k = (k.to(tl.uint64) + 0x9E3779B9 & 0xFFFFFFFF).to(tl.uint32)
    odd = ((from_pair & 1) * -1).to(tl.uint32, bitcast=True)
    return c0 ^ ((c0 ^ c1) & odd)


@triton.jit
def bits_for_first_moment(word):
    """Of a random word, 16 bits for what may be rounded."""
    return word & 0xFFFF


@triton.jit
def bits_for_second_moment(word):
    """Of a random word, 16 bits for what may be rounded."""
    return word >> 16


@triton.jit
def bits_for_weight(word):
    """Of a random word, 16 bits for what may be rounded."""
    return (word ^ (word >> 16)) & 0xFFFF


@triton.jit
def bits_for_average(word):
    """Of a random word, 16 bits for what may be rounded."""
    return (word >> 8) & 0xFFFF


# --- 16-bit values ----------------------------------------------------------------------------------------------------


@triton.jit
def to_bfloat16(x):
    """float32 -> bfloat16 to nearest even; NaN stays NaN."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    quiet = (u >> 16) | 0x40
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16_stochastic(x, random):
    """float32 -> bfloat16, up with the probability of the distance; NaN stays NaN. `random`: 16 bits."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + random) >> 16
    quiet = (u >> 16) | 0x40
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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


# --- a 16-bit weight and the rest of it -------------------------------------------------------------------------------

# float16's exponent is re-biased by an exact multiplication with a power of two, down and up again.
_DOWN = tl.constexpr(2.0**-112)
_UP = tl.constexpr(2.0**112)


# Of its magnitude the 16-bit part lacks 16 bits beside bfloat16 and 13 beside float16. The expression is repeated:
# Triton 3.6 takes what a function returns for no constant.


@triton.jit
def from_int8(remainder, WEIGHT: tl.constexpr):
    """A remainder of 8 bits as an int32, in units of the magnitude."""
    BITS: tl.constexpr = 16 if WEIGHT == tl.bfloat16 else 13
    return remainder.to(tl.int32) << (BITS - 8)


@triton.jit
def merge_weight(stored, remainder):
    """The float32 of a 16-bit weight and its remainder, an int32 in units of the magnitude."""
    BITS: tl.constexpr = 16 if stored.dtype == tl.bfloat16 else 13
    u = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
    magnitude = ((u & 0x7FFF) << BITS).to(tl.int32, bitcast=True) + remainder
    magnitude = tl.maximum(magnitude, 0).to(tl.uint32, bitcast=True)
    if stored.dtype == tl.float16:
        finite = (magnitude.to(tl.float32, bitcast=True) * _UP).to(tl.uint32, bitcast=True)
        magnitude = tl.where(magnitude >= 0x0F800000, magnitude | 0x7F800000, finite)
    return (((u & 0x8000) << 16) | magnitude).to(tl.float32, bitcast=True)


@triton.jit
def _weight_magnitude(a, random, WEIGHT: tl.constexpr, DROPPED: tl.constexpr):
    """A float32's magnitude as a split weight holds it, without DROPPED lower bits, which are rounded by chance."""
    INFINITY: tl.constexpr = 0x7F800000 if WEIGHT == tl.bfloat16 else 0x0F800000
    LARGEST: tl.constexpr = 0x7F7FFFFF if WEIGHT == tl.bfloat16 else 0x0F7FEFFF
    magnitude = a
    if WEIGHT == tl.float16:
        magnitude = (a.to(tl.float32, bitcast=True) * _DOWN).to(tl.uint32, bitcast=True)
    if DROPPED > 0:
        magnitude = magnitude + (random >> (16 - DROPPED))
    magnitude = tl.minimum(magnitude, LARGEST)
    return tl.where(a < 0x7F800000, magnitude, INFINITY) >> DROPPED


@triton.jit
def _signed(x, a, magnitude, WEIGHT: tl.constexpr):
    """The 16-bit weight with the sign of `x`; a NaN where `a`, the magnitude of `x`, is one."""
    NAN: tl.constexpr = 0x7FC0 if WEIGHT == tl.bfloat16 else 0x7E00
    bits = ((x >> 16) & 0x8000) | tl.where(a > 0x7F800000, NAN, magnitude)
    return bits.to(tl.uint16).to(WEIGHT, bitcast=True)


@triton.jit
def split_weight(x, random, WEIGHT: tl.constexpr, KEPT: tl.constexpr):
    """float32 -> a 16-bit weight and the int32 remainder that keeps KEPT bits of the others. `random`: 16 bits."""
    BITS: tl.constexpr = 16 if WEIGHT == tl.bfloat16 else 13
    u = x.to(tl.uint32, bitcast=True)
    a = u & 0x7FFFFFFF
    magnitude = _weight_magnitude(a, random, WEIGHT, BITS - KEPT)
    upper = (magnitude + (1 << (KEPT - 1))) >> KEPT
    remainder = (magnitude - (upper << KEPT)).to(tl.int32, bitcast=True)
    return _signed(u, a, upper, WEIGHT), tl.where(a > 0x7F800000, 0, remainder)


@triton.jit
def to_storage_stochastic(x, random, WEIGHT: tl.constexpr):
    """float32 -> a 16-bit weight alone, up with the probability of the distance; NaN stays NaN. `random`: 16 bits."""
    if WEIGHT == tl.bfloat16:
        return to_bfloat16_stochastic(x, random)
    else:
        BITS: tl.constexpr = 13
        u = x.to(tl.uint32, bitcast=True)
        a = u & 0x7FFFFFFF
        return _signed(u, a, _weight_magnitude(a, random, WEIGHT, BITS), WEIGHT)
