"""SGD's kernels store the judge's bits on every path: NumPy's sequence, each CPU ISA, Triton, CUDA.

Every test compares every stored bit (weights, remainders, momentum buffers, averages, steps; gradients and buffers that
nobody keeps, which must stay) and the memory around every tensor with `reference_sgd.step_sgd`. `SgdLaunch` takes any
format at any size and chunk, `SgdTraining` goes through `FusedSGDW`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATHS, Path
from hypothesis import given
from hypothesis import strategies as st
from pairs import assert_unchanged, snapshot
from problems import DTYPE_PAIRS, Case, Group, Guarded, assert_same_bits, check_all, explore, is_interpreted, stored
from problems_sgd import SGD_FLAGS, SGD_HYPER, SGD_PLAIN, SgdLaunch, SgdTraining, make_sgd_case
from reference import compute_dtype, store
from reference_formats import PARAM_FORMATS

# The interpreter computes with NumPy, which warns of what masked lanes and special values give.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

SIXTEEN_BITS = ("bfloat16", "float16")
PAIRS = pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPE_PAIRS)

# For what threads may change; the fixture `path` takes these in place of its own.
NATIVE = pytest.mark.parametrize("path", [path for path in PATHS if path.backend == "cpu"], ids=str, indirect=True)

# Every combination of flags, momentum, dampening and coupling of the decay.
VARIANTS = [
    (SGD_HYPER | dict(momentum=momentum, dampening=dampening) | coupling, flags)
    for momentum, dampening, coupling, flags in itertools.product(
        (0.9, 0.0), (0.0, 0.3), ({}, dict(initial_lr=0.03)), SGD_FLAGS
    )
    if flags["decoupled"] or not coupling
]

# What `FusedSGDW` accepts of them: a look ahead needs momentum and no dampening.
ACCEPTED = [
    (hyper, flags)
    for hyper, flags in VARIANTS
    if not flags["nesterov"] or (hyper["momentum"] != 0.0 and hyper["dampening"] == 0.0)
]

# A few with each option in both ways.
FEW = [
    (SGD_HYPER, SGD_PLAIN),
    (SGD_HYPER | dict(momentum=0.0, initial_lr=0.03), SGD_PLAIN | dict(maximize=True)),
    (SGD_HYPER | dict(initial_lr=0.002), SGD_PLAIN | dict(nesterov=True, lr_in_momentum=True)),
    (SGD_HYPER | dict(dampening=0.3), SGD_PLAIN | dict(decoupled=False, maximize=True)),
]


def combinations(param_dtype: str) -> list[dict[str, str]]:
    """Return every pair of formats that a parameter may have."""
    weights = PARAM_FORMATS if param_dtype in SIXTEEN_BITS else PARAM_FORMATS[:1]
    buffers = ("float32",) if param_dtype == "float64" else ("float32", "bfloat16")
    return [dict(param_format=p, moment_format=m) for p, m in itertools.product(weights, buffers)]


ALL = [(dtype, combination) for dtype in ("float32", *SIXTEEN_BITS, "float64") for combination in combinations(dtype)]

# What the interpreter sees of them where a test is about something else: each format at least once.
SELECTED = [
    ("float32", dict(param_format="native", moment_format="float32")),
    ("bfloat16", dict(param_format="split24", moment_format="bfloat16")),
    ("float16", dict(param_format="stochastic", moment_format="float32")),
    ("float64", dict(param_format="native", moment_format="float32")),
    ("float16", dict(param_format="split32", moment_format="bfloat16")),
]


def formats_for(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the parameter dtypes and their formats that a test on this path goes through."""
    return SELECTED if is_interpreted(path) else ALL


