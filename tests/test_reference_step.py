"""The judge judged on what surrounds the update: norm, decision, clipping, cautious masks, averages, random words."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import (
    NORM_CHUNK,
    NORM_LANES,
    Coefficients,
    adamw_exact,
    adamw_float64,
    clip_coefficient,
    coefficients,
    compute_dtype,
    decide,
    ema_exact,
    ema_weight,
    fold_lanes,
    load,
    mix,
    norm_chunks,
    norm_partials,
    philox2x32,
    random_key,
    random_words,
    step_exact,
    stochastic_bfloat16,
    store,
    total,
)
from tolerances import tolerance

DTYPES = ["float32", "bfloat16", "float16", "float64"]
HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
NAN, INF = np.nan, np.inf

CAUTIOUS = [
    pytest.param(dict(cautious=cautious, cautious_weight_decay=decay), id=name)
    for name, cautious, decay in [("update", True, False), ("decay", False, True), ("both", True, True)]
]


def float32(*values: float) -> np.ndarray:
    """Return a float32 array of the values."""
    return np.array(values, dtype=np.float32)


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return array.view(f"u{array.dtype.itemsize}")


def from_bits(*patterns: int) -> np.ndarray:
    """Return float32 values of these bits."""
    return np.array(patterns, dtype=np.uint32).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float64 values as an array of the storage dtype."""
    with np.errstate(over="ignore"):
        return store(values.astype(compute_dtype(dtype)), dtype)


# --- norm -------------------------------------------------------------------------------------------------


def slow_partials(values: list[float]) -> list[float]:
    """Return the partial sums of squares by the definition, one Python float at a time."""
    partials = []
    for start in range(0, len(values), 16384):
        lanes = [0.0] * 1024
        for i, x in enumerate(values[start : start + 16384]):
            lanes[i % 1024] += x * x
        partials.append(slow_fold(lanes))
    return partials


def slow_fold(lanes: list[float]) -> float:
    """Return the folded lanes, one Python float at a time."""
    for half in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        for j in range(half):
            lanes[j] += lanes[j + half]
    return lanes[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_worked_by_hand(dtype: str) -> None:
    """3^2 + 4^2 = 25 and its root is 5."""
    partials = norm_partials(stored(np.array([3.0, -4.0]), dtype), dtype)
    assert partials.dtype == np.float64
    assert partials.tolist() == [25.0]
    assert total(partials) == 25.0
    assert decide([total(partials)]).norm == 5.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_against_a_loop_over_elements(dtype: str) -> None:
    """20,000 values over five orders of magnitude, summed one by one in the contract's shape: the same bits.

    A plain sum in order has other bits, so the shape shows.
    """
    rng = np.random.default_rng(21)
    grad = stored(rng.standard_normal(20_000) * 10.0 ** rng.uniform(-3, 2, 20_000), dtype)
    values = load(grad, dtype, np.float64).tolist()
    got = norm_partials(grad, dtype)
    assert got.tolist() == slow_partials(values)
    assert total(got) == got[0] + got[1]
    if dtype in ("float32", "float64"):  # squares of 8 or 11 bits add up without rounding more often than not
        assert total(got) != sum(x * x for x in values)


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 16383, 16384, 16385, 32768, 32769])
def test_norm_at_the_edges_of_lanes_and_chunks(numel: int) -> None:
    """One partial a started chunk, each the sum over its own elements alone; an empty tensor has none."""
    grad = np.random.default_rng(numel).standard_normal(numel).astype(np.float32)
    got = norm_partials(grad, "float32")
    assert len(got) == norm_chunks(numel) == math.ceil(numel / 16384)
    assert got.tolist() == slow_partials(grad.astype(np.float64).tolist())


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 3000])
def test_total_against_a_loop_over_partials(count: int) -> None:
    """Partials are added in the same lanes and folded alike, without being squared again."""
    partials = np.random.default_rng(count).uniform(0, 1e6, count)
    lanes = [0.0] * 1024
    for i, y in enumerate(partials.tolist()):
        lanes[i % 1024] += y
    assert total(partials) == slow_fold(lanes)


def test_norm_shape_worked_by_hand() -> None:
    """2^54 swallows 1 and 2 but not 4, so the bits tell what was added to what.

    Four ones behind 2^27 in its own lane are lost one by one. In lanes 1, 3, 5, 7 the fold brings them together
    (7 to 3 and 5 to 1, then 3 to 1) before lane 0 meets them. Adjacent lanes added first would lose them.
    """
    assert (NORM_LANES, NORM_CHUNK) == (1024, 16384)
    same_lane, own_lanes, next_chunk = np.zeros((3, 20_000), dtype=np.float32)
    same_lane[[1024, 2048, 4096, 8192]] = own_lanes[[1, 3, 5, 7]] = next_chunk[16384 + np.arange(4)] = 1
    for grad in (same_lane, own_lanes, next_chunk):
        grad[0] = 2.0**27
    assert norm_partials(same_lane, "float32").tolist() == [2.0**54, 0.0]
    assert norm_partials(own_lanes, "float32").tolist() == [2.0**54 + 4, 0.0]
    assert norm_partials(next_chunk, "float32").tolist() == [2.0**54, 4.0]
    assert fold_lanes(np.array([2.0**53, 1.0, 0.0, 1.0])) == 2.0**53 + 2


def test_a_tensor_without_a_gradient_leaves_gaps() -> None:
    """Its partials are +0.0: later tensors keep their lanes, whether or not a gradient came."""
    other = norm_partials(np.random.default_rng(4).standard_normal(40_000).astype(np.float32), "float32")
    absent = np.zeros(norm_chunks(20_000))
    assert total([*absent, *other]) == total([*norm_partials(np.zeros(20_000, np.float32), "float32"), *other])
    assert not np.signbit(total(absent))


