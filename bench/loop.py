"""Time of a training loop's part after `backward()`, per case, dtype and workload: the usual way and ours.

What each side does, and how its bytes are counted, is in `workloads.py`. Both sides of a workload are sampled in the
same rounds, after both were checked against the loop in float64.
"""

from __future__ import annotations

import statistics
import sys

import torch

from bench import contenders, inputs, rows, timing, traffic, workloads
from bench.cases import Case
from bench.check import CheckFailedError
from bench.contenders import CONTENDERS, Contender
from bench.disturbance import Disturbance
from bench.timing import Samples
from bench.workloads import WORKLOADS, Loop, Truth, Verdict, Workload

CASES = ("gpt2_small", "many_small")  # unless others are asked for: traffic is the limit in one, launches in the other
MIN_ROUNDS = 11
MAX_ROUNDS = 101
COPYING_PEERS = ("deepspeed_cpu",)  # made for steps that are followed by a cast


def measure(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float,
    only: list[str] | None = None,
    names: list[str] | None = None,
) -> tuple[list[rows.Row], list[str]]:
    """Measures the workloads of one case in one dtype.

    Args:
        case: What is stepped.
        device: Where.
        dtype: dtype of parameters and gradients.
        seconds: Time to spend on the rounds of each workload; a minimum number of rounds comes first.
        only: Names of the contenders to compare with the usual loop; ours by default. Peers have no other loop.
        names: Names of the workloads; all by default.

    Returns:
        Rows, and one line for every side that failed its check.
    """
    running, _ = contenders.available(device, dtype, only)
    backends = [contender for contender in running if contender.is_ours]
    masters = inputs.draw(case, device, dtype)
    workloads.normalize(masters)
    truths: dict[bool, Truth] = {}
    result: list[rows.Row] = []
    failures: list[str] = []
    for workload in WORKLOADS.values():
        if dtype not in workload.dtypes or (names and workload.name not in names):
            continue
        if workload.copies and device.type != "cpu":
            continue
        if workload.clips not in truths:
            truths.clear()  # one at a time: that of 124 M parameters is 2 GB
            truths[workload.clips] = workloads.expected(masters, clips=workload.clips)
        measured, failed = measure_workload(workload, backends, masters, truths[workload.clips], seconds)
        result += measured
        failures += failed
    return result, failures


def measure_workload(
    workload: Workload, backends: list[Contender], masters: inputs.Inputs, truth: Truth, seconds: float
) -> tuple[list[rows.Row], list[str]]:
    """Checks and measures both sides of one workload."""
    device = masters.params[0].device
    loops: list[tuple[Loop, Verdict]] = []
    failures: list[str] = []
    peers = [CONTENDERS[name] for name in COPYING_PEERS if workload.copies]
    peers = [peer for peer in peers if peer.unavailable(device, masters.params[0].dtype) is None]
    for contender in (None, *peers, *backends):
        groups = masters.clone_groups()
        is_ours = contender is not None and contender.is_ours
        loop = workloads.ours(contender, workload, groups) if is_ours else workloads.usual(workload, groups, contender)
        try:
            verdict = workloads.verify(loop, masters, truth)
        except CheckFailedError as failure:
            failures.append(f"{loop.name}: {failure}. It was not timed.")
            print(f"  {failures[-1]}", file=sys.stderr, flush=True)
            continue
        loop.get_ready(masters)
        loops.append((loop, verdict))
    with Disturbance(device) as others:
        samples = timing.interleave(
            {loop.name: loop.step for loop, _ in loops},
            device=device,
            seconds=seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
        )
    baseline = next((loop for loop, _ in loops if loop.name == workloads.USUAL), None)
    result: list[rows.Row] = [loop_row(masters, loop, verdict, samples, baseline, others) for loop, verdict in loops]
    return result, failures


def loop_row(
    masters: inputs.Inputs,
    loop: Loop,
    verdict: Verdict,
    samples: dict[str, Samples],
    baseline: Loop | None,
    others: Disturbance,
) -> rows.LoopRow:
    """One side's row."""
    case, own = masters.case, samples[loop.name]
    time = timing.spread(own.device)
    bytes_per_param = loop.bytes_per_param()
    speedup = expected = None
    if baseline is not None:
        pairs = zip(samples[baseline.name].device, own.device, strict=True)
        speedup = timing.spread([theirs / mine for theirs, mine in pairs])
        expected = baseline.bytes_per_param() / bytes_per_param if case.exceeds_caches else None
    return rows.LoopRow(
        case=case.name,
        tensors=len(case.shapes),
        groups=len(case.groups),
        params=case.numel,
        dtype=traffic.name_of(masters.params[0].dtype),
        workload=loop.workload.name,
        contender=loop.name,
        state_dtype=traffic.state_dtype(loop.optimizer),
        bytes_per_param=bytes_per_param,
        rounds=len(own.device),
        steps_per_sample=own.calls,
        median_us=time.median * 1e6,
        p20_us=time.p20 * 1e6,
        p80_us=time.p80 * 1e6,
        wall_us=statistics.median(own.wall) * 1e6,
        gb_s=bytes_per_param * case.numel / time.median / 1e9,
        expected_speedup=expected,
        speedup=speedup.median if speedup else None,
        speedup_p20=speedup.p20 if speedup else None,
        speedup_p80=speedup.p80 if speedup else None,
        checked_steps=verdict.steps,
        check_error=verdict.error,
        norm_error=verdict.norm_error,
        other_cores=others.other_cores,
        clock_mhz=others.clock_mhz,
        memory_mhz=others.memory_mhz,
    )
