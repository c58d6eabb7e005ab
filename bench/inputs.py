"""Identical inputs for every contender: parameters and gradients of a case, drawn once and cloned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from bench.cases import Case
from bench.contenders import ParamGroups

SEED = 20140622  # any constant; rows are comparable only if it stays
PARAM_SCALE = 0.02  # the initialisation of a transformer
GRAD_SCALE = 1e-2


@dataclass(frozen=True)
class Inputs:
    """Masters that nobody steps.

    Attributes:
        case: The case they belong to.
        params: Initial parameters.
        grads: Gradients.
    """

    case: Case
    params: list[torch.Tensor]
    grads: list[torch.Tensor]

    def clone_groups(self) -> ParamGroups:
        """Parameter groups of fresh `nn.Parameter`s with fresh gradients, in memory of their own."""
        tensors = zip(self.params, self.grads, strict=True)
        return [
            {
                "params": [parameter(param, grad) for param, grad in itertools.islice(tensors, len(group.shapes))],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in self.case.groups
        ]


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Draws a case's parameters and gradients from a normal distribution; rows without a gradient get zeros."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(scale: float) -> list[torch.Tensor]:
        return [
            torch.empty(shape, device=device, dtype=dtype).normal_(0.0, scale, generator=generator)
            for shape in case.shapes
        ]

    params, grads = normal(PARAM_SCALE), normal(GRAD_SCALE)
    for grad in grads:
        if case.grad_rows < 1 and grad.dim() > 1:
            rows = torch.rand(grad.shape[0], device=device, generator=generator)
            grad[rows >= case.grad_rows] = 0
    return Inputs(case, params, grads)


def parameter(param: torch.Tensor, grad: torch.Tensor) -> torch.nn.Parameter:
    """A copy of `param` with a copy of `grad` in its `.grad`."""
    result = torch.nn.Parameter(param.clone())
    result.grad = grad.clone()
    return result
