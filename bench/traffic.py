"""Bytes of a step, counted from the tensors an optimizer really keeps.

A one-pass step reads parameter, gradient and state, and writes parameter and state, each once. For float32 with
two float32 moments that is 16 + 12 = 28 bytes a parameter; for bfloat16 with float32 moments 12 + 10 = 22, and with
bfloat16 moments 8 + 6 = 14. Step counters and other scalars are left out. Optimizers that make several passes are
credited with the same bytes: GB/s then says what a step was worth, not what the memory bus did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

MIN_STATE_ELEMENTS = 2  # fewer is a step counter or another scalar; cases with 1-element tensors are never in GB/s


def bytes_per_param(optimizer: torch.optim.Optimizer) -> float:
    """Bytes a one-pass step reads and writes per parameter, once the optimizer's state exists."""
    params = sum(param.nbytes for param in parameters(optimizer))
    grads = sum(param.grad.nbytes for param in parameters(optimizer) if param.grad is not None)
    state = sum(tensor.nbytes for tensor in state_tensors(optimizer))
    return (2 * params + grads + 2 * state) / sum(param.numel() for param in parameters(optimizer))


def bytes_touched(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of parameter, gradient and state per parameter, once the optimizer's state exists."""
    params = list(parameters(optimizer))
    grads = sum(param.grad.nbytes for param in params if param.grad is not None)
    state = sum(tensor.nbytes for tensor in state_tensors(optimizer))
    return (sum(param.nbytes for param in params) + grads + state) / sum(param.numel() for param in params)


def state_dtype(optimizer: torch.optim.Optimizer) -> str:
    """The dtypes of the state, e.g. "float32" or "float32+int16"."""
    return "+".join(sorted({name_of(tensor.dtype) for tensor in state_tensors(optimizer)}))


def name_of(dtype: torch.dtype) -> str:
    """A dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All parameters, group after group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All state tensors larger than a scalar."""
    for state in optimizer.state.values():
        values: Iterable[object] = state.values()
        for value in values:
            if isinstance(value, torch.Tensor) and value.numel() >= MIN_STATE_ELEMENTS:
                yield from stored_tensors(value)


def stored_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a wrapper (torchao's quantised state) really keeps; a plain tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))
