"""csrc/cuda.cu compiled as plain C++ and run on the CPU, thread after thread.

What this proves: the index mapping. Which block and thread reads and writes which element is ordinary integer
arithmetic in that file; the threads of a block work together only through barriers, so running them in turn, each up
to its next barrier, does what a GPU does (test_cuda_stand_in.py). Every element must be updated exactly once, nothing
beside it touched, no access be misaligned (a fault on a GPU), and the order of threads not matter. Norms, decisions,
updates and averages must have the native CPU path's bits.

What it does not prove: anything about the code that nvcc generates, nor that launches succeed on a GPU. The first is
what test_compiled_cuda.py is about; both are tested wherever there is a GPU, by every test that takes `path`.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from cuda_cases import CPU, HYPERPARAMETERS, Case, CudaOnHost, assert_same_bits, check, make_case, run
from cuda_stand_in import MISALIGNED_ADDRESS, ROOT, STAND_IN, compile_kernels

from adamw_kernels import backends
from adamw_kernels.control import DECISION_NORM, DECISION_NORMS, StepControl
from adamw_kernels.formats import PARAM_DTYPES, PARAM_FORMATS, grad_dtypes
from adamw_kernels.launch_table import ROW_PARAM, LaunchPlan

COMBINATIONS = [(param, grad) for param in PARAM_DTYPES for grad in grad_dtypes(param)]
FLAGS = [
    dict(zip(("amsgrad", "maximize", "decoupled"), flags, strict=True)) for flags in product((False, True), repeat=3)
]
VARIANTS = [
    {**flags, "cautious": cautious, "cautious_decay": decay}
    for flags, (cautious, decay) in product(FLAGS, product((False, True), repeat=2))
]

# Every way to store what is beside the gradient, but native weights beside wide moments: dtypes, param_format and
# moment_format.
STORAGES = [
    (combination, param_format, moment_format)
    for combination in COMBINATIONS
    for param_format in (PARAM_FORMATS if combination[0].itemsize == 2 else ["native"])
    for moment_format in (["float32"] if combination[0] == torch.float64 else ["float32", "bfloat16", "8bit"])
    if (param_format, moment_format) != ("native", "float32")
]
# One of each pair of formats.
FEW_STORAGES = [
    (c, *formats)
    for c, *formats in STORAGES
    if c in {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)}
] + [(c, *formats) for c, *formats in STORAGES if c == (torch.float16, torch.float32)]

pytestmark = pytest.mark.skipif(not backends.cpu_isas(), reason="the native CPU path, which judges here, is not built")


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`step` of cuda_on_host/harness.cpp, compiled together with csrc/cuda.cu."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    function = compile_kernels(folder, ROOT / "csrc" / "cuda.cu", STAND_IN / "harness.cpp").step
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, integer, pointer, integer, ctypes.c_int, ctypes.POINTER(integer)]
    function.restype = ctypes.c_int
    return function


def combination_name(combination: tuple[torch.dtype, torch.dtype]) -> str:
    """'float32-bfloat16'."""
    return "-".join(str(dtype).removeprefix("torch.") for dtype in combination)


def storage_name(storage: tuple[tuple[torch.dtype, torch.dtype], str, str]) -> str:
    """'bfloat16-float32-split24-8bit'."""
    combination, *formats = storage
    return "-".join([combination_name(combination), *formats])


every_storage = pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
a_few_storages = pytest.mark.parametrize("storage", FEW_STORAGES, ids=storage_name)
Storage = tuple[tuple[torch.dtype, torch.dtype], str, str]

every_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_name)


# --- tests ----------------------------------------------------------------------------------------------------


@every_combination
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(key for key in flags if flags[key]) or "plain")
def test_sizes_around_vectors_and_chunks(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype], flags: dict[str, bool]
) -> None:
    """Sizes 0 to 17 and chunk boundaries ± 1 elements have the native path's bits, for every flag."""
    sizes = [*range(18), *(32 * chunks + i for chunks in (1, 2, 3) for i in (-1, 0, 1))]
    check(step, lambda: [make_case(combination, numel, **flags) for numel in sizes], chunk_size=32)


