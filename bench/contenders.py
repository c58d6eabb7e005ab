"""Who is measured: our backends and the peers, each with a reason where it cannot run.

A new peer is one entry in `CONTENDERS`: how to build it, where it runs, what its kernels are called. Whether it is
available is never declared but tried: it must build and step one small tensor of the device and dtype asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

ParamGroups = list[dict[str, Any]]
Optimizer = torch.optim.Optimizer

# The same for everybody; lr and weight_decay come with each group.
BETAS = (0.9, 0.95)
EPS = 1e-8

BACKEND_VARIABLE = "ADAMW_KERNELS_BACKEND"


def do_nothing(*args: object, **kwargs: object) -> None:
    """Stands in for a kernel that writes its results into its arguments."""


def first_argument(first: object, *args: object, **kwargs: object) -> object:
    """Stands in for a kernel that returns tensors shaped like its first argument."""
    return first


@dataclass(frozen=True)
class Contender:
    """One optimizer implementation.

    Attributes:
        name: How rows and the command line call it.
        title: How figures call it.
        build: Makes the optimizer from parameter groups that carry their own lr and weight_decay, and from further
            options of its constructor by name.
        devices: Device types it is made for.
        kernels: Full names of the functions that launch its kernels, and what stands in for each of them when only
            the host's work per tensor is timed. Empty where that cannot be told apart.
        is_ours: Whether it belongs to adamw_kernels.
    """

    name: str
    title: str
    build: Callable[..., Optimizer]
    devices: tuple[str, ...]
    kernels: tuple[tuple[str, Callable[..., object]], ...] = ()
    is_ours: bool = False

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot step a `dtype` tensor on `device`, or None if it just did."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        param = torch.nn.Parameter(torch.zeros(16, device=device, dtype=dtype))
        param.grad = torch.ones_like(param)
        try:
            self.build([{"params": [param], "lr": 1e-3, "weight_decay": 0.0}]).step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # any failure of a peer is a reason to leave it out, and is shown
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None if bool((param != 0).all()) else "step() changed nothing"

    @contextlib.contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Replaces the kernels by functions that do nothing."""
        with contextlib.ExitStack() as stack:
            for kernel, stand_in in self.kernels:
                stack.enter_context(mock.patch(kernel, stand_in))
            yield


def ours(backend: str) -> Callable[..., Optimizer]:
    """A builder of FusedAdamW on one backend."""

    def build(groups: ParamGroups, **options: object) -> Optimizer:
        forced = os.environ.get(BACKEND_VARIABLE) or backend
        if forced != backend:
            raise RuntimeError(f"{BACKEND_VARIABLE}={forced} would replace backend={backend!r}; unset it")
        fused_adamw: Callable[..., Optimizer] = importlib.import_module("adamw_kernels").FusedAdamW
        return fused_adamw(groups, betas=BETAS, eps=EPS, backend=backend, **options)

    return build


def torch_adamw(**implementation: bool) -> Callable[..., Optimizer]:
    """A builder of torch.optim.AdamW in one implementation."""

    def build(groups: ParamGroups, **options: Any) -> Optimizer:
        return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, **implementation, **options)

    return build


FOREACH_KERNELS = (
    *((f"torch._foreach_{name}_", do_nothing) for name in ("add", "mul", "lerp", "addcmul", "addcdiv", "div")),
    ("torch._foreach_sqrt", first_argument),
)

BASELINE = "torch_fused"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(
            name="ours_cpu",
            title="adamw_kernels",
            build=ours("cpu"),
            devices=("cpu",),
            kernels=(("adamw_kernels.backends.CpuBackend.launch", do_nothing),),
            is_ours=True,
        ),
        Contender(
            name="ours_triton",
            title="adamw_kernels, Triton",
            build=ours("triton"),
            devices=("cuda",),
            kernels=(("adamw_kernels.triton_kernels.TritonBackend.launch", do_nothing),),
            is_ours=True,
        ),
        Contender(
            name="ours_cuda",
            title="adamw_kernels, CUDA",
            build=ours("cuda"),
            devices=("cuda",),
            kernels=(("adamw_kernels.backends.CudaBackend.launch", do_nothing),),
            is_ours=True,
        ),
        Contender(
            name=BASELINE,
            title="torch AdamW, fused",
            build=torch_adamw(fused=True),
            devices=("cpu", "cuda"),
            kernels=(("torch._fused_adamw_", do_nothing),),
        ),
        Contender(
            name="torch_foreach",
            title="torch AdamW, foreach",
            build=torch_adamw(foreach=True),
            devices=("cpu", "cuda"),
            kernels=FOREACH_KERNELS,
        ),
    )
}


def available(
    device: torch.device, dtype: torch.dtype, only: list[str] | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run on `device` with `dtype`, and the reason for each that does not."""
    running, reasons = [], {}
    for contender in CONTENDERS.values():
        if only and contender.name not in only:
            continue
        reason = contender.unavailable(device, dtype)
        if reason is None:
            running.append(contender)
        else:
            reasons[contender.name] = reason
    return running, reasons
