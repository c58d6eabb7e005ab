"""What a step allocates: buffers from torch's allocators, and tensors returned by dispatched operators.

The two see different things. The profiler sees every buffer, also those that C++ code takes below the dispatcher,
but no views. The dispatch mode sees every tensor an operator returns, views included, but nothing below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Read at the first profile: without it, each one writes two lines about itself to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class Allocations:
    """Totals of one call.

    Attributes:
        buffers: Buffers handed out by torch's CPU and CUDA allocators.
        bytes: Their total size.
        tensors: Tensors returned by dispatched operators that were not among the operator's arguments.
    """

    buffers: int
    bytes: int
    tensors: int


class ReturnedTensors(TorchDispatchMode):
    """Counts tensors that operators return and were not given."""

    def __init__(self) -> None:
        """Starts at zero."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operator and counts."""
        result = func(*args, **(kwargs or {}))
        given = {id(tensor) for tensor in tensors_in((args, kwargs))}
        self.count += sum(id(tensor) not in given for tensor in tensors_in(result))
        return result


def of_call(run: Callable[[], object], *, before: Callable[[], object]) -> Allocations:
    """Counts what a call of `run` allocates. Calls `before`, uncounted, and `run` once for each counter."""
    before()
    handed_out = [size for size in sizes(run) if size > 0]
    before()
    with ReturnedTensors() as returned:
        run()
    return Allocations(buffers=len(handed_out), bytes=sum(handed_out), tensors=returned.count)


def sizes(run: Callable[[], object]) -> list[int]:
    """Sizes of everything torch's allocators hand out while `run` runs, and, below 0, take back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # Only the raw results hold single allocations; the public averages hold sums, in which a free hides a malloc.
    return [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]


def tensors_in(tree: object) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