def few_for(path: Path, values: Sequence[Any], interpreted: int) -> Sequence[Any]:
    """Return all of the values, or about as many as an interpreted test has time for, spread over them."""
    return values[:: -(-len(values) // interpreted) | 1] if is_interpreted(path) else values


def one_case_a_format(rng: np.random.Generator, path: Path, shape: tuple[int, ...], **options: Any) -> list[Case]:
    """Return a case for every pair of formats of every parameter dtype, with gradients of each dtype in turn."""
    grads = itertools.cycle(("float32", "bfloat16", "float16"))
    return [
        make_sgd_case(rng, shape, dtype, next(grads), path.device, **combination, **options)
        for dtype, combination in formats_for(path)
    ]


def run_steps(cases: Sequence[Case], steps: int, rng: np.random.Generator, *arguments: Any, **options: Any) -> None:
    """Take steps of `SgdLaunch` and compare every stored bit after each; then all cases have another gradient."""
    launch = SgdLaunch(cases, *arguments, **options)
    for step in range(steps):
        launch.step()
        check_all(cases, f"step {step + 1} of {arguments} {options}")
        for case in cases:
            case.renew_grad(rng)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- dtypes, formats and options --------------------------------------------------------------------------------------


@PAIRS
def test_every_format(path: Path, param_dtype: str, grad_dtype: str) -> None:
    """Every pair of formats, from any stored state and from special values, with and without momentum."""
    rng = np.random.default_rng(81)
    for hyper, flags in FEW:
        cases = [
            make_sgd_case(rng, (70,), param_dtype, grad_dtype, path.device, special=special, **combination)
            for combination in combinations(param_dtype)
            for special in (False, True)
        ]
        run_steps(cases, 1 if is_interpreted(path) else 3, rng, hyper, flags)


@PAIRS
def test_every_option(path: Path, param_dtype: str, grad_dtype: str) -> None:
    """All combinations of flags, momentum, dampening and coupling, the first step and the second."""
    rng = np.random.default_rng(82)
    turn = itertools.cycle(combinations(param_dtype))
    averages = itertools.cycle((None, "float32") if param_dtype == "float64" else (None, "float32", "bfloat16"))
    for hyper, flags in few_for(path, VARIANTS, 14):
        case = make_sgd_case(rng, (37,), param_dtype, grad_dtype, path.device, ema_format=next(averages), **next(turn))
        case.start_anew()
        run_steps([case], 2, rng, hyper, flags, ema_decay=0.8)


def test_training_from_the_first_step(path: Path) -> None:
    """Twelve steps (the interpreter: four) of one table with everything in it, under a schedule, clipped and scaled.

    Each group has its own options; some have no momentum, some an average, and tensors of all dtypes.
    """
    rng = np.random.default_rng(83)
    groups = []
    of_formats = itertools.cycle(formats_for(path))
    for index, (hyper, flags) in enumerate(few_for(path, ACCEPTED, 6)):
        cases = []
        for shape in ((37,), (3, 5)):
            dtype, combination = next(of_formats)
            ema_format = (None, "float32", "bfloat16")[index % 3]
            if dtype == "float64" and ema_format == "bfloat16":
                dtype, combination = SELECTED[1]
            cases.append(make_sgd_case(rng, shape, dtype, "float32", path.device, ema_format=ema_format, **combination))
        options: dict[str, Any] = dict(max_grad_norm=(None, 0.5)[index % 2])
        if ema_format is not None:
            options |= dict(ema_decay=0.9, ema_format=ema_format, ema_warmup=index % 2 == 0)
        for case in cases:
            case.start_anew()
            groups.append(Group([case], hyper | dict(lr=1e-2 / (index + 1)), flags, options | storage_options(case)))
    training = SgdTraining(groups, seed=9, fused=True)
    for step in range(4 if is_interpreted(path) else 12):
        training.step(grad_scale=torch.tensor(128.0, device=path.device))
        training.check(f"step {step + 1}")
        training.renew_grads(rng)
        for group, of_optimizer in zip(groups, training.optimizer.param_groups, strict=True):
            group.hyper = group.hyper | dict(lr=group.hyper["lr"] * 0.9)
            of_optimizer["lr"] = group.hyper["lr"]


def storage_options(case: Case) -> dict[str, str]:
    """Return the options by which `FusedSGDW` gives the case its formats."""
    return dict(param_format=case.param_format, moment_format=case.moment_format)


def test_every_dtype_and_option_in_one_optimizer(path: Path) -> None:
    """One table in which every group and every tensor differs: each has exactly its own bits."""
    rng = np.random.default_rng(84)
    groups = []
    for i, (hyper, flags) in enumerate(few_for(path, ACCEPTED, 8)):
        cases = [
            make_sgd_case(rng, (1030 if (i + k) % 40 == 0 else 5 + k,), *pair, path.device, steps_taken=i * k % 7)
            for k, pair in enumerate(DTYPE_PAIRS)
        ]
        own = dict(lr=3e-3 * (i + 1), weight_decay=0.02 * (i % 5))
        groups.append(Group(cases, hyper | own, flags))
    training = SgdTraining(groups)
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")
        training.renew_grads(rng)


def test_one_table_of_both_decays_and_no_momentum(path: Path) -> None:
    """A launch over tensors with and without a buffer, of one dtype: the buffer's address may be none."""
    rng = np.random.default_rng(85)
    groups = [
        Group([make_sgd_case(rng, (n,), "float32", "float32", path.device) for n in (1100, 0, 3)], hyper, flags)
        for hyper, flags in FEW
    ]
    training = SgdTraining(groups)
    training.step()
    training.check("with and without momentum")
    (batch,) = training.optimizer._internals.stepper.plan.tables[0].batches
    assert batch.rule == "sgdw"


def test_skipped_steps_change_nothing(path: Path) -> None:
    """After a gradient that is not finite every bit is as before, and random bits are those of the next step taken."""
    rng = np.random.default_rng(86)
    groups = []
    for dtype, combination in formats_for(path):
        ema_format = "float32" if dtype == "float64" else "bfloat16"
        case = make_sgd_case(rng, (20,), dtype, dtype, path.device, ema_format=ema_format, **combination)
        options = dict(ema_decay=0.9, ema_format=ema_format, **storage_options(case))
        groups.append(Group([case], SGD_HYPER | dict(dampening=0.5), SGD_PLAIN, options))
    training = SgdTraining(groups, skip_nonfinite=True, seed=4)
    training.step()
    training.check("an ordinary step")
    before = snapshot(training.optimizer)
    first = groups[0].cases[0]
    gradient = first.arrays["grad"].copy()
    gradient[7] = np.inf
    first.write("grad", gradient)
    training.step()
    assert training.optimizer.skipped_steps.item() == 1
    assert_unchanged(before, snapshot(training.optimizer))
    training.renew_grads(rng)
    training.step()
    training.check("the step after")


# --- sizes, layouts, chunks, threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 16, 48])
def test_sizes(path: Path, chunk_size: int | None) -> None:
    """Sizes about a chunk's end and the tiles of 512 elements in which the CPU works, empty and 0-dim ones."""
    rng = np.random.default_rng(87)
    sizes = (*range(1, 18), 31, 32, 33, 47, 48, 49, *(() if is_interpreted(path) else (511, 512, 513)))
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0), *((n,) for n in sizes)]
    if chunk_size is None:
        shapes += [(n,) for n in (1023, 1025, 4095, 4097, *(() if is_interpreted(path) else (70_001,)))]
    turn = itertools.cycle(formats_for(path))
    cases = []
    for shape, grad in zip(shapes, itertools.cycle(("bfloat16", "float32", "float16")), strict=False):
        dtype, combination = next(turn)
        cases.append(make_sgd_case(rng, shape, dtype, grad, path.device, **combination))
    for hyper, flags in few_for(path, FEW, 2):
        run_steps(cases, 1, rng, hyper, flags, chunk_size=chunk_size)