@every_combination
@pytest.mark.parametrize("amsgrad", [False, True])
def test_operands_equally_far_past_a_boundary(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype], amsgrad: bool
) -> None:
    """Tensors that start anywhere, all operands alike: head, vectors and tail together cover each element once."""

    def make_cases() -> list[Case]:
        sizes = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100]
        return [make_case(combination, n, [past] * 5, amsgrad=amsgrad) for n in sizes for past in range(17)]

    check(step, make_cases, chunk_size=16)


@every_combination
@pytest.mark.parametrize("amsgrad", [False, True])
def test_operands_unequally_far_past_a_boundary(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype], amsgrad: bool
) -> None:
    """Where one operand sits differently from the others, nothing is misaligned and the bits are the same."""

    def make_cases() -> list[Case]:
        cases = []
        for odd_one, past, further in product(range(5), range(9), (1, 2, 4, 8)):
            offsets = [past + further if i == odd_one else past for i in range(5)]
            cases.append(make_case(combination, 50, offsets, amsgrad=amsgrad))
        return cases

    check(step, make_cases, chunk_size=48)


@every_combination
def test_chunks_of_the_size_in_use(step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype]) -> None:
    """With the backend's own chunk size every thread goes round several times, and rounds meet without a gap."""
    chunk = CudaOnHost.chunk_size

    def make_cases() -> list[Case]:
        sizes = [255, 257, 2047, 2049, chunk - 1, chunk + 1]
        aligned = [make_case(combination, n, [past] * 5) for n in sizes for past in (0, 1)]
        return [*aligned, make_case(combination, chunk + 1000, [0, 0, 1, 0, 0])]

    check(step, make_cases)


def test_all_combinations_in_one_table(step: Callable[..., int]) -> None:
    """One call updates tensors of every dtype combination and flag, whatever order they are given in."""

    def make_cases() -> list[Case]:
        cases = [make_case(c, 40, [past] * 5, **flags) for past in (0, 3) for flags in FLAGS for c in COMBINATIONS]
        return [make_case(COMBINATIONS[-1], 0), *cases]

    check(step, make_cases, chunk_size=16)


def test_order_of_threads_is_free(step: Callable[..., int]) -> None:
    """Running the last thread first changes no bit."""

    def make_cases() -> list[Case]:
        return [make_case(c, n, [past] * 5, amsgrad=True) for c in COMBINATIONS for n in (5, 700) for past in (0, 1)]

    check(step, make_cases, chunk_size=256, backwards=True)


@every_combination
def test_variants_and_averages(step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype]) -> None:
    """Cautious masks with every other flag, with an average of either kind and without, in vectors and one by one."""
    formats = (None, "float32") if combination[0] == torch.float64 else (None, "float32", "bfloat16")

    def make_cases() -> list[Case]:
        return [
            make_case(combination, 45 + past, [past] * 6 if ema_format else [past] * 5, ema_format=ema_format, **flags)
            for past, flags, ema_format in product((0, 3), VARIANTS, formats)
        ]

    check(step, make_cases, chunk_size=32)


@pytest.mark.parametrize(
    ("combination", "ema_format"),
    [(c, "float32") for c in COMBINATIONS] + [(c, "bfloat16") for c in COMBINATIONS if c[0] != torch.float64],
    ids=lambda value: value if isinstance(value, str) else combination_name(value),
)
def test_averages_anywhere(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype], ema_format: str
) -> None:
    """Averages as far past a boundary as the other operands, and any other distance: each element has its own bits."""

    def make_cases() -> list[Case]:
        cases = []
        for n, past, further in product((0, 1, 7, 16, 33, 100), (0, 1, 5), (0, 1, 2, 4, 8)):
            offsets = [past] * 5 + [past + further]
            cases.append(make_case(combination, n, offsets, ema_format=ema_format, ema_warmup=n % 2 == 0))
        return cases

    check(step, make_cases, chunk_size=48)


def measuring(num_norms: int = 1, **guards: Any) -> Callable[[], StepControl]:
    """What makes a control that measures this many norms."""
    return lambda: StepControl(measures=True, num_norms=num_norms, **guards)


