"""The update rules on the host: which options of a parameter group each reads, and which state it keeps.

"adamw" is Adam with decoupled or L2 decay, "sgdw" stochastic gradient descent with either. What they compute stands in
`csrc/rule.h`. An optimizer has one rule; its groups have the options of torch's own optimizer of that kind.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from adamw_kernels.hyperparameters import Hyperparameters

# A group's hyperparameters, then its options that shape the plan.
_adamw_options = operator.itemgetter(
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"
)
_sgdw_options = operator.itemgetter(
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "decoupled_weight_decay"
)


LR_WHEN_ADDED = "lr_when_added"
"""Option of a group whose decay follows the schedule, and which no schedule has been at yet."""


INITIAL_LRS = ("initial_lr", LR_WHEN_ADDED)
"""Options that say the same, the first before the second."""


def initial_lr_of(group: dict[str, Any]) -> Any:
    """The lr at which the schedule's multiplier is 1, or None: `initial_lr`, else the group's lr when it was added.

    The latter has a name of its own: under torch's, every schedule would take it for an earlier one's and begin there,
    instead of at the group's present lr, or at the one that it is given (CyclicLR).
    """
    return group["initial_lr"] if "initial_lr" in group else group.get(LR_WHEN_ADDED)


def rule_of(options: dict[str, Any]) -> str:
    """The rule whose options a group has."""
    return "adamw" if "betas" in options else "sgdw"


def has_buffer(options: dict[str, Any]) -> bool:
    """Whether SGD keeps a momentum buffer. Without momentum it has no state but the step."""
    momentum = options["momentum"]
    return isinstance(momentum, torch.Tensor) or momentum != 0.0


def group_hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """A group's hyperparameters, in the order of a HyperRow; the eps of SGD is None."""
    return Hyperparameters(*read_groups([group], [True])[0])


def read_groups(groups: Sequence[dict[str, Any]], extended: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Every group's hyperparameters, and all else that shapes a plan, in one list each.

    Args:
        groups: of one optimizer.
        extended: of each, whether it has options that torch does not know. Without, it costs 0.3 us.
    """
    if groups and rule_of(groups[0]) == "sgdw":
        return _read_sgdw(groups)
    structure: list[Any] = []
    hypers: list[Any] = []
    for group, more in zip(groups, extended, strict=True):
        lr, (beta1, beta2), eps, weight_decay, *shape = _adamw_options(group)
        structure += shape
        if more:
            hypers += (lr, beta1, beta2, eps, weight_decay, *_further_hyperparameters(group))
            structure += _further_structure(group)
        else:  # the usual case, of possibly hundreds of groups
            hypers += (lr, beta1, beta2, eps, weight_decay, None, None, None)
    return hypers, structure


def _read_sgdw(groups: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    structure: list[Any] = []
    hypers: list[Any] = []
    for group in groups:
        lr, momentum, dampening, weight_decay, *shape = _sgdw_options(group)
        hypers += (lr, momentum, dampening, None, weight_decay, *_further_hyperparameters(group))
        structure += (*shape, has_buffer(group), *_further_structure(group))
    return hypers, structure


def _further_hyperparameters(group: dict[str, Any]) -> tuple[Any, ...]:
    get = group.get
    initial_lr = initial_lr_of(group) if get("decay_coupling") == "schedule" else None
    return get("max_grad_norm"), get("ema_decay"), initial_lr


def _further_structure(group: dict[str, Any]) -> tuple[Any, ...]:
    """What else shapes the plan; None where a group does not say, which is another way to say the default."""
    get = group.get
    return (
        *(get("cautious"), get("cautious_weight_decay"), get("ema_warmup"), get("ema_format")),
        *(get("param_format"), get("moment_format"), get("update_bound", "auto")),
        *(get("decay_coupling"), get("lr_in_momentum"), get("seed")),
    )


def moment_keys(options: dict[str, Any], moment_format: str) -> tuple[str, ...]:
    """Under which keys a step finds its moments: the first, the second, with amsgrad its maximum.

    Args:
        options: of the parameter's group.
        moment_format: of this parameter's moments.
    """
    if rule_of(options) == "sgdw":
        return ("momentum_buffer",) if has_buffer(options) else ()
    keys = ("exp_avg_code", "exp_avg_sq_code") if moment_format == "8bit" else ("exp_avg", "exp_avg_sq")
    return (*keys, "max_exp_avg_sq") if options["amsgrad"] else keys
