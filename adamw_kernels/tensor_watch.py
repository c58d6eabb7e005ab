"""The host's half of a warm step: read every gradient's address, and notice anything else that changed.

The compiled module does this natively (`csrc/tensor_watch.cpp`); the class here is its twin for machines without
it, several times slower. Neither keeps a tensor alive. State tensors are remembered by weak
reference, parameters by identity: `torch.utils.swap_tensors` (`module.to()` of DTensors) refuses a tensor that has weak
references. A new parameter at an old one's address finds no state there, or fits in all else that is compared.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from adamw_kernels.backends import native_module
from adamw_kernels.formats import DLPACK_DTYPES

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

Sweep = tuple[list[torch.Tensor], list[torch.Tensor], list[int]]


class TensorWatch(Protocol):
    """What both implementations offer."""

    def sweep(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> Sweep | None:
        """Write every slot; None if anything but gradients' addresses changed. Torch functions must be disabled.

        Returns:
            (params, grads, odd): the parameters that have a gradient, those gradients, and the positions, counted
            over all parameters, of what must be looked at: a gradient in another layout or sharding or of another
            type, any gradient of a parameter whose slot is ALWAYS_ODD (or -1 - position, where it has none).
        """


def watch_tensors(
    param_groups: list[dict[str, Any]], state: Mapping[Any, Any], slots: Sequence[int], grad_dtypes: Sequence[int]
) -> TensorWatch:
    """Remember every parameter and state tensor as it is now.

    Args:
        param_groups: the optimizer's.
        state: the optimizer's, a dict from parameter to dict.
        slots: per parameter, in order: host address of its gradient's address, NO_ROW or ALWAYS_ODD.
        grad_dtypes: per parameter: value of DLPACK_DTYPES that its gradient must have.
    """
    native = native_module()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    lists = all(isinstance(group["params"], list) for group in param_groups)  # what native code reads
    if native is not None and exchange is not None and lists:
        try:
            watch: TensorWatch = native.TensorWatch(
                exchange, torch.Tensor, param_groups, state, slots, grad_dtypes, _address_function()
            )
            return watch
        except ValueError:
            pass  # a torch whose native entry points are others, or a tensor that DLPack cannot describe
    return PythonTensorWatch(param_groups, state, slots, grad_dtypes)


def _address_function() -> int:
    """Where torch keeps the C function that tells a tensor object's address; 0 in a torch that has none.

    Made for the C++ that torch's compiler writes and builds apart from torch, as this package is.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    address = getattr(guards, "_torchinductor_pyobject_tensor_data_ptr", 0)
    return address if isinstance(address, int) else 0


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
        grad_dtypes: Sequence[int],
    ) -> None:
        """Take the snapshot."""
        params = [p for group in param_groups for p in group["params"]]
        self._group_sizes = [len(group["params"]) for group in param_groups]
        self._slots = [ctypes.c_int64.from_address(slot) if slot > 0 else slot for slot in slots]
        self._ids = [id(p) for p in params]
        self._memory = [_memory(p) if slot > 0 else None for p, slot in zip(params, slots, strict=True)]
        by_code = {code: dtype for dtype, code in DLPACK_DTYPES.items()}
        self._grad_dtypes = [by_code.get(code) for code in grad_dtypes]
        slot_of = {id(p): slot for p, slot in zip(params, slots, strict=True)}
        self._state: list[tuple[int, list[tuple[str, _Seen]]]] = []
        for key, entry in state.items():
            slot = slot_of.get(id(key), NO_ROW)
            ours = isinstance(entry, dict) and slot != NO_ROW
            watched = [name for name in STATE_KEYS if ours and isinstance(entry.get(name), torch.Tensor)]
            self._state.append((id(key), [(name, _Seen(entry[name], slot > 0)) for name in watched]))

    def sweep(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> Sweep | None:
        """See `TensorWatch.sweep`."""
        if not self._state_unchanged(state):
            return None
        return self._sweep_params(param_groups)

    def _state_unchanged(self, state: Mapping[Any, Any]) -> bool:
        if len(state) != len(self._state):
            return False
        for (key, entry), (seen_key, watched) in zip(state.items(), self._state, strict=True):
            if id(key) != seen_key:
                return False
            if not all(name in entry and seen.unchanged(entry[name]) for name, seen in watched):
                return False
        return True

    def _sweep_params(self, param_groups: list[dict[str, Any]]) -> Sweep | None:
        if [len(group["params"]) for group in param_groups] != self._group_sizes:
            return None
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
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
            params.append(p)
            grads.append(grad)
        return params, grads, odd
