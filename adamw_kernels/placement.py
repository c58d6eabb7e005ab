"""Where gradients lie beside their parameters: DTensors whose placements differ are redistributed for a step."""

from __future__ import annotations

from typing import Any

import torch

from adamw_kernels.functional import local_grad, local_view


def is_misplaced(name: str, p: torch.Tensor) -> bool:
    """Whether a DTensor's gradient lies in other placements than the parameter, and must be redistributed.

    Raises:
        ValueError: it lies on another mesh, or only one of them is a DTensor.
    """
    grad: Any = p.grad
    placements, of_grad = getattr(p, "placements", None), getattr(grad, "placements", None)
    if (placements is None) != (of_grad is None):
        kinds = [f"a {type(t).__name__}" if hasattr(t, "placements") else "a plain tensor" for t in (grad, p)]
        raise ValueError(
            f"the gradient of {name} is {kinds[0]}, the parameter {kinds[1]}; expected both as DTensors on one mesh or "
            "neither. Distribute the gradient as the parameter is."
        )
    mesh = getattr(p, "device_mesh", None)
    if placements is not None and grad.device_mesh != mesh:
        raise ValueError(
            f"the gradient of {name} lies on {grad.device_mesh}, the parameter on {mesh}; expected the same mesh. "
            "If the model was moved to another mesh, drop the gradients of before (zero_grad())."
        )
    return bool(of_grad != placements)


def placed_grad(name: str, p: torch.Tensor) -> torch.Tensor:
    """The local, real memory of a parameter's gradient; communicates nothing.

    In place of one that must be redistributed, something of the same dtype, device and local shape; like a gradient in
    another memory layout, it will be read from a copy.

    Raises:
        ValueError: as `is_misplaced`.
    """
    grad = p.grad
    assert grad is not None
    if not is_misplaced(name, p):
        return local_grad(grad)
    local = local_view(p)
    return local_grad(torch.empty((), dtype=grad.dtype, device=grad.device)).expand(local.shape)


def redistributed_grad(name: str, p: torch.Tensor) -> torch.Tensor:
    """The local, real memory of a parameter's gradient, placed as the parameter is: a collective where it was not."""
    grad: Any = p.grad
    if is_misplaced(name, p):
        placed: Any = p
        grad = grad.redistribute(placed.device_mesh, placed.placements)
    return local_grad(grad)
