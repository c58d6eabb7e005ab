"""The Triton kernels as compiled for GPUs that need not be here: what the assembly says.

Every kernel that the launcher launches (measure, sum_up, decide, prepare, and update for all dtype combinations and
formats of the moments, under either rule) is compiled for sm_80, sm_90, sm_100, sm_120 and gfx942 by
`compile_triton.py`, now or when the record was written that `python tests/triton_record.py` writes anew.

Division and root are single instructions in PTX, `div.rn` and `sqrt.rn`; the assembler expands them to sequences with
FFMA inside that round correctly, so "no contraction" is asserted of PTX, where every product and sum must carry `.rn`:
without it, ptxas may contract them.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from machine_code import (
    is_float64_arithmetic,
    is_local_access,
    nvidia_tool,
    outside_ieee,
    ptx_vector_accesses,
    sass_accesses,
    sass_wide_products,
)

from adamw_kernels.formats import MOMENT_FORMATS, PARAM_DTYPES, compute_dtype, grad_dtypes

pytest.importorskip("triton", reason="compiling Triton kernels needs triton")

import triton_record  # noqa: E402
from triton_record import AMD, NVIDIA, TARGETS, Kernels, Record  # noqa: E402

from adamw_kernels import triton_kernels  # noqa: E402

# Of a parameter, its gradient, its moments' format, and the rule.
UPDATES = {
    "-".join([rule, *(str(dtype).removeprefix("torch.") for dtype in (param, grad)), moments]): (
        param,
        grad,
        moments,
        rule,
    )
    for rule in ("adamw", "sgdw")
    for param in PARAM_DTYPES
    for grad in grad_dtypes(param)
    for moments in (MOMENT_FORMATS if compute_dtype(param) == torch.float32 else MOMENT_FORMATS[:1])
    if (rule, moments) != ("sgdw", "8bit")
}
# The kernels that work in float64 whatever the tensors' dtype, and the arithmetic that each consists of.
SINGLE_KERNELS = {
    "measure": {"mul", "add"},
    "sum_up": {"add"},
    "decide": {"mul", "add", "div", "sqrt"},
    "prepare": {"mul", "add", "sub", "div", "sqrt"},
}
# And that of an update. SGD's sum of decay and update is subtracted, as AdamW's is.
RULES = {"adamw": {"mul", "add", "sub", "div", "sqrt"}, "sgdw": {"mul", "add", "sub"}}
KERNELS = [*SINGLE_KERNELS, *UPDATES]
# Beside float64 nothing is rounded stochastically.
UPDATES_OF_FLOAT32 = [name for name, (param, *_) in UPDATES.items() if compute_dtype(param) == torch.float32]

# Registers a thread, at most. Where a block is 128 threads, 48 registers let 10 blocks share a multiprocessor, 64 let
# 8. With 96 they are 5, which have 80 KiB of loads under way at once (8 elements a thread of p, g, m and v, in
# float32): twice what an H100's memory needs to be busy. With 128 there are 16 warps, and 28 KiB of loads under way
# with weights in split24 and moments in 8 bits, whose arithmetic takes longer than their memory traffic. prepare has a
# thread for a tensor, and 88 let 5 of its blocks run. Measured with Triton 3.9: on sm_80, sm_90, sm_100, sm_120
MAX_REGISTERS = {
    "measure": 48,  # 48, 48, 46, 40
    "sum_up": 48,  # 48 everywhere
    "decide": 48,  # 36, 38, 36, 38
    "prepare": 88,  # 80, 82, 82, 83
    # Of each: beside float32 weights; 16-bit ones; float64 ones.
    "adamw-float32": 96,  # 87, 80, 64, 72; 93, 85, 67, 70; 89, 89, 80, 77
    "adamw-bfloat16": 128,  # 72, 72, 62, 78; 120, 126, 97, 100
    "adamw-8bit": 128,  # 80, 80, 67, 77; 128, 127, 104, 106
    "sgdw-float32": 80,  # 56, 50, 44, 42; 76, 77, 52, 56; 56, 66, 48, 48
    "sgdw-bfloat16": 112,  # 58, 59, 53, 54; 96, 111, 105, 80
}
# On gfx942, where 64 vector registers let 8 wavefronts share a SIMD unit, 72 let 7 and 104 let 4. measure and decide
# 24, sum_up 36, prepare 70.
MAX_VECTOR_REGISTERS = {
    "measure": 64,
    "sum_up": 64,
    "decide": 64,
    "prepare": 72,
    "adamw-float32": 64,  # 44 to 51
    "adamw-bfloat16": 72,  # 43 to 62 (68 with Triton 3.6)
    "adamw-8bit": 104,  # 63 to 87 (97 with Triton 3.6)
    "sgdw-float32": 64,  # 30 to 47
    "sgdw-bfloat16": 64,  # 28 to 55
}
# What there is no scalar register for waits in lanes of a vector register, not in memory: of update 0 to 18 values.
MAX_SCALARS_IN_LANES = 24

# Fused multiply-adds within gfx942's correctly rounded expansions of division and root, by compute type and by the
# opcode that each such expansion has once. Triton 3.6 takes float32's root from the reciprocal one.
AMD_FUSED_WITHIN = {
    "f32": {"v_div_fixup_f32": 5, "v_sqrt_f32": 2, "v_rsq_f32": 5},
    "f64": {"v_div_fixup_f64": 5, "v_rsq_f64": 7},
}


@pytest.fixture(scope="session")
def record() -> Record:
    """What the kernels were compiled to when the record was written."""
    return Record.read()


@pytest.fixture(scope="session")
def compiled_now(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By target, what `compile_triton.py` writes: of all kernels, or of what has changed and of those in their turn."""
    known = triton_record.known_here(record)
    compiled = triton_record.compile_kernels(tmp_path_factory.mktemp("triton"), known)
    recorded = {key for kernels in record.by_key().values() for key in kernels}
    new = sum(kernel.get("key") not in recorded for kernels in compiled.values() for kernel in kernels.values())
    if new:
        warnings.warn(f"{new} kernels are not on record: tests/triton_record.py writes it anew", stacklevel=1)
    return compiled


