"""CSV rows with a fixed schema: one dataclass a file, environment columns first, append only."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.machine import Environment


class SchemaError(RuntimeError):
    """A file holds rows of another schema."""


@dataclass(frozen=True)
class ThroughputRow:
    """One optimizer on one case in one dtype.

    Attributes:
        case: Name of the case.
        tensors: Number of tensors.
        groups: Number of parameter groups.
        params: Number of elements.
        dtype: dtype of parameters and gradients.
        contender: Name of the optimizer.
        state_dtype: dtypes of the optimizer's state, joined by "+".
        bytes_per_param: Bytes a one-pass step must read and write per parameter with this state (`traffic.py`).
        rounds: Number of interleaved rounds, each one sample.
        steps_per_sample: Steps timed together in a sample; times are per step.
        copies: Optimizers that took turns, each on tensors of its own, so that no cache holds the next one's.
        median_us: Median time of a step: CUDA events on a GPU, wall-clock on a CPU.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        wall_us: Median wall-clock time of a step, final synchronisation included.
        gb_s: 1e9 bytes a second, from bytes_per_param and median_us.
        roof_kernel: What the roof was measured with in the same rounds; empty where caches make it meaningless.
        roof_gb_s: The roof: that kernel's peak_gb_s.
        pct_roof: gb_s as a percentage of roof_gb_s.
        speedup: Time of torch's fused AdamW over this one's, median of the per-round ratios.
        speedup_p20: 20th percentile.
        speedup_p80: 80th percentile.
        checked_steps: Steps compared with float64 AdamW before timing.
        check_error: Largest error of a parameter after them, as a fraction of the tolerance (`check.py`).
        other_cores: Cores that other processes kept busy during the rounds (`disturbance.py`).
        clock_mhz: Clock of the CPU's cores or the GPU's multiprocessors right after the rounds; empty if unreadable.
        memory_mhz: Clock of the GPU's memory; empty for CPUs.
    """

    file: ClassVar[str] = "throughput.csv"

    case: str
    tensors: int
    groups: int
    params: int
    dtype: str
    contender: str
    state_dtype: str
    bytes_per_param: float
    rounds: int
    steps_per_sample: int
    copies: int
    median_us: float
    p20_us: float
    p80_us: float
    wall_us: float
    gb_s: float
    roof_kernel: str
    roof_gb_s: float | None
    pct_roof: float | None
    speedup: float | None
    speedup_p20: float | None
    speedup_p80: float | None
    checked_steps: int
    check_error: float
    other_cores: float | None
    clock_mhz: float | None
    memory_mhz: float | None


@dataclass(frozen=True)
class RoofRow:
    """One bandwidth kernel, sampled in the rounds of one case.

    Attributes:
        case: Case in whose rounds it was sampled.
        dtype: dtype of that case's parameters (the kernel itself always moves float32).
        kernel: Name of the kernel.
        bytes: Bytes it moves, once per operand read and once per operand written.
        rounds: Number of rounds.
        median_us: Median time.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        gb_s: 1e9 bytes a second, at the median time.
        peak_gb_s: The same in the fastest round.
        is_roof: 1 for the kernel the case's rows are compared with.
        other_cores: Cores that other processes kept busy during the rounds.
    """

    file: ClassVar[str] = "roof.csv"

    case: str
    dtype: str
    kernel: str
    bytes: int
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    gb_s: float
    peak_gb_s: float
    is_roof: int
    other_cores: float | None


@dataclass(frozen=True)
class HostRow:
    """Cost of a warm step on `tensors` tensors of one element.

    Attributes:
        contender: Name of the optimizer.
        kind: "tensor", or "dtensor": shards in a world of one process, as FSDP2 hands them over.
        mode: "full", or "python" with the kernels replaced by functions that do nothing.
        grads: "same" gradient tensors as in the step before, or "moved": others, as after `zero_grad()`.
        tensors: Number of tensors.
        rounds: Number of single-step samples.
        median_us: Median wall-clock time of `step()`, without waiting for a GPU.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        ns_per_tensor: Slope of median_us over `tensors`, fitted over this contender's rows of the same mode.
        fixed_us: Intercept of that fit.
        allocations: Buffers that torch's allocators handed out during one step; empty where it cannot count.
        new_tensors: Tensors that dispatched operators returned during one step, in-place results not counted.
        allocated_bytes: Bytes of those buffers.
        other_cores: Cores that other processes kept busy during the rounds.
        clock_mhz: Clock of the CPU's cores or the GPU's multiprocessors right after the rounds; empty if unreadable.
        memory_mhz: Clock of the GPU's memory; empty for CPUs.
    """

    file: ClassVar[str] = "host.csv"

    contender: str
    kind: str
    mode: str
    grads: str
    tensors: int
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    ns_per_tensor: float
    fixed_us: float
    allocations: int | None
    new_tensors: int | None
    allocated_bytes: int | None
    other_cores: float | None
    clock_mhz: float | None
    memory_mhz: float | None


@dataclass(frozen=True)
class AccuracyRow:
    """Error of float32 weights against float64 AdamW.

    Attributes:
        contender: Name of the optimizer.
        lr: Learning rate.
        weight_decay: Weight decay.
        beta2: Decay of the second moment; the first's is 0.9.
        steps: Steps taken.
        weights: Number of weights.
        weight_spread: Standard deviation of the weights at the start.
        relative_error: Root-mean-square error of the weights over the mean distance moved (`accuracy.py`).
    """

    file: ClassVar[str] = "accuracy.csv"

    contender: str
    lr: float
    weight_decay: float
    beta2: float
    steps: int
    weights: int
    weight_spread: float
    relative_error: float


@dataclass(frozen=True)
class LoopRow:
    """One side of one workload of a training loop, on one case in one dtype.

    Attributes:
        case: Name of the case.
        tensors: Number of tensors.
        groups: Number of parameter groups.
        params: Number of elements.
        dtype: dtype of parameters and gradients.
        workload: What is timed (`workloads.py`).
        contender: "usual" for the loop around torch's fused AdamW, otherwise the name of our optimizer.
        state_dtype: dtypes of the optimizer's state, joined by "+".
        bytes_per_param: Bytes that all passes of this side read and write per parameter.
        rounds: Number of interleaved rounds, each one sample.
        steps_per_sample: Steps timed together in a sample; times are per step.
        median_us: Median time of a step: CUDA events on a GPU, wall-clock on a CPU.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        wall_us: Median wall-clock time of a step, final synchronisation included.
        gb_s: 1e9 bytes a second, from bytes_per_param and median_us.
        expected_speedup: bytes_per_param of the usual loop over this side's; empty where caches make it meaningless.
        speedup: Time of the usual loop over this side's, median of the per-round ratios.
        speedup_p20: 20th percentile.
        speedup_p80: 80th percentile.
        checked_steps: Steps run before timing, those with an infinite gradient included.
        check_error: Largest error of a weight or of its average after them, as a fraction of the tolerance.
        norm_error: Relative error of the gradients' norm against float64; empty if none is taken.
        other_cores: Cores that other processes kept busy during the rounds (`disturbance.py`).
        clock_mhz: Clock of the CPU's cores or the GPU's multiprocessors right after the rounds; empty if unreadable.
        memory_mhz: Clock of the GPU's memory; empty for CPUs.
    """

    file: ClassVar[str] = "loop.csv"

    case: str
    tensors: int
    groups: int
    params: int
    dtype: str
    workload: str
    contender: str
    state_dtype: str
    bytes_per_param: float
    rounds: int
    steps_per_sample: int
    median_us: float
    p20_us: float
    p80_us: float
    wall_us: float
    gb_s: float
    expected_speedup: float | None
    speedup: float | None
    speedup_p20: float | None
    speedup_p80: float | None
    checked_steps: int
    check_error: float
    norm_error: float | None
    other_cores: float | None
    clock_mhz: float | None
    memory_mhz: float | None


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of training, in a process of its own.

    Attributes:
        contender: Name of the optimizer.
        gradients: "kept" until the step, or "released": stepped and freed as they arrive in backward.
        tensors: Number of tensors.
        params: Number of elements, all float32.
        iterations: Training iterations the peak was taken over.
        weight_mib: Size of the parameters, and so of all their gradients.
        state_mib: Size of the optimizer's state.
        peak_mib: Largest memory at any time, less what the process held before the model was made.
        transient_mib: peak_mib less weights and state: gradients, activations, work space.
        largest_grad_mib: Size of the largest gradient: what transient_mib can at best come down to.
        source: Where the peak was read: "VmHWM", "ru_maxrss" or "CUDA allocator".
        loss_error: Largest relative difference of a loss from that of torch's fused AdamW.
    """

    file: ClassVar[str] = "memory.csv"

    contender: str
    gradients: str
    tensors: int
    params: int
    iterations: int
    weight_mib: float
    state_mib: float
    peak_mib: float
    transient_mib: float
    largest_grad_mib: float
    source: str
    loss_error: float


