"""What exists, what is chosen, why not the rest; and that a choice that was forced is obeyed or refused, never bent."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import CPU, PATHS, Path

import adamw_kernels
from adamw_kernels import BackendUnavailableError, FusedAdamW, backends, launch_table
from adamw_kernels.backends import BACKENDS, CpuBackend, _has_code_for, choose, choose_isa, survey, why_not

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

CUDA = torch.device("cuda", 0)
VARIABLES = (backends.BACKEND_VARIABLE, backends.ISA_VARIABLE, "TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what the environment forces; TRITON_INTERPRET stays, for Triton's decorators have run by now."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(backends.ISA_VARIABLE, raising=False)


@pytest.fixture
def looks_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules are looked for anew in the test and after it."""
    for load in (backends._load_native, backends._load_triton):
        load.cache_clear()
    yield
    monkeypatch.undo()
    for load in (backends._load_native, backends._load_triton):
        load.cache_clear()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with only the given ones of our variables set."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120)


def optimizer_on(device: torch.device, **options: Any) -> FusedAdamW:
    """An optimizer over one parameter with a gradient."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7, device=device))
    p.grad = torch.linspace(2, -1, 7, device=device)
    return FusedAdamW([p], **options)


def backend_used(optimizer: FusedAdamW) -> Any:
    """What the table of a stepped optimizer holds."""
    assert optimizer._internals.stepper.plan is not None
    (table,) = optimizer._internals.stepper.plan.tables
    return table.backend


def fake_native(**attributes: Any) -> types.SimpleNamespace:
    """A compiled module that updates nothing, of a CPU that runs only the baseline."""
    defaults = dict(
        cpu_isas=lambda: [("baseline", True), ("avx2", False)],
        cpu_step=None,
        cuda_step=None,
        cuda_load=None,
        cuda_architectures="80-real 90-real 120",
        cuda_build="built with nvcc 13.0 for 80-real 90-real 120",
    )
    return types.SimpleNamespace(**{**defaults, **attributes})


# --- what it says ----------------------------------------------------------------------------------------------------


def test_survey_of_this_machine() -> None:
    """Versions, ISAs and choices are those of this machine."""
    report = survey()
    assert report["versions"]["adamw_kernels"] == adamw_kernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    isas = backends.cpu_isas()
    assert isas and isas[0] == "baseline"
    assert all(isa in report["native"]["ISAs"] for isa in isas)
    assert report["native"]["module"] == "loaded"
    assert report["native"]["threads"] == str(torch.get_num_threads())
    assert report["native"]["CUDA kernels"] == backends.native_module().cuda_build  # type: ignore[union-attr]
    assert report["environment"][backends.BACKEND_VARIABLE] == "not set"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    cpu = report["devices"]["cpu"]
    assert (cpu["chosen"], cpu["isa"]) == ("cpu", isas[-1])
    assert cpu["not cuda"] == "it updates tensors on NVIDIA GPUs, not on cpu"
    assert "not cpu" not in cpu and "error" not in cpu
    for device in (f"cuda:{i}" for i in range(torch.cuda.device_count())):
        (lines,) = (lines for name, lines in report["devices"].items() if name.startswith(device))
        assert lines["chosen"] in ("triton", "cuda")
        assert lines["not cpu"] == f"it updates CPU tensors, not tensors on {device}"


def test_survey_names_what_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ISA that was compiled in and that this CPU does not run is listed as such and not chosen."""
    monkeypatch.setattr(backends, "_load_native", lambda: (fake_native(), ""))
    report = survey()
    assert report["native"]["ISAs"] == "baseline, avx2 (not on this CPU)"
    assert report["devices"]["cpu"]["isa"] == "baseline"


