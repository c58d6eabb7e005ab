"""What a training loop does between `backward()` and the next `forward()`: the usual way, and in FusedAdamW's step.

==============  ==================================  ========================================================
workload        the usual loop                      FusedAdamW
==============  ==================================  ========================================================
``step``        `AdamW(fused=True).step()`          `step()`
``clip``        `clip_grad_norm_`, `step()`         `step()` with `max_grad_norm`
``clip+ema``    the same, then EMA of the weights   ... and `ema_decay`
``clip+scaler`` `unscale_`, clip, `scaler.step`     `scaler.step` with `max_grad_norm` and `fused=True`
``clip+guard``  clip, step `if isfinite(norm)`      `step()` with `max_grad_norm` and `skip_nonfinite`
``copy``        `step()`, cast to bfloat16          `step()` with `param_copy`
==============  ==================================  ========================================================

The usual loop is spelled as favourably as torch allows: `foreach` clipping over a list made once, where loops walk
`model.parameters()` anew, and the bare function of `torch.optim.swa_utils` without `AveragedModel` around it.

The EMA has the parameters' dtype on both sides. In bfloat16 that is no equal work: torch rounds to nearest, so that an
average stands still at the decays in use, and FusedAdamW stochastically, so that it does not.

``copy`` is what ZeRO-Offload does on a CPU: float32 weights are stepped, and a bfloat16 copy of them is what the GPU is
sent. DeepSpeedCPUAdam, made for it, takes part beside torch's where it can be built.

Bytes are counted per pass over a tensor, from the tensors that are really kept: a pass that reads is one operand, one
that reads and rewrites is two.

The same work is timed in every round. The usual loop writes the gradients: after its first step their norm is
`MAX_NORM` and the coefficient 1 from then on, but torch multiplies by it always, so as not to ask the device whether it
has to. FusedAdamW never writes them and clips by the same coefficient every time. `unscale_` divides them by the
scale, so a scale above 1 would shrink them to zero within a few dozen steps. While loops are timed it is 1, for which
`unscale_` rewrites the gradients as for any other, and it stays there: it would take 2^31 steps to grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bench import check, traffic
from bench.cases import Group
from bench.check import CheckFailedError, Tolerance
from bench.contenders import BASELINE, BETAS, CONTENDERS, EPS, Contender, Optimizer, ParamGroups
from bench.inputs import Inputs

MAX_NORM = 1.0
# Whatever the decay, an average costs the same. At 0.9 three steps move it by more than its tolerance.
EMA_DECAY = 0.9
SCALE = 1024.0  # while loops are checked
STEPS_TO_GROW = 2**31 - 1

# The gradients of the checked steps are the drawn ones, whose norm is about `DRAWN_NORM`, times these. The second step
# is too small to be clipped. Without it, or without clipping, another max_norm could not be told: AdamW hardly sees a
# factor that all gradients share.
DRAWN_NORM = 4.0
FACTORS = (-1.0, -0.125, 0.5)
# Before this step comes one with an infinite element, where the loop promises to leave it out.
BAD_BEFORE = 2

# Relative errors of the norm. Ours is rounded to float32 once. torch on a CPU sums a tensor's float32 squares one after
# another: 7.5e-4 too small for the gradients of GPT-2 small, 5.1e-3 for one tensor of 64 Mi; its bfloat16 norm is
# rounded by 2^-9 on top.
OUR_NORM_ERROR = 2.0**-23
USUAL_NORM_ERROR = 1e-2

# Of the weights: those of a step (`check.py`), which is all that clipping by a right coefficient needs. Only how the
# coefficient's error differs from step to step is seen; the error of torch's norm above came to 2.4e-4 of lr in three
# steps.
USUAL_TOLERANCES = {**check.TOLERANCES, torch.float32: Tolerance(rounding=2 * 2.0**-24, update=1e-3)}

# Of the averages: an average takes over a tenth of its weight's error in each step and adds a rounding of its own.
# Where that is stochastic, it is up to a whole spacing of bfloat16, 2^-7.
BFLOAT16_AVERAGE_ROUNDING = 1.25 * 2.0**-7


@dataclass(frozen=True)
class Workload:
    """What surrounds the update.

    Attributes:
        name: How rows and the command line call it.
        title: How figures call it.
        clips: Whether gradients are clipped by their global norm.
        averages: Whether an EMA of the weights is kept, in the parameters' dtype.
        scales: Whether a GradScaler is used.
        guards: Whether steps with gradients that are not finite are left out.
        copies: Whether the weights are also written in bfloat16.
        dtypes: dtypes of the parameters for which anybody does this.
    """

    name: str
    title: str
    clips: bool = True
    averages: bool = False
    scales: bool = False
    guards: bool = False
    copies: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("step", "step alone", clips=False),
        Workload("clip", "clip, step"),
        Workload("clip+ema", "clip, step, EMA", averages=True),
        # Loss scaling is for float16 activations over float32 weights; bfloat16 has the exponents of float32.
        Workload("clip+scaler", "GradScaler, clip, step", scales=True, dtypes=(torch.float32,)),
        Workload("clip+guard", "clip, skip or step", guards=True),
        Workload("copy", "step, bfloat16 copy", clips=False, copies=True, dtypes=(torch.float32,)),
    )
}


@dataclass(frozen=True)
class Loop:
    """One side of a comparison, on its own copy of the inputs.

    Attributes:
        name: How rows call it.
        workload: What it does.
        optimizer: The optimizer, with the parameters and gradients.
        step: Everything between `backward()` and the next `forward()`.
        averages: The EMA of each parameter, once there is one.
        copies: The bfloat16 copy of each parameter; none where the workload has none.
        norm: The norm of the last step's gradients, before they were clipped.
        scaler: The GradScaler, if the workload has one.
        bytes_per_param: Bytes that `step` reads and writes per parameter, once the state exists.
    """

    name: str
    workload: Workload
    optimizer: Optimizer
    step: Callable[[], object]
    averages: Callable[[], list[torch.Tensor]]
    copies: list[torch.Tensor]
    norm: Callable[[], torch.Tensor]
    scaler: torch.amp.GradScaler | None
    bytes_per_param: Callable[[], float]

    @property
    def params(self) -> list[torch.Tensor]:
        """All parameters, group after group."""
        return list(traffic.parameters(self.optimizer))

    def hand_over(self, inputs: Inputs, factor: float) -> None:
        """Writes the drawn gradients times `factor` into the gradients, in place, as a scaled loss would have."""
        if self.scaler is not None:
            factor *= self.scaler.get_scale()
        for param, grad in zip(self.params, inputs.grads, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad).mul_(factor)

    def get_ready(self, inputs: Inputs) -> None:
        """Puts the drawn gradients back and sets the scale to 1."""
        if self.scaler is not None:
            self.scaler.update(1.0)
        self.hand_over(inputs, 1.0)


USUAL = "usual"


def usual(workload: Workload, groups: ParamGroups, peer: Contender | None = None) -> Loop:
    """The usual loop around torch's fused AdamW, or around a peer under its own name."""
    optimizer = (peer or CONTENDERS[BASELINE]).build(groups)
    params = list(traffic.parameters(optimizer))
    scaler = new_scaler(params[0].device) if workload.scales else None
    averages = [param.detach().clone() for param in params] if workload.averages else []
    weights = [param.detach() for param in params]
    copies = copies_for(params) if workload.copies else []
    average = get_ema_multi_avg_fn(EMA_DECAY)
    norm = torch.tensor(math.nan)

    def step() -> None:
        nonlocal norm
        if scaler is not None:
            scaler.unscale_(optimizer)
        if workload.clips:
            norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            if workload.guards and not torch.isfinite(norm):
                return
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if averages:
            average(averages, weights, 0)
        if copies:
            torch._foreach_copy_(copies, weights)

    def bytes_per_param() -> float:
        param_bytes, grad_bytes, numel = operand_bytes(params)
        passes = 2 * grad_bytes if scaler is not None else 0  # unscale_ reads and rewrites
        if workload.clips:
            passes += 3 * grad_bytes  # the norm reads, the coefficient reads and rewrites
        if averages:
            passes += param_bytes + 2 * sum(tensor.nbytes for tensor in averages)
        if copies:
            passes += param_bytes + sum(tensor.nbytes for tensor in copies)
        return traffic.bytes_per_param(optimizer) + passes / numel

    name = peer.name if peer else USUAL
    return Loop(name, workload, optimizer, step, lambda: averages, copies, lambda: norm, scaler, bytes_per_param)


