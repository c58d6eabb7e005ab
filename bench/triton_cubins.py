"""Compiles Triton's updates for GPUs that this machine need not have.

    python -m bench.triton_cubins FOLDER TARGET...

A target is 'sm_90', say. FOLDER/TARGET/PARAM-GRAD-MOMENTS-ELEMENTS-VECTOR.cubin is the kernel of one dtype combination,
in which a thread takes so many elements in a round, so many of them in one access. In a process of its own, because
Triton is told of a GPU that is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main(output: Path, targets: list[str]) -> None:
    """Compile every update of Adam's rule for every target."""
    sys.path.insert(0, str(TESTS))
    import compile_triton  # type: ignore[import-not-found]

    from adamw_kernels.triton_kernels import update_options

    for device, target in enumerate(targets):
        compile_triton.pretend_to_have(compile_triton.gpu_target(target), device)
        folder = output / target
        folder.mkdir(parents=True)
        combinations = [c for c in compile_triton.COMBINATIONS if c[-1] == "adamw"]
        compiled = compile_triton.compile_all(combinations)
        for combination in combinations:
            options = update_options(*combination)
            elements = options["BLOCK"] // (32 * options["num_warps"])
            name = compile_triton.kernel_name(*combination)
            stem = f"{name.removeprefix('adamw-')}-{elements}-{options['VECTOR']}"
            (folder / f"{stem}.cubin").write_bytes(compiled[name].asm["cubin"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
