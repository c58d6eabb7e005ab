"""Time on the device of every GPU kernel of a warm step, and counters where the driver lets them be read.

Kineto (CUPTI's activity records) times kernels without privileges. Nsight Compute reads counters, which many machines
keep to administrators (ERR_NVGPUCTRPERM): then its rows are missing and the reason is said.
"""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable

import torch

from bench import contenders, inputs, traffic
from bench.cases import cases
from bench.machine import REPOSITORY
from bench.rows import KernelRow, Row

CASES = ("one_large", "many_small")
STEPS = 10
LIMIT_S = 60
COUNTERS = {
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_write",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_pct",
    "launch__registers_per_thread": "registers",
}


def measure(device: torch.device) -> tuple[list[Row], list[str]]:
    """Rows of what could be read, and why other things could not."""
    if device.type != "cuda":
        return [], [f"there are no GPU kernels on {device}"]
    result: list[Row] = []
    reasons = []
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            running, _ = contenders.available(device, dtype)
            for contender in running:
                if contender.is_ours or contender.name == contenders.BASELINE:
                    step = warm_step(name, dtype, contender.name, device)
                    result += timed(name, dtype, contender.name, step)
    rows, reason = counted("one_large", torch.float32)
    result += rows
    if reason:
        reasons.append(reason)
    return result, reasons


def warm_step(case: str, dtype: torch.dtype, contender: str, device: torch.device) -> Callable[[], object]:
    """A step, after some."""
    masters = inputs.draw(cases()[case], device, dtype)
    optimizer = contenders.CONTENDERS[contender].build(masters.clone_groups())
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize(device)
    return optimizer.step


def timed(case: str, dtype: torch.dtype, contender: str, step: Callable[[], object]) -> list[KernelRow]:
    """Kernels of `STEPS` steps by name, as Kineto records them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us() > 0:
            found[event.name].append(event.time_range.elapsed_us())
    return [
        KernelRow(
            case=case,
            dtype=traffic.name_of(dtype),
            contender=contender,
            kernel=kernel,
            launches=len(times) / STEPS,
            median_us=statistics.median(times),
            source="CUPTI",
            counters="",
        )
        for kernel, times in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]


def counted(case: str, dtype: torch.dtype) -> tuple[list[KernelRow], str]:
    """Counters of one step's kernels of each of our backends, and why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return [], "counters: Nsight Compute (ncu) is not installed"
    result: list[KernelRow] = []
    for contender in ("ours_triton", "ours_cuda"):
        metrics = ",".join([*COUNTERS, "gpu__time_duration.sum"])
        command = [ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--metrics", metrics]
        command += [sys.executable, "-m", "bench.kernels", case, traffic.name_of(dtype), contender]
        try:
            finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return result, f"counters: ncu took more than {LIMIT_S} s"
        said = finished.stdout + finished.stderr
        if "ERR_NVGPUCTRPERM" in said:
            return result, "counters: the driver keeps them to administrators (ERR_NVGPUCTRPERM)"
        if finished.returncode != 0:
            return result, f"counters: ncu failed: {(said.strip().splitlines() or ['without a word'])[-1]}"
        result += parse(finished.stdout, case, traffic.name_of(dtype), contender)
    return result, ""


def parse(text: str, case: str, dtype: str, contender: str) -> list[KernelRow]:
    """Rows from ncu's CSV, which begins after what the program and ncu themselves print; its second line has units."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    records = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    if not records:
        return []
    units, *kernels = records
    scale = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "msecond": 1e3, "ms": 1e3}
    return [
        KernelRow(
            case=case,
            dtype=dtype,
            contender=contender,
            kernel=record["Kernel Name"],
            launches=1.0,
            median_us=number(record["gpu__time_duration.sum"]) * scale[units["gpu__time_duration.sum"]],
            source="ncu",
            counters=" ".join(
                f"{short}={record[name]}{units[name]}" for name, short in COUNTERS.items() if record.get(name)
            ),
        )
        for record in kernels
    ]


def number(text: str) -> float:
    """A number of ncu's, which groups digits by commas."""
    return float(text.replace(",", ""))


def main(arguments: list[str]) -> None:
    """One profiled step, for ncu."""
    case, dtype, contender = arguments
    step = warm_step(
        case, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype], contender, torch.device("cuda")
    )
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(sys.argv[1:])
