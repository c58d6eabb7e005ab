"""Bytes that weights and state take from the allocator in every storage format, and what a warm step takes beside them.

GPT-2 small in bfloat16, biases and norms included, beside the low-memory optimizers. Nothing is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from bench import allocations, formats, rows, traffic
from bench.cases import gpt2_small
from bench.contenders import Contender, Optimizer, ParamGroups

GRADIENTS = (1e-3, -2e-3)
DTYPE = torch.bfloat16


def measure(device: torch.device, reasons: dict[str, str]) -> Iterator[rows.FootprintRow]:
    """A row for everybody who runs on `device`; why others do not goes into `reasons`."""
    for entry in formats.entries(device):
        if entry.dtype != DTYPE:
            continue
        key = f"{entry.name} {entry.param_format}/{entry.moment_format}"
        reason = Contender(entry.name, key, entry.build, entry.devices).unavailable(device, DTYPE)
        if reason is not None:
            reasons[key] = reason
        else:
            yield measure_entry(entry, device)


def measure_entry(entry: formats.Entry, device: torch.device) -> rows.FootprintRow:
    """Weights, optimizer and two steps, then one more; gradients are freed before bytes are counted."""
    case = gpt2_small()
    made: list[Optimizer] = []

    def train() -> None:
        optimizer = entry.build(groups(device))
        made.append(optimizer)
        for value in GRADIENTS:
            step(optimizer, value)

    gc.collect()  # what others have left must not be taken back meanwhile
    kept = sum(allocations.sizes(train))
    (optimizer,) = made
    for param in traffic.parameters(optimizer):
        param.grad = torch.full_like(param, GRADIENTS[0])
    warm = [size for size in allocations.sizes(optimizer.step) if size > 0]
    state = kept - sum(param.nbytes for param in traffic.parameters(optimizer))
    return rows.FootprintRow(
        case=case.name,
        tensors=len(case.shapes),
        params=case.numel,
        contender=entry.name,
        dtype=traffic.name_of(DTYPE),
        param_format=entry.param_format,
        moment_format=entry.moment_format,
        allocated_bytes_per_param=kept / case.numel,
        largest_temporary_share=max(warm, default=0) / state,
        temporaries_share=sum(warm) / state,
    )


def groups(device: torch.device) -> ParamGroups:
    """GPT-2 small's parameter groups."""
    result: ParamGroups = []
    for group in gpt2_small().groups:
        params = [torch.nn.Parameter(torch.full(shape, 0.02, dtype=DTYPE, device=device)) for shape in group.shapes]
        result.append({"params": params, "lr": group.lr, "weight_decay": group.weight_decay})
    return result


def step(optimizer: Optimizer, value: float) -> None:
    """One step on gradients of one value, which are freed."""
    for param in traffic.parameters(optimizer):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