def ours(contender: Contender, workload: Workload, groups: ParamGroups) -> Loop:
    """FusedAdamW with the options that make the loop's other passes unnecessary."""
    dtype = groups[0]["params"][0].dtype
    options: dict[str, object] = {}
    if workload.clips:
        options["max_grad_norm"] = MAX_NORM
    if workload.averages:
        options |= {"ema_decay": EMA_DECAY, "ema_format": traffic.name_of(dtype)}
    if workload.guards:
        options["skip_nonfinite"] = True
    if workload.scales:
        options["fused"] = True  # as with torch: the scaler hands over its scale and whether it saw an inf
    copies = copies_for([param for group in groups for param in group["params"]]) if workload.copies else []
    if copies:
        options["param_copy"] = copies
    optimizer = contender.build(groups, **options)
    params = list(traffic.parameters(optimizer))
    scaler = new_scaler(params[0].device) if workload.scales else None

    def step_with_scaler() -> None:
        assert scaler is not None
        scaler.step(optimizer)
        scaler.update()

    def bytes_per_param() -> float:
        _, grad_bytes, numel = operand_bytes(params)
        passes = 2 * grad_bytes if scaler is not None else 0  # the scaler's own look for inf rewrites what it reads
        passes += grad_bytes if workload.clips else 0  # the norm
        passes += sum(tensor.nbytes for tensor in copies)
        return traffic.bytes_per_param(optimizer) + passes / numel  # the EMA is state, and counted there

    def averages() -> list[torch.Tensor]:
        return [optimizer.state[param]["param_ema"] for param in params] if workload.averages else []

    def norm() -> torch.Tensor:
        result: torch.Tensor = optimizer.grad_norm  # type: ignore[attr-defined]
        return result

    step = optimizer.step if scaler is None else step_with_scaler
    return Loop(contender.name, workload, optimizer, step, averages, copies, norm, scaler, bytes_per_param)