def test_norm_of_float32_neither_overflows_nor_vanishes() -> None:
    """2^127 and the smallest subnormal square exactly in float64, and so add up: sqrt(16384) = 128.

    The largest sum of 2^63 squares is below 2^(63 + 256), far below 2^1024.
    """
    for value in (2.0**127, 2.0**-149):
        partials = norm_partials(np.full(NORM_CHUNK, value, np.float32), "float32")
        assert partials.tolist() == [value**2 * NORM_CHUNK]
        assert decide([total(partials)], skip_nonfinite=True)[:2] == (False, value * 128)
    largest = np.full(100_000, np.finfo(np.float32).max)
    assert np.isfinite(total(norm_partials(largest, "float32")))
    assert np.isfinite(total(norm_partials(np.full(100_000, 1e38, np.float32), "float32")))


def test_norm_of_float64_may_overflow() -> None:
    """1e200 squared is not a float64: such a gradient counts as not finite."""
    sum_of_squares = total(norm_partials(np.array([1e200]), "float64"))
    assert sum_of_squares == INF
    assert decide([sum_of_squares], skip_nonfinite=True).skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_total_is_finite_exactly_where_all_values_are(dtype: str) -> None:
    """One inf, -inf or NaN anywhere among the largest values shows in the total; several do not cancel."""
    largest = {"float32": np.finfo(np.float32).max, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}[dtype]
    values = np.full(20_000, largest)
    assert np.isfinite(total(norm_partials(stored(values, dtype), dtype)))
    for special, position in itertools.product((INF, -INF, NAN), (0, 1023, 1024, 16383, 16384, 19_999)):
        with_one = values.copy()
        with_one[position] = special
        with_two = with_one.copy()
        with_two[7] = -INF
        for array in (with_one, with_two):
            sum_of_squares = total(norm_partials(stored(array, dtype), dtype))
            assert not np.isfinite(sum_of_squares)
            assert not sum_of_squares < INF


def test_norm_takes_flat_stored_arrays() -> None:
    """What is not flat has no memory order here, and another dtype is another gradient."""
    with pytest.raises(ValueError, match="flat"):
        norm_partials(np.ones((2, 2), np.float32), "float32")
    with pytest.raises(TypeError, match="bfloat16 is held in arrays of uint16, got float32"):
        norm_partials(float32(1), "bfloat16")


# --- decision ---------------------------------------------------------------------------------------------


def test_decision_worked_by_hand() -> None:
    """Norms are of the unscaled gradients; the whole norm is of all groups; domains add up within a norm."""
    assert decide([25.0]) == (False, 5.0, np.array([5.0]), 1.0)
    skip, norm, norms, inv_scale = decide([[9.0], 16.0], grad_scale=4.0)
    assert (skip, norm, norms.tolist(), inv_scale) == (False, 1.25, [0.75, 1.0], 0.25)
    assert decide([[9.0, 16.0]]).norms.tolist() == [5.0]
    assert all(type(x) is np.float64 for x in (norm, inv_scale))


def test_domains_and_norms_are_added_in_order() -> None:
    """2^54 swallows a 2 at a time, but not the 2^12 that 2^11 of them make before it.

    That is among the domains of one norm, and among norms; a root shows the difference only when it is large.
    """
    big, many = 2.0**54, [2.0] * 2**11
    with_all = math.sqrt(2.0**54 + 2.0**12)
    assert with_all != 2.0**27
    assert decide([[big, *many]]).norm == decide([big, *many]).norm == 2.0**27
    assert decide([[*many, big]]).norm == decide([*many, big]).norm == with_all