def test_survey_tells_errors_instead_of_raising_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a forced choice cannot be met the survey says so, for it is what one reads then."""
    monkeypatch.setenv(backends.ISA_VARIABLE, "avx1024")
    assert "ADAMW_KERNELS_CPU_ISA=avx1024 cannot be used" in survey()["devices"]["cpu"]["error"]
    assert survey()["environment"][backends.ISA_VARIABLE] == "avx1024"
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "tpu")
    assert "unknown backend" in survey()["devices"]["cpu"]["error"]


def test_describe_prints_the_survey(capsys: pytest.CaptureFixture[str]) -> None:
    """Every title, key and value of the survey is printed, one a line, nothing else."""
    adamw_kernels.describe()
    lines = capsys.readouterr().out.splitlines()
    report = survey()
    devices = report.pop("devices")
    expected = {**report, **{f"tensors on {name}": values for name, values in devices.items()}}
    assert [line for line in lines if not line.startswith(" ")] == [*expected]
    found = [tuple(line.split(maxsplit=1)) for line in lines if line.startswith(" ")]
    printed = [f"{key} {value}".split() for values in expected.values() for key, value in values.items()]
    assert [" ".join(pair).split() for pair in found] == printed


def test_module_prints_a_description() -> None:
    """`python -m adamw_kernels` prints it too, also where a forced backend cannot run, and is then clear about it."""
    result = python("-m", "adamw_kernels", ADAMW_KERNELS_BACKEND="cuda")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert f"torch {torch.__version__}" in lines
    assert "ADAMW_KERNELS_BACKEND cuda" in lines
    cpu = lines[lines.index("tensors on cpu") + 1 :]
    assert cpu[0] == (
        "error ADAMW_KERNELS_BACKEND=cuda cannot be used for tensors on cpu: it updates tensors on NVIDIA GPUs, not on "
        "cpu. What would work there: cpu."
    )
    assert any(line.startswith("not triton it needs a GPU (with TRITON_INTERPRET=1") for line in cpu)


# --- what is forced --------------------------------------------------------------------------------------------------


def test_forced_path_is_taken(path: Path) -> None:
    """Each path of this machine, once forced, is what the table of a stepped optimizer holds and the survey tells."""
    optimizer = optimizer_on(path.device)
    optimizer.step()
    used = backend_used(optimizer)
    assert used.name == path.backend
    lines = next(lines for name, lines in survey()["devices"].items() if name.startswith(str(path.device)))
    assert lines["chosen"] == path.backend
    if path.isa:
        assert (used.isa, lines["isa"]) == (path.isa, path.isa)


def test_every_isa_of_this_machine_is_a_path() -> None:
    """The tests run on each ISA that this CPU has, not only on the best."""
    assert [path.isa for path in PATHS if path.backend == "cpu"] == backends.cpu_isas()


def test_environment_overrides_the_argument(path: Path) -> None:
    """ADAMW_KERNELS_BACKEND decides for the whole process, whatever an optimizer asks for."""
    for request in ("auto", *BACKENDS):
        optimizer = optimizer_on(path.device, backend=request)
        optimizer.step()
        assert backend_used(optimizer).name == path.backend


def test_empty_variables_force_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set but empty is as good as not set."""
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "")
    monkeypatch.setenv(backends.ISA_VARIABLE, "")
    assert choose(CPU).name == "cpu"
    assert choose_isa() == backends.cpu_isas()[-1]


