"""Random problems of SGD: `problems.py` for the other rule, with `reference_sgd.py` as the judge.

A case has a momentum buffer whether the rule keeps one or not: without momentum, no step may touch it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from problems import Case, Launch, Training, make_case
from reference import compute_dtype, random_key, random_words, step_count_after
from reference_sgd import step_sgd

from adamw_kernels import FusedSGDW, formats
from adamw_kernels.launch_table import TensorSpec

SGD_HYPER = dict(lr=1e-2, momentum=0.9, dampening=0.0, weight_decay=0.1)

SGD_FLAGS = [
    dict(zip(("nesterov", "maximize", "decoupled", "lr_in_momentum"), flags, strict=True))
    for flags in itertools.product([False, True], [False, True], [True, False], [False, True])
]
SGD_PLAIN = SGD_FLAGS[0]


class SgdCase(Case):
    """One parameter, its gradient and its state under SGD."""

    @property
    def dtypes(self) -> dict[str, str]:
        """The storage dtype of each of the case's tensors."""
        wide = np.dtype(compute_dtype(self.param_dtype)).name
        dtypes = dict(param=self.param_dtype, grad=self.grad_dtype, step="float32")
        dtypes["momentum_buffer"] = "bfloat16" if self.moment_format == "bfloat16" else wide
        if self.param_format in ("split24", "split32"):
            dtypes["param_remainder"] = "int8" if self.param_format == "split24" else "int16"
        if self.ema_format is not None:
            dtypes["param_ema"] = "bfloat16" if self.ema_format == "bfloat16" else wide
        return dtypes

    def unused(self, hyper: Mapping[str, Any], flags: Mapping[str, bool]) -> set[str]:
        """Tensors that are no part of the state under these options."""
        return {"momentum_buffer"} if hyper["momentum"] == 0.0 else set()

    def judge(
        self,
        hyper: Mapping[str, float],
        flags: Mapping[str, bool],
        seed: int = 0,
        position: int = 0,
        update_bound: float | str | None = "auto",
        **clipping: Any,
    ) -> None:
        """Let the judge take the step.

        Args:
            hyper: lr, momentum, dampening, weight_decay, and initial_lr if the decay follows the schedule.
            flags: nesterov, maximize, decoupled, lr_in_momentum.
            seed: of the random bits.
            position: of the parameter, over all groups.
            update_bound: SGD has none.
            clipping: `sgd_coefficients`'s inv_scale, norm, max_grad_norm.
        """
        step = step_count_after(np.float32(self.arrays["step"]))
        self.arrays["step"] = np.array(step, dtype=np.float32)
        positions = self.memory_positions()
        flat = dict(self.arrays)
        for name in self.dtypes.keys() - {"step"}:
            flat[name] = np.empty_like(self.arrays[name], shape=positions.size)
            flat[name][np.ravel(positions)] = np.ravel(self.arrays[name])
        after = step_sgd(
            flat,
            flat["grad"],
            int(step),
            random_words(random_key(seed, position, int(step)), self.first_element + np.arange(positions.size)),
            param_dtype=self.param_dtype,
            grad_dtype=self.grad_dtype,
            param_format=self.param_format,
            moment_format=self.moment_format,
            **hyper,
            **flags,
            **clipping,
        )
        self.arrays |= {name: array[positions] for name, array in after.items()}


def make_sgd_case(*args: Any, **options: Any) -> Case:
    """Return a case in the middle of training under SGD. Arguments of `make_case`."""
    return make_case(*args, kind=SgdCase, **options)


class SgdLaunch(Launch):
    """A launch plan over cases of SGD, any formats at any sizes, and the judge beside it."""

    fields = ("lr", "momentum", "dampening", "eps", "weight_decay")  # of which SGD has no eps

    def __init__(
        self,
        cases: Sequence[Case],
        hyper: Mapping[str, float] = SGD_HYPER,
        flags: Mapping[str, bool] = SGD_PLAIN,
        **options: Any,
    ) -> None:
        """Build the plan; no step is taken. Arguments of `Launch`, with SGD's hyperparameters and flags."""
        super().__init__(cases, hyper, flags, **options)

    def _spec(self, case: Case, position: int) -> TensorSpec:
        state = {key: case[key] for key in case.tensors}
        return TensorSpec(
            name=f"case {position}",
            param=state["param"],
            grad_dtype=state["grad"].dtype,
            exp_avg=None if self.hyper["momentum"] == 0.0 else state["momentum_buffer"],
            exp_avg_sq=None,
            max_exp_avg_sq=None,
            step=state["step"],
            hyper=0,
            rule="sgdw",
            schedule_decay="initial_lr" in self.hyper,
            ema=None if self.ema_decay is None else state.get("param_ema"),
            random_stream=formats.random_stream(self.seed, position),
            param_format=case.param_format,
            moment_format=case.moment_format,
            remainder=state.get("param_remainder"),
            first_element=case.first_element,
            **self.flags,
        )


class SgdTraining(Training):
    """A `FusedSGDW` over groups of cases whose state it has loaded, and the judge beside it."""

    make: type[torch.optim.Optimizer] = FusedSGDW
