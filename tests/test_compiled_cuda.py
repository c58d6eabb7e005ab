"""The CUDA kernels as nvcc compiles them for GPUs that need not be here: what PTX and SASS say.

The build keeps nvcc's intermediate files. They are read where the extension module has been built in this checkout;
what is not up to date there is compiled again first. Elsewhere, CMake is asked for its own command, which is run. As
for Triton, "no contraction" is asserted of PTX, where every product and sum must carry `.rn`; the expansions of
`div.rn` and `sqrt.rn` by the assembler use FFMA and round correctly.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine_code import (
    disassemble,
    is_float64_arithmetic,
    is_local_access,
    nvidia_tool,
    outside_ieee,
    ptx_kernels,
    ptx_vector_accesses,
    resources,
    sass_accesses,
    sass_kernels,
    sass_wide_products,
)

ROOT = Path(__file__).parents[1]

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]

BYTES = {"float": 4, "bf16": 2, "fp16": 2, "double": 8, "8bit": 1}
# Dtypes of parameter, gradient and moments, and the rule.
UPDATES = {
    **{
        f"{kernel}<{param}, {grad}, {moment}>": (param, grad, moment, rule)
        for kernel, rule in (("update_kernel", "adamw"), ("sgdw_kernel", "sgdw"))
        for param in ("float", "bf16", "fp16", "double")
        for grad in ("float", "bf16", "fp16", "double")
        for moment in ("float", "bf16", "double")
        if (moment == "double" if param == "double" else "double" not in (grad, moment))
    },
    **{
        f"update8_kernel<{param}, {grad}>": (param, grad, "8bit", "adamw")
        for param in ("float", "bf16", "fp16")
        for grad in ("float", "bf16", "fp16")
    },
}
# The kernels that work in float64 whatever the tensors' dtype, and the arithmetic that each consists of.
SINGLE_KERNELS = {
    "measure_kernel": {"mul", "add"},
    "sum_up_kernel": {"add"},
    "decide_kernel": {"mul", "add", "rcp", "sqrt"},
    "prepare_kernel": {"mul", "add", "sub", "div", "rcp", "sqrt"},
}
# And that of an update. SGD's sum of decay and update is subtracted, as AdamW's is.
RULES = {"adamw": {"mul", "add", "sub", "div", "sqrt"}, "sgdw": {"mul", "add", "sub"}}
KERNELS = [*SINGLE_KERNELS, *UPDATES]
# Beside float64, whose average is never bfloat16, there is nothing to round stochastically.
UPDATES_OF_FLOAT32 = [name for name, (param, *_) in UPDATES.items() if param != "double"]

# Registers a thread, at most; a block is 256 threads. Measured with CUDA 13.0: sm_80 and sm_90; sm_100 and sm_120. Of
# updates AdamW's, then SGD's.
MAX_REGISTERS = {
    "measure_kernel": 40,  # 6 blocks a multiprocessor: 32; 30 to 36
    "sum_up_kernel": 40,  # 32; 32 to 36
    "decide_kernel": 40,  # one thread: 32 to 36; 30 to 32
    "prepare_kernel": 64,  # 54; 56
    "float": 48,  # float32 weights and gradients, 5 blocks, the kernel's own launch bound: 45; 45 to 48. 44 to 46
    "16-bit": 64,  # any 16-bit operand, 4 blocks, likewise: 60 to 64; 58 to 64. 57 to 64; 51 to 64
    "mixed": 80,  # eight elements of float32 weights and moments at once, 3 blocks: 75; 77 to 78. 80; 72 to 80
    "8bit": 128,  # moments in 8 bits, 2 blocks, likewise: 96 to 117; 123 to 128
    "double": 80,  # 3 blocks: 68 to 70; 50 to 60. 40 to 48
}


def register_bound(kernel: str) -> int:
    """The entry of MAX_REGISTERS for a kernel."""
    if kernel not in UPDATES:
        return MAX_REGISTERS[kernel]
    param, grad, moment, _ = UPDATES[kernel]
    if param == "double" or moment == "8bit":
        return MAX_REGISTERS[moment]
    if param == grad == "float":
        return MAX_REGISTERS["float"]
    return MAX_REGISTERS["mixed" if param == moment == "float" else "16-bit"]


@dataclass
class Kernel:
    """One kernel on one architecture."""

    ptx: list[str]
    sass: list[str]
    resources: dict[str, int]


def required(tool: str) -> str:
    """Path of a tool, or skip."""
    found = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"compiling the CUDA kernels needs {tool}, which is not on PATH")
    return found


def demangle(names: list[str]) -> list[str]:
    """'update8_kernel<float, bf16>' and 'prepare_kernel' from the linker's names."""
    result = subprocess.run([required("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", line) for line in result.stdout.splitlines()]
    return [re.sub(r"^void |\(.*", "", line) for line in plain]


# Where setup.py builds.
BUILT = ROOT / "build" / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def compile_command(tree: Path) -> list[str] | None:
    """The command by which CMake, in its build folder, compiles csrc/cuda.cu.

    None if that is not built there, or for fewer architectures.
    """
    listed = tree / "compile_commands.json"
    for entry in json.loads(listed.read_text()) if listed.exists() else []:
        if entry["file"].endswith("csrc/cuda.cu"):
            built = set(re.findall(r"arch=compute_(\d+),code=\[[^]]*\bsm_\1\b", entry["command"]))
            return shlex.split(entry["command"]) if {f"sm_{number}" for number in built} >= set(ARCHITECTURES) else None
    return None


def kept_files(tree: Path) -> dict[str, tuple[Path, Path]] | None:
    """PTX and cubin by architecture, as a build folder has kept them; None unless all are there."""
    found = {}
    for architecture in ARCHITECTURES:
        number = architecture.removeprefix("sm_")
        ptx, cubins = (list((tree / "kept").glob(f"*compute_{number}{end}")) for end in (".ptx", "*.cubin"))
        if len(ptx) != 1 or len(cubins) != 1:
            return None
        found[architecture] = ptx[0], cubins[0]
    return found


def of_the_build() -> dict[str, tuple[Path, Path]] | None:
    """What the build has kept, brought up to date; None if there has been none here, or one of something less."""
    compile_it = compile_command(BUILT)
    if compile_it is None or not (BUILT / "build.ninja").exists():
        return None
    # Nothing happens if Ninja finds the object newer than all that it was made of, and made by this very command.
    output = compile_it[compile_it.index("-o") + 1]
    command = [required("cmake"), "--build", str(BUILT), "--target", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return kept_files(BUILT)


def of_a_new_build(tree: Path) -> dict[str, tuple[Path, Path]]:
    """The same from compiling in an empty folder: two minutes of one processor."""
    configure = [required("cmake"), "-S", str(ROOT), "-B", str(tree), "-DADAMW_KERNELS_CUDA=ON"]
    result = subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    command = compile_command(tree)
    assert command is not None
    command[command.index("-o") + 1] = str(tree / "cuda.o")
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = kept_files(tree)
    assert files is not None
    return files


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Kernel]]:
    """Every kernel, by architecture and name."""
    required("nvcc")
    if nvidia_tool("nvdisasm") is None or nvidia_tool("cuobjdump") is None:
        pytest.skip("reading cubins needs nvdisasm and cuobjdump, of the CUDA toolkit or of Triton")
    files = of_the_build() or of_a_new_build(tmp_path_factory.mktemp("cuda"))
    kernels: dict[str, dict[str, Kernel]] = {}
    for architecture, (ptx_file, cubin) in files.items():
        ptx, sass, usage = ptx_kernels(ptx_file.read_text()), sass_kernels(disassemble(cubin)), resources(cubin)
        kernels[architecture] = {
            plain: Kernel(ptx[name], sass[name], usage[name])
            for name, plain in zip(ptx, demangle(list(ptx)), strict=True)
        }
    return kernels