@pytest.fixture(scope="session")
def compilations(record: Record, compiled_now: Kernels) -> Kernels:
    """By target, every kernel: as just compiled or, where its key is the same, as recorded."""
    return record.filled_in(compiled_now)


class NvidiaKernel:
    """One compiled kernel's opcodes, in the order of the alphabet, and its resources."""

    def __init__(self, collected: dict[str, Any]) -> None:
        """Take what `compile_triton.collect` found."""
        self.ptx = [*Counter(collected["ptx"]).elements()]
        self.sass = [*Counter(collected["sass"]).elements()]
        self.resources: dict[str, int] = collected["resources"]


@pytest.fixture(params=NVIDIA)
def nvidia(request: pytest.FixtureRequest, compilations: Kernels) -> dict[str, Any]:
    """The kernels of an NVIDIA target, by name."""
    if nvidia_tool("nvdisasm") is None or nvidia_tool("cuobjdump") is None:
        pytest.skip("reading cubins needs nvdisasm and cuobjdump, which Triton brings along for NVIDIA GPUs")
    return compilations[request.param]


@pytest.fixture(params=AMD)
def amd(request: pytest.FixtureRequest, compilations: Kernels) -> dict[str, Any]:
    """The kernels of an AMD target, by name."""
    return compilations[request.param]


def elements_per_thread(kernel: str, warp_size: int) -> int:
    """How many elements a thread holds at a time on the aligned path."""
    options = triton_kernels.update_options(*UPDATES[kernel])
    return int(options["BLOCK"]) // (options["num_warps"] * warp_size)


def bound_of(kernel: str, bounds: dict[str, int]) -> int:
    """The entry for a kernel; of an update, that for its rule and its moments' format."""
    if kernel not in UPDATES:
        return bounds[kernel]
    *_, moments, rule = UPDATES[kernel]
    return bounds[f"{rule}-{moments}"]


