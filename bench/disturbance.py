"""How much of the machine others used while something was timed, and at which clock: what makes a row trustworthy.

Others are counted from the kernel's CPU clocks (Linux): what all CPUs spent, time stolen by a hypervisor included, less
what this process spent. On an idle machine it is below 0.05 cores. Clock rates are read right after the rounds, before
the device idles; a virtual machine tells its nominal one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

import torch

from bench import machine

NOTICEABLE_CORES = 0.1


class Disturbance:
    """Context manager that measures the cores other processes kept busy inside it.

    Attributes:
        other_cores: CPU seconds of others per second, once left; None where the system does not tell.
        clock_mhz: Clock of the CPU's cores or of the GPU's multiprocessors, once left; None likewise.
        memory_mhz: Clock of a GPU's memory; None for CPUs.
    """

    other_cores: float | None = None
    clock_mhz: float | None = None
    memory_mhz: float | None = None

    def __init__(self, device: torch.device) -> None:
        """Nothing is read yet."""
        self._device = device

    def __enter__(self) -> Disturbance:
        """Notes the clocks."""
        self._started = time.perf_counter()
        self._machine, self._own = machine_seconds(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the difference."""
        total, own, elapsed = machine_seconds(), time.process_time(), time.perf_counter() - self._started
        if total is not None and self._machine is not None:
            others = (total - self._machine) - (own - self._own)
            self.other_cores = max(0.0, others / elapsed)
        self.clock_mhz, self.memory_mhz = machine.clocks(self._device)


def machine_seconds() -> float | None:
    """CPU seconds that all CPUs spent on anything but idling, or None if /proc/stat does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
