"""The host's half of a warm step: read every gradient's address, and notice anything else that changed.

The compiled module `_tensor_watch` does this natively (`csrc/tensor_watch.cpp`); the class here is its twin for
machines without it, several times slower. Neither keeps a tensor alive from step to step. State tensors are remembered
by weak reference, parameters by identity: `torch.utils.swap_tensors` (`module.to()` of DTensors) refuses a tensor that
has weak references. A new parameter at an old one's address finds no state there, or fits in all else that is compared.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import weakref
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

# What a launch table may refer to of a parameter's state.
STATE_KEYS = (
    "step",
    "exp_avg",
    "momentum_buffer",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "param_ema",
    "param_remainder",
    "param_remainder_8bit",
    "exp_avg_code",
    "exp_avg_sq_code",
    "moment_groups",
    "exp_avg_sq_scale",
)

# Stands for the address of a gradient without elements: see kEmptyGradient in csrc/tensor_watch.cpp.
EMPTY_GRADIENT = 16

# Values of a slot besides an address: the parameter has no row in a table; it has one, but `odd` reports it always.
NO_ROW = 0
ALWAYS_ODD = -1

# How many parameters are worth another thread's while (some 50 microseconds of looking at them). torch wakes all that
# it has: each must come to an eighth as many.
PARAMS_PER_THREAD = 512


class TensorWatch(Protocol):
    """What both implementations offer."""

    def sweep(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> Sequence[int] | None:
        """Write every slot; None if anything but gradients' addresses changed. Torch functions must be disabled.

        Parameters that have a gradient, and those gradients, are held until `release`.

        Returns:
            The positions, counted over all parameters, of what must be looked at: a gradient in another layout or
            sharding or of another kind, any gradient of a parameter whose slot is ALWAYS_ODD (or -1 - position, where
            it has none).
        """

    def bump_versions(self) -> None:
        """Tell autograd that every parameter of the last sweep which has a gradient is written.

        Raises:
            RuntimeError: as torch does where an inference tensor may not be written.
        """

    def release(self) -> None:
        """Let the tensors of the last sweep go."""


@functools.cache
def load_native() -> tuple[ModuleType | None, str]:
    """The compiled watch, or None and why not."""
    hint = "build it again with `pip install .` in a checkout of adamw_kernels, beside the torch that it shall run with"
    try:
        native = importlib.import_module("adamw_kernels._tensor_watch")
    except ImportError as error:
        return None, f"the compiled module adamw_kernels._tensor_watch cannot be imported ({error}); {hint}"
    if native.torch_version != torch.__version__:
        return None, f"adamw_kernels._tensor_watch was built for torch {native.torch_version}; {hint}"
    return native, ""


class GroupGuard(Protocol):
    """Tells whether an optimizer's groups were written since they were read."""

    def remember(self, groups: list[dict[str, Any]]) -> None:
        """Call it before they are read."""

    def are_unwritten(self, groups: list[dict[str, Any]]) -> bool:
        """Whether these are the same groups, and no option of theirs was written; what a tensor holds is no option."""


class _NeverSure:
    """A `GroupGuard` that always has groups read again: in Python, finding out would cost as much."""

    def remember(self, groups: list[dict[str, Any]]) -> None:
        """Nothing."""

    def are_unwritten(self, groups: list[dict[str, Any]]) -> bool:
        """No."""
        return False


def guard_groups() -> GroupGuard:
    """One that remembers nothing yet."""
    native, _ = load_native()
    guard: GroupGuard = _NeverSure() if native is None else native.GroupGuard()
    return guard


