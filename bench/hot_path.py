"""How much work a warm step is, without a clock: instructions, Python's opcodes, allocations, each with its bound.

`tests/test_hot_path.py` asserts the bounds, so that a slower hot path is noticed on a noisy machine too; `python -m
bench hotpath` prints present figures beside them and appends them to `hot_path.csv`.

Instructions are callgrind's (`callgrind.py`), of kernels for AVX2 on one thread. What is asked per element or tensor
is the difference between two sizes over the difference of sizes, so that Python's share, which is the same, drops out;
per step is what remains at size 0. They depend on the compiler, Python and torch, by a few percent from one version to
the next; bounds leave 15 % and more. Opcodes are those of CPython itself, counted by `sys.settrace`; how many a line
takes depends on Python's version.

Whoever makes the step cheaper lowers the bound; whoever needs to raise one says why.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bench import allocations, callgrind, warm_steps
from bench.rows import HotPathRow


@dataclass(frozen=True)
class Count:
    """One count and what it may be at most.

    Attributes:
        name: What is counted, as rows call it.
        per: "step", "tensor" or "element".
        bound: At most.
        measured: What it was when the bound was set: gcc 12.2, CPython 3.11, torch 2.13.
    """

    name: str
    per: str
    bound: float
    measured: float


ELEMENTS = (16384, 32768)
TENSORS = (100, 200)

INSTRUCTIONS: dict[tuple[str, str], Count] = {
    (count.name, count.per): count
    for count in (
        Count("float32", "element", 3.6, 3.13),
        Count("float32+clip", "element", 5.3, 4.57),
        Count("float32+ema", "element", 4.9, 4.23),
        Count("float32/8bit", "element", 39.5, 34.3),
        Count("bfloat16-native/bfloat16", "element", 14.3, 12.45),
        Count("bfloat16-split32/float32", "element", 8.4, 7.31),
        Count("bfloat16-split24/8bit", "element", 47, 40.8),
        Count("bfloat16-stochastic/8bit", "element", 42.1, 36.6),
        Count("tensors", "tensor", 1000, 870),
        Count("tensors", "step", 24000, 20600),
        Count("tensors-moved", "tensor", 2950, 2575),
        Count("tensors-no-kernels", "tensor", 650, 565),
        Count("dtensors", "tensor", 1090, 946),
        Count("groups", "tensor", 1420, 1238),
        Count("groups-scheduled", "tensor", 14600, 12630),
    )
}
OPCODES: dict[tuple[str, str], Count] = {
    (count.name, count.per): count
    for count in (
        Count("tensors", "tensor", 0, 0),
        Count("tensors", "step", 520, 439),
        Count("groups", "tensor", 0, 0),
        Count("groups-scheduled", "tensor", 125, 108),
        Count("dtensors", "tensor", 0, 0),
    )
}
ALLOCATIONS: dict[tuple[str, str], Count] = {
    (count.name, count.per): count
    for count in (
        Count("tensors, buffers", "step", 0, 0),
        Count("tensors, new tensors", "step", 0, 0),
        Count("tensors, bytes of Python at most", "tensor", 2, 0),
        Count("tensors, blocks of Python kept", "step", 2, 0.72),
        Count("dtensors, buffers", "step", 0, 0),
        Count("dtensors, new tensors", "step", 0, 0),
    )
}


def sizes(name: str) -> tuple[int, int]:
    """The two sizes at which a warm step is counted."""
    return ELEMENTS if name in warm_steps.FORMATS else TENSORS


def slope_and_rest(small: float, large: float, sizes: tuple[int, int]) -> tuple[float, float]:
    """Per element or tensor, and what a step of none would be."""
    slope = (large - small) / (sizes[1] - sizes[0])
    return slope, small - slope * sizes[0]


def instructions(isa: str = "avx2") -> dict[tuple[str, str], float]:
    """Of every entry of INSTRUCTIONS.

    Raises:
        callgrind.UnavailableError: they cannot be counted here; says what is missing.
    """
    names = list(dict.fromkeys(name for name, _ in INSTRUCTIONS))
    wanted = [f"{name} {size}" for name in names for size in sizes(name)]
    found = callgrind.count(["nothing", *wanted], isa=isa)
    result = {}
    for name in names:
        small, large = (found[f"{name} {size}"].instructions for size in sizes(name))
        slope, rest = slope_and_rest(small, large, sizes(name))
        result[name, "element" if name in warm_steps.FORMATS else "tensor"] = slope
        result[name, "step"] = rest - found["nothing"].instructions
    return {key: result[key] for key in INSTRUCTIONS}


def opcodes_of(run: Callable[[], object]) -> int:
    """Opcodes that CPython executes in one call, calls of Python functions from anywhere included."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def opcodes() -> dict[tuple[str, str], float]:
    """Of every entry of OPCODES."""
    result = {}
    for name in dict.fromkeys(name for name, _ in OPCODES):
        small, large = (opcodes_of(warm_steps.build(f"{name} {size}")) for size in TENSORS)
        result[name, "tensor"], result[name, "step"] = slope_and_rest(small, large, TENSORS)
    return {key: result[key] for key in OPCODES}


def python_bytes_of(run: Callable[[], object]) -> int:
    """The most bytes of Python's allocators alive at once in one call, less those alive before."""
    gc.collect()
    tracemalloc.start()
    try:
        run()  # what is cached on the first traced call
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def python_blocks_kept(run: Callable[[], object], calls: int = 50, windows: int = 5) -> float:
    """Blocks of Python's allocator that a call leaves behind, on average: a leak, or a cache that grows.

    The median of several windows: what was made before, and is freed late, falls into one of them.
    """
    run()
    kept = []
    for _ in range(windows):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(calls):
            run()
        gc.collect()
        kept.append(sys.getallocatedblocks() - before)
    return max(0.0, statistics.median(kept) / calls)


def allocated() -> dict[tuple[str, str], float]:
    """Of every entry of ALLOCATIONS."""
    result: dict[tuple[str, str], float] = {}
    for kind in ("tensors", "dtensors"):
        step = warm_steps.build(f"{kind} {TENSORS[1]}")
        counted = allocations.of_call(step, before=lambda: None)
        result[f"{kind}, buffers", "step"] = counted.buffers
        result[f"{kind}, new tensors", "step"] = counted.tensors
    small, large = (warm_steps.build(f"tensors {size}") for size in TENSORS)
    slope, _ = slope_and_rest(python_bytes_of(small), python_bytes_of(large), TENSORS)
    result["tensors, bytes of Python at most", "tensor"] = max(0.0, slope)  # the rest is not the same to the byte
    result["tensors, blocks of Python kept", "step"] = python_blocks_kept(large)
    return {key: result[key] for key in ALLOCATIONS}


def measure(isa: str = "avx2") -> Iterator[HotPathRow]:
    """A row of every count, those by callgrind last.

    Raises:
        callgrind.UnavailableError: there is no callgrind; the other rows have been given.
    """
    counters: tuple[tuple[str, dict[tuple[str, str], Count], Callable[[], dict[tuple[str, str], float]]], ...] = (
        ("opcodes", OPCODES, opcodes),
        ("allocations", ALLOCATIONS, allocated),
        ("callgrind", INSTRUCTIONS, functools.partial(instructions, isa)),
    )
    for tool, bounds, count in counters:
        for (name, per), value in count().items():
            bound = bounds[name, per].bound
            yield HotPathRow(
                name=name, per=per, count=value, bound=bound, tool=tool, isa=isa if tool == "callgrind" else ""
            )
