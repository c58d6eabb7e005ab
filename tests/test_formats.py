"""Split weights, stochastically rounded ones, and moments in 16 or 8 bits: the same bits on every path, and what holds.

`Launch` takes any format at any size, chunk and shard, and compares every stored bit and the memory around it with
`reference_formats.step_packed`; `Training` does so through `FusedAdamW`. Other tests compare two runs of the kernels:
with fp32 weights, with shards, without the damaged gradient.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import PATHS, Path
from hypothesis import given
from hypothesis import strategies as st
from pairs import assert_unchanged, bits, snapshot
from problems import (
    AMSGRAD,
    DTYPE_PAIRS,
    FLAGS,
    HYPER,
    PLAIN,
    STATE_DTYPE,
    UNSHAPED,
    Case,
    Group,
    Guarded,
    Launch,
    Training,
    assert_same_bits,
    check_all,
    explore,
    is_interpreted,
    make_case,
    stored,
)
from reference import compute_dtype, largest_update, load, store
from reference_formats import GROUP, MOMENT_FORMATS, PARAM_FORMATS, decode_moments, merge_weight, split_weight
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from adamw_kernels import FusedAdamW, formats

# The interpreter computes with NumPy, which warns of what masked lanes and special values give.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

SIXTEEN_BITS = ("bfloat16", "float16")
PAIRS = pytest.mark.parametrize(("param_dtype", "grad_dtype"), [pair for pair in DTYPE_PAIRS if pair[0] != "float64"])
NATIVE = pytest.mark.parametrize("path", [path for path in PATHS if path.backend == "cpu"], ids=str, indirect=True)


def combinations(param_dtype: str) -> list[dict[str, str]]:
    """Return every pair of formats that a parameter may have, but for the one that test_bits.py is about."""
    weights = PARAM_FORMATS if param_dtype in SIXTEEN_BITS else PARAM_FORMATS[:1]
    pairs = itertools.product(weights, MOMENT_FORMATS)
    return [dict(param_format=p, moment_format=m) for p, m in pairs if (p, m) != ("native", "float32")]


ALL = [(dtype, combination) for dtype in ("float32", *SIXTEEN_BITS) for combination in combinations(dtype)]

# What the interpreter sees of them beyond `test_every_pair_of_formats`: each format at least once.
SELECTED = [
    ("float32", dict(param_format="native", moment_format="8bit")),
    ("bfloat16", dict(param_format="split24", moment_format="8bit")),
    ("float16", dict(param_format="stochastic", moment_format="bfloat16")),
    ("float16", dict(param_format="split24", moment_format="float32")),
    ("bfloat16", dict(param_format="split32", moment_format="bfloat16")),
]


def formats_for(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the parameter dtypes and their formats that a test on this path goes through."""
    return SELECTED if is_interpreted(path) else ALL


def steps_for(path: Path, native: int, interpreted: int = 1) -> range:
    """Return as many steps as a test on this path takes."""
    return range(interpreted if is_interpreted(path) else native)


def one_case_a_format(rng: np.random.Generator, path: Path, shape: tuple[int, ...], **options: Any) -> list[Case]:
    """Return a case for every pair of formats of every parameter dtype, with gradients of each dtype in turn."""
    grads = itertools.cycle(("float32", "bfloat16", "float16"))
    return [
        make_case(rng, shape, dtype, next(grads), path.device, **combination, **options)
        for dtype, combination in formats_for(path)
    ]


def renew_grads(cases: Sequence[Case], rng: np.random.Generator) -> None:
    """Other ordinary gradients for all."""
    for case in cases:
        case.renew_grad(rng)


def run_steps(cases: Sequence[Case], steps: int, rng: np.random.Generator, **options: Any) -> None:
    """Take steps and compare every stored bit after each; then all cases have another gradient."""
    launch = Launch(cases, **options)
    for step in range(steps):
        launch.step()
        check_all(cases, f"step {step + 1} of {options}")
        renew_grads(cases, rng)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- dtypes and options ---------------------------------------------------------------------------------------------


@PAIRS
def test_every_pair_of_formats(path: Path, param_dtype: str, grad_dtype: str) -> None:
    """Weights, remainders, moments, codes, words and scales, from any stored state and from special values."""
    rng = np.random.default_rng(51)
    cases = [
        make_case(rng, (70,), param_dtype, grad_dtype, path.device, special=special, **formats)
        for formats in combinations(param_dtype)
        for special in (False, True)
    ]
    run_steps(cases, len(steps_for(path, 3)), rng)


def test_steps_from_the_first(path: Path) -> None:
    """Codes as training makes them: state that starts at zero, gradients that drop, scales that pass 2^25."""
    rng = np.random.default_rng(52)
    cases = one_case_a_format(rng, path, (50,))
    for case in cases:
        case.start_anew()
    launch = Launch(cases, HYPER | dict(beta2=0.9))  # 2^25 is passed every seventh step
    for step in steps_for(path, 40, 10):
        launch.step()
        if step % 8 == 7 or step < 2:
            check_all(cases, f"step {step + 1}")
        for case in cases:
            shape = case.arrays["grad"].shape
            values = rng.standard_normal(shape) * 10.0 ** (-step / 8) * (rng.uniform(size=shape) < 0.7)
            case.write("grad", store(values.astype(np.float32), case.grad_dtype))


