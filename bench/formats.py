"""Time and bytes of a warm step in every storage format, beside torch's fused AdamW and the low-memory optimizers.

One tensor, far larger than any cache, so that a pass over memory is what is timed. Everybody steps copies of the same
values: our formats and torch in the dtype that their row names. All in one run, interleaved, each checked against
float64 AdamW first.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench import check, inputs, rows, timing, traffic
from bench.cases import Case, Group
from bench.contenders import BETAS, EPS, Contender, Optimizer, ParamGroups, ours, torch_adamw
from bench.disturbance import Disturbance
from bench.throughput import MAX_ROUNDS, MIN_ROUNDS

CASE = Case("one_16mi", "one tensor, 16 Mi elements", (Group(((4096, 4096),)),), exceeds_caches=True)
WIDE, NARROW = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """One optimizer in one storage format.

    Attributes:
        name: How rows call it.
        dtype: Of parameters and gradients.
        param_format: How weights are stored, in our names; "native" for everybody else.
        moment_format: How moments are stored: ours by name, others' by their own words.
        build: As in `contenders.Contender`.
        devices: Likewise.
        update_error: Error of an update that the check allows, relative to lr, after three steps.
    """

    name: str
    dtype: torch.dtype
    param_format: str
    moment_format: str
    build: Callable[..., Optimizer]
    devices: tuple[str, ...]
    update_error: float


# float32 moments: as check.py. bfloat16: torch's, and ours, which round by chance. 8 bits: three roundings of m and of
# v, whose codes are up to 10 % apart where a group spans 32 octaves, and beyond them v is kept too large: the worst of
# 16 Mi elements strays 0.24 lr a step. Published ones scale blocks of 128 or 256 by their largest element, and small
# ones become 0.
ERRORS = {"float32": 1e-4, "bfloat16": 4e-2, "8bit": 0.35}
PUBLISHED_8BIT = 4.0

OUR_FORMATS = (
    *((NARROW, "native", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "stochastic", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "split24", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "split32", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((WIDE, "native", moments) for moments in ("float32", "bfloat16", "8bit")),
)


def peer(module: str, name: str) -> Callable[..., Optimizer]:
    """A builder of a peer's optimizer, imported when it is built."""

    def build(groups: ParamGroups, **options: object) -> Optimizer:
        made: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
        return made(groups, lr=1e-3, betas=BETAS, eps=EPS, **options)  # optimi has no default lr

    return build


def entries(device: torch.device) -> Iterator[Entry]:
    """Everybody who might run on `device`."""
    backends = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    for backend in backends:
        for dtype, param_format, moment_format in OUR_FORMATS:
            yield Entry(
                f"ours_{backend}",
                dtype,
                param_format,
                moment_format,
                with_formats(ours(backend), param_format, moment_format),
                (device.type,),
                ERRORS[moment_format],
            )
    everywhere = ("cpu", "cuda")
    for dtype in (WIDE, NARROW):
        own = traffic.name_of(dtype)
        yield Entry("torch_fused", dtype, "native", own, torch_adamw(fused=True), everywhere, 4e-2)
        yield Entry(
            "torchao_8bit", dtype, "native", "int8", peer("torchao.optim", "AdamW8bit"), everywhere, PUBLISHED_8BIT
        )
        yield Entry(
            "bitsandbytes_8bit",
            dtype,
            "native",
            "int8",
            peer("bitsandbytes.optim", "AdamW8bit"),
            everywhere,
            PUBLISHED_8BIT,
        )
        yield Entry("flashoptim", dtype, "split24", "int8", peer("flashoptim", "FlashAdamW"), ("cuda",), PUBLISHED_8BIT)
    # Its weights' lost bits go into a float of their own dtype (Kahan summation). With that, updates of bfloat16
    # weights stray up to 0.26 lr a step; without, they pass at 4e-2, and in float32 at 1e-4.
    yield Entry("optimi", WIDE, "native", "float32", peer("optimi", "AdamW"), everywhere, ERRORS["float32"])
    yield Entry("optimi", NARROW, "kahan", "bfloat16", peer("optimi", "AdamW"), everywhere, 0.35)