LAYOUTS = {
    "transposed": ((6, 7), (1, 6)),
    "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3)),
    "odd_stride_of_one_element": ((3, 1, 40), (40, 999, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path: Path, layout: str) -> None:
    """Random bits count the elements in memory, whatever the strides."""
    rng = np.random.default_rng(88)
    shape, strides = LAYOUTS[layout]
    narrow = [(dtype, combination) for dtype, combination in formats_for(path) if dtype != "float64"]
    cases = [
        make_sgd_case(rng, shape, dtype, dtype, path.device, strides=strides, ema_format="bfloat16", **combination)
        for dtype, combination in narrow
    ]
    run_steps(cases, 2, rng, ema_decay=0.9)


def test_buffer_lies_as_its_parameter_does(path: Path) -> None:
    """State that the optimizer makes for a transposed parameter is transposed; gradients are contiguous."""
    rng = np.random.default_rng(89)
    groups = []
    for dtype, combination in formats_for(path):
        case = make_sgd_case(rng, (7, 6), dtype, dtype, path.device, strides=(1, 7), **combination)
        case.start_anew()
        case.tensors["grad"] = Guarded((7, 6), dtype, path.device)
        case.write("grad", case.arrays["grad"])
        groups.append(Group([case], SGD_HYPER, SGD_PLAIN, storage_options(case)))
    training = SgdTraining(groups)
    training.optimizer.state.clear()
    for step in range(2):
        training.step()
        for p, case, _ in training:
            state = training.optimizer.state[p]
            kept = case.dtypes.keys() - {"param", "grad"}
            assert state.keys() == {case.state_key(key) for key in kept}
            for key in kept:
                value = state[case.state_key(key)]
                assert_same_bits(stored(value), case.arrays[key], case.dtypes[key], f"step {step + 1}: {key}")
                assert key == "step" or value.stride() == p.stride()
            case.tensors["param"].check(case.arrays["param"], f"step {step + 1}: param")


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_misaligned_views(path: Path, offset: int) -> None:
    """Every operand as many elements past an aligned address, alone and with all others."""
    rng = np.random.default_rng(90)
    cases = []
    for index, (dtype, combination) in enumerate(formats_for(path)):
        keys = [*make_sgd_case(rng, (0,), dtype, dtype, path.device, **combination).tensors]
        for offsets in (
            dict.fromkeys(keys, offset),
            {keys[index % len(keys)]: offset},
            dict(momentum_buffer=offset),
            dict(param=offset),
        ):
            cases.append(make_sgd_case(rng, (150,), dtype, dtype, path.device, offsets=offsets, **combination))
    for hyper, flags in FEW[:2]:
        run_steps(cases, 1, rng, hyper, flags, chunk_size=64)


@NATIVE
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 16, 528])
def test_threads_and_chunks_do_not_matter(path: Path, threads: None, num_threads: int, chunk_size: int | None) -> None:
    """Tensors of 35,000 elements and of a few have the judge's bits on any number of threads, in chunks of any size."""
    rng = np.random.default_rng(91)
    torch.set_num_threads(num_threads)
    split = dict(param_format="split24", moment_format="bfloat16")
    cases = [make_sgd_case(rng, (n,), "bfloat16", "bfloat16", path.device, **split) for n in (35_003, 1, 0, 40)]
    cases.append(make_sgd_case(rng, (19_999,), "float32", "float16", path.device))
    run_steps(cases, 1, rng, *FEW[3], chunk_size=chunk_size)