MASKS = dict(cautious=True, cautious_weight_decay=True)
OPTIONS = {
    "maximize": dict(flags=PLAIN | dict(maximize=True)),
    "l2": dict(flags=PLAIN | dict(decoupled=False)),
    "cautious": dict(flags=PLAIN | MASKS),
    "number": dict(update_bound=0.3),
    "small_number": dict(update_bound=1e-3, flags=PLAIN | MASKS | dict(maximize=True)),
    "unbound": dict(update_bound=None),
    "large_steps": dict(hyper=dict(lr=0.5, beta1=0.95, beta2=0.9, eps=0.0, weight_decay=1.0)),
    "average": dict(ema_decay=0.8),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(path: Path, name: str) -> None:
    """Flags, bounds and averages in both of their formats beside every format of weights and moments."""
    rng = np.random.default_rng(53)
    averages = ("float32", "bfloat16") if name == "average" else (None,)
    cases = [case for average in averages for case in one_case_a_format(rng, path, (40,), ema_format=average)]
    run_steps(cases, 2, rng, **OPTIONS[name])


def test_amsgrad_beside_split_weights(path: Path) -> None:
    """The running maximum is exact, as the moments are."""
    rng = np.random.default_rng(54)
    cases = [
        make_case(rng, (600,), dtype, "float32", path.device, param_format=form, ema_format="bfloat16")
        for dtype in SIXTEEN_BITS
        for form in PARAM_FORMATS[1:]
    ]
    run_steps(cases, 2, rng, flags=AMSGRAD, ema_decay=0.9)
    run_steps(cases, 1, rng, flags=FLAGS[7] | dict(cautious=True), update_bound=0.5)


def request(dtype: str, combination: dict[str, str]) -> dict[str, str]:
    """Return the options by which `FusedAdamW` gives a parameter these formats."""
    return combination if dtype in SIXTEEN_BITS else dict(moment_format=combination["moment_format"])


def test_the_whole_step_through_the_optimizer(path: Path) -> None:
    """One table of every pair of formats, clipped, scaled by a loss scale, averaged, with tensors below and at 4,096.

    Below that many elements, 8-bit moments are float32.
    """
    rng = np.random.default_rng(55)
    groups = []
    for index, (dtype, combination) in enumerate(formats_for(path)):
        coded = combination["moment_format"] == "8bit"
        ema_format = (None, "float32", "bfloat16")[index % 3]
        options: dict[str, Any] = dict(max_grad_norm=0.5, **request(dtype, combination))
        if ema_format is not None:
            options |= dict(ema_decay=0.9, ema_format=ema_format)
        if index % 4 == 0:
            options |= dict(update_bound=(None, 0.1)[index % 8 == 0])
        cases = [
            make_case(
                rng, (4101 if coded else 37,), dtype, "float32", path.device, ema_format=ema_format, **combination
            )
        ]
        if coded:
            exact = combination | dict(moment_format="float32")
            cases.append(make_case(rng, (4095,), dtype, "float32", path.device, ema_format=ema_format, **exact))
        groups.append(Group(cases, HYPER | dict(lr=1e-3 * (index + 1)), options=options))
    training = Training(groups, seed=9, fused=True)
    for step in steps_for(path, 2):
        training.step(grad_scale=torch.tensor(128.0, device=path.device))
        training.check(f"step {step + 1}")
        training.renew_grads(rng)


# --- sizes, layouts, chunks, threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 16, 48])
def test_sizes(path: Path, chunk_size: int | None) -> None:
    """Every size up to two groups, those about the tiles of 512 elements in which the CPU works, empty and 0-dim ones.

    16 is the smallest chunk: every group its own.
    """
    rng = np.random.default_rng(56)
    sizes = (*range(1, 18), 31, 32, 33, *(() if is_interpreted(path) else (511, 512, 513)))
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0), *((n,) for n in sizes)]
    if chunk_size is None and not is_interpreted(path):
        shapes += [(n,) for n in (1023, 1025, 4095, 4096, 4097)]
    chosen = itertools.cycle(formats_for(path))
    every = [(dtype, combination) for dtype, combination in formats_for(path) if combination["moment_format"] == "8bit"]
    cases = []
    for shape in shapes:
        dtype, combination = next(chosen)
        cases.append(make_case(rng, shape, dtype, "bfloat16", path.device, **combination))
        dtype, combination = every[len(cases) % len(every)]
        cases.append(make_case(rng, shape, dtype, dtype, path.device, **combination))
    run_steps(cases, len(steps_for(path, 2)), rng, chunk_size=chunk_size)