def with_formats(build: Callable[..., Optimizer], param_format: str, moment_format: str) -> Callable[..., Optimizer]:
    """A builder of FusedAdamW in these formats."""

    def build_quietly(groups: ParamGroups, **options: object) -> Optimizer:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="param_format='native'")
            return build(groups, param_format=param_format, moment_format=moment_format, **options)

    return build_quietly


def measure(device: torch.device, *, seconds: float) -> tuple[list[rows.Row], dict[str, str]]:
    """Measures everybody on the one case.

    Args:
        device: Where.
        seconds: Time to spend on the rounds; a minimum number of rounds comes first.

    Returns:
        The rows, and why those who are left out are.
    """
    running: dict[str, tuple[Entry, Optimizer, float]] = {}
    reasons: dict[str, str] = {}
    masters = {dtype: inputs.draw(CASE, device, dtype) for dtype in (WIDE, NARROW)}
    truths = {dtype: check.expected(masters[dtype]) for dtype in masters}
    for entry in entries(device):
        key = f"{entry.name} {traffic.name_of(entry.dtype)} {entry.param_format} {entry.moment_format}"
        reason = Contender(entry.name, key, entry.build, entry.devices).unavailable(device, entry.dtype)
        if reason is not None:
            reasons[key] = reason
            continue
        optimizer = entry.build(masters[entry.dtype].clone_groups())
        # By chance a weight moves by up to a whole unit of its last place, to nearest by half of one.
        units = 2 if entry.param_format == "stochastic" else 1
        tolerance = check.Tolerance(units * check.TOLERANCES[entry.dtype].rounding, entry.update_error)
        try:
            error = check.check(optimizer, masters[entry.dtype], truths[entry.dtype], tolerance)
        except check.CheckFailedError as failure:
            reasons[key] = f"not timed: {failure}"
            print(f"  {key}: {failure}", file=sys.stderr, flush=True)
            continue
        running[key] = entry, optimizer, error
    with Disturbance() as others:
        samples = timing.interleave(
            {key: optimizer.step for key, (_, optimizer, _) in running.items()},
            device=device,
            seconds=seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
        )
    baselines = {
        dtype: samples[f"torch_fused {traffic.name_of(dtype)} native {traffic.name_of(dtype)}"].device
        for dtype in (WIDE, NARROW)
    }
    result: list[rows.Row] = []
    for key, (entry, optimizer, error) in running.items():
        own = samples[key].device
        time = timing.spread(own)
        speedups = {
            dtype: timing.spread([theirs / mine for theirs, mine in zip(baseline, own, strict=True)])
            for dtype, baseline in baselines.items()
        }
        moved = traffic.bytes_per_param(optimizer)
        kept = sum(tensor.nbytes for tensor in (*traffic.parameters(optimizer), *traffic.state_tensors(optimizer)))
        result.append(
            rows.FormatRow(
                case=CASE.name,
                params=CASE.numel,
                contender=entry.name,
                dtype=traffic.name_of(entry.dtype),
                param_format=entry.param_format,
                moment_format=entry.moment_format,
                kept_bytes_per_param=kept / CASE.numel,
                moved_bytes_per_param=moved,
                rounds=len(own),
                median_us=time.median * 1e6,
                p20_us=time.p20 * 1e6,
                p80_us=time.p80 * 1e6,
                gb_s=moved * CASE.numel / time.median / 1e9,
                speedup_over_torch_float32=speedups[WIDE].median,
                speedup_over_torch_bfloat16=speedups[NARROW].median,
                checked_steps=len(check.STEP_FACTORS),
                check_error=error,
                other_cores=others.other_cores,
            )
        )
    return result, reasons
