"""Cost of the host's side of a warm step: nanoseconds per tensor, fixed microseconds, and what is allocated.

Every tensor has one element, so a step is almost only host work. Tensors are plain ones, and DTensors in a world of
one process, which is what FSDP2 hands to an optimizer (of which a rank holds one shard each). `full` rows are the
whole step: an upper bound. `python` rows are the same with the functions that launch kernels replaced by ones that do
nothing: what is paid per tensor whatever the kernels do. (What a launch itself costs is in `full` alone.) Both are
taken with the gradients of the step before ("same") and with other gradient tensors ("moved"), as training loops that
call `zero_grad()` produce them; the exchange itself is not timed. Samples are interleaved over all contenders; each is
the second of two steps in a row, so that the step is warm and not the first after somebody else's. A GPU is never
waited for inside one.

Before anything is timed, every weight is compared with float64 AdamW's after the warm-up.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from bench import allocations, check, contenders, rows
from bench.allocations import Allocations
from bench.contenders import BETAS, EPS, TRIAL_ELEMENTS, Contender, Optimizer
from bench.disturbance import Disturbance
from bench.timing import PATIENCE, Spread, spread

TENSORS = (100, 1000, 2000)
WARM_UP_STEPS = 5
MIN_ROUNDS = 21
MAX_ROUNDS = 301
GRAD_SETS = {"same": 1, "moved": 2}
KINDS = ("tensor", "dtensor")
WEIGHT, GRAD, LR, WEIGHT_DECAY = 1.0, 1e-2, 1e-3, 0.1

Wrap = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Bench:
    """One contender on one number of one-element tensors.

    Attributes:
        contender: Who steps.
        kind: "tensor" or "dtensor".
        tensors: How many tensors.
        grads: "same" or "moved".
        optimizer: The optimizer, warm.
        params: Its parameters.
        grad_sets: Sets of gradients, handed over in turn before each step.
        seconds: Samples, by mode.
    """

    contender: Contender
    kind: str
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

    def count_allocations(self) -> Allocations | None:
        """What one step allocates; None of a peer that compiles its step, which torch does not run while it counts."""
        try:
            return allocations.of_call(self.optimizer.step, before=self.next_grads)
        except RuntimeError:
            if self.contender.is_ours:
                raise
            return None

    def next_grads(self) -> None:
        """Hands over the next set of gradients."""
        hand_over(self.params, next(self.grad_sets))


def measure(
    device: torch.device, *, seconds: float, only: list[str] | None = None, kinds: tuple[str, ...] = KINDS
) -> tuple[list[rows.Row], dict[str, str]]:
    """Measures every available contender in float32.

    Returns:
        Its rows, and why others have none.
    """
    running, reasons = contenders.available(device, torch.float32, only)
    result: list[rows.Row] = []
    for kind in kinds:
        with wrapper(kind, device) as wrap:
            stepping = []
            for contender in running:
                reason = contender.why_not_step(wrap(torch.zeros(TRIAL_ELEMENTS, device=device)))
                if reason is None:
                    stepping.append(contender)
                else:
                    reasons[f"{contender.name}, {kind}"] = reason
            result += measure_kind(kind, wrap, stepping, device, seconds / len(kinds), reasons)
    return result, reasons


@contextlib.contextmanager
def wrapper(kind: str, device: torch.device) -> Iterator[Wrap]:
    """What makes tensors of a kind; for DTensors inside a process group of this process alone."""
    if kind == "tensor":
        yield lambda tensor: tensor
        return
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        yield lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
    finally:
        dist.destroy_process_group()


def measure_kind(
    kind: str, wrap: Wrap, running: list[Contender], device: torch.device, seconds: float, reasons: dict[str, str]
) -> list[rows.Row]:
    """Measures these contenders on tensors of one kind; adds to `reasons` whoever fails its check."""
    benches = []
    for tensors, grads, contender in itertools.product(TENSORS, GRAD_SETS, running):
        if f"{contender.name}, {kind}" in reasons:
            continue
        bench = build(contender, kind, wrap, tensors, grads, device)
        error = check_weights(bench)
        if error is None:
            benches.append(bench)
        else:
            reasons[f"{contender.name}, {kind}"] = error
            print(f"  {contender.name}, {kind}: {error}. It was not timed.", file=sys.stderr, flush=True)
    benches = [bench for bench in benches if f"{bench.contender.name}, {kind}" not in reasons]
    share = seconds / (2 * len(TENSORS) * len(GRAD_SETS))
    with Disturbance(device) as others:
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
            result += rows_of(series, mode, counted, others)
    return result


def placed_as(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient as backward leaves it: under FSDP2, a DTensor that shares its parameter's spec."""
    spec = getattr(param, "_spec", None)
    if spec is None:
        return grad
    from torch.distributed.tensor import DTensor

    return DTensor(grad, spec, requires_grad=False)  # type: ignore[call-arg]


