"""CUDA kernels compiled as plain C++, with the stand-in for the CUDA runtime in cuda_on_host/."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "cuda_on_host"

# What a launch returns, as cuda_runtime.h has it.
MISALIGNED_ADDRESS = 716
LAUNCH_FAILURE = 719


def compile_kernels(folder: Path, kernels: Path, *host_code: Path) -> ctypes.CDLL:
    """The kernels of a .cu file as a shared library in `folder`; `host_code` is linked to them."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("compiling CUDA kernels as plain C++ needs a C++ compiler")
    # Contraction is off as in CMakeLists.txt. `#pragma unroll` is nvcc's own.
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wno-unknown-pragmas", f"-I{STAND_IN}", f"-I{ROOT / 'csrc'}"]
    watched = ["-fsanitize=alignment", "-fsanitize-coverage=trace-pc", "-x", "c++"]
    library, objects = folder / f"{kernels.stem}.so", []
    for source in (kernels, STAND_IN / "launch.cpp", *host_code):
        objects.append(str(folder / f"{source.stem}.o"))
        of_kind = watched if source == kernels else []
        run(compiler, *flags, *of_kind, "-c", str(source), "-o", objects[-1])
    run(compiler, "-shared", *objects, "-o", str(library))
    return ctypes.CDLL(str(library))


def run(*command: str) -> None:
    """Run a compiler, whose complaints become the assertion's message."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
