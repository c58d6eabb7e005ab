"""Cost of the host's side of a warm step: nanoseconds per tensor, fixed microseconds, and what is allocated.

Every tensor has one element, so a step is almost only host work. `full` rows are the whole step: an upper bound.
`python` rows are the same with the functions that launch kernels replaced by ones that do nothing: what is paid per
tensor whatever the kernels do. (What a launch itself costs is in `full` alone.) Both are taken with the gradients of
the step before ("same") and with other gradient tensors ("moved"), as training loops that call `zero_grad()` produce
them; the exchange itself is not timed. Samples are interleaved over all contenders; each is the second of two
steps in a row, so that the step is warm and not the first after somebody else's. A GPU is never waited for inside one.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, field

import torch

from bench import allocations, contenders, rows
from bench.allocations import Allocations
from bench.contenders import Contender, Optimizer
from bench.disturbance import Disturbance
from bench.timing import Spread, spread

TENSORS = (100, 1000, 2000)
WARM_UP_STEPS = 5
MIN_ROUNDS = 21
MAX_ROUNDS = 301
GRAD_SETS = {"same": 1, "moved": 2}


@dataclass
class Bench:
    """One contender on one number of one-element tensors.

    Attributes:
        contender: Who steps.
        tensors: How many tensors.
        grads: "same" or "moved".
        optimizer: The optimizer, warm.
        params: Its parameters.
        grad_sets: Sets of gradients, handed over in turn before each step.
        seconds: Samples, by mode.
    """

    contender: Contender
    tensors: int
    grads: str
    optimizer: Optimizer
    params: list[torch.nn.Parameter]
    grad_sets: itertools.cycle[list[torch.Tensor]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, mode: str, device: torch.device) -> None:
        """Times the second of two steps, each after handing over the next gradients."""
        self.next_grads()
        self.optimizer.step()
        self.next_grads()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        self.optimizer.step()
        self.seconds.setdefault(mode, []).append(time.perf_counter() - started)

    def count_allocations(self) -> Allocations:
        """What one step allocates."""
        return allocations.of_call(self.optimizer.step, before=self.next_grads)

    def next_grads(self) -> None:
        """Hands over the next set of gradients."""
        hand_over(self.params, next(self.grad_sets))


def measure(device: torch.device, *, seconds: float, only: list[str] | None = None) -> list[rows.Row]:
    """Measures every available contender in float32 and returns its rows."""
    running, _ = contenders.available(device, torch.float32, only)
    benches = [
        build(contender, tensors, grads, device) for tensors in TENSORS for grads in GRAD_SETS for contender in running
    ]
    share = seconds / (2 * len(TENSORS) * len(GRAD_SETS))
    with Disturbance() as others:
        for tensors, grads, mode in itertools.product(TENSORS, GRAD_SETS, ("full", "python")):
            chosen = [bench for bench in benches if (bench.tensors, bench.grads) == (tensors, grads)]
            if mode == "python":
                chosen = [bench for bench in chosen if bench.contender.kernels]
            sample_rounds(chosen, mode, device, share)
    result: list[rows.Row] = []
    for contender in running:
        own = [bench for bench in benches if bench.contender is contender]
        counted = {(bench.tensors, bench.grads): bench.count_allocations() for bench in own}
        for grads, mode in itertools.product(GRAD_SETS, ("full", "python")):
            series = [bench for bench in own if bench.grads == grads and mode in bench.seconds]
            result += rows_of(series, mode, counted, other_cores=others.other_cores)
    return result


def build(contender: Contender, tensors: int, grads: str, device: torch.device) -> Bench:
    """Builds and warms up one contender."""
    params = [torch.nn.Parameter(torch.full((1,), 1.0, device=device)) for _ in range(tensors)]
    sets = [[torch.full((1,), 1e-2, device=device) for _ in params] for _ in range(GRAD_SETS[grads])]
    hand_over(params, sets[0])
    optimizer = contender.build([{"params": params, "lr": 1e-3, "weight_decay": 0.1}])
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    return Bench(contender, tensors, grads, optimizer, params, itertools.cycle(sets))


def hand_over(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """Makes `grads` the gradients of `params`."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def sample_rounds(benches: list[Bench], mode: str, device: torch.device, seconds: float) -> None:
    """Takes one sample of every bench a round."""
    started = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for bench in benches:
            with bench.contender.without_kernels() if mode == "python" else contextlib.nullcontext():
                bench.sample(mode, device)


def rows_of(
    series: list[Bench], mode: str, counted: dict[tuple[int, str], Allocations], *, other_cores: float | None
) -> list[rows.Row]:
    """Rows of one contender in one mode: one per number of tensors, all with the same fit."""
    times = [spread(bench.seconds[mode]) for bench in series]
    if not times:
        return []
    slope, intercept = fit([bench.tensors for bench in series], times)
    return [
        rows.HostRow(
            contender=bench.contender.name,
            mode=mode,
            grads=bench.grads,
            tensors=bench.tensors,
            rounds=len(bench.seconds[mode]),
            median_us=time.median * 1e6,
            p20_us=time.p20 * 1e6,
            p80_us=time.p80 * 1e6,
            ns_per_tensor=slope * 1e9,
            fixed_us=intercept * 1e6,
            allocations=counted[bench.tensors, bench.grads].buffers,
            new_tensors=counted[bench.tensors, bench.grads].tensors,
            allocated_bytes=counted[bench.tensors, bench.grads].bytes,
            other_cores=other_cores,
        )
        for bench, time in zip(series, times, strict=True)
    ]


def fit(tensors: list[int], times: list[Spread]) -> tuple[float, float]:
    """Slope and intercept, in seconds, of the line through the median times.

    Weighted by 1 / time, so that the residuals are relative: otherwise the longest step alone decides, and its
    noise ends up in the intercept.
    """
    weights = [1 / time.median**2 for time in times]
    total = sum(weights)
    mean_n = sum(w * n for w, n in zip(weights, tensors, strict=True)) / total
    mean_t = sum(w * time.median for w, time in zip(weights, times, strict=True)) / total
    covariance = sum(w * (n - mean_n) * time.median for w, n, time in zip(weights, tensors, times, strict=True))
    slope = covariance / sum(w * (n - mean_n) ** 2 for w, n in zip(weights, tensors, strict=True))
    return slope, mean_t - slope * mean_n
