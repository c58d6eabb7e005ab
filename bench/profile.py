"""Where the instructions of a warm step go, function by function, per tensor: no clock, the same on a busy machine.

As in `hot_path.py`, the difference between two numbers of tensors: what a step costs whatever it steps drops out. One
thread, kernels for AVX2, tensors of one element, so that what is left of the kernels is what they do per tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bench import callgrind
from bench.hot_path import TENSORS
from bench.rows import ProfileRow

STEPS = {"same": "tensors", "moved": "tensors-moved"}
SHOWN = 30


def measure(isa: str = "avx2") -> Iterator[ProfileRow]:
    """The `SHOWN` functions that execute most, with the gradients of the step before and with others.

    Raises:
        callgrind.UnavailableError: there is no callgrind; says what is missing.
    """
    found = callgrind.count([f"{name} {size}" for name in STEPS.values() for size in TENSORS], isa=isa)
    for grads, name in STEPS.items():
        small, large = (found[f"{name} {size}"] for size in TENSORS)
        extra = TENSORS[1] - TENSORS[0]
        total = (large.instructions - small.instructions) / extra
        counts: dict[tuple[str, str], float] = {}
        for (function, library), count in large.functions.items():
            key = plain(function), library
            counts[key] = counts.get(key, 0.0) + (count - small.functions.get((function, library), 0)) / extra
        ranked = sorted(counts.items(), key=lambda item: -item[1])[:SHOWN]
        for place, ((function, library), count) in enumerate(ranked, 1):
            yield ProfileRow(
                grads=grads,
                tensors=TENSORS[1],
                place=place,
                function=function,
                library=re.sub(r"\.cpython-[^.]*|\.so[.\d]*$", "", library),
                instructions_per_tensor=count,
                share=100 * count / total,
            )


def plain(function: str) -> str:
    """A function's name without arguments, callgrind's mark of recursion and where it was cloned."""
    name = re.sub(r"'\d+$", "", function)
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"\(.*", "", name) or name
    return re.sub(r"@@.*", "", name)
