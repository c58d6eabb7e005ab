"""Warm steps look through the optimizer's dicts again exactly when one of them was written.

The native watch asks CPython whether a dict was written (`csrc/dict_guard.h`), the twin in Python looks each time: the
same is asked of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import TOLERANCES

from adamw_kernels import FusedAdamW

pytestmark = pytest.mark.usefixtures("watch")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def make(cls: Any = FusedAdamW) -> Any:
    """An optimizer of two groups with gradients."""
    weights = [torch.nn.Parameter(torch.linspace(0.1, 1, 5, dtype=torch.float64)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return cls([{"params": weights[:2]}, {"params": weights[2:]}], **HYPER)


def warm_pair() -> tuple[Any, Any]:
    """Ours and torch's after two steps."""
    pair = make(), make(torch.optim.AdamW)
    for opt in pair:
        opt.step()
        opt.step()
    return pair


def first(opt: Any) -> torch.Tensor:
    """Its first parameter."""
    return opt.param_groups[0]["params"][0]


def assert_agree(ours: Any, theirs: Any) -> None:
    """Both have the same weights."""
    tolerance, _ = TOLERANCES["host_logic_in_float64"]
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def quarters() -> torch.Tensor:
    """A first moment that no step left behind."""
    return torch.full((5,), 0.25, dtype=torch.float64)


def replace_entry(opt: Any, **changes: Any) -> None:
    """Put another dict in the place of the first parameter's state."""
    p = first(opt)
    opt.state[p] = {**opt.state[p], **changes}


WRITES: dict[str, tuple[bool, Callable[[Any], None]]] = {  # whether the plan must be built anew
    "entry-replaced-by-an-equal-one": (False, replace_entry),
    "entry-with-another-tensor": (True, lambda opt: replace_entry(opt, exp_avg=quarters())),
    "tensor-replaced": (True, lambda opt: opt.state[first(opt)].update(exp_avg=quarters())),
    "tensor-put-back": (False, lambda opt: opt.state[first(opt)].update(exp_avg=opt.state[first(opt)].pop("exp_avg"))),
    "tensor-written-in-place": (False, lambda opt: opt.state[first(opt)]["exp_avg"].fill_(0.25)),
    "rate": (False, lambda opt: opt.param_groups[1].update(lr=0.3)),
    "rate-of-another-type": (False, lambda opt: opt.param_groups[1].update(lr=1)),
    "group-replaced-with-another-rate": (
        False,
        lambda opt: opt.param_groups.__setitem__(1, {**opt.param_groups[1], "lr": 0.3}),
    ),
    "flag": (True, lambda opt: opt.param_groups[1].update(maximize=True)),
    "a-key-of-the-users": (False, lambda opt: opt.param_groups[1].update(mine=3)),
    "betas-in-a-list": (False, lambda opt: opt.param_groups[0].update(betas=[0.5, 0.9])),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_counts_from_the_next_step(write: str) -> None:
    """As under torch, and at the price of a new plan only where an address or a flag changed."""
    ours, theirs = warm_pair()
    plan = ours._internals.stepper.plan
    rebuilds, change = WRITES[write]
    for opt in (ours, theirs):
        change(opt)
        opt.step()
    assert (ours._internals.stepper.plan is not plan) == rebuilds
    assert_agree(ours, theirs)
    plan = ours._internals.stepper.plan
    for opt in (ours, theirs):
        opt.step()
        opt.step()
    assert ours._internals.stepper.plan is plan
    assert_agree(ours, theirs)


def test_a_list_of_betas_changed_in_place() -> None:
    """The dict is as it was, the list that it holds is not."""
    ours, theirs = make(), make(torch.optim.AdamW)
    for opt in (ours, theirs):
        opt.param_groups[0]["betas"] = [0.9, 0.99]
        opt.step()
        opt.step()
        opt.param_groups[0]["betas"][0] = 0.5
        opt.step()
    assert_agree(ours, theirs)


def test_a_tensor_among_the_hyperparameters_changed_in_place() -> None:
    """What a tensor holds is read on every step."""
    ours, theirs = make(), make(torch.optim.AdamW)
    for opt in (ours, theirs):
        for group in opt.param_groups:
            group["lr"] = torch.tensor(0.01, dtype=torch.float64)
        opt.step()
        opt.step()
        opt.param_groups[0]["lr"].fill_(0.3)
        opt.step()
    assert_agree(ours, theirs)


def test_a_bad_value_is_refused_until_it_is_mended() -> None:
    """Reading it once, and raising, does not make it read."""
    ours, theirs = warm_pair()
    before = [p.detach().clone() for group in ours.param_groups for p in group["params"]]
    ours.param_groups[1]["lr"] = float("nan")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"param_groups\[1\].*lr"):
            ours.step()
    assert all(map(torch.equal, before, (p for group in ours.param_groups for p in group["params"])))
    ours.param_groups[1]["lr"] = HYPER["lr"]
    for opt in (ours, theirs):
        opt.step()
    assert_agree(ours, theirs)


def test_other_optimizers_do_not_disturb() -> None:
    """Building, changing and dropping others between the steps of one leaves its plan alone."""
    ours, theirs = warm_pair()
    plan = ours._internals.stepper.plan
    for _ in range(3):
        other = make()
        other.step()
        other.param_groups[0]["lr"] = 0.5
        other.step()
        other.state.clear()
        del other
        for opt in (ours, theirs):
            opt.step()
        assert ours._internals.stepper.plan is plan
    assert_agree(ours, theirs)


def test_a_state_dict_at_an_old_ones_address() -> None:
    """Entries that are freed and made anew, again and again, are never taken for those that were seen."""
    ours, theirs = make(), make(torch.optim.AdamW)
    for opt in (ours, theirs):
        opt.step()
    for round_ in range(20):
        for opt in (ours, theirs):
            p = first(opt)
            entry = opt.state.pop(p)
            step, moment, square = entry["step"].item(), entry["exp_avg"].tolist(), entry["exp_avg_sq"].tolist()
            del entry
            opt.state[p] = {
                "step": torch.tensor(step),
                "exp_avg": torch.tensor(moment, dtype=torch.float64) * (1 + round_ % 2),
                "exp_avg_sq": torch.tensor(square, dtype=torch.float64),
            }
            opt.step()
        assert_agree(ours, theirs)
