"""Inputs larger than the caches: as many copies of an optimizer as are needed take turns, step by step.

A cache that replaces what was used least recently holds nothing of a round trip through twice its size. So the copies'
parameters, gradients and states together take at least that: one copy where a case is that large, 38 of 2^20 float32
elements beside a cache of 300 MiB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from bench import machine
from bench.inputs import Inputs

ROUND_TRIP = 2.0  # of the last-level cache
MAX_COPIES = 64


def copies_of(numel: int, bytes_per_param: float, device: torch.device) -> int:
    """How many copies of a step that touches `bytes_per_param` bytes of `numel` elements are to take turns."""
    return min(MAX_COPIES, math.ceil(ROUND_TRIP * machine.cache_bytes(device) / (numel * bytes_per_param)))


def take_turns(
    first: torch.optim.Optimizer, build: Callable[..., torch.optim.Optimizer], masters: Inputs, copies: int
) -> Callable[[], object]:
    """A step of the next copy, round and round; `first` is one of them."""
    if copies == 1:
        return first.step
    others = [build(masters.clone_groups()) for _ in range(copies - 1)]
    for optimizer in others:
        optimizer.step()  # a warm one, as `first` is
    steps = itertools.cycle([optimizer.step for optimizer in (first, *others)])
    return lambda: next(steps)()
