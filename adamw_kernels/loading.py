"""Loading a state dict: all of it is checked before anything is replaced, and every tensor keeps its dtype."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, StateDict

from adamw_kernels.formats import remainder_dtype
from adamw_kernels.functional import local_view
from adamw_kernels.groups import param_name
from adamw_kernels.options import FURTHER_OPTIONS, check_seed, check_used_options
from adamw_kernels.rules import INITIAL_LRS, initial_lr_of, rule_of
from adamw_kernels.state import (
    BUFFER,
    check_adoptable,
    check_formats,
    formats_of,
    moment_format_in,
    remainder_in,
    unpacked,
)

if TYPE_CHECKING:
    from adamw_kernels.optimizer import FusedOptimizer


class _Shielded:
    """A state value on its way through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Loading:
    """One call of `FusedOptimizer.load_state_dict`: what torch's own method is preceded and followed by."""

    def __init__(self, opt: FusedOptimizer) -> None:
        """Nothing is looked at before `shield`."""
        self._opt = opt
        self._kept: list[dict[str, Any]] = []  # of each group, options that the loaded one does not name

    def shield(self, _: Optimizer, loaded: StateDict) -> StateDict:
        """Check what is loaded and hide it from torch's casts.

        Raises:
            ValueError, TypeError, RuntimeError: an option or a state that a step would refuse.
            RuntimeError: where parameters are sharded, that of another rank.
        """
        own, groups = self._opt.param_groups, loaded["param_groups"]
        error: Exception | None = None
        if [len(group["params"]) for group in own] == [len(group["params"]) for group in groups]:  # else torch raises
            self._kept = [
                {key: ours[key] for key in (*FURTHER_OPTIONS, "seed") if key in ours and key not in group}
                | ({} if initial_lr_of(group) is not None else {key: ours[key] for key in INITIAL_LRS if key in ours})
                for ours, group in zip(own, groups, strict=True)
            ]
            try:
                self._check(groups, loaded["state"])
            except Exception as found:
                error = found
        self._hear_of_others(error)
        if error is not None:
            raise error
        states = {
            key: {name: _Shielded(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
            for key, entry in loaded["state"].items()
        }
        return {**loaded, "state": states}

    def unshield(self, _: Optimizer) -> None:
        """Give the groups and states that torch's method has put in place what it left out or hid."""
        internals = self._opt._internals
        for group, options in zip(self._opt.param_groups, self._kept, strict=True):
            group.update(options)
            if "seed" in group:
                group["seed"] = int(group["seed"])
                internals.options = dataclasses.replace(internals.options, seed=group["seed"])
        self._opt._name_seed()
        for p, entry in self._opt.state.items():
            if not isinstance(entry, dict):
                continue
            for name, value in entry.items():
                if isinstance(value, _Shielded):
                    entry[name] = _copy_to(p.device if isinstance(p, torch.Tensor) else None, value.value)
            entry.update(unpacked(entry))

    def _check(self, groups: list[dict[str, Any]], states: dict[Any, Any]) -> None:
        defaults = self._opt.defaults
        rule = rule_of(defaults)
        for index, group in enumerate(groups):
            if {"betas", "momentum"} & group.keys() and rule_of(group) != rule:
                raise ValueError(
                    f"loaded param_groups[{index}] is of an optimizer of another rule ({rule} is this one's); expected "
                    f"the state dict of a {type(self._opt).__name__} or of torch's optimizer of that kind"
                )
        after = [FURTHER_OPTIONS | defaults | group | kept for group, kept in zip(groups, self._kept, strict=True)]
        for index, options in enumerate(after):
            where = f"loaded param_groups[{index}]"
            check_used_options(options, defaults, where)
            if "seed" in options:
                check_seed(options["seed"], f"{where}: seed")
        incomplete: list[tuple[str, torch.Tensor]] = []
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for name, p, index, key in self._members(groups):
                check_formats(name, p, after[index])
                state = states.get(key)
                if not isinstance(state, dict):
                    continue
                check_adoptable(name, p, local_view(p), state, rule)
                if self._kept[index].get("lr_in_momentum") and state.get(BUFFER) is not None:
                    raise ValueError(
                        f"the loaded {BUFFER} of {name} holds gradients, and the group's lr_in_momentum=True expects "
                        "lr times gradients; expected a state dict of an optimizer with lr_in_momentum=True, or "
                        "lr_in_momentum=False to load it into"
                    )
                # torch's checkpoints know of no remainder and name no format.
                if "param_format" in groups[index] and _lacks_remainder(p, state, after[index]):
                    incomplete.append((name, p))
        for name, p in incomplete:
            warnings.warn(
                f"the loaded state of {name} has moments but no param_remainder, the rest of a 16-bit weight that its "
                f"group's param_format keeps: the weight goes on from its {p.dtype} value. load_fp32_weights() brings "
                "the rest, if it was saved.",
                stacklevel=2,
            )

    def _hear_of_others(self, error: Exception | None) -> None:
        """Raise together, where parameters are sharded: a rank that went on alone would wait for the others for ever.

        What is loaded is not the same everywhere: with `broadcast_from_rank0` only the first rank sees what the state
        has too much. All ranks of a mesh must load together, as they must step.
        """
        params = [p for group in self._opt.param_groups for p in group["params"] if hasattr(p, "placements")]
        meshes = {id(p.device_mesh): p.device_mesh for p in params}.values()
        found = {g.group_name: g for mesh in meshes if mesh.get_coordinate() for g in mesh.get_all_groups()}
        # In one order for all, so that no two ranks wait for each other; and back, so that all hear of it.
        shared = [found[name] for name in sorted(found) if found[name].size() > 1]
        if not shared:
            return
        failed = torch.tensor(float(error is not None), device=params[0].device)
        for group in (*shared, *reversed(shared[:-1])):
            torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
        if not failed:
            return
        rank = torch.distributed.get_rank()
        said = None if error is None else f"rank {rank} cannot load its state, so no rank does: {error}"
        for group in shared:
            everybody: list[str | None] = [None] * group.size()
            torch.distributed.all_gather_object(everybody, said, group=group)
            said = said or next(filter(None, everybody), None)
        if error is None:
            raise RuntimeError(said)

    def _members(self, groups: list[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor, int, Any]]:
        """(name, own parameter, index of its group, key of its loaded state), in order."""
        for index, (own, group) in enumerate(zip(self._opt.param_groups, groups, strict=True)):
            for position, (p, key) in enumerate(zip(own["params"], group["params"], strict=True)):
                yield param_name(own, index, position), p, index, key


def _lacks_remainder(p: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a weight that was stepped comes without the rest that its format remembers."""
    remembers = remainder_dtype(formats_of(p, options).param) is not None
    return remembers and moment_format_in(state) is not None and remainder_in(state) is None


def _copy_to(device: torch.device | None, value: Any) -> Any:
    """A copy of a state value, its tensors on `device` (None: where they are) in their own dtypes."""
    if isinstance(value, torch.Tensor):
        # Nothing can be copied from meta; the next step says so, and names the parameter.
        return value.detach() if value.is_meta else value.detach().to(device=device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: _copy_to(device, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_to(device, item) for item in value)
    return copy.deepcopy(value)
