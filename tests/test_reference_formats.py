"""The judge of the storage formats judged: known answers, exact arithmetic, every float32, and what codes promise."""

import ctypes
import itertools
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cuda_stand_in import ROOT, run
from reference import (
    bits_for_average,
    bits_for_first_moment,
    bits_for_second_moment,
    bits_for_weight,
    coefficients,
    largest_update,
    load,
    philox2x32,
    random_key,
    random_words,
    store,
)
from reference_formats import (
    CODES_PER_OCTAVE,
    FIRST_SCALE,
    OCTAVES,
    Codebook,
    advance_scale,
    decode_moments,
    encode_moments,
    float_of,
    merge_weight,
    position,
    ratio_step,
    read_words,
    reference_of,
    split_weight,
    step_packed,
    steps_per_ratio,
    store_stochastically,
    store_weight,
)
from tolerances import tolerance

from adamw_kernels.backends import cpu_isas

SIXTEEN_BITS = ("bfloat16", "float16")
SPLIT = ("split24", "split32")
INF, NAN, LARGEST = np.float32(np.inf), np.float32(np.nan), np.finfo(np.float32).max
EVERY_CHANCE = np.arange(1 << 16, dtype=np.uint32)


def float32(*values: float) -> np.ndarray:
    """Return a float32 array of the values."""
    return np.array(values, dtype=np.float32)


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return array.view(f"u{array.dtype.itemsize}")


def assert_exactly(got: np.ndarray, expected: np.ndarray) -> None:
    """Compare bit for bit."""
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(bits(got), bits(expected))


def split(dtype: str, param_format: str, *values: float, chance: int = 0) -> tuple[list[int], list[int]]:
    """Return the bits of stored weights, and their remainders."""
    x = float32(*values)
    weight, remainder = split_weight(x, dtype, param_format, np.full(x.shape, chance))
    return bits(weight).tolist(), remainder.tolist()


def through(dtype: str, param_format: str, x: np.ndarray, chance: int = 0) -> np.ndarray:
    """Return what is remembered of weights."""
    return merge_weight(*split_weight(x, dtype, param_format, np.full(x.shape, chance)), dtype, param_format)


# --- split weights --------------------------------------------------------------------------------------------------


def test_split_weights_worked_by_hand() -> None:
    """1 + 2^-7 is the next bfloat16 after 1, 1 + 2^-10 the next float16. The remainder counts the units between.

    1 + 2^-9, a quarter of bfloat16's step, leaves 2^14 of 2^16 units, or 64 of 256. 1 + 3 * 2^-9 goes up and leaves as
    many below.
    """
    assert split("bfloat16", "split32", 1 + 2.0**-9, 1 + 3 * 2.0**-9, -1 - 2.0**-9) == (
        [0x3F80, 0x3F81, 0xBF80],
        [1 << 14, -(1 << 14), 1 << 14],
    )
    assert split("bfloat16", "split24", 1 + 2.0**-9, 1 + 3 * 2.0**-9) == ([0x3F80, 0x3F81], [64, -64])
    assert split("float16", "split32", 1 + 2.0**-12, 1 + 3 * 2.0**-12) == ([0x3C00, 0x3C01], [1 << 11, -(1 << 11)])
    assert split("float16", "split24", 1 + 2.0**-12, 1 + 3 * 2.0**-12) == ([0x3C00, 0x3C01], [64, -64])


def test_ties_go_upwards() -> None:
    """Half a unit above an even and above an odd weight, of either sign: away from zero, the remainder at its least."""
    half = 2.0**-8
    assert split("bfloat16", "split32", 1 + half, 1 + 3 * half, -1 - half) == (
        [0x3F81, 0x3F82, 0xBF81],
        [-(1 << 15)] * 3,
    )
    assert split("bfloat16", "split24", 1 + half) == ([0x3F81], [-128])
    assert split("float16", "split32", 1 + 2.0**-11) == ([0x3C01], [-(1 << 12)])
    assert split("float16", "split24", 1 + 2.0**-11) == ([0x3C01], [-128])


