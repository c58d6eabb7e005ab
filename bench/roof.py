"""The roof: how fast this machine moves memory when it does nothing else.

Bytes are counted once per operand read and once per operand written, for float32:

==================  =====================  =============
kernel              what it computes       bytes/element
==================  =====================  =============
``copy``            ``a = b``              8
``triad``           ``a = b + s * c``      12
``triad_in_place``  ``a = a + s * b``      12
==================  =====================  =============

The roof is a peak: the fastest round of a kernel, while contenders are judged by their median. On a CPU it is the
fastest of the three. Ordinary stores first fetch the line they write to, which `copy` and `triad` pay for without being
credited; an optimizer writes only lines it has just read, as the in-place triad does. The in-place triad is therefore
the one a step has to be compared with, and the hardest of the three.

On a GPU the roof is the device's copy; the triads are recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ELEMENTS = 64 << 20  # 256 MiB an operand: far above any cache
BYTES = {"copy": 8 * ELEMENTS, "triad": 12 * ELEMENTS, "triad_in_place": 12 * ELEMENTS}


@dataclass(frozen=True)
class Roof:
    """The kernel that sets the roof and its peak bandwidth in 1e9 bytes a second."""

    kernel: str
    gb_s: float


def kernels(device: torch.device) -> dict[str, Callable[[], object]]:
    """The bandwidth kernels by name, each on the same three buffers of `ELEMENTS` float32."""
    a, b, c = (torch.full((ELEMENTS,), value, device=device) for value in (0.0, 1.0, 2.0))
    return {
        "copy": lambda: a.copy_(b),
        "triad": lambda: torch.add(b, c, alpha=0.5, out=a),
        "triad_in_place": lambda: a.add_(b, alpha=0.5),
    }


def pick(device: torch.device, seconds: Mapping[str, Sequence[float]]) -> Roof | None:
    """The roof, given each kernel's times round by round; None if none was measured."""
    if not seconds:
        return None
    gb_s = {kernel: BYTES[kernel] / min(times) / 1e9 for kernel, times in seconds.items()}
    kernel = "copy" if device.type == "cuda" else max(gb_s, key=lambda name: gb_s[name])
    return Roof(kernel, gb_s[kernel])