# --- steps and hyperparameters ----------------------------------------------------------------------------------------


def test_late_steps(path: Path) -> None:
    """Loaded counts up to where a float32 stops counting: only the first step of all is not dampened."""
    rng = np.random.default_rng(92)
    late = [0, 1, 999, 2**24 - 1, 2**24, 2**30]
    pairs = [("float32", "float32"), ("float64", "float64")]
    cases = [make_sgd_case(rng, (5,), *pair, path.device, steps_taken=t) for t in late for pair in pairs]
    training = SgdTraining([Group(cases, SGD_HYPER | dict(dampening=0.9), SGD_PLAIN)])
    for step in range(2):
        training.step()
        training.check(f"step {step + 1} after loading")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_hyperparameters_as_tensors(path: Path, lr_in_momentum: bool, dtype: torch.dtype) -> None:
    """One-element tensors for all five give the bits of their values as float64, also after they change in place."""
    rng = np.random.default_rng(93)
    values = dict(lr=0.0123, momentum=0.87, dampening=0.31, weight_decay=0.0771, initial_lr=0.0211)
    hyper = {key: torch.tensor(value, dtype=dtype, device=path.device) for key, value in values.items()}
    hyper["lr"] = hyper["lr"].reshape(1)
    cases = [make_sgd_case(rng, (21,), *pair, path.device) for pair in DTYPE_PAIRS[::4]]
    training = SgdTraining([Group(cases, hyper, SGD_PLAIN | dict(lr_in_momentum=lr_in_momentum))])
    for step in range(3):
        training.step()
        training.check(f"step {step + 1} with {hyper}")
        hyper["lr"].mul_(0.7)
        hyper["momentum"].fill_(0.6)
        hyper["dampening"].fill_(0.1)
        hyper["weight_decay"].mul_(0.5)


