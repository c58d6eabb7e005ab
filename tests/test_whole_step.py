"""The whole step has the judge's bits on every path: norms, clipping, loss scale, guards, averages, cautious variants.

Every test compares every stored bit, the memory around every tensor, and the norms in float64 with
`problems.WholeStep`, in which the judge takes the step over all parameter groups.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATHS, Path
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    AMSGRAD,
    DTYPE_PAIRS,
    FLAGS,
    HYPER,
    PLAIN,
    TORCH_DTYPE,
    Case,
    Group,
    Guarded,
    Training,
    WholeStep,
    check_all,
    explore,
    make_case,
    stored,
    update_lists,
)
from reference import compute_dtype, load, norm_partials, store, total

from adamw_kernels import FusedAdamW, backends

# The interpreter computes with NumPy, which warns of the overflows and NaN that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# For what only the CPU's threads and modes may change; the fixture `path` takes these in place of its own.
NATIVE = pytest.mark.parametrize("path", [path for path in PATHS if path.backend == "cpu"], ids=str, indirect=True)

CAUTIOUS = [dict(cautious=True), dict(cautious_weight_decay=True), dict(cautious=True, cautious_weight_decay=True)]
# Without decay of the weight there is none to be cautious about, and the optimizer refuses both together.
CAUTIOUS_FLAGS = [
    {**flags, **cautious}
    for flags, cautious in itertools.product(FLAGS, CAUTIOUS)
    if flags["decoupled"] or "cautious_weight_decay" not in cautious
]

# bfloat16 averages are refused beside float64 parameters.
NARROW_PAIRS = [(param, grad) for param, grad in DTYPE_PAIRS if param != "float64"]
WIDE_PAIRS = [(param, grad) for param, grad in DTYPE_PAIRS if param == "float64"]

NAN, INF = np.nan, np.inf


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def set_chunk_size(path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    """Give the path's backend another chunk size for the duration of a test."""
    monkeypatch.setattr(type(backends.choose(path.device)), "chunk_size", chunk_size)


