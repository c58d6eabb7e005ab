"""The same inputs give the same bits on every path: NumPy's sequence, each CPU ISA, Triton, CUDA.

Every test compares every stored bit (parameters, moments, steps; the gradients, which must stay) and the memory around
every tensor with `reference.step_exact`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, PATHS, Path
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    AMSGRAD,
    DTYPE_PAIRS,
    FLAGS,
    HYPER,
    PLAIN,
    Case,
    Group,
    Training,
    check_all,
    explore,
    judge_all,
    make_case,
    ordinary_values,
    step_lists,
    update_lists,
)
from reference import compute_dtype, load, store

# The interpreter computes with NumPy, which warns of the overflows and NaN that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

PAIRS = pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPE_PAIRS)

# For what threads and the CPU's own modes may change; the fixture `path` takes these in place of its own.
NATIVE = pytest.mark.parametrize("path", [path for path in PATHS if path.backend == "cpu"], ids=str, indirect=True)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stored_like(case: Case, values: np.ndarray) -> np.ndarray:
    """Return values in the storage dtype of the case's gradient."""
    return store(values.astype(compute_dtype(case.grad_dtype)), case.grad_dtype)


def one_case_a_pair(rng: np.random.Generator, path: Path, shape: tuple[int, ...], **options: Any) -> list[Case]:
    """Return a case for every pair of dtypes."""
    return [make_case(rng, shape, *pair, path.device, **options) for pair in DTYPE_PAIRS]


# --- dtypes and flags -----------------------------------------------------------------------------------------------


@PAIRS
def test_lists_step_by_step(path: Path, param_dtype: str, grad_dtype: str) -> None:
    """Eight steps from a first one, each with other flags, hyperparameters and chunks, store the judge's bits."""
    rng = np.random.default_rng(11)
    cases = [make_case(rng, shape, param_dtype, grad_dtype, path.device) for shape in [(37,), (3, 5, 7)]]
    for case in cases:
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            case.write(moment, np.zeros_like(case.arrays[moment]))
    chunk_sizes = [None, 48, 4096, 64, 1 << 20, 112, 1024, 96]
    for step, (flags, chunk_size) in enumerate(zip(FLAGS, chunk_sizes, strict=True)):
        hyper = HYPER | dict(lr=10.0 ** -(step % 5), weight_decay=0.3 * (step % 3), beta1=0.8 + 0.02 * step)
        step_lists(cases, hyper, flags, chunk_size=chunk_size)
        check_all(cases, f"step {step + 1} {flags} {hyper} in chunks of {chunk_size}")
        for case in cases:
            case.renew_grad(rng)


def test_every_dtype_and_flag_in_one_optimizer(path: Path) -> None:
    """One table of 104 tensors in eight groups, all different: after each of five steps each has exactly its own bits.

    Every pair of dtypes meets every combination of flags; learning rates, betas, eps, decays and step counts differ.
    """
    rng = np.random.default_rng(12)
    groups = []
    for i, flags in enumerate(FLAGS):
        hyper = dict(lr=3e-3 * (i + 1), beta1=0.1 * i, beta2=1 - 0.3**i, eps=1e-8 * i, weight_decay=0.02 * i)
        hyper["beta2"] = max(hyper["beta2"], 0.5)
        cases = []
        for k, pair in enumerate(DTYPE_PAIRS):
            size = 1030 if i == k % 8 else 5 + k
            cases.append(make_case(rng, (size,), *pair, path.device, steps_taken=i * k))
        groups.append(Group(cases, hyper, flags))
    training = Training(groups)
    for step in range(5):
        training.step()
        training.check(f"step {step + 1}")
        for _, case, _ in training:
            case.renew_grad(rng)