def expected_accesses(kernel: str, warp_size: int, widest_load: int = 16) -> dict[int, tuple[int, int]]:
    """By bytes moved at a time: loads and stores by which a thread moves all its elements.

    Operands are p, its remainder in code of its own for either format, g (loaded only), m, v, v_max beside moments of
    the compute dtype (of SGD m alone), and the average in code of its own for either format. What moves at once is the
    same number of elements of each, so that every operand of an element lies in the same thread; more than 16 bytes in
    parts.
    """
    param, grad, moments, rule = UPDATES[kernel]
    compute = compute_dtype(param)
    elements = elements_per_thread(kernel, warp_size)
    at_once = min(elements, triton_kernels.update_options(*UPDATES[kernel])["VECTOR"])
    of_format = {"float32": [compute] * 3, "bfloat16": [torch.bfloat16] * 2, "8bit": [torch.int8, torch.uint8]}
    of_moments = of_format[moments][: 1 if rule == "sgdw" else None]
    remainders = [torch.int8, torch.int16] if param.itemsize == 2 else []
    averages = [compute] if compute == torch.float64 else [compute, torch.bfloat16]
    accesses: dict[int, tuple[int, int]] = {}

    def count(num_bytes: int, widest: int, is_load: bool) -> None:
        width = min(num_bytes, widest)
        loads, stores = accesses.get(width, (0, 0))
        parts = num_bytes // width * (elements // at_once)
        accesses[width] = (loads + parts, stores) if is_load else (loads, stores + parts)

    for dtype in (param, *remainders, *of_moments, *averages):
        count(at_once * dtype.itemsize, widest_load, True)
        count(at_once * dtype.itemsize, 16, False)
    count(at_once * grad.itemsize, widest_load, True)
    return accesses


# --- the record -------------------------------------------------------------------------------------------


def test_kernels_come_out_as_recorded(record: Record, compiled_now: Kernels) -> None:
    """Some on record are compiled for every target all the same, and any difference is one too many."""
    assert record.disagreements(compiled_now) == []
    for target in TARGETS:
        assert any(triton_record.was_compiled(kernel) for kernel in compiled_now[target].values()), target


def test_every_kernel_on_record_has_its_turn(record: Record) -> None:
    """In as many days as there are kernels at most; every day, some for every target."""
    of_target = [set(kernels) for kernels in record.by_key().values()]
    turns = [record.in_turn(day) for day in range(800_000, 800_000 + len(of_target[0]))]
    assert set().union(*turns) == set().union(*of_target)
    assert all(len(turn & keys) == triton_record.SAMPLE for turn in turns for keys in of_target)


def recorded(key: str, **counts: int) -> dict[str, Any]:
    """A kernel of a record."""
    return {"key": key, "sass": counts, "order": "1"}


def test_a_wrong_record_would_be_noticed() -> None:
    """Whatever differs under the same key is named; another key is another kernel."""
    record = Record({}, {"sm_90": {name: recorded(name, FADD=2) for name in ("first", "second", "third")}})
    now = {
        "sm_90": {"first": recorded("first", FADD=3), "second": recorded("second", FADD=2), "third": {"key": "third"}}
    }
    assert record.disagreements(now) == ["first for sm_90"]
    now["sm_90"]["first"] = {**recorded("first", FADD=2), "order": "2"}
    assert record.disagreements(now) == ["first for sm_90"]
    now["sm_90"]["first"] = recorded("another", FADD=3)
    assert record.disagreements(now) == []


def test_only_what_has_the_same_key_is_taken_from_the_record() -> None:
    """What was compiled counts as compiled; what was not must be on record, for the same target and under its key."""
    record = Record({}, {target: {"update": recorded(f"{target} then", FADD=2)} for target in ("sm_80", "sm_90")})
    now = {"sm_80": {"update": recorded("sm_80 now", FADD=3)}, "sm_90": {"update": {"key": "sm_90 then"}}}
    assert record.filled_in(now) == {"sm_80": now["sm_80"], "sm_90": record.kernels["sm_90"]}
    for key in ("sm_90 now", "sm_80 then"):
        with pytest.raises(KeyError, match=key):
            record.filled_in({"sm_90": {"update": {"key": key}}})