# Every dtype once as a parameter's and once as a gradient's, against the order of the table.
FOUR_PAIRS = [("float64", "float64"), ("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]


def small_cases(rng: np.random.Generator, path: Path, count: int, **options: Any) -> list[Case]:
    """Return cases of 5 to 13 elements, of `FOUR_PAIRS` in turn: each pair is a launch, which the interpreter feels."""
    return [make_case(rng, (5 + i % 9,), *FOUR_PAIRS[i % 4], path.device, **options) for i in range(count)]


def poke(case: Case, element: int, value: float) -> None:
    """Give one element of a gradient a value."""
    grad = case.arrays["grad"].copy()
    grad[element] = store(compute_dtype(case.grad_dtype)(value), case.grad_dtype)
    case.write("grad", grad)


def partials_of(cases: list[Case]) -> np.ndarray:
    """Return the judge's partial sums of these gradients, in this order."""
    return np.concatenate([norm_partials(case.grad_in_memory_order(), case.grad_dtype) for case in cases])


# --- the norm and clipping by it --------------------------------------------------------------------------------------

# Sizes around a row of lanes and around a norm chunk, shapes whose memory is in another order, and odd addresses.
EVERY_SHAPE = [(0,), (1,), (1023,), (1024,), (1025,), (16383,), (16384,), (16385,), (40000,), (4, 6, 5, 7), (40, 30)]
CHANNELS_LAST, TRANSPOSED = (210, 1, 42, 6), (1, 40)


def every_shape(rng: np.random.Generator, path: Path) -> list[Case]:
    """Return a case a shape, each of another pair of dtypes; every second gradient starts at an odd address."""
    cases = []
    for i, shape in enumerate(EVERY_SHAPE):
        strides = {4: CHANNELS_LAST, 2: TRANSPOSED}.get(len(shape))
        offsets = {"grad": i % 4} if i % 2 else {}
        pair = DTYPE_PAIRS[-1 - i]
        cases.append(make_case(rng, shape, *pair, path.device, strides=strides, offsets=offsets))
    contiguous = Guarded((40, 30), cases[-1].grad_dtype, path.device)  # the gradient of a transposed parameter
    contiguous.write(cases[-1].arrays["grad"])
    cases[-1].tensors["grad"] = contiguous
    return cases


def test_clipping_at_every_size(path: Path) -> None:
    """One norm over eleven tensors of as many dtype pairs, empty to 40,000 elements, clips them all; two steps."""
    rng = np.random.default_rng(101)
    training = Training([Group(every_shape(rng, path), options=dict(max_grad_norm=1.0))])
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")
        assert training.judge.decision.norm > 2.0, "clipped"
        training.renew_grads(rng)


def test_norm_in_memory_order(path: Path) -> None:
    """Squares are added in the order of the parameter's memory, whatever the gradient's layout: its shape shows."""
    rng = np.random.default_rng(102)
    shape = (2, 3, 40, 50)
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    case = make_case(rng, shape, "float64", "float32", path.device, strides=strides)
    training = Training([Group([case], options=dict(max_grad_norm=0.1))])
    training.step()
    training.check("channels_last")
    logical = norm_partials(np.ravel(case.arrays["grad"]), "float32")
    assert total(logical) != total(partials_of([case])), "the two orders could not be told apart"


def test_norm_of_squares_that_no_float32_holds(path: Path) -> None:
    """Gradients from the smallest subnormal to the largest float32 have a norm; in float64, squares may overflow."""
    rng = np.random.default_rng(103)
    cases = [make_case(rng, (9,), *pair, path.device) for pair in DTYPE_PAIRS]
    training = Training([Group(cases, options=dict(max_grad_norm=1.0))], skip_nonfinite=True)
    info = {dtype: torch.finfo(TORCH_DTYPE[dtype]) for dtype in TORCH_DTYPE}
    for case in cases:
        for element, value in enumerate((info[case.grad_dtype].max, info[case.grad_dtype].tiny / 2, -1e-7)):
            poke(case, element, min(value, 1e150))
    training.step()
    training.check("finite")
    assert 3e38 < training.judge.decision.norm < 1e151
    for case in cases:
        case.write("grad", np.zeros_like(case.arrays["grad"]))
        poke(case, 3, info[case.grad_dtype].tiny * info[case.grad_dtype].eps)
    training.step()
    training.check("subnormal")
    assert 0 < training.judge.decision.norm < 1e-6
    overflows = next(case for case in cases if case.grad_dtype == "float64")
    poke(overflows, 0, 1e160)
    training.step()
    training.check("overflow")
    assert training.judge.decision.norm == INF and training.judge.decision.skip


def test_order_is_that_of_the_parameters(path: Path) -> None:
    """However dtypes order the table, partial sums are added in the order of the parameters, also across groups.

    Four of them, as (1e16 + 0) + (1 + 1); in the table's order, (1 + 1e16) + (1 + 0), both ones would be lost.
    """
    rng = np.random.default_rng(104)
    cases = [make_case(rng, (1,), *pair, path.device) for pair in 2 * [("float64", "float64"), ("float32", "float16")]]
    for case, value in zip(cases, (1e8, 1.0, 0.0, 1.0), strict=True):
        poke(case, 0, value)
    training = Training([Group(part, options=dict(max_grad_norm=0.5)) for part in (cases[:1], cases[1:])])
    training.step()
    training.check("alternating dtypes")
    partials = partials_of(cases)
    assert total(partials) == 1e16 + 2 and total(partials[[1, 3, 0, 2]]) == 1e16


def test_split_into_groups_does_not_matter(path: Path) -> None:
    """In one group, one group each or any other split in the same order: the same norm, weights, moments, averages."""
    results = []
    for ends in ([9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 4, 9]):
        rng = np.random.default_rng(105)
        cases = [
            make_case(rng, (3 + i,), *NARROW_PAIRS[8 - i % 3 * 4], path.device, ema_format="bfloat16") for i in range(9)
        ]
        options = dict(max_grad_norm=0.7, ema_decay=0.9, ema_format="bfloat16")
        parts = [cases[begin:end] for begin, end in itertools.pairwise([0, *ends])]
        training = Training([Group(part, options=options) for part in parts], seed=7)
        for step in range(2):
            training.step()
            training.check(f"step {step + 1}, groups that end at {ends}")
        keys = ("param", "exp_avg", "exp_avg_sq", "param_ema")
        results.append([stored(case[key]).tobytes() for case in cases for key in keys])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("chunk_size", [16, 48, 4096, 1 << 20])
def test_chunk_size_does_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    """Chunks of the update do not show in norms, clipping, averages or random bits."""
    set_chunk_size(path, monkeypatch, chunk_size)
    rng = np.random.default_rng(106)
    sizes = [0, 1, 47, 48, 49] if chunk_size < 100 else [0, 1, 1025, 4097]
    groups = []
    for pairs, ema_format in ((NARROW_PAIRS[2:], "bfloat16"), (WIDE_PAIRS, "float32")):
        cases = [
            make_case(rng, (n,), *pair, path.device, ema_format=ema_format)
            for n, pair in zip(sizes, itertools.cycle(pairs), strict=False)
        ]
        groups.append(Group(cases, options=dict(max_grad_norm=0.3, ema_decay=0.99, ema_format=ema_format)))
    training = Training(groups)
    for step in range(2):
        training.step()
        training.check(f"step {step + 1} in chunks of {chunk_size}")
    (table,) = training.optimizer._internals.stepper.plan.tables
    assert table.chunk_size == chunk_size


@NATIVE
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk_size", [16, 1 << 14])
def test_thread_count_does_not_matter(
    path: Path, threads: None, monkeypatch: pytest.MonkeyPatch, num_threads: int, chunk_size: int
) -> None:
    """200,000 elements, enough for eight threads: the judge's norm, weights and averages on any number of threads."""
    set_chunk_size(path, monkeypatch, chunk_size)
    torch.set_num_threads(num_threads)
    rng = np.random.default_rng(107)
    pairs = [("bfloat16", "float32"), ("float32", "float32"), ("float32", "float16"), ("float16", "bfloat16")]
    cases = [
        make_case(rng, (n,), *pair, path.device, ema_format="bfloat16")
        for n, pair in zip([150_001, 50_000, 0, 2], pairs, strict=True)
    ]
    options = dict(max_grad_norm=0.5, ema_decay=0.9, ema_format="bfloat16")
    training = Training([Group(cases, flags=AMSGRAD, options=options)], skip_nonfinite=True)
    training.step()
    training.check(f"{num_threads} threads")


@NATIVE
def test_many_threads_and_many_small_tensors(path: Path, threads: None) -> None:
    """1,400 tensors, whose partial sums fill more than one row of lanes, measured and updated by eight threads."""
    torch.set_num_threads(8)
    rng = np.random.default_rng(108)
    cases = [
        make_case(rng, (i % 5,), *DTYPE_PAIRS[-1 - i % 13], path.device, steps_taken=i % 50, ema_format="float32")
        for i in range(1400)
    ]
    options = dict(max_grad_norm=0.5, ema_decay=0.9, ema_warmup=True)
    training = Training([Group(part, options=options) for part in (cases[:700], cases[700:])])
    training.step()
    training.check("eight threads")


@NATIVE
def test_flushing_subnormals_elsewhere_does_not_matter(path: Path, threads: None) -> None:
    """`torch.set_flush_denormal(True)` changes no bit of a norm whose squares are subnormal in float64."""
    torch.set_num_threads(2)
    rng = np.random.default_rng(109)
    case = make_case(rng, (40_000,), "float64", "float64", path.device)
    case.write("grad", 1e-157 * case.arrays["grad"])
    training = Training([Group([case], options=dict(max_grad_norm=1e-170))])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        training.optimizer.step()
    finally:
        torch.set_flush_denormal(False)  # before the judge computes
    training.judge.take()
    training.check("while flushing")
    assert 0 < training.judge.decision.norm < 1e-154


def test_gradients_that_come_and_go(path: Path) -> None:
    """A parameter without a gradient adds nothing to the norm, keeps its own bits, and takes part again later."""
    rng = np.random.default_rng(110)
    cases = small_cases(rng, path, 9, ema_format="float32")
    options = dict(max_grad_norm=0.2, ema_decay=0.9)
    training = Training([Group(cases[:5], options=options), Group(cases[5:], options=options)], clip_per_group=True)
    for absent in ([], cases[:1], cases[4:7], cases[5:], cases, []):
        training.give_grads(absent)
        training.step()
        training.check(f"{len(absent)} of 9 without a gradient")
        training.renew_grads(rng)


def test_parameter_that_never_had_a_gradient_does_not_matter(path: Path) -> None:
    """A frozen parameter among the others: the norm's every bit is that of an optimizer without it.

    Its place in the sum stays empty only after it has had a gradient: (1e16 + 1) + 1 here, then (1e16 + 0) + (1 + 1).
    """
    rng = np.random.default_rng(139)
    cases = [make_case(rng, (1,), "float64", "float64", path.device) for _ in range(3)]
    for case, value in zip(cases, (1e8, 1.0, 1.0), strict=True):
        poke(case, 0, value)
    training = Training([Group(cases, options=dict(max_grad_norm=0.5))])
    frozen = torch.nn.Parameter(torch.ones((1,), device=path.device), requires_grad=False)
    training.optimizer.param_groups[0]["params"].insert(2, frozen)
    training.step()
    training.check("a frozen parameter")
    partials = partials_of(cases)
    assert total(partials) == 1e16 and total(np.insert(partials, 2, 0.0)) == 1e16 + 2


def test_group_whose_parameters_are_forgotten(path: Path) -> None:
    """A group that takes no part in a new plan has norm 0, not that of its last step."""
    rng = np.random.default_rng(111)
    first, second = small_cases(rng, path, 2)
    options = dict(max_grad_norm=0.2)
    training = Training([Group([first], options=options), Group([second], options=options)], clip_per_group=True)
    training.step()
    training.check("both")
    assert training.judge.decision.norms[1] > 0
    training.give_grads([second])
    del training.optimizer.state[training.params[1][0]]
    training.set_option(0, "max_grad_norm", None)  # another plan
    training.step()
    training.check("one")
    assert training.judge.decision.norms[1] == 0


# --- what clips whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_per_group", [False, True], ids=["global", "per-group"])
def test_limits_of_groups(path: Path, clip_per_group: bool) -> None:
    """Groups that clip hard, hardly, only measure, or have no limit: norms and bits, by the joint norm or each its own.

    Gradients of the group without a limit count in the joint norm, and enter unclipped.
    """
    rng = np.random.default_rng(112)
    limits = [0.5, None, INF, 1e-3, 1e6]
    groups = [
        Group(small_cases(rng, path, 4), HYPER | dict(lr=0.01 * (i + 1)), FLAGS[i], dict(max_grad_norm=limit))
        for i, limit in enumerate(limits)
    ]
    training = Training(groups, clip_per_group=clip_per_group)
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")
        training.renew_grads(rng)
    norms = training.judge.decision.norms
    assert len(norms) == (5 if clip_per_group else 1) and norms[0] > 0.5


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_limit_that_changes(path: Path, dtype: torch.dtype | None) -> None:
    """A float assigned to the group, or a tensor written in place: the next step clips by the new value."""
    rng = np.random.default_rng(113)
    limit = 0.3 if dtype is None else torch.tensor([0.3], dtype=dtype, device=path.device)
    cases = [make_case(rng, (20,), *pair, path.device) for pair in DTYPE_PAIRS[::6]]
    training = Training([Group(cases, options=dict(max_grad_norm=limit))])
    for value in (0.3, 0.0123, 1e9):
        if isinstance(limit, torch.Tensor):
            limit.fill_(value)
        else:
            training.set_option(0, "max_grad_norm", value)
        training.step()
        training.check(f"limit {value}")


def test_limit_that_is_switched_on_and_off(path: Path) -> None:
    """None, then a number, then a tensor, then None again in one of two groups, between steps."""
    rng = np.random.default_rng(114)
    groups = [Group(small_cases(rng, path, 3), options=dict(max_grad_norm=limit)) for limit in (None, 0.4)]
    training = Training(groups)
    for limit in (None, 0.01, torch.tensor(0.02, device=path.device), None):
        training.set_option(0, "max_grad_norm", limit)
        training.step()
        training.check(f"limit {limit}")


def test_infinite_limit_measures_only(path: Path) -> None:
    """max_grad_norm=inf: the norm, and the very bits of a step without it."""
    rng = np.random.default_rng(115)
    cases, alone = (small_cases(np.random.default_rng(116), path, 13) for _ in range(2))
    measured = Training([Group(cases, options=dict(max_grad_norm=INF))])
    plain = Training([Group(alone)])
    for step in range(2):
        for training in (measured, plain):
            training.step()
            training.check(f"step {step + 1}")
        assert float(measured.optimizer.grad_norm) > 0
        for case, twin in zip(cases, alone, strict=True):
            for key in case.tensors:
                assert stored(case[key]).tobytes() == stored(twin[key]).tobytes(), key
            case.renew_grad(rng)
            twin.write("grad", case.arrays["grad"])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_clipping_by_a_norm_that_is_no_number(path: Path, value: float) -> None:
    """Without a guard a NaN norm makes everything NaN and an infinite one clips to 0, exactly as the judge has it."""
    rng = np.random.default_rng(117)
    cases = small_cases(rng, path, 13)
    poke(cases[4], 1, value)
    training = Training([Group(cases, options=dict(max_grad_norm=1.0))])
    training.step()
    training.check(f"{value}")
    assert np.isnan(cases[0].arrays["param"]).all() == np.isnan(value)


# --- the loss scale ---------------------------------------------------------------------------------------------------


def signal(path: Path, value: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Return what a loss scaler would set on the optimizer."""
    return torch.full(shape, value, dtype=dtype, device=path.device)


@pytest.mark.parametrize("max_grad_norm", [None, 0.01], ids=["unclipped", "clipped"])
def test_loss_scale(path: Path, max_grad_norm: float | None) -> None:
    """Gradients are divided by the scale in `scale`, together with clipping; the norm is that of unscaled gradients.

    Powers of two and others, also such that unscaling overflows or gives NaN; scalars and vectors of one element.
    """
    rng = np.random.default_rng(118)
    groups = [
        Group(small_cases(rng, path, 4), HYPER, flags, dict(max_grad_norm=max_grad_norm)) for flags in (PLAIN, FLAGS[3])
    ]
    training = Training(groups, fused=True)
    kinds = itertools.cycle(itertools.product([torch.float32, torch.float64], [(), (1,)]))
    for scale in (65536.0, 3.0, 1.0, 2.0**-20, 1e-3, -2.0, 1e38, INF):
        dtype, shape = next(kinds)
        training.step(signal(path, scale, dtype, shape), signal(path, 0.0))
        training.check(f"loss scale {scale}, {dtype}, {shape}")


@pytest.mark.parametrize("max_grad_norm", [None, 0.01], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("scale", [0.0, NAN, -INF])
def test_loss_scale_that_is_no_scale(path: Path, scale: float, max_grad_norm: float | None) -> None:
    """1 / scale is infinite, NaN or 0: whatever the sequence gives is the answer."""
    rng = np.random.default_rng(119)
    training = Training([Group(small_cases(rng, path, 5), options=dict(max_grad_norm=max_grad_norm))], fused=True)
    training.step(signal(path, scale))
    training.check(f"loss scale {scale}")


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, ()), (torch.float64, (1,))], ids=["scalar", "vector"])
def test_found_inf(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Anything but 0 skips: no byte of weights, moments, maxima, step counts or averages moves, and it is counted."""
    rng = np.random.default_rng(120)
    cases = small_cases(rng, path, 4, ema_format="float32")
    training = Training([Group(cases, HYPER, AMSGRAD, dict(ema_decay=0.9))], fused=True)
    skips = 0
    for value in (1.0, 0.0, 2.0, NAN, -1.0, 0.0, -0.0, 1e-30, INF):
        training.step(signal(path, 8.0, dtype, shape), signal(path, value, dtype, shape))
        training.check(f"found_inf {value}")
        skips += value != 0
        assert training.judge.skipped_steps == skips
    assert skips == 6


@pytest.mark.parametrize("fused", [None, True])
def test_loss_scale_that_comes_and_goes(path: Path, fused: bool | None) -> None:
    """Attributes set by hand count for the step they are set for, also on an optimizer that did not expect them."""
    rng = np.random.default_rng(121)
    training = Training([Group(small_cases(rng, path, 5))], fused=fused)
    scale, found = signal(path, 4.0), signal(path, 1.0)
    for number, (grad_scale, found_inf) in enumerate(
        [(None, None), (scale, None), (None, found), (None, None), (scale, found), (scale, None), (None, None)]
    ):
        training.step(grad_scale, found_inf)
        training.check(f"step {number + 1}")


# --- guards -----------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_skip(path: Path) -> None:
    """inf, -inf or NaN as a first, last or inner element of a gradient of any dtype: nothing changes; then it goes on.

    The largest finite value of a dtype (1e150 in float64, whose square must be finite) skips nothing.
    """
    rng = np.random.default_rng(122)
    cases = [make_case(rng, (1030,), *pair, path.device, ema_format="float32") for pair in FOUR_PAIRS]
    training = Training([Group(cases, options=dict(ema_decay=0.9))], skip_nonfinite=True)
    places = itertools.cycle([0, 1029, 517, 1023, 1024])
    skips = 0
    for case, value in itertools.product(cases, (NAN, INF, -INF)):
        kept, place = case.arrays["grad"], next(places)
        poke(case, place, value)
        training.step()
        skips += 1
        assert training.judge.skipped_steps == skips
        training.check(f"{value} at {place} of a {case.grad_dtype} gradient")
        case.write("grad", kept)
    for case in cases:
        poke(case, next(places), min(torch.finfo(TORCH_DTYPE[case.grad_dtype]).max, 1e150))
    training.step()
    training.check("large and finite")
    assert not training.judge.decision.skip


def test_largest_float32_does_not_skip(path: Path) -> None:
    """A whole gradient of 1e38: its norm is beyond float32, and yet finite."""
    case = make_case(np.random.default_rng(123), (1030,), "float32", "float32", path.device)
    case.write("grad", np.full((1030,), 1e38, dtype=np.float32))
    training = Training([Group([case], options=dict(max_grad_norm=1.0))], skip_nonfinite=True)
    training.step()
    training.check("1e38")
    assert training.judge.decision.norm > 3e39 and not training.judge.decision.skip


@pytest.mark.parametrize("clip_per_group", [False, True], ids=["global", "per-group"])
@pytest.mark.parametrize("kind", [None, torch.float32], ids=["float", "tensor"])
def test_largest_norm_allowed(path: Path, kind: torch.dtype | None, clip_per_group: bool) -> None:
    """max_skip_norm exactly at the joint norm lets the step through; the next number below it, or a NaN, does not."""
    rng = np.random.default_rng(124)
    cases = small_cases(rng, path, 4)
    for case in cases:
        case.write("grad", np.zeros_like(case.arrays["grad"]))
    poke(cases[0], 3, 3.0)
    poke(cases[3], 1, -4.0)  # the joint norm is exactly 5
    groups = [Group(part, options=dict(max_grad_norm=1.0)) for part in (cases[:2], cases[2:])]
    limit = 5.0 if kind is None else torch.tensor(5.0, dtype=kind, device=path.device)
    training = Training(groups, max_skip_norm=limit, clip_per_group=clip_per_group)

    def step(skips: bool, what: str) -> None:
        training.step()
        training.check(what)
        assert training.judge.decision.skip == skips, what

    step(False, "norm 5, limit 5")
    poke(cases[1], 0, 2.0**-20)
    step(True, "norm above 5")
    poke(cases[1], 0, 0.0)
    poke(cases[0], 3, 2.0)
    step(False, "norm below 5")
    poke(cases[1], 0, NAN)
    step(True, "norm NaN")
    poke(cases[1], 0, INF)
    step(True, "norm inf")
    poke(cases[1], 0, 0.0)
    if isinstance(limit, torch.Tensor):
        limit.fill_(4.0)
        step(True, "limit 4")
        limit.fill_(INF)
        step(False, "limit inf")
        poke(cases[1], 0, NAN)
        step(True, "limit inf, norm NaN")


def test_largest_norm_allowed_counts_unscaled(path: Path) -> None:
    """The limit is compared with the norm of unscaled gradients; a finite norm that overflows unscaled is above it."""
    rng = np.random.default_rng(125)
    case = make_case(rng, (4,), "float64", "float32", path.device)
    case.write("grad", np.array([0, 3, 0, -4], dtype=np.float32))
    training = Training([Group([case])], max_skip_norm=5.0, skip_nonfinite=True, fused=True)
    for scale, skips in ((1.0, False), (0.5, True), (2.0, False), (-1.0, False), (0.0, True), (NAN, True)):
        training.step(signal(path, scale), signal(path, 0.0))
        training.check(f"loss scale {scale}")
        assert training.judge.decision.skip == skips


# --- averages of the weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_averages(path: Path, ema_format: str) -> None:
    """Every dtype, with warm-up and without, decays as floats and tensors, with every flag; one group without any."""
    rng = np.random.default_rng(126)
    pairs = NARROW_PAIRS if ema_format == "bfloat16" else DTYPE_PAIRS
    live = torch.tensor(0.97, device=path.device)
    double = torch.tensor([0.6], dtype=torch.float64, device=path.device)
    decays: list[Any] = [0.9999, 0.0, live, double, 0.5, 1 - 2.0**-53, 0.75, None]
    groups = []
    for i, (decay, flags) in enumerate(zip(decays, FLAGS, strict=True)):
        options = {} if decay is None else dict(ema_decay=decay, ema_format=ema_format, ema_warmup=i % 3 == 0)
        cases = [
            make_case(rng, (3 + k,), *pair, path.device, steps_taken=5**k // 125, ema_format=ema_format)
            for k, pair in enumerate(pairs)
            if k % 2 == i % 2
        ]
        groups.append(Group(cases, HYPER, flags, options))
    training = Training(groups, seed=11)
    before = [stored(case["param_ema"]).tobytes() for case in groups[-1].cases]
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")
        training.renew_grads(rng)
        live.fill_(0.1)
        training.set_option(4, "ema_decay", 0.25)
    assert before == [stored(case["param_ema"]).tobytes() for case in groups[-1].cases], "no decay, no average"


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_averages_of_special_values(path: Path, ema_format: str) -> None:
    """Zeros, infinities, NaN, subnormals and largest values, in weights and averages: same bits or both NaN."""
    rng = np.random.default_rng(127)
    pairs = NARROW_PAIRS if ema_format == "bfloat16" else DTYPE_PAIRS
    groups = []
    for decay in (0.0, 0.9):
        cases = [make_case(rng, (700,), *pair, path.device, special=True, ema_format=ema_format) for pair in pairs]
        groups.append(Group(cases, options=dict(ema_decay=decay, ema_format=ema_format)))
    training = Training(groups, seed=3)
    training.step()
    training.check("special values")


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_averages_in_any_layout(path: Path, ema_format: str) -> None:
    """Averages beside channels_last and transposed parameters, and at addresses that no other operand has."""
    rng = np.random.default_rng(128)
    pairs = NARROW_PAIRS[::4] if ema_format == "bfloat16" else DTYPE_PAIRS[::6]
    cases = []
    for pair in pairs:
        for shape, strides in (((2, 3, 4, 5), (60, 1, 15, 3)), ((6, 7), (1, 6)), ((1, 5, 1), (9, 1, 77)), ((), ())):
            cases.append(make_case(rng, shape, *pair, path.device, strides=strides, ema_format=ema_format))
        for past, further in itertools.product((0, 3), (0, 1, 4)):
            offsets = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), past) | dict(param_ema=past + further)
            cases.append(make_case(rng, (50,), *pair, path.device, offsets=offsets, ema_format=ema_format))
        alike = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "param_ema"), 5)
        cases.append(make_case(rng, (2060,), *pair, path.device, offsets=alike, ema_format=ema_format))
    training = Training([Group(cases, options=dict(ema_decay=0.8, ema_format=ema_format))])
    training.step()
    training.check("layouts")


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_new_average_starts_at_the_weight(path: Path, ema_format: str) -> None:
    """Without a state there is none yet: it starts as the weight before the first step, to nearest, in its layout."""
    rng = np.random.default_rng(129)
    shape, strides = (2, 3, 4, 5), (60, 1, 15, 3)
    cases = [
        make_case(rng, shape, *pair, path.device, strides=strides, ema_format=ema_format)
        for pair in (NARROW_PAIRS if ema_format == "bfloat16" else DTYPE_PAIRS)
    ]
    training = Training([Group(cases, options=dict(ema_decay=0.9, ema_format=ema_format))])
    for p, case, _ in training:
        del training.optimizer.state[p]["param_ema"]
        values = load(case.arrays["param"], case.param_dtype, compute_dtype(case.param_dtype))
        case.write("param_ema", store(values, case.dtypes["param_ema"]))
    for _ in range(2):
        training.step()
    for p, case, _ in training:
        average = training.optimizer.state[p]["param_ema"]
        assert average.stride() == p.stride()
        case.tensors["param_ema"].write(stored(average))
    training.check("two steps")