@pytest.mark.parametrize("name", ["tpu", "CPU", " cpu"])
def test_unknown_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An unknown name is an error that lists the known ones, from the argument and from the environment."""
    with pytest.raises(ValueError, match="backend=.*: unknown backend; expected one of auto, cpu, triton, cuda"):
        choose(CPU, name)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, name)
    with pytest.raises(ValueError, match=f"ADAMW_KERNELS_BACKEND={name}: unknown backend"):
        choose(CPU)


def test_impossible_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known backend that cannot run on the device is an error that lists those that can."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    working = r"What would work there: cpu, triton\."
    with pytest.raises(
        BackendUnavailableError, match=rf"backend='cuda' cannot be used for tensors on cpu: .* {working}"
    ):
        choose(CPU, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match=r"it needs a GPU .* What would work there: cpu\."):
        choose(CPU, "triton")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpu")
    with pytest.raises(BackendUnavailableError, match="ADAMW_KERNELS_BACKEND=cpu cannot be used for tensors on cuda:0"):
        choose(CUDA)


def test_impossible_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ISA that does not exist, was not compiled in or is not this CPU's is an error that lists those that work."""
    working = ", ".join(backends.cpu_isas())
    monkeypatch.setenv(backends.ISA_VARIABLE, "sse2")
    with pytest.raises(BackendUnavailableError, match=rf"ADAMW_KERNELS_CPU_ISA=sse2 .* would work here: {working}\."):
        choose(CPU)
    monkeypatch.setattr(backends, "_load_native", lambda: (fake_native(), ""))
    monkeypatch.setenv(backends.ISA_VARIABLE, "avx2")
    with pytest.raises(BackendUnavailableError, match=r"ADAMW_KERNELS_CPU_ISA=avx2 .* would work here: baseline\."):
        choose(CPU)
    monkeypatch.setenv(backends.ISA_VARIABLE, "baseline")
    assert choose(CPU).isa == "baseline"  # type: ignore[attr-defined]


def test_forced_from_outside_the_process() -> None:
    """Variables of the environment reach a fresh process: an impossible ISA fails its first step and writes nothing."""
    script = """
import torch
from adamw_kernels import BackendUnavailableError, FusedAdamW
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
try:
    FusedAdamW([p]).step()
except BackendUnavailableError as error:
    print(error, p.tolist())
"""
    result = python("-c", script, ADAMW_KERNELS_CPU_ISA="avx1024")
    working = ", ".join(backends.cpu_isas())
    expected = f"ADAMW_KERNELS_CPU_ISA=avx1024 cannot be used on this CPU. What would work here: {working}."
    assert (result.stdout.strip(), result.stderr) == (f"{expected} [1.0, 1.0, 1.0]", "")


# --- without the compiled module -------------------------------------------------------------------------------------

WITHOUT_NATIVE = """
import sys
sys.modules["adamw_kernels._C"] = None
import torch
import adamw_kernels
from adamw_kernels import FusedAdamW
"""


def test_without_the_compiled_module() -> None:
    """The package imports and describes itself; CPU tensors get one clear error that says how to build it."""
    script = f"""{WITHOUT_NATIVE}
adamw_kernels.describe()
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
try:
    FusedAdamW([p]).step()
except adamw_kernels.BackendUnavailableError as error:
    print("STEP", error, p.tolist())
"""
    result = python("-c", script)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    hint = "build it with `pip install .` in a checkout"
    assert any(line.startswith("module the compiled module adamw_kernels._C cannot be imported") for line in lines)
    assert "ISAs none" in lines and "CUDA kernels not built" in lines
    (error,) = (line for line in lines if line.startswith("STEP"))
    assert error.startswith("STEP no backend can update tensors on cpu. cpu: the compiled module")
    assert error.count(hint) == 1 and "triton: it needs a GPU" in error and error.endswith("[1.0, 1.0, 1.0]")


WATCHED_STEP = """
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = FusedAdamW([p], lr=0.5)
optimizer.step()
optimizer.step()
print("STEP", type(optimizer._internals.stepper.watch).__name__, p.tolist())
"""


def test_without_the_native_watch() -> None:
    """Its twin takes over, with the same bits, and `describe` says why: it is not there, or is another torch's."""
    missing = WITHOUT_NATIVE.replace("adamw_kernels._C", "adamw_kernels._tensor_watch")
    other = """
import types, sys
sys.modules["adamw_kernels._tensor_watch"] = types.SimpleNamespace(torch_version="1.0")
import torch
import adamw_kernels
from adamw_kernels import FusedAdamW
"""
    here = python("-c", f"import torch\nfrom adamw_kernels import FusedAdamW\n{WATCHED_STEP}")
    assert here.returncode == 0, here.stderr
    native, weights = here.stdout.split(" ", 2)[1:]
    assert native == "TensorWatch"
    for without, reason in ((missing, "cannot be imported"), (other, "was built for torch 1.0")):
        result = python("-c", f"{without}adamw_kernels.describe()\n{WATCHED_STEP}")
        assert (result.returncode, result.stderr) == (0, "")
        *lines, step = result.stdout.splitlines()
        assert step.split(" ", 2) == ["STEP", "PythonTensorWatch", weights.strip()]
        (line,) = (line for line in lines if "tensor watch" in line)
        assert reason in line and "pip install" in line