@pytest.mark.parametrize("backwards", [False, True])
@every_combination
def test_norms_and_clipping(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype], backwards: bool
) -> None:
    """Sizes around rows of lanes and norm chunks, gradients anywhere: one norm clips all but the last."""
    sizes = [0, 1, 3, 4, 5, 255, 1023, 1024, 1025, 4097, 16383, 16384, 16385, 33000]

    def make_cases() -> list[Case]:
        clipped = [make_case(combination, n, [0, n % 4, 0, 0, 0], clip=True) for n in sizes]
        return [*clipped, make_case(combination, 1500, [0, 7, 0, 0, 0])]

    decision = check(step, make_cases, make_control=measuring(), backwards=backwards)
    assert decision is not None and 250 < float(decision.view(torch.float64)[DECISION_NORM]) < 350


def test_many_partial_sums_in_many_norms(step: Callable[..., int]) -> None:
    """Three norms, one of 3,000 partial sums, over tensors of all dtypes whose order is not the table's."""

    def make_cases() -> list[Case]:
        cases = [make_case(COMBINATIONS[-1 - i % 13], 1 + i % 5, norm=0, clip=True) for i in range(3000)]
        cases += [make_case(COMBINATIONS[-1 - i % 13], i, norm=1, clip=i % 2 == 0) for i in range(40)]
        return [*cases, make_case(COMBINATIONS[0], 0, norm=2, clip=True)]

    for backwards in (False, True):
        decision = check(step, make_cases, chunk_size=16, make_control=measuring(3), backwards=backwards)
        assert decision is not None
        norms = decision.view(torch.float64)[DECISION_NORMS:].tolist()
        assert norms[0] > norms[1] > norms[2] == 0


def test_partial_sums_are_added_in_their_lanes(step: Callable[..., int]) -> None:
    """Of 1e16 and two ones, 512 partial sums apart, the ones meet first: each added alone to 1e16 would be lost."""

    def make_cases() -> list[Case]:
        cases = [make_case((torch.float64, torch.float64), 1, clip=True) for _ in range(600)]
        for i, case in enumerate(cases):
            case.grad.fill_({0: 1e8, 1: 1.0, 513: 1.0}.get(i, 0.0))
        return cases

    decision = check(step, make_cases, make_control=measuring())
    assert decision is not None and float(decision.view(torch.float64)[DECISION_NORM]) == math.sqrt(1e16 + 2) > 1e8


@pytest.mark.parametrize(
    ("signals", "guards", "value", "skips"),
    [
        ((None, None), {}, math.nan, False),
        ((8.0, 0.0), {}, 1.0, False),
        ((3.0, None), {"max_skip_norm": 1e4}, 1.0, False),
        ((1e-30, None), {"max_skip_norm": 1e4}, 1.0, True),
        ((0.0, 0.0), {"skip_nonfinite": True}, 1.0, True),
        ((None, 1.0), {}, 1.0, True),
        ((None, math.nan), {}, 1.0, True),
        ((4.0, -2.0), {}, 1.0, True),
        ((None, None), {"skip_nonfinite": True}, math.inf, True),
        ((None, None), {"skip_nonfinite": True}, -math.inf, True),
        ((None, None), {"skip_nonfinite": True}, math.nan, True),
        ((None, None), {"skip_nonfinite": True}, 6e4, False),
        ((None, None), {"max_skip_norm": 1e-3}, 1.0, True),
        ((None, None), {"max_skip_norm": 1e3}, math.nan, True),
        ((None, None), {"max_skip_norm": torch.tensor(math.inf)}, math.inf, False),
        ((None, None), {"max_skip_norm": torch.tensor(math.inf)}, math.nan, True),
    ],
)
def test_decisions(
    step: Callable[..., int],
    signals: tuple[float | None, float | None],
    guards: dict[str, Any],
    value: float,
    skips: bool,
) -> None:
    """Loss scale, its flag and the guards decide as on the native path; a skipped step changes no byte."""

    def make_cases() -> list[Case]:
        cases = []
        for combination in COMBINATIONS:
            ema_format = "float32" if combination[0] == torch.float64 else "bfloat16"
            cases.append(make_case(combination, 45, ema_format=ema_format, amsgrad=True, clip=True))
        cases[5].grad[44] = value
        return cases

    decision = check(step, make_cases, 32, make_control=measuring(**guards), signals=signals)
    assert decision is not None and decision[:2].tolist() == [skips, skips]
    if skips:
        cases, control = make_cases(), measuring(**guards)()
        run(CudaOnHost(step), cases, 32, control, signals)
        assert_same_bits(cases, make_cases())