@pytest.mark.parametrize("param_format", SPLIT)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_zeros_infinities_and_nan(dtype: str, param_format: str) -> None:
    """They are themselves, signs and all, whatever chance says; a NaN of any payload is one in the weight too."""
    infinite = 0x7F80 if dtype == "bfloat16" else 0x7C00
    for chance in (0, 0x8000, 0xFFFF):
        assert split(dtype, param_format, 0.0, -0.0, INF, -INF, chance=0) == (
            [0, 0x8000, infinite, infinite | 0x8000],
            [0] * 4,
        )
        assert_exactly(through(dtype, param_format, float32(0, -0.0), chance), float32(0, -0.0))
        assert_exactly(through(dtype, param_format, float32(INF, -INF), chance), float32(INF, -INF))
        nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
        weight, remainder = split_weight(nans, dtype, param_format, np.full(5, chance))
        assert np.all((bits(weight) & 0x7FFF) > infinite) and not remainder.any()
        assert np.all(np.isnan(merge_weight(weight, remainder, dtype, param_format)))


def test_largest_values() -> None:
    """bfloat16: float32's largest rounds to an infinite weight, and is kept. float16: 65520 and more saturate below it.

    An infinity in the model is what rounding gives there; the remembered weight stays finite either way.
    """
    assert split("bfloat16", "split32", LARGEST) == ([0x7F80], [-1])
    assert_exactly(through("bfloat16", "split32", float32(LARGEST, -LARGEST)), float32(LARGEST, -LARGEST))
    assert through("bfloat16", "split24", float32(LARGEST), 0xFFFF) == np.float32((2 - 2.0**-15) * 2.0**127)
    below = np.nextafter(np.float32(65520), np.float32(0))
    assert_exactly(through("float16", "split32", float32(below, 65520, 1e6, LARGEST)), np.full(4, below))
    assert split("float16", "split32", -LARGEST) == ([0xFBFF], [4095])
    assert split("float16", "split24", LARGEST, chance=0xFFFF) == ([0x7BFF], [127])
    assert split("float16", "split32", 65504, 65503) == ([0x7BFF, 0x7BFF], [0, -256])


def test_subnormals() -> None:
    """float32's are kept by bfloat16's remainder. float16 keeps multiples of 2^-37 below 2^-14, to nearest even."""
    tiny = float32(2.0**-149, 2.0**-133, 2.0**-126 - 2.0**-149, 2.0**-126)
    assert_exactly(through("bfloat16", "split32", tiny), tiny)
    assert split("bfloat16", "split32", 2.0**-149) == ([0], [1])
    assert split("float16", "split32", 2.0**-24, 2.0**-25, 2.0**-37) == ([1, 1, 0], [0, -(1 << 12), 1])
    assert_exactly(
        through("float16", "split32", float32(1.5 * 2.0**-37, 2.5 * 2.0**-37, 2.0**-38, 3 * 2.0**-39, -(2.0**-60))),
        float32(2.0**-36, 2.0**-36, 0.0, 2.0**-37, -0.0),
    )
    assert_exactly(through("float16", "split32", float32(2.0**-14)), float32(2.0**-14))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_split24_against_rational_numbers(dtype: str) -> None:
    """Of all 2^16 chances as many as the distance to the value below say up, in units of 8 bits more than the weight's.

    So what is remembered has exactly the value as its mean.
    """
    unit = Fraction(1, 2**15 if dtype == "bfloat16" else 2**18)  # between 1 and 2
    for value in (1.0, 1 + 2.0**-23, 1.25 + 77 * 2.0**-23, 2 - 2.0**-23, 1 + 255 * 2.0**-23):
        x = np.full(1 << 16, value, np.float32)
        got = merge_weight(*split_weight(x, dtype, "split24", EVERY_CHANCE), dtype, "split24")
        below = Fraction(value) // unit * unit
        assert set(got.tolist()) <= {float(below), float(below + unit)}
        assert sum(map(Fraction, got.tolist())) == Fraction(value) * 2**16


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("exponent", [0, 1, -13, -14, -15, -20, -24, -25, 14, 15])
def test_stochastic_rounding_against_rational_numbers(dtype: str, exponent: int) -> None:
    """The same of weights without a remainder, from float16's smallest subnormals to its largest values.

    float16 counts in multiples of 2^-37, and saturates at its largest weight.
    """
    for value in (1.0, 1 + 2.0**-9 + 2.0**-13, 1.5 + 2.0**-12, 2 - 2.0**-12):
        x = np.full(1 << 16, -value * 2.0**exponent, np.float32)
        x = np.round(x * np.float32(2.0**37)) / np.float32(2.0**37) if dtype == "float16" and exponent < -14 else x
        got = load(store_stochastically(x, dtype, EVERY_CHANCE), dtype)
        if dtype == "float16" and abs(x[0]) > 65504:
            assert np.all(got == -65504)
            continue
        assert len(set(got.tolist())) <= 2
        assert sum(map(Fraction, got.tolist())) == Fraction(float(x[0])) * 2**16