def test_interpreted_triton_without_the_compiled_module() -> None:
    """With TRITON_INTERPRET=1 Triton takes over, with the same bits as the native path."""
    steps = """
p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
q = torch.nn.Parameter(torch.linspace(-3, 1, 6).bfloat16().view(2, 3).t())
optimizer = FusedAdamW([{"params": [p], "lr": 0.1}, {"params": [q], "amsgrad": True}])
for i in range(3):
    p.grad = torch.linspace(2, -1, 7) * (1 - i)
    q.grad = None if i == 1 else torch.full((3, 2), 0.5, dtype=torch.bfloat16)
    optimizer.step()
(table,) = optimizer._internals.stepper.plan.tables
used = table.backend.name, type(optimizer._internals.stepper.watch).__name__
values = [p.tolist(), q.tolist(), [[x.tolist() for x in state.values()] for state in optimizer.state.values()]]
"""
    result = python("-c", f"{WITHOUT_NATIVE}{steps}\nprint(*used)\nprint(values)\n", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    here: dict[str, Any] = {"torch": torch, "FusedAdamW": FusedAdamW}
    exec(steps, here)
    assert here["used"] == ("cpu", "TensorWatch")
    used, values = result.stdout.splitlines()
    assert used == "triton TensorWatch"
    assert values == repr(here["values"])


@pytest.mark.usefixtures("looks_again")
def test_auto_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs "auto" falls back to Triton's interpreter, where that is asked for; the ISAs are then none."""
    monkeypatch.setitem(sys.modules, "adamw_kernels._C", None)
    assert backends.cpu_isas() == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU).name == "triton"
    with pytest.raises(
        BackendUnavailableError, match=r"backend='cpu' cannot be used .* What would work there: triton\."
    ):
        choose(CPU, "cpu")


@pytest.mark.usefixtures("looks_again")
@pytest.mark.parametrize("key", [*launch_table.LAYOUT])
def test_stale_build_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A compiled module whose launch table differs in any respect is not used: it would read other fields."""
    monkeypatch.setitem(launch_table.LAYOUT, key, "something else")
    assert backends.native_module() is None
    reason = why_not("cpu", CPU)
    assert "belongs to another version of the package" in reason and "pip install ." in reason
    assert survey()["native"]["module"] == reason


def test_layouts_agree() -> None:
    """Python and the compiled module declare the same layout, entry by entry."""
    native = backends.native_module()
    assert native is not None
    assert native.layout() == launch_table.LAYOUT


# --- why not ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real 90-real", (8, 0), True),
        ("80-real 90-real", (8, 9), True),  # machine code runs on later minor versions
        ("86-real", (8, 0), False),  # not on earlier ones
        ("80-real 90-real", (10, 0), False),  # nor on another major version
        ("80-real 90-real", (7, 5), False),
        ("90a-real", (9, 0), True),
        ("120", (12, 0), True),  # both machine code and PTX
        ("120", (12, 1), True),
        ("120", (13, 0), True),  # its PTX
        ("120", (10, 3), False),
        ("80-virtual", (9, 0), True),
        ("80-virtual", (8, 0), True),
        ("90-virtual", (8, 9), False),
        ("80-real 90-real 100-real 120", (10, 3), True),
        ("80-real 90-real 100-real 120", (11, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    """Machine code runs on its own major version from its minor version up, PTX on everything later."""
    assert _has_code_for(architectures, capability) is runs


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, native: Any, *, cuda: str | None = "13.0") -> None:
    """A torch for CUDA, a GPU of capability 9.0, and this compiled module."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of the future")
    monkeypatch.setattr(backends, "_load_native", lambda: (native, "" if native else "it is not there"))