@dataclass(frozen=True)
class FootprintRow:
    """What one optimizer keeps in one storage format (`footprint.py`). Nothing is timed.

    Attributes:
        case: Name of the case.
        tensors: Number of tensors.
        params: Number of elements.
        contender: Name of the optimizer.
        dtype: dtype of parameters and gradients.
        param_format: How weights are stored.
        moment_format: How moments are stored.
        allocated_bytes_per_param: What torch's allocators gave and did not get back, for weights, state and tables.
        largest_temporary_share: Largest buffer handed out in a warm step, over that less the weights.
        temporaries_share: All of them together, likewise.
    """

    file: ClassVar[str] = "footprint.csv"

    case: str
    tensors: int
    params: int
    contender: str
    dtype: str
    param_format: str
    moment_format: str
    allocated_bytes_per_param: float
    largest_temporary_share: float
    temporaries_share: float


@dataclass(frozen=True)
class QualityRow:
    """One metric of one storage format of the moments (`quality.py`; `README.md` says what the metrics mean).

    Attributes:
        format: Name of the format.
        source: Where it was published, or "FusedAdamW".
        bytes_per_param: Bytes of both moments per parameter, scales included.
        metric: What is measured; less is better.
        setting: On what.
        beta2: Decay of the second moment; the first's is 0.9.
        value: The result.
        limit: What 8-bit moments must not exceed; empty if nothing is asked.
        met: 1 if value is at most limit; empty without a limit.
    """

    file: ClassVar[str] = "quality.csv"

    format: str
    source: str
    bytes_per_param: float
    metric: str
    setting: str
    beta2: float
    value: float
    limit: float | None
    met: int | None


