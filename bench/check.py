"""Nothing is timed before it is checked: a few steps of every contender against float64 AdamW.

The reference is torch's single-tensor AdamW on float64 copies of the same inputs. It shares no code with any
contender: `foreach` and `fused` are other kernels in another precision. The steps use different gradients (each
is the one before times a power of two and a sign, exact in every dtype), so a wrong beta, bias correction, decay,
epsilon, hyperparameter of a group or pairing of tensors shows up in the parameters.

In bfloat16 a decay of lr * weight_decay = 1e-4 a step, or a lr off by 1 %, is below the parameter's own resolution, so
only float32, which runs the same code, can tell those.

An element passes if its error is at most `tolerance(...)`. Every element of every tensor is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.cases import Group
from bench.contenders import BETAS, EPS, Optimizer
from bench.inputs import Inputs

STEP_FACTORS = (-0.5, 0.25, -2.0)  # the gradient before each step is multiplied by these, one after another
BATCH_ELEMENTS = 16 << 20  # float64 elements referenced at once: bounds the reference's own memory to ~0.7 GiB
ON_DEVICE_ELEMENTS = 1 << 30  # of more than these, the expected parameters (8 bytes each) lie in the host's memory


@dataclass(frozen=True)
class Tolerance:
    """Allowed error per step taken.

    Attributes:
        rounding: Relative to the parameter: its own rounding when it is stored, once a step.
        update: Relative to lr: what rounding of the moments and of the coefficients may do to the update.
    """

    rounding: float
    update: float


# float32: two roundings of 2^-24 a step (torch rounds after the decay and after the update), and updates to 1e-4 of
# lr, ten times what torch's float32 bias corrections cost. bfloat16: likewise two roundings, of 2^-9. Updates to 4 %
# of lr: torch's bfloat16 moments are each rounded by 2^-9, up to three times, on terms that partly cancel here.
TOLERANCES = {
    torch.float32: Tolerance(rounding=2 * 2.0**-24, update=1e-4),
    torch.bfloat16: Tolerance(rounding=2 * 2.0**-9, update=4e-2),
}


def tolerance_of(dtype: torch.dtype, update_error: float | None) -> Tolerance:
    """That of a dtype, with another error of the update where one is given."""
    usual = TOLERANCES[dtype]
    return usual if update_error is None else Tolerance(usual.rounding, update_error)


class CheckFailedError(RuntimeError):
    """A contender did not do AdamW."""


def expected(inputs: Inputs) -> list[torch.Tensor]:
    """The case's parameters in float64 after `len(STEP_FACTORS)` steps of float64 AdamW."""
    tensors = zip(inputs.params, inputs.grads, strict=True)
    results = []
    for group in inputs.case.groups:
        own = list(itertools.islice(tensors, len(group.shapes)))
        home = own[0][0].device if inputs.case.numel <= ON_DEVICE_ELEMENTS else torch.device("cpu")
        after = [torch.empty_like(param, dtype=torch.float64, device=home) for param, _ in own]
        pieces = [
            piece
            for (param, grad), result in zip(own, after, strict=True)
            for piece in zip(*(split(tensor) for tensor in (param, grad, result)), strict=True)
        ]
        for batch in batches(pieces):
            step_reference(group, batch)
        results += after
    return results


def step_reference(group: Group, batch: list[tuple[torch.Tensor, ...]]) -> None:
    """Steps float64 copies of (parameter, gradient) pieces and writes them into the third piece."""
    params = [torch.nn.Parameter(param.double()) for param, _, _ in batch]
    for param, (_, grad, _) in zip(params, batch, strict=True):
        param.grad = grad.double()
    optimizer = torch.optim.AdamW(
        params, lr=group.lr, betas=BETAS, eps=EPS, weight_decay=group.weight_decay, foreach=False, fused=False
    )
    for factor in step_factors():
        write_grads(params, [grad for _, grad, _ in batch], factor)
        optimizer.step()
    for param, (_, _, result) in zip(params, batch, strict=True):
        result.copy_(param.detach())


def check(optimizer: Optimizer, inputs: Inputs, truth: list[torch.Tensor], tolerance: Tolerance | None = None) -> float:
    """Steps a freshly built optimizer and compares every parameter with `truth`.

    Args:
        optimizer: On copies of the inputs.
        inputs: Their values before.
        truth: What `expected` says.
        tolerance: Instead of that of the parameters' dtype.

    Returns:
        The largest error as a fraction of its tolerance.

    Raises:
        CheckFailedError: An error exceeds its tolerance; names the parameter.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    lrs = [group.lr for group in inputs.case.groups for _ in group.shapes]
    for factor in step_factors():
        write_grads(params, inputs.grads, factor)
        optimizer.step()
    worst = 0.0
    for index, (param, before, wanted, lr) in enumerate(zip(params, inputs.params, truth, lrs, strict=True)):
        allowed = tolerance or TOLERANCES[param.dtype]
        ratio = worst_ratio(param.detach(), before, wanted, lr, steps=len(STEP_FACTORS), tolerance=allowed)
        if not ratio <= 1.0:  # NaN fails too
            raise CheckFailedError(
                f"{inputs.case.name}, parameter {index} of shape {tuple(param.shape)} and dtype {param.dtype}: after "
                f"{len(STEP_FACTORS)} steps its error is {ratio:.3g} times the tolerance against float64 AdamW"
            )
        worst = max(worst, ratio)
    return worst


def worst_ratio(
    param: torch.Tensor, before: torch.Tensor, wanted: torch.Tensor, lr: float, *, steps: int, tolerance: Tolerance
) -> float:
    """The largest error of one parameter after `steps` steps over its tolerance."""
    worst = 0.0
    for got, start, want in zip(split(param), split(before), split(wanted), strict=True):
        # The parameter is rounded at its size on the way, so the larger of both ends plus a step counts.
        want = want.to(got.device)
        size = torch.maximum(start.double().abs(), want.abs()).add_(lr)
        allowed = size.mul_(tolerance.rounding * steps).add_(tolerance.update * lr * steps)
        ratio = (got.double() - want).abs_().div_(allowed).max().item()
        worst = ratio if math.isnan(ratio) else max(worst, ratio)
        if math.isnan(worst):
            break
    return worst


def step_factors() -> Iterator[float]:
    """What the case's gradients are multiplied by before each step."""
    return itertools.accumulate(STEP_FACTORS, lambda so_far, factor: so_far * factor)


def write_grads(params: list[torch.nn.Parameter], grads: Sequence[torch.Tensor], factor: float) -> None:
    """Writes every gradient anew, times `factor`: an optimizer may leave anything in them (optimi, Kahan sums)."""
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is not None
        torch.mul(grad, factor, out=param.grad)


def split(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Flat pieces of a contiguous tensor, none larger than a batch of the reference."""
    return torch.split(tensor.view(-1), BATCH_ELEMENTS)


def batches(pieces: list[tuple[torch.Tensor, ...]]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Consecutive pieces, each batch with about `BATCH_ELEMENTS` elements."""
    batch: list[tuple[torch.Tensor, ...]] = []
    elements = 0
    for piece in pieces:
        if batch and elements + piece[0].numel() > BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(piece)
        elements += piece[0].numel()
    if batch:
        yield batch