# --- random bits ------------------------------------------------------------------------------------------------------


def test_seeds(path: Path) -> None:
    """The judge's bits for any integer as seed; another seed changes the averages and nothing else."""
    results = {}
    for seed in (0, 1, -1, 2**64 - 1, 2**63, 123456789012345678901234567890):
        rng = np.random.default_rng(130)
        cases = [make_case(rng, (600,), *pair, path.device, ema_format="bfloat16") for pair in NARROW_PAIRS[::4]]
        training = Training([Group(cases, options=dict(ema_decay=0.9, ema_format="bfloat16"))], seed=seed)
        training.step()
        training.check(f"seed {seed}")
        results[seed] = {
            key: b"".join(stored(case[key]).tobytes() for case in cases) for key in ("param", "exp_avg", "param_ema")
        }
    assert len({result["param_ema"] for result in results.values()}) == 5, "-1 and 2^64 - 1 are one seed modulo 2^64"
    assert results[-1] == results[2**64 - 1]
    assert len({(result["param"], result["exp_avg"]) for result in results.values()}) == 1


def test_equal_tensors_round_differently(path: Path) -> None:
    """Parameters, elements and steps that are equal in everything else draw random bits of their own.

    The average moves by 0.3 units in the last place: about a third of the elements is rounded up.
    """
    ones = np.ones((256,), dtype=np.float32)
    values = dict(param=(1 + 3 * 2.0**-7) * ones, grad=0 * ones, param_ema=store(ones, "bfloat16"))
    rng = np.random.default_rng(131)
    cases = [make_case(rng, (256,), "float32", "float32", path.device, ema_format="bfloat16") for _ in range(2)]
    options = dict(ema_decay=0.9, ema_format="bfloat16")
    training = Training([Group(cases, HYPER | dict(lr=0.0), options=options)])
    seen = []
    for step in range(2):
        for case, (key, value) in itertools.product(cases, values.items()):
            case.write(key, value)
        training.step()
        training.check(f"step {step + 1}")
        seen += [stored(case["param_ema"]) for case in cases]
    for drawn in seen:
        assert set(drawn - values["param_ema"]) == {0, 1} and 0.15 < np.mean(drawn != values["param_ema"]) < 0.45
    assert len({drawn.tobytes() for drawn in seen}) == 4


