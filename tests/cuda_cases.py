"""Tensors in guarded memory for the CUDA kernels that run on the CPU, and the native CPU path that judges them."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from adamw_kernels import backends
from adamw_kernels.control import NormDomain, StepControl
from adamw_kernels.formats import GROUP, compute_dtype, ema_dtype, random_stream, remainder_dtype
from adamw_kernels.hyperparameters import Hyperparameters
from adamw_kernels.launch_table import LaunchPlan, LaunchTable, TensorSpec

CPU = torch.device("cpu")

# Of SGD, the second is the momentum, the third the dampening.
HYPERPARAMETERS = Hyperparameters(1e-2, 0.9, 0.99, 1e-8, 0.1, max_grad_norm=0.5, ema_decay=0.9, initial_lr=0.03)

# Every operand lies within a buffer whose other elements must stay as they are; 32 of them keep 16-byte alignment.
GUARD = 32
GUARD_VALUE = 7


class CudaOnHost:
    """A backend that runs the CUDA kernels on the CPU."""

    name: ClassVar[str] = "cuda"
    chunk_size = backends.CudaBackend.chunk_size

    def __init__(self, step: Callable[..., int], *, backwards: bool = False) -> None:
        """`backwards`: run the last thread of the last block first."""
        self._step = step
        self._backwards = backwards
        self.error = 0
        self.basic_blocks = self.pointers_made = 0

    def warm_up(self, table: LaunchTable, stages: int) -> None:
        """Nothing to do: the kernels are compiled."""

    def launch(self, table: LaunchTable, stages: int) -> None:
        """Run these stages; `error` and the counts say how it went."""
        counts = (ctypes.c_int64 * 2)()
        self.error = self._step(
            table.address, stages, table.batches_address, len(table.batches), self._backwards, counts
        )
        self.basic_blocks, self.pointers_made = counts


# --- tensors ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One tensor with its gradient and state, each within guarded memory."""

    spec: TensorSpec
    grad: torch.Tensor
    buffers: dict[str, torch.Tensor]
    memory: torch.Tensor  # that all buffers of several elements are parts of

    def bytes(self) -> list[torch.Tensor]:
        """All that a step may write, or must not."""
        single = (self.buffers.get("step"), self.buffers.get("scale"))
        return [self.memory, *(buffer.view(torch.uint8) for buffer in single if buffer is not None)]


def storage_dtypes(
    combination: tuple[torch.dtype, torch.dtype], param_format: str, moment_format: str, ema_format: str | None
) -> dict[str, torch.dtype]:
    """Of all operands, in the order of `make_case`'s offsets."""
    param_dtype, grad_dtype = combination
    compute = compute_dtype(param_dtype)
    first, second = {
        "float32": (compute, compute),
        "bfloat16": (torch.bfloat16, torch.bfloat16),
        "8bit": (torch.int8, torch.uint8),
    }[moment_format]
    dtypes = {"p": param_dtype, "g": grad_dtype, "m": first, "v": second, "v_max": compute}
    if ema_format is not None:
        dtypes["average"] = ema_dtype(param_dtype, ema_format)
    remainder = remainder_dtype(param_format)
    if remainder is not None:
        dtypes["remainder"] = remainder
    if moment_format == "8bit":
        dtypes["groups"] = torch.int16
    return dtypes


def some_values(name: str, dtype: torch.dtype, numel: int, generator: torch.Generator) -> torch.Tensor:
    """Any bits for remainders and codes; what 8-bit moments share, where v is 2**-40 to 2**24, any else."""
    if name == "groups":
        first_octave = torch.randint(110, 150, (numel,), generator=generator)
        return (first_octave << 8 | torch.randint(0, 256, (numel,), generator=generator)).to(torch.int16)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, (numel,), generator=generator).to(dtype)
    values = torch.randn(numel, generator=generator, dtype=torch.float64)
    return (values.square() if name in ("v", "v_max") else values).to(dtype)


# Where each operand's buffer begins and ends, in bytes, and where in it the operand does, in elements, and how many.
Layout = tuple[tuple[str, int, int, int, int], ...]
ALIGNMENT = 64