LAYOUTS = {
    "transposed": ((6, 7), (1, 6)),
    "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3)),
    "permuted": ((3, 4, 5), (5, 15, 1)),
    "odd_stride_of_one_element": ((3, 1, 40), (40, 999, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path: Path, layout: str) -> None:
    """Neighbours that share a word are those in memory, and random bits count the elements there."""
    rng = np.random.default_rng(57)
    shape, strides = LAYOUTS[layout]
    run_steps(one_case_a_format(rng, path, shape, strides=strides, ema_format="bfloat16"), 2, rng, ema_decay=0.9)


def test_layouts_through_the_optimizer(path: Path) -> None:
    """State that the optimizer makes for a transposed parameter lies as that does; gradients are contiguous."""
    rng = np.random.default_rng(58)
    groups = []
    for dtype, combination in formats_for(path):
        coded = combination["moment_format"] == "8bit"
        shape = (70, 61) if coded else (7, 6)
        case = make_case(rng, shape, dtype, dtype, path.device, strides=(1, shape[0]), **combination)
        case.start_anew()
        case.tensors["grad"] = Guarded(shape, dtype, path.device)
        case.write("grad", case.arrays["grad"])
        groups.append(Group([case], options=request(dtype, combination)))
    training = Training(groups)
    training.optimizer.state.clear()
    for step in steps_for(path, 2):
        training.step()
        for p, case, _ in training:
            state = training.optimizer.state[p]
            for key, dtype in case.dtypes.items():
                if key not in ("param", "grad", "max_exp_avg_sq"):
                    value = state[case.state_key(key)]
                    assert value.dtype == STATE_DTYPE[dtype]
                    assert_same_bits(stored(value), case.arrays[key], dtype, f"step {step + 1}: {key}")
                    assert key in ("step", *UNSHAPED) or value.stride() == p.stride()
            case.tensors["param"].check(case.arrays["param"], f"step {step + 1}: param")


@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_views(path: Path, offset: int) -> None:
    """Every operand as many elements past an aligned address, alone and with all others."""
    rng = np.random.default_rng(59)
    cases = []
    for index, (dtype, combination) in enumerate(formats_for(path)):
        keys = [*make_case(rng, (0,), dtype, dtype, path.device, **combination).tensors]
        everything = dict.fromkeys(keys, offset)
        for offsets in (everything, {keys[index % len(keys)]: offset}, dict(param=offset), dict(exp_avg=offset)):
            cases.append(make_case(rng, (150,), dtype, dtype, path.device, offsets=offsets, **combination))
    run_steps(cases, len(steps_for(path, 2)), rng)


@NATIVE
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 16, 528])
def test_threads_and_chunks_do_not_matter(path: Path, threads: None, num_threads: int, chunk_size: int | None) -> None:
    """Tensors of 70,000 elements and of a few have the judge's bits on any number of threads, in chunks of any size."""
    rng = np.random.default_rng(60)
    torch.set_num_threads(num_threads)
    formats = dict(param_format="split24", moment_format="8bit")
    cases = [make_case(rng, (n,), "bfloat16", "bfloat16", path.device, **formats) for n in (35_003, 1, 0, 40)]
    cases.append(make_case(rng, (9_999,), "float16", "float32", path.device, moment_format="bfloat16"))
    run_steps(cases, 1, rng, chunk_size=chunk_size)


@pytest.mark.parametrize("first_element", [1, 2**33 - 31])
def test_shards_that_begin_inside_a_pair(path: Path, first_element: int) -> None:
    """A call of the generator serves two neighbours, of which here the tensor's first element is the second."""
    rng = np.random.default_rng(61)
    options = dict(first_element=first_element, ema_format="bfloat16")
    cases = [
        make_case(rng, (size,), "bfloat16", "bfloat16", path.device, **options, **formats)
        for size in (1, 64, 700)
        for formats in (
            dict(param_format="stochastic"),
            dict(param_format="split24", moment_format="bfloat16"),
            dict(param_format="split24", moment_format="8bit"),
        )
    ]
    without_average = dict(first_element=first_element, moment_format="8bit")  # by another way through the CPU's code
    cases += [make_case(rng, (size,), "float32", "float32", path.device, **without_average) for size in (31, 700)]
    run_steps(cases, 2, rng)


SIZES = st.one_of(st.integers(0, 40), st.integers(500, 530))