@dataclass(frozen=True)
class FormatRow:
    """One optimizer in one storage format on one tensor, of more or of less than the caches hold (`formats.py`).

    Attributes:
        case: Name of the case.
        params: Number of elements.
        contender: Name of the optimizer.
        dtype: dtype of parameters and gradients.
        param_format: How weights are stored.
        moment_format: How moments are stored.
        kept_bytes_per_param: Bytes of weight and state per parameter, of the tensors themselves.
        moved_bytes_per_param: Bytes a one-pass step reads and writes per parameter (`traffic.py`).
        rounds: Number of interleaved rounds, each one sample.
        median_us: Median time of a step: CUDA events on a GPU, wall-clock on a CPU.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        gb_s: 1e9 bytes a second, from moved_bytes_per_param and median_us.
        roof_kernel: What the roof was measured with in the same rounds; empty where the tensor stays in caches.
        roof_gb_s: The roof: that kernel's peak.
        pct_roof: gb_s as a percentage of roof_gb_s.
        speedup_over_torch_float32: Time of torch's fused AdamW on float32 over this one's, median of the ratios.
        speedup_over_torch_bfloat16: The same of torch's on bfloat16 weights, whose moments are bfloat16 too.
        checked_steps: Steps compared with float64 AdamW before timing.
        check_error: Largest error of a parameter after them, as a fraction of the tolerance.
        other_cores: Cores that other processes kept busy during the rounds.
        clock_mhz: Clock of the CPU's cores or the GPU's multiprocessors right after the rounds; empty if unreadable.
        memory_mhz: Clock of the GPU's memory; empty for CPUs.
    """

    file: ClassVar[str] = "formats.csv"

    case: str
    params: int
    contender: str
    dtype: str
    param_format: str
    moment_format: str
    kept_bytes_per_param: float
    moved_bytes_per_param: float
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    gb_s: float
    roof_kernel: str
    roof_gb_s: float | None
    pct_roof: float | None
    speedup_over_torch_float32: float
    speedup_over_torch_bfloat16: float
    checked_steps: int
    check_error: float
    other_cores: float | None
    clock_mhz: float | None
    memory_mhz: float | None


@dataclass(frozen=True)
class CurveRow:
    """A few steps of one training run (`curves.py`).

    Attributes:
        format: Name of the run: weights/moments.
        seed: Of weights and batches.
        step: The last of these steps.
        train_loss: Their mean loss, nats a byte.
        val_loss: Loss on the validation text after this step; empty where it was not measured.
        bytes_per_param: Weights and optimizer state.
    """

    file: ClassVar[str] = "curves.csv"

    format: str
    seed: int
    step: int
    train_loss: float
    val_loss: float | None
    bytes_per_param: float


