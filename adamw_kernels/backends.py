"""Which implementations exist here, which one a device gets, and why not the others."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from adamw_kernels.tensor_watch import load_native as load_watch

if TYPE_CHECKING:
    from adamw_kernels.launch_table import LaunchTable

BACKENDS = ("cpu", "triton", "cuda")
"""Names that `backend=` and ADAMW_KERNELS_BACKEND accept besides "auto"."""

BACKEND_VARIABLE = "ADAMW_KERNELS_BACKEND"
ISA_VARIABLE = "ADAMW_KERNELS_CPU_ISA"
MIN_TRITON = (3, 6)

BUILD_HINT = "build it with `pip install .` in a checkout of adamw_kernels (a C++ compiler is all it needs)"


class BackendUnavailableError(RuntimeError):
    """A backend or an ISA was asked for that cannot run here; the message lists what can."""


class Backend(Protocol):
    """What a launch table needs of an implementation."""

    name: ClassVar[str]
    chunk_size: int

    def warm_up(self, table: LaunchTable, stages: int) -> None:
        """Do whatever may fail before these stages' first launch, without touching any tensor."""

    def launch(self, table: LaunchTable, stages: int) -> None:
        """Run these stages of a step (MEASURE, DECIDE, UPDATE) on the table."""


# --- what exists -----------------------------------------------------------------------------------------------------


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why not."""
    from adamw_kernels.launch_table import LAYOUT

    try:
        native = importlib.import_module("adamw_kernels._C")
    except ImportError as error:
        return None, f"the compiled module adamw_kernels._C cannot be imported ({error}); {BUILD_HINT}"
    if native.layout() != LAYOUT:
        return None, f"the compiled module adamw_kernels._C belongs to another version of the package; {BUILD_HINT}"
    return native, ""


def native_module() -> ModuleType | None:
    """`adamw_kernels._C`, or None where it was not built."""
    return _load_native()[0]


@functools.cache
def _load_triton() -> tuple[str, str]:
    """Triton's version, or "" and why it cannot be used."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in many ways, none of which is ours to judge
        return "", f"triton cannot be imported ({type(error).__name__}: {error})"
    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return "", f"triton {version} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    return version, ""


def cpu_isas() -> list[str]:
    """Names of the ISAs that the compiled module has and this CPU runs, best last; empty without the module."""
    native = native_module()
    return [] if native is None else [name for name, supported in native.cpu_isas() if supported]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_not(backend: str, device: torch.device) -> str:
    """Why `backend` cannot update tensors on `device`; empty if it can."""
    native, native_reason = _load_native()
    if backend == "cpu":
        if device.type != "cpu":
            return f"it updates CPU tensors, not tensors on {device}"
        return native_reason
    if backend == "triton":
        version, reason = _load_triton()
        if not version:
            return reason
        if device.type == "cpu" and not _interpreting():
            return "it needs a GPU (with TRITON_INTERPRET=1 set before the import, its interpreter runs on the CPU)"
        if device.type == "cuda" and _interpreting():
            return "TRITON_INTERPRET is set, and its interpreter cannot read a GPU's memory"
        return "" if device.type in ("cpu", "cuda") else f"it does not know devices of type {device.type!r}"
    if device.type != "cuda":
        return f"it updates tensors on NVIDIA GPUs, not on {device}"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if native is None:
        return native_reason
    if not native.cuda_architectures:
        return f"CUDA kernels were {native.cuda_build}"
    if not _has_code_for(native.cuda_architectures, torch.cuda.get_device_capability(device)):
        return f"it was built for {native.cuda_architectures}, not for {torch.cuda.get_device_name(device)}"
    return ""


def _has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor version up; PTX ("120", not "120-real") on later ones.

    >>> _has_code_for("80-real 90-real", (8, 9)), _has_code_for("80-real 90-real", (10, 0))
    (True, False)
    """
    for target in architectures.split():
        number, _, kind = target.partition("-")
        if not any(c.isdigit() for c in number):
            return True  # "native", "all": what was built then cannot be told from here; loading the kernels will tell
        major, minor = divmod(int("".join(c for c in number if c.isdigit())), 10)
        if kind != "virtual" and major == capability[0] and minor <= capability[1]:
            return True
        if kind != "real" and (major, minor) <= capability:
            return True
    return False


# --- what is chosen ------------------------------------------------------------------------------------------------


def choose(device: torch.device, request: str = "auto") -> Backend:
    """The backend for tensors on `device`.

    ADAMW_KERNELS_BACKEND, where set, overrides `request`. "auto" takes the native CPU path on CPUs (Triton's
    interpreter where TRITON_INTERPRET=1 is set and the native module is missing), and Triton, else CUDA, on GPUs.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: what was asked for cannot run on this device, or nothing can.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "")
    origin = f"{BACKEND_VARIABLE}={forced}" if forced else f"backend={request!r}"
    name = check_name(forced or request, origin)
    if name != "auto":
        reason = why_not(name, device)
        if reason:
            working = [other for other in BACKENDS if not why_not(other, device)]
            raise BackendUnavailableError(
                f"{origin} cannot be used for tensors on {device}: {reason}. "
                f"What would work there: {', '.join(working) or 'nothing that is installed'}."
            )
        return _make(name, device)
    for candidate in preference(device):
        if not why_not(candidate, device):
            return _make(candidate, device)
    reasons = "; ".join(f"{candidate}: {why_not(candidate, device)}" for candidate in preference(device) or BACKENDS)
    raise BackendUnavailableError(f"no backend can update tensors on {device}. {reasons}.")