@pytest.fixture(params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, compiled: dict[str, dict[str, Kernel]]) -> dict[str, Kernel]:
    """The kernels of one architecture, by name."""
    return compiled[request.param]


def elements_per_thread(kernel: str) -> int:
    """How many elements a thread holds at a time.

    16 bytes of the narrower of weight and gradient, or of float64 weights; half a group of 8-bit moments.
    """
    param, grad, moment, _ = UPDATES[kernel]
    return 2 if param == "double" else 8 if moment == "8bit" else 16 // min(BYTES[param], BYTES[grad])


def test_every_kernel_was_compiled(compiled: dict[str, dict[str, Kernel]]) -> None:
    """On every architecture: one update for each combination of dtypes and moments, one of the others, nothing else."""
    for architecture, kernels in compiled.items():
        assert set(kernels) == set(KERNELS), architecture


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_spilled(kernels: dict[str, Kernel], name: str) -> None:
    """No kernel keeps anything in local memory: no stack, no spill."""
    kernel = kernels[name]
    assert kernel.resources["STACK"] == 0
    assert kernel.resources["LOCAL"] == 0
    assert kernel.sass and not [opcode for opcode in kernel.sass if is_local_access(opcode)]


@pytest.mark.parametrize("name", KERNELS)
def test_registers_stay_under_their_bound(kernels: dict[str, Kernel], name: str) -> None:
    """A thread takes no more registers than MAX_REGISTERS grants."""
    assert 0 < kernels[name].resources["REG"] <= register_bound(name)


