"""Instructions per element of every compiled update, beside the bytes it moves: which of the two bounds it?

Nothing is timed and no GPU is needed: the SASS is read, of CUDA's kernels in the built extension module, of Triton's as
`triton_cubins.py` has them compiled. A path through the loop over whole vectors is recognised by what it stores, by how
many Philox rounds it draws and by whether it rounds to nearest; of all paths that do so, the shortest is counted: no
AMSGrad, average or cautious masks, no slow path of a division or root.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from bench.rows import InstructionRow

BYTES = {"float": 4.0, "bf16": 2.0, "fp16": 2.0, "double": 8.0}
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")  # those of CUDA
TORCH_NAMES = {"float32": "float", "bfloat16": "bf16", "float16": "fp16", "float64": "double"}
REMAINDER_BYTES = {"native": 0, "stochastic": 0, "split24": 1, "split32": 2}
GROUP_BYTES = 2 / 16
PHILOX_ROUNDS = 7
WARP = 32


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel: issue slots and bytes a second (NVIDIA's data sheets of the SXM parts)."""

    multiprocessors: int
    schedulers: int  # of a multiprocessor; each issues one instruction for 32 threads in a cycle
    clock_hz: float  # boost
    bytes_per_s: float

    def budget(self, bytes_per_element: float) -> float:
        """Instructions per element that can be issued while its bytes move."""
        slots = self.multiprocessors * self.schedulers * WARP * self.clock_hz
        return slots / (self.bytes_per_s / bytes_per_element)


H100 = Gpu(multiprocessors=132, schedulers=4, clock_hz=1.98e9, bytes_per_s=3.35e12)
H200 = Gpu(multiprocessors=132, schedulers=4, clock_hz=1.98e9, bytes_per_s=4.8e12)


class UnavailableError(RuntimeError):
    """There is no machine code here, or nothing to read it with."""


# --- reading SASS -----------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm: the CUDA toolkit's, else the one that Triton brings along."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    found = shutil.which(name) or (shutil.which(name, path=str(bundled)) if bundled else None)
    if found is None:
        raise UnavailableError(f"reading SASS needs {name}, of the CUDA toolkit or of Triton")
    return found


def output_of(*command: str, text: str = "") -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout


@dataclass(frozen=True)
class Kernel:
    """One compiled update."""

    backend: str
    target: str
    name: str
    sass: str
    registers: int


def functions_of(cubin: Path) -> Iterator[tuple[str, str, int]]:
    """Name, SASS and registers of every function in a cubin."""
    usage = output_of(tool("cuobjdump"), "-res-usage", str(cubin))
    registers = dict(re.findall(r"Function (\w+):\s*REG:(\d+)", usage))
    sections = re.split(r"(?m)^\.text\.([\w$]+):", output_of(tool("nvdisasm"), "-ndf", "-c", str(cubin)))[1:]
    for name, sass in zip(sections[::2], sections[1::2], strict=True):
        yield name, sass, int(registers[name])


def cuda_kernels(targets: tuple[str, ...]) -> list[Kernel]:
    """Every update of Adam's rule in the extension module, for these targets; if none is named, for all."""
    native = importlib.import_module("adamw_kernels._C")
    if not native.cuda_architectures:
        raise UnavailableError(f"the extension module holds no CUDA code: it was {native.cuda_build}")
    found: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(native.__file__)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            target = re.search(r"sm_\d+", cubin.name)
            if target is None or (targets and target[0] not in targets):
                continue
            found += [
                Kernel("cuda", target[0], mangled, sass, registers)
                for mangled, sass, registers in functions_of(cubin)
                if re.search(r"\dupdate8?_kernel", mangled)
            ]
    names = plain_names([kernel.name for kernel in found])
    return [dataclasses.replace(kernel, name=name) for kernel, name in zip(found, names, strict=True)]


def triton_kernels(targets: tuple[str, ...]) -> list[Kernel]:
    """Every update of Adam's rule that the launcher compiles; a minute for each target, in two processes."""
    if find_spec("triton") is None:
        raise UnavailableError("Triton is not installed")

    def compile_for(target: str, folder: str) -> list[Kernel]:
        command = [sys.executable, "-m", "bench.triton_cubins", folder, target]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
        return [
            Kernel("triton", target, cubin.stem, sass, registers)
            for cubin in sorted((Path(folder) / target).glob("*.cubin"))
            for _, sass, registers in functions_of(cubin)
        ]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        return [
            kernel
            for found in pool.map(lambda t: compile_for(t, folder), targets or TRITON_TARGETS)
            for kernel in found
        ]


