"""Compiles every Triton kernel that the launcher would launch, for GPUs that this machine need not have.

    python tests/compile_triton.py FOLDER TARGET...

A target is 'sm_90', say, or 'gfx942'; FOLDER/TARGET.json maps a kernel's name to what the compiler made of it: the
opcodes of PTX and SASS and what a thread takes, or AMD's assembly as text.
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
from machine_code import disassemble, ptx_kernels, resources, sass_kernels
from triton.backends.compiler import GPUTarget

from adamw_kernels import launch_table as layout
from adamw_kernels import triton_kernels
from adamw_kernels.control import NormDomain
from adamw_kernels.formats import MOMENT_FORMATS, PARAM_DTYPES, compute_dtype, grad_dtypes
from adamw_kernels.launch_table import LaunchTable, TensorSpec

CPU = torch.device("cpu")

# The kernels of a step in the order of their launches, without update, of which there are several.
SINGLE_KERNELS = ["measure", "sum_up", "decide", "prepare"]

Combination = tuple[torch.dtype, torch.dtype, str, str]  # of a parameter, its gradient, its moments' format, the rule

COMBINATIONS: list[Combination] = [
    (param, grad, moments, rule)
    for rule in ("adamw", "sgdw")
    for param in PARAM_DTYPES
    for grad in grad_dtypes(param)
    for moments in (MOMENT_FORMATS if compute_dtype(param) == torch.float32 else MOMENT_FORMATS[:1])
    if (rule, moments) != ("sgdw", "8bit")
]


def kernel_name(param: torch.dtype, grad: torch.dtype, moments: str, rule: str) -> str:
    """What tests call the update kernel of a combination: 'adamw-float32-bfloat16-8bit'."""
    return "-".join([rule, str(param).removeprefix("torch."), str(grad).removeprefix("torch."), moments])


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


def launch_table(combinations: list[Combination]) -> LaunchTable:
    """A measured table with one tensor of two chunks for every combination, in the order of the batches."""
    backend = triton_kernels.TritonBackend()
    numel = 2 * backend.chunk_size
    specs = []
    for param, grad, moments, rule in combinations:
        # Nothing is launched: what a moment's dtype is does not matter, nor the tensors that only some formats have.
        specs.append(
            TensorSpec(
                name=kernel_name(param, grad, moments, rule),
                param=torch.zeros(numel, dtype=param),
                grad_dtype=grad,
                exp_avg=torch.zeros(numel, dtype=compute_dtype(param)),
                exp_avg_sq=torch.zeros(numel, dtype=compute_dtype(param)),
                max_exp_avg_sq=None,
                step=torch.zeros(()),
                hyper=0,
                rule=rule,
                moment_format=moments,
            )
        )
    return LaunchTable(CPU, specs, 1, backend, backend.chunk_size, domains=[NormDomain()], measured=True)


def compile_all(combinations: list[Combination]) -> dict[str, Any]:
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
    names = SINGLE_KERNELS + [
        kernel_name(batch.param_dtype, batch.grad_dtype, batch.moment_format, batch.rule) for batch in table.batches
    ]
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
    # There is one kernel in each.
    (ptx,) = ptx_kernels(compiled.asm["ptx"]).values()
    (sass,) = sass_kernels(disassemble(cubin)).values()
    (taken,) = resources(cubin).values()
    return {"ptx": ptx, "sass": sass, "resources": taken}


def main(output: Path, targets: list[str]) -> None:
    """Compile for every target and write its JSON file."""
    options = triton_kernels.COMPILE_OPTIONS
    for device, target in enumerate(targets):
        pretend_to_have(gpu_target(target), device)
        triton_kernels.COMPILE_OPTIONS = options
        kernels = compile_all(COMBINATIONS)
        # The counterexample: what the tests must be able to see.
        triton_kernels.COMPILE_OPTIONS = {"enable_fp_fusion": True}
        plain = [(torch.float32, torch.float32, "float32", rule) for rule in ("adamw", "sgdw")]
        for name, compiled in compile_all(plain).items():
            kernels[f"contracted-{name}"] = compiled
        with tempfile.TemporaryDirectory() as folder:
            texts = {name: collect(kernel, Path(folder)) for name, kernel in kernels.items()}
        (output / f"{target}.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
