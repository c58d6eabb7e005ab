"""The judge judged: the NumPy reference against hand-worked steps, exact rational arithmetic and torch."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from reference import (
    Coefficients,
    adamw_exact,
    adamw_float64,
    coefficients,
    integer_power,
    load,
    step_count_after,
    step_exact,
    store,
)
from tolerances import tolerance

FLAGS = [
    pytest.param(
        dict(amsgrad=amsgrad, maximize=maximize, decoupled=decoupled),
        id=f"{'amsgrad' if amsgrad else 'plain'}-{'max' if maximize else 'min'}-{'decoupled' if decoupled else 'l2'}",
    )
    for amsgrad, maximize, decoupled in itertools.product([False, True], repeat=3)
]

FLOAT32_MAX = np.finfo(np.float32).max
FLOAT32_TINY = np.float32(2.0**-149)  # the smallest subnormal


def step_exact_float64(*arrays: np.ndarray | int | None, **options: float | bool) -> tuple[np.ndarray | None, ...]:
    """Take the exact sequence's step on float64 arrays, with the signature of `adamw_float64`."""
    return step_exact(*arrays, param_dtype="float64", grad_dtype="float64", **options)


BOTH_SPELLINGS = pytest.mark.parametrize(
    "step", [pytest.param(adamw_float64, id="truth"), pytest.param(step_exact_float64, id="sequence")]
)


def float32(*values: float) -> np.ndarray:
    """Return a float32 array of the values."""
    return np.array(values, dtype=np.float32)


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return array.view(f"u{array.dtype.itemsize}")


# --- steps worked by hand ---------------------------------------------------------------------------------


@BOTH_SPELLINGS
def test_two_steps_worked_by_hand(step: Callable) -> None:
    """Two steps whose roots come out rational.

    lr = 0.1, beta1 = 0.5, beta2 = 0.96, eps = 1, lambda = 0.1, p = 1. beta2 is chosen for 1 - beta2 = 0.2^2 and
    1 - beta2^2 = 0.28^2; eps is large so that its place (outside the root, after bias correction) shows.

    Step 1, g = 1:   m = 0.5                        v = 0.04
                     m_hat = 0.5 / 0.5 = 1          v_hat = 0.04 / 0.04 = 1
                     p = 1 - 0.1 * (1 / (1 + 1) + 0.1 * 1) = 0.94
    Step 2, g = 0.2: m = 0.25 + 0.1 = 0.35          v = 0.96 * 0.04 + 0.04 * 0.04 = 0.04
                     m_hat = 0.35 / 0.75 = 7 / 15   v_hat = (0.2 / 0.28)^2 = (5 / 7)^2
                     p = 0.94 - 0.1 * ((7 / 15) / (5 / 7 + 1) + 0.1 * 0.94) = 0.94 - 0.1 * (49 / 180 + 0.094)
    """
    options = dict(lr=0.1, beta1=0.5, beta2=0.96, eps=1.0, weight_decay=0.1)
    close = dict(rtol=0.0, atol=tolerance("hand_worked"))
    zero = np.zeros(1)
    p, m, v, _ = step(np.array([1.0]), np.array([1.0]), zero, zero, None, 1, **options)
    np.testing.assert_allclose([p[0], m[0], v[0]], [0.94, 0.5, 0.04], **close)
    p, m, v, _ = step(p, np.array([0.2]), m, v, None, 2, **options)
    np.testing.assert_allclose([p[0], m[0], v[0]], [0.9033777777777778, 0.35, 0.04], **close)


