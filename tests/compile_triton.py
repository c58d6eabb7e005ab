"""Compiles every Triton kernel that the launcher would launch, for GPUs that this machine need not have.

    python tests/compile_triton.py FILE SHARE [--known KEYS] TARGET...

A target is 'sm_90', say, or 'gfx942', and SHARE is '0/2' or '1/2' for one half of the kernels or the other. FILE, in
JSON, maps a target to a kernel's name to what the compiler made of it: how often each opcode stands in PTX and SASS or
in AMD's assembly, a digest of their order, and what a thread takes. All targets in one process share what does not
depend on them.

With `--known`, each of them has its key as well (`compilation_keys.py`), and those whose key stands in KEYS, a JSON
file, have only that: they are not compiled.

This runs in a process of its own because the test process may have Triton's interpreter switched on, which cannot be
undone.
"""

import argparse
import contextlib
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from compilation_keys import Keyed, keyed
from machine_code import amd_numbers, amd_opcodes, machine_codes, ptx_kernels, resources, sass_of_codes
from triton.backends.compiler import GPUTarget
from triton_front_end import SharedFrontEnd

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

    def __init__(self, kernel: Any, wanted: bool) -> None:
        """Keep the kernel; nothing is compiled yet, and nothing ever unless it is wanted."""
        self.kernel = kernel
        self.wanted = wanted
        self.compiled: list[Any] = []

    def warmup(self, *arguments: Any, **options: Any) -> None:
        """Compile."""
        if self.wanted:
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


def compile_all(combinations: list[Combination], singles: Collection[str] = SINGLE_KERNELS) -> dict[str, Any]:
    """What the launcher compiles for a table of these combinations, by name; of the single kernels, only `singles`."""
    table = launch_table(combinations)
    originals = {name: getattr(triton_kernels, f"{name}_kernel") for name in [*SINGLE_KERNELS, "update"]}
    recorders = {name: Recorder(kernel, name == "update" or name in singles) for name, kernel in originals.items()}
    try:
        for name, recorder in recorders.items():
            setattr(triton_kernels, f"{name}_kernel", recorder)
        triton_kernels.TritonBackend._run(table, layout.MEASURE | layout.DECIDE | layout.UPDATE, dry=True)
    finally:
        for name, kernel in originals.items():
            setattr(triton_kernels, f"{name}_kernel", kernel)
    names = [name for name in SINGLE_KERNELS if name in singles] + [
        kernel_name(batch.param_dtype, batch.grad_dtype, batch.moment_format, batch.rule) for batch in table.batches
    ]
    compiled = [kernel for recorder in recorders.values() for kernel in recorder.compiled]
    return dict(zip(names, compiled, strict=True))


def pretend_to_have(target: GPUTarget, device: int, asked: Callable[[], None] = lambda: None) -> None:
    """Make Triton compile for a GPU, to be known by this device index; launching on it would fail.

    Args:
        target: the GPU.
        device: its index.
        asked: is called whenever Triton, or a kernel, wants to know the GPU.
    """

    def current_target() -> GPUTarget:
        asked()
        return target

    driver = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=current_target,
    )
    triton.runtime.driver.set_active(driver)


def counts(**opcodes: list[str]) -> dict[str, Any]:
    """How often each opcode stands in these lists, and a digest of the lists themselves."""
    digest = hashlib.sha256(json.dumps(opcodes, sort_keys=True).encode()).hexdigest()[:16]
    return {**{kind: dict(sorted(Counter(found).items())) for kind, found in opcodes.items()}, "order": digest}


def collect(compiled: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Everything that tests read about a target's compiled kernels; of those that were not, only the key."""
    found: dict[str, dict[str, Any]] = {}
    codes = {}
    for name, kernel in compiled.items():
        found[name] = {"key": kernel.key} if isinstance(kernel, Keyed) else {}
        if kernel.asm is None:
            continue
        if "amdgcn" in kernel.asm:
            text = kernel.asm["amdgcn"]
            found[name] |= {**counts(amd=amd_opcodes(text)), "numbers": amd_numbers(text)}
            continue
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        # There is one kernel in each.
        (ptx,) = ptx_kernels(kernel.asm["ptx"]).values()
        (taken,) = resources(cubin).values()
        (code,) = machine_codes(kernel.asm["cubin"]).values()
        (architecture,) = set(re.findall(r"(?m)^\.target (sm_\w+)", kernel.asm["ptx"]))
        found[name]["resources"] = taken
        codes[name] = (code, ptx)
    if codes:
        disassembled = sass_of_codes([code for code, _ in codes.values()], architecture, folder)
        for (name, (_, ptx)), sass in zip(codes.items(), disassembled, strict=True):
            found[name] |= counts(ptx=ptx, sass=sass)
    return found


# With contraction allowed, what the tests must be able to see: compiled beside the second share, the smaller one.
PLAIN: list[Combination] = [(torch.float32, torch.float32, "float32", rule) for rule in ("adamw", "sgdw")]


def compile_share(first: int, step: int) -> dict[str, Any]:
    """Every `step`-th update from the first; the single kernels with the first share, counterexamples with the last."""
    kernels = compile_all(COMBINATIONS[first::step], SINGLE_KERNELS if first == 0 else [])
    if first != step - 1:
        return kernels
    options = triton_kernels.COMPILE_OPTIONS
    triton_kernels.COMPILE_OPTIONS = {"enable_fp_fusion": True}
    try:
        contracted = compile_all(PLAIN)
    finally:
        triton_kernels.COMPILE_OPTIONS = options
    return kernels | {f"contracted-{name}": compiled for name, compiled in contracted.items()}


def main(output: Path, share: str, targets: list[str], known: set[str] | None) -> None:
    """Compile a share of the kernels for every target, but what is known, and write the JSON file."""
    first, step = (int(number) for number in share.split("/"))
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        front_end = SharedFrontEnd(Path(folder))
        stack.enter_context(front_end.installed())
        if known is not None:
            stack.enter_context(keyed(known))
        for device, target in enumerate(targets):
            pretend_to_have(gpu_target(target), device, front_end.target_asked)
            found[target] = collect(compile_share(first, step), Path(folder))
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("share")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--known", type=Path)
    arguments = parser.parse_args()
    keys = set(json.loads(arguments.known.read_text())) if arguments.known else None
    main(arguments.output, arguments.share, arguments.targets, keys)
