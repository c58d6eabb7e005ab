"""Time and bytes of a warm step in every storage format, beside torch's fused AdamW and the low-memory optimizers.

One tensor, in copies that take turns where a cache would hold it, so that a pass over memory is what is timed. On a CPU
a small one besides, which stays in the caches: what arithmetic takes where memory takes next to nothing. A format
whose step from caches takes longer than its bytes take from memory is not held up by memory.

Everybody steps copies of the same values: our formats and torch in the dtype that their row names. All in one run,
interleaved with the roof's kernels, each checked against float64 AdamW first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import check, inputs, machine, roof, rotation, rows, timing, traffic
from bench.cases import Case, Group
from bench.contenders import CONTENDERS, Contender, Optimizer, ParamGroups, ours
from bench.disturbance import Disturbance
from bench.throughput import MAX_ROUNDS, MIN_ROUNDS

LARGE = Case("one_16mi", "one tensor, 16 Mi elements", (Group(((4096, 4096),)),), exceeds_caches=True)
# 3.5 MiB in float32: long enough that waking threads hardly counts, small enough for what two cores have to themselves.
CACHED = Case("one_128ki", "one tensor, 128 Ki elements, from caches", (Group(((128, 1024),)),), exceeds_caches=False)
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
# 16 Mi elements strays 0.24 lr a step.
ERRORS = {"float32": 1e-4, "bfloat16": 4e-2, "8bit": 0.35}

OUR_FORMATS = (
    *((NARROW, "native", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "stochastic", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "split24", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((NARROW, "split32", moments) for moments in ("float32", "bfloat16", "8bit")),
    *((WIDE, "native", moments) for moments in ("float32", "bfloat16", "8bit")),
)


# Formats of the others in our words for weights ("native" where only the weight is kept) and in theirs for moments.
PEER_FORMATS: dict[torch.dtype, dict[str, tuple[str, str]]] = {
    WIDE: {
        "torch_fused": ("native", "float32"),
        "apex": ("native", "float32"),
        "transformer_engine": ("native", "float32"),
        "deepspeed": ("native", "float32"),
        "deepspeed_cpu": ("native", "float32"),
        "torchao_8bit": ("native", "int8"),
        "bitsandbytes_8bit": ("native", "int8"),
        "flashoptim": ("native", "int8"),
        "optimi": ("native", "float32"),
    },
    NARROW: {
        "torch_fused": ("native", "bfloat16"),
        "apex": ("native", "float32"),
        "transformer_engine": ("native", "float32"),
        "deepspeed": ("native", "bfloat16"),
        "deepspeed_cpu": ("native", "float32"),
        "torchao_8bit": ("native", "int8"),
        "bitsandbytes_8bit": ("native", "int8"),
        "flashoptim": ("split24", "int8"),
        "optimi": ("kahan", "bfloat16"),
    },
}


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
    for dtype in (WIDE, NARROW):
        for name, (param_format, moment_format) in PEER_FORMATS[dtype].items():
            contender = CONTENDERS[name]
            error = contender.update_error(dtype)
            yield Entry(
                name,
                dtype,
                param_format,
                moment_format,
                contender.build,
                contender.devices,
                check.TOLERANCES[dtype].update if error is None else error,
            )


def with_formats(build: Callable[..., Optimizer], param_format: str, moment_format: str) -> Callable[..., Optimizer]:
    """A builder of FusedAdamW in these formats."""

    def build_quietly(groups: ParamGroups, **options: object) -> Optimizer:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="param_format='native'")
            return build(groups, param_format=param_format, moment_format=moment_format, **options)

    return build_quietly


KEYS = "contender", "dtype", "param_format", "moment_format"


def latest(folder: Path, case: Case = LARGE) -> list[dict[str, Any]]:
    """The last rows of a case, one for each of KEYS; of the large one, unless another is asked for."""
    return rows.latest([row for row in rows.read(folder, rows.FormatRow) if row["case"] == case.name], *KEYS)


def cases(device: torch.device) -> tuple[Case, ...]:
    """What is stepped there. On a GPU a step of what its caches hold would be a launch and little else."""
    return (LARGE, CACHED) if device.type == "cpu" else (LARGE,)


def measure(case: Case, device: torch.device, *, seconds: float) -> tuple[list[rows.Row], dict[str, str]]:
    """Measures everybody on one case.

    Args:
        case: What is stepped.
        device: Where.
        seconds: Time to spend on the rounds; a minimum number of rounds comes first.

    Returns:
        The rows, and why those who are left out are.
    """
    running: dict[str, tuple[Entry, Optimizer, float]] = {}
    steps: dict[str, Callable[[], object]] = {}
    share = machine.available_bytes(device) / 2 / len(list(entries(device)))  # of the memory, for one's copies
    reasons: dict[str, str] = {}
    masters = {dtype: inputs.draw(case, device, dtype) for dtype in (WIDE, NARROW)}
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
        copies = 1
        if case.exceeds_caches:
            touched = traffic.bytes_touched(optimizer)
            copies = min(rotation.copies_of(case.numel, touched, device), max(1, int(share / (touched * case.numel))))
        steps[key] = rotation.take_turns(optimizer, entry.build, masters[entry.dtype], copies)
    kernels = roof.kernels(device) if case.exceeds_caches else {}
    with Disturbance(device) as others:
        samples = timing.interleave(
            {**steps, **kernels},
            device=device,
            seconds=seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
        )
    measured_roof = roof.pick(device, {kernel: samples[kernel].device for kernel in kernels})
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
        gb_s = moved * case.numel / time.median / 1e9
        kept = sum(tensor.nbytes for tensor in (*traffic.parameters(optimizer), *traffic.state_tensors(optimizer)))
        result.append(
            rows.FormatRow(
                case=case.name,
                params=case.numel,
                contender=entry.name,
                dtype=traffic.name_of(entry.dtype),
                param_format=entry.param_format,
                moment_format=entry.moment_format,
                kept_bytes_per_param=kept / case.numel,
                moved_bytes_per_param=moved,
                rounds=len(own),
                median_us=time.median * 1e6,
                p20_us=time.p20 * 1e6,
                p80_us=time.p80 * 1e6,
                gb_s=gb_s,
                roof_kernel=measured_roof.kernel if measured_roof else "",
                roof_gb_s=measured_roof.gb_s if measured_roof else None,
                pct_roof=100 * gb_s / measured_roof.gb_s if measured_roof else None,
                speedup_over_torch_float32=speedups[WIDE].median,
                speedup_over_torch_bfloat16=speedups[NARROW].median,
                checked_steps=len(check.STEP_FACTORS),
                check_error=error,
                other_cores=others.other_cores,
                clock_mhz=others.clock_mhz,
                memory_mhz=others.memory_mhz,
            )
        )
    return result, reasons