@st.composite
def problems_of_formats(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sizes, formats, flags, hyperparameters, bound, chunk and what else a launch may have."""
    case = st.tuples(SIZES, st.sampled_from(ALL), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans())
    betas = st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 2.0**-24])
    magnitudes = st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 1.0, 30.0])
    return dict(
        cases=draw(st.lists(case, min_size=1, max_size=4)),
        hyper=dict(
            lr=draw(magnitudes),
            beta1=draw(betas),
            beta2=draw(betas),
            eps=draw(magnitudes),
            weight_decay=draw(magnitudes),
        ),
        flags=draw(st.sampled_from(FLAGS[:4])) | draw(st.sampled_from([{}, MASKS])),
        update_bound=draw(st.sampled_from(["auto", None, 1e-6, 0.5, 100.0])),
        chunk_size=draw(st.sampled_from([16, 48, 1024])),
        seed=draw(st.integers(0, 2**32 - 1)),
        first_element=draw(st.sampled_from([0, 16, 7, 2**33 - 16, 2**33 - 15, 2**40])),
        steps_taken=draw(st.sampled_from([0, 1, 10, 1000, 2**24])),
    )


def test_drawn_problems(path: Path) -> None:
    """Whatever hypothesis draws, two steps of it."""

    @explore(path, 40)
    @given(problem=problems_of_formats())
    def check(problem: dict[str, Any]) -> None:
        rng = np.random.default_rng(problem["seed"])
        flags = problem["flags"]
        if flags.get("cautious_weight_decay") and not flags["decoupled"]:
            flags = flags | dict(cautious_weight_decay=False)
        shared = dict(steps_taken=problem["steps_taken"], first_element=problem["first_element"])
        cases = [
            make_case(rng, (size,), dtype, grad_dtype, path.device, special=special, **shared, **combination)
            for size, (dtype, combination), grad_dtype, special in problem["cases"]
        ]
        options = {key: problem[key] for key in ("hyper", "update_bound", "chunk_size", "seed")}
        run_steps(cases, 2, rng, flags=flags, **options)

    check()


# --- values ---------------------------------------------------------------------------------------------------------


def coded_case(path: Path, gradient: Any, dtype: str = "float32", param_format: str = "native", **options: Any) -> Case:
    """Return a case with 8-bit moments at the start of training, a weight of 1 and the given gradient."""
    gradient = np.asarray(gradient, dtype=np.float32)
    rng = np.random.default_rng(0)
    formats = dict(param_format=param_format, moment_format="8bit")
    case = make_case(rng, gradient.shape, dtype, "float32", path.device, **formats, **options)
    case.start_anew()
    case.write("param", store(np.ones(gradient.shape, np.float32), dtype))
    case.write("grad", gradient)
    return case


def moments_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return the judge's moments of a flat case with 8-bit moments."""
    a = case.arrays
    unscale = np.float32(1.0 / np.float64(a["exp_avg_sq_scale"]))
    return decode_moments(a["exp_avg"], a["exp_avg_sq"], a["moment_groups"], unscale)


def test_all_zero_groups(path: Path) -> None:
    """Without gradients codes stay 0 and weights move by their decay alone; a first one shows in its group only."""
    gradient = np.zeros(60, np.float32)
    gradient[20] = 1e-3
    case = coded_case(path, np.zeros(60))
    launch = Launch([case])
    for _ in range(3):
        launch.step()
    check_all([case], "no gradients")
    assert not any(case.arrays[key].any() for key in ("exp_avg", "exp_avg_sq"))
    nothing = 15  # no octave, one that spans nothing, the finest steps of a ratio
    assert [*case.arrays["moment_groups"]] == [nothing] * 4
    case.write("grad", gradient)
    launch.step()
    check_all([case], "one gradient")
    assert [*np.flatnonzero(case.arrays["exp_avg"])] == [*np.flatnonzero(case.arrays["exp_avg_sq"])] == [20]
    assert [*np.flatnonzero(case.arrays["moment_groups"] != nothing)] == [1]


def test_one_huge_outlier_in_a_group(path: Path) -> None:
    """1e6 beside 1e-3: v spans 60 octaves, of which a group holds 32. Neighbours move on, less, and none explodes."""
    case = coded_case(path, np.full(32, 1e-3))
    case.arrays["grad"][5] = 1e6
    case.write("grad", case.arrays["grad"])
    launch = Launch([case], HYPER | dict(weight_decay=0.0))
    before = case.arrays["param"]
    for step in range(4):
        launch.step()
        check_all([case], f"step {step + 1}")
        moved, before = before - case.arrays["param"], case.arrays["param"]
        others = np.arange(16) != 5
        bound = HYPER["lr"] * largest_update(step + 1, HYPER["beta1"], HYPER["beta2"])
        assert np.all(moved > 0)
        assert np.all(moved <= bound + 2.0**-24)  # half the last bit of a weight
        if step > 0:
            assert np.all(moved[:16][others] < moved[20]), "what is kept larger than it is moves less"
    assert np.all(case.arrays["exp_avg_sq"] > 0), "no second moment becomes 0"


@pytest.mark.parametrize("gradient", [1e-15, 1e-19, 1e-21, 3e-22, 1e-23, 1e-30, 1e-45])
def test_second_moment_that_underflows(path: Path, gradient: float) -> None:
    """Squares below float32's smallest are 0 in exact Adam too; m, which has nothing to be held by, vanishes with v."""
    case = coded_case(path, np.array([gradient] * 20 + [0.0, -gradient]))
    launch = Launch([case], HYPER | dict(eps=0.0))
    for step in range(3):
        launch.step()
        check_all([case], f"step {step + 1}")
    if gradient <= 1e-23:  # 0.01 of its square is less than half of 2^-149
        assert not case.arrays["exp_avg"].any() and not case.arrays["exp_avg_sq"].any()


def test_dead_elements_are_forgotten(path: Path) -> None:
    """Codes of all octaves, first moments of 0 and no gradients: some are forgotten, those that still move are not."""
    rng = np.random.default_rng(73)
    case = coded_case(path, np.zeros(1600))
    case.write("exp_avg_sq", rng.integers(0, 256, 1600, np.uint8))
    case.write("moment_groups", (100 << 8 | rng.integers(10, 16, 100) << 4).astype(np.int16))  # 14 octaves to 32
    moving = rng.uniform(size=1600) < 0.3
    case.write("exp_avg", np.where(moving, 100, 0).astype(np.int8))
    before = case.arrays["exp_avg_sq"]
    launch = Launch([case])
    for step in range(2):
        launch.step()
        check_all([case], f"step {step + 1}")
    forgotten = (before > 0) & (case.arrays["exp_avg_sq"] == 0)
    assert 100 < np.count_nonzero(forgotten) and not np.any(forgotten & moving)


def test_second_moments_about_the_largest(path: Path) -> None:
    """A v beyond 2^103, under a scale of 2^24, cannot be held and marks its element; what is below is held."""
    gradient = 2.0 ** np.linspace(51, 52, 200)
    case = coded_case(path, gradient)
    Launch([case], HYPER | dict(beta1=0.0, beta2=0.0, eps=0.0)).step()
    check_all([case], "about 2^103")
    marked = case.arrays["exp_avg"] == -128
    assert 80 < np.count_nonzero(marked) < 120


BAD = {"inf": np.inf, "minus_inf": -np.inf, "nan": np.nan, "overflow": 1e30}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
def test_damage_stays_where_it_was(path: Path, moment_format: str, bad: str) -> None:
    """A bad gradient of one element leaves all others the bits of a run in which that element had none, then and later.

    In a group of 8-bit moments it counts as 0, as an element does that never had a gradient; its own first moment is
    not a number from then on, and so is its weight.
    """
    rng = np.random.default_rng(61)
    place, size = 21, 40
    others = np.arange(size) != place
    formats = dict(param_format="split24", moment_format=moment_format)
    damaged, without = (
        make_case(np.random.default_rng(62), (size,), "bfloat16", "float32", path.device, **formats) for _ in range(2)
    )
    for case in (damaged, without):
        case.start_anew()
    launches = Launch([damaged], positions=[3]), Launch([without], positions=[3])
    for step, of_damaged in enumerate((0.0, BAD[bad], 0.5, -0.5)):
        gradient = rng.standard_normal(size).astype(np.float32)
        gradient[place] = 0
        without.write("grad", gradient)
        gradient[place] = of_damaged
        damaged.write("grad", gradient)
        for launch in launches:
            launch.step()
        check_all([damaged, without], f"step {step + 1}")
        for key in damaged.tensors.keys() - {"step", "grad", "max_exp_avg_sq"}:
            got, expected = (
                stored(case[key]) if key in UNSHAPED else stored(case[key])[others] for case in (damaged, without)
            )
            assert_same_bits(got, expected, damaged.dtypes[key], f"step {step + 1}: {key} of the others")
    if moment_format == "8bit":
        assert damaged.arrays["exp_avg"][place] == -128
        assert np.isnan(damaged.weights()[place])


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
def test_learning_rate_of_zero(path: Path, moment_format: str) -> None:
    """Weights other than -0.0 stay, every bit of them, however they are stored; moments move on."""
    rng = np.random.default_rng(63)
    cases = []
    for dtype, form in itertools.product(SIXTEEN_BITS, PARAM_FORMATS):
        case = make_case(rng, (300,), dtype, dtype, path.device, param_format=form, moment_format=moment_format)
        case.start_anew()
        values = (rng.choice([-1, 1], 300) * 10.0 ** rng.uniform(-5, 3, 300)).astype(np.float32)
        if form in ("split24", "split32"):  # what was stored by a step before; any other is put in order once
            no_chance = np.zeros(300, np.int64)
            for key, array in zip(
                ("param", "param_remainder"), split_weight(values, dtype, form, no_chance), strict=True
            ):
                case.write(key, array)
        else:
            case.write("param", store(values, dtype))
        cases.append(case)
    before = [dict(case.arrays) for case in cases]
    run_steps(cases, 2, rng, hyper=HYPER | dict(lr=0.0))
    for case, old in zip(cases, before, strict=True):
        for key in {"param", "param_remainder"} & case.tensors.keys():
            assert_same_bits(stored(case[key]), old[key], case.dtypes[key], f"{key} at lr = 0")
        assert not np.array_equal(case.arrays["exp_avg"], old["exp_avg"])


def test_skipped_steps_change_nothing(path: Path) -> None:
    """A gradient that is not finite, or none at all: every bit of weights, remainders, codes, words and scale stays."""
    rng = np.random.default_rng(64)
    groups = []
    for dtype, combination in formats_for(path):
        shape = (4100,) if combination["moment_format"] == "8bit" else (20,)
        case = make_case(rng, shape, dtype, dtype, path.device, ema_format="bfloat16", **combination)
        options = dict(ema_decay=0.9, ema_format="bfloat16", **request(dtype, combination))
        groups.append(Group([case], options=options))
    training = Training(groups, skip_nonfinite=True, seed=4)
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
    training.give_grads(absent=[case for group in groups for case in group.cases])
    training.step()
    assert_unchanged(before, snapshot(training.optimizer))
    training.give_grads()
    training.renew_grads(rng)
    training.step()
    training.check("random bits are those of the next step that is taken")


# --- the weights of float32 -----------------------------------------------------------------------------------------


def nearest_ties_up(x: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to the nearest bfloat16, ties away from zero, as split weights are."""
    return ((x.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def test_split32_follows_float32_weights_bit_for_bit(path: Path) -> None:
    """bfloat16 weights and their remainders are, by default, at each of 200 steps what float32 weights would be.

    The model sees them rounded to nearest.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator).bfloat16().to(path.device)
    start[:4] = torch.tensor([0.0, -0.0, 1e-39, -3e38])
    wide = torch.nn.Parameter(start.float())
    narrow = torch.nn.Parameter(start.clone())
    narrow.grad_dtype = None
    hyper: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    exact, split = FusedAdamW([wide], **hyper), FusedAdamW([narrow], **hyper)
    moved = torch.zeros_like(start, dtype=torch.bool)
    for step in steps_for(path, 200, 15):
        wide.grad = torch.randn(300, generator=generator).to(path.device)
        narrow.grad = wide.grad.clone()
        exact.step()
        split.step()
        merged = merge_weight(stored(narrow), stored(split.state[narrow]["param_remainder"]), "bfloat16", "split32")
        assert_same_bits(merged, stored(wide), "float32", f"step {step + 1}")
        assert torch.equal(bits(narrow), bits(nearest_ties_up(wide.detach()))), f"step {step + 1}"
        moved |= narrow.detach() != start
    assert split.state[narrow]["param_remainder"].dtype == torch.int16
    assert torch.equal(split.state[narrow]["exp_avg_sq"], exact.state[wide]["exp_avg_sq"])
    assert moved[4:].all()


@pytest.mark.parametrize("moment_format", ["float32", "bfloat16"])
def test_split32_of_float16_follows_float32_weights(path: Path, moment_format: str) -> None:
    """float16 weights do so from 2^-14 to 65,504, whatever the moments: both runs draw the same random bits."""
    rng = np.random.default_rng(65)
    values = (rng.choice([-1, 1], 200) * rng.uniform(0.5, 100, 200)).astype(np.float16)
    cases = [
        make_case(
            np.random.default_rng(66),
            (200,),
            dtype,
            "float32",
            path.device,
            param_format=form,
            moment_format=moment_format,
        )
        for dtype, form in (("float32", "native"), ("float16", "split32"))
    ]
    cases[0].write("param", values.astype(np.float32))
    cases[1].write("param", values)
    cases[1].write("param_remainder", np.zeros(200, np.int16))
    launch = Launch(cases, positions=[0, 0])
    for step in steps_for(path, 20, 5):
        launch.run()
        merged = merge_weight(stored(cases[1]["param"]), stored(cases[1]["param_remainder"]), "float16", "split32")
        assert_same_bits(merged, stored(cases[0]["param"]), "float32", f"step {step + 1}")
    assert np.any(stored(cases[1]["param"]) != values)


@pytest.mark.parametrize("param_format", ["split24", "split32"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_edited_weights_forget_what_does_not_fit(path: Path, dtype: str, param_format: str) -> None:
    """Any finite weight, written in place beside any remainder of another: half a unit at most, and never a NaN.

    After a step with a learning rate of 0 each is the weight that was written; only what a remainder would take below
    0 is 0.
    """
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    weights = patterns[np.isfinite(load(patterns.view(store(np.float32(0), dtype).dtype), dtype))]
    weights = weights[:: 13 if is_interpreted(path) else 1]
    half = 128 if param_format == "split24" else 1 << (15 if dtype == "bfloat16" else 12)
    case = make_case(np.random.default_rng(67), weights.shape, dtype, "float32", path.device, param_format=param_format)
    launch = Launch([case], HYPER | dict(lr=0.0))
    for remainder in (-half, -1, 1, half - 1):
        case.write("param", weights.view(case.arrays["param"].dtype))
        case.write("param_remainder", np.full(weights.shape, remainder, case.arrays["param_remainder"].dtype))
        before, not_zero = case.weights(), weights & 0x7FFF != 0  # -0.0 - -0.0 is 0.0
        assert np.all(np.isfinite(before))
        launch.step()
        check_all([case], f"remainder {remainder}")
        assert np.array_equal(case.arrays["param"].view(np.uint16)[not_zero], weights[not_zero])
        assert np.all(np.abs(load(case.arrays["param"], dtype)[~not_zero]) == 0)
        # A remainder by which float16's largest weight would round to infinity is cut.
        largest = weights & 0x7FFF == (0x7BFF if dtype == "float16" else 0x7F7F)
        assert np.all((case.weights() == before) | largest)


# --- the bound ------------------------------------------------------------------------------------------------------


def adversarial(t: int, beta1: float, beta2: float, steps: int) -> float:
    """Return the gradient of step `t` that brings |m_hat| / sqrt(v_hat) to its limit at the last of `steps`."""
    return (beta1 / beta2) ** (steps - t)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9)], ids=str)
