"""The Triton kernels as compiled for GPUs that need not be here: what the assembly says.

Every kernel that the launcher launches (prepare, and update for all dtype combinations) is compiled for sm_80, sm_90,
sm_100 and gfx942 by `compile_triton.py`. Division and root are single instructions in PTX, `div.rn` and `sqrt.rn`; the
assembler expands them to sequences with FFMA inside that round correctly, so "no contraction" is asserted of PTX, where
every product and sum must carry `.rn`: without it, ptxas may contract them.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_code import (
    amd_metadata,
    amd_opcodes,
    is_float64_arithmetic,
    is_local_access,
    nvidia_tool,
    outside_ieee,
    ptx_kernels,
    ptx_wide_accesses,
    sass_kernels,
    sass_wide_accesses,
)

import adamw_kernels
from adamw_kernels.formats import PARAM_DTYPES, compute_dtype, grad_dtypes

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

from adamw_kernels import triton_kernels  # noqa: E402

NVIDIA = ["sm_80", "sm_90", "sm_100"]
AMD = ["gfx942"]
TARGETS = [*NVIDIA, *AMD]

UPDATES = {
    "-".join(["update", *(str(dtype).removeprefix("torch.") for dtype in pair)]): pair
    for pair in ((param, grad) for param in PARAM_DTYPES for grad in grad_dtypes(param))
}
KERNELS = ["prepare", *UPDATES]

# Registers a thread, at most. A block is 128 threads: 80 registers let 6 blocks share a multiprocessor, 96 let 5.
# Measured with Triton 3.9: on sm_80, sm_90, sm_100
MAX_REGISTERS = {
    "prepare": 48,  # 40, 42, 40
    torch.float32: 80,  # 80, 79, 70 for float32 throughout; 80, 72, 66 with 16-bit operands
    torch.float64: 96,  # 90, 90, 78
}
# On gfx942, where 64 vector registers still let 8 wavefronts share a SIMD unit: prepare 30, float32 46, float64 52.
MAX_VECTOR_REGISTERS = 64

# Fused multiply-adds within gfx942's correctly rounded expansions of (division, root), by compute type.
AMD_FUSED_WITHIN = {"f32": (5, 2), "f64": (5, 7)}


@pytest.fixture(scope="session")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By target, what `compile_triton.py` writes; two processes for two targets each."""
    folder = tmp_path_factory.mktemp("triton")
    tests = Path(__file__).parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(adamw_kernels.__file__).parents[1])

    def compile_for(targets: list[str]) -> None:
        result = subprocess.run(
            [sys.executable, str(tests / "compile_triton.py"), str(folder), *targets],
            env={**environment, "TRITON_CACHE_DIR": str(folder / targets[0])},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_for, [TARGETS[::2], TARGETS[1::2]]))
    return {target: json.loads((folder / f"{target}.json").read_text()) for target in TARGETS}


class NvidiaKernel:
    """One compiled kernel's opcodes and resources."""

    def __init__(self, texts: dict[str, Any]) -> None:
        """Take the compiler's texts apart; there is one kernel in each."""
        (self.ptx,) = ptx_kernels(texts["ptx"]).values()
        (self.sass,) = sass_kernels(texts["sass"]).values()
        (self.resources,) = texts["resources"].values()