@pytest.mark.parametrize("steps_taken", [0, 2**24 - 1, 2**30])
def test_random_bits_late_in_training(path: Path, steps_taken: int) -> None:
    """Keys of step counts up to where a float32 stops counting are the judge's."""
    rng = np.random.default_rng(132)
    cases = [
        make_case(rng, (40,), *pair, path.device, steps_taken=steps_taken, ema_format="bfloat16")
        for pair in NARROW_PAIRS[::3]
    ]
    options = dict(ema_decay=0.9, ema_format="bfloat16", ema_warmup=True)
    training = Training([Group(cases, options=options)])
    for step in range(2):
        training.step()
        training.check(f"step {step + 1} after {steps_taken}")


# --- cautious variants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
def test_cautious_variants(path: Path, special: bool) -> None:
    """Both masks, alone and together, with every flag and pair of dtypes, on ordinary and on special values."""
    rng = np.random.default_rng(133)
    groups = []
    for i, flags in enumerate(CAUTIOUS_FLAGS):
        pairs = DTYPE_PAIRS[i % 3 :: 3]
        cases = [make_case(rng, (300,), *pair, path.device, special=special) for pair in pairs]
        groups.append(Group(cases, HYPER, flags))
    training = Training(groups)
    training.step()
    training.check("one step")


