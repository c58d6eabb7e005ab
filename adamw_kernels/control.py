"""What decides whether a step is applied, and how strongly: loss scale, gradient norms, guards.

The decision is made on the device by the kernels (`decide` in csrc/rule.h); here is the memory in which they find what
they need, and the sum over devices and processes in the middle. Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adamw_kernels.agreement import Agreement, all_reduce, shares_of

# Words of the structs Signals and Decision in csrc/launch_table.h.
SIGNALS = 4  # float64: grad_scale, found_inf, max_skip_norm, skip_nonfinite
DECISION_SKIP, DECISION_SKIPPED_STEPS, DECISION_NORM, DECISION_INV_SCALE, DECISION_NORMS = range(5)


@dataclass(frozen=True)
class NormDomain:
    """Tensors whose sums of squares are added up here and over the same processes.

    Attributes:
        norm: index of the gradient norm that the sum is part of.
        process_groups: over each of which, one after another, the sum is reduced.
    """

    norm: int = 0
    process_groups: tuple[Any, ...] = ()


class Verdict:
    """One device's signals and decision. It outlives launch tables: captured graphs and users refer to it.

    Attributes:
        signals: float64, as the kernels read it.
        decision: int64, as the kernels write it; one word a norm at its end.
    """

    def __init__(self, device: torch.device, num_norms: int) -> None:
        """A verdict that says: apply every step, with gradients as they are."""
        self.signals = torch.tensor([1.0, 0.0, -math.inf, 0.0], dtype=torch.float64, device=device)
        self.decision = torch.zeros(DECISION_NORMS + num_norms, dtype=torch.int64, device=device)
        self._floats = self.decision.view(torch.float64)
        self._floats[DECISION_INV_SCALE] = 1.0
        self.grad_scale, self.found_inf, self.max_skip_norm, self.skip_nonfinite = self.signals.unbind()

    def skip(self) -> torch.Tensor:
        """Whether the last step was skipped: a new bool scalar on the device."""
        return self.decision[DECISION_SKIP] != 0

    def skipped_steps(self) -> torch.Tensor:
        """How many were: a new int64 scalar on the device."""
        return self.decision[DECISION_SKIPPED_STEPS].clone()

    def norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Norm of all gradients of the last step, before clipping: a new scalar on the device."""
        return self._floats[DECISION_NORM].to(dtype, copy=True)

    def norms(self) -> torch.Tensor:
        """The norms by which its tensors were clipped: a new float32 vector on the device."""
        return self._floats[DECISION_NORMS:].float()


class StepControl:
    """Signals to the kernels and what they decided, on every device of an optimizer.

    Attributes:
        measures: whether a norm is wanted; without, only a loss scaler's signals count.
        num_norms: one, or one a group.
        agreement: between the processes that decide together, or None.
    """

    def __init__(
        self,
        *,
        measures: bool,
        num_norms: int = 1,
        skip_nonfinite: bool = False,
        max_skip_norm: float | torch.Tensor | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """Nothing is allocated before a device is known.

        Args:
            measures: compute norms.
            num_norms: how many.
            skip_nonfinite: skip a step whose gradients hold inf or NaN.
            max_skip_norm: skip a step whose norm is larger, or NaN.
            agreement: between the processes that decide together.
        """
        self.agreement = agreement
        self.measures = measures
        self.num_norms = num_norms
        self._skip_nonfinite = skip_nonfinite
        self._max_skip_norm = max_skip_norm
        self._verdicts: dict[torch.device, Verdict] = {}
        self._signalled = False  # the words may say something else than: apply, gradients as they are
        self._captured = False  # a graph's replay may write them, of which nobody tells us

    @property
    def verdicts(self) -> list[Verdict]:
        """One a device, in the order in which they were met."""
        return [*self._verdicts.values()]

    def verdict(self, device: torch.device) -> Verdict:
        """This device's, made at the first call."""
        if device not in self._verdicts:
            verdict = Verdict(device, self.num_norms)
            if self._skip_nonfinite:
                verdict.skip_nonfinite.fill_(1.0)
            if self._max_skip_norm is not None and not isinstance(self._max_skip_norm, torch.Tensor):
                verdict.max_skip_norm.fill_(self._max_skip_norm)
            others = self.verdicts
            self._verdicts[device] = verdict
            if others:  # every device takes the same decisions
                verdict.decision[:DECISION_NORMS].copy_(others[0].decision[:DECISION_NORMS])
        return self._verdicts[device]

    def keep_only(self, devices: Sequence[torch.device]) -> None:
        """Forget devices where nothing is left to step, once another one counts on."""
        kept = [device for device in devices if device in self._verdicts]
        if kept:
            self._verdicts = {device: self._verdicts[device] for device in kept}

    def adopt(self, before: StepControl) -> None:
        """Go on counting where another control, which is to be forgotten, stopped."""
        for device, verdict in before._verdicts.items():
            own = self.verdict(device).decision
            own[:DECISION_NORMS].copy_(verdict.decision[:DECISION_NORMS])

    def signal(
        self,
        grad_scale: torch.Tensor | float | None,
        found_inf: torch.Tensor | float | None,
        *,
        capturing: bool = False,
    ) -> None:
        """Tell every device what the loss scaler says about the coming step; None: nothing.

        Args:
            grad_scale: gradients are this many times too large.
            found_inf: if not zero, or NaN, the step is skipped.
            capturing: the writes become part of a CUDA graph.

        Raises:
            ValueError: a tensor that has not one element.
        """
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if isinstance(value, torch.Tensor) and value.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one element")
        limit = self._max_skip_norm if isinstance(self._max_skip_norm, torch.Tensor) else None
        given = grad_scale is not None or found_inf is not None
        self._captured |= capturing
        write = given or self._signalled or self._captured
        self._signalled = write  # before the first word is written: an interrupt must not make us forget it
        for verdict in self._verdicts.values():
            if write:
                _write(verdict.grad_scale, 1.0 if grad_scale is None else grad_scale)
                _write(verdict.found_inf, 0.0 if found_inf is None else found_inf)
            if limit is not None:
                _write(verdict.max_skip_norm, limit)
        self._signalled = given


def _write(word: torch.Tensor, value: torch.Tensor | float) -> None:
    if isinstance(value, torch.Tensor):
        _copy(word, value.detach().reshape(()))
    else:
        word.fill_(value)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    # To a CPU the copy must have arrived, because the CPU's kernels wait for nobody.
    target.copy_(source, non_blocking=target.device.type != "cpu")


def add_up(totals: Sequence[torch.Tensor], domains: Sequence[NormDomain], agreement: Agreement | None = None) -> None:
    """Add the devices' totals up in their order, and over the processes; every device gets the sums.

    Args:
        totals: per device, float64: one sum of squares a domain, then found_inf as 0 or 1. Overwritten.
        domains: what they belong to.
        agreement: between the processes; None: nobody asks whether there is any.

    Raises:
        RuntimeError: as `Agreement.reduce`.
    """
    first, *others = totals
    for other in others:
        part = torch.empty_like(first)
        _copy(part, other)
        first += part
    # The signal, at the end, concerns everybody: who must skip here must skip everywhere.
    shares = shares_of([domain.process_groups for domain in domains])
    if agreement is not None:
        agreement.reduce(first, shares)
    else:
        for group, members in shares.items():
            all_reduce(first, members, group)
    for other in others:
        _copy(other, first)