def new_scaler(device: torch.device) -> torch.amp.GradScaler:
    """A scaler that has scaled a loss."""
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, growth_interval=STEPS_TO_GROW)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def copies_for(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """A bfloat16 tensor a parameter, not yet written."""
    return [torch.full_like(param.detach(), math.nan, dtype=torch.bfloat16) for param in params]


def operand_bytes(params: list[torch.Tensor]) -> tuple[int, int, int]:
    """Bytes of the parameters, bytes of their gradients, and how many elements there are."""
    grads = sum(param.grad.nbytes for param in params if param.grad is not None)
    return sum(param.nbytes for param in params), grads, sum(param.numel() for param in params)


# --- the check ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Weights and their averages in float64 after `len(FACTORS)` steps of the loop, and the last gradients' norm."""

    params: list[torch.Tensor]
    averages: list[torch.Tensor]
    norm: float


@dataclass(frozen=True)
class Verdict:
    """What the check of a loop found.

    Attributes:
        steps: How often the loop ran.
        error: Largest error of a weight or average as a fraction of its tolerance.
        norm_error: Relative error of the last norm; None where there is none.
    """

    steps: int
    error: float
    norm_error: float | None


def normalize(inputs: Inputs) -> None:
    """Multiplies the drawn gradients by the power of two that brings their norm near `DRAWN_NORM`: exact."""
    exponent = round(math.log2(DRAWN_NORM / norm_of(inputs.grads)))
    for grad in inputs.grads:
        grad.mul_(2.0**exponent)


def norm_of(grads: list[torch.Tensor]) -> float:
    """The global norm, in float64."""
    pieces = (piece for grad in grads for piece in check.split(grad))
    return math.sqrt(math.fsum(piece.double().square_().sum().item() for piece in pieces))


def expected(inputs: Inputs, *, clips: bool) -> Truth:
    """The case's weights and averages after the checked steps, all in float64."""
    drawn = norm_of(inputs.grads)
    norms = [abs(factor) * drawn for factor in FACTORS]
    factors = [
        factor * (min(1.0, MAX_NORM / (norm + 1e-6)) if clips else 1.0)
        for factor, norm in zip(FACTORS, norms, strict=True)
    ]
    tensors = zip(inputs.params, inputs.grads, strict=True)
    truth = Truth([], [], norms[-1])
    for group in inputs.case.groups:
        own = list(itertools.islice(tensors, len(group.shapes)))
        after, averages = ([torch.empty_like(param, dtype=torch.float64) for param, _ in own] for _ in range(2))
        pieces = [
            piece
            for (param, grad), result, average in zip(own, after, averages, strict=True)
            for piece in zip(*(check.split(tensor) for tensor in (param, grad, result, average)), strict=True)
        ]
        for batch in check.batches(pieces):
            step_reference(group, batch, factors)
        truth.params.extend(after)
        truth.averages.extend(averages)
    return truth


def step_reference(group: Group, batch: list[tuple[torch.Tensor, ...]], factors: list[float]) -> None:
    """Steps float64 copies of (parameter, gradient) pieces; weights and averages go into the third and fourth."""
    params = [torch.nn.Parameter(param.double()) for param, *_ in batch]
    optimizer = torch.optim.AdamW(
        params, lr=group.lr, betas=BETAS, eps=EPS, weight_decay=group.weight_decay, foreach=False, fused=False
    )
    for param, (_, _, _, average) in zip(params, batch, strict=True):
        average.copy_(param.detach())
    for factor in factors:
        for param, (_, grad, _, _) in zip(params, batch, strict=True):
            param.grad = grad.double().mul_(factor)
        optimizer.step()
        for param, (_, _, _, average) in zip(params, batch, strict=True):
            average.lerp_(param.detach(), 1 - EMA_DECAY)
    for param, (_, _, result, _) in zip(params, batch, strict=True):
        result.copy_(param.detach())


def verify(loop: Loop, inputs: Inputs, truth: Truth) -> Verdict:
    """Runs a freshly built loop and compares every weight and average, and the norm, with `truth`.

    Raises:
        CheckFailedError: An error exceeds its tolerance; names the parameter.
    """
    runs = 0
    for index, factor in enumerate(FACTORS):
        if index == BAD_BEFORE and (loop.workload.guards or loop.workload.scales):
            loop.hand_over(inputs, 1.0)
            grad = loop.params[-1].grad
            assert grad is not None
            grad.view(-1)[-1] = math.inf
            loop.step()
            runs += 1
        loop.hand_over(inputs, factor)
        loop.step()
        runs += 1
    params = [param.detach() for param in loop.params]
    tolerance = (USUAL_TOLERANCES if loop.name == USUAL and loop.workload.clips else check.TOLERANCES)[params[0].dtype]
    error = compare(loop, "parameter", params, truth.params, inputs, tolerance)
    if loop.workload.averages:
        if params[0].dtype == torch.bfloat16:
            tolerance = replace(tolerance, rounding=BFLOAT16_AVERAGE_ROUNDING)
        error = max(error, compare(loop, "EMA of parameter", loop.averages(), truth.averages, inputs, tolerance))
    for index, (param, copy) in enumerate(zip(params, loop.copies, strict=False)):
        if not torch.equal(copy, param.to(copy.dtype)):
            raise CheckFailedError(
                f"{inputs.case.name}, {loop.workload.name}: copy {index} is not its parameter, rounded"
            )
    norm_error = None
    if loop.workload.clips:
        norm_error = abs(loop.norm().item() / truth.norm - 1)
        if not norm_error <= (USUAL_NORM_ERROR if loop.name == USUAL else OUR_NORM_ERROR):
            raise CheckFailedError(
                f"{inputs.case.name}, {loop.workload.name}: the norm {loop.norm().item()!r} has an error of "
                f"{norm_error:.3g} against float64"
            )
    return Verdict(runs, error, norm_error)


def compare(
    loop: Loop,
    what: str,
    tensors: list[torch.Tensor],
    wanted: list[torch.Tensor],
    inputs: Inputs,
    tolerance: Tolerance,
) -> float:
    """The largest error of weights or averages over its tolerance.

    Raises:
        CheckFailedError: It is above 1.
    """
    lrs = [group.lr for group in inputs.case.groups for _ in group.shapes]
    worst = 0.0
    for index, (tensor, before, want, lr) in enumerate(zip(tensors, inputs.params, wanted, lrs, strict=True)):
        ratio = check.worst_ratio(tensor, before, want, lr, steps=len(FACTORS), tolerance=tolerance)
        if not ratio <= 1.0:  # NaN fails too
            raise CheckFailedError(
                f"{inputs.case.name}, {loop.workload.name}, {what} {index} of shape {tuple(tensor.shape)} and dtype "
                f"{tensor.dtype}: its error is {ratio:.3g} times the tolerance against the loop in float64"
            )
        worst = max(worst, ratio)
    return worst