@pytest.mark.parametrize("cautious", CAUTIOUS, ids="-".join)
def test_cautious_variants_change_something(path: Path, cautious: dict[str, bool]) -> None:
    """Each mask takes away the update, or the decay, of some elements and leaves others as they are."""
    results = []
    for flags in ({**PLAIN, **cautious}, PLAIN):
        rng = np.random.default_rng(134)
        cases = [make_case(rng, (64,), *pair, path.device) for pair in DTYPE_PAIRS[::4]]
        training = Training([Group(cases, HYPER | dict(lr=0.5), flags)])
        training.step()
        training.check(f"{flags}")
        results.append([stored(case["param"]) for case in cases])
    for masked, plain in zip(*results, strict=True):
        assert 8 < np.sum(masked != plain) < 56


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [16, 1024])
@pytest.mark.parametrize("max_grad_norm", [None, 0.25], ids=["unclipped", "clipped"])
def test_lists(path: Path, max_grad_norm: float | None, chunk_size: int) -> None:
    """`fused_adamw_` with clipping, loss scale, skips and masks has the judge's bits in chunks of any size."""
    rng = np.random.default_rng(136)
    sizes = (0, 1, 15, 17, 49, 70, 5) if chunk_size == 16 else (0, 1, 1023, 1025, 17, 5, 300)
    cases = [make_case(rng, (n,), *DTYPE_PAIRS[-1 - i], path.device) for i, n in enumerate(sizes)]
    for step, (scale, found) in enumerate([(None, None), (3.0, None), (0.1, 1.0), (None, NAN), (8.0, 0.0)]):
        flags = {**FLAGS[step], **CAUTIOUS[step % 3]}
        signals = dict(
            grad_scale=None if scale is None else signal(path, scale),
            found_inf=None if found is None else signal(path, found, shape=(1,)),
        )
        update_lists(cases, HYPER, flags, max_grad_norm=max_grad_norm, chunk_size=chunk_size, **signals)
        WholeStep([Group(cases, HYPER, flags, dict(max_grad_norm=max_grad_norm))]).take(**signals)
        check_all(cases, f"step {step + 1}")


