"""Time of a warm step, per case and dtype, of every contender that passed the check and finds memory.

Cases that bandwidth limits are stepped in copies that take turns (`rotation.py`), so that no cache holds them. What
there is no memory for is left out, contender by contender, the baseline and ours last, and said in `skipped.csv`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import check, contenders, inputs, machine, roof, rotation, rows, timing, traffic
from bench.cases import Case
from bench.contenders import Contender, Optimizer
from bench.disturbance import Disturbance
from bench.timing import Samples

MIN_ROUNDS = 11
MAX_ROUNDS = 101


@dataclass(frozen=True)
class Entry:
    """A contender that passed: the optimizer that was checked is the one that is timed, with `copies` - 1 others."""

    contender: Contender
    optimizer: Optimizer
    check_error: float
    copies: int
    step: Callable[[], object]


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, *, seconds: float, only: list[str] | None = None
) -> tuple[list[rows.Row], list[str]]:
    """Measures one case in one dtype.

    Args:
        case: What is stepped.
        device: Where.
        dtype: dtype of parameters and gradients.
        seconds: Time to spend on the rounds; a minimum number of rounds comes first.
        only: Names of the contenders to measure; all by default.

    Returns:
        Throughput, roof and skipped rows, and one line for every contender that failed its check.
    """
    running, _ = contenders.available(device, dtype, only)
    running, skipped = fitting(case, device, dtype, running)
    if not running:
        return skipped, []
    entries, failures = enter(running, inputs.draw(case, device, dtype))
    trials: dict[str, Callable[[], object]] = {entry.contender.name: entry.step for entry in entries}
    kernels = roof.kernels(device) if case.exceeds_caches else {}
    with Disturbance(device) as others:
        samples = timing.interleave(
            {**trials, **kernels}, device=device, seconds=seconds, min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS
        )
    measured_roof = roof.pick(device, {kernel: samples[kernel].device for kernel in kernels})
    baseline = samples.get(contenders.BASELINE)
    result: list[rows.Row] = [
        throughput_row(case, dtype, entry, samples[entry.contender.name], measured_roof, baseline, others)
        for entry in entries
    ]
    result += [
        roof_row(case, dtype, kernel, samples[kernel], measured_roof, other_cores=others.other_cores)
        for kernel in kernels
    ]
    return [*result, *skipped], failures


STATE_BYTES = 10  # of a parameter, at most: two float32 moments, and the rest of a 16-bit weight
PASS_BYTES = 8  # of a parameter: what optimizers of several passes put down between them, one optimizer at a time
SPARE_BYTES = 2 << 30  # the reference's pieces, the roof's buffers


def fitting(
    case: Case, device: torch.device, dtype: torch.dtype, running: list[Contender]
) -> tuple[list[Contender], list[rows.Row]]:
    """Those for which there is memory, in their order, and a row for every other one.

    The baseline and ours are given memory first.
    """
    free = machine.available_bytes(device)
    truth = 8 if device.type == "cpu" or case.numel <= check.ON_DEVICE_ELEMENTS else 0
    left = free - case.numel * (2 * dtype.itemsize + truth + PASS_BYTES) - SPARE_BYTES
    own = 2 * dtype.itemsize + STATE_BYTES
    needed = case.numel * own * copies_for(case, dtype, device)
    chosen = []
    for contender in sorted(running, key=lambda one: not (one.is_ours or one.name == contenders.BASELINE)):
        if needed <= left:
            left -= needed
            chosen.append(contender)
    skipped: list[rows.Row] = [
        rows.SkippedRow(
            command="throughput",
            case=case.name,
            dtype=traffic.name_of(dtype),
            contender=contender.name,
            reason=f"needs about {needed / 1e9:.1f} GB beside the others; {max(left, 0) / 1e9:.1f} of {free / 1e9:.1f} "
            "GB are left",
        )
        for contender in running
        if contender not in chosen
    ]
    return [contender for contender in running if contender in chosen], skipped


def copies_for(case: Case, dtype: torch.dtype, device: torch.device) -> int:
    """How many copies of a case take turns; moments take two bytes at least."""
    return rotation.copies_of(case.numel, 2 * dtype.itemsize + 4, device) if case.exceeds_caches else 1


def enter(running: list[Contender], masters: inputs.Inputs) -> tuple[list[Entry], list[str]]:
    """Builds and checks every contender on its own copy of the inputs."""
    truth = check.expected(masters)
    dtype, device = masters.params[0].dtype, masters.params[0].device
    copies = copies_for(masters.case, dtype, device)
    entries, failures = [], []
    for contender in running:
        optimizer = contender.build(masters.clone_groups())
        tolerance = check.tolerance_of(dtype, contender.update_error(dtype))
        try:
            error = check.check(optimizer, masters, truth, tolerance)
        except check.CheckFailedError as failure:
            failures.append(f"{contender.name}: {failure}. It was not timed.")
            print(f"  {failures[-1]}", file=sys.stderr, flush=True)
            continue
        step = rotation.take_turns(optimizer, contender.build, masters, copies)
        entries.append(Entry(contender, optimizer, error, copies, step))
    return entries, failures


def throughput_row(
    case: Case,
    dtype: torch.dtype,
    entry: Entry,
    samples: Samples,
    measured_roof: roof.Roof | None,
    baseline: Samples | None,
    others: Disturbance,
) -> rows.ThroughputRow:
    """One contender's row."""
    time = timing.spread(samples.device)
    bytes_per_param = traffic.bytes_per_param(entry.optimizer)
    gb_s = bytes_per_param * case.numel / time.median / 1e9
    speedup = None
    if baseline is not None:
        ratios = [theirs / own for theirs, own in zip(baseline.device, samples.device, strict=True)]
        speedup = timing.spread(ratios)
    return rows.ThroughputRow(
        case=case.name,
        tensors=len(case.shapes),
        groups=len(case.groups),
        params=case.numel,
        dtype=traffic.name_of(dtype),
        contender=entry.contender.name,
        state_dtype=traffic.state_dtype(entry.optimizer),
        bytes_per_param=bytes_per_param,
        rounds=len(samples.device),
        steps_per_sample=samples.calls,
        copies=entry.copies,
        median_us=time.median * 1e6,
        p20_us=time.p20 * 1e6,
        p80_us=time.p80 * 1e6,
        wall_us=statistics.median(samples.wall) * 1e6,
        gb_s=gb_s,
        roof_kernel=measured_roof.kernel if measured_roof else "",
        roof_gb_s=measured_roof.gb_s if measured_roof else None,
        pct_roof=100 * gb_s / measured_roof.gb_s if measured_roof else None,
        speedup=speedup.median if speedup else None,
        speedup_p20=speedup.p20 if speedup else None,
        speedup_p80=speedup.p80 if speedup else None,
        checked_steps=len(check.STEP_FACTORS),
        check_error=entry.check_error,
        other_cores=others.other_cores,
        clock_mhz=others.clock_mhz,
        memory_mhz=others.memory_mhz,
    )


def roof_row(
    case: Case,
    dtype: torch.dtype,
    kernel: str,
    samples: Samples,
    measured_roof: roof.Roof | None,
    *,
    other_cores: float | None,
) -> rows.RoofRow:
    """One bandwidth kernel's row."""
    time = timing.spread(samples.device)
    return rows.RoofRow(
        case=case.name,
        dtype=traffic.name_of(dtype),
        kernel=kernel,
        bytes=roof.BYTES[kernel],
        rounds=len(samples.device),
        median_us=time.median * 1e6,
        p20_us=time.p20 * 1e6,
        p80_us=time.p80 * 1e6,
        gb_s=roof.BYTES[kernel] / time.median / 1e9,
        peak_gb_s=roof.BYTES[kernel] / min(samples.device) / 1e9,
        is_roof=int(measured_roof is not None and kernel == measured_roof.kernel),
        other_cores=other_cores,
    )
