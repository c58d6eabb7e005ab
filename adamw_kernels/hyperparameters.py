"""Hyperparameters: what a group's values may be, and how they reach the rows that *prepare* reads."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from adamw_kernels.launch_table import LaunchTable

WORDS_PER_HYPER_ROW = 9
HYPER_SOURCE = 8  # word of a HyperRow that says, two bits a field, what each field holds
FROM_VALUE, FROM_FLOAT32, FROM_FLOAT64 = range(3)


class Hyperparameters(NamedTuple):
    """One parameter group's hyperparameters, in the order of a HyperRow: Python floats or one-element tensors.

    Of SGD, beta1 is the momentum, beta2 the dampening, and eps None. None stands for an option that is off.
    """

    lr: float | torch.Tensor
    beta1: float | torch.Tensor
    beta2: float | torch.Tensor
    eps: float | torch.Tensor | None
    weight_decay: float | torch.Tensor
    max_grad_norm: float | torch.Tensor | None = None
    ema_decay: float | torch.Tensor | None = None
    initial_lr: float | torch.Tensor | None = None


HYPERPARAMETERS = Hyperparameters._fields
"""The fields of a HyperRow, in order."""

# Bounds of a float in each of these fields: low <= value < high. The widest finite ones where any value is accepted.
_TINY, _LEAST = sys.float_info.min, -sys.float_info.max
_LOW = (_LEAST, 0.0, 0.0, 0.0, _LEAST, _TINY, 0.0, _TINY)
_HIGH = (math.inf, 1.0, 1.0, math.inf, math.inf, math.inf, 1.0, math.inf)


class HyperparameterRows:
    """Writes the groups' hyperparameters into every table, and keeps tensors among them live.

    A float is written by value. A one-element float32 or float64 tensor on the table's own device is read there by
    each step, through its address. A CPU tensor beside a GPU table is read by the host on each step, which needs no
    synchronisation; a tensor on another GPU is copied over on each step, on the device.

    Attributes:
        written: the objects, eight a group, that the rows now hold. Kept here and not by the optimizer: a wrapper that
            copies an optimizer's `__dict__` shares the rows with it.
    """

    def __init__(self, tables: Sequence[LaunchTable]) -> None:
        """Remember the tables; `write_all` fills them."""
        self._tables = tables
        self.written: list[float | torch.Tensor | None] = []
        self._live: list[Callable[[], bool]] = []
        self._kept_alive: list[torch.Tensor] = []

    def write_all(self, values: Sequence[float | torch.Tensor | None]) -> None:
        """Write every row anew: eight values a group, in the order of HYPERPARAMETERS, already checked.

        None, which stands for an option that is off, leaves its word alone: no flag makes a kernel read it.
        """
        self._live.clear()
        self._kept_alive.clear()
        self.written = [*values]
        for table in self._tables:
            for group in range(len(values) // len(HYPERPARAMETERS)):
                source = 0
                base = group * WORDS_PER_HYPER_ROW
                for field in range(len(HYPERPARAMETERS)):
                    value = values[group * len(HYPERPARAMETERS) + field]
                    if isinstance(value, torch.Tensor):
                        source |= self._bind(table, base + field, value) << (2 * field)
                    elif value is not None:
                        table.hyper_values[base + field] = value
                table.hyper_words[base + HYPER_SOURCE] = source

    def update(self, values: Sequence[float | torch.Tensor | None]) -> bool:
        """Check and write the values that are other objects than those written last.

        Returns:
            False if an option was switched on or off, which no row can express.

        Raises:
            ValueError: a value that `check_hyperparameters` refuses; then no row was written.
        """
        before = self.written
        fields = len(HYPERPARAMETERS)
        # A scheduler changes every group on every step: floats within their bounds are told at a glance.
        changed = [*compress(range(len(values)), map(operator.is_not, values, before))]
        unusual: set[int] = set()  # groups
        rebinds = False
        for i in changed:
            value = values[i]
            if value is None or before[i] is None:
                return False
            if type(value) is not float or not _LOW[i % fields] <= value < _HIGH[i % fields]:
                unusual.add(i // fields)
                rebinds = rebinds or isinstance(value, torch.Tensor)
            rebinds = rebinds or type(before[i]) is not float and isinstance(before[i], torch.Tensor)
        for group in sorted(unusual):
            check_hyperparameters(
                Hyperparameters(*values[group * fields : (group + 1) * fields]),  # type: ignore[arg-type]
                f"param_groups[{group}]",
            )
        if rebinds:
            self.write_all(values)
            return True
        self.written = [*values]
        for table in self._tables:
            words = table.hyper_values
            for i in changed:
                words[i // fields * WORDS_PER_HYPER_ROW + i % fields] = values[i]  # type: ignore[assignment]
        return True

    def _bind(self, table: LaunchTable, position: int, value: torch.Tensor) -> int:
        """Make a tensor's value reach word `position` of a table; what that word then holds."""
        if value.device == table.device and value.dtype in (torch.float32, torch.float64):
            self._kept_alive.append(value)

            dtype = value.dtype

            def point_at_it() -> bool:  # `tensor.data = ...` gives the same tensor other memory, even another dtype
                table.hyper_words[position] = value.data_ptr()
                return value.dtype == dtype and value.device == table.device

            point_at_it()
            self._live.append(point_at_it)
            return FROM_FLOAT32 if dtype == torch.float32 else FROM_FLOAT64
        if value.device.type == "cpu":

            def read_on_host() -> bool:
                table.hyper_values[position] = value.item()
                return True

            read_on_host()
            self._live.append(read_on_host)
            return FROM_VALUE
        mirror = torch.empty((), dtype=torch.float64, device=table.device)
        self._kept_alive.append(mirror)

        def copy_over() -> bool:
            mirror.copy_(value.detach().reshape(()), non_blocking=True)
            return True

        copy_over()
        self._live.append(copy_over)
        table.hyper_words[position] = mirror.data_ptr()
        return FROM_FLOAT64

    def refresh(self) -> bool:
        """Bring over the values or addresses of the tensors among the hyperparameters; False if one no longer fits."""
        return all([read() for read in self._live])