@pytest.mark.parametrize(
    ("found_inf", "skip"),
    [(None, False), (0.0, False), (-0.0, False), (1.0, True), (0.5, True), (-1.0, True), (INF, True), (NAN, True)],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_found_inf_of_any_value_but_zero_skips(found_inf: float | None, skip: bool, shape: tuple[int, ...]) -> None:
    """GradScaler writes 1.0, a sum over devices 2.0, and a sum over NaN a NaN; the shape is [] or [1]."""
    value = None if found_inf is None else np.full(shape, found_inf, np.float32)
    assert decide([25.0], found_inf=value).skip is skip
    assert decide([25.0], found_inf=found_inf).skip is skip


@pytest.mark.parametrize("sum_of_squares", [INF, NAN])
def test_only_a_guard_skips_what_is_not_finite(sum_of_squares: float) -> None:
    """Without a guard such a step is taken, as in torch."""
    assert not decide([4.0, sum_of_squares]).skip
    assert not decide([4.0, 9.0], skip_nonfinite=True).skip
    assert decide([4.0, sum_of_squares], skip_nonfinite=True).skip
    assert decide([sum_of_squares, 4.0], max_skip_norm=1e300).skip


def test_norms_above_the_limit_skip() -> None:
    """The limit itself passes, and it bounds the unscaled norm."""
    assert not decide([25.0], max_skip_norm=5.0).skip
    assert decide([25.0], max_skip_norm=np.nextafter(5.0, 0.0)).skip
    assert not decide([25.0 * 2.0**32], grad_scale=2.0**16, max_skip_norm=5.0).skip
    assert decide([25.0], grad_scale=0.5, max_skip_norm=5.0).skip
    assert decide([9.0, 16.0], max_skip_norm=4.5).skip  # the whole norm, not a group's


def test_decision_without_gradients() -> None:
    """Nothing to sum is a norm of +0.0, and no reason to skip."""
    for totals in ([], [0.0], [[]]):
        decision = decide(totals, skip_nonfinite=True, max_skip_norm=1.0)
        assert (decision.skip, decision.norm) == (False, 0.0)
        assert not np.signbit(decision.norm)


# --- clipping and loss scale ------------------------------------------------------------------------------


def test_clip_coefficient_at_the_edges() -> None:
    """Never above 1; a norm of infinity gives 0 and a NaN a NaN, as in torch; the limit itself is already clipped."""
    assert clip_coefficient(0.0, 1.0) == 1
    assert clip_coefficient(0.0, 1e-7) == 1e-7 / 1e-6 < 1
    assert clip_coefficient(0.5, 1.0) == 1
    assert clip_coefficient(1.0, 1.0) == 1.0 / 1.000001
    assert clip_coefficient(1.0 - 2e-6, 1.0) == 1
    assert clip_coefficient(4.0 - 1e-6, 1.0) == 0.25
    assert clip_coefficient(INF, 1.0) == 0
    assert np.isnan(clip_coefficient(NAN, 1.0))
    assert clip_coefficient(1e300, INF) == 1
    assert clip_coefficient(NAN, None) == clip_coefficient(None, None) == 1


def test_clip_coefficient_is_torchs() -> None:
    """In float64 it is what torch.nn.utils.clip_grads_with_norm_ multiplies a gradient of 1 by, over 18 decades.

    torch writes limit / norm as limit * (1 / norm): one rounding more.
    """
    rng = np.random.default_rng(6)
    for norm, limit in zip([0.0, INF, *10.0 ** rng.uniform(-9, 9, 200)], 10.0 ** rng.uniform(-9, 9, 202), strict=True):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = torch.ones(1, dtype=torch.float64)
        torch.nn.utils.clip_grads_with_norm_(
            [parameter], float(limit), torch.tensor(norm, dtype=torch.float64), foreach=False
        )
        rtol = tolerance("float64_against_torch")
        np.testing.assert_allclose(clip_coefficient(norm, limit), parameter.grad.item(), rtol=rtol, atol=0.0)


def test_gradient_scale_worked_by_hand() -> None:
    """Loss scale 2 and clipping to a quarter multiply the gradient by 1 / 8; ascent turns the sign."""
    clipped = dict(inv_scale=0.5, norm=4.0 - 1e-6, max_grad_norm=1.0)
    assert coefficients(1, **HYPER).scale == 1
    assert coefficients(1, **HYPER, **clipped).scale == 0.125
    assert coefficients(1, **HYPER, **clipped, maximize=True).scale == -0.125
    assert coefficients(1, **HYPER, norm=NAN).scale == 1
    assert np.isnan(coefficients(1, **HYPER, norm=NAN, max_grad_norm=1.0).scale)
    with pytest.raises(ValueError, match="max_grad_norm"):
        coefficients(1, **HYPER, max_grad_norm=1.0)


def test_gradient_scale_is_rounded_once() -> None:
    """The product is taken in float64: of 1 / 3 and 1 / 11 rounded first, the float32 product is one unit off."""
    inv_scale, clip = 1 / 3, clip_coefficient(11.0, 1.0)
    got = coefficients(1, **HYPER, inv_scale=inv_scale, norm=11.0, max_grad_norm=1.0).scale
    assert type(got) is np.float32
    assert got == np.float32(inv_scale * clip) != np.float32(inv_scale) * np.float32(clip)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_power_of_two_as_loss_scale_leaves_no_trace(dtype: str) -> None:
    """Gradients 2^16 times too large, multiplied by 2^-16: the step's bits are those of the gradients themselves."""
    rng = np.random.default_rng(9)
    p, grad = (stored(x, dtype) for x in rng.standard_normal((2, 500)))
    m, v = (x.astype(np.float32) for x in rng.uniform(0, 1, (2, 500)))
    scaled = store(load(grad, dtype) * np.float32(2.0**16), dtype)
    dtypes = dict(param_dtype=dtype, grad_dtype=dtype)
    plain = step_exact(p, grad, m, v, None, 2, **dtypes, **HYPER)
    unscaled = step_exact(p, scaled, m, v, None, 2, **dtypes, **HYPER, inv_scale=decide([], 2.0**16).inv_scale)
    for a, b in zip(plain[:3], unscaled[:3], strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_clipped_steps_against_torch() -> None:
    """Norm, decision and step follow clip_grad_norm_ and AdamW on two float64 tensors, clipped or not.

    The loss scale of 1024 stays in our gradients and never reaches torch's.
    """
    rng = np.random.default_rng(12)
    params = [rng.standard_normal(n) for n in (257, 20_000)]
    theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    rival = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, foreach=False)
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in params]
    clipped = []
    for t in range(1, 11):
        grads = [rng.standard_normal(p.size) * (0.001 if t % 3 == 0 else 1.0) for p in params]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = torch.from_numpy(grad.copy())
        their_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0).item()
        rival.step()
        decision = decide([total(np.concatenate([norm_partials(g * 1024, "float64") for g in grads]))], 1024.0)
        np.testing.assert_allclose(decision.norm, their_norm, rtol=tolerance("float64_against_torch"), atol=0.0)
        clipped.append(bool(decision.norm > 1))
        for i, grad in enumerate(grads):
            params[i], *moments[i], _ = step_exact(
                params[i],
                grad * 1024,
                *moments[i],
                None,
                t,
                param_dtype="float64",
                grad_dtype="float64",
                inv_scale=decision.inv_scale,
                norm=decision.norms[0],
                max_grad_norm=1.0,
                **HYPER,
            )
    assert set(clipped) == {True, False}
    for ours, parameter in zip(params, theirs, strict=True):
        size = float(np.abs(ours).max())
        atol = size * tolerance("float64_against_torch")
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=0.0, atol=atol)


# --- cautious ---------------------------------------------------------------------------------------------


def unit_coefficients(**changed: float) -> Coefficients:
    """Return float32 coefficients under which moments stay and the update is m / sqrt(v), but for those named."""
    neutral = dict(w1=0, w2=0, step_size=1, inv_sqrt_bc2=1, decay=0, eps=0, scale=1, l2=0)
    return Coefficients(**{name: np.float32(value) for name, value in (neutral | changed).items()})


def weight_after(p: float, grad: float, m: float, c: Coefficients, *, l2: bool = False, **flags: bool) -> np.float32:
    """Return one element's weight after a step with second moment 1: the update before masks is the first moment."""
    p, _, _, _ = adamw_exact(float32(p), float32(grad), float32(m), float32(1), None, c, amsgrad=False, l2=l2, **flags)
    assert p.dtype == np.float32
    return p[0]


