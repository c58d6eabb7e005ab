"""Reads what compilers wrote: the opcodes of PTX, SASS and AMD assembly, function by function."""

import re
import shutil
import struct
import subprocess
from bisect import bisect
from collections import Counter
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

# --- NVIDIA: PTX ------------------------------------------------------------------------------------------


def ptx_kernels(text: str) -> dict[str, list[str]]:
    """Opcodes of every kernel in a PTX file, in order, by its (mangled) name."""
    bodies = re.split(r"(?m)^\s*(?:\.visible|\.weak)?\s*\.entry\s+([\w$]+)", text)[1:]
    return {name: ptx_opcodes(body) for name, body in zip(bodies[::2], bodies[1::2], strict=True)}


def ptx_opcodes(text: str) -> list[str]:
    """Opcodes with their modifiers, such as 'ld.global.v4.b32', in order."""
    statements = re.split(r"[;{}\n]", re.sub(r"//.*", "", text))
    matches = (re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?=\s|$)", statement) for statement in statements)
    return [match[1] for match in matches if match]


FLOATING_POINT = re.compile(r"\.(?:f16|bf16|f32|f64)(?:x2)?\b")

# What moves, compares, selects or converts floating-point values, and what rounds once, to nearest. A product or a sum
# without `.rn` does not belong here: ptxas may contract it.
IEEE_OPCODES = re.compile(
    r"(?:ld|st|mov|selp|setp|neg|abs|max|cvt|cvta)\.[\w.:]+|(?:add|sub|mul|div|rcp|sqrt)\.rn\.(?:f32x2|f32|f64)"
)


def outside_ieee(opcodes: list[str]) -> set[str]:
    """The floating-point opcodes that are not single, correctly rounded operations, and those that flush subnormals."""
    return {
        opcode
        for opcode in opcodes
        if (FLOATING_POINT.search(opcode) and not IEEE_OPCODES.fullmatch(opcode))
        or re.search(r"\.(?:ftz|approx|full)\b", opcode)
    }


def ptx_vector_accesses(opcodes: list[str], kind: str, num_bytes: int = 16) -> int:
    """How many global vector loads (`kind` 'ld') or stores ('st') move this many bytes."""
    vector = re.compile(rf"{kind}\.global(?:\.[\w:]+)*\.v([248])\.[busf](8|16|32|64)")
    matches = (vector.fullmatch(opcode) for opcode in opcodes)
    return sum(int(match[1]) * int(match[2]) == 8 * num_bytes for match in matches if match)


# --- NVIDIA: SASS -----------------------------------------------------------------------------------------


def nvidia_tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: the CUDA toolkit's, else the one that Triton brings along."""
    found = shutil.which(name)
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def disassemble(cubin: Path) -> str:
    """The SASS of a cubin; without data flow analysis, which adds nothing to the text and half the time."""
    tool = nvidia_tool("nvdisasm")
    assert tool is not None
    return subprocess.run([tool, "-ndf", "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """What a thread of every kernel in a cubin takes, by its (mangled) name: 'REG', 'STACK', 'LOCAL' and more."""
    tool = nvidia_tool("cuobjdump")
    assert tool is not None
    text = subprocess.run([tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in re.findall(r"(?m)^\s*Function ([\w$]+):\n(.*)$", text)
    }


def sass_kernels(text: str) -> dict[str, list[str]]:
    """Opcodes of every function in a disassembled cubin, by its (mangled) name."""
    bodies = re.split(r"(?m)^\.text\.([\w$]+):", text)[1:]
    return {name: sass_opcodes(body) for name, body in zip(bodies[::2], bodies[1::2], strict=True)}


def sass_opcodes(text: str) -> list[str]:
    """Opcodes with their modifiers, such as 'LDG.E.128', in order.

    A product with 2^23 or its negative, by which exact division and root shift an exponent, is 'IMAD.EXPONENT' here.
    """
    return [opcode for _, opcode in sass_instructions(text)]


def sass_instructions(text: str) -> list[tuple[int, str]]:
    """Where each instruction lies, in bytes, and its opcode as `sass_opcodes` has it."""
    instruction = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;\n]*)"
    return [
        (int(at, 16), "IMAD.EXPONENT" if opcode == "IMAD" and "0x800000," in operands else opcode)
        for at, opcode, operands in re.findall(instruction, text)
    ]


def sass_of_codes(codes: list[bytes], architecture: str, folder: Path) -> list[list[str]]:
    """Opcodes of several kernels' machine code, disassembled at once.

    nvdisasm takes a third of a second to start, and a tenth of that for a kernel.

    Args:
        codes: as `machine_codes` has them.
        architecture: 'sm_90a'; how much of it nvdisasm must know depends on the instructions.
        folder: where a file may be written.
    """
    tool = nvidia_tool("nvdisasm")
    assert tool is not None
    file = folder / "codes.bin"
    file.write_bytes(b"".join(codes))
    command = [tool, "-ndf", "-c", "-b", architecture.replace("sm_", "SM"), str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ends = list(accumulate(len(code) for code in codes))
    found: list[list[str]] = [[] for _ in codes]
    for at, opcode in sass_instructions(text):
        found[bisect(ends, at)].append(opcode)
    assert [INSTRUCTION_BYTES * len(opcodes) for opcodes in found] == [len(code) for code in codes]
    return found


INSTRUCTION_BYTES = 16  # since Volta


def machine_codes(cubin: bytes) -> dict[str, bytes]:
    """The machine code of every kernel in a cubin, an ELF file, by its (mangled) name."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, index_of_names = struct.unpack_from("<HHH", cubin, 58)
    # Of a section: where its name stands among the names, type, flags, address, offset in the file, length.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[index_of_names][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        full = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if full.startswith(".text."):
            found[full.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def is_local_access(opcode: str) -> bool:
    """Whether a SASS opcode reads or writes local memory: a spill, or an array that is not in registers."""
    return opcode.split(".")[0] in ("LDL", "STL")


def sass_accesses(opcodes: list[str], kind: str, num_bytes: int = 16) -> int:
    """How many global loads (`kind` 'LDG') or stores ('STG') move this many bytes, of those that move 8 or 16."""
    return sum(opcode.startswith(f"{kind}.") and str(8 * num_bytes) in opcode.split(".") for opcode in opcodes)


def sass_wide_products(opcodes: list[str]) -> tuple[int, int]:
    """How many products of 32-bit integers keep their upper half, and how many 32-bit parts of longer ones there are.

    A product of 64-bit integers takes one of the former and two of the latter.
    """
    counts = Counter(opcodes)
    return counts["IMAD.WIDE.U32"] + counts["IMAD.HI.U32"], counts["IMAD"]


def is_float64_arithmetic(opcode: str) -> bool:
    """Whether a SASS opcode computes in float64 or converts to or from it."""
    return opcode.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or "F64" in opcode or ".64H" in opcode


# --- AMD --------------------------------------------------------------------------------------------------


def amd_opcodes(text: str) -> list[str]:
    """Opcodes of AMD assembly, such as 'global_load_dwordx4', in order."""
    return re.findall(r"(?m)^\s+((?:s|v|ds|global|flat|buffer|scratch)_\w+)", text)


def amd_numbers(text: str) -> dict[str, int]:
    """The numbers that AMD assembly states once about its kernel: metadata entries and `.amdhsa_` directives."""
    found = re.findall(r"(?m)^\s*\.([a-z]\w*):?[ \t]+(\d+)[ \t]*$", text)
    times = Counter(name for name, _ in found)
    return {name: int(value) for name, value in found if times[name] == 1}