@BOTH_SPELLINGS
def test_l2_and_maximize_worked_by_hand(step: Callable) -> None:
    """Decay joins the gradient after the sign: ascent on the loss still shrinks the weights.

    lr = 0.1, beta1 = 0.5, beta2 = 0.96, eps = 1, lambda = 0.5, p = 1, gradient -0.5.
    g = +0.5 + 0.5 * 1 = 1, so m_hat = v_hat = 1 and p = 1 - 0.1 * 1 / (1 + 1) = 0.95.
    With the sign taken last g would be -1 * (-0.5 + 0.5) = 0.
    """
    zero = np.zeros(1)
    options = dict(lr=0.1, beta1=0.5, beta2=0.96, eps=1.0, weight_decay=0.5, maximize=True, decoupled=False)
    p, m, v, _ = step(np.array([1.0]), np.array([-0.5]), zero, zero, None, 1, **options)
    np.testing.assert_allclose([p[0], m[0], v[0]], [0.95, 0.5, 0.04], rtol=0.0, atol=tolerance("hand_worked"))


@BOTH_SPELLINGS
def test_amsgrad_worked_by_hand(step: Callable) -> None:
    """The maximum is taken of v before bias correction, then corrected like v.

    As in the two steps above, but the second gradient is 0: m = 0.25, v = 0.0384, v_max stays 0.04.
    m_hat = 0.25 / 0.75 = 1 / 3 and sqrt(v_max) / sqrt(1 - beta2^2) = 0.2 / 0.28 = 5 / 7, so
    p = 0.94 - 0.1 * ((1 / 3) / (12 / 7) + 0.094) = 0.94 - 0.1 * (7 / 36 + 0.094).
    """
    options = dict(lr=0.1, beta1=0.5, beta2=0.96, eps=1.0, weight_decay=0.1, amsgrad=True)
    zero = np.zeros(1)
    state = step(np.array([1.0]), np.array([1.0]), zero, zero, zero, 1, **options)
    p, m, v, v_max = step(state[0], zero, *state[1:], 2, **options)
    expected = [0.9111555555555556, 0.25, 0.0384, 0.04]
    np.testing.assert_allclose([p[0], m[0], v[0], v_max[0]], expected, rtol=0.0, atol=tolerance("hand_worked"))


def test_first_float32_step_is_exact_in_binary() -> None:
    """A step without a rounding anywhere, so every bit is known.

    lr = 1/8, beta1 = 1/2, beta2 = 3/4, eps = 2, lambda = 1/2, p = 1, g = 2:
    m = 1/2 * 2 = 1, v = 1/4 * 4 = 1, step_size = (1/8) / (1/2) = 1/4, inv_sqrt_bc2 = 1 / sqrt(1/4) = 2,
    d = 1 * 2 + 2 = 4, p = 1 - (1/16 * 1 + 1/4 * 1 / 4) = 7/8.
    """
    options = dict(lr=0.125, beta1=0.5, beta2=0.75, eps=2.0, weight_decay=0.5)
    assert coefficients(1, **options) == (0.5, 0.25, 0.25, 2.0, 0.0625, 2.0, 1.0, 0.0, 0.0, math.inf)
    zero = float32(0)
    state = step_exact(
        float32(1), float32(2), zero, zero, None, 1, param_dtype="float32", grad_dtype="float32", **options
    )
    assert [x.dtype for x in state[:3]] == [np.float32] * 3
    assert [float(x[0]) for x in state[:3]] == [0.875, 1.0, 1.0]


# --- the order of roundings -------------------------------------------------------------------------------


def unit_coefficients(**changed: float) -> Coefficients:
    """Return float32 coefficients that change nothing (factors 1, everything added 0), but for those named."""
    neutral = dict(w1=1, w2=1, step_size=1, inv_sqrt_bc2=1, decay=0, eps=0, scale=1, l2=0)
    return Coefficients(**{name: np.float32(value) for name, value in (neutral | changed).items()})


def test_decay_and_update_are_subtracted_together() -> None:
    """Each alone is half a unit in the last place of 1 and would round back to 1; together they are one unit."""
    c = unit_coefficients(decay=2.0**-25, step_size=2.0**-25)
    p, _, _, _ = adamw_exact(float32(1), float32(1), float32(0), float32(0), None, c, amsgrad=False, l2=False)
    assert p[0] == np.float32(1 - 2.0**-24)