@pytest.mark.parametrize(
    ("m", "grad", "update"),
    [
        (1.0, 1.0, 1.0),
        (1.0, -1.0, 0.0),
        (1.0, 0.0, 0.0),
        (1.0, -0.0, 0.0),
        (-1.0, 1.0, 0.0),
        (-1.0, -1.0, -1.0),
        (-1.0, 0.0, 0.0),
        (-1.0, -0.0, 0.0),
        (0.0, 1.0, 0.0),
        (1.0, 2.0**-149, 1.0),
        (2.0**-149, -1.0, 0.0),
        (1.0, NAN, NAN),
        (NAN, 1.0, NAN),
        (NAN, 0.0, NAN),
    ],
)
def test_cautious_update_worked_by_hand(m: float, grad: float, update: float) -> None:
    """Where moment and gradient disagree, or the gradient is 0, the weight stays; a NaN gets through."""
    np.testing.assert_array_equal(
        weight_after(8.0, grad, m, unit_coefficients(), cautious=True), np.float32(8 - update)
    )


def test_cautious_update_leaves_zero_as_it_is() -> None:
    """What is masked is +0.0, and p - (0 + 0) keeps the sign of a zero."""
    for p in (0.0, -0.0):
        got = weight_after(p, -1.0, 1.0, unit_coefficients(decay=0.0), cautious=True)
        assert (got, np.signbit(got)) == (0, np.signbit(p))
    # A moment of zero masks nothing: an update of -0.0 stays one (p - (-0.0 + -0.0) = 0.0), and 0 / 0 stays a NaN.
    for flags in (dict(), dict(cautious=True)):
        assert not np.signbit(weight_after(-0.0, -1.0, -0.0, unit_coefficients(), **flags))
        for grad in (1.0, -1.0):
            no_denominator = unit_coefficients(inv_sqrt_bc2=0.0)
            assert np.isnan(weight_after(1.0, grad, 0.0, no_denominator, **flags))


def test_cautious_compares_what_the_step_uses() -> None:
    """The moment after the step, and the gradient after scale, sign and L2 term."""
    half = unit_coefficients(w1=0.5)
    assert weight_after(0.0, 3.0, -1.0, half, cautious=True) == -1  # m = -1 + 0.5 * (3 + 1) = 1 agrees
    ascent = unit_coefficients(scale=-1.0)
    assert weight_after(0.0, -1.0, 1.0, ascent, cautious=True) == -1
    assert weight_after(0.0, 1.0, 1.0, ascent, cautious=True) == 0
    l2 = unit_coefficients(l2=0.5)
    assert weight_after(-4.0, 1.0, 1.0, l2, l2=True, cautious=True) == -4  # g = 1 - 0.5 * 4 = -1 disagrees
    assert weight_after(4.0, 1.0, 1.0, l2, l2=True, cautious=True) == 3


@pytest.mark.parametrize(
    ("p", "update", "expected"),
    [
        (1.0, 1.0, -0.5),  # 1 - (0.5 + 1)
        (1.0, -1.0, 2.0),  # the update pulls away from 0: no decay
        (-1.0, 1.0, -2.0),
        (-1.0, -1.0, 0.5),
        (1.0, 0.0, 0.5),  # no update: decay as usual
        (-1.0, -0.0, -0.5),
        (0.0, 1.0, -1.0),
        (2.0**-149, -1.0, 1.0),
        (INF, -1.0, INF),  # decay would make it inf - inf
        (INF, 1.0, NAN),
        (1.0, NAN, NAN),
        (NAN, 1.0, NAN),
    ],
)
def test_cautious_weight_decay_worked_by_hand(p: float, update: float, expected: float) -> None:
    """With lr * lambda = 0.5: decay where update and weight agree in sign or one is 0; a NaN gets through."""
    c = unit_coefficients(decay=0.5)
    np.testing.assert_array_equal(weight_after(p, update, update, c, cautious_weight_decay=True), np.float32(expected))


def test_both_masks_worked_by_hand() -> None:
    """A masked update is no update, so the decay stays: -1 - (-0.5 + 0). Alone, decay would be masked: -1 - (0 + 1)."""
    c = unit_coefficients(decay=0.5)
    assert weight_after(-1.0, -1.0, 1.0, c, cautious=True, cautious_weight_decay=True) == -0.5
    assert weight_after(-1.0, -1.0, 1.0, c, cautious_weight_decay=True) == -2
    assert weight_after(-1.0, -1.0, 1.0, c, cautious=True) == -0.5
    assert weight_after(-1.0, -1.0, 1.0, c) == -1.5


def random_arrays(n: int = 2000) -> tuple[np.ndarray, ...]:
    """Return float32 weights, gradient, moments and largest second moment."""
    p, grad, m, v = np.random.default_rng(8).standard_normal((4, n)).astype(np.float32)
    return p, grad, m, v * v, v * v * np.float32(1.5)


@pytest.mark.parametrize("flags", CAUTIOUS)
@pytest.mark.parametrize("variant", [dict(), dict(amsgrad=True), dict(maximize=True), dict(decoupled=False)], ids=str)
def test_masks_touch_weights_alone_and_only_where_they_apply(flags: dict[str, bool], variant: dict[str, bool]) -> None:
    """Moments have the bits of the plain step; so have the weights wherever no mask applies, and nowhere else."""
    p, grad, m, v, v_max = random_arrays()
    dtypes = dict(param_dtype="float32", grad_dtype="float32")
    v_max = v_max if variant.get("amsgrad") else None
    plain = step_exact(p, grad, m, v, v_max, 3, **dtypes, **HYPER, **variant)
    got = step_exact(p, grad, m, v, v_max, 3, **dtypes, **HYPER, **variant, **flags)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    decoupled = variant.get("decoupled", True)
    g = -grad if variant.get("maximize") else grad if decoupled else grad + np.float32(0.1) * p
    update_masked = flags["cautious"] & (np.sign(plain[1]) != np.sign(g))
    pulls_away = (np.sign(plain[1]) != np.sign(p)) & ~update_masked
    decay_masked = flags["cautious_weight_decay"] & pulls_away & decoupled
    np.testing.assert_array_equal(got[0] != plain[0], update_masked | decay_masked)
    assert np.any(update_masked) == flags["cautious"]
    assert np.any(decay_masked) == (flags["cautious_weight_decay"] and decoupled)