def test_loss_scale_without_a_norm(step: Callable[..., int]) -> None:
    """Where nothing is measured the scaler's signals count all the same, and skipped steps add up."""
    control, other = StepControl(measures=False), StepControl(measures=False)
    cases, expected = ([make_case(c, 40) for c in COMBINATIONS] for _ in range(2))
    for signals in ((8.0, 1.0), (8.0, 0.0), (None, 2.0), (None, None)):
        backend = CudaOnHost(step)
        run(backend, cases, 16, control, signals)
        assert backend.error == 0
        run(backends.CpuBackend(), expected, 16, other, signals)
        assert_same_bits(cases, expected)
        assert torch.equal(control.verdict(CPU).decision, other.verdict(CPU).decision)
    assert int(control.verdict(CPU).skipped_steps()) == 2
    assert {case.spec.step.item() for case in cases} == {5.0}


def test_tensors_without_a_gradient_are_left_alone(step: Callable[..., int]) -> None:
    """Where a gradient's address is 0, neither the tensor nor its step count changes; its neighbours do."""
    cases = [make_case(COMBINATIONS[0], 40) for _ in range(600)]  # more than one block of prepare
    untouched = [make_case(COMBINATIONS[0], 40) for _ in range(600)]
    backend = CudaOnHost(step)
    plan = LaunchPlan([case.spec for case in cases], 1, lambda device: backend, 32)
    plan.hypers.write_all(HYPERPARAMETERS)
    plan.write_grads([0 if i % 3 == 0 else case.grad.data_ptr() for i, case in enumerate(cases)])
    plan.launch()
    assert backend.error == 0
    assert_same_bits(cases[::3], untouched[::3])
    assert {case.spec.step.item() for i, case in enumerate(cases) if i % 3} == {4.0}
    assert not any(torch.equal(cases[i].spec.param, untouched[i].spec.param) for i in range(600) if i % 3)


@every_combination
def test_squares_go_several_elements_at_a_time(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype]
) -> None:
    """Sums of squares take whole rows of gradients at a vector's boundary: they enter fewer basic blocks."""

    def basic_blocks(offsets: Sequence[int], control: StepControl | None = None) -> int:
        backend = CudaOnHost(step)
        run(backend, [make_case(combination, 10_000, offsets)], control=control)
        assert backend.error == 0
        return backend.basic_blocks

    # Measured: 0.67 to 0.76, without what the update enters.
    of_squares = [
        basic_blocks(offsets, StepControl(measures=True)) - basic_blocks(offsets)
        for offsets in ([0] * 5, [0, 1, 0, 0, 0])
    ]
    assert of_squares[0] < 0.85 * of_squares[1]


def stored_case(storage: Storage, numel: int, offsets: Sequence[int] = (0,) * 5, **options: Any) -> Case:
    """A case of this storage; AMSGrad only where the moments are wide."""
    combination, param_format, moment_format = storage
    if options.get("amsgrad") and moment_format != "float32":
        options["amsgrad"] = False
    if combination[0] == torch.float32 and options.get("ema_format"):
        options["ema_format"] = "bfloat16"
    return make_case(combination, numel, offsets, param_format=param_format, moment_format=moment_format, **options)


@every_storage
def test_formats_of_any_size(step: Callable[..., int], storage: Storage) -> None:
    """Sizes around groups, vectors and chunks, with every option that the inner loop knows, alone and together."""
    options: list[dict[str, Any]] = [
        {},
        {"ema_format": "float32", "first_element": 2**32 - 20, "update_bound": -1.0},
        {"ema_format": "bfloat16", "cautious": True, "decoupled": False, "update_bound": 0.3},
        {"amsgrad": True, "cautious_decay": True, "maximize": True, "first_element": 5},
    ]
    sizes = [*range(18), *(32 * chunks + i for chunks in (1, 2, 3) for i in (-1, 0, 1)), 40, 56]
    check(step, lambda: [stored_case(storage, n, **some) for some in options for n in sizes], chunk_size=32)


