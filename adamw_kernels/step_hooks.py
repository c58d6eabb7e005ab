"""What torch wraps around every optimizer's step: hooks, and a profiler's range. Without either, the step alone.

`torch.optim.Optimizer` replaces the `step` of each of its subclasses by one that opens a range for a profiler and runs
hooks, unless that `step` says in `hooked` that it does so itself. Torch's takes most of what a warm step executes in
Python, also where nobody listens (`bench/results/counts/hot_path.csv`, per step, before and after).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.compiler import is_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from adamw_kernels.tensor_watch import load_native

StepT = TypeVar("StepT", bound=Callable[..., Any])


def _always() -> bool:
    """What stands for "is anybody recording?" where it cannot be asked."""
    return True


def with_hooks(step: StepT) -> StepT:
    """A method `step` that runs hooks and opens a profiler's range as torch's optimizers do.

    It is torch's own wrapper that does, called where there is a hook (of this optimizer or of all) or anybody records
    (a profiler, `emit_nvtx`, any callback of `at::RecordFunction`).
    """
    as_torch = Optimizer.profile_hook_step(step)
    native, _ = load_native()
    is_recording: Callable[[], bool] = _always if native is None else native.is_recording
    try:
        before_all, after_all = (
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
    except AttributeError:  # kept elsewhere by another torch
        is_recording, before_all, after_all = _always, {}, {}

    @functools.wraps(step)
    def hooked_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            before_all
            or after_all
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or is_compiling()  # which knows torch's own, and cannot look into a native function
            or is_recording()
        ):
            return as_torch(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    hooked_step.hooked = True  # type: ignore[attr-defined]  # torch then adds none of its own
    return hooked_step  # type: ignore[return-value]