def test_limit_as_a_tensor_in_lists(path: Path) -> None:
    """`fused_adamw_` reads max_grad_norm, a tensor, as the optimizer does."""
    rng = np.random.default_rng(137)
    cases = small_cases(rng, path, 13)
    limit = torch.tensor(0.1, device=path.device)
    update_lists(cases, HYPER, PLAIN, max_grad_norm=limit)
    WholeStep([Group(cases, options=dict(max_grad_norm=limit))]).take()
    check_all(cases, "a tensor")


# --- complex parameters -----------------------------------------------------------------------------------------------


def test_complex_parameter_is_its_pairs_of_reals(path: Path) -> None:
    """Norm, clipping and average of a complex parameter are those of the real tensor of twice its elements."""
    rng = np.random.default_rng(138)
    for dtype in ("float32", "float64"):
        real = make_case(rng, (13, 2), dtype, dtype, path.device, ema_format="float32")
        p = torch.nn.Parameter(torch.view_as_complex(real["param"].clone()))
        p.grad = torch.view_as_complex(real["grad"].clone())
        training = Training([Group([real], HYPER, AMSGRAD, dict(max_grad_norm=0.1, ema_decay=0.9))])
        hyper = dict(HYPER, betas=(HYPER["beta1"], HYPER["beta2"]))
        del hyper["beta1"], hyper["beta2"]
        opt = FusedAdamW([p], **hyper, amsgrad=True, max_grad_norm=0.1, ema_decay=0.9)
        opt.state[p] = {
            key: real[key].clone() if key == "step" else torch.view_as_complex(real[key].clone())
            for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_ema")
        }
        for step in range(2):
            training.step()
            opt.step()
            training.check(f"step {step + 1}")
            assert torch.equal(opt.grad_norm, training.optimizer.grad_norm)
            for tensor, key in ((p.detach(), "param"), *((opt.state[p][key], key) for key in ("exp_avg", "param_ema"))):
                assert torch.equal(torch.view_as_real(tensor), real[key]), key