@pytest.fixture(params=NVIDIA)
def nvidia(request: pytest.FixtureRequest, compilations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The kernels of an NVIDIA target, by name."""
    if nvidia_tool("nvdisasm") is None or nvidia_tool("cuobjdump") is None:
        pytest.skip("reading cubins needs nvdisasm and cuobjdump, which Triton brings along for NVIDIA GPUs")
    return compilations[request.param]


@pytest.fixture(params=AMD)
def amd(request: pytest.FixtureRequest, compilations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The kernels of an AMD target, by name."""
    return compilations[request.param]


def elements_per_thread(kernel: str, warp_size: int) -> int:
    """How many elements a thread holds at a time on the aligned path."""
    block: int = triton_kernels.update_constants(*UPDATES[kernel])["BLOCK"]
    return block // (triton_kernels.UPDATE_WARPS * warp_size)


def expected_wide_accesses(kernel: str, elements: int) -> tuple[int, int]:
    """16-byte loads (p, g, m, v, v_max) and stores (p, m, v, v_max) by which a thread moves this many elements.

    An operand of which a thread holds only 8 bytes has none: a 16-bit gradient of a float64 parameter, and, with the
    64 threads of AMD's wavefronts, every 16-bit operand.
    """
    param, grad = UPDATES[kernel]
    written = [param.itemsize, *[compute_dtype(param).itemsize] * 3]
    return tuple(sum(elements * size // 16 for size in sizes) for sizes in ([*written, grad.itemsize], written))


# --- NVIDIA -----------------------------------------------------------------------------------------------


def test_every_kernel_was_compiled(compilations: dict[str, dict[str, Any]]) -> None:
    """On every target there is prepare and one update for each dtype combination, and the counterexample."""
    for target, kernels in compilations.items():
        assert set(kernels) == {
            *KERNELS,
            "contracted-prepare",
            "contracted-update-float32-float32",
        }, target


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_spilled(nvidia: dict[str, Any], name: str) -> None:
    """No kernel keeps anything in local memory: no stack, no spill."""
    kernel = NvidiaKernel(nvidia[name])
    assert kernel.resources["STACK"] == 0
    assert kernel.resources["LOCAL"] == 0
    assert not [opcode for opcode in kernel.sass if is_local_access(opcode)]


@pytest.mark.parametrize("name", KERNELS)
def test_registers_stay_under_their_bound(nvidia: dict[str, Any], name: str) -> None:
    """A thread takes no more registers than MAX_REGISTERS grants."""
    bound = MAX_REGISTERS["prepare" if name == "prepare" else compute_dtype(UPDATES[name][0])]
    assert NvidiaKernel(nvidia[name]).resources["REG"] <= bound


@pytest.mark.parametrize("name", UPDATES)
def test_aligned_path_moves_16_bytes_at_a_time(nvidia: dict[str, Any], name: str) -> None:
    """Every operand is loaded and stored by 16-byte instructions, in PTX and still in SASS."""
    kernel = NvidiaKernel(nvidia[name])
    loads, stores = expected_wide_accesses(name, elements_per_thread(name, 32))
    assert loads >= 4 and stores >= 4
    assert ptx_wide_accesses(kernel.ptx, "ld") == loads
    assert ptx_wide_accesses(kernel.ptx, "st") == stores
    assert sass_wide_accesses(kernel.sass, "LDG") >= loads
    assert sass_wide_accesses(kernel.sass, "STG") >= stores


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_rounded_once_to_nearest(nvidia: dict[str, Any], name: str) -> None:
    """PTX holds only `.rn` arithmetic: no fma, nothing that ptxas may contract, no flushing, no approximation."""
    kernel = NvidiaKernel(nvidia[name])
    assert outside_ieee(kernel.ptx) == set()
    width = "f64" if name == "prepare" or UPDATES[name][0] == torch.float64 else "f32"
    counts = Counter(kernel.ptx)
    assert counts[f"div.rn.{width}"] > 0
    assert counts[f"sqrt.rn.{width}"] > 0


def test_contraction_would_be_noticed(nvidia: dict[str, Any]) -> None:
    """With fusion allowed, the same checks find an fma in update and contractible operations in prepare."""
    update = outside_ieee(NvidiaKernel(nvidia["contracted-update-float32-float32"]).ptx)
    assert any(opcode.startswith("fma.") for opcode in update)
    assert "mul.f64" in outside_ieee(NvidiaKernel(nvidia["contracted-prepare"]).ptx)


@pytest.mark.parametrize("name", [name for name, (param, _) in UPDATES.items() if param != torch.float64])
def test_update_has_no_float64(nvidia: dict[str, Any], name: str) -> None:
    """Float64 belongs to prepare: update has none, in PTX or SASS, unless the parameter itself is float64."""
    kernel = NvidiaKernel(nvidia[name])
    assert not [opcode for opcode in kernel.ptx if ".f64" in opcode]
    assert not [opcode for opcode in kernel.sass if is_float64_arithmetic(opcode)]
    assert [opcode for opcode in NvidiaKernel(nvidia["prepare"]).sass if is_float64_arithmetic(opcode)]


# --- AMD --------------------------------------------------------------------------------------------------


def amd_fused(opcodes: list[str], width: str) -> int:
    """How many fused multiply-adds of this width there are."""
    fused = re.compile(rf"v_(?:pk_)?(?:fma|fmac|mad|mac)_(?:legacy_)?{width}\w*")
    return sum(bool(fused.fullmatch(opcode)) for opcode in opcodes)


def amd_fused_within_division_and_root(opcodes: list[str], width: str) -> int:
    """How many of them the divisions and roots account for, each of which has one of the opcodes counted here."""
    divisions = sum(opcode.startswith(f"v_div_fixup_{width}") for opcode in opcodes)
    root = {"f32": "v_sqrt_f32", "f64": "v_rsq_f64"}[width]
    roots = sum(opcode.startswith(root) for opcode in opcodes)
    per_division, per_root = AMD_FUSED_WITHIN[width]
    return divisions * per_division + roots * per_root


@pytest.mark.parametrize("name", KERNELS)
def test_amd_nothing_is_spilled_and_registers_are_few(amd: dict[str, Any], name: str) -> None:
    """No scratch memory, no spilled register, and no more vector registers than MAX_VECTOR_REGISTERS."""
    text = amd[name]["amdgcn"]
    assert amd_metadata(text, "vgpr_spill_count") == 0
    assert amd_metadata(text, "sgpr_spill_count") == 0
    assert amd_metadata(text, "private_segment_fixed_size") == 0
    assert 0 < amd_metadata(text, "vgpr_count") <= MAX_VECTOR_REGISTERS


@pytest.mark.parametrize("name", UPDATES)
def test_amd_aligned_path_moves_16_bytes_at_a_time(amd: dict[str, Any], name: str) -> None:
    """Every operand of which a thread holds 16 bytes is loaded and stored 16 bytes at a time."""
    counts = Counter(amd_opcodes(amd[name]["amdgcn"]))
    loads, stores = expected_wide_accesses(name, elements_per_thread(name, 64))
    assert loads >= 3 and stores >= 3
    assert counts["global_load_dwordx4"] == loads
    assert counts["global_store_dwordx4"] == stores


@pytest.mark.parametrize("name", KERNELS)
def test_amd_fuses_only_within_division_and_root(amd: dict[str, Any], name: str) -> None:
    """Every fused multiply-add belongs to a correctly rounded division or root; subnormals are kept."""
    text = amd[name]["amdgcn"]
    opcodes = amd_opcodes(text)
    # prepare has one more: the conversion of the step count to an integer.
    conversions = 1 if name == "prepare" else 0
    assert amd_fused(opcodes, "f32") == amd_fused_within_division_and_root(opcodes, "f32") + conversions
    assert amd_fused(opcodes, "f64") == amd_fused_within_division_and_root(opcodes, "f64")
    assert amd_fused(opcodes, "f16") == 0
    keep_subnormals, to_nearest = 3, 0
    for width in ("32", "16_64"):
        assert amd_metadata(text, f"amdhsa_float_denorm_mode_{width}") == keep_subnormals
        assert amd_metadata(text, f"amdhsa_float_round_mode_{width}") == to_nearest
    assert not [opcode for opcode in opcodes if opcode.startswith("s_setreg")]


def test_amd_contraction_would_be_noticed(amd: dict[str, Any]) -> None:
    """With fusion allowed, there are more fused multiply-adds than divisions and roots account for."""
    opcodes = amd_opcodes(amd["contracted-update-float32-float32"]["amdgcn"])
    assert amd_fused(opcodes, "f32") > amd_fused_within_division_and_root(opcodes, "f32")