@dataclass(frozen=True)
class InstructionRow:
    """One compiled update in one parameter format (`instructions.py`). Nothing is timed.

    Attributes:
        backend: "cuda" or "triton".
        target: GPU it was compiled for.
        param: Type of the weights.
        grad: Type of the gradients.
        moments: Type of the moments.
        param_format: How weights are stored.
        registers: Registers a thread.
        kernel_instructions: SASS instructions of the kernel, all paths together.
        elements_per_round: Elements a thread takes in one round of the loop.
        instructions_per_element: SASS instructions of the plain rule's path through a round, per element.
        bytes_per_element: Bytes an element moves.
        h100_budget: Instructions an H100 can issue per element while its bytes move.
        h100_bound: "memory", or "issue" where instructions_per_element is above h100_budget.
        h200_budget: The same for an H200.
        h200_bound: The same for an H200.
    """

    file: ClassVar[str] = "instructions.csv"

    backend: str
    target: str
    param: str
    grad: str
    moments: str
    param_format: str
    registers: int
    kernel_instructions: int
    elements_per_round: int
    instructions_per_element: float
    bytes_per_element: float
    h100_budget: float
    h100_bound: str
    h200_budget: float
    h200_bound: str


@dataclass(frozen=True)
class PeerRow:
    """Whether one optimizer could be measured here (`contenders.py`): it was built and stepped one small tensor.

    Attributes:
        contender: Name of the optimizer.
        dtype: dtype of parameter and gradient.
        distribution: Which installed distribution it comes from.
        version: Of that distribution; empty where it is not installed.
        available: 1 if it stepped.
        reason: Why not; empty if it did.
    """

    file: ClassVar[str] = "peers.csv"

    contender: str
    dtype: str
    distribution: str
    version: str
    available: int
    reason: str


@dataclass(frozen=True)
class SkippedRow:
    """What was asked for and not measured.

    Attributes:
        command: Of `python -m bench`.
        case: Name of the case.
        dtype: dtype of parameters and gradients.
        contender: Name of the optimizer; "all" if the case was left out.
        reason: Why.
    """

    file: ClassVar[str] = "skipped.csv"

    command: str
    case: str
    dtype: str
    contender: str
    reason: str


@dataclass(frozen=True)
class HotPathRow:
    """One count of the warm step (`hot_path.py`). Nothing is timed.

    Attributes:
        name: What is counted.
        per: "step", "tensor" or "element".
        count: The count.
        bound: What a test lets it be at most.
        tool: What counted: "callgrind", "opcodes" or "allocations".
        isa: Vector instruction set of the kernels; empty where none ran.
    """

    file: ClassVar[str] = "hot_path.csv"

    name: str
    per: str
    count: float
    bound: float
    tool: str
    isa: str


@dataclass(frozen=True)
class ProfileRow:
    """Instructions of one function in a warm step (`profile.py`), callees not included.

    Attributes:
        grads: "same" gradient tensors as in the step before, or "moved".
        tensors: Number of tensors of one element.
        place: Rank, 1 for the most.
        function: Its name.
        library: File it is in.
        instructions_per_tensor: Instructions it executed in one step, per tensor.
        share: Percentage of all instructions of the step.
    """

    file: ClassVar[str] = "profile.csv"

    grads: str
    tensors: int
    place: int
    function: str
    library: str
    instructions_per_tensor: float
    share: float


@dataclass(frozen=True)
class BitsRow:
    """One storage format stepped on a CPU and on another path from the same inputs (`bits.py`).

    Attributes:
        backend: The other path's backend.
        against: The path it was compared with.
        param: dtype of the weights.
        grad: dtype of the gradients.
        param_format: How weights are stored.
        moment_format: How moments are stored.
        options: What else was switched on.
        tensors: Number of tensors.
        elements: Number of elements.
        steps: Steps taken.
        differing: Elements of weights and state whose bits differ.
    """

    file: ClassVar[str] = "bits.csv"

    backend: str
    against: str
    param: str
    grad: str
    param_format: str
    moment_format: str
    options: str
    tensors: int
    elements: int
    steps: int
    differing: int