# --- drawn by hypothesis ----------------------------------------------------------------------------------------------

POSITIVE = st.one_of(st.sampled_from([1e-6, 0.1, 1.0, 1e6]), st.floats(1e-30, 1e30))


@st.composite
def drawn_groups(draw: st.DrawFn) -> dict[str, Any]:
    """One parameter group: up to three tensors, hyperparameters, flags and options."""
    options: dict[str, Any] = dict(max_grad_norm=draw(st.one_of(st.none(), POSITIVE, st.just(INF))))
    ema_format = draw(st.sampled_from([None, "float32", "bfloat16"]))
    if ema_format is not None:
        decay = st.one_of(st.sampled_from([0.0, 0.5, 0.999, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True))
        options |= dict(ema_decay=draw(decay), ema_format=ema_format, ema_warmup=draw(st.booleans()))
    case = st.fixed_dictionaries(
        dict(
            shape=st.sampled_from([(0,), (), (1,), (7,), (3, 5), (1030,)]),
            pair=st.sampled_from(NARROW_PAIRS if ema_format == "bfloat16" else DTYPE_PAIRS),
            special=st.sampled_from([False, False, True]),
            steps_taken=st.sampled_from([0, 1, 7, 1000, 2**24]),
            offsets=st.fixed_dictionaries(
                {key: st.integers(0, 4) for key in ("param", "grad", "exp_avg", "param_ema")}
            ),
        )
    )
    return dict(
        cases=draw(st.lists(case, min_size=1, max_size=3)),
        ema_format=ema_format,
        flags=draw(st.sampled_from([*FLAGS, *CAUTIOUS_FLAGS])),
        options=options,
        hyper=dict(
            lr=draw(st.floats(0, 10)),
            beta1=draw(st.sampled_from([0.0, 0.9, 0.99])),
            beta2=draw(st.sampled_from([0.0, 0.95, 0.999])),
            eps=draw(st.sampled_from([0.0, 1e-8, 1.0])),
            weight_decay=draw(st.floats(0, 10)),
        ),
    )


@st.composite
def drawn_trainings(draw: st.DrawFn) -> dict[str, Any]:
    """An optimizer's groups and options, and what happens in each of its steps."""
    groups = draw(st.lists(drawn_groups(), min_size=1, max_size=3))
    clips = any(group["options"]["max_grad_norm"] is not None for group in groups)
    signals = st.sampled_from([None, None, 1.0, 3.0, 1024.0, 1e-3])
    flags = st.sampled_from([None, None, 0.0, 0.0, 1.0, NAN])
    return dict(
        groups=groups,
        options=dict(
            clip_per_group=clips and draw(st.booleans()),
            skip_nonfinite=draw(st.booleans()),
            max_skip_norm=draw(st.one_of(st.none(), POSITIVE)),
            seed=draw(st.integers(-(2**64), 2**64)),
        ),
        steps=draw(st.lists(st.tuples(signals, flags, st.integers(0, 2**9 - 1)), min_size=1, max_size=3)),
        values=draw(st.integers(0, 2**32 - 1)),
    )


def test_drawn_trainings(path: Path) -> None:
    """Any combination of all options, in one to three steps with gradients that come and go: the judge's bits."""

    @explore(path, 75)
    @given(drawn_trainings())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["values"])
        groups = []
        for drawn in problem["groups"]:
            cases = [
                make_case(
                    rng, case.pop("shape"), *case.pop("pair"), path.device, ema_format=drawn["ema_format"], **case
                )
                for case in map(dict, drawn["cases"])
            ]
            groups.append(Group(cases, drawn["hyper"], drawn["flags"], drawn["options"]))
        training = Training(groups, fused=True, **problem["options"])
        cases = [case for _, case, _ in training]
        for step, (scale, found, present) in enumerate(problem["steps"]):
            training.give_grads([case for i, case in enumerate(cases) if not present >> i & 1])
            training.step(
                None if scale is None else signal(path, scale), None if found is None else signal(path, found)
            )
            training.check(f"step {step + 1}")
            training.renew_grads(rng)

    check()