def contents(
    dtypes: tuple[tuple[str, torch.dtype], ...], numel: int, offsets: tuple[int, ...]
) -> tuple[torch.Tensor, Layout]:
    """The bytes of all operands within their guards, one after the other, and where they lie."""
    generator = torch.Generator().manual_seed(numel)
    buffers, layout, end = [], [], 0
    for i, (name, dtype) in enumerate(dtypes):
        offset = 0 if name == "groups" else offsets[i] if i < len(offsets) else offsets[0]
        count = -(-numel // GROUP) if name == "groups" else numel
        buffer = torch.full((GUARD + offset + count + GUARD,), GUARD_VALUE, dtype=dtype)
        buffer[GUARD + offset : GUARD + offset + count] = some_values(name, dtype, count, generator)
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + buffer.nbytes
        buffers.append(buffer)
        layout.append((name, start, end, GUARD + offset, count))
    memory = torch.full((end,), GUARD_VALUE, dtype=torch.uint8)
    for buffer, (_, start, end, *_) in zip(buffers, layout, strict=True):
        memory[start:end] = buffer.view(torch.uint8)
    return memory, tuple(layout)


# Most cases differ in flags alone from others: drawing their values took longer than both paths' steps.
remembered_contents = functools.lru_cache(maxsize=2048)(contents)
KEPT_ELEMENTS = 1024  # at most; a megabyte for a hundred such cases


def make_case(
    combination: tuple[torch.dtype, torch.dtype],
    numel: int,
    offsets: Sequence[int] = (0,) * 5,
    *,
    param_format: str = "native",
    moment_format: str = "float32",
    ema_format: str | None = None,
    norm: int = 0,
    **options: Any,
) -> Case:
    """A tensor of this size whose operands start `offsets` elements past a 16-byte boundary.

    Args:
        combination: dtypes of parameter and gradient.
        numel: elements.
        offsets: of p, g, m, v, v_max, then the average and the remainder where there are any, which have the first's
            by default.
        param_format: of the weight.
        moment_format: of the moments.
        ema_format: of the average, or None: there is none.
        norm: index of the gradient norm that the tensor is part of.
        options: other fields of `TensorSpec`; `momentum=False` for SGD without a buffer.
    """
    dtypes = storage_dtypes(combination, param_format, moment_format, ema_format)
    kept = numel <= KEPT_ELEMENTS
    memory, layout = (remembered_contents if kept else contents)(tuple(dtypes.items()), numel, tuple(offsets))
    if kept:
        memory = memory.clone()
    assert memory.data_ptr() % 16 == 0
    buffers, views = {}, {}
    for name, start, end, first, count in layout:
        buffers[name] = memory[start:end].view(dtypes[name])
        views[name] = buffers[name][first : first + count]
    buffers["step"] = torch.tensor([3.0])
    if moment_format == "8bit":
        buffers["scale"] = torch.tensor([2.0**24 * 1.3])
    options = {"amsgrad": False, "maximize": False, "decoupled": True, **options}
    is_sgd, has_first = options.get("rule") == "sgdw", options.pop("momentum", True)
    spec = TensorSpec(
        name=f"{numel} of {combination}, {param_format}, {moment_format}, at {[*offsets]}, {options}, EMA {ema_format}",
        param=views["p"],
        grad_dtype=combination[1],
        exp_avg=views["m"] if has_first else None,
        exp_avg_sq=None if is_sgd else views["v"],
        max_exp_avg_sq=views["v_max"] if options["amsgrad"] else None,
        step=buffers["step"],
        hyper=0,
        ema=views.get("average"),
        domain=NormDomain(norm),
        random_stream=random_stream(5, numel),
        param_format=param_format,
        moment_format=moment_format,
        remainder=views.get("remainder"),
        groups=views.get("groups"),
        scale=buffers.get("scale"),
        **options,
    )
    return Case(spec, views["g"], buffers, memory)


def run(
    backend: backends.Backend,
    cases: list[Case],
    chunk_size: int | None = None,
    control: StepControl | None = None,
    signals: tuple[float | None, float | None] = (None, None),
) -> None:
    """One step over all cases at once; `signals`: grad_scale and found_inf."""
    plan = LaunchPlan([case.spec for case in cases], 1, lambda device: backend, chunk_size, control)
    plan.hypers.write_all(HYPERPARAMETERS)
    plan.write_grads([case.grad.data_ptr() or 1 for case in cases])
    if control is not None:
        control.signal(*signals)
    plan.launch()


def assert_same_bits(cases: list[Case], expected: list[Case]) -> None:
    """Every buffer, guards included, holds the same bits in both."""
    for case, other in zip(cases, expected, strict=True):
        if all(torch.equal(a, b) for a, b in zip(case.bytes(), other.bytes(), strict=True)):
            continue  # otherwise: which operand
        for name, buffer in case.buffers.items():
            wanted = other.buffers[name]
            assert torch.equal(buffer.view(torch.uint8), wanted.view(torch.uint8)), f"{name} of {case.spec.name}"
        raise AssertionError(f"between the operands of {case.spec.name}")


def check(
    step: Callable[..., int],
    make_cases: Callable[[], list[Case]],
    chunk_size: int | None = None,
    *,
    backwards: bool = False,
    make_control: Callable[[], StepControl | None] = lambda: None,
    signals: tuple[float | None, float | None] = (None, None),
) -> torch.Tensor | None:
    """Run the same cases by the CUDA kernels and by the native CPU path, and compare; what was decided, in words."""
    cases, expected = make_cases(), make_cases()
    control, other = make_control(), make_control()
    backend = CudaOnHost(step, backwards=backwards)
    run(backend, cases, chunk_size, control, signals)
    assert backend.error == 0
    run(backends.CpuBackend(), expected, chunk_size, other, signals)
    assert_same_bits(cases, expected)
    skipped = False
    decision = None
    if control is not None and other is not None:
        decision = control.verdict(CPU).decision
        assert torch.equal(decision, other.verdict(CPU).decision)
        skipped = bool(control.verdict(CPU).skip())
    assert all(case.spec.step.item() == (3.0 if skipped else 4.0) for case in cases)
    return decision
