"""`param_copy=`: 16-bit copies of CPU weights, written in the pass that updates the weights.

Where a CPU holds float32 weights and a GPU computes with 16-bit ones (ZeRO-Offload), each step is followed by a cast
into the memory that is sent to the GPU. Here the step writes that memory itself, while the weights are in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adamw_kernels.functional import local_view
from adamw_kernels.tensor_watch import same_layout

COPY_DTYPES = (torch.bfloat16, torch.float16)


class ParamCopies:
    """The copies that an optimizer's parameters have. Kept alive here, part of no state dict."""

    def __init__(self) -> None:
        """None yet."""
        self._copies: dict[torch.Tensor, torch.Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._copies)

    def add(self, params: Sequence[torch.Tensor], copies: Any, where: str) -> None:
        """Check copies and fill them with their parameters' values, rounded to nearest even.

        Args:
            params: whose.
            copies: one a parameter, in order, None where there is none; or by parameter.
            where: what to call them in an error.

        Raises:
            ValueError, TypeError: naming the copy; then none is added or written.
        """
        pairs = _paired(params, copies, where)
        for name, p, copy in pairs:
            _check(name, p, copy)
        self._copies.update((p, copy) for _, p, copy in pairs)
        with torch.no_grad():
            for _, p, copy in pairs:
                local_view(copy).copy_(local_view(p))

    def write(self) -> None:
        """Write every copy anew."""
        with torch.no_grad():
            for p, copy in self._copies.items():
                local_view(copy).copy_(local_view(p))

    def of(self, name: str, p: torch.Tensor) -> torch.Tensor | None:
        """The local memory of a parameter's copy, or None.

        Raises:
            ValueError, TypeError: it does not fit any more.
        """
        if p not in self._copies:
            return None
        _check(f"param_copy of {name}", p, self._copies[p])
        return local_view(self._copies[p])

    def addresses(self) -> list[int]:
        """Where they all are; a plan no longer fits where one has moved (its `.data` was replaced, say)."""
        return [local_view(copy).data_ptr() for copy in self._copies.values()]


def _paired(params: Sequence[torch.Tensor], copies: Any, where: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    if isinstance(copies, Mapping):
        known = {id(p) for p in params}
        for p in copies:
            if id(p) not in known:
                raise ValueError(
                    f"{where} names a tensor of shape {tuple(p.shape)} that is no parameter of this "
                    "optimizer; expected its parameters as keys"
                )
        listed = [copies.get(p) for p in params]
    else:
        listed = [*copies]
        if len(listed) != len(params):
            raise ValueError(
                f"{where} has {len(listed)} entries beside {len(params)} parameters; expected one a parameter, None "
                "where there is no copy"
            )
    return [
        (f"{where}[{i}]", p, copy) for i, (p, copy) in enumerate(zip(params, listed, strict=True)) if copy is not None
    ]


def _check(name: str, p: torch.Tensor, copy: Any) -> None:
    if not isinstance(copy, torch.Tensor):
        raise TypeError(f"{name} is a {type(copy).__name__}; expected a bfloat16 or float16 tensor")
    local, of_copy = local_view(p), local_view(copy)
    if of_copy.dtype not in COPY_DTYPES or local.dtype == torch.float64:
        raise TypeError(
            f"{name} is {of_copy.dtype} beside a {local.dtype} parameter; expected bfloat16 or float16 beside float32, "
            "bfloat16 or float16"
        )
    if p.is_complex():
        raise TypeError(f"{name} belongs to a {p.dtype} parameter; expected a real one")
    if local.device.type != "cpu" or of_copy.device.type != "cpu":
        raise ValueError(
            f"{name} is on {of_copy.device}, its parameter on {local.device}; expected both on the CPU (pinned memory, "
            "say, from which they are sent on). A GPU's weights are read there as they are: use a 16-bit parameter "
            "with param_format='split32'."
        )
    if not same_layout(of_copy, local):
        raise ValueError(
            f"{name} has shape {tuple(of_copy.shape)} and strides {of_copy.stride()}, its parameter "
            f"{tuple(local.shape)} and {local.stride()}; expected the same. Use torch.empty_like(param, dtype=...)."
        )
