"""Which machine, which versions, which commit: the columns that every row carries."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
COUNTS = RESULTS / "counts"  # rows that depend on compiler, Python and torch, and on no machine's speed

SETTINGS = (
    "ADAMW_KERNELS_BACKEND",
    "ADAMW_KERNELS_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_LAUNCH_BLOCKING",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


@dataclass(frozen=True)
class Environment:
    """The environment columns, shared by all rows of one run.

    Attributes:
        run: When the run began, UTC, ISO 8601. Rows of one run share it.
        machine: Slug of the machine, which is also its folder under `bench/results`.
        device: Model of the CPU or GPU that stepped.
        cores: Logical CPU cores this process may use.
        threads: Threads torch and the CPU backend may use.
        isa: Widest vector instruction set torch uses here.
        settings: Environment variables that change speed, as NAME=value joined by spaces.
        driver: NVIDIA driver, or empty.
        cuda: CUDA version torch was built for, or empty.
        torch: Version of torch.
        triton: Version of triton, or empty.
        python: Version of Python.
        package: Version of adamw_kernels, or empty if it cannot be imported.
        commit: Abbreviated git commit, or empty outside a checkout.
        dirty: 1 if tracked or new files differ from the commit (results of benchmarks do not count).
    """

    run: str
    machine: str
    device: str
    cores: int
    threads: int
    isa: str
    settings: str
    driver: str
    cuda: str
    torch: str
    triton: str
    python: str
    package: str
    commit: str
    dirty: int


def environment(device: torch.device) -> Environment:
    """Describes the machine as seen from `device`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
        machine = slug(f"gpu {model}")
    else:
        model = cpu_model()
        machine = slug(f"cpu {model} {cores}c")
    return Environment(
        run=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        device=model,
        cores=cores,
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        settings=" ".join(f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)),
        driver=gpu_driver() if device.type == "cuda" else "",
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        triton=distribution_version("triton"),
        python=platform.python_version(),
        package=package_version(),
        commit=output_of("git", "rev-parse", "--short=10", "HEAD"),
        dirty=int(bool(output_of("git", "status", "--porcelain", "--", ".", ":(exclude)bench/results"))),
    )


def results_folder(machine: str) -> Path:
    """Folder of a machine's rows and figures."""
    return RESULTS / machine


def slug(text: str) -> str:
    """`text` as a file name: lower case words joined by dashes, without marketing marks."""
    text = re.sub(r"\((r|tm)\)|\bcpu @.*|\b\d+-core processor\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def cpu_model() -> str:
    """The CPU's model name, as its vendor spells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def gpu_driver() -> str:
    """Version of the NVIDIA driver, or empty."""
    lines = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else ""


def clocks(device: torch.device) -> tuple[float | None, float | None]:
    """Present clock rates in MHz, of cores or multiprocessors and of a GPU's memory; None where they cannot be read."""
    if device.type == "cuda":
        fields = gpu_query(device, "clocks.sm,clocks.mem")
        rates = [float(field) if re.fullmatch(r"[\d.]+", field) else None for field in fields]
        return (rates[0], rates[1]) if len(rates) == 2 else (None, None)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None, None
    found = [float(rate) for rate in re.findall(r"(?m)^cpu MHz\s*:\s*([\d.]+)", text)]
    return (sum(found) / len(found) if found else None), None


def gpu_query(device: torch.device, names: str) -> list[str]:
    """What nvidia-smi says about a GPU, field by field; empty where it says nothing."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = () if uuid is None else ("-i", f"GPU-{uuid}")  # its numbers are not CUDA_VISIBLE_DEVICES'
    answer = output_of("nvidia-smi", *which, f"--query-gpu={names}", "--format=csv,noheader,nounits")
    lines = answer.splitlines()
    return [field.strip() for field in lines[0].split(",")] if lines else []


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; where the system does not tell, 64 MiB."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if size:
            largest = max(largest, int(size[1]) << {"": 0, "K": 10, "M": 20}[size[2]])
    return largest or 64 << 20


def available_bytes(device: torch.device) -> int:
    """Memory that can be had now; where the system does not tell, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        found = re.search(r"(?m)^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 4 << 30


def package_version() -> str:
    """Version of the adamw_kernels that would be measured, or empty if it cannot be imported."""
    try:
        return str(importlib.import_module("adamw_kernels").__version__)
    except Exception:  # a half-built package may fail in any way; `list` and the run's first lines say how
        return ""


def distribution_version(name: str) -> str:
    """Version of an installed distribution, or empty."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def output_of(*command: str) -> str:
    """Standard output of a command run in the repository, or empty if it is missing or fails."""
    try:
        finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.strip()