def test_record_of_another_compiler_says_nothing(record: Record) -> None:
    """Nothing is known where it was made with another Triton, nvdisasm or reader, all but a few kernels otherwise."""
    here = dataclasses.replace(record, made_with=triton_record.made_with_here())
    keys = {kernel["key"] for kernels in here.kernels.values() for kernel in kernels.values()}
    assert triton_record.known_here(here, day=3) == keys - here.in_turn(3) != keys
    for what in here.made_with:
        another = dataclasses.replace(here, made_with={**here.made_with, what: "another"})
        assert triton_record.known_here(another) is None, what


def test_keys_follow_the_code(record: Record) -> None:
    """Every function and constant that a kernel uses is part of its key; what people read alone is not."""
    if record.made_with["triton"] != triton_record.made_with_here()["triton"]:
        pytest.skip("keys are made for the Triton that the record is of")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(triton_record.TESTS / "triton_key_changes.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    changed = json.loads(result.stdout)
    assert changed.pop("nothing") == changed.pop("prose") == []
    assert len(changed) > 50
    assert [what for what, kernels in changed.items() if not kernels] == []
    assert changed["adamw_kernels.triton_norm.sum_up_kernel"] == ["sum_up"]


# --- NVIDIA -----------------------------------------------------------------------------------------------


def test_every_kernel_was_compiled(compilations: Kernels) -> None:
    """On every target there is one update for each combination, one of the others, and the counterexamples."""
    updates = [f"{rule}-float32-float32-float32" for rule in RULES]
    contracted = {f"contracted-{name}" for name in [*SINGLE_KERNELS, *updates]}
    for target, kernels in compilations.items():
        assert set(kernels) == {*KERNELS, *contracted}, target


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
    assert NvidiaKernel(nvidia[name]).resources["REG"] <= bound_of(name, MAX_REGISTERS)


@pytest.mark.parametrize("name", UPDATES)
def test_aligned_path_moves_whole_vectors(nvidia: dict[str, Any], name: str) -> None:
    """On full blocks every operand moves the same elements at a time, in PTX and still in SASS.

    That is 16 bytes of the widest operand in memory: of float32 moments, or else of the weight, beside which codes
    of 8 bits move 8 bytes at a time (4 beside float32 weights).
    """
    kernel = NvidiaKernel(nvidia[name])
    widest_load = 32 if any(opcode.startswith("ld.global.v8.") for opcode in kernel.ptx) else 16  # sm_100
    accesses = expected_accesses(name, 32, widest_load)
    assert accesses[16][1] >= 2
    for num_bytes, (loads, stores) in accesses.items():
        if num_bytes < 8:
            continue  # a scalar access like others
        assert ptx_vector_accesses(kernel.ptx, "ld", num_bytes) == loads
        assert ptx_vector_accesses(kernel.ptx, "st", num_bytes) == stores
        assert sass_accesses(kernel.sass, "LDG", num_bytes) >= loads
        assert sass_accesses(kernel.sass, "STG", num_bytes) >= stores


@pytest.mark.parametrize("name", UPDATES)
def test_update_uses_no_shared_memory(nvidia: dict[str, Any], name: str) -> None:
    """No shared memory, no barrier, as sum_up has them; threads exchange values only where moments are packed.

    There a group of 8-bit moments is two threads, and a float32 average moves half the elements at a time.
    """

    def exchanges(kernel: NvidiaKernel) -> list[str]:
        opcodes = [opcode for opcode in kernel.ptx if ".shared" in opcode or opcode.startswith("bar")]
        return opcodes + [opcode for opcode in kernel.sass if opcode.split(".")[0] in ("LDS", "STS", "BAR")]

    kernel = NvidiaKernel(nvidia[name])
    assert exchanges(kernel) == []
    assert exchanges(NvidiaKernel(nvidia["sum_up"])) != []
    if UPDATES[name][2] == "float32":
        assert not [opcode for opcode in kernel.sass if opcode.startswith("SHFL")]


def test_measure_reads_full_rows_16_bytes_at_a_time(nvidia: dict[str, Any]) -> None:
    """Of a row, a thread takes 8 elements: 16 bytes of 16-bit gradients, 2 times that of float32, 4 of float64."""
    kernel = NvidiaKernel(nvidia["measure"])
    counts = Counter(kernel.ptx)
    narrow, wide = counts["ld.global.v4.b32"], counts["ld.global.v2.b64"]
    assert narrow == wide == 8  # bfloat16 1, float16 1, float32 2; float64 4; and the loop is unrolled twice
    assert sass_accesses(kernel.sass, "LDG") >= narrow + wide


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_rounded_once_to_nearest(nvidia: dict[str, Any], name: str) -> None:
    """PTX holds only `.rn` arithmetic: no fma, nothing that ptxas may contract, no flushing, no approximation."""
    kernel = NvidiaKernel(nvidia[name])
    assert outside_ieee(kernel.ptx) == set()
    width = "f64" if name in SINGLE_KERNELS or UPDATES[name][0] == torch.float64 else "f32"
    operations = {opcode.split(".")[0] for opcode in kernel.ptx if opcode.endswith(f".rn.{width}")}
    expected = SINGLE_KERNELS[name] if name in SINGLE_KERNELS else RULES[UPDATES[name][3]]
    assert operations == expected


def test_contraction_would_be_noticed(nvidia: dict[str, Any]) -> None:
    """With fusion allowed, the same checks find an fma in update and measure and contractible operations in prepare."""
    for name in (*(f"{rule}-float32-float32-float32" for rule in RULES), "measure"):
        opcodes = outside_ieee(NvidiaKernel(nvidia[f"contracted-{name}"]).ptx)
        assert any(opcode.startswith("fma.") for opcode in opcodes), name
    assert "mul.f64" in outside_ieee(NvidiaKernel(nvidia["contracted-prepare"]).ptx)


@pytest.mark.parametrize("name", UPDATES_OF_FLOAT32)
def test_update_has_no_float64(nvidia: dict[str, Any], name: str) -> None:
    """Float64 belongs to the other kernels: update has none, in PTX or SASS, unless the parameter itself is float64."""
    kernel = NvidiaKernel(nvidia[name])
    assert not [opcode for opcode in kernel.ptx if ".f64" in opcode]
    assert not [opcode for opcode in kernel.sass if is_float64_arithmetic(opcode)]
    for other in SINGLE_KERNELS:
        assert [opcode for opcode in NvidiaKernel(nvidia[other]).sass if is_float64_arithmetic(opcode)], other


@pytest.mark.parametrize("name", UPDATES_OF_FLOAT32)
def test_random_words_take_one_product_a_round(nvidia: dict[str, Any], name: str) -> None:
    """A Philox round's 32 x 32 -> 64 bit product is one instruction, not the three of a product of 64-bit integers."""
    elements = elements_per_thread(name, 32)
    rounds = 7 * (elements + elements // triton_kernels.MASKED_SHARE)
    products, parts = sass_wide_products(NvidiaKernel(nvidia[name]).sass)
    # The address of a chunk's row, and such, are a few more (1; 6 with Triton 3.6); divisions by the codes an octave, 4
    # a group, and what else codes are made of, 23 (29 on sm_120). That is also full of products of 32 bits. Others have
    # 1 to 7; products of 64 bits would be two a round.
    packed = UPDATES[name][2] == "8bit"
    assert rounds <= products <= rounds + (32 if packed else 8)
    assert packed or parts <= 8


# --- AMD --------------------------------------------------------------------------------------------------


class AmdKernel:
    """One compiled kernel's opcodes, in the order of the alphabet, and the numbers that stand beside them."""

    def __init__(self, collected: dict[str, Any]) -> None:
        """Take what `compile_triton.collect` found."""
        self.opcodes = [*Counter(collected["amd"]).elements()]
        self.numbers: dict[str, int] = collected["numbers"]


def amd_fused(opcodes: list[str], width: str) -> int:
    """How many fused multiply-adds of this width there are."""
    fused = re.compile(rf"v_(pk_)?(?:fma|fmac|mad|mac)_(?:legacy_)?{width}\w*")
    matches = (fused.fullmatch(opcode) for opcode in opcodes)
    return sum(2 if match[1] else 1 for match in matches if match)


def amd_fused_within_division_and_root(opcodes: list[str], width: str) -> int:
    """How many of them the divisions and roots account for."""
    return sum(
        fused for sign, fused in AMD_FUSED_WITHIN[width].items() for opcode in opcodes if opcode.startswith(sign)
    )


@pytest.mark.parametrize("name", KERNELS)
def test_amd_nothing_is_spilled_and_registers_are_few(amd: dict[str, Any], name: str) -> None:
    """No scratch memory, no spilled vector register, and no more of them than MAX_VECTOR_REGISTERS grants."""
    numbers = AmdKernel(amd[name]).numbers
    assert numbers["vgpr_spill_count"] == 0
    assert numbers["sgpr_spill_count"] <= (MAX_SCALARS_IN_LANES if name in UPDATES else 0)
    assert numbers["private_segment_fixed_size"] == 0
    assert 0 < numbers["vgpr_count"] <= bound_of(name, MAX_VECTOR_REGISTERS)


@pytest.mark.parametrize("name", UPDATES)
def test_amd_aligned_path_moves_whole_vectors(amd: dict[str, Any], name: str) -> None:
    """On full blocks every operand moves the same elements at a time.

    These are 4, but 2 of float64, and 2 of float32 weights whose moments are packed.
    """
    counts = Counter(AmdKernel(amd[name]).opcodes)
    accesses = expected_accesses(name, 64)
    for num_bytes, opcode in ((16, "dwordx4"), (8, "dwordx2")):
        if num_bytes == 8 and UPDATES[name][0] == torch.float64:
            continue  # a scalar access like others
        loads, stores = accesses.get(num_bytes, (0, 0))
        assert counts[f"global_load_{opcode}"] == loads
        assert counts[f"global_store_{opcode}"] == stores
    assert sum(accesses.get(16, (0, 0))) + sum(accesses.get(8, (0, 0))) >= 4


def test_amd_measure_reads_full_rows_at_once(amd: dict[str, Any]) -> None:
    """Of a row, a thread takes 4 elements: 8 bytes of 16-bit gradients, 16 of float32, twice 16 of float64."""
    counts = Counter(re.sub("^global", "buffer", opcode) for opcode in AmdKernel(amd["measure"]).opcodes)
    assert counts["buffer_load_dwordx4"] == 6  # float32 1, float64 2; and the loop is unrolled twice
    assert counts["buffer_load_dwordx2"] >= 4  # bfloat16 1, float16 1


@pytest.mark.parametrize("name", KERNELS)
def test_amd_fuses_only_within_division_and_root(amd: dict[str, Any], name: str) -> None:
    """Every fused multiply-add belongs to a correctly rounded division or root; subnormals are kept."""
    kernel = AmdKernel(amd[name])
    opcodes = kernel.opcodes
    # prepare has one more: the conversion of the step count to an integer.
    conversions = 1 if name == "prepare" else 0
    assert amd_fused(opcodes, "f32") == amd_fused_within_division_and_root(opcodes, "f32") + conversions
    assert amd_fused(opcodes, "f64") == amd_fused_within_division_and_root(opcodes, "f64")
    assert amd_fused(opcodes, "f16") == 0
    keep_subnormals, to_nearest = 3, 0
    for width in ("32", "16_64"):
        assert kernel.numbers[f"amdhsa_float_denorm_mode_{width}"] == keep_subnormals
        assert kernel.numbers[f"amdhsa_float_round_mode_{width}"] == to_nearest
    assert not [opcode for opcode in opcodes if opcode.startswith("s_setreg")]


def test_amd_contraction_would_be_noticed(amd: dict[str, Any]) -> None:
    """With fusion allowed, there are more fused multiply-adds than divisions and roots account for."""
    for rule in RULES:
        opcodes = AmdKernel(amd[f"contracted-{rule}-float32-float32-float32"]).opcodes
        assert amd_fused(opcodes, "f32") > amd_fused_within_division_and_root(opcodes, "f32")
