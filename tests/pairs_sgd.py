"""The same parameters twice, one set for FusedSGDW and one for torch.optim.SGD, and what it means that they agree."""

from typing import Any

import torch
from pairs import Gradients, assert_close, copies, make_params, params_of
from torch.optim import SGD

from adamw_kernels import FusedSGDW

HYPER: dict[str, Any] = dict(lr=1e-2, momentum=0.9, weight_decay=0.1)

FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-momentum": dict(momentum=0.0, param_format="stochastic"),
    "rounded": dict(param_format="split24", moment_format="bfloat16", ema_decay=0.9, ema_format="bfloat16", seed=3),
    "paper": dict(lr_in_momentum=True, decay_coupling="schedule"),
    "nesterov": dict(nesterov=True, decoupled=False),
}
"""Options that leave other state, or go another way, each."""


def name_of(case: Any) -> str:
    """What pytest shows of options."""
    return ("-".join(case) or "plain") if isinstance(case, dict) else ""


def make_both(device: torch.device, **options: Any) -> tuple[FusedSGDW, SGD]:
    """Return both optimizers, with L2 decay, over the same float64 parameters."""
    params = make_params(device)
    options = {**HYPER, **options}
    return FusedSGDW(copies(params), decoupled=False, **options), SGD(copies(params), **options)


def train(optimizers: tuple[torch.optim.Optimizer, ...], gradients: Gradients, steps: int = 1) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


def assert_agree(ours: FusedSGDW, theirs: torch.optim.Optimizer, name: str = "float64_against_torch") -> None:
    """Compare weights and momentum buffers within a tolerance; neither may have a buffer that the other has not."""
    for i, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        assert_close(p, q, name, f"parameter {i}")
        mine, other = (o.state.get(x, {}).get("momentum_buffer") for o, x in ((ours, p), (theirs, q)))
        assert (mine is None) == (other is None), f"buffer of parameter {i}"
        if mine is not None:
            assert_close(mine, other, name, f"buffer of parameter {i}")