def check_name(name: str, origin: str) -> str:
    """`name` if it is "auto" or a backend's name.

    Raises:
        ValueError: listing the names that are.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend; expected one of auto, {', '.join(BACKENDS)}")
    return name


def preference(device: torch.device) -> tuple[str, ...]:
    """Backends that "auto" tries on a device, best first."""
    return {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}.get(device.type, ())


def choose_isa() -> str:
    """ADAMW_KERNELS_CPU_ISA, else the best ISA that this CPU runs.

    Raises:
        BackendUnavailableError: the variable names an ISA that cannot run here.
    """
    working = cpu_isas()
    forced = os.environ.get(ISA_VARIABLE, "")
    if forced and forced not in working:
        raise BackendUnavailableError(
            f"{ISA_VARIABLE}={forced} cannot be used on this CPU. What would work here: {', '.join(working)}."
        )
    return forced or working[-1]


def _make(name: str, device: torch.device) -> Backend:
    if name == "cpu":
        return CpuBackend()
    if name == "cuda":
        return CudaBackend()
    from adamw_kernels.triton_kernels import TritonBackend

    return TritonBackend()


class CpuBackend:
    """C++ loops, OpenMP threads over the chunks of all tensors at once."""

    name: ClassVar[str] = "cpu"

    # Elements a chunk: a million of them still split over 64 threads, and a chunk's own cost does not show. On a large
    # tensor nothing between 8 Ki and 1 Mi could be told from it.
    chunk_size = 1 << 14

    def __init__(self) -> None:
        """Fix the ISA."""
        native = native_module()
        assert native is not None, "choose() checks this"
        names = [name for name, _ in native.cpu_isas()]
        self.isa = choose_isa()
        self._isa_index = names.index(self.isa)
        self._step = native.cpu_step

    def warm_up(self, table: LaunchTable, stages: int) -> None:
        """Nothing to do: the kernels are compiled."""

    def launch(self, table: LaunchTable, stages: int) -> None:
        """One call; returns when the stages are done."""
        self._step(table.address, stages, self._isa_index, torch.get_num_threads())


class CudaBackend:
    """The CUDA kernels of the compiled module."""

    name: ClassVar[str] = "cuda"

    # Elements a chunk, one block each: 16 rounds of 256 threads and 16-byte accesses in float32.
    chunk_size = 1 << 14

    def __init__(self) -> None:
        """Take the launcher from the compiled module."""
        native = native_module()
        assert native is not None, "choose() checks this"
        self._step = native.cuda_step
        self._load = native.cuda_load

    def warm_up(self, table: LaunchTable, stages: int) -> None:
        """Load every kernel that the table will launch; one that cannot run on this device or driver fails here."""
        with torch.cuda.device(table.device):
            self._load(table.batches_address, len(table.batches))

    def launch(self, table: LaunchTable, stages: int) -> None:
        """Enqueue the stages on the current stream of the table's device."""
        with torch.cuda.device(table.device):
            stream = torch.cuda.current_stream(table.device).cuda_stream
            self._step(table.address, stages, table.batches_address, len(table.batches), stream)


# --- what it says ---------------------------------------------------------------------------------------------------


def survey() -> dict[str, Any]:
    """Everything that `describe` prints, as plain data."""
    native, native_reason = _load_native()
    watch, watch_reason = load_watch()
    triton_version, triton_reason = _load_triton()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    chosen: dict[str, dict[str, str]] = {}
    for device in devices:
        try:
            backend = choose(device)
            names: dict[str, str] = {"chosen": backend.name}
            if isinstance(backend, CpuBackend):
                names["isa"] = backend.isa
        except (BackendUnavailableError, ValueError) as error:
            names = {"error": str(error)}
        for other in BACKENDS:
            reason = why_not(other, device)
            if reason and device.type in ("cpu", "cuda"):
                names[f"not {other}"] = reason
        chosen[str(device)] = names
    return {
        "versions": {
            "adamw_kernels": importlib.import_module("adamw_kernels").__version__,
            "torch": torch.__version__,
            "triton": triton_version or triton_reason,
            "python": platform.python_version(),
        },
        "native": {
            "module": "loaded" if native is not None else native_reason,
            "ISAs": ", ".join(
                name if supported else f"{name} (not on this CPU)"
                for name, supported in (native.cpu_isas() if native is not None else [])
            )
            or "none",
            "threads": str(torch.get_num_threads()),
            "CUDA kernels": native.cuda_build if native is not None else "not built",
            "tensor watch": f"loaded, for torch {watch.torch_version}" if watch is not None else watch_reason,
        },
        "environment": {
            name: os.environ.get(name, "not set") for name in (BACKEND_VARIABLE, ISA_VARIABLE, "TRITON_INTERPRET")
        },
        "devices": {
            name if name == "cpu" else f"{name} ({torch.cuda.get_device_name(name)})": lines
            for name, lines in chosen.items()
        },
    }


def describe() -> None:
    """Print what exists here, what is chosen for each device, and why not the rest.

    `python -m adamw_kernels` prints the same. `adamw_kernels.backends.survey()` returns it as data.
    """
    report = survey()
    devices = report.pop("devices")
    for title, lines in report.items():
        _print_section(title, lines)
    for device, lines in devices.items():
        _print_section(f"tensors on {device}", lines)


def _print_section(title: str, lines: dict[str, str]) -> None:
    sys.stdout.write(f"{title}\n")
    width = max(len(key) for key in lines)
    for key, value in lines.items():
        sys.stdout.write(f"  {key:<{width}}  {value}\n")
