"""Instructions per element of every compiled CUDA update, beside the bytes it moves: which of the two bounds it?

Nothing is timed and no GPU is needed: the SASS in the built extension module is read. A path through the loop over
whole vectors is recognised by what it stores and by how many Philox rounds it draws; of all paths that do so, the
shortest is counted: no AMSGrad, average or cautious masks, no slow path of a division or root.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from bench.rows import InstructionRow

BYTES = {"float": 4.0, "bf16": 2.0, "fp16": 2.0, "double": 8.0}
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
    """There is no CUDA code here, or nothing to read it with."""


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


def update_kernels(targets: tuple[str, ...]) -> Iterator[tuple[str, str, str, int]]:
    """Target, mangled name, SASS and registers of every update in the extension module, if none is named for all."""
    module = importlib.import_module("adamw_kernels._C").__file__
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", str(module)], check=True, capture_output=True, cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise UnavailableError("the extension module holds no CUDA code: build it where there is an nvcc")
        for cubin in cubins:
            if targets and not any(re.search(rf"{target}\b", cubin.name) for target in targets):
                continue
            usage = output_of(tool("cuobjdump"), "-res-usage", str(cubin))
            registers = dict(re.findall(r"Function (\w+):\s*REG:(\d+)", usage))
            sections = re.split(r"(?m)^\.text\.([\w$]+):", output_of(tool("nvdisasm"), "-ndf", "-c", str(cubin)))[1:]
            target = re.search(r"sm_\d+", cubin.name)
            for mangled, sass in zip(sections[::2], sections[1::2], strict=True):
                if target and re.search(r"\dupdate8?_kernel", mangled):
                    yield target[0], mangled, sass, int(registers[mangled])


def plain_names(mangled: list[str]) -> list[str]:
    """'update_kernel<float, bf16, float>' from the linker's names."""
    lines = output_of(tool("c++filt"), text="\n".join(mangled)).splitlines()
    plain = (re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", line) for line in lines)
    return [re.sub(r"^void |\(.*", "", line) for line in plain]


@dataclass
class Block:
    """A basic block of SASS: how many instructions, what it stores by bytes, wide products, and where it may go."""

    address: int
    instructions: int = 0
    # Stores of 16 and of 8 bytes by predicate, "" for none: those of one predicate happen together or not at all.
    stores: dict[str, tuple[int, int]] = field(default_factory=dict)
    products: int = 0
    successors: tuple[int, ...] = ()

    def possible_stores(self) -> set[tuple[int, int]]:
        """How many of 16 and of 8 bytes it may do."""
        result = {self.stores.get("", (0, 0))}
        for predicate, (of_16, of_8) in self.stores.items():
            if predicate:
                result |= {(a + of_16, b + of_8) for a, b in result}
        return result


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
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
            of_16, of_8 = block.stores.get(predicate, (0, 0))
            block.stores[predicate] = of_16 + (".128" in opcode), of_8 + (".64" in opcode)
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


# What a path through the loop stores in 16 and in 8 bytes, and its wide products (a few of which are addresses).
Signature = tuple[int, int, int]


def shortest_paths(blocks: dict[int, Block], head: int) -> dict[Signature, int]:
    """Once through the loop that begins at `head`: instructions of the shortest path of each signature."""
    memo: dict[int, dict[Signature, int]] = {}
    open_blocks: set[int] = set()

    def visit(address: int) -> dict[Signature, int]:
        if address in memo:
            return memo[address]
        block = blocks[address]
        open_blocks.add(address)
        best: dict[Signature, int] = {}
        for successor in block.successors:
            if successor == head:
                ways = {(0, 0, 0): 0}
            elif successor in open_blocks or successor not in blocks:
                continue
            else:
                ways = visit(successor)
            for ((stores_16, stores_8, products), count), (more_16, more_8) in product(
                ways.items(), block.possible_stores()
            ):
                key = (stores_16 + more_16, stores_8 + more_8, products + block.products)
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

    @property
    def elements(self) -> int:
        """Elements of a thread in one round."""
        if self.moments == "8bit":
            return 8
        return 2 if self.param == "double" else int(16 // min(BYTES[self.param], BYTES[self.grad]))

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
        stores_16 = stores_8 = 0
        for size in (BYTES[self.param], REMAINDER_BYTES[self.param_format], self.moment_bytes, self.moment_bytes):
            stores_16 += int(size * self.elements // 16)
            stores_8 += size * self.elements == 8
        draws = self.moments in ("bf16", "8bit") or self.param_format in ("stochastic", "split24")
        # Where moments alone draw, the last round's product is one of 32 bits.
        a_draw = PHILOX_ROUNDS - (BYTES[self.param] == 4)
        rounds = a_draw * self.elements if draws else 0
        return signature[:2] == (stores_16, stores_8) and rounds <= signature[2] < rounds + PHILOX_ROUNDS


def variants(name: str) -> list[Variant]:
    """Of a kernel. Where moments draw random bits too, native and stochastic weights cannot be told apart."""
    kernel, arguments = name.rstrip(">").split("<")
    param, grad, *moments = arguments.split(", ")
    stored = moments[0] if kernel == "update_kernel" else "8bit"
    formats = ["native"]
    if BYTES[param] == 2:
        formats = [*(["native", "stochastic"] if stored == "float" else ["native"]), "split24", "split32"]
    return [Variant(param, grad, stored, param_format) for param_format in formats]


def measure(*targets: str) -> list[InstructionRow]:
    """A row for every target (or these, such as "sm_90"), update and parameter format.

    Raises:
        UnavailableError: there is no CUDA code to read, or nothing to read it with.
    """
    kernels = list(update_kernels(targets))
    names = plain_names([mangled for _, mangled, _, _ in kernels])
    rows = []
    for (target, _, sass, registers), name in zip(kernels, names, strict=True):
        blocks = basic_blocks(sass)
        paths = [shortest_paths(blocks, head) for head in back_edges(blocks)]
        for variant in variants(name):
            counts = [count for path in paths for signature, count in path.items() if variant.is_path(signature)]
            rows.append(row(target, variant, registers, sum(b.instructions for b in blocks.values()), counts))
    return sorted(rows, key=lambda r: (int(r.target[3:]), r.param, r.grad, r.moments, r.param_format))


def row(target: str, variant: Variant, registers: int, instructions: int, counts: list[int]) -> InstructionRow:
    """The shortest of the paths found, against both budgets."""
    if not counts:
        raise RuntimeError(f"{target}: found no path of {variant}; does the kernel still store as described here?")
    per_element = min(counts) / variant.elements
    h100, h200 = H100.budget(variant.moved), H200.budget(variant.moved)
    return InstructionRow(
        target=target,
        param=variant.param,
        grad=variant.grad,
        moments=variant.moments,
        param_format=variant.param_format,
        registers=registers,
        kernel_instructions=instructions,
        elements_per_round=variant.elements,
        instructions_per_element=per_element,
        bytes_per_element=variant.moved,
        h100_budget=h100,
        h100_bound="memory" if per_element <= h100 else "issue",
        h200_budget=h200,
        h200_bound="memory" if per_element <= h200 else "issue",
    )
