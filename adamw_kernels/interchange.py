"""Ways in and out of the storage formats: float32 weights, torch's state dicts, conversion in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adamw_kernels.formats import REMAINDER_KEYS, remainder_dtype
from adamw_kernels.functional import local_param, local_view
from adamw_kernels.groups import param_name
from adamw_kernels.options import FURTHER_OPTIONS, check_used_options
from adamw_kernels.packing import merge_weight, split_weight
from adamw_kernels.rules import LR_WHEN_ADDED, moment_keys, rule_of
from adamw_kernels.state import (
    Formats,
    check_adoptable,
    check_formats,
    complete_remainder,
    complete_state,
    forget_remainder,
    formats_of,
    like,
    local_state,
    moment_format_in,
    placed,
    real_moments,
    remainder_in,
    unpacked,
)
from adamw_kernels.tensor_watch import same_layout

if TYPE_CHECKING:
    from adamw_kernels.optimizer import FusedOptimizer


def _members(opt: FusedOptimizer) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(name, parameter, options) of every parameter, in order."""
    for index, group in enumerate(opt.param_groups):
        for position, p in enumerate(group["params"]):
            yield param_name(group, index, position), p, FURTHER_OPTIONS | group


def _forget_recasts(opt: FusedOptimizer) -> None:
    """Drop the remainders of weights that were cast since their last step."""
    for name, p, _ in _members(opt):
        for stepper in opt._internals.steppers_of(p):
            stepper.forget_recast(name, p)


def _remainder(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor | None:
    """The local remainder of a weight, where and in the layout in which the weight is now; None without one."""
    present = remainder_in(unpacked(state))
    return None if present is None else local_view(placed(present, p, present.dtype))


def formats(opt: FusedOptimizer) -> dict[torch.Tensor, Formats]:
    """See `FusedOptimizer.formats`."""
    return {p: formats_of(p, options) for _, p, options in _members(opt)}


@torch.inference_mode(False)  # tensors made in it could not be written later
@torch.no_grad()
def fp32_weights(opt: FusedOptimizer) -> dict[torch.Tensor, torch.Tensor]:
    """See `FusedOptimizer.fp32_weights`."""
    _forget_recasts(opt)
    weights: dict[torch.Tensor, torch.Tensor] = {}
    for name, p, _ in _members(opt):
        if p.dtype == torch.float64 or p.is_complex():
            weights[p] = p.detach().clone()
            continue
        weights[p] = like(p, torch.float32)
        remainder = _remainder(p, opt.state.get(p, {}))
        local = local_view(p.detach()) if remainder is None else local_param(name, p.detach())
        local_view(weights[p]).copy_(merge_weight(local, remainder))
    return weights


@torch.inference_mode(False)
@torch.no_grad()
def load_fp32_weights(
    opt: FusedOptimizer, weights: Mapping[torch.Tensor, torch.Tensor] | Sequence[torch.Tensor]
) -> None:
    """See `FusedOptimizer.load_fp32_weights`."""
    members = [*_members(opt)]
    if not isinstance(weights, Mapping):
        weights = [*weights]
        if len(weights) != len(members):
            raise ValueError(f"{len(weights)} weights for {len(members)} parameters; expected one each, in their order")
        weights = {p: weight for (_, p, _), weight in zip(members, weights, strict=True)}
    rule = rule_of(opt.defaults)
    pairs = []
    for name, p, options in members:  # first all checks, then the first write
        if p not in weights:
            raise ValueError(
                f"there is no weight for {name}; expected one for each parameter, by the parameter itself or in order"
            )
        weight = weights[p]
        if not isinstance(weight, torch.Tensor) or not (weight.is_floating_point() or weight.is_complex()):
            what = f"a tensor of {weight.dtype}" if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"the weight for {name} is {what}; expected a floating-point tensor")
        if weight.is_complex() != p.is_complex():
            raise TypeError(f"the weight for {name} has dtype {weight.dtype}; the parameter has {p.dtype}")
        if weight.layout != torch.strided or weight.device.type == "meta":
            raise ValueError(
                f"the weight for {name} has layout {weight.layout} on {weight.device}; expected dense values"
            )
        local, value = local_param(name, p.detach()), local_view(weight.detach())
        if value.shape != local.shape or weight.shape != p.shape:
            raise ValueError(
                f"the weight for {name} has shape {tuple(weight.shape)}, of which {tuple(value.shape)} are here; the "
                f"parameter has {tuple(p.shape)} and {tuple(local.shape)}. Shard it as the parameter is."
            )
        check_formats(name, p, options)
        check_adoptable(name, p, local, opt.state.get(p, {}), rule)
        pairs.append((name, p, local, value, options))
    _forget_recasts(opt)
    remembers = False
    for _, p, local, value, options in pairs:
        dtype = remainder_dtype(formats_of(p, options).param)
        if dtype is None:
            local.copy_(value)
            forget_remainder(opt.state.get(p, {}))  # of the weight before
            continue
        remembers = True
        remainder = _fitting(remainder_in(opt.state[p]), p, dtype)
        values = torch.empty_like(local, dtype=torch.float32, memory_format=torch.preserve_format).copy_(value)
        split_weight(values, local, local_view(remainder))
        if remainder is not opt.state[p].get(REMAINDER_KEYS[dtype]):
            forget_remainder(opt.state[p])
            opt.state[p][REMAINDER_KEYS[dtype]] = remainder
    steps_seen: set[int] = set()
    for name, p, _, _, options in pairs:
        state = opt.state.get(p, {})
        starts = "param_ema" in state and float(state.get("step", 0)) == 0
        if starts:
            del state["param_ema"]  # of a weight that will never be stepped
        # The state of some parameters, or half of one, would look whole to whoever saves or loads it.
        if p.requires_grad and (remembers or starts):
            complete_state(name, p, opt.state[p], options, steps_seen)
    torch.autograd.graph.increment_version([p for _, p, *_ in pairs])