def test_steady_moments_stay() -> None:
    """With g = m and g^2 = v the moments do not move by a bit, whatever beta rounds to in float32."""
    g = np.linspace(0.1, 3, 1000, dtype=np.float32)
    c = coefficients(7, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    _, m, v, _ = adamw_exact(np.ones_like(g), g, g, g * g, None, c, amsgrad=False, l2=False)
    np.testing.assert_array_equal(m, g)
    np.testing.assert_array_equal(v, g * g)


def test_step_size_multiplies_before_the_division() -> None:
    """41 * 1 / 41 = 1, while 41 * (1 / 41) is one unit less: 1 / 41 rounds down."""
    assert np.float32(41) * (np.float32(1) / np.float32(41)) == np.float32(1 - 2.0**-24)
    c = unit_coefficients(step_size=41, inv_sqrt_bc2=41)
    p, _, _, _ = adamw_exact(float32(0), float32(1), float32(0), float32(0), None, c, amsgrad=False, l2=False)
    assert p[0] == -1


def test_root_is_multiplied_by_the_inverse() -> None:
    """sqrt(25) * float32(1 / 25) is one unit below 0.2, and 1 over it the next float32 above 5.

    sqrt(25) / 25 and sqrt(25 * (1 / 25)^2) both round to 0.2, and 1 over that to 5.
    """
    c = unit_coefficients(w1=0, inv_sqrt_bc2=np.float32(1) / np.float32(25))
    p, m, v, _ = adamw_exact(float32(0), float32(5), float32(1), float32(0), None, c, amsgrad=False, l2=False)
    assert (m[0], v[0]) == (1, 25)
    assert p[0] == -(5 + 2.0**-21)


def round_to_float32(x: Fraction) -> Fraction:
    """Return the float32 nearest to x, ties to even, subnormals included. `round` of a Fraction is half-even."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()  # 2^(exponent - 1) < |x| < 2^(exponent + 1)
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit


class ExactlyRounded:
    """A number whose every operation is done on rationals and then rounded to float32. A plain 0 may join in."""

    def __init__(self, value: "Fraction | float | ExactlyRounded") -> None:
        """Round `value` to float32."""
        self.value = value.value if isinstance(value, ExactlyRounded) else round_to_float32(Fraction(value))

    def __add__(self, other: "ExactlyRounded | int") -> "ExactlyRounded":
        """Return the rounded sum."""
        return ExactlyRounded(self.value + ExactlyRounded(other).value)

    __radd__ = __add__

    def __sub__(self, other: "ExactlyRounded | int") -> "ExactlyRounded":
        """Return the rounded difference."""
        return ExactlyRounded(self.value - ExactlyRounded(other).value)

    def __neg__(self) -> "ExactlyRounded":
        """Return the negative."""
        return ExactlyRounded(-self.value)

    def __mul__(self, other: "ExactlyRounded") -> "ExactlyRounded":
        """Return the rounded product."""
        return ExactlyRounded(self.value * other.value)

    def __truediv__(self, other: "ExactlyRounded") -> "ExactlyRounded":
        """Return the rounded quotient."""
        return ExactlyRounded(self.value / other.value)

    def __gt__(self, other: "ExactlyRounded | int") -> bool:
        """Compare values."""
        return self.value > ExactlyRounded(other).value

    def __lt__(self, other: "ExactlyRounded | int") -> bool:
        """Compare values."""
        return self.value < ExactlyRounded(other).value

    def __ge__(self, other: "ExactlyRounded | int") -> bool:
        """Compare values; there is no NaN here."""
        return not self < other

    def __le__(self, other: "ExactlyRounded | int") -> bool:
        """Compare values; there is no NaN here."""
        return not self > other

    def __ne__(self, other: object) -> bool:
        """Compare values; there is no NaN here."""
        return isinstance(other, ExactlyRounded) and self.value != other.value

    def __float__(self) -> float:
        """Return the value, which float64 holds exactly."""
        return float(self.value)

    def sqrt(self) -> "ExactlyRounded":
        """Return the rounded root; NumPy calls this for `np.sqrt` of an object array.

        The root is bracketed between neighbours s and s + 1 in units of 2^-200, far finer than any float32 or tie
        between two, so that when it is not s itself any point between them rounds like the root.
        """
        scaled = self.value * 4**200
        s = math.isqrt(math.floor(scaled))
        return ExactlyRounded(Fraction(2 * s + (s * s != scaled), 2 * 2**200))


@pytest.mark.parametrize("l2", [False, True], ids=["decoupled", "l2"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("cautious", [False, True], ids=["everywhere", "cautious"])
def test_every_float32_operation_is_rounded_once(amsgrad: bool, l2: bool, cautious: bool) -> None:
    """The same lines of `adamw_exact` run on numbers that round exactly as IEEE-754 says, and agree in every bit.

    So NumPy neither widens to float64 nor contracts nor flushes subnormals. Scales from 1e-42 (subnormal) to 1e3.
    """
    rng = np.random.default_rng(11)
    n = 200
    scale = 10.0 ** rng.integers(-42, 4, n)
    p, grad, m = (x.astype(np.float32) for x in (rng.standard_normal(n), *(scale * rng.standard_normal((2, n)))))
    v, v_max = (np.abs(x).astype(np.float32) for x in (scale * rng.standard_normal(n)) ** 2 * [[1.0], [1.5]])
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    c = coefficients(3, **hyper, decoupled=not l2, update_bound="auto")  # which about half of these exceed
    flags = dict(amsgrad=amsgrad, l2=l2, cautious=cautious, cautious_weight_decay=cautious)
    got = adamw_exact(p, grad, m, v, v_max, c, **flags)
    as_objects = [np.array([ExactlyRounded(float(x)) for x in array], dtype=object) for array in (p, grad, m, v, v_max)]
    exact_c = Coefficients(*(np.array(ExactlyRounded(float(x)), dtype=object) for x in c))
    expected = adamw_exact(*as_objects, exact_c, **flags)
    for name, a, b in zip(("p", "m", "v", "v_max"), got, expected, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64), err_msg=name)


# --- against torch in float64 -----------------------------------------------------------------------------


@BOTH_SPELLINGS
@pytest.mark.parametrize("flags", FLAGS)
def test_twenty_steps_against_torch_in_float64(step: Callable, flags: dict[str, bool]) -> None:
    """Both spellings follow torch.optim.AdamW and, with L2, torch.optim.Adam, all in float64."""
    rng = np.random.default_rng(5)
    n = 257
    p = rng.standard_normal(n)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1)
    rival_class = torch.optim.AdamW if flags["decoupled"] else torch.optim.Adam
    rival_param = torch.nn.Parameter(torch.from_numpy(p.copy()))
    rival = rival_class(
        [rival_param],
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        amsgrad=flags["amsgrad"],
        maximize=flags["maximize"],
        foreach=False,
        fused=False,
    )
    m, v = np.zeros(n), np.zeros(n)
    v_max = np.zeros(n) if flags["amsgrad"] else None
    for t in range(1, 21):
        g = rng.standard_normal(n) * (1.0 if t < 10 else 0.1)  # a drop, so that v_max and v part
        p, m, v, v_max = step(p, g, m, v, v_max, t, **hyper, **flags)
        rival_param.grad = torch.from_numpy(g)
        rival.step()
    state = rival.state[rival_param]
    pairs = {"p": (p, rival_param.detach()), "m": (m, state["exp_avg"]), "v": (v, state["exp_avg_sq"])}
    if flags["amsgrad"]:
        pairs["v_max"] = (v_max, state["max_exp_avg_sq"])
        assert np.any(v_max > v)
    for name, (ours, theirs) in pairs.items():
        size = float(theirs.abs().max())
        np.testing.assert_allclose(
            ours, theirs.numpy(), rtol=0.0, atol=size * tolerance("float64_against_torch"), err_msg=name
        )


# --- coefficients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 3, 7, 64, 100, 1023, 4096, 10_007])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99, 0.999, 0.9999])
def test_repeated_squaring_against_rationals(beta: float, t: int) -> None:
    """beta^t has t - 1 roundings however it is bracketed: its relative error is below (1 + u)^(t - 1) - 1.

    (By induction: a product's rounding count is the sum of its factors' plus one. Squarings early in the chain are
    raised to high powers, so the bound grows with t, not with log t.) What a step uses is 1 - beta^t. Its relative
    error is at most u * beta / (1 - beta) + u, because 1 - beta^t >= (1 - beta) * t * beta^(t - 1): for
    beta = 0.9999 that is 1e-12, far below the float32 that it is rounded to.
    """
    exact = Fraction(beta) ** t
    got = integer_power(beta, t)
    assert got.dtype == np.float64
    if got < np.finfo(np.float64).tiny:  # subnormal or 0: below it relative error means nothing
        assert exact < 2 * Fraction(np.finfo(np.float64).tiny)
        return
    u = Fraction(tolerance("rounding_of_a_product"))
    slack = Fraction(1001, 1000)  # covers the powers of u: (1 + u)^(t - 1) - 1 against (t - 1) * u
    assert abs(Fraction(float(got)) - exact) <= slack * (t - 1) * u * exact
    correction = Fraction(1.0 - float(got))
    limit = u * Fraction(beta) / (1 - Fraction(beta)) + u
    assert abs(correction - (1 - exact)) <= slack * limit * (1 - exact)


def test_powers_underflow_to_zero() -> None:
    """At the last step count that a float32 can hold every usual beta's bias correction is exactly 1."""
    for beta in (0.9, 0.95, 0.999, 0.9999):
        assert integer_power(beta, 2**24) == 0.0
    c = coefficients(2**24, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    assert c.step_size == np.float32(1e-3)
    assert c.inv_sqrt_bc2 == 1


def test_beta_zero() -> None:
    """With beta = 0 there is no memory and no bias: 0^t = 0."""
    c = coefficients(5, lr=0.25, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    assert c == (1.0, 1.0, 0.25, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, math.inf)


@pytest.mark.parametrize("compute", [np.float32, np.float64])
def test_coefficients_have_the_compute_dtype(compute: type[np.floating]) -> None:
    """Every field is a scalar of the compute dtype, so that array arithmetic stays in it."""
    for options in (dict(), dict(maximize=True), dict(decoupled=False)):
        c = coefficients(3, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, compute=compute, **options)
        assert all(type(x) is compute for x in c)
        assert c.scale == (-1 if options.get("maximize") else 1)
        assert (c.decay == 0) == (c.l2 != 0) == ("decoupled" in options)


def test_coefficients_are_rounded_once() -> None:
    """float32(1 - 0.999) is computed in float64: float32(0.999) taken from 1 would be off by 1.3e-5."""
    c = coefficients(1, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
    assert c.w2 == np.float32(1e-3)
    assert np.float32(1) - np.float32(0.999) != np.float32(1e-3)
    assert c.decay == np.float32(1e-5)


def test_step_count_saturates() -> None:
    """A float32 counts to 2^24 and stays there instead of wrapping or turning infinite."""
    assert step_count_after(np.float32(0)) == 1
    assert step_count_after(np.float32(2**24 - 1)) == 2**24
    assert step_count_after(np.float32(2**24)) == 2**24
    assert type(step_count_after(np.float32(0))) is np.float32


# --- storage ----------------------------------------------------------------------------------------------

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def stored_from_bits(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """Return uint16 bit patterns as the array that the reference holds for the dtype."""
    return patterns.view(np.float16) if dtype == "float16" else patterns


def assert_same_bits_or_nan(got: np.ndarray, expected: np.ndarray, is_nan: np.ndarray) -> None:
    """Compare bits, except that any NaN answers for any other."""
    np.testing.assert_array_equal(bits(got)[~is_nan], bits(expected)[~is_nan])


@HALVES
def test_loading_every_pattern_agrees_with_torch(dtype: str) -> None:
    """All 65,536 patterns, NaN and subnormals among them, load exactly."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    got = load(stored_from_bits(patterns, dtype), dtype)
    expected = torch.from_numpy(patterns.copy()).view(TORCH_DTYPE[dtype]).to(torch.float32).numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert_same_bits_or_nan(got, expected, np.isnan(expected))
    widened = load(stored_from_bits(patterns, dtype), dtype, np.float64)
    assert widened.dtype == np.float64
    np.testing.assert_array_equal(widened, expected)


def store_like_torch(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return torch's bits for a float32 array cast to the dtype."""
    return torch.from_numpy(values).to(TORCH_DTYPE[dtype]).view(torch.uint16).numpy()


def check_storing(values: np.ndarray, dtype: str) -> None:
    """Compare `store` with torch's cast; a NaN must stay one."""
    got = store(values, dtype)
    is_nan = np.isnan(values)
    assert_same_bits_or_nan(got, store_like_torch(values, dtype), is_nan)
    assert np.all(np.isnan(load(got, dtype)) == is_nan)


@HALVES
def test_storing_what_was_loaded_changes_nothing(dtype: str) -> None:
    """Every pattern but a NaN's survives load and store."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    loaded = load(stored_from_bits(patterns, dtype), dtype)
    is_nan = np.isnan(loaded)
    again = store(loaded, dtype)
    np.testing.assert_array_equal(bits(again)[~is_nan], patterns[~is_nan])
    assert np.all(np.isnan(load(again, dtype)) == is_nan)


@HALVES
def test_storing_ties_and_their_neighbours_agrees_with_torch(dtype: str) -> None:
    """Every midpoint between two neighbouring stored values, and the float32 on either side of it.

    Subnormals, the step to infinity above the largest value, both signs, and NaNs with any upper half are included.
    """
    upper = np.arange(1 << 16, dtype=np.uint32)
    if dtype == "bfloat16":
        low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
        values = ((upper << np.uint32(16))[:, None] | low).ravel().view(np.float32)
    else:
        magnitude = upper[: 0x7C00 + 1].astype(np.uint16).view(np.float16).astype(np.float64)
        magnitude[-1] = 2.0**16  # where infinity would be, were there one more exponent
        tie = ((magnitude[:-1] + magnitude[1:]) / 2).astype(np.float32)  # 12 significant bits: exact
        neighbours = [tie, np.nextafter(tie, np.float32(0)), np.nextafter(tie, np.float32(np.inf))]
        values = np.concatenate([*neighbours, *(-x for x in neighbours)])
    check_storing(values, dtype)


@HALVES
def test_storing_special_values_agrees_with_torch(dtype: str) -> None:
    """Zeros, infinities, NaNs that a carry would turn into zeros, the largest and the smallest float32."""
    finite = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF]
    not_finite = [0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]
    patterns = np.array(finite + not_finite, dtype=np.uint32)
    values = np.concatenate([patterns, patterns | np.uint32(0x80000000)]).view(np.float32)
    check_storing(values, dtype)
    assert np.isposinf(load(store(float32(FLOAT32_MAX), dtype), dtype))[0]
    assert bits(store(float32(-0.0), dtype))[0] == 0x8000
    assert bits(store(float32(-FLOAT32_TINY), dtype))[0] == 0x8000


@HALVES
def test_storing_random_patterns_agrees_with_torch(dtype: str) -> None:
    """A million float32 patterns of every kind, and a million that lie in float16's narrow range."""
    rng = np.random.default_rng(3)
    check_storing(rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32), dtype)
    spread = rng.standard_normal(1 << 20) * 2.0 ** rng.integers(-26, 17, 1 << 20)
    check_storing(spread.astype(np.float32), dtype)


def test_storing_a_tie_by_hand() -> None:
    """Below 1 bfloat16 is spaced by 2^-8: 1 - 2^-9 lies midway and goes to the even 0x3F80, one float32 less does not.

    float16 ends at 65504 with a spacing of 32: 65520 would round to 65536 and so is infinite.
    """
    tie = np.float32(1 - 2.0**-9)
    np.testing.assert_array_equal(
        store(float32(1, tie, np.nextafter(tie, np.float32(0))), "bfloat16"), [0x3F80, 0x3F80, 0x3F7F]
    )
    np.testing.assert_array_equal(bits(store(float32(65504, 65519, 65520), "float16")), [0x7BFF, 0x7BFF, 0x7C00])


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_storage_keeps_the_shape(shape: tuple[int, ...]) -> None:
    """0-dim, empty and transposed arrays come back in their own shape."""
    values = np.ones(shape, dtype=np.float32).T
    for dtype in ("float32", "bfloat16", "float16"):
        assert load(store(values, dtype), dtype).shape == values.shape
        np.testing.assert_array_equal(load(store(values, dtype), dtype), values)


def test_storage_refuses_another_dtype() -> None:
    """An array that would be rounded twice, or read as something else, is an error."""
    with pytest.raises(TypeError, match="bfloat16 is stored from float32 arrays, got float64"):
        store(np.ones(1), "bfloat16")
    with pytest.raises(TypeError, match="bfloat16 is held in arrays of uint16, got float32"):
        load(float32(1), "bfloat16")
    with pytest.raises(TypeError, match="float64"):
        load(np.ones(1), "float64", np.float32)


# A float64 gradient needs a float64 parameter.
DTYPE_PAIRS = [
    (param_dtype, grad_dtype)
    for param_dtype, grad_dtype in itertools.product(["float32", "bfloat16", "float16", "float64"], repeat=2)
    if grad_dtype != "float64" or param_dtype == "float64"
]


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPE_PAIRS)
def test_stored_step_is_load_compute_store(param_dtype: str, grad_dtype: str) -> None:
    """Storage does not enter the arithmetic: the stored step is the step on loaded values, rounded once."""
    compute = np.float64 if param_dtype == "float64" else np.float32
    rng = np.random.default_rng(2)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)

    def stored(dtype: str) -> np.ndarray:
        return store(rng.standard_normal(100).astype(np.float64 if dtype == "float64" else np.float32), dtype)

    p, grad, m = stored(param_dtype), stored(grad_dtype), rng.standard_normal(100).astype(compute)
    got = step_exact(p, grad, m, m * m, None, 4, param_dtype=param_dtype, grad_dtype=grad_dtype, **hyper)
    expected = adamw_exact(
        load(p, param_dtype, compute),
        load(grad, grad_dtype, compute),
        m,
        m * m,
        None,
        coefficients(4, compute=compute, **hyper),
        amsgrad=False,
        l2=False,
    )
    np.testing.assert_array_equal(got[0], store(expected[0], param_dtype))
    assert got[1].dtype == got[2].dtype == compute
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[2], expected[2])
    assert got[3] is None


# --- structure --------------------------------------------------------------------------------------------


def random_state(n: int = 1000) -> dict[str, np.ndarray]:
    """Return float32 weights, a gradient and moments."""
    rng = np.random.default_rng(8)
    p, grad, m, v = rng.standard_normal((4, n)).astype(np.float32)
    return dict(p=p, grad=grad, m=m, v=v * v, v_max=v * v * np.float32(1.5))


def take_step(state: dict[str, np.ndarray], **options: float | bool) -> tuple[np.ndarray, ...]:
    """Take step 3 from the state in float32, with usual hyperparameters but for those named."""
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1) | options
    v_max = state["v_max"] if hyper.get("amsgrad") else None
    return step_exact(
        state["p"],
        state["grad"],
        state["m"],
        state["v"],
        v_max,
        3,
        param_dtype="float32",
        grad_dtype="float32",
        **hyper,
    )


