"""Compiles every Triton kernel that the launcher would launch, for GPUs that this machine need not have.

    python tests/compile_triton.py FOLDER TARGET...

A target is 'sm_90', say, or 'gfx942'; FOLDER/TARGET.json maps a kernel's name to what the compiler made of it, as text.
This runs in a process of its own because the test process may have Triton's interpreter switched on, which cannot be
undone.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from machine_code import disassemble, resources
from triton.backends.compiler import GPUTarget

from adamw_kernels import launch_table as layout
from adamw_kernels import triton_kernels
from adamw_kernels.control import NormDomain
from adamw_kernels.formats import PARAM_DTYPES, compute_dtype, grad_dtypes
from adamw_kernels.launch_table import LaunchTable, TensorSpec

CPU = torch.device("cpu")

# The kernels of a step in the order of their launches, without update, of which there are several.
SINGLE_KERNELS = ["measure", "sum_up", "decide", "prepare"]

COMBINATIONS = [(param, grad) for param in PARAM_DTYPES for grad in grad_dtypes(param)]


def kernel_name(param: torch.dtype, grad: torch.dtype) -> str:
    """What tests call the update kernel of a dtype combination: 'update-float32-bfloat16'."""
    return "-".join(["update", str(param).removeprefix("torch."), str(grad).removeprefix("torch.")])


def gpu_target(name: str) -> GPUTarget:
    """Triton's description of a GPU."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


class Recorder:
    """Stands in for a kernel: compiles what the launcher asks for and keeps the result."""

    def __init__(self, kernel: Any) -> None:
        """Keep the kernel; nothing is compiled yet."""
        self.kernel = kernel
        self.compiled: list[Any] = []

    def warmup(self, *arguments: Any, **options: Any) -> None:
        """Compile."""
        self.compiled.append(self.kernel.warmup(*arguments, **options))


def launch_table(combinations: list[tuple[torch.dtype, torch.dtype]]) -> LaunchTable:
    """A measured table with one tensor of two chunks for every dtype combination, in the order of the batches."""
    backend = triton_kernels.TritonBackend()
    specs = []
    for param, grad in combinations:
        moments = [torch.zeros(2 * backend.chunk_size, dtype=compute_dtype(param)) for _ in range(3)]
        specs.append(
            TensorSpec(
                name=kernel_name(param, grad),
                param=torch.zeros(2 * backend.chunk_size, dtype=param),
                grad_dtype=grad,
                exp_avg=moments[0],
                exp_avg_sq=moments[1],
                max_exp_avg_sq=moments[2],
                step=torch.zeros(()),
                hyper=0,
                amsgrad=True,
                maximize=False,
                decoupled=True,
            )
        )
    return LaunchTable(CPU, specs, 1, backend, backend.chunk_size, domains=[NormDomain()], measured=True)


def compile_all(combinations: list[tuple[torch.dtype, torch.dtype]]) -> dict[str, Any]:
    """What the launcher compiles for a table of these combinations, by name."""
    table = launch_table(combinations)
    originals = {name: getattr(triton_kernels, f"{name}_kernel") for name in [*SINGLE_KERNELS, "update"]}
    recorders = {name: Recorder(kernel) for name, kernel in originals.items()}
    try:
        for name, recorder in recorders.items():
            setattr(triton_kernels, f"{name}_kernel", recorder)
        triton_kernels.TritonBackend._run(table, layout.MEASURE | layout.DECIDE | layout.UPDATE, dry=True)
    finally:
        for name, kernel in originals.items():
            setattr(triton_kernels, f"{name}_kernel", kernel)
    names = SINGLE_KERNELS + [kernel_name(batch.param_dtype, batch.grad_dtype) for batch in table.batches]
    compiled = [kernel for recorder in recorders.values() for kernel in recorder.compiled]
    return dict(zip(names, compiled, strict=True))


def pretend_to_have(target: GPUTarget, device: int) -> None:
    """Make Triton compile for a GPU, to be known by this device index; launching on it would fail."""
    driver = SimpleNamespace(
        get_current_device=lambda: device, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)


def collect(compiled: Any, folder: Path) -> dict[str, Any]:
    """Everything that tests read about a compiled kernel."""
    if "amdgcn" in compiled.asm:
        return {"amdgcn": compiled.asm["amdgcn"]}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return {"ptx": compiled.asm["ptx"], "sass": disassemble(cubin), "resources": resources(cubin)}


def main(output: Path, targets: list[str]) -> None:
    """Compile for every target and write its JSON file."""
    options = triton_kernels.COMPILE_OPTIONS
    for device, target in enumerate(targets):
        pretend_to_have(gpu_target(target), device)
        triton_kernels.COMPILE_OPTIONS = options
        kernels = compile_all(COMBINATIONS)
        # The counterexample: what the tests must be able to see.
        triton_kernels.COMPILE_OPTIONS = {"enable_fp_fusion": True}
        for name, compiled in compile_all([(torch.float32, torch.float32)]).items():
            kernels[f"contracted-{name}"] = compiled
        with tempfile.TemporaryDirectory() as folder:
            texts = {name: collect(kernel, Path(folder)) for name, kernel in kernels.items()}
        (output / f"{target}.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