def test_momentum_switched_on_and_off(path: Path) -> None:
    """A buffer that is made later starts at 0; one that is not read keeps its bits, and is read again."""
    rng = np.random.default_rng(94)
    case = make_sgd_case(rng, (33,), "float32", "float32", path.device)
    case.start_anew()
    group = Group([case], SGD_HYPER | dict(momentum=0.0), SGD_PLAIN)
    training = SgdTraining([group])
    (p,) = (p for p, *_ in training)
    for step, momentum in enumerate((0.0, 0.0, 0.9, 0.5, 0.0, 0.0, 0.9)):
        training.optimizer.param_groups[0]["momentum"] = momentum
        group.hyper = group.hyper | dict(momentum=momentum)
        training.step()
        state = training.optimizer.state[p]
        assert ("momentum_buffer" in state) == (step >= 2)
        case.tensors["param"].check(case.arrays["param"], f"step {step + 1}: param")
        if step >= 2:
            buffer = case.arrays["momentum_buffer"]
            assert_same_bits(stored(state["momentum_buffer"]), buffer, "float32", f"step {step + 1}: buffer")
        case.renew_grad(rng)


@pytest.mark.parametrize("nesterov", [False, True])
def test_rate_in_the_buffer_or_behind_it(path: Path, nesterov: bool) -> None:
    """At a constant rate that is a power of two, both places of the rate give the same weights, bit for bit."""
    rng = np.random.default_rng(95)
    cases = [make_sgd_case(np.random.default_rng(96), (200,), "float32", "float32", path.device) for _ in range(2)]
    hyper = SGD_HYPER | dict(lr=2.0**-5)
    for case in cases:
        case.start_anew()
    launches = [
        SgdLaunch([case], hyper, SGD_PLAIN | dict(nesterov=nesterov, lr_in_momentum=inside))
        for case, inside in zip(cases, (False, True), strict=True)
    ]
    for step in range(5):
        gradient = rng.standard_normal(200).astype(np.float32)
        for case, launch in zip(cases, launches, strict=True):
            case.write("grad", gradient)
            launch.step()
        check_all(cases, f"step {step + 1}")
        behind, inside = (case.arrays for case in cases)
        assert_same_bits(inside["param"], behind["param"], "float32", f"step {step + 1}")
        assert np.array_equal(inside["momentum_buffer"], behind["momentum_buffer"] * np.float32(hyper["lr"]))


# --- drawn by hypothesis ----------------------------------------------------------------------------------------------

MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 1.0, 30.0])
MOMENTA = st.sampled_from([0.0, 0.5, 0.9, 1 - 2.0**-24, 1.0, 3.0])
DAMPENINGS = st.sampled_from([0.0, 0.1, 1.0, -0.5, 2.0])


@st.composite
def drawn_options(draw: st.DrawFn, *, accepted: bool) -> tuple[dict[str, float], dict[str, bool]]:
    """Draw hyperparameters and flags; `accepted`: such as `FusedSGDW` lets pass."""
    flags = draw(st.sampled_from(SGD_FLAGS))
    hyper = dict(
        lr=draw(MAGNITUDES),
        momentum=draw(MOMENTA),
        dampening=draw(DAMPENINGS),
        weight_decay=draw(MAGNITUDES),
    )
    if flags["decoupled"] and draw(st.booleans()):
        hyper["initial_lr"] = draw(st.sampled_from([1e-8, 0.03, 1.0, 1e30]))
    if accepted and (hyper["momentum"] == 0.0 or hyper["dampening"] != 0.0):
        flags = flags | dict(nesterov=False)
    return hyper, flags