def test_bound_changes_nothing_of_exact_moments(path: Path, betas: tuple[float, float]) -> None:
    """The same bits with and without it, on random gradients, constant ones, and those that reach the limit itself."""
    rng = np.random.default_rng(68)
    beta1, beta2 = betas
    hyper = dict(lr=1.0, beta1=beta1, beta2=beta2, eps=0.0, weight_decay=0.0)
    size = 64
    kinds = [("float32", "float32", "native"), ("float64", "float64", "native"), ("bfloat16", "float32", "split32")]
    bounded, free = (
        [make_case(rng, (size,), dtype, grad, path.device, param_format=form) for dtype, grad, form in kinds]
        for _ in range(2)
    )
    launches = Launch(bounded, hyper, update_bound=-1.0), Launch(free, hyper, update_bound=None)
    for case in (*bounded, *free):
        case.start_anew()
    for t in (1 + step for step in steps_for(path, 57, 17)):
        gradient = rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 3, size)
        gradient[0] = 1.0
        for i in range(1, 8):  # each at its limit at another step
            gradient[i] = adversarial(t, beta1, beta2, 8 * i + 1) * (t <= 8 * i + 1)
        gradient[8:16] = -gradient[:8]
        for case in (*bounded, *free):
            for key in {"param", "param_remainder"} & case.tensors.keys():
                case.write(key, np.zeros_like(case.arrays[key]))
            case.write("grad", gradient.astype(compute_dtype(case.grad_dtype)))
        for launch in launches:
            launch.run()
        for with_bound, without in zip(bounded, free, strict=True):
            for key, dtype in without.dtypes.items():
                what = f"step {t}: {key} of {without.param_dtype}"
                assert_same_bits(stored(with_bound[key]), stored(without[key]), dtype, what)
        if t % 8 == 1 and t > 1:
            limit = float(largest_update(t, beta1, beta2)) / 1.001
            reached = [abs(float(case["param"][t // 8])) for case in free]
            assert min(reached) > 0.99 * limit, "the limit was not reached: nothing is shown"


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS[1:])
def test_bound_clamps_what_rounded_moments_exceed(path: Path, moment_format: str) -> None:
    """A first moment far above the root of the second: lr * B_t with "auto", lr * a number, or the whole of it.

    From 0 weights, without a gradient: one step at t = 1000 takes (3 m / sqrt(v)) lr or the limit.
    """
    results = {}
    for bound in ("auto", 2.0, None):
        case = make_case(
            np.random.default_rng(70),
            (32,),
            "float32",
            "float32",
            path.device,
            steps_taken=999,
            moment_format=moment_format,
        )
        if moment_format == "8bit":
            case.write("moment_groups", np.full(2, 130 << 8 | 0 << 4 | 0, np.int32).astype(np.uint16).view(np.int16))
            case.write("exp_avg", np.tile(np.array([100, -100], np.int8), 16))
            case.write("exp_avg_sq", np.full(32, 5, np.uint8))
        else:
            case.write("exp_avg", store(np.tile(np.array([1, -1], np.float32), 16), "bfloat16"))
            case.write("exp_avg_sq", store(np.full(32, 1e-4, np.float32), "bfloat16"))
        case.write("grad", np.zeros(32, np.float32))
        case.write("param", np.zeros(32, np.float32))
        hyper = HYPER | dict(beta2=0.999, weight_decay=0.0)
        Launch([case], hyper, update_bound=bound).step()
        check_all([case], f"update_bound={bound!r}")
        results[bound] = case.arrays["param"]
    lr, sign = np.float64(HYPER["lr"]), np.tile([-1, 1], 16)
    assert np.array_equal(results["auto"], sign * np.float32(lr * largest_update(1000, 0.9, 0.999)))
    assert np.array_equal(results[2.0], sign * np.float32(lr * 2.0))
    assert np.all(np.abs(results[None]) > 1.5 * np.abs(results["auto"]))


# --- shards ---------------------------------------------------------------------------------------------------------


def shards_of(case: Case, boundaries: Sequence[int], path: Path) -> list[Case]:
    """Return the parts of a flat case between boundaries, each with state of its own."""
    shards = []
    for begin, end in itertools.pairwise((0, *boundaries, case.arrays["param"].size)):
        shard = Case(
            case.param_dtype,
            case.grad_dtype,
            {},
            {},
            case.ema_format,
            True,
            case.param_format,
            case.moment_format,
            case.first_element + begin,
        )
        for key, dtype in case.dtypes.items():
            array = case.arrays[key]
            if key == "moment_groups":
                array = array[begin // GROUP : -(-end // GROUP)]
            elif array.ndim:
                array = array[begin:end]
            shard.tensors[key] = Guarded(array.shape, dtype, path.device)
            shard.write(key, array)
        shards.append(shard)
    return shards


SHARDS = {
    "two": ([608], True),
    "four": ([304, 608, 912], True),
    "four_uneven": ([16, 32, 1184], True),
    "two_anywhere": ([601], False),
    "four_anywhere": ([1, 310, 999], False),
}


@pytest.mark.parametrize("cut", SHARDS)
def test_shards_have_the_bits_of_the_whole(path: Path, cut: str) -> None:
    """Two and four shards store after each step what the whole tensor does: random bits count from its start.

    8-bit moments wherever a group ends; all other formats wherever one likes.
    """
    rng = np.random.default_rng(71)
    boundaries, in_groups = SHARDS[cut]
    wholes = [
        make_case(rng, (1205,), dtype, "float32", path.device, ema_format="bfloat16", **combination)
        for dtype, combination in formats_for(path)
        if in_groups or combination["moment_format"] != "8bit"
    ]
    parts = [shards_of(case, boundaries, path) for case in wholes]
    whole = Launch(wholes, ema_decay=0.9, seed=5)
    count = len(boundaries) + 1
    sharded = [
        Launch([shards[i] for shards in parts], ema_decay=0.9, seed=5, positions=range(len(wholes)))
        for i in range(count)
    ]
    for step in steps_for(path, 2):
        for launch in (whole, *sharded):
            launch.run()
        for case, shards in zip(wholes, parts, strict=True):
            for key, dtype in case.dtypes.items():
                expected, got = stored(case[key]), [stored(shard[key]) for shard in shards]
                joined = np.concatenate(got) if expected.ndim else got[0]
                what = f"step {step + 1}: {key} of {case.param_format} {case.param_dtype}, {case.moment_format}"
                assert_same_bits(joined, expected, dtype, what)
            case.renew_grad(rng)
            ends = (0, *boundaries, 1205)
            for shard, (begin, end) in zip(shards, itertools.pairwise(ends), strict=True):
                shard.write("grad", case.arrays["grad"][begin:end])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("moment_format", MOMENT_FORMATS[1:])
def test_dtensors_have_the_bits_of_the_whole(path: Path, moment_format: str, world: int) -> None:
    """The optimizer on the shards of a DTensor, one rank after the other: weights, remainders, moments of the whole."""
    generator = torch.Generator().manual_seed(0)
    shape = (70, 64)  # of four shards the last holds 16 rows, the others 18
    weight = torch.randn(shape, generator=generator).bfloat16().to(path.device)
    grads = [torch.randn(shape, generator=generator).bfloat16().to(path.device) for _ in steps_for(path, 3)]
    options: dict[str, Any] = dict(
        lr=1e-2, param_format="split24", moment_format=moment_format, ema_decay=0.9, ema_format="bfloat16", seed=3
    )

    def train(p: torch.nn.Parameter, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        optimizer = FusedAdamW([torch.nn.Parameter(torch.zeros(3, device=path.device)), p], **options)
        for gradient in gradients:
            p.grad = gradient
            optimizer.step()
        state = {"param": p.detach(), **optimizer.state[p]}
        return {key: getattr(tensor, "_local_tensor", tensor) for key, tensor in state.items()}

    whole = train(torch.nn.Parameter(weight.clone()), grads)
    ranks = []
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            # Names of its own: DTensor's caches would hand out the mesh, and so the rank, of an equal one.
            mesh = init_device_mesh(path.device.type, (world,), mesh_dim_names=(f"seen_by_{rank}",))

            def part(tensor: torch.Tensor, rank: int = rank, mesh: Any = mesh) -> DTensor:
                local = tensor.chunk(world)[rank].clone()
                return DTensor.from_local(local, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())

            ranks.append(train(torch.nn.Parameter(part(weight)), [part(gradient) for gradient in grads]))
        finally:
            dist.destroy_process_group()
    assert whole.keys() >= ({"exp_avg_code"} if moment_format == "8bit" else {"exp_avg"})
    for key, expected in whole.items():
        parts = [rank[key] for rank in ranks]
        joined = torch.cat(parts) if expected.ndim else parts[0]
        assert joined.dtype == expected.dtype
        assert torch.equal(bits(joined), bits(expected)), key


def test_random_bits_tell_tensors_and_seeds_apart(path: Path) -> None:
    """The same weights, gradients and state at other positions or under another seed are rounded otherwise.

    Nothing else of the whole optimizer enters: the same position and seed in another table gives the same bits.
    """

    def run(seed: int, positions: Sequence[int]) -> list[np.ndarray]:
        cases = [
            make_case(np.random.default_rng(72), (64,), "bfloat16", "float32", path.device, param_format="split24")
            for _ in positions
        ]
        Launch(cases, positions=positions, seed=seed).run()
        return [stored(case["param_remainder"]) for case in cases]

    first, second = run(0, [0, 1])
    assert np.array_equal(first, run(0, [7, 3, 0])[2])
    for other in (second, run(1, [0])[0]):
        assert 0 < np.count_nonzero(first != other) < 64
    assert formats.random_stream(0, 0) != formats.random_stream(0, 1)
    assert math.isfinite(first.mean())