@a_few_storages
def test_formats_anywhere(step: Callable[..., int], storage: Storage) -> None:
    """Operands alike past a boundary, and each further past it than the others: every element has its own bits."""

    def make_cases() -> list[Case]:
        cases = [stored_case(storage, n, [past] * 7, ema_format="float32") for n in (50, 97) for past in range(17)]
        for odd_one, past, further in product(range(7), (0, 3), (1, 2, 4, 8)):
            offsets = [past + further if i == odd_one else past for i in range(7)]
            cases.append(stored_case(storage, 70, offsets, ema_format="bfloat16", amsgrad=True))
        return cases

    check(step, make_cases, chunk_size=48)


@a_few_storages
@pytest.mark.parametrize("backwards", [False, True])
def test_formats_in_chunks_of_the_size_in_use(step: Callable[..., int], storage: Storage, backwards: bool) -> None:
    """With the backend's own chunk size, in either order of threads, rounds and chunks meet without a gap."""
    chunk = CudaOnHost.chunk_size

    def make_cases() -> list[Case]:
        return [stored_case(storage, n, [past] * 5) for n in (2047, 4100, chunk + 1000) for past in (0, 1)]

    check(step, make_cases, backwards=backwards)


SPECIAL_VALUES = [0.0, -0.0, math.inf, -math.inf, math.nan, 6e4, -6e4, 1e-7, -1e-7, 6e-8, 3e38, -3e38, 1e-38, 1e-44]


@every_storage
def test_special_values_in_formats(step: Callable[..., int], storage: Storage) -> None:
    """Zeros, infinities, NaNs, subnormals and the largest values, as weights and as gradients, among groups."""

    def make_cases() -> list[Case]:
        cases = []
        for shift, ema_format in product(range(3), (None, "bfloat16")):
            case = stored_case(storage, 500, [shift % 2] * 7, ema_format=ema_format, update_bound=-1.0)
            special = torch.tensor(SPECIAL_VALUES * 20, dtype=torch.float64)
            case.grad[: special.numel()] = special.to(case.grad.dtype)
            case.spec.param[100 + 5 * shift :][: special.numel()] = special.to(case.spec.param.dtype)
            if shift == 2:  # a new tensor
                for state in (case.spec.exp_avg, case.spec.exp_avg_sq, case.spec.groups, case.spec.remainder):
                    if state is not None:
                        state.zero_()
            cases.append(case)
        return cases

    check(step, make_cases, chunk_size=48)


@a_few_storages
def test_steps_in_formats(step: Callable[..., int], storage: Storage) -> None:
    """Sixty steps, over which the scale of 8-bit moments falls back: what is stored is what the next step reads."""
    cases, expected = ([stored_case(storage, 333, ema_format="float32", update_bound=-1.0)] for _ in range(2))
    scales = set()
    for k in range(60):
        for backend, tensors in ((CudaOnHost(step), cases), (backends.CpuBackend(), expected)):
            tensors[0].grad.copy_(torch.randn(333, generator=torch.Generator().manual_seed(k)))
            run(backend, tensors, 64)
        assert_same_bits(cases, expected)
        if cases[0].spec.scale is not None:
            scales.add(cases[0].spec.scale.item())
    if scales:  # 2**25 / beta2 at most, from which it fell by half
        assert len(scales) == 60 and 2.0**24 <= min(scales) < 2.0**24 * 1.3 < max(scales) < 2.0**25


def test_all_storages_in_one_table(step: Callable[..., int]) -> None:
    """One call updates tensors in every storage, in several launches; a skipped step changes none, and no scale."""
    make = {
        "plain": lambda: [make_case(c, 40, clip=True) for c in COMBINATIONS],
        "stored": lambda: [stored_case(s, n, clip=True) for n in (40, 0, 333) for s in reversed(STORAGES)],
    }
    check(step, lambda: [*make["stored"](), *make["plain"]()], chunk_size=48, make_control=measuring())
    cases, control = make["stored"](), measuring()()
    run(CudaOnHost(step), cases, 48, control, (None, 1.0))
    assert bool(control.verdict(CPU).skip())
    assert_same_bits(cases, make["stored"]())


