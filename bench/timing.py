"""Interleaved sampling: every round takes one sample of every trial, so drift hits all of them alike.

A sample is a handful of calls timed together, as many as fill `SAMPLE_SECONDS`, after an untimed one that undoes most
of what the other trials left in the caches: what is timed is the warm call. Times are per call. On a CPU the clock is
`perf_counter`. On a GPU a sample is bracketed by CUDA events on an idle device, so it contains the gaps that a slow
host leaves between kernels, and the wall-clock up to the final synchronisation is kept beside it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# Long enough that the clock, the events and the final synchronisation (~10 us) stay below 0.1 % of a sample.
SAMPLE_SECONDS = 0.02
WARM_UP_CALLS = 3
PATIENCE = 4


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Samples:
    """Samples of one trial, one a round, in seconds per call.

    Attributes:
        calls: Calls timed together in each sample.
        device: Time between CUDA events on a GPU; the same as `wall` on a CPU.
        wall: Wall-clock, final synchronisation included.
    """

    calls: int
    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def spread(values: Sequence[float]) -> Spread:
    """Median and 20/80 percentiles of `values`."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[3])


def interleave(
    trials: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
) -> dict[str, Samples]:
    """Samples every trial once a round.

    Args:
        trials: What to call, by name.
        device: Whose clock to read.
        seconds: Stop after this time, if there were `min_rounds` rounds.
        min_rounds: Fewest rounds, unless they take longer than `PATIENCE * seconds` on a busy machine.
        max_rounds: Most rounds.

    Returns:
        The samples of each trial.
    """
    samples = {name: Samples(calls=calls_per_sample(run, device)) for name, run in trials.items()}
    gc.collect()
    started = time.perf_counter()
    for number in range(max_rounds):
        elapsed = time.perf_counter() - started
        if elapsed > seconds and (number >= min_rounds or elapsed > PATIENCE * seconds):
            break
        for name, run in trials.items():
            if samples[name].calls > 1:
                run()  # brings its objects and small tensors back into the caches; large ones do not fit anyway
            on_device, on_wall = time_calls(run, samples[name].calls, device)
            samples[name].device.append(on_device)
            samples[name].wall.append(on_wall)
    return samples


def calls_per_sample(run: Callable[[], object], device: torch.device) -> int:
    """Warms `run` up and returns how many calls of it fill a sample."""
    for _ in range(WARM_UP_CALLS):
        run()
    _, seconds = time_calls(run, 1, device)
    return max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7)))


def time_calls(run: Callable[[], object], calls: int, device: torch.device) -> tuple[float, float]:
    """Seconds per call of `calls` calls: between CUDA events (or wall-clock on a CPU), and wall-clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = (time.perf_counter() - started) / calls
        return seconds, seconds
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    wall = time.perf_counter() - started
    return before.elapsed_time(after) / 1e3 / calls, wall / calls
