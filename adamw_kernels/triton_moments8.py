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
# Of float32: 1/127 rounded; 127 times 8/9, which is rounded, to be rounded, as C++ rounds them.
_ONE_127TH = tl.constexpr(0.007874015718698502)
_127_EIGHT_NINTHS = tl.constexpr(127 * 0.8888888955116272)


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
def _make_codebook(mode):
    """N, codes an octave; 2^23 / N times 2^shift, rounded up, and the shift; 2^22 / N, rounded up."""
    low = tl.where(mode < 4, 0x3F547FFE, 0x1F242A32)
    high = tl.where(mode < 12, 0x0F121519, 0x07090A0C)
    per_octave = (tl.where(mode < 8, low, high).to(tl.uint32) >> ((mode & 3) * 8)) & 255
    shift = tl.where(mode < 4, 8 - ((mode + 1) >> 1), 7 - ((mode + 1) >> 2))
    reciprocal = 0xFFFFFFFF // per_octave
    return per_octave, (reciprocal >> (9 - shift)) + 1, shift, (reciprocal >> 10) + 1


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
def _bits_of_code(code, e, book):
    """The bits of x that a code of v stands for, of nothing for code 0."""
    _per_octave, spacing, shift, _inverse = book
    return (e << 23) + (((tl.maximum(code, 1) - 1) * spacing) >> shift)


@triton.jit
def _reference_of(code, bits):
    half_octave = ((bits >> 1) & 0x7FC00000) + (127 << 22)
    half_octave -= tl.where((half_octave & 0x400000) != 0, 0x155555, 0)
    return tl.where(code > 0, half_octave.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _inverse_of(code, e, book):
    _per_octave, _spacing, _shift, inverse = book
    octave = ((tl.maximum(code, 1) - 1) * inverse) & 0xFFC00000
    return tl.where(code > 0, (((381 - e) << 22) - octave).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _encode_second(bits, e, book, random):
    per_octave, _spacing, _shift, _inverse = book
    first = e << 23
    inside = tl.maximum(bits, first) - first
    return tl.where(bits > 0, (inside * per_octave + ((random >> 9) + (1 << 23))) >> 23, 0)


@triton.jit
def _encode_first(ratio, moved, j, random):
    by_chance = (random & 0xFFFF) | 0x43000000
    to_nearest = (random >> 31) + 0x43007FFF
    is_still = tl.abs(moved) < 2.0 * _ratio_step(j)
    z = ratio * _steps_per_ratio(j)
    z = tl.where(z > 127.0, 127.0, z) + tl.where(is_still, by_chance, to_nearest).to(tl.float32, bitcast=True)
    z = tl.where(z < 1.0, 1.0, z)
    is_number = ratio == ratio
    code = tl.where(is_number, z, 0.0).to(tl.int32) - 128
    return tl.where(is_number, code, _NOT_FINITE)


# --- groups -----------------------------------------------------------------------------------------------------------


@triton.jit
def decode_moments(first_code, second_code, word, unscale):
    """Of codes (int8, uint8) and their groups' words (uint16): m and v in float32."""
    word = word.to(tl.uint32)
    code = second_code.to(tl.uint32)
    bits = _bits_of_code(code, word >> 8, _make_codebook((word >> 4) & 15))
    first = first_code.to(tl.float32) * (_reference_of(code, bits) * _ratio_step(word & 15))
    first = tl.where(first_code == _NOT_FINITE, float("nan"), first)
    second = tl.where(code > 0, bits.to(tl.float32, bitcast=True) * unscale, 0.0)
    return first, second


@triton.jit
def encode_moments(m, v, before, rescale, random):
    """Codes of m and v and their groups' words. `before`: m as it was decoded; `random`: the elements' words."""
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
    book = _make_codebook(mode)

    code = _encode_second(bits, e, book, random)
    inverse = _inverse_of(code, e, book)
    ratio = tl.where(not_finite, float("nan"), m * inverse)
    magnitude = tl.where(not_finite, 0, ratio.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
    j = _ratio_code(tl.max(magnitude, axis=1, keep_dims=True))
    first_code = _encode_first(ratio, (m - before) * inverse, j, random)
    word = (e << 8) | (mode << 4) | j
    return first_code.to(tl.int8), code.to(tl.uint8), word.to(tl.uint16)