def _fitting(remainder: torch.Tensor | None, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A remainder to be overwritten: the present one where it fits, else a new one."""
    if remainder is not None and (remainder.dtype, remainder.device) == (dtype, p.device):
        if same_layout(local_view(remainder), local_view(p)):
            return remainder
    return like(p, dtype)


@torch.inference_mode(False)
@torch.no_grad()
def export_state_dict(opt: FusedOptimizer, target: str) -> dict[str, Any]:
    """See `FusedOptimizer.export_state_dict`."""
    if target != "torch":
        raise ValueError(f"export_state_dict: {target!r}; expected 'torch'")
    for index, group in enumerate(opt.param_groups):
        if group.get("lr_in_momentum"):
            raise ValueError(
                f"export_state_dict: param_groups[{index}] has lr_in_momentum=True: its buffers hold lr times "
                "gradients, those of torch.optim.SGD gradients. Load state_dict() into an optimizer with "
                "lr_in_momentum=True."
            )
    exported = opt.state_dict()
    states: dict[Any, Any] = {}
    for own, packed in zip(opt.param_groups, exported["param_groups"], strict=True):
        for p, key in zip(own["params"], packed["params"], strict=True):
            if key in exported["state"]:
                states[key] = _torch_state(p, exported["state"][key], own)
        for option in (*FURTHER_OPTIONS, LR_WHEN_ADDED, "seed"):
            packed.pop(option, None)
    return {**exported, "state": states}


def _torch_state(p: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What torch's optimizer of this rule keeps of a parameter; 16-bit moments and codes in float32."""
    present = moment_format_in(state)
    if present is None:
        return {}
    if present == "8bit":
        return {"step": state["step"]} | real_moments(p, state)
    result = {"step": state["step"]} if "exp_avg" in state else {}  # torch's SGD does not count
    for key in moment_keys(options, present):
        if state.get(key) is not None:
            is_narrow = state[key].dtype in (torch.bfloat16, torch.float16)
            result[key] = state[key].float() if is_narrow else state[key]
    return result


@torch.inference_mode(False)
@torch.no_grad()
def convert(opt: FusedOptimizer, changes: dict[str, Any]) -> None:
    """See `FusedOptimizer.convert`."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if opt._internals.captured:
        raise RuntimeError("convert: this optimizer's step was captured in a CUDA graph, which updates the old state")
    for index, group in enumerate(opt.param_groups):
        check_used_options(opt.defaults | group | changes, opt.defaults, f"convert: param_groups[{index}]")
    members = [(name, p, options | changes) for name, p, options in _members(opt)]
    for name, p, options in members:  # first all checks, then the first change
        check_formats(name, p, options)
        if opt.state.get(p):
            check_adoptable(name, p, local_param(name, p.detach()), opt.state[p], rule_of(opt.defaults))
    _forget_recasts(opt)
    for options in (opt.defaults, *opt.param_groups):
        for key, value in changes.items():
            if value == FURTHER_OPTIONS[key]:
                options.pop(key, None)
            else:
                options[key] = value
    opt._name_seed()
    steps_seen: set[int] = set()
    for name, p, options in members:
        state = opt.state.get(p, {})
        if not local_state(state):
            continue
        if p.requires_grad or moment_format_in(state) is not None:
            complete_state(name, p, state, options, steps_seen)
        else:  # frozen: moments would be wasted on it
            complete_remainder(name, p, state, remainder_dtype(formats_of(p, options).param))
