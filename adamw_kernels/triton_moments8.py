"""How the Triton kernels keep moments in 8 bits each: the twin of `csrc/moments8.h`, which says what the codes mean.

Elements stand in rows of 16, a group each; what a group shares is a column. Codes, bits and words are uint32.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(16)

_LARGEST_RATIO = tl.constexpr(240)
_FORGET_BELOW = tl.constexpr(16 << 23)
_OVERFLOW = tl.constexpr(254 << 23)
_SCALE_BITS = tl.constexpr(0x4B800000)  # of 2^24
_NOT_FINITE = tl.constexpr(-128)
# Of float32: 1/127 and 8/9 rounded, 127 times the latter to be rounded, as C++ rounds them.
_ONE_127TH = tl.constexpr(0.007874015718698502)
_EIGHT_NINTHS = tl.constexpr(0.8888888955116272)
_127_EIGHT_NINTHS = tl.constexpr(127 * 0.8888888955116272)
_TWO_TO_MINUS_16 = tl.constexpr(2.0**-16)


@triton.jit
def advance_scale(scale, beta2):
    """The inverse of a tensor's scale (float32) and the scale of the next step."""
    exact = scale.to(tl.float64)
    unscale = (tl.full(exact.shape, 1.0, tl.float64) / exact).to(tl.float32)
    grown = (exact / beta2).to(tl.float32).to(tl.uint32, bitcast=True)
    return unscale, ((grown & 0x7FFFFF) | _SCALE_BITS).to(tl.float32, bitcast=True)


# --- what a group's elements share ------------------------------------------------------------------------------------


@triton.jit
def _octaves_of(mode):
    shift = tl.where(mode < 4, 1, mode >> 2) - 1  # a shift by what lies below 0 has no value
    return tl.where(mode < 4, mode + 1, ((mode & 3) + 5) << shift)


@triton.jit
def _make_codebook(e, mode):
    """Biased exponent of the first octave, codes an octave, and 2^32 over them, rounded up."""
    low = tl.where(mode < 4, 0x3F547FFE, 0x1F242A32)
    high = tl.where(mode < 12, 0x0F121519, 0x07090A0C)
    per_octave = (tl.where(mode < 8, low, high).to(tl.uint32) >> ((mode & 3) * 8)) & 255
    return e, per_octave, 0xFFFFFFFF // per_octave + 1


@triton.jit
def _mode_of(smallest, largest):
    beyond = (largest >> 23) - (smallest >> 23)
    logarithm = (beyond.to(tl.float32).to(tl.uint32, bitcast=True) >> 21) - 512
    return tl.where(beyond < 4, beyond, tl.minimum(logarithm, 15))


@triton.jit
def _first_octave(smallest, largest, mode):
    reached = ((largest >> 23) + 1 - _octaves_of(mode)).to(tl.int32, bitcast=True)
    lowest = (smallest >> 23).to(tl.int32, bitcast=True)
    return tl.maximum(lowest, reached).to(tl.uint32, bitcast=True)


@triton.jit
def _below_largest_ratio(x):
    return tl.full(x.shape, _LARGEST_RATIO, tl.uint32) - x


@triton.jit
def _ratio_code(largest_ratio):
    """Of the bits of the group's largest |m| / s."""
    above = _below_largest_ratio((largest_ratio + 0x3FFFFF) >> 22).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(above, 0), 15).to(tl.uint32, bitcast=True)


@triton.jit
def _ratio_step(j):
    return (_below_largest_ratio(j) << 22).to(tl.float32, bitcast=True) * _ONE_127TH


@triton.jit
def _steps_per_ratio(j):
    half_octave = _below_largest_ratio(j)
    power = ((508 - half_octave) << 22).to(tl.float32, bitcast=True)
    return power * tl.where((half_octave & 1) != 0, _127_EIGHT_NINTHS, 127.0)


# --- elements ---------------------------------------------------------------------------------------------------------


