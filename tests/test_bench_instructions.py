"""Instructions are counted along the path that a format takes, not along one that none does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import instructions  # noqa: E402  # a neighbour of the tests, not an installed package
from bench.instructions import Kernel, Variant  # noqa: E402

ELEMENTS = 8


def lines(*opcodes: str, times: int = 1) -> list[str]:
    """Instructions without addresses."""
    return [*opcodes] * times


# A loop as the kernels' of bfloat16 weights and float32 moments: loads, the rule with a root whose slow path is a call,
# moments stored; random words drawn or not; the weight stored natively, by chance, or split; the average or not.
LOOP = [
    ".L_head:",
    *lines("LDG.E.128 R4, desc[UR4][R2.64]", times=6),
    *lines("FFMA R4, R4, R5, R6", times=100),
    "@!P5 BRA `(.L_fast)",
    "CALL.REL.NOINC `($__cuda_sm20_sqrt_rn_f32_slowpath)",
    "BRA `(.L_rooted)",
    ".L_fast:",
    *lines("FMUL R4, R4, R5", times=5),
    ".L_rooted:",
    *lines("STG.E.128 desc[UR4][R2.64], R4", times=4),
    "@!P0 BRA `(.L_drawn)",
    *lines("IMAD.WIDE.U32 R8, R8, -0x2da92e6d, RZ", "LOP3.LUT R8, R8, R9, R10, 0x96, !PT", times=56),
    ".L_drawn:",
    "@P1 BRA `(.L_split)",
    "@P0 BRA `(.L_chance)",
    *lines("SHF.R.U32.HI R5, RZ, 0x10, R4", "IADD3 R4, PT, PT, R4, 0x7fff, R5", times=8),
    "BRA `(.L_store)",
    ".L_chance:",
    *lines("IADD3 R4, R4, R8, RZ", times=8),
    ".L_store:",
    "STG.E.128 desc[UR4][R2.64], R4",
    "BRA `(.L_stored)",
    ".L_split:",
    *lines("VIMNMX.U32 R4, R4, 0x7f7fffff, PT", "VIADD R5, R4, 0x7fff", times=8),
    "@P2 BRA `(.L_whole)",
    "STG.E.64 desc[UR4][R6.64], R5",
    "STG.E.128 desc[UR4][R2.64], R4",
    "BRA `(.L_stored)",
    ".L_whole:",
    *lines("STG.E.128 desc[UR4][R2.64], R4", times=2),
    ".L_stored:",
    "@!P3 BRA `(.L_next)",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "FADD R4, R4, R5",
    "STG.E.128 desc[UR4][R2.64], R4",
    ".L_next:",
    "@P4 BRA `(.L_head)",
    "EXIT",
]


def sass() -> str:
    """As nvdisasm prints it."""
    text, address = [], 0
    for line in LOOP:
        if line.startswith(".L_"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


def count(param_format: str) -> int:
    """Instructions of a round."""
    blocks = instructions.basic_blocks(sass())
    (head,) = instructions.back_edges(blocks)
    paths = instructions.shortest_paths(blocks, head)
    variant = Variant("bf16", "bf16", "float", param_format, elements=ELEMENTS, at_once=ELEMENTS)
    (found,) = [length for signature, length in paths.items() if variant.is_path(signature)]
    return found


# Six loads, a hundred of the rule, a root, which the call would make shorter by three, four stores; "drawn or not",
# "split or not", "average or not", "once more".
COMMON = 6 + 100 + 6 + 4 + 4


def test_formats_are_told_apart() -> None:
    """By stores and draws; native weights from those rounded by chance by how they are rounded.

    By stores and draws alone the shortest "native" path would round by chance without having drawn, as no launch does,
    and so would the shortest "split32" one, of which the second vector is an average.
    """
    assert count("native") == COMMON + 1 + 16 + 1 + 1 + 1
    assert count("stochastic") == COMMON + 112 + 1 + 8 + 1 + 1
    assert count("split24") == COMMON + 112 + 16 + 1 + 2 + 1
    assert count("split32") == COMMON + 16 + 1 + 2


def test_variants_of_a_kernel() -> None:
    """16-bit weights have four formats, whatever the moments; others have one."""
    cuda = Kernel("cuda", "sm_90", "update8_kernel<bf16, float>", "", 0)
    triton = Kernel("triton", "sm_90", "float16-bfloat16-bfloat16-8-8", "", 0)
    formats = ["native", "stochastic", "split24", "split32"]
    assert instructions.variants(cuda) == [Variant("bf16", "float", "8bit", f, 8, 8) for f in formats]
    assert instructions.variants(triton) == [Variant("fp16", "bf16", "bf16", f, 8, 8) for f in formats]
    wide = Kernel("cuda", "sm_90", "update_kernel<double, float, double>", "", 0)
    assert instructions.variants(wide) == [Variant("double", "float", "double", "native", 2, 2)]


def test_bytes_of_a_variant() -> None:
    """Weight, remainder, moments and words of groups both ways, the gradient once."""
    assert Variant("bf16", "bf16", "8bit", "split24", 8, 8).moved == 12.25
    assert Variant("bf16", "bf16", "float", "split32", 8, 8).moved == 26
    assert Variant("float", "float", "float", "native", 4, 4).moved == 28