def vector_accesses(name: str) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores that the vector path of an update consists of, by their bytes."""
    param, grad, moment, rule = UPDATES[name]
    elements = elements_per_thread(name)
    compute = max(BYTES[param], 4)
    sixteen_bits = BYTES[param] == 2
    # m, v and, where moments are wide, v_max; of SGD m alone.
    moments = [BYTES[moment]] * (1 if rule == "sgdw" else 3 if moment in ("float", "double") else 2)
    averages = [compute] if param == "double" else [compute, BYTES["bf16"]]
    remainders = [1, 2] if sixteen_bits else []
    # For the average, remainders are read again; so is the weight, where codes of moments are stored in between.
    again = [*remainders, *([BYTES[param]] if sixteen_bits and moment == "8bit" else [])]
    loads = [BYTES[param], BYTES[grad], *moments, *averages, *remainders, *again]
    stores = [BYTES[param], *remainders, *moments, *averages]
    return accesses(elements, loads), accesses(elements, stores)


def accesses(elements: int, operands: list[int]) -> Counter[int]:
    """Accesses by their bytes, of `elements` of each operand: 16 bytes at a time, or all of it where that is less."""
    result: Counter[int] = Counter()
    for num_bytes in (elements * size for size in operands):
        result[min(num_bytes, 16)] += max(num_bytes // 16, 1)
    return result


@pytest.mark.parametrize("name", UPDATES)
def test_aligned_path_moves_16_bytes_at_a_time(kernels: dict[str, Kernel], name: str) -> None:
    """Every operand is loaded and stored by 16-byte instructions, in PTX and still in SASS.

    What has fewer bytes in as many elements moves at once: codes of moments, int8 remainders, a narrower gradient
    beside float64, and bfloat16 beside float32 throughout. Every format has code of its own.
    """
    kernel = kernels[name]
    loads, stores = vector_accesses(name)
    for num_bytes in (8, 16):
        # Codebooks, to decode and to encode, of whole vectors and of elements one by one: nvcc reads all four words at
        # once, or the two that are used, by the architecture.
        codebooks = 4 if UPDATES[name][2] == "8bit" else 0
        assert ptx_vector_accesses(kernel.ptx, "ld", num_bytes) - loads[num_bytes] in (0, codebooks)
        assert ptx_vector_accesses(kernel.ptx, "st", num_bytes) == stores[num_bytes]
        assert sass_accesses(kernel.sass, "LDG", num_bytes) >= loads[num_bytes]
        assert sass_accesses(kernel.sass, "STG", num_bytes) >= stores[num_bytes]


def test_measure_reads_full_rows_at_once(kernels: dict[str, Kernel]) -> None:
    """Of a row, a thread takes 4 elements: 16 bytes of float32, 8 of 16-bit gradients, twice 16 of float64."""
    kernel = kernels["measure_kernel"]
    rows_at_once = 4
    assert ptx_vector_accesses(kernel.ptx, "ld", 16) == rows_at_once * 3
    assert ptx_vector_accesses(kernel.ptx, "ld", 8) == rows_at_once * 2
    assert sass_accesses(kernel.sass, "LDG", 16) >= rows_at_once * 3
    assert sass_accesses(kernel.sass, "LDG", 8) >= rows_at_once * 2


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "prepare_kernel"])
def test_kernels_know_what_memory_they_access(kernels: dict[str, Kernel], name: str) -> None:
    """No generic access: each would first have to find out which memory it means. No shared one in update.

    Not so prepare, one thread a tensor: hyperparameters in tensors are read by code that it shares with the CPU.
    """
    kernel = kernels[name]
    known = "global|param" if name in UPDATES else "global|param|shared"
    assert not [opcode for opcode in kernel.ptx if re.match(rf"(?:ld|st)\.(?!{known})", opcode)]
    assert not [opcode for opcode in kernel.sass if opcode.split(".")[0] in ("LD", "ST")]


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_rounded_once_to_nearest(kernels: dict[str, Kernel], name: str) -> None:
    """PTX holds only `.rn` arithmetic: no fma, nothing that ptxas may contract, no flushing, no approximation."""
    kernel = kernels[name]
    assert outside_ieee(kernel.ptx) == set()
    width = "f64" if name in SINGLE_KERNELS or UPDATES[name][0] == "double" else "f32"
    operations = {opcode.split(".")[0] for opcode in kernel.ptx if opcode.endswith(f".rn.{width}")}
    expected = SINGLE_KERNELS[name] if name in SINGLE_KERNELS else RULES[UPDATES[name][3]]
    assert operations == expected


@pytest.mark.parametrize("name", UPDATES_OF_FLOAT32)
def test_update_has_no_float64(kernels: dict[str, Kernel], name: str) -> None:
    """Float64 belongs to the other kernels: update has none, in PTX or SASS, unless the parameter itself is float64."""
    kernel = kernels[name]
    assert not [opcode for opcode in kernel.ptx if ".f64" in opcode]
    assert not [opcode for opcode in kernel.sass if is_float64_arithmetic(opcode)]
    for other in SINGLE_KERNELS:
        assert [opcode for opcode in kernels[other].sass if is_float64_arithmetic(opcode)], other


@pytest.mark.parametrize("name", UPDATES_OF_FLOAT32)
def test_random_words_take_one_product_a_round(kernels: dict[str, Kernel], name: str) -> None:
    """A Philox round's 32 x 32 -> 64 bit product is one instruction, not the three of a product of 64-bit integers."""
    param, _, moment, rule = UPDATES[name]
    elements = elements_per_thread(name)
    # Calls for a vector of whole pairs, for one that begins inside a pair, and for one element. In the second the first
    # call's first word is not wanted: six rounds, and a product of 32 bits.
    once = 7 * (elements // 2 + (elements // 2 + 1) + 1) - 1
    for_update = 0 if moment == "float" and param == "float" else once
    products, parts = sass_wide_products(kernels[name].sass)
    rounds = once + for_update  # `once` for the average
    # The address of a chunk's row, and such, are a few more; positions of 8-bit moments' codes, another few. Of SGD in
    # float32, sm_80 and sm_90 have what goes one by one twice.
    further = 16 if moment == "8bit" else 4 + 7 if rule == "sgdw" and param == moment == "float" else 4
    assert rounds <= products <= rounds + further
    if moment != "8bit":
        # And an int8 remainder is multiplied up, for the weight and for the average. Products of 64 bits would be two a
        # round.
        others = 2 * (elements + 1) if BYTES[param] == 2 else elements + 1 if for_update else 0
        assert parts <= 6 + others


def test_contraction_would_be_noticed(tmp_path: Path) -> None:
    """Compiled with nvcc's own defaults, update and measure hold an fma that the check sees."""
    ptx = tmp_path / "cuda.ptx"
    command = [required("nvcc"), "-std=c++17", "-arch=sm_90", "-ptx", str(ROOT / "csrc" / "cuda.cu"), "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    by_name = ptx_kernels(ptx.read_text())
    opcodes = dict(zip(demangle(list(by_name)), by_name.values(), strict=True))
    for kernel in ("update_kernel", "sgdw_kernel"):
        assert "fma.rn.f32" in outside_ieee(opcodes[f"{kernel}<float, float, float>"])
    assert "fma.rn.f64" in outside_ieee(opcodes["measure_kernel"])
