"""Options: what the constructor, a parameter group and a loaded state dict may say, and what contradicts itself."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch

from adamw_kernels.formats import EMA_FORMATS, MOMENT_FORMATS, PARAM_FORMATS
from adamw_kernels.hyperparameters import check_hyperparameters
from adamw_kernels.rules import LR_WHEN_ADDED, group_hyperparameters, initial_lr_of, rule_of

FURTHER_OPTIONS: dict[str, Any] = {
    "cautious": False,
    "cautious_weight_decay": False,
    "max_grad_norm": None,
    "ema_decay": None,
    "ema_warmup": False,
    "ema_format": "float32",
    "param_format": "auto",
    "moment_format": "float32",
    "update_bound": "auto",
    "decay_coupling": "lr",
    "lr_in_momentum": False,
}
"""Options that torch does not know; a group in which one is missing has this value."""

WHOLE_OPTIONS = frozenset({"backend", "clip_per_group", "max_skip_norm", "process_group", "seed", "skip_nonfinite"})
"""Options that a group cannot have."""

FORMAT_OPTIONS = {
    "param_format": ("auto", *PARAM_FORMATS),
    "moment_format": MOMENT_FORMATS,
    "ema_format": EMA_FORMATS,
}
"""Options that name a storage format, and the names they accept."""

DECAY_COUPLINGS = ("lr", "schedule")

LARGEST_8BIT_RATIO = 21
"""Of |m| to sqrt(v) that 8-bit moments hold whatever their scale; see csrc/moments8.h."""


def check_options(options: dict[str, Any], where: str) -> None:
    """Refuse hyperparameters out of range (with torch's messages) and options that cannot be met.

    Raises:
        ValueError, RuntimeError: naming the option, its value and what is accepted.
    """
    theirs = "torch.optim.AdamW" if rule_of(options) == "adamw" else "torch.optim.SGD"
    if options.get("differentiable"):
        raise RuntimeError(
            f"{where}: differentiable=True: the fused update is invisible to autograd. Use {theirs}("
            "differentiable=True) to differentiate through the optimizer."
        )
    if "lr" not in options:
        return
    for key, text in (("lr", "learning rate"), ("eps", "epsilon value"), ("weight_decay", "weight_decay value")):
        value = options.get(key, 0.0)
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {key} must be 1-element, not of shape {tuple(value.shape)}")
        if not 0.0 <= value:
            raise ValueError(f"{where}: Invalid {text}: {value}; expected {key} >= 0")
    (_check_adamw if rule_of(options) == "adamw" else _check_sgdw)(options, where)
    check_hyperparameters(group_hyperparameters(options), where)
    for key, accepted in FORMAT_OPTIONS.items():
        value = options.get(key, FURTHER_OPTIONS[key])
        if value not in accepted:
            raise ValueError(f"{where}: {key} is {value!r}; expected one of {', '.join(accepted)}")
    check_update_bound(options.get("update_bound", "auto"), f"{where}: update_bound")
    _check_decay(options, where)
    if options["fused"] is False:
        raise RuntimeError(f"{where}: fused=False: there is no other implementation. Use {theirs}.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError(f"{where}: `fused` and `foreach` cannot be `True` together.")


def _check_adamw(options: dict[str, Any], where: str) -> None:
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"{where}: betas has {len(betas)} entries; expected two")
    for index, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"{where}: Tensor betas[{index}] must be 1-element, not of shape {tuple(beta.shape)}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{where}: Invalid beta parameter at index {index}: {beta}; expected 0 <= beta < 1")
    moments = options.get("moment_format", "float32")
    if options["amsgrad"] and moments != "float32":
        raise ValueError(
            f"{where}: amsgrad=True with moment_format={moments!r}: a running maximum of values that are rounded by "
            "chance only ever grows; expected moment_format='float32', or amsgrad=False"
        )
    check_8bit_betas(options, where)


def _check_sgdw(options: dict[str, Any], where: str) -> None:
    for key in ("momentum", "dampening"):
        value = options[key]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {key} must be 1-element, not of shape {tuple(value.shape)}")
    if not options["momentum"] >= 0.0:
        raise ValueError(f"{where}: Invalid momentum value: {options['momentum']}; expected momentum >= 0")
    if options["nesterov"] and not (options["momentum"] > 0.0 and options["dampening"] == 0.0):
        raise ValueError(
            f"{where}: nesterov=True with momentum={options['momentum']} and dampening={options['dampening']}: "
            "Nesterov momentum requires a momentum and zero dampening; expected momentum > 0 and dampening=0"
        )
    if options.get("moment_format") == "8bit":
        raise ValueError(
            f"{where}: moment_format='8bit': its codes hold a first moment beside a second one, and SGD has none; "
            "expected 'float32' or 'bfloat16'"
        )


def _check_decay(options: dict[str, Any], where: str) -> None:
    if options.get("cautious_weight_decay") and not options["decoupled_weight_decay"]:
        raise ValueError(
            f"{where}: cautious_weight_decay=True with decoupled=False: there is no decay of the weight to be cautious "
            "about; expected one or the other"
        )
    coupling = options.get("decay_coupling", "lr")
    if coupling not in DECAY_COUPLINGS:
        raise ValueError(f"{where}: decay_coupling is {coupling!r}; expected one of {', '.join(DECAY_COUPLINGS)}")
    if coupling == "lr":
        return
    if not options["decoupled_weight_decay"]:
        raise ValueError(
            f"{where}: decay_coupling='schedule' with decoupled=False: there is no decay of the weight to couple; "
            "expected one or the other"
        )
    initial_lr = initial_lr_of({LR_WHEN_ADDED: options["lr"]} | options)
    if initial_lr is None:
        raise ValueError(f"{where}: initial_lr is None; decay_coupling='schedule' divides by it, expected > 0")
    on_gpu = isinstance(initial_lr, torch.Tensor) and initial_lr.device.type != "cpu"
    if not on_gpu and not initial_lr > 0.0:  # reading it would synchronise
        raise ValueError(
            f"{where}: decay_coupling='schedule' with an initial lr of {float(initial_lr)}: the decay is lr over the "
            "initial lr times weight_decay; expected an initial lr > 0 (let a schedule warm up from there), or "
            "decay_coupling='lr'"
        )


def check_8bit_betas(options: dict[str, Any], where: str) -> None:
    """Refuse betas whose first updates 8-bit moments could not hold: there |m| / sqrt(v) is this ratio.

    Tensors are not looked at: reading them would synchronise.

    Raises:
        ValueError: naming the betas and the way out.
    """
    beta1, beta2 = options["betas"]
    if options.get("moment_format") != "8bit" or isinstance(beta1, torch.Tensor) or isinstance(beta2, torch.Tensor):
        return
    if 1.0 - beta1 > LARGEST_8BIT_RATIO * math.sqrt(1.0 - beta2):
        raise ValueError(
            f"{where}: moment_format='8bit' with betas=({beta1}, {beta2}): first moments would be "
            f"{(1.0 - beta1) / math.sqrt(1.0 - beta2):.3g} times the root of second ones, and 8 bits hold "
            f"{LARGEST_8BIT_RATIO}; expected a smaller beta2, a larger beta1, or moment_format='bfloat16'"
        )


def check_update_bound(value: Any, what: str) -> None:
    """Refuse what is no bound.

    Raises:
        ValueError: saying what is accepted.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_word = value is None or (isinstance(value, str) and value == "auto")
    if not is_word and not (is_number and value > 0.0):
        raise ValueError(f"{what} is {value!r}; expected 'auto', None or a number above 0")


def check_skip_norm(value: Any, where: str) -> None:
    """Refuse a limit that no norm could exceed, or that every norm would.

    Raises:
        ValueError: saying what is accepted.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        if value.device.type != "cpu":  # reading it would synchronise
            return
        value = value.item()
    if value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0.0 < value < math.inf:
        raise ValueError(
            f"{where}: max_skip_norm is {value!r}; expected a finite number above 0, a one-element tensor, or None"
        )


def check_seed(value: Any, what: str) -> None:
    """Refuse what is no integer; of one, the last 64 bits count.

    Raises:
        TypeError: saying what it is.
    """
    try:
        operator.index(value)  # of a tensor, too: checkpoints may have made one of it
    except TypeError:
        pass
    else:
        if not isinstance(value, bool):
            return
    raise TypeError(f"{what} is {value!r}; expected an int, of which the last 64 bits count")


def check_used_options(options: dict[str, Any], defaults: dict[str, Any], where: str) -> None:
    """`check_options` for a group in the middle of a run, which may say more than a new one.

    A schedule may have made lr or weight_decay negative, and a step allows that; how a torch optimizer that the group
    comes from was told to compute makes no difference.

    Raises:
        ValueError, RuntimeError: as `check_options`.
    """
    check_options(options | {key: defaults[key] for key in ("lr", "weight_decay", "foreach", "fused")}, where)
    check_hyperparameters(group_hyperparameters(options), where)