@pytest.mark.parametrize("storage", [*((c, "native", "float32") for c in COMBINATIONS), *STORAGES], ids=storage_name)
def test_aligned_operands_go_several_elements_at_a_time(step: Callable[..., int], storage: Storage) -> None:
    """The vector path is taken wherever all operands sit alike, and only there.

    Update finds the average's address anew for every vector or element that it takes.
    """

    def pointers_made(offsets: Sequence[int], ema_format: str) -> int:
        backend = CudaOnHost(step)
        run(backend, [stored_case(storage, 10_000, offsets, ema_format=ema_format)])
        assert backend.error == 0
        return backend.pointers_made

    (param, grad), param_format, moment_format = storage
    at_once = (
        2 if param == torch.float64 else 8 if moment_format == "8bit" else 16 // min(param.itemsize, grad.itemsize)
    )
    # 8-bit moments' groups start at the first element, wherever that is.
    alike = (0,) if moment_format == "8bit" else (0, 1, 16 // param.itemsize - 1)
    for ema_format in ("float32", "bfloat16") if param != torch.float64 else ("float32",):
        one_by_one = pointers_made([0, 0, 1, 0, 0], ema_format)
        for past in alike:
            # Measured: 1.6 at most, with what every thread begins with.
            assert pointers_made([past] * 7, ema_format) < 1.7 / at_once * one_by_one
        for odd_one in (0, 1, 3, 5) if param_format in ("native", "stochastic") else (0, 1, 3, 5, 6):
            offsets = [int(i == odd_one) for i in range(7)]
            assert pointers_made(offsets, ema_format) > 0.9 * one_by_one


def test_misaligned_access_would_be_noticed(step: Callable[..., int]) -> None:
    """A parameter at an odd address, which the checks in front of a launch table refuse, makes the step fail."""
    case = make_case(COMBINATIONS[0], 40)
    backend = CudaOnHost(step)
    plan = LaunchPlan([case.spec], 1, lambda device: backend)
    plan.hypers.write_all(HYPERPARAMETERS)
    plan.write_grads([case.grad.data_ptr()])
    plan.tables[0].rows[ROW_PARAM] += 1
    plan.launch()
    assert backend.error == MISALIGNED_ADDRESS


# --- SGD --------------------------------------------------------------------------------------------------------------

# Every storage but those of 8-bit moments, of which SGD has none.
SGD_STORAGES: list[Storage] = [
    *((combination, "native", "float32") for combination in COMBINATIONS),
    *(storage for storage in STORAGES if storage[2] != "8bit"),
]
SGD_FLAGS = [
    dict(zip(("momentum", "nesterov", "maximize", "decoupled", "lr_in_momentum"), flags, strict=True))
    for flags in product((False, True), repeat=5)
]
every_sgd_storage = pytest.mark.parametrize("storage", SGD_STORAGES, ids=storage_name)


def sgd_case(storage: Storage, numel: int, offsets: Sequence[int] = (0,) * 5, **options: Any) -> Case:
    """A case of SGD in this storage."""
    combination, param_format, moment_format = storage
    formats = dict(param_format=param_format, moment_format=moment_format)
    return make_case(combination, numel, offsets, rule="sgdw", **formats, **options)


@every_sgd_storage
def test_sgd_of_any_size(step: Callable[..., int], storage: Storage) -> None:
    """Sizes around vectors and chunks with every flag, with an average of either kind and without."""
    averages = (None, "float32") if storage[0][0] == torch.float64 else (None, "float32", "bfloat16")
    sizes = [*range(18), *(32 * chunks + i for chunks in (1, 2, 3) for i in (-1, 0, 1))]

    def make_cases() -> list[Case]:
        return [
            sgd_case(storage, n, ema_format=averages[i % len(averages)], schedule_decay=i % 2 == 0, **flags)
            for i, (flags, n) in enumerate(product(SGD_FLAGS, sizes))
        ]

    check(step, make_cases, chunk_size=32)


@every_sgd_storage
@pytest.mark.parametrize("momentum", [False, True])
def test_sgd_anywhere(step: Callable[..., int], storage: Storage, momentum: bool) -> None:
    """Operands alike past a boundary, and each further past it than the others: every element has its own bits."""

    def make_cases() -> list[Case]:
        options: dict[str, Any] = dict(momentum=momentum, ema_format="float32")
        cases = [sgd_case(storage, n, [past] * 7, **options) for n in (0, 1, 17, 50, 97) for past in range(17)]
        for odd_one, past, further in product((0, 1, 2, 5, 6), (0, 3), (1, 2, 4, 8)):
            offsets = [past + further if i == odd_one else past for i in range(7)]
            cases.append(sgd_case(storage, 70, offsets, **options))
        return cases

    check(step, make_cases, chunk_size=48)


@every_sgd_storage
@pytest.mark.parametrize("backwards", [False, True])
def test_sgd_in_chunks_of_the_size_in_use(step: Callable[..., int], storage: Storage, backwards: bool) -> None:
    """With the backend's own chunk size, in either order of threads, rounds and chunks meet without a gap."""
    chunk = CudaOnHost.chunk_size

    def make_cases() -> list[Case]:
        return [sgd_case(storage, n, [past] * 5) for n in (2047, chunk + 1000) for past in (0, 1)]

    check(step, make_cases, backwards=backwards)


@every_sgd_storage
def test_sgd_of_special_values(step: Callable[..., int], storage: Storage) -> None:
    """Zeros, infinities, NaNs, subnormals and the largest values, as weights and as gradients."""

    def make_cases() -> list[Case]:
        cases = []
        for shift, momentum in product(range(3), (False, True)):
            case = sgd_case(storage, 500, [shift] * 7, momentum=momentum, nesterov=momentum)
            special = torch.tensor(SPECIAL_VALUES * 20, dtype=torch.float64)
            case.grad[: special.numel()] = special.to(case.grad.dtype)
            case.spec.param[100 + 5 * shift :][: special.numel()] = special.to(case.spec.param.dtype)
            cases.append(case)
        return cases

    check(step, make_cases, chunk_size=48)


@every_sgd_storage
def test_sgd_goes_several_elements_at_a_time(step: Callable[..., int], storage: Storage) -> None:
    """The vector path is taken wherever all operands sit alike, with a buffer and without, and only there."""

    def pointers_made(offsets: Sequence[int], momentum: bool) -> int:
        backend = CudaOnHost(step)
        run(backend, [sgd_case(storage, 10_000, offsets, ema_format="float32", momentum=momentum)])
        assert backend.error == 0
        return backend.pointers_made

    (param, grad), *_ = storage
    at_once = 2 if param == torch.float64 else 16 // min(param.itemsize, grad.itemsize)
    for momentum in (False, True):
        one_by_one = pointers_made([0, 1, 0, 0, 0], momentum)
        for past in (0, 1, 16 // param.itemsize - 1):
            # Measured: 1.6 at most, with what every thread begins with.
            assert pointers_made([past] * 7, momentum) < 1.7 / at_once * one_by_one
        # A buffer that is not there cannot sit elsewhere.
        elsewhere = pointers_made([0, 0, 1, 0, 0], momentum)
        assert elsewhere > 0.9 * one_by_one if momentum else elsewhere < 1.7 / at_once * one_by_one


def test_both_rules_in_one_table(step: Callable[..., int]) -> None:
    """AdamW and SGD side by side, clipped, over both couplings of the decay; a skipped step changes neither."""

    def make_cases() -> list[Case]:
        return [
            *(stored_case(s, n, clip=True, schedule_decay=True) for n in (40, 333) for s in STORAGES),
            *(sgd_case(s, n, clip=True, schedule_decay=n < 300) for n in (40, 0, 333) for s in reversed(SGD_STORAGES)),
        ]

    check(step, make_cases, chunk_size=48, make_control=measuring())
    cases, control = make_cases(), measuring()()
    run(CudaOnHost(step), cases, 48, control, (None, 1.0))
    assert_same_bits(cases, make_cases())