@triton.jit
def _position(code, book):
    """The bits of x that a code of v stands for, and the half octave of s."""
    e, per_octave, reciprocal = book
    q = tl.maximum(code, 1) - 1
    octave = (q * ((reciprocal >> 16) + 1)) >> 16
    within = q - octave * per_octave
    bits = ((e + octave) << 23) + ((within * reciprocal + 256) >> 9)
    return bits, e + octave + 127


@triton.jit
def _reference_of(code, half_octave):
    power = (half_octave << 22).to(tl.float32, bitcast=True)
    return tl.where(code > 0, power * tl.where((half_octave & 1) != 0, _EIGHT_NINTHS, 1.0), 0.0)


@triton.jit
def _inverse_of(code, half_octave):
    return tl.where(code > 0, ((508 - half_octave) << 22).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _encode_second(bits, book, random):
    e, per_octave, reciprocal = book
    within = ((bits & 0x7FFFFF) * per_octave + (random << 7) + 64) >> 23
    octave = ((bits >> 23) - e).to(tl.int32, bitcast=True)
    q = octave * per_octave.to(tl.int32, bitcast=True) + within.to(tl.int32, bitcast=True)
    inside = tl.minimum(tl.maximum(q, 0), 254).to(tl.uint32, bitcast=True)
    return tl.where(bits > 0, inside + 1, 0)


@triton.jit
def _encode_first(ratio, m, before, reference, j, not_finite, random):
    moved = m - before
    distance = tl.abs(moved)
    two_steps = (reference * _ratio_step(j)) * 2.0
    threshold = tl.where(distance < two_steps, random, (random & 1) + 0x7FFF).to(tl.float32) * _TWO_TO_MINUS_16
    z = ratio * _steps_per_ratio(j)
    z = tl.where(z > 127.0, 127.0, z)
    z = tl.where(z < -127.0, -127.0, z)
    z = tl.where(not_finite, 0.0, z)
    code = (z + (threshold + 128.0)).to(tl.int32) - 128
    return tl.where(not_finite, _NOT_FINITE, code)


# --- groups -----------------------------------------------------------------------------------------------------------


@triton.jit
def decode_moments(first_code, second_code, word, unscale):
    """Of codes (int8, uint8) and their groups' words (uint16): m and v in float32."""
    word = word.to(tl.uint32)
    code = second_code.to(tl.uint32)
    bits, half_octave = _position(code, _make_codebook(word >> 8, (word >> 4) & 15))
    first = first_code.to(tl.float32) * (_reference_of(code, half_octave) * _ratio_step(word & 15))
    first = tl.where(first_code == _NOT_FINITE, float("nan"), first)
    second = tl.where(code > 0, bits.to(tl.float32, bitcast=True) * unscale, 0.0)
    return first, second


@triton.jit
def encode_moments(m, v, before, rescale, random):
    """Codes of m and v and their groups' words. `before`: m as it was decoded; `random`: 32 bits, 16 for each."""
    bits = (v * rescale).to(tl.uint32, bitcast=True)
    m_bits = m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    not_finite = (bits >= _OVERFLOW) | (m_bits >= 0x7F800000)
    bits = tl.where(not_finite, 0, bits)

    largest = tl.max(bits, axis=1, keep_dims=True)
    far = tl.where(largest > _FORGET_BELOW, largest - _FORGET_BELOW, 0)
    bits = tl.where((m == 0) & (bits < far), 0, bits)
    smallest = tl.min(bits - 1, axis=1, keep_dims=True) + 1  # 0 counts as the largest; where all are 0, so is this
    mode = _mode_of(smallest, largest)
    e = _first_octave(smallest, largest, mode)
    book = _make_codebook(e, mode)

    code = _encode_second(bits, book, random >> 16)
    position, half_octave = _position(code, book)
    ratio = tl.where(not_finite, 0.0, m * _inverse_of(code, half_octave))
    largest_ratio = tl.max(ratio.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    j = _ratio_code(largest_ratio)
    reference = _reference_of(code, half_octave)
    first_code = _encode_first(ratio, m, before, reference, j, not_finite, random & 0xFFFF)
    word = (e << 8) | (mode << 4) | j
    return first_code.to(tl.int8), code.to(tl.uint8), word.to(tl.uint16)