def test_cautious_truth_is_the_papers() -> None:
    """Liang et al.: the update times I(u g > 0). Chen et al.: x - lr (u + lambda I(u x >= 0) x)."""
    p, grad, m, v, _ = (x.astype(np.float64) for x in random_arrays())
    p[:3], grad[3:6] = 0.0, 0.0
    options = HYPER | dict(lr=0.5)
    bare, m_after, _, _ = adamw_float64(p, grad, m, v, None, 3, **(options | dict(weight_decay=0.0)))
    masked, _, _, _ = adamw_float64(p, grad, m, v, None, 3, **(options | dict(weight_decay=0.0)), cautious=True)
    agrees = m_after * grad > 0
    np.testing.assert_array_equal(masked, np.where(agrees, bare, p))
    plain, _, _, _ = adamw_float64(p, grad, m, v, None, 3, **options)
    got, _, _, _ = adamw_float64(p, grad, m, v, None, 3, **options, cautious_weight_decay=True)
    np.testing.assert_array_equal(got, np.where(m_after * p >= 0, plain, bare))
    both, _, _, _ = adamw_float64(p, grad, m, v, None, 3, **options, cautious=True, cautious_weight_decay=True)
    np.testing.assert_array_equal(both, np.where(agrees, got, p - 0.5 * (0.1 * p)))
    assert 0 < np.mean(agrees) < 1
    assert np.any(np.isnan(adamw_float64(p * NAN, grad, m, v, None, 3, **options, cautious_weight_decay=True)[0]))
    assert np.all(np.isnan(adamw_float64(p, grad * NAN, m, v, None, 3, **options, cautious=True)[0]))


@pytest.mark.parametrize("flags", CAUTIOUS)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
def test_twenty_cautious_steps_of_both_spellings(flags: dict[str, bool], decoupled: bool) -> None:
    """The exact sequence in float64 follows the truth: both mask the same elements."""
    rng = np.random.default_rng(15)
    ours = theirs = (rng.standard_normal(500), np.zeros(500), np.zeros(500), None)
    for t in range(1, 21):
        g = rng.standard_normal(500)
        options = dict(HYPER, decoupled=decoupled, **flags)
        ours = step_exact(ours[0], g, *ours[1:], t, param_dtype="float64", grad_dtype="float64", **options)
        theirs = adamw_float64(theirs[0], g, *theirs[1:], t, **options)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.0, atol=float(np.abs(b).max()) * tolerance("float64_against_torch"))


def test_stored_step_hands_every_option_on() -> None:
    """The stored step is the element's step with the same coefficients and flags; each of them shows."""
    p, grad, m, v, _ = random_arrays()
    clipping = dict(inv_scale=0.25, norm=3.0, max_grad_norm=1.0)
    masks = dict(cautious=True, cautious_weight_decay=True)
    dtypes = dict(param_dtype="float32", grad_dtype="float32")
    expected = adamw_exact(p, grad, m, v, None, coefficients(3, **HYPER, **clipping), amsgrad=False, l2=False, **masks)
    got = step_exact(p, grad, m, v, None, 3, **dtypes, **HYPER, **clipping, **masks)
    for a, b in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    for changed in (dict(cautious=False), dict(cautious_weight_decay=False), dict(inv_scale=1.0), dict(norm=2.0)):
        other = step_exact(p, grad, m, v, None, 3, **dtypes, **(HYPER | clipping | masks | changed))
        assert np.any(other[0] != got[0]), changed


# --- exponential moving average ---------------------------------------------------------------------------


def test_ema_weight_worked_by_hand() -> None:
    """1 - decay; warming up, the decay is (1 + t) / (10 + t) until that exceeds it: for 0.5 at the eighth step."""
    assert ema_weight(5, None) == ema_weight(5, None, True) == 0
    assert ema_weight(5, 0.75) == 0.25
    assert ema_weight(1, 0.75, True) == 1 - 2 / 11
    assert [ema_weight(t, 0.5, True) for t in (7, 8, 9, 10**6)] == [1 - 8 / 17, 0.5, 0.5, 0.5]
    assert ema_weight(1, 0.0, True) == 1
    assert ema_weight(1, NAN, True) == 1 - 2 / 11
    assert ema_weight(2**24, 0.9999, True) == 1 - 0.9999


@pytest.mark.parametrize("compute", [np.float32, np.float64])
def test_ema_weight_among_the_coefficients(compute: type[np.floating]) -> None:
    """Rounded once: float32(0.9999) taken from 1 would be off by 1.7e-4."""
    c = coefficients(3, **HYPER, ema_decay=0.9999, compute=compute)
    assert Coefficients._fields.index("ema") == 8  # as launch_table.h has it
    assert type(c.ema) is compute
    assert c.ema == compute(1 - 0.9999)
    assert np.float32(1) - np.float32(0.9999) != np.float32(1 - 0.9999)
    assert coefficients(1, **HYPER, ema_decay=0.9999, ema_warmup=True, compute=compute).ema == compute(1 - 2 / 11)
    without = coefficients(3, **HYPER, compute=compute)
    assert type(without.ema) is compute
    assert without == c._replace(ema=0)


