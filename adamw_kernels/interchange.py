"""Ways in and out of the storage formats: float32 weights, torch's state dicts, conversion in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adamw_kernels.formats import remainder_dtype
from adamw_kernels.functional import local_view
from adamw_kernels.options import FURTHER_OPTIONS, check_options
from adamw_kernels.packing import merge_weight, split_weight, unpack_moments
from adamw_kernels.state import (
    Formats,
    check_adoptable,
    check_formats,
    complete_state,
    formats_of,
    like,
    local_state,
    moment_format_in,
    moment_keys,
)
from adamw_kernels.stepper import param_name

if TYPE_CHECKING:
    from adamw_kernels.optimizer import FusedAdamW


def _members(opt: FusedAdamW) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(name, parameter, options) of every parameter, in order."""
    for index, group in enumerate(opt.param_groups):
        for position, p in enumerate(group["params"]):
            name = param_name(group, index, position)
            for stepper in opt._internals.steppers_of(p):
                stepper.forget_recast(name, p)
            yield name, p, FURTHER_OPTIONS | group


def formats(opt: FusedAdamW) -> dict[torch.Tensor, Formats]:
    """See `FusedAdamW.formats`."""
    return {p: formats_of(p, options) for _, p, options in _members(opt)}


@torch.inference_mode(False)  # tensors made in it could not be written later
@torch.no_grad()
def fp32_weights(opt: FusedAdamW) -> dict[torch.Tensor, torch.Tensor]:
    """See `FusedAdamW.fp32_weights`."""
    weights: dict[torch.Tensor, torch.Tensor] = {}
    for _, p, _ in _members(opt):
        if p.dtype == torch.float64 or p.is_complex():
            weights[p] = p.detach().clone()
            continue
        weights[p] = like(p, torch.float32)
        remainder = local_state(opt.state.get(p, {})).get("param_remainder")
        local_view(weights[p]).copy_(merge_weight(local_view(p.detach()), remainder))
    return weights


@torch.inference_mode(False)
@torch.no_grad()
def load_fp32_weights(opt: FusedAdamW, weights: Mapping[torch.Tensor, torch.Tensor] | Sequence[torch.Tensor]) -> None:
    """See `FusedAdamW.load_fp32_weights`."""
    members = [*_members(opt)]
    if not isinstance(weights, Mapping):
        weights = [*weights]
        if len(weights) != len(members):
            raise ValueError(f"{len(weights)} weights for {len(members)} parameters; expected one each, in their order")
        weights = {p: weight for (_, p, _), weight in zip(members, weights, strict=True)}
    pairs = []
    for name, p, options in members:  # first all checks, then the first write
        if p not in weights:
            raise ValueError(f"there is no weight for {name}; expected one for each parameter")
        weight = weights[p]
        if not isinstance(weight, torch.Tensor) or not (weight.is_floating_point() or weight.is_complex()):
            raise TypeError(f"the weight for {name} is {weight!r}; expected a floating-point tensor")
        if weight.is_complex() != p.is_complex():
            raise TypeError(f"the weight for {name} has dtype {weight.dtype}; the parameter has {p.dtype}")
        local, value = local_view(p), local_view(weight.detach())
        if value.shape != local.shape or weight.shape != p.shape:
            raise ValueError(
                f"the weight for {name} has shape {tuple(weight.shape)}, of which {tuple(value.shape)} are here; the "
                f"parameter has {tuple(p.shape)} and {tuple(local.shape)}. Shard it as the parameter is."
            )
        check_formats(name, p, options)
        check_adoptable(name, p, local, opt.state.get(p, {}))
        pairs.append((p, local, value, remainder_dtype(formats_of(p, options).param)))
    for p, local, value, dtype in pairs:
        if dtype is None:
            local.copy_(value)
        else:
            remainder = opt.state[p].get("param_remainder")
            if remainder is None or (remainder.dtype, remainder.device) != (dtype, p.device):
                remainder = like(p, dtype)
            values = torch.empty_like(local, dtype=torch.float32, memory_format=torch.preserve_format).copy_(value)
            split_weight(values, local, local_view(remainder))
            opt.state[p]["param_remainder"] = remainder
    torch.autograd.graph.increment_version([p for p, *_ in pairs])


@torch.inference_mode(False)
@torch.no_grad()
def export_state_dict(opt: FusedAdamW, target: str) -> dict[str, Any]:
    """See `FusedAdamW.export_state_dict`."""
    if target != "torch":
        raise ValueError(f"export_state_dict: {target!r}; expected 'torch'")
    exported = opt.state_dict()
    states: dict[Any, Any] = {}
    for own, packed in zip(opt.param_groups, exported["param_groups"], strict=True):
        for p, key in zip(own["params"], packed["params"], strict=True):
            if key in exported["state"]:
                states[key] = _torch_state(p, exported["state"][key], own["amsgrad"])
        for option in (*FURTHER_OPTIONS, "seed"):
            packed.pop(option, None)
    return {**exported, "state": states}


def _torch_state(p: torch.Tensor, state: dict[str, Any], amsgrad: bool) -> dict[str, Any]:
    """What `torch.optim.AdamW` keeps of a parameter; moments as they are, or in float32."""
    if "exp_avg" not in state:
        return {}
    result = {"step": state["step"]} | {key: state[key] for key in moment_keys(amsgrad) if key in state}
    if moment_format_in(state) == "bfloat16":
        return result | {key: value.float() for key, value in result.items() if key != "step"}
    if moment_format_in(state) == "8bit":
        for key, value in zip(
            ("exp_avg", "exp_avg_sq"), unpack_moments(local_state(state), local_view(p)), strict=True
        ):
            result[key] = like(p, torch.float32)
            local_view(result[key]).copy_(value)
    return result


@torch.inference_mode(False)
@torch.no_grad()
def convert(opt: FusedAdamW, changes: dict[str, Any]) -> None:
    """See `FusedAdamW.convert`."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if opt._internals.captured:
        raise RuntimeError("convert: this optimizer's step was captured in a CUDA graph, which updates the old state")
    for index, group in enumerate(opt.param_groups):
        check_options(opt.defaults | group | changes, f"convert: param_groups[{index}]")
    members = [(name, p, options | changes) for name, p, options in _members(opt)]
    for name, p, options in members:  # first all checks, then the first change
        check_formats(name, p, options)
        check_adoptable(name, p, local_view(p), opt.state.get(p, {}))
    for options in (opt.defaults, *opt.param_groups):
        for key, value in changes.items():
            if value == FURTHER_OPTIONS[key]:
                options.pop(key, None)
            else:
                options[key] = value
    steps_seen: set[int] = set()
    for name, p, options in members:
        if "exp_avg" in opt.state.get(p, {}):
            complete_state(name, p, opt.state[p], options, steps_seen)
