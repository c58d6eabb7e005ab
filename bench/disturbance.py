"""How much of the machine others used while something was timed: what makes a row trustworthy, or not.

Counted from the kernel's CPU clocks (Linux): what all CPUs spent, time stolen by a hypervisor included, less what this
process spent. On an idle machine it is below 0.05 cores.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

NOTICEABLE_CORES = 0.1


class Disturbance:
    """Context manager that measures the cores other processes kept busy inside it.

    Attributes:
        other_cores: CPU seconds of others per second, once left; None where the system does not tell.
    """

    other_cores: float | None = None

    def __enter__(self) -> Disturbance:
        """Notes the clocks."""
        self._started = time.perf_counter()
        self._machine, self._own = machine_seconds(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the difference."""
        machine, own, elapsed = machine_seconds(), time.process_time(), time.perf_counter() - self._started
        if machine is not None and self._machine is not None:
            others = (machine - self._machine) - (own - self._own)
            self.other_cores = max(0.0, others / elapsed)


def machine_seconds() -> float | None:
    """CPU seconds that all CPUs spent on anything but idling, or None if /proc/stat does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
