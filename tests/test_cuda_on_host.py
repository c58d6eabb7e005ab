"""csrc/cuda.cu compiled as plain C++ and run on the CPU, thread after thread.

What this proves: the index mapping. Which block and thread reads and writes which element is ordinary integer
arithmetic in that file; the kernels share no memory and never synchronise, so running their threads one after another
does what a GPU does. Every element must be updated exactly once, nothing beside it touched, no access be misaligned
(a fault on a GPU), and the order of threads not matter. The update itself must have the native CPU path's bits.

What it does not prove: anything about the code that nvcc generates, nor that launches succeed on a GPU. The first is
what test_compiled_cuda.py is about; both are tested wherever there is a GPU, by every test that takes `path`.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from adamw_kernels import backends
from adamw_kernels.formats import PARAM_DTYPES, compute_dtype, grad_dtypes
from adamw_kernels.launch_table import ROW_PARAM, LaunchPlan, LaunchTable, TensorSpec

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]

COMBINATIONS = [(param, grad) for param in PARAM_DTYPES for grad in grad_dtypes(param)]
FLAGS = [
    dict(zip(("amsgrad", "maximize", "decoupled"), flags, strict=True)) for flags in product((False, True), repeat=3)
]
HYPERPARAMETERS = [1e-2, 0.9, 0.99, 1e-8, 0.1]  # lr, beta1, beta2, eps, weight_decay

# Every operand lies within a buffer whose other elements must stay as they are; 32 of them keep 16-byte alignment.
GUARD = 32
GUARD_VALUE = -7.0

MISALIGNED = -1

pytestmark = pytest.mark.skipif(not backends.cpu_isas(), reason="the native CPU path, which judges here, is not built")


# --- the kernels as a shared library ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`step` of cuda_on_host/harness.cpp, compiled together with csrc/cuda.cu."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("compiling csrc/cuda.cu as plain C++ needs a C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    stand_in = ROOT / "tests" / "cuda_on_host"
    # Contraction is off as in CMakeLists.txt. `#pragma unroll` is nvcc's own.
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wno-unknown-pragmas", f"-I{stand_in}", f"-I{ROOT / 'csrc'}"]
    watched = ["-fsanitize=alignment", "-fsanitize-coverage=trace-pc", "-x", "c++"]
    kernels, harness, library = (str(folder / name) for name in ("cuda.o", "harness.o", "cuda_on_host.so"))
    for command in (
        [*flags, *watched, "-c", str(ROOT / "csrc" / "cuda.cu"), "-o", kernels],
        [*flags, "-c", str(stand_in / "harness.cpp"), "-o", harness],
        ["-shared", kernels, harness, "-o", library],
    ):
        result = subprocess.run([compiler, *command], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    function = ctypes.CDLL(library).step
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, integer, ctypes.c_int, ctypes.POINTER(integer)]
    function.restype = ctypes.c_int
    return function


class CudaOnHost:
    """A backend that runs the CUDA kernels on the CPU."""

    name: ClassVar[str] = "cuda"
    chunk_size = backends.CudaBackend.chunk_size

    def __init__(self, step: Callable[..., int], *, backwards: bool = False) -> None:
        """`backwards`: run the last thread of the last block first."""
        self._step = step
        self._backwards = backwards
        self.error = 0
        self.basic_blocks = 0

    def warm_up(self, table: LaunchTable) -> None:
        """Nothing to do: the kernels are compiled."""

    def launch(self, table: LaunchTable) -> None:
        """Run both stages; `error` and `basic_blocks` say how it went."""
        entered = ctypes.c_int64()
        self.error = self._step(
            table.address, table.batches_address, len(table.batches), self._backwards, ctypes.byref(entered)
        )
        self.basic_blocks = entered.value


# --- tensors ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One tensor with its gradient and moments, each within guarded memory."""

    spec: TensorSpec
    grad: torch.Tensor
    buffers: list[torch.Tensor]