def watch_tensors(
    param_groups: list[dict[str, Any]],
    state: Mapping[Any, Any],
    slots: Sequence[int],
    grad_dtypes: Sequence[torch.dtype | None],
) -> TensorWatch:
    """Remember every parameter and state tensor as it is now.

    Args:
        param_groups: the optimizer's.
        state: the optimizer's, a dict from parameter to dict.
        slots: per parameter, in order: host address of its gradient's address, NO_ROW or ALWAYS_ODD.
        grad_dtypes: per parameter: which its gradient must have.
    """
    native, _ = load_native()
    lists = all(isinstance(group["params"], list) for group in param_groups)  # what native code reads
    if native is not None and lists and isinstance(state, dict):
        try:
            watch: TensorWatch = native.TensorWatch(
                param_groups, state, STATE_KEYS, slots, grad_dtypes, PARAMS_PER_THREAD
            )
            return watch
        except (ValueError, RuntimeError):
            pass  # a tensor whose memory cannot be read as torch reads its own
    return PythonTensorWatch(param_groups, state, slots, grad_dtypes)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, and the same strides in every dimension that has more than one element."""
    shape, strides, others = a.shape, a.stride(), b.stride()
    if shape != b.shape:
        return False
    if strides == others:
        return True
    return a.numel() == 0 or all(x == y for size, x, y in zip(shape, strides, others, strict=True) if size != 1)


class _Seen:
    """One state tensor, as it was."""

    def __init__(self, tensor: torch.Tensor, readable: bool) -> None:
        self.ref = weakref.ref(tensor)
        self.readable = readable
        if readable:
            self.data = _local(tensor).data_ptr()
            self.dtype = tensor.dtype

    def unchanged(self, tensor: object) -> bool:
        if self.ref() is not tensor or not isinstance(tensor, torch.Tensor):
            return False
        return not self.readable or (_local(tensor).data_ptr() == self.data and tensor.dtype == self.dtype)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a DTensor's own shard."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _memory(param: torch.Tensor) -> tuple[Any, ...]:
    """What a launch table relies on of a parameter."""
    local = _local(param)
    return local.data_ptr(), local.dtype, local.shape, local.stride(), local.device, _sharding(param)


def _sharding(tensor: torch.Tensor) -> Any:
    """Mesh and placements of a DTensor; None for any other tensor."""
    spec = getattr(tensor, "_spec", None)
    return None if spec is None else (spec.mesh, spec.placements)


class PythonTensorWatch:
    """`TensorWatch` in Python: same arguments, same answers."""

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
        slots: Sequence[int],
        grad_dtypes: Sequence[torch.dtype | None],
    ) -> None:
        """Take the snapshot."""
        params = [p for group in param_groups for p in group["params"]]
        self._group_sizes = [len(group["params"]) for group in param_groups]
        self._slots = [ctypes.c_int64.from_address(slot) if slot > 0 else slot for slot in slots]
        self._ids = [id(p) for p in params]
        self._memory = [_memory(p) if slot > 0 else None for p, slot in zip(params, slots, strict=True)]
        self._grad_dtypes = list(grad_dtypes)
        slot_of = {id(p): slot for p, slot in zip(params, slots, strict=True)}
        self._state: list[tuple[int, list[tuple[str, _Seen]]]] = []
        for key, entry in state.items():
            slot = slot_of.get(id(key), NO_ROW)
            ours = isinstance(entry, dict) and slot != NO_ROW
            watched = [name for name in STATE_KEYS if ours and isinstance(entry.get(name), torch.Tensor)]
            self._state.append((id(key), [(name, _Seen(entry[name], slot > 0)) for name in watched]))
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def sweep(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> Sequence[int] | None:
        """See `TensorWatch.sweep`."""
        self._held = []
        odd = self._sweep_params(param_groups) if self._state_unchanged(state) else None
        if odd is None:
            self._held = []
        return odd

    def bump_versions(self) -> None:
        """See `TensorWatch.bump_versions`."""
        torch.autograd.graph.increment_version([p for p, _ in self._held])

    def release(self) -> None:
        """See `TensorWatch.release`."""
        self._held = []

    def _state_unchanged(self, state: Mapping[Any, Any]) -> bool:
        if len(state) != len(self._state):
            return False
        for (key, entry), (seen_key, watched) in zip(state.items(), self._state, strict=True):
            if id(key) != seen_key:
                return False
            if not all(name in entry and seen.unchanged(entry[name]) for name, seen in watched):
                return False
        return True

    def _sweep_params(self, param_groups: list[dict[str, Any]]) -> list[int] | None:
        if [len(group["params"]) for group in param_groups] != self._group_sizes:
            return None
        odd: list[int] = []
        members: list[torch.Tensor] = [p for group in param_groups for p in group["params"]]
        for i, p in enumerate(members):
            if id(p) != self._ids[i]:
                return None
            slot, grad = self._slots[i], p.grad
            if slot == NO_ROW and grad is not None:
                return None
            if slot == NO_ROW:
                continue
            if grad is None:
                if isinstance(slot, ctypes.c_int64):
                    slot.value = 0
                else:
                    odd.append(-1 - i)
                continue
            if isinstance(slot, ctypes.c_int64):
                if _memory(p) != self._memory[i]:
                    return None
                local, local_grad = _local(p), _local(grad)
                if type(local_grad) is not torch.Tensor or _sharding(grad) != _sharding(p):
                    odd.append(i)
                else:
                    kind = local_grad.dtype, local_grad.device, local_grad.shape
                    if local_grad.layout != torch.strided or kind != (self._grad_dtypes[i], local.device, local.shape):
                        return None
                    if not same_layout(local_grad, local) or local_grad.is_neg():
                        odd.append(i)
                    slot.value = local_grad.data_ptr() if local_grad.numel() else EMPTY_GRADIENT
            else:
                odd.append(i)
            self._held.append((p, grad))
        return odd