@st.composite
def drawn_launches(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sizes, formats, options, chunk and what else a launch may have."""
    sizes = st.one_of(st.integers(0, 40), st.integers(500, 530))
    case = st.tuples(sizes, st.sampled_from(ALL), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans())
    return dict(
        cases=draw(st.lists(case, min_size=1, max_size=4)),
        options=draw(drawn_options(accepted=False)),
        chunk_size=draw(st.sampled_from([16, 48, 1024])),
        seed=draw(st.integers(0, 2**32 - 1)),
        first_element=draw(st.sampled_from([0, 16, 7, 2**33 - 16, 2**33 - 15, 2**40])),
        steps_taken=draw(st.sampled_from([0, 1, 1000, 2**24])),
    )


def test_drawn_launches(path: Path) -> None:
    """Whatever hypothesis draws, two steps of it."""

    @explore(path, 50)
    @given(problem=drawn_launches())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["seed"])
        shared = dict(steps_taken=problem["steps_taken"], first_element=problem["first_element"])
        cases = [
            make_sgd_case(rng, (size,), dtype, grad_dtype, path.device, special=special, **shared, **combination)
            for size, (dtype, combination), grad_dtype, special in problem["cases"]
        ]
        run_steps(cases, 2, rng, *problem["options"], chunk_size=problem["chunk_size"], seed=problem["seed"])

    check()


@st.composite
def drawn_trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw parameter groups of a `FusedSGDW`, clipping, averages, and what a loss scaler says."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        ema_format = draw(st.sampled_from([None, "float32", "bfloat16"]))
        formats = [pair for pair in ALL if ema_format != "bfloat16" or pair[0] != "float64"]
        case = st.tuples(st.sampled_from([(0,), (), (7,), (3, 5), (1030,)]), st.sampled_from(formats), st.booleans())
        options: dict[str, Any] = dict(max_grad_norm=draw(st.sampled_from([None, 1e-3, 1.0, np.inf])))
        if ema_format is not None:
            decay = draw(st.sampled_from([0.0, 0.5, 0.999]))
            options |= dict(ema_decay=decay, ema_format=ema_format, ema_warmup=draw(st.booleans()))
        cases = draw(st.lists(case, min_size=1, max_size=3))
        groups.append((cases, ema_format, options, draw(drawn_options(accepted=True))))
    return dict(
        groups=groups,
        skip_nonfinite=draw(st.booleans()),
        scales=draw(st.lists(st.sampled_from([None, 1.0, 1024.0, 1e-3]), min_size=1, max_size=3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def test_drawn_trainings(path: Path) -> None:
    """Any groups, each with its own options and formats, through `FusedSGDW`, in one to three steps."""

    @explore(path, 40)
    @given(problem=drawn_trainings())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["seed"])
        groups = []
        for drawn, ema_format, options, (hyper, flags) in problem["groups"]:
            for shape, (dtype, combination), special in drawn:
                case = make_sgd_case(
                    rng, shape, dtype, "bfloat16", path.device, special=special, ema_format=ema_format, **combination
                )
                groups.append(Group([case], hyper, flags, options | storage_options(case)))
        training = SgdTraining(groups, fused=True, skip_nonfinite=problem["skip_nonfinite"], seed=problem["seed"])
        for step, scale in enumerate(problem["scales"]):
            training.step(None if scale is None else torch.tensor(scale, device=path.device))
            training.check(f"step {step + 1}")
            training.renew_grads(rng)

    check()


# --- values -----------------------------------------------------------------------------------------------------------


def test_damage_stays_where_it_was(path: Path) -> None:
    """A gradient that is not a number marks its own element, in weight and buffer, and no other."""
    rng = np.random.default_rng(97)
    cases = one_case_a_format(rng, path, (40,))
    for case in cases:
        gradient = case.arrays["grad"].copy()
        gradient[21] = store(np.array(np.nan, compute_dtype(case.grad_dtype)), case.grad_dtype)
        case.write("grad", gradient)
    launch = SgdLaunch(cases)
    for _ in range(2):
        launch.step()
        check_all(cases, "one bad gradient")
        for case in cases:
            bad = np.flatnonzero(np.isnan(case.weights()))
            assert [*bad] == [21]


def test_rate_of_zero_keeps_weights(path: Path) -> None:
    """At lr = 0 weights other than -0.0 stay, however they are stored, and buffers move on."""
    rng = np.random.default_rng(98)
    cases = one_case_a_format(rng, path, (60,))
    for case in cases:
        case.start_anew()
    SgdLaunch(cases, SGD_HYPER | dict(lr=0.0)).step()  # puts remainders in the order of a step
    before = [(case.weights(), case.arrays["momentum_buffer"]) for case in cases]
    for case in cases:
        case.renew_grad(rng)
    run_steps(cases, 2, rng, SGD_HYPER | dict(lr=0.0), SGD_PLAIN)
    for case, (weights, buffer) in zip(cases, before, strict=True):
        assert np.array_equal(case.weights(), weights)
        assert not np.array_equal(case.arrays["momentum_buffer"], buffer)