@pytest.mark.parametrize("param_dtype", DTYPES)
def test_average_worked_by_hand(param_dtype: str) -> None:
    """1 + 0.25 * (2 - 1) = 1.25 in every format."""
    compute = compute_dtype(param_dtype)
    p = stored(np.array([2.0]), param_dtype)
    got = ema_exact(np.ones(1, compute), p, compute(0.25), param_dtype, np.dtype(compute).name)
    assert got.dtype == compute
    assert got.tolist() == [1.25]
    words = np.array([0xFFFF00], np.uint32)
    assert (
        load(ema_exact(np.array([0x3F80], np.uint16), p, compute(0.25), param_dtype, "bfloat16", words), "bfloat16")[0]
        == 1.25
    )


def test_average_rounds_product_and_sum() -> None:
    """The product rounds to -2^-25, half a unit below 1, and the tie goes to 1. In one rounding it would be 1 - 2^-24.

    q - e = -(1 + 3 * 2^-23) and the weight is 2^-25 * (1 - 5 * 2^-24): their product is -2^-25 * (1 + 2^-24 - ...).
    """
    weight = np.float32(2.0**-25 * (1 - 5 * 2.0**-24))
    q = np.float32(-3 * 2.0**-23)
    assert np.float32(1 + float(weight) * (float(q) - 1)) == np.float32(1 - 2.0**-24)
    assert ema_exact(float32(1), np.array([q]), weight, "float32", "float32")[0] == 1


@pytest.mark.parametrize("ema_dtype", ["float32", "bfloat16"])
def test_average_of_what_does_not_move_does_not_drift(ema_dtype: str) -> None:
    """A frozen parameter's average keeps its bits, whatever the decay, step after step and word after word."""
    weights = store(np.random.default_rng(1).standard_normal(1000).astype(np.float32), ema_dtype)
    e = weights
    for t in range(1, 50):
        c = coefficients(t, **HYPER, ema_decay=0.999, ema_warmup=True)
        e = ema_exact(e, weights, c.ema, ema_dtype, ema_dtype, random_words(random_key(0, 0, t), np.arange(1000)))
    np.testing.assert_array_equal(bits(e), bits(weights))


def test_average_is_of_the_stored_weight() -> None:
    """A bfloat16 weight enters as bfloat16 holds it: 1 + 2^-9 is stored as 1."""
    p = store(float32(1 + 2.0**-9), "bfloat16")
    assert ema_exact(float32(0), p, np.float32(0.5), "bfloat16", "float32")[0] == 0.5


def test_average_refuses_other_dtypes() -> None:
    """A weight that would widen the arithmetic, and an average that nothing stores."""
    one = float32(1)
    with pytest.raises(TypeError, match="float32 is stored from float32 arrays, got float64"):
        ema_exact(one, one, np.float64(0.5), "float32", "float32")
    with pytest.raises(TypeError, match="computed in float32, got a weight of float64"):
        ema_exact(np.array([0x3F80], np.uint16), one, np.float64(0.5), "float32", "bfloat16", np.zeros(1, np.uint32))
    with pytest.raises(TypeError, match="float32 or bfloat16, got float16"):
        ema_exact(one.astype(np.float16), one, np.float32(0.5), "float32", "float16")
    with pytest.raises(TypeError, match="float64 or bfloat16, got float32"):
        ema_exact(one, np.ones(1), np.float64(0.5), "float64", "float32")


# --- stochastic rounding ----------------------------------------------------------------------------------

EVERY_LOW_HALF = np.arange(1 << 16, dtype=np.uint32)


@pytest.mark.parametrize(
    "pattern",
    [
        0x3F800001,
        0x3F808000,
        0x3F80FFFF,
        0x3FFF1234,
        0xBF804321,
        0x00000001,
        0x00007FFF,
        0x807FFFFF,
        0x7F7FFFFF,
        0xFF7F0001,
    ],
    ids=hex,
)
def test_rounding_up_happens_in_just_its_share_of_all_words(pattern: int) -> None:
    """Over all 65,536 low halves of a word as many round up as 16 bits are cut off: unbiased, to the last word.

    Up is away from 0: the next stored pattern, across a binade, out of the subnormals, or from the largest value to
    infinity.
    """
    got = stochastic_bfloat16(np.broadcast_to(from_bits(pattern), 1 << 16), EVERY_LOW_HALF)
    down, cut_off = divmod(pattern, 1 << 16)
    assert np.count_nonzero(got == down + 1) == cut_off
    assert np.count_nonzero(got == down) == (1 << 16) - cut_off


@pytest.mark.parametrize("word", [0, 1, 0x8000, 0xFFFF, 0xFFFFFFFF], ids=hex)
def test_what_bfloat16_holds_never_changes(word: int) -> None:
    """All its patterns: zeros of both signs, subnormals, the largest values, infinities. A NaN stays a NaN, quiet."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    values = (patterns << np.uint32(16)).view(np.float32)
    got = stochastic_bfloat16(values, np.full(1 << 16, word, np.uint32))
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(got[~is_nan], patterns[~is_nan])
    np.testing.assert_array_equal(got[is_nan], patterns[is_nan] | 0x40)


@pytest.mark.parametrize("word", [0, 1, 0xFFFF, 0xFFFFFFFF], ids=hex)
def test_special_values_stay_sane(word: int) -> None:
    """A NaN whose mark lies in the lower half neither turns infinite nor wraps to 0; the largest value may overflow.

    The smallest subnormal of either sign goes to a 0 of its sign or to the next subnormal.
    """
    values = from_bits(0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x80000001)
    got = stochastic_bfloat16(values, np.full(values.size, word, np.uint32))
    assert got[:4].tolist() == [0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF]
    up = word & 0xFFFF != 0
    assert got[4:6].tolist() == ([0x7F80, 0xFF80] if up else [0x7F7F, 0xFF7F])
    all_ones = word & 0xFFFF == 0xFFFF
    assert got[6:].tolist() == ([0x0001, 0x8001] if all_ones else [0x0000, 0x8000])


def test_only_the_lower_half_of_a_word_counts() -> None:
    """Whatever stands above is ignored."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal(10_000).astype(np.float32)
    words = rng.integers(0, 1 << 32, 10_000, dtype=np.uint32)
    np.testing.assert_array_equal(
        stochastic_bfloat16(values, words), stochastic_bfloat16(values, words & np.uint32(0xFFFF))
    )