def plain_names(mangled: list[str]) -> list[str]:
    """'update_kernel<float, bf16, float>' from the linker's names."""
    lines = output_of(tool("c++filt"), text="\n".join(mangled)).splitlines()
    plain = (re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", line) for line in lines)
    return [re.sub(r"^void |\(.*", "", line) for line in plain]


Stores = tuple[int, int, int]  # how many of 16, of 8 and of 4 bytes
NO_STORES: Stores = (0, 0, 0)


def plus(a: Stores, b: Stores) -> Stores:
    """The sum."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@dataclass
class Block:
    """A basic block of SASS: how many instructions, what of them tells paths apart, and where it may go."""

    address: int
    instructions: int = 0
    # Stores of 16, 8 and 4 bytes by predicate, "" for none: those of one predicate happen together or not at all.
    stores: dict[str, Stores] = field(default_factory=dict)
    products: int = 0
    to_nearest: bool = False  # rounds float32 to 16 bits so
    loads: bool = False  # 16 bytes
    loads_after_store: bool = False
    calls: bool = False  # the slow path of a division or root
    successors: tuple[int, ...] = ()

    def possible_stores(self) -> set[Stores]:
        """How many of 16, 8 and 4 bytes it may do."""
        result = {self.stores.get("", NO_STORES)}
        for predicate, more in self.stores.items():
            if predicate:
                result |= {plus(some, more) for some in result}
        return result


# A weight's bits, plus half of what is cut off, and the last bit that stays: to bfloat16, and to float16, which has its
# exponent re-biased besides. Triton's to float16: one instruction, of one value or of two.
TO_NEAREST = re.compile(r"IADD3 .*(0x7fff|-0x37fff001), R\d|F2FP?\.(F16\.F32|PACK_AB)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SLOW_PATH = re.compile(r"(div|sqrt)_rn")  # other calls bring lanes together again
ENDS = ("EXIT", "RET", "BRX", "KILL")


def basic_blocks(sass: str) -> dict[int, Block]:
    """Basic blocks by the address of their first instruction."""
    lines: list[tuple[int, str, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            waiting.append(label[1])
        match = INSTRUCTION.search(line)
        if match:
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            lines.append((address, (match[2] or "").strip(), match[3], match[4].strip()))
    starts = set(labels.values())
    result: dict[int, Block] = {}
    block: Block | None = None
    for position, (address, predicate, opcode, operands) in enumerate(lines):
        if block is None or address in starts:
            if block is not None:
                block.successors = (address,)
            block = result[address] = Block(address)
        block.instructions += 1
        kind = opcode.split(".")[0]
        if kind == "STG":
            of_16, of_8 = ".128" in opcode, ".64" in opcode
            of_4 = not (of_16 or of_8 or re.search(r"\.[US](8|16)\b", opcode))
            block.stores[predicate] = plus(block.stores.get(predicate, NO_STORES), (of_16, of_8, of_4))
        if kind == "LDG" and ".128" in opcode and not predicate:
            block.loads = True
            block.loads_after_store = block.loads_after_store or bool(block.stores)
        block.to_nearest = block.to_nearest or bool(TO_NEAREST.match(f"{opcode} {operands}"))
        block.calls = block.calls or (kind == "CALL" and bool(SLOW_PATH.search(operands)))
        block.products += opcode.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32"))
        following = (lines[position + 1][0],) if position + 1 < len(lines) else ()
        if kind == "BRA":
            target = re.search(r"\.L_\w+", operands)
            always = not predicate and opcode in ("BRA", "BRA.U") and not re.match(r"!?U?P\d", operands)
            targets = (labels[target[0]],) if target else ()
            block.successors = targets if always else (*following, *targets)
            block = None
        elif kind in ENDS:
            block.successors = following if predicate else ()
            block = None
    return result


def back_edges(blocks: dict[int, Block]) -> set[int]:
    """Where loops begin: the targets of branches to earlier addresses."""
    return {to for block in blocks.values() for to in block.successors if to <= block.address}


# What a path through the loop stores, its wide products (a few of which are addresses), whether it rounds to nearest,
# and whether it loads 16 bytes.
Signature = tuple[Stores, int, bool, bool]


def shortest_paths(blocks: dict[int, Block], head: int) -> dict[Signature, int]:
    """Once through the loop that begins at `head`: instructions of the shortest path of each signature.

    Without paths that load a whole vector after a store (only the average and AMSGrad's maximum come that late) and
    those through the slow path of a division or root.
    """
    memo: dict[int, dict[Signature, int]] = {}
    open_blocks: set[int] = set()

    def visit(address: int) -> dict[Signature, int]:
        if address in memo:
            return memo[address]
        block = blocks[address]
        open_blocks.add(address)
        best: dict[Signature, int] = {}
        for successor in () if block.loads_after_store or block.calls else block.successors:
            if successor == head:
                ways: dict[Signature, int] = {(NO_STORES, 0, False, False): 0}
            elif successor in open_blocks or successor not in blocks:
                continue
            else:
                ways = visit(successor)
            for ((stores, products, to_nearest, loads), count), more in product(ways.items(), block.possible_stores()):
                if loads and more != NO_STORES:
                    continue
                key = (
                    plus(stores, more),
                    products + block.products,
                    to_nearest or block.to_nearest,
                    loads or block.loads,
                )
                best[key] = min(best.get(key, 1 << 30), count + block.instructions)
        open_blocks.remove(address)
        memo[address] = best
        return best

    return visit(head)


# --- what is looked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One update with its parameter format."""

    param: str
    grad: str
    moments: str  # "float", "double", "bf16" or "8bit"
    param_format: str
    elements: int  # of a thread in one round
    at_once: int  # of them, in one access of each operand

    @property
    def moment_bytes(self) -> float:
        """Of one moment of one element, without what groups share."""
        return 1.0 if self.moments == "8bit" else BYTES[self.moments]

    @property
    def moved(self) -> float:
        """Bytes an element: everything read and written once, the gradient read."""
        kept = BYTES[self.param] + REMAINDER_BYTES[self.param_format] + 2 * self.moment_bytes
        return 2 * (kept + (GROUP_BYTES if self.moments == "8bit" else 0)) + BYTES[self.grad]

    def is_path(self, signature: Signature) -> bool:
        """Whether this is what a round stores and draws, with neither an average nor AMSGrad."""
        stores, products, to_nearest, _ = signature
        expected = dict.fromkeys((16, 8, 4), 0)
        for size in (BYTES[self.param], REMAINDER_BYTES[self.param_format], self.moment_bytes, self.moment_bytes):
            if size:
                width = min(int(size * self.at_once), 16)
                expected[width] += int(size * self.elements) // width
        draws = self.moments in ("bf16", "8bit") or self.param_format in ("stochastic", "split24")
        # Where moments alone draw, the last round's product may be one of 32 bits.
        has_drawn = products >= (PHILOX_ROUNDS - 1) * self.elements // 2  # a call serves two, if neighbours share it
        return (
            stores == tuple(expected.values())
            and draws == has_drawn
            and to_nearest == (BYTES[self.param] == 2 and self.param_format == "native")
        )


def variants(kernel: Kernel) -> list[Variant]:
    """What one kernel does, by flags of its tensors."""
    if kernel.backend == "cuda":
        function, arguments = kernel.name.rstrip(">").split("<")
        param, grad, *moments = arguments.split(", ")
        stored = moments[0] if function == "update_kernel" else "8bit"
        narrowest = min(BYTES[param], BYTES[grad]) if param != "double" else BYTES[param]
        elements = at_once = 8 if stored == "8bit" else int(16 // narrowest)
    else:
        param, grad, stored, elements_of_thread, vector = kernel.name.split("-")
        param, grad = TORCH_NAMES[param], TORCH_NAMES[grad]
        stored = {"float32": "double" if param == "double" else "float", "bfloat16": "bf16"}.get(stored, stored)
        elements, at_once = int(elements_of_thread), int(vector)
    formats = REMAINDER_BYTES if BYTES[param] == 2 else ("native",)
    return [Variant(param, grad, stored, param_format, elements, at_once) for param_format in formats]


BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels}


def measure(backend: str, *targets: str) -> list[InstructionRow]:
    """A row for every target (or these, such as "sm_90"), update and parameter format of a backend.

    Raises:
        UnavailableError: there is no machine code to read, or nothing to read it with.
    """
    rows = []
    for kernel in BACKENDS[backend](targets):
        blocks = basic_blocks(kernel.sass)
        paths = [shortest_paths(blocks, head) for head in back_edges(blocks)]
        instructions = sum(block.instructions for block in blocks.values())
        for variant in variants(kernel):
            counts = [count for path in paths for signature, count in path.items() if variant.is_path(signature)]
            rows.append(row(kernel, variant, instructions, counts))
    place = {name: index for index, name in enumerate(REMAINDER_BYTES)}
    return sorted(rows, key=lambda r: (int(r.target[3:]), r.param, r.grad, r.moments, place[r.param_format]))


def row(kernel: Kernel, variant: Variant, instructions: int, counts: list[int]) -> InstructionRow:
    """The shortest of the paths found, against both budgets."""
    if not counts:
        where = f"{kernel.backend}, {kernel.target}"
        raise RuntimeError(f"{where}: found no path of {variant}; does the kernel still store as described here?")
    per_element = min(counts) / variant.elements
    h100, h200 = H100.budget(variant.moved), H200.budget(variant.moved)
    return InstructionRow(
        backend=kernel.backend,
        target=kernel.target,
        param=variant.param,
        grad=variant.grad,
        moments=variant.moments,
        param_format=variant.param_format,
        registers=kernel.registers,
        kernel_instructions=instructions,
        elements_per_round=variant.elements,
        instructions_per_element=per_element,
        bytes_per_element=variant.moved,
        h100_budget=h100,
        h100_bound="memory" if per_element <= h100 else "issue",
        h200_budget=h200,
        h200_bound="memory" if per_element <= h200 else "issue",
    )