def build(contender: Contender, kind: str, wrap: Wrap, tensors: int, grads: str, device: torch.device) -> Bench:
    """Builds and warms up one contender."""
    params = [torch.nn.Parameter(wrap(torch.full((1,), WEIGHT, device=device))) for _ in range(tensors)]
    sets = [
        [placed_as(param, torch.full((1,), GRAD, device=device)) for param in params] for _ in range(GRAD_SETS[grads])
    ]
    hand_over(params, sets[0])
    optimizer = contender.build([{"params": params, "lr": LR, "weight_decay": WEIGHT_DECAY}])
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    return Bench(contender, kind, tensors, grads, optimizer, params, itertools.cycle(sets))


def check_weights(bench: Bench) -> str | None:
    """What is wrong with the weights after the warm-up, or None if they are float64 AdamW's."""
    truth = torch.nn.Parameter(torch.full((1,), WEIGHT, dtype=torch.float64))
    truth.grad = torch.full_like(truth, GRAD)
    reference = torch.optim.AdamW(
        [truth], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, foreach=False, fused=False
    )
    for _ in range(WARM_UP_STEPS):
        reference.step()
    allowed = check.tolerance_of(torch.float32, bench.contender.update_error(torch.float32))
    limit = WARM_UP_STEPS * (allowed.rounding * WEIGHT + allowed.update * LR)
    weights = torch.cat([getattr(param, "_local_tensor", param).detach() for param in bench.params])
    error = (weights.double() - truth.item()).abs().max().item()
    if not error <= limit:  # NaN fails too
        return f"after {WARM_UP_STEPS} steps a weight is {error:.3g} off float64 AdamW's; allowed are {limit:.3g}"
    return None


def hand_over(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """Makes `grads` the gradients of `params`."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def sample_rounds(benches: list[Bench], mode: str, device: torch.device, seconds: float) -> None:
    """Takes one sample of every bench a round; fewer than MIN_ROUNDS where they take longer than PATIENCE allows."""
    started = time.perf_counter()
    for number in range(MAX_ROUNDS):
        elapsed = time.perf_counter() - started
        if number and elapsed > seconds and (number >= MIN_ROUNDS or elapsed > PATIENCE * seconds):
            break
        for bench in benches:
            with bench.contender.without_kernels() if mode == "python" else contextlib.nullcontext():
                bench.sample(mode, device)


def rows_of(
    series: list[Bench], mode: str, counted: dict[tuple[int, str], Allocations | None], others: Disturbance
) -> list[rows.Row]:
    """Rows of one contender in one mode: one per number of tensors, all with the same fit."""
    times = [spread(bench.seconds[mode]) for bench in series]
    if not times:
        return []
    slope, intercept = fit([bench.tensors for bench in series], times)
    return [
        rows.HostRow(
            contender=bench.contender.name,
            kind=bench.kind,
            mode=mode,
            grads=bench.grads,
            tensors=bench.tensors,
            rounds=len(bench.seconds[mode]),
            median_us=time.median * 1e6,
            p20_us=time.p20 * 1e6,
            p80_us=time.p80 * 1e6,
            ns_per_tensor=slope * 1e9,
            fixed_us=intercept * 1e6,
            allocations=getattr(counted[bench.tensors, bench.grads], "buffers", None),
            new_tensors=getattr(counted[bench.tensors, bench.grads], "tensors", None),
            allocated_bytes=getattr(counted[bench.tensors, bench.grads], "bytes", None),
            other_cores=others.other_cores,
            clock_mhz=others.clock_mhz,
            memory_mhz=others.memory_mhz,
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