def test_stochastic_rounding_refuses_other_dtypes() -> None:
    """float64 values would be rounded twice, and int64 words are no words."""
    with pytest.raises(TypeError, match="got float64 and uint32"):
        stochastic_bfloat16(np.ones(1), np.zeros(1, np.uint32))
    with pytest.raises(TypeError, match="got float32 and int64"):
        stochastic_bfloat16(float32(1), np.zeros(1, np.int64))


# Everything below is seeded and so passes or fails for good: the bound says how far a sound generator may stray.
# Five standard errors are exceeded by one in 1.7 million.
STANDARD_ERRORS = 5


def assert_share(count: int, n: int, share: float) -> None:
    """Check that `count` of `n` independent events of probability `share` is plausible."""
    assert abs(count - n * share) <= STANDARD_ERRORS * math.sqrt(n * share * (1 - share)), (count / n, share)


@pytest.mark.parametrize("cut_off", [1 / 64, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_mean_of_a_million_roundings(cut_off: float, sign: int) -> None:
    """Rounded with a tensor's words, 1 + cut_off * 2^-7 goes up in that share of the elements: an unbiased mean."""
    n = 10**6
    value = np.float32(sign * (1 + cut_off * 2.0**-7))
    words = random_words(random_key(seed=3, tensor=2, t=17), np.arange(n))
    got = load(stochastic_bfloat16(np.full(n, value), words), "bfloat16")
    up, down = np.float32(sign * (1 + 2.0**-7)), np.float32(sign)
    count = np.count_nonzero(got == up)
    assert count + np.count_nonzero(got == down) == n
    assert_share(count, n, (int(bits(np.array(value))) & 0xFFFF) / 2**16)


def test_bfloat16_average_moves_where_rounding_to_nearest_stands_still() -> None:
    """Decay 0.99, the weight one unit above: nearest keeps 1 for ever, while of 50,000 averages (1 - 0.99^t) arrive.

    An average that has arrived stays, and each step takes 1 % of the others.
    """
    n, steps = 50_000, 60
    weights = np.full(n, 0x3F81, np.uint16)
    e = np.full(n, 0x3F80, np.uint16)
    ema_w = coefficients(1, **HYPER, ema_decay=0.99).ema
    nearest = store(load(e, "bfloat16") + ema_w * (load(weights, "bfloat16") - load(e, "bfloat16")), "bfloat16")
    np.testing.assert_array_equal(nearest, e)
    for t in range(1, steps + 1):
        e = ema_exact(e, weights, ema_w, "bfloat16", "bfloat16", random_words(random_key(0, 0, t), np.arange(n)))
    assert set(e.tolist()) == {0x3F80, 0x3F81}
    moved = float(load(np.array([0x3F80], np.uint16), "bfloat16")[0] + ema_w * np.float32(2.0**-7))
    share = (int(bits(np.array(np.float32(moved)))) & 0xFFFF) / 2**16  # 0.01, as float32 holds 1 + 0.01 * 2^-7
    assert_share(np.count_nonzero(e == 0x3F81), n, 1 - (1 - share) ** steps)


# --- random words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), 0x00000000, (0x257A3673, 0xCD26BE2A)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, int], key: int, expected: tuple[int, int]) -> None:
    """The three lines `philox2x32 7` of Random123's kat_vectors, alone and among other counters."""
    assert tuple(int(x) for x in philox2x32(*counter, key)) == expected
    c0, c1 = (np.array([[5, word], [word, 7]], dtype=np.uint32) for word in counter)
    c0[0, 1], c0[1, 0] = 9, counter[0]
    for got, word in zip(philox2x32(c0, c1, key), expected, strict=True):
        assert got.dtype == np.uint32
        assert got[1, 0] == word


def slow_word(key: int, index: int) -> int:
    """Return one element's word by the definition, in Python integers."""
    c0, c1, k = (index // 2) % 2**32, (index >> 33) ^ (key >> 32), key % 2**32
    for _ in range(7):
        product = 0xD256D193 * c0
        c0, c1 = (product >> 32) ^ k ^ c1, product % 2**32
        k = (k + 0x9E3779B9) % 2**32
    return c1 if index % 2 else c0


def test_words_against_a_loop_over_elements() -> None:
    """Both halves of the index and of the key enter: indices on either side of 2^31, 2^32 and 2^33, keys of 64 bits."""
    indices = np.array(
        [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 - 1, 2**33, 2**40 + 3, 2**62], dtype=np.int64
    )
    keys = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF, random_key(1, 2, 3)]
    every = [random_words(key, indices) for key in keys]
    assert [words.tolist() for words in every] == [[slow_word(key, int(i)) for i in indices] for key in keys]
    assert every[0].dtype == np.uint32
    assert every[0][8] == every[3][0] != every[0][0]  # key 0 and element 2^33, key 2^32 and element 0


def test_mix_gives_splitmix64s_known_answers() -> None:
    """The first five outputs of the generator seeded with 1234567: the finalizer of seed + n * golden ratio."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mix(1234567 + n * 0x9E3779B97F4A7C15) for n in range(1, 6)] == expected


def test_key_follows_its_definition() -> None:
    """A tensor's stream is output `tensor + 1` of the generator seeded with `seed`, a key output t of that stream's."""
    assert random_key(1234567, 0, 1) == mix(6457827717110365317 + 0x9E3779B97F4A7C15)
    assert random_key(1234567, 4, 10) == mix(16408922859458223821 + 10 * 0x9E3779B97F4A7C15)
    assert random_key(-1, 0, 1) == random_key(2**64 - 1, 0, 1)
    assert random_key(2**64 + 5, 3, 2) == random_key(5, 3, 2)


def test_keys_differ() -> None:
    """Neighbouring seeds, tensors and steps share no key, and the tensor is not interchangeable with the step."""
    keys = {random_key(seed, tensor, t) for seed in range(10) for tensor in range(20) for t in range(50)}
    assert len(keys) == 10 * 20 * 50
    assert all(0 <= key < 2**64 for key in keys)


STREAMS = {
    "element": lambda n: random_words(random_key(0, 0, 1), np.arange(1, n + 1)),
    "distant_element": lambda n: random_words(random_key(0, 0, 1), np.arange(2**33, 2**33 + n)),
    "step": lambda n: random_words(random_key(0, 0, 2), np.arange(n)),
    "tensor": lambda n: random_words(random_key(0, 1, 1), np.arange(n)),
    "seed": lambda n: random_words(random_key(1, 0, 1), np.arange(n)),
    "tensor_for_step": lambda n: random_words(random_key(0, 1, 0), np.arange(n)),
}


@pytest.mark.parametrize("other", list(STREAMS))
def test_words_of_neighbours_are_independent(other: str) -> None:
    """Against the next element, an element 2^33 further, the next step, tensor and seed: no bit leans on any other.

    Each of 32 x 32 pairs of bits agrees in half of 2^16 draws, the rounding halves do not correlate, and as many words
    as chance allows occur in both.
    """
    n = 1 << 16
    a, b = random_words(random_key(0, 0, 1), np.arange(n)), STREAMS[other](n)
    bits_of_a, bits_of_b = (((x[:, None] >> np.arange(32, dtype=np.uint32)) & 1) * 2.0 - 1 for x in (a, b))
    agreement = bits_of_a.T @ bits_of_b  # sums of n signs: integers, exact in float64
    assert np.abs(agreement).max() <= STANDARD_ERRORS * math.sqrt(n)
    low_a, low_b = ((x & np.uint32(0xFFFF)).astype(np.float64) for x in (a, b))
    assert abs(np.corrcoef(low_a, low_b)[0, 1]) <= STANDARD_ERRORS / math.sqrt(n)
    if other != "element":
        in_both = np.intersect1d(a, b).size  # about Poisson, of mean and variance n^2 / 2^32 = 1
        assert in_both <= 1 + STANDARD_ERRORS


def test_words_are_uniform() -> None:
    """Each of the 32 bits is set in half of a million words, and the low half's 256 classes are equally filled."""
    n = 1 << 20
    words = random_words(random_key(0, 0, 1), np.arange(n))
    for bit in range(32):
        assert_share(np.count_nonzero(words >> np.uint32(bit) & np.uint32(1)), n, 0.5)
    counts = np.bincount((words & np.uint32(0xFFFF)) >> np.uint32(8), minlength=256)
    chi_squared = float(np.sum((counts - n / 256) ** 2) / (n / 256))
    assert abs(chi_squared - 255) <= STANDARD_ERRORS * math.sqrt(2 * 255)


# --- structure --------------------------------------------------------------------------------------------


def test_nothing_is_written_in_place_and_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    """Inputs survive, and infinities, NaN, overflow and a loss scale of 0 pass without a warning."""
    grad = float32(INF, -INF, NAN, np.finfo(np.float32).max, 2.0**-149, 0, 1e30, -1e-30)
    arrays = dict(grad=grad, p=grad[::-1].copy(), m=grad.copy(), v=np.abs(grad), words=np.arange(8, dtype=np.uint32))
    before = {name: array.copy() for name, array in arrays.items()}
    p, grad, m, v, words = (arrays[name] for name in ("p", "grad", "m", "v", "words"))
    partials = norm_partials(grad, "float32")
    norm_partials(np.array([1e200, NAN, INF]), "float64")
    for scale in (0.0, INF, NAN, 1e-320):
        decision = decide([total(partials), [1e308, 1e308]], scale, skip_nonfinite=True, max_skip_norm=1.0)
        coefficients(1, **HYPER, inv_scale=decision.inv_scale, norm=decision.norm, max_grad_norm=1.0)
    masks = dict(cautious=True, cautious_weight_decay=True)
    step_exact(p, grad, m, v, None, 1, param_dtype="float32", grad_dtype="float32", **HYPER, **masks)
    adamw_float64(p, grad, m, v, None, 1, **HYPER, **masks)
    ema_exact(m, p, np.float32(0.5), "float32", "float32")
    ema_exact(store(m, "bfloat16"), p, np.float32(0.5), "float32", "bfloat16", words)
    ema_exact(store(m, "bfloat16"), np.full(8, 1e300), np.float64(0.5), "float64", "bfloat16", words)
    for name, array in arrays.items():
        np.testing.assert_array_equal(bits(array), bits(before[name]))
    assert not recwarn.list


def test_zero_dimensional_arrays_keep_dtype_and_shape() -> None:
    """A 0-dim array follows NumPy's scalar rules and must not widen, with every option on."""
    one = np.array(1.0, dtype=np.float32)
    word = random_words(random_key(0, 0, 1), np.array(0))
    options = dict(cautious=True, cautious_weight_decay=True, inv_scale=0.5, norm=2.0, max_grad_norm=1.0)
    for dtype in ("float32", "bfloat16", "float16"):
        p = store(one, dtype)
        got, m, v, _ = step_exact(p, p, one, one, None, 1, param_dtype=dtype, grad_dtype=dtype, **HYPER, **options)
        e = ema_exact(one, got, np.float32(0.5), dtype, "float32")
        half = ema_exact(store(one, "bfloat16"), got, np.float32(0.5), dtype, "bfloat16", word)
        assert got.shape == m.shape == v.shape == e.shape == half.shape == ()
        assert (got.dtype, m.dtype, v.dtype, e.dtype, half.dtype) == (
            p.dtype,
            "float32",
            "float32",
            "float32",
            "uint16",
        )
