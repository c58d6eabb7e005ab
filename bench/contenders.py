"""Who is measured: our backends and the peers, each with a reason where it cannot run.

A new peer is one entry in `CONTENDERS`: how to build it, where it runs, what its kernels are called, how exact it means
to be. Whether it is available is never declared but tried: it must build and step one small tensor of the device and
dtype asked for. A peer's first step may compile its kernels (DeepSpeed with ninja, torchao with torch.compile).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
import warnings
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


TRIAL_ELEMENTS = 16


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
        distribution: The installed distribution it comes from.
        update_errors: By dtype of the weights, the error of an update relative to lr that its check allows instead of
            `check.TOLERANCES`: what its state's own rounding may do.
        takes_dtensors: Not so where native code reads the address of a DTensor, which is 0, and ends the process.
    """

    name: str
    title: str
    build: Callable[..., Optimizer]
    devices: tuple[str, ...]
    kernels: tuple[tuple[str, Callable[..., object]], ...] = ()
    is_ours: bool = False
    distribution: str = "torch"
    update_errors: tuple[tuple[torch.dtype, float], ...] = ()
    takes_dtensors: bool = True

    def update_error(self, dtype: torch.dtype) -> float | None:
        """The entry of `update_errors`."""
        return dict(self.update_errors).get(dtype)

    def version(self) -> str:
        """Version of its distribution, or empty if that is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot step a `dtype` tensor on `device`, or None if it just did."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        return self.why_not_step(torch.zeros(TRIAL_ELEMENTS, device=device, dtype=dtype))

    def why_not_step(self, weights: torch.Tensor) -> str | None:
        """Why it cannot step these zeros, or None if it just did."""
        if hasattr(weights, "_local_tensor") and not self.takes_dtensors:
            return "its native code reads the address of a DTensor, which is 0: the process would end"
        param = torch.nn.Parameter(weights)
        param.grad = torch.ones_like(param)
        try:
            self.build([{"params": [param], "lr": 1e-3, "weight_decay": 0.0}]).step()
            if weights.device.type == "cuda":
                torch.cuda.synchronize(weights.device)
        except (Exception, SystemExit) as error:  # any failure of a peer is a reason to leave it out, and is shown
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {(lines or [''])[0]}"
        local = getattr(param, "_local_tensor", param)
        return None if bool((local != 0).all()) else "step() changed nothing"

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


def peer(module: str, name: str, **fixed: object) -> Callable[..., Optimizer]:
    """A builder of a peer's optimizer, imported when it is built; `fixed` are options that make it AdamW."""

    def build(groups: ParamGroups, **options: object) -> Optimizer:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # some greet whoever imports them
            warnings.simplefilter("ignore")
            made: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
            return made(groups, lr=1e-3, betas=BETAS, eps=EPS, **fixed, **options)  # optimi has no default lr

    return build


# Published moments of 8 bits scale blocks of 128 or 256 by their largest element, and small ones become 0: an update of
# several lr.
PUBLISHED_8BIT = ((torch.float32, 4.0), (torch.bfloat16, 4.0))

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
            distribution="adamw_kernels",
        ),
        Contender(
            name="ours_triton",
            title="adamw_kernels, Triton",
            build=ours("triton"),
            devices=("cuda",),
            kernels=(("adamw_kernels.triton_kernels.TritonBackend.launch", do_nothing),),
            is_ours=True,
            distribution="adamw_kernels",
        ),
        Contender(
            name="ours_cuda",
            title="adamw_kernels, CUDA",
            build=ours("cuda"),
            devices=("cuda",),
            kernels=(("adamw_kernels.backends.CudaBackend.launch", do_nothing),),
            is_ours=True,
            distribution="adamw_kernels",
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
        Contender(
            name="apex",
            title="apex FusedAdam",
            build=peer("apex.optimizers", "FusedAdam", adam_w_mode=True),
            devices=("cuda",),
            kernels=(("apex.optimizers.fused_adam.multi_tensor_applier", do_nothing),),
            distribution="apex",
        ),
        Contender(
            name="transformer_engine",
            title="TransformerEngine FusedAdam",
            build=peer("transformer_engine.pytorch.optimizers", "FusedAdam", adam_w_mode=True),
            devices=("cuda",),
            kernels=(("transformer_engine.pytorch.optimizers.fused_adam.multi_tensor_applier", do_nothing),),
            distribution="transformer-engine",
        ),
        Contender(
            name="deepspeed",
            takes_dtensors=False,
            title="DeepSpeed FusedAdam",
            build=peer("deepspeed.ops.adam", "FusedAdam", adam_w_mode=True),
            devices=("cpu", "cuda"),
            kernels=(("deepspeed.ops.adam.fused_adam.multi_tensor_applier", do_nothing),),
            distribution="deepspeed",
            update_errors=((torch.bfloat16, 4e-2),),
        ),
        Contender(
            name="deepspeed_cpu",
            takes_dtensors=False,
            title="DeepSpeedCPUAdam",
            build=peer("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=True),
            devices=("cpu",),
            distribution="deepspeed",
        ),
        Contender(
            name="bitsandbytes_8bit",
            title="bitsandbytes AdamW8bit",
            build=peer("bitsandbytes.optim", "AdamW8bit"),
            devices=("cpu", "cuda"),
            distribution="bitsandbytes",
            update_errors=PUBLISHED_8BIT,
        ),
        Contender(
            name="torchao_8bit",
            title="torchao AdamW8bit",
            build=peer("torchao.optim", "AdamW8bit"),
            devices=("cpu", "cuda"),
            distribution="torchao",
            update_errors=PUBLISHED_8BIT,
        ),
        Contender(
            name="optimi",
            title="optimi AdamW",
            build=peer("optimi", "AdamW"),
            devices=("cpu", "cuda"),
            distribution="torch-optimi",
        ),
        Contender(
            name="flashoptim",
            title="flashoptim FlashAdamW",
            build=peer("flashoptim", "FlashAdamW"),
            devices=("cuda",),
            distribution="flashoptim",
            update_errors=PUBLISHED_8BIT,
        ),
    )
}

_reasons: dict[tuple[str, torch.device, torch.dtype], str | None] = {}


def available(
    device: torch.device, dtype: torch.dtype, only: list[str] | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run on `device` with `dtype`, and the reason for each that does not. Each is tried once."""
    running, reasons = [], {}
    for contender in CONTENDERS.values():
        if only and contender.name not in only:
            continue
        key = contender.name, device, dtype
        if key not in _reasons:
            _reasons[key] = contender.unavailable(device, dtype)
        reason = _reasons[key]
        if reason is None:
            running.append(contender)
        else:
            reasons[contender.name] = reason
    return running, reasons
