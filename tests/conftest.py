"""Every test that updates tensors runs on every path this machine has: each CPU ISA, Triton, CUDA.

Without a GPU, Triton runs under its interpreter on CPU tensors. That must be decided before Triton's decorators run,
so it is set here, before anything imports the kernels.
"""

import dataclasses
import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from adamw_kernels import backends, tensor_watch, triton_kernels  # noqa: E402, F401  # now, whatever tests do to the variable later

if not HAS_GPU and find_spec("triton") is not None:
    import interpreter

    interpreter.replace_once()
    interpreter.look_up_dtypes_once()
    interpreter.check_no_overflow_in_vain()
    interpreter.unwrap_at_once()
    interpreter.make_types_once()
    interpreter.agree_at_once()

CPU = torch.device("cpu")


def pytest_collection_finish() -> None:
    """What there is by now, torch and ten thousand tests, stays: no garbage collection need look through it again.

    Each took half a second, and to see what a step leaves behind, tests ask for dozens.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What was set aside is freed at the end as ever: Triton counts what it still finds then, and says so."""
    gc.unfreeze()


@pytest.fixture(params=["native", "shared", "python"])
def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force one implementation of the watch over tensors; "shared": the native one, few tensors on two threads."""
    threads = torch.get_num_threads()
    if request.param == "python":
        monkeypatch.setattr(tensor_watch, "load_native", lambda: (None, "twin"))
    elif tensor_watch.load_native()[0] is None:
        pytest.skip(tensor_watch.load_native()[1])
    elif request.param == "shared":
        monkeypatch.setattr(tensor_watch, "PARAMS_PER_THREAD", 1)
        torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to compute a step: a backend, on a CPU with an ISA."""

    backend: str
    device: torch.device
    isa: str = ""

    def __str__(self) -> str:
        """What pytest shows."""
        kind = "interpreter" if self.backend == "triton" and self.device == CPU else self.isa
        return f"{self.backend}-{kind}" if kind else self.backend


PATHS = [Path("cpu", CPU, isa) for isa in backends.cpu_isas()]
PATHS.append(Path("triton", torch.device("cuda", 0) if HAS_GPU else CPU))
if HAS_GPU and not backends.why_not("cuda", torch.device("cuda", 0)):
    PATHS.append(Path("cuda", torch.device("cuda", 0)))


@pytest.fixture(params=PATHS, ids=str)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Force one path for the duration of a test; tensors go to `path.device`."""
    chosen: Path = request.param
    monkeypatch.setenv(backends.BACKEND_VARIABLE, chosen.backend)
    if chosen.isa:
        monkeypatch.setenv(backends.ISA_VARIABLE, chosen.isa)
    else:
        monkeypatch.delenv(backends.ISA_VARIABLE, raising=False)
    return chosen


@pytest.fixture(params=["cpu", "cuda"] if HAS_GPU else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device, with the backend that "auto" takes there."""
    return torch.device("cuda", 0) if request.param == "cuda" else CPU
