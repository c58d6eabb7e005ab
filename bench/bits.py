"""Do this device's paths store the bits that the CPU's do, in every storage format?

The same weights and gradients are stepped on both, several steps with other gradients each; then weights and state are
compared byte by byte. On a GPU its backends are compared with the CPU's, which is the promise. On a CPU every other ISA
is compared with the best one. `python -m bench.bits` does a small part of it, for a run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from adamw_kernels import FusedAdamW, backends
from bench import traffic
from bench.rows import BitsRow

STEPS = 3
SEED = 1729
# One element, less than a vector, around 4,096 (where moments become 8-bit ones), no whole number of groups of 16,
# empty, a matrix, several chunks.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (7,),
    (4095,),
    (4097,),
    (0,),
    (130, 65),
    (100_003,),
    (512, 512),
)
SMALL_SHAPES: tuple[tuple[int, ...], ...] = ((7,), (4097,), (0,), (33, 257))

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Variant:
    """dtypes, formats and options of one comparison."""

    param: torch.dtype
    grad: torch.dtype
    param_format: str = "native"
    moment_format: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    *(
        Variant(param, grad, param_format, moment_format)
        for param in (BF16, F16)
        for grad in (param, F32)
        for param_format in ("native", "stochastic", "split24", "split32")
        for moment_format in ("float32", "bfloat16", "8bit")
    ),
    *(Variant(F32, grad, "native", moments) for grad in (F32, BF16) for moments in ("float32", "bfloat16", "8bit")),
    Variant(F64, F64, options={}),
    Variant(F32, F32, options={"amsgrad": True, "maximize": True}),
    Variant(F32, F32, options={"decoupled": False, "cautious": True}),
    Variant(F32, F32, options={"max_grad_norm": 0.5, "ema_decay": 0.9}),
    Variant(BF16, BF16, "split24", "8bit", {"max_grad_norm": 0.5, "ema_decay": 0.9, "ema_format": "bfloat16"}),
)
SMALL_VARIANTS = (
    Variant(F32, F32),
    Variant(BF16, BF16, "split32"),
    Variant(BF16, BF16, "split24", "8bit", {"max_grad_norm": 0.5}),
    Variant(F32, F32, options={"max_grad_norm": 0.5, "ema_decay": 0.9}),
)


def measure(
    device: torch.device,
    variants: tuple[Variant, ...] = VARIANTS,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> Iterator[BitsRow]:
    """A row of every variant on every path that `device` has beside the one that is compared with."""
    best = backends.cpu_isas()[-1]
    if device.type == "cpu":
        others = [("cpu", isa) for isa in backends.cpu_isas()[:-1]]
    else:
        others = [(name, "") for name in ("triton", "cuda") if not backends.why_not(name, device)]
    for variant in variants:
        wanted = stepped(variant, shapes, torch.device("cpu"), "cpu", best)
        for backend, isa in others:
            found = stepped(variant, shapes, device, backend, isa)
            yield BitsRow(
                backend=f"cpu {isa}" if isa else backend,
                against=f"cpu {best}",
                param=traffic.name_of(variant.param),
                grad=traffic.name_of(variant.grad),
                param_format=variant.param_format,
                moment_format=variant.moment_format,
                options=" ".join(f"{key}={value}" for key, value in variant.options.items()),
                tensors=len(shapes),
                elements=sum(torch.Size(shape).numel() for shape in shapes),
                steps=STEPS,
                differing=differing(wanted, found),
            )


def stepped(
    variant: Variant, shapes: tuple[tuple[int, ...], ...], device: torch.device, backend: str, isa: str
) -> list[torch.Tensor]:
    """Weights and state after `STEPS` steps, on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    params = [torch.nn.Parameter(draw(shape, 0.1, generator).to(device, variant.param)) for shape in shapes]
    with chosen_isa(isa), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="param_format='native'")
        optimizer = FusedAdamW(
            params,
            lr=1e-2,
            weight_decay=0.1,
            backend=backend,
            seed=SEED,
            param_format=variant.param_format,
            moment_format=variant.moment_format,
            **variant.options,
        )
        for _ in range(STEPS):
            for param in params:
                set_gradient(param, draw(tuple(param.shape), 1e-2, generator).to(device, variant.grad))
            optimizer.step()
    result = [param.detach() for param in params]
    for param in params:
        result += [value for _, value in sorted(optimizer.state[param].items()) if isinstance(value, torch.Tensor)]
    return [tensor.cpu() for tensor in result]


def draw(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> torch.Tensor:
    """Normal values on the CPU: whoever asks gets the same. Every 17th is 0, every 19th tiny."""
    values = torch.randn(shape, generator=generator).mul_(scale)
    flat = values.view(-1)
    flat[::17] = 0.0
    flat[::19] *= 1e-30
    return values


def set_gradient(param: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Makes `grad` the gradient, whatever its dtype."""
    if grad.dtype != param.dtype:
        param.grad_dtype = None  # allows any
    param.grad = grad


@contextlib.contextmanager
def chosen_isa(isa: str) -> Iterator[None]:
    """Forces the CPU's ISA, if one is named; a backend asked for by name stays."""
    before = os.environ.get(backends.ISA_VARIABLE)
    if isa:
        os.environ[backends.ISA_VARIABLE] = isa
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(backends.ISA_VARIABLE, None)
        else:
            os.environ[backends.ISA_VARIABLE] = before


def differing(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> int:
    """How many elements have other bits; a tensor that is missing, or of another shape or dtype, counts as a whole."""
    if len(wanted) != len(found):
        return max(sum(tensor.numel() for tensor in wanted), 1)
    count = 0
    for want, got in zip(wanted, found, strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            count += max(want.numel(), 1)
        elif want.numel():
            bytes_of = (tensor.contiguous().view(-1).view(torch.uint8).view(want.numel(), -1) for tensor in (want, got))
            first, second = bytes_of
            count += int((first != second).any(dim=1).sum())
    return count


def main(arguments: list[str] | None = None) -> int:
    """The reduced run; exit status 1 if a bit differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.bits", description="A few formats, small tensors.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args(arguments)
    rows = list(measure(options.device, SMALL_VARIANTS, SMALL_SHAPES))
    for row in rows:
        print(row)
    if not rows:
        print(f"nothing to compare on {options.device}")
    return int(not rows or any(row.differing for row in rows))


if __name__ == "__main__":
    sys.exit(main())
