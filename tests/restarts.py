"""Optimizers, schedules and moves for the tests of warm restarts."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from pairs import Gradients, make_params, params_of

from adamw_kernels import FusedAdamW, FusedSGDW
from adamw_kernels.warm_restarts import WarmRestarts

# --- drawn by hypothesis ---------------------------------------------------------------------------------------------

explore = settings(max_examples=100, derandomize=True, deadline=None)

times = st.one_of(
    st.none(),
    st.floats(0, 200),
    st.tuples(st.integers(0, 100), st.integers(1, 64)).flatmap(
        lambda t: st.integers(0, t[1] - 1).map(lambda i: t[0] + i / t[1])
    ),
)
"""Arguments of step(): none, any time, or a batch of an epoch."""

schedules = st.fixed_dictionaries(
    {
        "first_cycle": st.one_of(st.integers(1, 20), st.floats(0.05, 20)),
        "cycle_mult": st.sampled_from([1, 2, 1.5, 1.25, 1.1]),
        "eta_min": st.sampled_from([0.0, 0.01]),
        "steps_per_epoch": st.sampled_from([None, 1, 7, 64]),
    }
)
"""Arguments of WarmRestarts."""

# --- optimizers and what is seen of them -----------------------------------------------------------------------------

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
    "FusedAdamW": FusedAdamW,
    "FusedSGDW": FusedSGDW,
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def stepped(make: Make = torch.optim.SGD, rates: tuple[Any, ...] = (0.1,), **options: Any) -> torch.optim.Optimizer:
    """An optimizer with a group a learning rate. It counts as stepped: torch's schedulers warn if it is not."""
    groups = [{"params": make_params(torch.device("cpu"), shapes=((2,),)), "lr": lr} for lr in rates]
    opt = make(groups, **options)
    opt._opt_called = True  # type: ignore[attr-defined]
    return opt


def rates_of(opt: torch.optim.Optimizer) -> list[float]:
    """The learning rates as they are, without a rounding."""
    return [float(group["lr"]) for group in opt.param_groups]


def through_file(state: Any, **options: Any) -> Any:
    """What torch.load makes of what torch.save wrote, trusting nothing in the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def train(opt: torch.optim.Optimizer, scheduler: WarmRestarts, gradients: Gradients, batches: int) -> None:
    """Take steps of the optimizer, each followed by one of the scheduler."""
    for _ in range(batches):
        gradients.give(params_of(opt))
        opt.step()
        scheduler.step()


def tensors(*values: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Learning rates that are tensors."""
    return tuple(torch.tensor(value, dtype=dtype) for value in values)


def decays_of(opt: torch.optim.Optimizer) -> list[float]:
    """The weight decays as they are."""
    return [float(group["weight_decay"]) for group in opt.param_groups]


def with_decays(make: Make, *decays: Any) -> torch.optim.Optimizer:
    """An optimizer with a group a weight decay."""
    opt = stepped(make, (0.1,) * len(decays))
    for group, decay in zip(opt.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    return opt


def halved(length: float) -> float:
    """A weight decay that tells the length of the cycle it is for."""
    return length / 2