def test_stochastic_rounding_of_what_is_not_finite() -> None:
    """float16: infinities and NaN stay, and nothing finite becomes infinite. bfloat16's largest values may."""
    for chance in (0, 0xFFFF):
        random = np.full(3, chance, np.uint32)
        got = load(store_stochastically(float32(INF, -INF, NAN), "float16", random), "float16")
        assert_exactly(got[:2], float32(INF, -INF))
        assert np.isnan(got[2])
        got = load(store_stochastically(float32(LARGEST, -1e30, 65519), "float16", random), "float16")
        assert got.tolist() == [65504, -65504, 65504]
    assert load(store_stochastically(float32(LARGEST), "bfloat16", np.array([0xFFFF], np.uint32)), "bfloat16") == INF


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_both_halves_of_a_word_round_a_weight(dtype: str) -> None:
    """A weight between two is up with 0xFFFF, down with 0, in every format that rounds by chance."""
    x = float32(1 + 2.0**-20)
    for form in ("stochastic", "split24"):
        results = []
        for chance in (0, 0xFFFF):
            weight, remainder = store_weight(x, dtype, form, np.array([chance], np.uint32))
            results.append(load(weight, dtype) if remainder is None else merge_weight(weight, remainder, dtype, form))
        assert results[0] == 1 < results[1]
    state = dict(param=store(x, dtype), exp_avg=float32(0), exp_avg_sq=float32(0))
    hyper = dict(lr=2.0**-20, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, maximize=True)
    options = dict(param_dtype=dtype, grad_dtype="float32", param_format="stochastic", **hyper)
    up, down = (
        step_packed(state, float32(1), 1, np.array(words, np.uint32), **options)["param"]
        for words in ([0xFFFF0000], [0xFFFFFFFF])
    )
    assert (load(up, dtype) > 1, load(down, dtype) == 1) == (True, True)


# --- every float32 --------------------------------------------------------------------------------------------------

# dtype, bits kept beyond the weight's, and ranges of biased exponents with the number of tiles, of 1,024 neighbours, of
# which one is looked at: all 2^32 patterns of split32; elsewhere a quarter, and of what is 0 or saturates in float16,
# below 2^-39 and from 2^17 up, a sixteenth, so that it takes seconds.
PATTERNS = {
    "bfloat16-split32": (0, 16, [(0, 256, 1)]),
    "bfloat16-split24": (0, 8, [(0, 256, 4)]),
    "bfloat16-stochastic": (0, 0, [(0, 256, 4)]),
    "float16-split32": (1, 13, [(0, 256, 1)]),
    "float16-split24": (1, 8, [(0, 88, 16), (88, 144, 4), (144, 256, 16)]),
    "float16-stochastic": (1, 0, [(0, 88, 16), (88, 144, 4), (144, 256, 16)]),
}


