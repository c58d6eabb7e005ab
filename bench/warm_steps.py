"""Warm steps whose work is counted (`hot_path.py`, `profile.py`), by name; nothing here is timed.

Imports what a step needs and nothing else of this suite: under callgrind an import takes ten times as long.

==============================  ========================================================================
name                            one call
==============================  ========================================================================
``nothing``                     returns: what counting itself costs
``FORMAT NUMEL``                a step of one tensor: `float32`, or one of `FORMATS`
``tensors N``                   a step of N tensors of one element
``tensors-moved N``             the same with other gradient tensors than in the step before
``tensors-no-kernels N``        the same as ``tensors``, the kernels' launch replaced by nothing
``dtensors N``                  a step of N DTensors of one element, in a world of one process
``groups N``                    a step of N groups of one tensor of one element
``groups-scheduled N``          the same with other learning rates than in the step before, as a schedule sets them
==============================  ========================================================================
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from adamw_kernels import FusedAdamW, backends

Step = Callable[[], object]

BF16 = torch.bfloat16
# dtype of weights and gradients, and options.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32+clip": (torch.float32, {"max_grad_norm": 1.0}),
    "float32+ema": (torch.float32, {"ema_decay": 0.99}),
    "float32/8bit": (torch.float32, {"moment_format": "8bit"}),
    "bfloat16-native/bfloat16": (BF16, {"param_format": "native", "moment_format": "bfloat16"}),
    "bfloat16-split32/float32": (BF16, {"param_format": "split32"}),
    "bfloat16-split24/8bit": (BF16, {"param_format": "split24", "moment_format": "8bit"}),
    "bfloat16-stochastic/8bit": (BF16, {"param_format": "stochastic", "moment_format": "8bit"}),
}
ELEMENTS_OF_A_TENSOR = 4
WARM_UP_STEPS = 20  # CPython specialises what it has run a dozen times


def build(name: str) -> Step:
    """The warm step of that name."""
    if name == "nothing":
        return lambda: None
    kind, number = name.split(" ")
    if kind in FORMATS:
        dtype, options = FORMATS[kind]
        return warm(optimizer([torch.full((int(number),), 0.5, dtype=dtype)], **options).step)
    weights = [torch.full((ELEMENTS_OF_A_TENSOR,), 0.5) for _ in range(int(number))]
    if kind == "groups":
        return warm(optimizer(weights, groups=int(number)).step)
    if kind == "groups-scheduled":
        return warm(scheduled(optimizer(weights, groups=int(number))))
    if kind == "dtensors":
        weights = as_dtensors(weights)
    stepped = optimizer(weights)
    if kind == "tensors-moved":
        return warm(moving(stepped), stepped)
    if kind == "tensors-no-kernels":
        return warm(without_kernels(stepped.step), stepped)
    if kind in ("tensors", "dtensors"):
        return warm(stepped.step)
    raise ValueError(f"there is no warm step {name!r}; see {__name__}")


def optimizer(weights: list[torch.Tensor], *, groups: int = 1, **options: Any) -> FusedAdamW:
    """FusedAdamW on the CPU, gradients in place."""
    params = [torch.nn.Parameter(weight) for weight in weights]
    for param in params:
        param.grad = torch.ones_like(param) if hasattr(param, "_local_tensor") else torch.full_like(param, 1e-2)
    parted: list[dict[str, Any]] = [{"params": params[i::groups]} for i in range(groups)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="param_format='native'")
        return FusedAdamW(parted, lr=1e-3, weight_decay=0.1, backend="cpu", **options)


def warm(step: Step, stepped: FusedAdamW | None = None) -> Step:
    """`step`, after some; the first of them with kernels, whoever they are replaced for."""
    if stepped is not None:
        stepped.step()
    for _ in range(WARM_UP_STEPS):
        step()
    return step


def moving(stepped: FusedAdamW) -> Step:
    """Steps that find other gradient tensors each time; handing them over is part of the call."""
    params = [param for group in stepped.param_groups for param in group["params"]]
    sets = itertools.cycle([[torch.full_like(param, 1e-2) for param in params] for _ in range(2)])

    def step() -> None:
        for param, grad in zip(params, next(sets), strict=True):
            param.grad = grad
        stepped.step()

    return step


def scheduled(stepped: FusedAdamW) -> Step:
    """Steps at learning rates that change; setting them is part of the call."""
    rates = itertools.cycle([1e-3, 1e-4])

    def step() -> None:
        rate = next(rates)
        for group in stepped.param_groups:
            group["lr"] = rate
        stepped.step()

    return step


def without_kernels(run: Step) -> Step:
    """A step that launches nothing."""

    def launch(*args: object, **kwargs: object) -> None:
        """Nothing."""

    def step() -> None:
        before = backends.CpuBackend.launch
        backends.CpuBackend.launch = launch  # type: ignore[method-assign]
        try:
            run()
        finally:
            backends.CpuBackend.launch = before  # type: ignore[method-assign]

    return step


def as_dtensors(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Shards of this process, which is alone; its process group, one without threads, is left behind."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return [DTensor.from_local(weight, mesh, [Shard(0)], run_check=False) for weight in weights]
