"""What a parameter group says besides its hyperparameters' values, and what its parameters are called."""

from __future__ import annotations

from typing import Any

from adamw_kernels.options import FURTHER_OPTIONS
from adamw_kernels.rules import rule_of
from adamw_kernels.sharding import description


def traits_of(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of `TensorSpec` that a group's options settle for all its parameters."""
    return dict(
        rule=rule_of(options),
        nesterov=bool(options.get("nesterov")),
        lr_in_momentum=bool(options["lr_in_momentum"]),
        schedule_decay=options["decay_coupling"] == "schedule",
        maximize=bool(options["maximize"]),
        decoupled=bool(options["decoupled_weight_decay"]),
        cautious=bool(options["cautious"]),
        cautious_decay=bool(options["cautious_weight_decay"]),
        clip=options["max_grad_norm"] is not None,
        ema_warmup=options["ema_decay"] is not None and bool(options["ema_warmup"]),
    )


def is_extended(group: dict[str, Any]) -> bool:
    """Whether the group has any of FURTHER_OPTIONS."""
    return not FURTHER_OPTIONS.keys().isdisjoint(group)


def is_coded(group: dict[str, Any]) -> bool:
    """Whether the group asks for moments of 8 bits."""
    return group.get("moment_format") == "8bit" and rule_of(group) == "adamw"


def param_name(group: dict[str, Any], group_index: int, index: int) -> str:
    """The parameter's own name where the user gave names, else its place."""
    names = group.get("param_names")
    place = f"param_groups[{group_index}]['params'][{index}]"
    return f"parameter {names[index]!r} ({place})" if names is not None else place


def describe(groups: list[dict[str, Any]], *, with_plain_tensors: bool = True) -> list[str]:
    """A line a parameter, the same on every process that holds a part of it."""
    return [
        f"{param_name(group, index, i)}: {description(p)}"
        for index, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if with_plain_tensors or hasattr(p, "placements")
    ]