def check_hyperparameters(hyper: Hyperparameters, where: str) -> None:
    """Refuse values with which a step would destroy the weights.

    Tensors on a GPU are checked for their shape alone: reading them would synchronise.

    Raises:
        ValueError: naming the hyperparameter, its value, and what is accepted.
    """
    is_sgd = hyper.eps is None
    for field in HYPERPARAMETERS:
        value: Any = getattr(hyper, field)
        if value is None and field in ("eps", "max_grad_norm", "ema_decay", "initial_lr"):
            continue
        key = {"beta1": "momentum", "beta2": "dampening"}.get(field, field) if is_sgd else field
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 or value.is_complex():
                raise ValueError(
                    f"{where}: {key} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; "
                    "expected a float or a tensor with one real element"
                )
            if value.device.type != "cpu":
                continue
            value = value.item()
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if key == "max_grad_norm":  # infinity: measure, never clip
            if not is_number or not value > 0.0:
                raise ValueError(f"{where}: max_grad_norm is {value!r}; expected a number above 0, or None")
            continue
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{where}: {key} is {value!r}; expected a finite number or a one-element tensor")
        value = float(value)
        if key in ("beta1", "beta2", "ema_decay") and not 0.0 <= value < 1.0:
            raise ValueError(f"{where}: {key} is {value!r}; expected 0 <= {key} < 1")
        if key in ("eps", "momentum") and value < 0.0:
            raise ValueError(f"{where}: {key} is {value!r}; expected {key} >= 0")
        if key == "initial_lr" and value <= 0.0:
            raise ValueError(f"{where}: initial_lr is {value!r}; decay_coupling='schedule' divides by it, expected > 0")