@pytest.mark.parametrize("flags", FLAGS)
def test_without_gradient_only_decay_moves_the_weights(flags: dict[str, bool]) -> None:
    """With g = 0 and m = 0 a decoupled step is p - (lr * lambda) * p; without decay it is no step at all."""
    state = random_state()
    state["grad"] = state["m"] = np.zeros_like(state["p"])
    still, _, _, _ = take_step(state, **flags, weight_decay=0.0)
    np.testing.assert_array_equal(bits(still), bits(state["p"]))
    moved, _, _, _ = take_step(state, **flags)
    if flags["decoupled"]:
        np.testing.assert_array_equal(moved, state["p"] - np.float32(1e-2 * 0.1) * state["p"])
    else:
        assert np.all(np.abs(moved) < np.abs(state["p"]))


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_without_decay_both_kinds_of_decay_agree(amsgrad: bool) -> None:
    """At weight_decay = 0 there is nothing to decouple."""
    state = random_state()
    a = take_step(state, amsgrad=amsgrad, weight_decay=0.0)
    b = take_step(state, amsgrad=amsgrad, weight_decay=0.0, decoupled=False)
    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize("flags", FLAGS)
def test_learning_rate_zero_keeps_the_weights(flags: dict[str, bool]) -> None:
    """A step at lr = 0 moves the moments and leaves every weight's bits (but for -0.0, which may turn into 0.0)."""
    state = random_state()
    p, m, v, _ = take_step(state, **flags, lr=0.0)
    np.testing.assert_array_equal(bits(p), bits(state["p"]))
    assert np.all(m != state["m"])
    assert np.all(v != state["v"])


