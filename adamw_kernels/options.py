"""Options: what the constructor, a parameter group and a loaded state dict may say, and what contradicts itself."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from adamw_kernels.formats import EMA_FORMATS, MOMENT_FORMATS, PARAM_FORMATS
from adamw_kernels.hyperparameters import Hyperparameters, check_hyperparameters

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


def group_hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """A group's hyperparameters, in the order of a HyperRow."""
    (beta1, beta2) = group["betas"]
    further = group.get("max_grad_norm"), group.get("ema_decay")
    return Hyperparameters(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], *further)


def check_options(options: dict[str, Any], where: str) -> None:
    """Refuse hyperparameters out of range (with torch's messages) and options that cannot be met.

    Raises:
        ValueError, RuntimeError: naming the option, its value and what is accepted.
    """
    if options.get("differentiable"):
        raise RuntimeError(
            f"{where}: differentiable=True: the fused update is invisible to autograd. Use torch.optim.AdamW("
            "differentiable=True) to differentiate through the optimizer."
        )
    if "lr" not in options:
        return
    for key, text in (("lr", "learning rate"), ("eps", "epsilon value"), ("weight_decay", "weight_decay value")):
        value = options[key]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {key} must be 1-element, not of shape {tuple(value.shape)}")
        if not 0.0 <= value:
            raise ValueError(f"{where}: Invalid {text}: {value}; expected {key} >= 0")
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"{where}: betas has {len(betas)} entries; expected two")
    for index, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"{where}: Tensor betas[{index}] must be 1-element, not of shape {tuple(beta.shape)}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{where}: Invalid beta parameter at index {index}: {beta}; expected 0 <= beta < 1")
    check_hyperparameters(group_hyperparameters(options), where)
    for key, accepted in FORMAT_OPTIONS.items():
        value = options.get(key, FURTHER_OPTIONS[key])
        if value not in accepted:
            raise ValueError(f"{where}: {key} is {value!r}; expected one of {', '.join(accepted)}")
    check_update_bound(options.get("update_bound", "auto"), f"{where}: update_bound")
    moments = options.get("moment_format", "float32")
    if options["amsgrad"] and moments != "float32":
        raise ValueError(
            f"{where}: amsgrad=True with moment_format={moments!r}: a running maximum of values that are rounded by "
            "chance only ever grows; expected moment_format='float32', or amsgrad=False"
        )
    if options.get("cautious_weight_decay") and not options["decoupled_weight_decay"]:
        raise ValueError(
            f"{where}: cautious_weight_decay=True with decoupled=False: there is no decay of the weight to be cautious "
            "about; expected one or the other"
        )
    if options["fused"] is False:
        raise RuntimeError(f"{where}: fused=False: FusedAdamW has no other implementation. Use torch.optim.AdamW.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError(f"{where}: `fused` and `foreach` cannot be `True` together.")


def check_update_bound(value: Any, what: str) -> None:
    """Refuse what is no bound.

    Raises:
        ValueError: saying what is accepted.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_word = value is None or (isinstance(value, str) and value == "auto")
    if not is_word and not (is_number and value > 0.0):
        raise ValueError(f"{what} is {value!r}; expected 'auto', None or a number above 0")


def check_skip_norm(value: Any) -> None:
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
            f"FusedAdamW: max_skip_norm is {value!r}; expected a finite number above 0, a one-element tensor, or None"
        )