@pytest.fixture(scope="module")
def all_patterns(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """all_patterns.cpp, compiled as csrc's loops for AVX2 are, if this CPU has it: in 2/5 of the baseline's time."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("all_patterns.cpp needs a C++ compiler")
    library = tmp_path_factory.mktemp("all_patterns") / "all_patterns.so"
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-mavx2"] if "avx2" in cpu_isas() else []
    run(compiler, *flags, f"-I{ROOT / 'csrc'}", str(Path(__file__).with_name("all_patterns.cpp")), "-o", str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.wrong_patterns.restype = ctypes.c_uint64
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_every_float32(all_patterns: ctypes.CDLL, name: str) -> None:
    """csrc/formats.h stores and remembers each as integers say: what is kept, to nearest, ties upwards, NaN as NaN."""
    is_float16, kept, ranges = PATTERNS[name]
    parts = [(begin, begin + 1, every) for start, end, every in ranges for begin in range(start, end)]
    with ThreadPoolExecutor(2) as pool:  # ctypes lets go of the interpreter
        counts = pool.map(lambda part: all_patterns.wrong_patterns(is_float16, kept, *part), parts)
        wrong = {begin: count for (begin, _, _), count in zip(parts, counts, strict=True) if count}
    assert not wrong, "patterns stored wrongly, by biased exponent"


# --- random bits ----------------------------------------------------------------------------------------------------


def test_neighbours_share_a_call() -> None:
    """Elements 2 i and 2 i + 1 have the two words of Philox's call i, at indices beyond 2^33 too."""
    pairs = np.array([0, 1, 2**32 - 1, 2**32, 2**40 + 7])
    key = random_key(3, 4, 5)
    both = np.stack([random_words(key, 2 * pairs), random_words(key, 2 * pairs + 1)], axis=1)
    counter = [(int(i) % 2**32, (int(i) >> 32) ^ (key >> 32)) for i in pairs]
    expected = [[int(word) for word in philox2x32(*(np.uint32(c) for c in pair), key % 2**32)] for pair in counter]
    assert both.tolist() == expected


def test_bits_of_an_elements_roundings() -> None:
    """What each takes of a word; of all words, weight and moments, and weight and average, agree as often as chance."""
    word = np.array([0x12345678], np.uint32)
    fields = bits_for_first_moment, bits_for_second_moment, bits_for_weight, bits_for_average
    assert [int(field(word)[0]) for field in fields] == [0x5678, 0x1234, 0x444C, 0x3456]
    # A byte of each half at a time: 2^16 words, in which every pair of bytes occurs once.
    every = np.arange(1 << 16, dtype=np.uint32)
    for shift in (0, 8):
        words = (every & np.uint32(0xFF)) << np.uint32(shift) | (every >> np.uint32(8)) << np.uint32(16 + shift)
        first, second, weight = (field(words) >> np.uint32(shift) & np.uint32(0xFF) for field in fields[:3])
        for a, b in ((first, second), (first, weight), (second, weight)):
            assert np.unique(a << np.uint32(8) | b).size == 1 << 16
    # Low and high bytes of both: the weight's two are sums of one of the average's and one of the others.
    low, high = every & np.uint32(0xFF), every >> np.uint32(8)
    for others in (0, 0xA50000C3):
        words = np.uint32(others) | low << np.uint32(8) | high << np.uint32(16)
        assert np.unique(bits_for_average(words)).size == np.unique(bits_for_weight(words)).size == 1 << 16


# For first moments where v is 1 under a scale of 1: s counts on one of 2^24 and more, and so m is 2^-7 of it at most.
UNIT = np.float32(2.0**-14)


# --- 8-bit moments: second moments ----------------------------------------------------------------------------------


def encode(
    m: np.ndarray, v: np.ndarray, before: np.ndarray | None = None, words: np.ndarray | None = None, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes and words of float32 moments; without `words` as chance rounds down, without `before` to nearest."""
    before = np.full_like(m, 1e30) if before is None else before
    words = np.zeros(m.shape, np.uint32) if words is None else words
    return encode_moments(m, v, before, words, np.float32(scale))


def test_codes_worked_by_hand() -> None:
    """One octave has 254 codes: of a group between 1 and 2, 1 is code 1, 1.5 is code 128, and 2 would be code 255.

    Its word says exponent 127, one octave, and that ratios reach 2^-14, 14 half octaves below 2^-7. s is 1 throughout.
    """
    v = float32(1.0, 1.5, 2 - 2.0**-23, *[1.25] * 13)
    chance = np.arange(16).astype(np.uint32)
    first, second, groups = encode(float32(1.0, 0.0, -1.0, *[0.5] * 13) * UNIT, v, words=chance << np.uint32(31))
    assert second[:3].tolist() == [1, 128, 254]
    assert first[:5].tolist() == [127, 0, -127, 64, 63]  # 63.5 twice: chance breaks ties
    assert bits(groups).tolist() == [127 << 8 | 0 << 4 | 14]
    m, decoded = decode_moments(first, second, groups, np.float32(1))
    assert decoded[:2].tolist() == [1.0, 1.5]
    assert m[1] == 0.0
    np.testing.assert_allclose(m[[0, 2]] / UNIT, [1.0, -1.0], rtol=tolerance("inverse_of_a_ratio_step"))


@pytest.mark.parametrize("mode", range(16))
def test_positions_of_codes(mode: int) -> None:
    """Code 1 is the first octave's start; N codes further it is the next one's; between them lie equal parts.

    To within 2^-15 of the way from one code to the next, and every code encodes to itself.
    """
    octaves, n = int(OCTAVES[mode]), int(CODES_PER_OCTAVE[mode])
    book = Codebook(np.full(1, 100), np.full(1, mode), np.zeros(1, int))
    codes = np.arange(1, 256)
    at, octave = position(codes, book)
    values = float_of(at).astype(np.float64)
    exact = 2.0 ** (100 - 127 + (codes - 1) // n) * (1 + (codes - 1) % n / n)
    assert np.all(np.abs(values - exact) <= 2.0**-15 / n * 2.0 ** (100 - 127 + (codes - 1) // n))
    assert octave.tolist() == (100 + (codes - 1) // n).tolist()
    assert octaves * n <= 254 < octaves * n + octaves
    # A group that spans the octaves, each of its codes in turn; an element in the last octave sets the range.
    inside = codes[(codes <= octaves * n)]
    v = np.zeros((inside.size, 16), np.float32)
    v[:, 0], v[:, 1], v[:, 2] = (
        float_of(at[inside - 1]),
        float_of(np.array(100 << 23)),
        2.0 ** (100 - 127 + octaves - 1),
    )
    middle = np.full(v.size, 0x80000000, np.uint32)  # a value may lie 2^-15 of a step beside its code
    _, second, groups = encode(np.ones(v.size, np.float32), v.ravel(), words=middle)
    np.testing.assert_array_equal(second.reshape(-1, 16)[:, 0], inside)
    assert set((bits(groups) >> 4 & 15).tolist()) == {mode}


def test_range_follows_the_smallest_and_the_largest() -> None:
    """Every span from 1 to 200 octaves gets the least mode that reaches; beyond 32, the smallest are kept larger."""
    for span in range(1, 200):
        low, high = 2.0**-100, 2.0 ** (span - 101) * 1.9
        v = float32(low, high, *[math.sqrt(low * high)] * 14)
        _, second, groups = encode(np.ones(16, np.float32), v)
        mode, e = int(bits(groups)[0]) >> 4 & 15, int(bits(groups)[0]) >> 8
        reaching = [i for i, octaves in enumerate(OCTAVES) if octaves >= span]
        assert mode == (reaching[0] if reaching else 15)
        assert e == (27 if reaching else 27 + span - 32)
        assert second[0] == 1 and second[1] > 1


@pytest.mark.parametrize("mode", [0, 3, 9, 15])
def test_second_moments_are_unbiased(mode: int) -> None:
    """Over all 2^16 chances the mean of what is remembered is the value, at octaves' edges and within.

    To what 16 bits of chance and float32's own last bit allow, in units of the code's step.
    """
    octaves, n = int(OCTAVES[mode]), int(CODES_PER_OCTAVE[mode])
    spread = 2.0 ** (octaves - 1)
    words = EVERY_CHANCE << np.uint32(16) | np.uint32(0x8000)  # the bits below them in the middle
    for value in (1.0, 1 + 2.0**-23, 1 + 0.3 / n, 1 + 1.7 / n, 1.999, 2 - 2.0**-23):
        rows = np.empty((1 << 16, 16), np.float32)
        rows[:] = 1.0
        rows[:, 0], rows[:, 1] = value, 1.0 * spread
        m = np.ones(rows.size, np.float32)
        codes = encode(m, rows.ravel(), words=np.repeat(words, 16))
        assert set((bits(codes[2]) >> 4 & 15).tolist()) == {mode}
        _, v = decode_moments(*codes, np.float32(1))
        mean = v.reshape(-1, 16)[:, 0].astype(np.float64).mean()
        assert abs(mean - float(np.float32(value))) * n <= tolerance("mean_over_all_chances")


def test_zero_is_code_zero_and_nothing_else_is() -> None:
    """The smallest subnormal beside 1 keeps a code above 0; 0 keeps its code whatever chance says."""
    v = float32(1.0, 2.0**-149, 0.0, *[1.0] * 13)
    for chance in (0, 0xFFFFFFFF):
        _, second, _ = encode(np.ones(16, np.float32), v, words=np.full(16, chance, np.uint32))
        assert second[1] == 1 and second[2] == 0


def test_dead_elements_are_forgotten() -> None:
    """With m = 0 and v more than 16 octaves below the group's largest; not with m, and not at 16 octaves."""
    v = float32(1.0, 2.0**-16, 2.0**-16 * (1 - 2.0**-24), 2.0**-30, 2.0**-30, *[0.0] * 11)
    m = float32(1.0, 0.0, 0.0, 0.0, 1e-9, *[0.0] * 11)
    _, second, groups = encode(m, v)
    assert (second[:5] > 0).tolist() == [True, True, False, False, True]
    m[4] = 0.0
    _, second, groups = encode(m, v)
    assert (second[:5] > 0).tolist() == [True, True, False, False, False]
    assert int(OCTAVES[int(bits(groups)[0]) >> 4 & 15]) == 20  # 17 octaves


def test_scale() -> None:
    """2^24 over 3/4 is 4/3 of it, then 16/9; 64/27 is 2.37 and so 1.185. Over 1/2 it stays, over 0 too."""
    scale, seen = FIRST_SCALE, []
    for _ in range(3):
        scaling = advance_scale(scale, 0.75)
        assert scaling.unscale == np.float32(1 / float(scale))
        scale = scaling.rescale
        seen.append(float(scale) / 2.0**24)
    np.testing.assert_allclose(seen, [4 / 3, 16 / 9, 32 / 27], rtol=tolerance("three_roundings_of_a_scale"))
    assert advance_scale(FIRST_SCALE, 0.5).rescale == advance_scale(FIRST_SCALE, 0.0).rescale == FIRST_SCALE


def test_second_moment_that_decays_keeps_its_code() -> None:
    """Without gradients v falls by beta2 and the scale grows by as much: over 300 steps at 0.999 hardly a code moves.

    A step changes v by less than a tenth of its code's step: rounded at each, nearly every code would move, and to
    nearest none. What is left are last bits of float32. The mean of v is 0.999^300 of what it was.
    """
    rng = np.random.default_rng(81)
    n, steps = 4800, 300
    state = dict(
        param=np.zeros(n, np.float32),
        exp_avg=np.full(n, 100, np.int8),
        exp_avg_sq=rng.integers(1, 253, n).astype(np.uint8),
        moment_groups=np.full(n // 16, 120 << 8 | 3 << 4, np.int16),  # four octaves
        exp_avg_sq_scale=np.array(FIRST_SCALE),
    )
    hyper = dict(lr=0.0, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.0)
    options = dict(param_dtype="float32", grad_dtype="float32", moment_format="8bit")

    def second_moment() -> np.ndarray:
        unscale = np.float32(1 / np.float64(state["exp_avg_sq_scale"]))
        codes = (state[key] for key in ("exp_avg", "exp_avg_sq", "moment_groups"))
        return decode_moments(*codes, unscale)[1].astype(np.float64)

    before = second_moment()
    for t in range(1, steps + 1):
        words = random_words(random_key(0, 0, t), np.arange(n))
        state |= step_packed(state, np.zeros(n, np.float32), t, words, **options, **hyper)
    ratio = second_moment() / before / 0.999**steps
    assert np.mean(np.abs(ratio - 1) > 1e-3) < tolerance("share_of_codes_that_move")
    assert abs(np.mean(ratio) - 1) <= tolerance("decay_of_a_coded_second_moment")


# --- 8-bit moments: first moments -----------------------------------------------------------------------------------


def test_first_moments_follow_the_second() -> None:
    """S is within 1 and 1.5 of the root below, its inverse exact; codes are 127ths of the group's largest ratio.

    Whatever is lost of v, m / sqrt(v) stays within half a step of the code, and half a factor.
    """
    octave = np.arange(1, 255)
    s = reference_of(np.ones(254), octave).astype(np.float64)
    root = np.sqrt(2.0 ** (octave - 127.0))
    assert np.all(s <= root * (1 + 2.0**-23))
    assert np.all(s * 1.5 > root)
    steps = ratio_step(np.arange(16)).astype(np.float64) * steps_per_ratio(np.arange(16))
    np.testing.assert_allclose(steps, 1.0, rtol=tolerance("inverse_of_a_ratio_step"))
    largest = ratio_step(np.arange(16)).astype(np.float64) * 127
    np.testing.assert_allclose(
        largest[:3], [2.0**-7, 1.5 * 2.0**-8, 2.0**-8], rtol=tolerance("inverse_of_a_ratio_step")
    )


def test_first_moments_to_nearest_and_by_chance() -> None:
    """Moved by two steps of the code or more, to nearest; less, as chance says, whose mean over all is the moment."""
    v = np.full(16, 1.2, np.float32)
    step = float(ratio_step(np.array(14)))  # s = 1, the largest ratio 2^-14
    m = np.zeros(16, np.float32)
    m[0], m[1], m[2] = UNIT, 40.3 * step, -40.7 * step
    for chance in (0, 0xFFFF):
        first, _, _ = encode(m, v, before=m + np.float32(3 * step), words=np.full(16, chance, np.uint32))
        assert first[:3].tolist() == [127, 40, -41]
        first, _, _ = encode(m, v, before=m, words=np.full(16, chance, np.uint32))
        assert first[1:3].tolist() == ([40, -41] if chance == 0 else [41, -40])
    rows = np.tile(m, 1 << 16)
    codes = encode(rows, np.tile(v, 1 << 16), before=rows, words=np.repeat(EVERY_CHANCE, 16))
    decoded, _ = decode_moments(*codes, np.float32(1))
    mean = decoded.reshape(-1, 16).astype(np.float64).mean(axis=0)[:3]
    assert np.all(np.abs(mean - m[:3]) / step <= tolerance("mean_over_all_chances"))


@pytest.mark.parametrize("still", [True, False])
def test_first_moments_are_held_within_a_step(still: bool) -> None:
    """Of random groups, each first moment to half a step of its code, or to one where chance decides.

    The largest of a group takes more than 127 * 2/3 steps or the finest ones: they follow it to half an octave.
    """
    rng = np.random.default_rng(82)
    n = 16_000
    v = (10.0 ** np.repeat(rng.uniform(-12, -4, n // 16), 16) * 10.0 ** rng.uniform(-3, 0, n)).astype(np.float32)
    m = (np.sqrt(v) * 10.0 ** np.repeat(rng.uniform(-1, 0.8, n // 16), 16) * rng.standard_normal(n)).astype(np.float32)
    words = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    before = m if still else m * np.float32(3) + np.float32(1)
    first, second, groups = encode(m, v, before=before, words=words, scale=float(FIRST_SCALE))
    got, _ = decode_moments(first, second, groups, np.float32(1) / FIRST_SCALE)
    book, code = read_words(groups), second.reshape(-1, 16).astype(np.int64)
    step = reference_of(code, position(code, book)[1]).astype(np.float64) * ratio_step(book.j)
    error = np.abs(got.astype(np.float64) - m).reshape(-1, 16) / step
    assert error.max() <= (1.0 if still else 0.5) + tolerance("first_moment_in_steps")
    largest = np.abs(first.reshape(-1, 16).astype(int)).max(axis=1)
    finest = book.j[:, 0] == 15
    assert np.all(largest[~finest] >= 84)
    assert 0 < np.count_nonzero(finest) < n // 32


def test_not_a_number_stays_alone() -> None:
    """NaN, infinite and overflowing moments are code -128 and v = 0; the others' codes are those of a group with 0."""
    rng = np.random.default_rng(83)
    v = (10.0 ** rng.uniform(-6, -4, 32)).astype(np.float32)
    m = (np.sqrt(v) * rng.standard_normal(32)).astype(np.float32)
    words = rng.integers(0, 1 << 32, 32, dtype=np.uint32)
    for bad_m, bad_v in ((NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF), (1.0, 2.0**103), (-INF, INF), (1.0, -1.0)):
        m[5], v[5] = bad_m, bad_v
        got = encode(m, v, words=words, scale=float(FIRST_SCALE))
        m[5], v[5] = 0.0, 0.0
        expected = encode(m, v, words=words, scale=float(FIRST_SCALE))
        assert (got[0][5], got[1][5]) == (-128, 0)
        for a, b in zip(got, expected, strict=True):
            others = np.arange(a.size) != (5 if a.size == 32 else -1)
            np.testing.assert_array_equal(a[others], b[others])
        decoded, _ = decode_moments(*got, np.float32(1))
        assert np.isnan(decoded[5]) and np.isfinite(np.delete(decoded, 5)).all()


@pytest.mark.parametrize("size", [0, 1, 15, 17, 31])
def test_ragged_groups_are_filled_with_zeros(size: int) -> None:
    """A last group of fewer elements has the codes and the word of one that goes on with zeros."""
    rng = np.random.default_rng(84)
    m, v = rng.standard_normal(size).astype(np.float32), rng.uniform(1e-3, 1, size).astype(np.float32)
    words = rng.integers(0, 1 << 32, size, dtype=np.uint32)
    whole = -(-size // 16) * 16
    got = encode(m, v, words=words)
    expected = encode(
        *(np.concatenate([x, np.zeros(whole - size, x.dtype)]) for x in (m, v)),
        words=np.resize(words, whole) if size else words,
    )
    assert [x.size for x in got] == [size, size, whole // 16]
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(a, b[:size])
    np.testing.assert_array_equal(got[2], expected[2])


# --- the bound ------------------------------------------------------------------------------------------------------


def test_largest_update_worked_by_hand() -> None:
    """One gradient: 1. Two, beta1 = 0.5, beta2 = 0.75, q = 1/3: sqrt((1/4 / 9/16) * (7/16 / 1/4) * (1 + 1/3)) = 1.0184.

    In the limit 7.27 for 0.9 and 0.999, 1.165 for 0.9 and 0.95; q = 1 adds up t ones.
    """
    close = dict(rtol=tolerance("float64_against_torch"))
    np.testing.assert_allclose(largest_update(1, 0.9, 0.999), 1.001, **close)
    np.testing.assert_allclose(largest_update(2, 0.5, 0.75), 1.001 * math.sqrt(4 / 9 * 7 / 4 * 4 / 3), **close)
    np.testing.assert_allclose(
        largest_update(7, 0.5, 0.25), 1.001 * 0.5 / (1 - 0.5**7) * math.sqrt((1 - 0.25**7) / 0.75 * 7), **close
    )
    assert [round(float(largest_update(10**6, 0.9, beta2)) / 1.001, 3) for beta2 in (0.999, 0.95)] == [7.27, 1.165]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.25)], ids=str)
def test_largest_update_is_reached_and_never_exceeded(betas: tuple[float, float]) -> None:
    """The worst gradients give it, but for its margin; 2,000 random sequences stay below."""
    beta1, beta2 = betas
    rng = np.random.default_rng(85)
    for t in (1, 2, 5, 40):
        g = np.vstack([(beta1 / beta2) ** np.arange(t - 1, -1, -1.0), rng.standard_normal((2000, t)) ** 3])
        power1, power2 = (beta ** np.arange(t - 1, -1, -1.0) for beta in betas)
        m_hat = (1 - beta1) * (g @ power1) / (1 - beta1**t)
        v_hat = (1 - beta2) * ((g * g) @ power2) / (1 - beta2**t)
        u = np.abs(m_hat) / np.sqrt(v_hat)
        limit = float(largest_update(t, beta1, beta2)) / 1.001
        np.testing.assert_allclose(u[0], limit, rtol=tolerance("worst_gradients_in_float64"))
        assert np.all(u <= largest_update(t, beta1, beta2))


def test_bound_coefficient() -> None:
    """Lr times the number, rounded once; infinity without one; the limit at this very step with "auto"."""
    hyper = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.0)
    for compute, t in itertools.product((np.float32, np.float64), (1, 50)):
        bounds = [coefficients(t, **hyper, compute=compute, update_bound=b).bound for b in (None, 0.3, "auto")]
        assert bounds == [compute(np.inf), compute(0.01 * 0.3), compute(0.01 * largest_update(t, 0.9, 0.999))]
        assert all(type(bound) is compute for bound in bounds)