def test_maximize_is_the_step_on_the_negated_gradient() -> None:
    """Ascent is descent on -g, bit for bit."""
    state = random_state()
    a = take_step(state, maximize=True)
    b = take_step(state | dict(grad=-state["grad"]))
    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def test_amsgrad_keeps_the_larger_moment_and_any_nan() -> None:
    """v_max never falls; a NaN in v or in v_max stays, as in torch.maximum."""
    nan = np.nan
    v, v_max = float32(1, 2, nan, 1), float32(2, 1, 1, nan)
    g = float32(1, 1, 1, 1)
    c = unit_coefficients(w2=0)
    _, _, _, got = adamw_exact(g, g, g, v, v_max, c, amsgrad=True, l2=False)
    np.testing.assert_array_equal(got, torch.maximum(torch.from_numpy(v), torch.from_numpy(v_max)).numpy())


def test_nothing_is_written_in_place_and_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    """Inputs survive, and overflow, infinities, NaN and 0 / 0 pass without a warning."""
    state = random_state(8)
    state["grad"] = float32(np.inf, -np.inf, np.nan, FLOAT32_MAX, FLOAT32_TINY, 0, 1e30, -1e-30)
    before = {name: array.copy() for name, array in state.items()}
    for dtype in ("bfloat16", "float16"):
        store(take_step(state, amsgrad=True, eps=0.0)[0], dtype)
        store(state["grad"], dtype)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.1, amsgrad=True)
    adamw_float64(*state.values(), 1, **hyper)
    for name, array in state.items():
        np.testing.assert_array_equal(bits(array), bits(before[name]))
    assert not recwarn.list


def test_weights_keep_their_float32_dtype_when_zero_dimensional() -> None:
    """A 0-dim array follows NumPy's scalar rules and must not widen."""
    one = np.array(1.0, dtype=np.float32)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    for dtype in ("float32", "bfloat16", "float16"):
        stored = store(one, dtype)
        p, m, v, _ = step_exact(stored, stored, one, one, None, 1, param_dtype=dtype, grad_dtype=dtype, **hyper)
        assert p.shape == m.shape == v.shape == ()
        assert m.dtype == v.dtype == np.float32