@dataclass(frozen=True)
class KernelRow:
    """One GPU kernel in a warm step, as a profiler saw it (`kernels.py`).

    Attributes:
        case: Name of the case.
        dtype: dtype of parameters and gradients.
        contender: Name of the optimizer.
        kernel: Its name.
        launches: Launches a step.
        median_us: Median time on the device.
        source: Which profiler: "CUPTI", or "ncu" for counters.
        counters: name=value joined by spaces; empty where counters cannot be read.
    """

    file: ClassVar[str] = "kernels.csv"

    case: str
    dtype: str
    contender: str
    kernel: str
    launches: float
    median_us: float
    source: str
    counters: str


@dataclass(frozen=True)
class StageRow:
    """One stage of `make gpu-report` (`gpu_report.py`).

    Attributes:
        stage: Its name.
        outcome: "passed", "failed", "out of time" or "not run".
        seconds: What it took.
        limit: What it was given.
        detail: What it said, or why it was not run.
    """

    file: ClassVar[str] = "stages.csv"

    stage: str
    outcome: str
    seconds: float
    limit: float
    detail: str


Row = (
    ThroughputRow
    | RoofRow
    | HostRow
    | AccuracyRow
    | LoopRow
    | MemoryRow
    | FootprintRow
    | QualityRow
    | FormatRow
    | CurveRow
    | InstructionRow
    | PeerRow
    | SkippedRow
    | HotPathRow
    | ProfileRow
    | BitsRow
    | KernelRow
    | StageRow
)
RowType = type[Row]
ROW_TYPES: tuple[RowType, ...] = (
    ThroughputRow,
    RoofRow,
    HostRow,
    AccuracyRow,
    LoopRow,
    MemoryRow,
    FootprintRow,
    QualityRow,
    FormatRow,
    CurveRow,
    InstructionRow,
    PeerRow,
    SkippedRow,
    HotPathRow,
    ProfileRow,
    BitsRow,
    KernelRow,
    StageRow,
)


def columns(row_type: type[Row]) -> list[str]:
    """Column names of a row type's file."""
    return [field.name for part in (Environment, row_type) for field in dataclasses.fields(part)]


def append(folder: Path, environment: Environment, rows: Sequence[Row]) -> list[Path]:
    """Appends rows to their files in `folder`, creating what is missing, and returns the files.

    Raises:
        SchemaError: A file's header differs from the schema. Nothing has been written.
    """
    check_headers(folder, *dict.fromkeys(type(row) for row in rows))
    written = []
    for row_type in dict.fromkeys(type(row) for row in rows):
        path = folder / row_type.file
        header = columns(row_type)
        fresh = not path.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(header)
            for row in rows:
                if type(row) is row_type:
                    values = (*dataclasses.astuple(environment), *dataclasses.astuple(row))
                    writer.writerow([spell(value) for value in values])
        written.append(path)
    return written


def check_headers(folder: Path, *row_types: type[Row]) -> None:
    """Raises SchemaError if `folder` holds rows of another schema for one of the types."""
    for row_type in row_types:
        if (folder / row_type.file).exists():
            check_header(folder / row_type.file, columns(row_type))


def check_header(path: Path, expected: list[str]) -> None:
    """Raises SchemaError unless the first line of `path` is the expected header."""
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != expected:
        missing = ", ".join(name for name in expected if name not in found) or "none"
        unknown = ", ".join(name for name in found if name not in expected) or "none"
        raise SchemaError(
            f"{path} holds rows of another schema (missing columns: {missing}; unknown columns: {unknown}). "
            "Move the file aside and run again: rows of two schemas are never mixed in one file."
        )


def read(folder: Path, row_type: type[Row]) -> list[dict[str, Any]]:
    """Rows of a file as dictionaries, numbers converted; an empty list if there is no file."""
    path = folder / row_type.file
    if not path.exists():
        return []
    check_headers(folder, row_type)
    kinds = {field.name: str(field.type) for part in (Environment, row_type) for field in dataclasses.fields(part)}
    with path.open(newline="") as file:
        return [{name: parse(text, kinds[name]) for name, text in row.items()} for row in csv.DictReader(file)]


def latest(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Of the rows that agree in `keys`, the one written last, in the order of first appearance."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def spell(value: object) -> str:
    """A value as CSV text: four significant digits say more than the spread allows, six are kept."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def parse(text: str, kind: str) -> str | int | float | None:
    """The inverse of `spell` for a field annotated `kind`."""
    if kind == "str":
        return text
    if kind == "int":
        return int(text)
    return float(text) if text else None