def make_case(
    combination: tuple[torch.dtype, torch.dtype], numel: int, offsets: Sequence[int] = (0,) * 5, **flags: bool
) -> Case:
    """A tensor of this size; its p, g, m, v and v_max start `offsets` elements past a 16-byte boundary."""
    param_dtype, grad_dtype = combination
    compute = compute_dtype(param_dtype)
    generator = torch.Generator().manual_seed(numel)
    buffers, views = [], []
    for i, (dtype, offset) in enumerate(zip((param_dtype, grad_dtype, *[compute] * 3), offsets, strict=True)):
        buffer = torch.full((GUARD + offset + numel + GUARD,), GUARD_VALUE, dtype=dtype)
        assert buffer.data_ptr() % 16 == 0
        view = buffer[GUARD + offset : GUARD + offset + numel]
        values = torch.randn(numel, generator=generator, dtype=torch.float64)
        view.copy_(values if i < 3 else values.square())
        buffers.append(buffer)
        views.append(view)
    step = torch.tensor([3.0])
    flags = {"amsgrad": False, "maximize": False, "decoupled": True, **flags}
    spec = TensorSpec(
        name=f"{numel} elements, offsets {tuple(offsets)}, {flags}",
        param=views[0],
        grad_dtype=grad_dtype,
        exp_avg=views[2],
        exp_avg_sq=views[3],
        max_exp_avg_sq=views[4] if flags["amsgrad"] else None,
        step=step,
        hyper=0,
        **flags,
    )
    return Case(spec, views[1], [*buffers, step])


def run(backend: backends.Backend, cases: list[Case], chunk_size: int | None = None) -> None:
    """One step over all cases at once."""
    plan = LaunchPlan([case.spec for case in cases], 1, lambda device: backend, chunk_size)
    plan.hypers.write_all(HYPERPARAMETERS)
    plan.write_grads([case.grad.data_ptr() or 1 for case in cases])
    plan.launch()


def assert_same_bits(cases: list[Case], expected: list[Case]) -> None:
    """Every buffer, guards included, holds the same bits in both."""
    for case, other in zip(cases, expected, strict=True):
        for name, buffer, wanted in zip(
            ("p", "g", "m", "v", "v_max", "step"), case.buffers, other.buffers, strict=True
        ):
            assert torch.equal(buffer.view(torch.uint8), wanted.view(torch.uint8)), f"{name} of {case.spec.name}"


def check(
    step: Callable[..., int],
    make_cases: Callable[[], list[Case]],
    chunk_size: int | None = None,
    *,
    backwards: bool = False,
) -> None:
    """Run the same cases by the CUDA kernels and by the native CPU path, and compare."""
    cases, expected = make_cases(), make_cases()
    backend = CudaOnHost(step, backwards=backwards)
    run(backend, cases, chunk_size)
    assert backend.error == 0
    run(backends.CpuBackend(), expected, chunk_size)
    assert_same_bits(cases, expected)
    assert all(case.spec.step.item() == 4.0 for case in cases)


def combination_name(combination: tuple[torch.dtype, torch.dtype]) -> str:
    """'float32-bfloat16'."""
    return "-".join(str(dtype).removeprefix("torch.") for dtype in combination)


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
def test_aligned_operands_go_several_elements_at_a_time(
    step: Callable[..., int], combination: tuple[torch.dtype, torch.dtype]
) -> None:
    """The vector path is taken wherever all operands sit alike: it enters far fewer basic blocks."""

    def basic_blocks(offsets: Sequence[int]) -> int:
        backend = CudaOnHost(step)
        run(backend, [make_case(combination, 10_000, offsets)])
        assert backend.error == 0
        return backend.basic_blocks

    one_by_one = basic_blocks([0, 0, 1, 0, 0])
    for past in (0, 1, 16 // combination[0].itemsize - 1):
        # Measured: 0.31 (eight at a time) to 0.67 (two); the conversions to and from 16 bits branch for each element.
        assert basic_blocks([past] * 5) < 0.75 * one_by_one


def test_misaligned_access_would_be_noticed(step: Callable[..., int]) -> None:
    """A parameter at an odd address, which the checks in front of a launch table refuse, makes the step fail."""
    case = make_case(COMBINATIONS[0], 40)
    backend = CudaOnHost(step)
    plan = LaunchPlan([case.spec], 1, lambda device: backend)
    plan.hypers.write_all(HYPERPARAMETERS)
    plan.write_grads([case.grad.data_ptr()])
    plan.tables[0].rows[ROW_PARAM] += 1
    plan.launch()
    assert backend.error == MISALIGNED