def test_why_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend needs an NVIDIA GPU, torch's CUDA build, our module, its kernels, and code for that GPU."""
    assert why_not("cuda", CPU) == "it updates tensors on NVIDIA GPUs, not on cpu"
    pretend_gpu(monkeypatch, fake_native(), cuda=None)
    assert why_not("cuda", CUDA) == "this torch is not built for CUDA"
    pretend_gpu(monkeypatch, None)
    assert why_not("cuda", CUDA) == "it is not there"
    pretend_gpu(monkeypatch, fake_native(cuda_architectures="", cuda_build="not built: nvcc is not on the PATH"))
    assert why_not("cuda", CUDA) == "CUDA kernels were not built: nvcc is not on the PATH"
    pretend_gpu(monkeypatch, fake_native(cuda_architectures="80-real 120"))
    assert why_not("cuda", CUDA) == "it was built for 80-real 120, not for GPU of the future"
    pretend_gpu(monkeypatch, fake_native())
    assert why_not("cuda", CUDA) == ""


@pytest.mark.usefixtures("looks_again")
@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.6.0", ""),
        ("3.10.1", ""),  # a number, not a string: 10 > 6
        ("4.0.0+git1234", ""),
        ("3.5.1", "triton 3.5.1 is older than 3.6"),
        ("2.9.0", "triton 2.9.0 is older than 3.6"),
    ],
)
def test_why_not_triton_of_this_version(monkeypatch: pytest.MonkeyPatch, version: str, reason: str) -> None:
    """Triton must be new enough; the survey shows the version or the reason."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not("triton", CUDA) == reason
    assert survey()["versions"]["triton"] == (reason or version)


@pytest.mark.usefixtures("looks_again")
def test_why_not_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton the reason is the import's own, and CPU tensors do not need it."""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert why_not("triton", CUDA).startswith("triton cannot be imported (ModuleNotFoundError: ")
    optimizer = optimizer_on(CPU)
    optimizer.step()
    assert isinstance(backend_used(optimizer), CpuBackend)


@pytest.mark.usefixtures("looks_again")
def test_why_not_triton_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that fails on import in whatever way is a reason, not a crash."""
    import importlib

    original = importlib.import_module

    def fail(name: str) -> Any:
        if name == "triton":
            raise RuntimeError("libtriton.so: wrong ELF class")
        return original(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    expected = "triton cannot be imported (RuntimeError: libtriton.so: wrong ELF class)"
    assert why_not("triton", CUDA) == expected
    assert survey()["versions"]["triton"] == expected


@pytest.mark.usefixtures("looks_again")
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs "auto" takes Triton, else CUDA, else it is an error with the reason for each."""
    pretend_gpu(monkeypatch, fake_native())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose(CUDA).name == "triton"
    with monkeypatch.context() as interpreting:  # the interpreter would take a GPU's addresses for the host's
        interpreting.setenv("TRITON_INTERPRET", "1")
        assert choose(CUDA).name == "cuda"
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._load_triton.cache_clear()
    assert choose(CUDA).name == "cuda"
    with pytest.raises(BackendUnavailableError, match=r"backend='triton' .* What would work there: cuda\."):
        choose(CUDA, "triton")
    pretend_gpu(monkeypatch, None)
    with pytest.raises(
        BackendUnavailableError,
        match=r"no backend can update tensors on cuda:0\. triton: .* cannot be imported .*; cuda: it is not there\.",
    ):
        choose(CUDA)
    with pytest.raises(BackendUnavailableError, match="What would work there: nothing that is installed"):
        choose(CUDA, "cuda")


def test_devices_that_no_backend_knows() -> None:
    """A device of another kind is an error with each backend's reason."""
    xpu = torch.device("xpu", 0)
    assert why_not("triton", xpu) == "it does not know devices of type 'xpu'"
    with pytest.raises(BackendUnavailableError) as caught:
        choose(xpu)
    text = str(caught.value)
    assert text.startswith("no backend can update tensors on xpu:0. ")
    assert all(f"{name}: {why_not(name, xpu)}" in text for name in BACKENDS)
