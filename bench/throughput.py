"""Time of a warm step, per case and dtype, of every contender that passed the check."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import check, contenders, inputs, roof, rows, timing, traffic
from bench.cases import Case
from bench.contenders import Contender, Optimizer
from bench.disturbance import Disturbance
from bench.timing import Samples

MIN_ROUNDS = 11
MAX_ROUNDS = 101


@dataclass(frozen=True)
class Entry:
    """A contender that passed: the optimizer that was checked is the one that is timed."""

    contender: Contender
    optimizer: Optimizer
    check_error: float


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
        Throughput and roof rows, and one line for every contender that failed its check.
    """
    running, _ = contenders.available(device, dtype, only)
    entries, failures = enter(running, inputs.draw(case, device, dtype))
    trials: dict[str, Callable[[], object]] = {entry.contender.name: entry.optimizer.step for entry in entries}
    kernels = roof.kernels(device) if case.exceeds_caches else {}
    with Disturbance() as others:
        samples = timing.interleave(
            {**trials, **kernels}, device=device, seconds=seconds, min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS
        )
    measured_roof = roof.pick(device, {kernel: samples[kernel].device for kernel in kernels})
    baseline = samples.get(contenders.BASELINE)
    result: list[rows.Row] = [
        throughput_row(
            case, dtype, entry, samples[entry.contender.name], measured_roof, baseline, other_cores=others.other_cores
        )
        for entry in entries
    ]
    result += [
        roof_row(case, dtype, kernel, samples[kernel], measured_roof, other_cores=others.other_cores)
        for kernel in kernels
    ]
    return result, failures


def enter(running: list[Contender], masters: inputs.Inputs) -> tuple[list[Entry], list[str]]:
    """Builds and checks every contender on its own copy of the inputs."""
    truth = check.expected(masters)
    entries, failures = [], []
    for contender in running:
        optimizer = contender.build(masters.clone_groups())
        try:
            error = check.check(optimizer, masters, truth)
        except check.CheckFailedError as failure:
            failures.append(f"{contender.name}: {failure}. It was not timed.")
            print(f"  {failures[-1]}", file=sys.stderr, flush=True)
            continue
        entries.append(Entry(contender, optimizer, error))
    return entries, failures


def throughput_row(
    case: Case,
    dtype: torch.dtype,
    entry: Entry,
    samples: Samples,
    measured_roof: roof.Roof | None,
    baseline: Samples | None,
    *,
    other_cores: float | None,
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
        other_cores=other_cores,
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