@pytest.mark.parametrize("fused", ["lists", "optimizer"])
def test_tensors_do_not_disturb_each_other(path: Path, fused: str) -> None:
    """NaN, infinity and overflow in one tensor, or its missing gradient, leave all others as they would be alone."""
    rng = np.random.default_rng(13)
    cases = one_case_a_pair(rng, path, (20,))
    bad = cases[::3]
    for case, value in zip(bad, [np.nan, np.inf, 1e30, -np.inf, np.nan], strict=True):
        case.write("grad", stored_like(case, np.full((20,), value)))
    if fused == "lists":
        step_lists(cases, HYPER, AMSGRAD)
        check_all(cases, "with bad neighbours")
        return
    training = Training([Group(cases, HYPER, AMSGRAD)])
    training.step()
    training.check("with bad neighbours")
    without, stepped = cases[1::2], cases[::2]
    for p, case, _ in training:
        if case in without:
            p.grad = None
    training.optimizer.step()
    judge_all(stepped, HYPER, AMSGRAD)
    training.check("with neighbours that have no gradient")


# --- chunks, groups, order, threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [16, 48, 4096, 1 << 20, None])
def test_chunk_size_does_not_matter(path: Path, chunk_size: int | None) -> None:
    """Sizes on either side of a chunk's end, in chunks from 16 elements to more than a tensor has."""
    rng = np.random.default_rng(14)
    sizes = [1, 15, 16, 17, 47, 48, 49]
    if chunk_size is None or chunk_size >= 4096:
        sizes = [4095, 4096, 4097]
    pairs = [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float16")]
    cases = [make_case(rng, (n,), *pairs[i % 3], path.device) for i, n in enumerate(sizes)]
    for flags in (PLAIN, FLAGS[7]):
        step_lists(cases, HYPER, flags, chunk_size=chunk_size)
        check_all(cases, f"chunks of {chunk_size}, {flags}")


SPLITS = {
    "one-group": lambda cases: [cases],
    "a-group-each": lambda cases: [[case] for case in cases],
    "interleaved": lambda cases: [cases[::2], cases[1::2]],
    "reversed": lambda cases: [cases[::-1]],
    "halves-swapped": lambda cases: [cases[6:], cases[:6]],
}


@pytest.mark.parametrize("split", SPLITS)
def test_split_into_groups_does_not_matter(path: Path, split: str) -> None:
    """The same tensors in one group, one group each or any other split and order have the same bits after three steps.

    `rng` draws the same values for every split, and the judge sees one tensor at a time.
    """
    rng = np.random.default_rng(15)
    cases = one_case_a_pair(rng, path, (33,))
    training = Training([Group(group) for group in SPLITS[split](cases)])
    for step in range(3):
        training.step()
        training.check(f"step {step + 1}")
        for case in cases:
            case.renew_grad(rng)


def test_regrouping_between_steps_does_not_matter(path: Path) -> None:
    """A tensor that moves from one optimizer's group into another's table goes on as if nothing had happened."""
    rng = np.random.default_rng(16)
    cases = one_case_a_pair(rng, path, (9,))
    for split in ("one-group", "interleaved", "reversed"):
        training = Training([Group(group) for group in SPLITS[split](cases)])
        training.step()
        training.check(split)


@NATIVE
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk_size", [None, 16, 4096])
def test_thread_count_does_not_matter(path: Path, threads: None, num_threads: int, chunk_size: int | None) -> None:
    """200,003 elements in four tensors, enough for eight threads, have the judge's bits on any number of threads."""
    rng = np.random.default_rng(17)
    sizes = [150_001, 50_000, 0, 2]
    pairs = [("bfloat16", "float32"), ("float32", "float32"), ("float32", "float16"), ("float64", "float64")]
    cases = [make_case(rng, (n,), *pair, path.device) for n, pair in zip(sizes, pairs, strict=True)]
    torch.set_num_threads(num_threads)
    for flags in (PLAIN, FLAGS[5]):
        step_lists(cases, HYPER, flags, chunk_size=chunk_size)
    check_all(cases, f"{num_threads} threads")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_optimizer_on_any_number_of_threads(path: Path, threads: None, num_threads: int) -> None:
    """The optimizer's step has the judge's bits too when torch's thread count changes between two steps."""
    rng = np.random.default_rng(18)
    training = Training([Group([make_case(rng, (40_000,), "float32", "bfloat16", path.device)], HYPER, FLAGS[1])])
    for step in range(2):
        torch.set_num_threads(num_threads if step == 0 else 3 - num_threads)
        training.step()
    training.check(f"{num_threads} threads first")


@NATIVE
def test_many_threads_and_many_small_tensors(path: Path, threads: None) -> None:
    """Two thousand tensors prepared and updated by eight threads get each its own step count and bits."""
    rng = np.random.default_rng(19)
    torch.set_num_threads(8)
    cases = [
        make_case(rng, (i % 7,), *DTYPE_PAIRS[i % len(DTYPE_PAIRS)], path.device, steps_taken=i % 50)
        for i in range(2000)
    ]
    step_lists(cases, HYPER, FLAGS[1])
    check_all(cases, "eight threads")


# --- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_special_values(path: Path, eps: float) -> None:
    """Zeros, infinities, NaN, subnormals, largest values, in parameter, gradient and moments: same bits or both NaN.

    Two thousand random combinations for each pair of dtypes and each combination of flags. Moments take values that no
    training reaches (negative, infinite): whatever the sequence gives is the answer.
    """
    rng = np.random.default_rng(20)
    groups = [Group(one_case_a_pair(rng, path, (2000,), special=True), HYPER | dict(eps=eps), flags) for flags in FLAGS]
    training = Training(groups)
    training.step()
    training.check("special values")


def test_gradients_of_every_magnitude(path: Path) -> None:
    """Gradients from the smallest subnormal to the largest value: v overflows or vanishes exactly as in NumPy."""
    rng = np.random.default_rng(21)
    cases = one_case_a_pair(rng, path, (600,))
    for case in cases:
        info = torch.finfo(case["grad"].dtype)
        exponents = rng.uniform(np.log2(info.tiny * info.eps), np.log2(info.max), 600)
        case.write("grad", stored_like(case, 2.0**exponents * rng.choice([-1.0, 1.0], 600)))
    for step in range(3):
        step_lists(cases, HYPER | dict(eps=0.0), AMSGRAD)
        check_all(cases, f"step {step + 1}")
        if step == 0:  # float32 and bfloat16 gradients beside float32 moments, and float64 ones
            assert sum(np.isinf(case.arrays["exp_avg_sq"]).any() for case in cases) == 7


def test_rounding_to_16_bits_at_ties(path: Path) -> None:
    """Updates that end exactly midway between two stored values round to the even one.

    lr = 1, betas, eps and decay 0, moments 0: p becomes p - sign(g) with no rounding but the last.
    """
    hyper = dict(lr=1.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    cases = []
    for dtype in ("bfloat16", "float16"):
        array = patterns if dtype == "bfloat16" else patterns.view(np.float16)
        values = load(array, dtype)
        array = array[(np.abs(values) >= 2.0**-4) & (np.abs(values) < 2.0)]
        case = make_case(np.random.default_rng(22), array.shape, dtype, "float32", path.device)
        case.write("param", array)
        case.write("grad", np.ones(array.shape, dtype=np.float32))
        for moment in ("exp_avg", "exp_avg_sq"):
            case.write(moment, np.zeros(array.shape, dtype=np.float32))
        exact = load(array, dtype) - np.float32(1)
        dropped = 16 if dtype == "bfloat16" else 13
        tie = (exact.view(np.uint32) & ((1 << dropped) - 1)) == 1 << (dropped - 1)
        assert tie.sum() >= len(tie) // 16
        cases.append(case)
    step_lists(cases, hyper, PLAIN)
    check_all(cases, "ties")


@NATIVE
@pytest.mark.parametrize("num_threads", [1, 2])
def test_flushing_subnormals_elsewhere_does_not_matter(path: Path, threads: None, num_threads: int) -> None:
    """`torch.set_flush_denormal(True)` changes no bit of a step with subnormals everywhere, and stays in force."""
    rng = np.random.default_rng(23)
    cases = one_case_a_pair(rng, path, (5000,), special=True)
    hyper = HYPER | dict(lr=1e-38, eps=1e-42)
    torch.set_num_threads(num_threads)
    tiny = torch.tensor([1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert float(tiny * 1.0) == 0.0
        update_lists(cases, hyper, AMSGRAD)
        still_flushing = float(tiny * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)  # before the judge computes
    assert still_flushing
    judge_all(cases, hyper, AMSGRAD)
    check_all(cases, "while flushing")
    subnormal = np.abs(cases[0].arrays["exp_avg_sq"])
    assert np.any((subnormal > 0) & (subnormal < np.finfo(np.float32).tiny))


# --- steps and hyperparameters --------------------------------------------------------------------------------------

LATE_STEPS = [0, 1, 999, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 2, 2**30]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (1 - 2.0**-20, 1 - 2.0**-25), (0.0, 0.0)], ids=str)
def test_late_steps(path: Path, betas: tuple[float, float]) -> None:
    """Loaded step counts up to where a float32 stops counting: bias corrections and counters have the judge's bits."""
    rng = np.random.default_rng(24)
    hyper = HYPER | dict(beta1=betas[0], beta2=betas[1])
    cases = [make_case(rng, (5,), "float32", "float32", path.device, steps_taken=t) for t in LATE_STEPS]
    cases += [make_case(rng, (5,), "float64", "float64", path.device, steps_taken=t) for t in LATE_STEPS]
    training = Training([Group(cases, hyper)])
    for step in range(2):
        training.step()
        training.check(f"step {step + 1} after loading")
    counts = [float(case["step"]) for case in cases[: len(LATE_STEPS)]]
    assert counts == [2, 3, 1001, 2**24, 2**24, 2**24, 2**24 + 4, 2**30]  # 2^24 + 3 is a tie: to even


@pytest.mark.parametrize("fused", ["lists", "optimizer"])
@pytest.mark.parametrize("place", ["same-device", "cpu"] if HAS_GPU else ["same-device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hyperparameters_as_tensors(path: Path, dtype: torch.dtype, place: str, fused: str) -> None:
    """One-element tensors for all five give the bits of their values as float64, also after they change in place."""
    if place == "cpu" and path.device.type == "cpu":
        pytest.skip("the tensors' device is the CPU")
    rng = np.random.default_rng(25)
    device = path.device if place == "same-device" else torch.device("cpu")
    values = dict(lr=0.0123, beta1=0.87, beta2=0.9731, eps=1.1e-7, weight_decay=0.0771)
    hyper = {key: torch.tensor(value, dtype=dtype, device=device) for key, value in values.items()}
    hyper["lr"] = hyper["lr"].reshape(1)
    cases = [make_case(rng, (21,), *pair, path.device) for pair in DTYPE_PAIRS[::4]]
    training = Training([Group(cases, hyper, FLAGS[1])]) if fused == "optimizer" else None
    for step in range(3):
        if training is None:
            step_lists(cases, hyper, FLAGS[1])
        else:
            training.step()
        check_all(cases, f"step {step + 1} with {hyper}")
        hyper["lr"].mul_(0.7)
        hyper["beta1"].fill_(0.6)
        hyper["weight_decay"].zero_()
    if dtype == torch.float32:
        assert float(hyper["beta2"]) != values["beta2"]  # so a value that was rounded otherwise would show


def test_groups_mix_tensor_and_float_hyperparameters(path: Path) -> None:
    """A float32 tensor, a float64 tensor and a float as learning rate in three groups of one table stay apart."""
    rng = np.random.default_rng(26)
    rates = [
        torch.tensor(0.1, dtype=torch.float32, device=path.device),
        torch.tensor(0.1, dtype=torch.float64, device=path.device),
        0.1,
    ]
    groups = [Group([make_case(rng, (50,), "float64", "float64", path.device)], HYPER | dict(lr=lr)) for lr in rates]
    training = Training(groups)
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")


# --- drawn by hypothesis --------------------------------------------------------------------------------------------

BETAS = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 2.0**-24, 1 - 2.0**-53]),
    st.floats(0.0, 1.0, exclude_max=True),
)
HYPERS = st.fixed_dictionaries(
    dict(
        lr=st.one_of(st.sampled_from([0.0, 1e-3, 1.0]), st.floats(0.0, 1e3)),
        beta1=BETAS,
        beta2=BETAS,
        eps=st.one_of(st.sampled_from([0.0, 1e-8, 1e-45, 1.0]), st.floats(0.0, 10.0)),
        weight_decay=st.one_of(st.sampled_from([0.0, 1e-2, 0.1]), st.floats(0.0, 10.0)),
    )
)


@st.composite
def shapes(draw: st.DrawFn, chunk_size: int) -> tuple[int, ...]:
    """Shapes with none, few, or about a whole number of chunks of elements."""
    kind = draw(st.sampled_from(["scalar", "small", "chunks"]))
    if kind == "scalar":
        return ()
    if kind == "small":
        return tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    return (max(0, draw(st.integers(0, 3)) * chunk_size + draw(st.integers(-1, 1))),)


@st.composite
def drawn_cases(draw: st.DrawFn, chunk_size: int) -> list[tuple[Any, ...]]:
    """Draw shape, dtypes, kind of values and step count of up to four tensors."""
    case = st.tuples(
        shapes(chunk_size),
        st.sampled_from(DTYPE_PAIRS),
        st.booleans(),
        st.sampled_from([0, 1, 7, 1000, 2**24 - 1, 2**24]),
    )
    return draw(st.lists(case, min_size=1, max_size=4))


@st.composite
def list_problems(draw: st.DrawFn) -> dict[str, Any]:
    """A call of `fused_adamw_`."""
    chunk_size = draw(st.sampled_from([16, 48, 1024, 4096]))
    return dict(
        chunk_size=chunk_size,
        cases=draw(drawn_cases(chunk_size)),
        hyper=draw(HYPERS),
        flags=draw(st.sampled_from(FLAGS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def group_problems(draw: st.DrawFn) -> dict[str, Any]:
    """Parameter groups of a `FusedAdamW`."""
    group = st.tuples(drawn_cases(1024), HYPERS, st.sampled_from(FLAGS))
    return dict(
        groups=draw(st.lists(group, min_size=1, max_size=3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def make_drawn(rng: np.random.Generator, drawn: list[tuple[Any, ...]], path: Path) -> list[Case]:
    """Return the cases of drawn descriptions."""
    return [
        make_case(rng, shape, *pair, path.device, special=special, steps_taken=steps_taken)
        for shape, pair, special, steps_taken in drawn
    ]


def test_drawn_lists(path: Path) -> None:
    """Any shapes, dtypes, flags, hyperparameters, step counts and chunk size give the judge's bits through lists."""

    @explore(path, 60)
    @given(list_problems())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["seed"])
        cases = make_drawn(rng, problem["cases"], path)
        for step in range(2):
            step_lists(cases, problem["hyper"], problem["flags"], chunk_size=problem["chunk_size"])
            check_all(cases, f"step {step + 1}")

    check()


def test_drawn_groups(path: Path) -> None:
    """Any groups, each tensor and each group with its own of everything, give the judge's bits in one optimizer."""

    @explore(path, 60)
    @given(group_problems())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["seed"])
        groups = [Group(make_drawn(rng, drawn, path), hyper, flags) for drawn, hyper, flags in problem["groups"]]
        training = Training(groups)
        for step in range(2):
            training.step()
            training.check(f"step {step + 1}")
            for _, case, _ in training:
                case.write("grad", ordinary_values(rng, case.arrays["grad"].shape, case.grad_dtype))

    check()
