"""What torch wraps around every optimizer's step is there when somebody asks for it, and costs nothing otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from adamw_kernels import FusedAdamW, FusedSGDW, step_hooks, tensor_watch

OPTIMIZERS = [FusedAdamW, FusedSGDW, torch.optim.AdamW]  # torch's own is held to the same


def make(cls: Any = FusedAdamW, **options: Any) -> Any:
    """An optimizer of one parameter that has a gradient, after a step."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = cls([weight], lr=0.1, **options)
    optimizer.step()
    return optimizer


def ranges_of(run: Callable[[], object]) -> list[str]:
    """The ranges of optimizers' steps that a profiler records."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return [event.name for event in profiler.events() if event.name.startswith("Optimizer.step")]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_profiler_sees_the_step(cls: Any) -> None:
    """One range a step, under the name by which torch's tools look for it; also of a class that inherits the step."""
    optimizer = make(cls)
    assert ranges_of(optimizer.step) == [f"Optimizer.step#{cls.__name__}.step"]
    heir = make(type("Heir", (cls,), {}))
    assert ranges_of(heir.step) == ["Optimizer.step#Heir.step"]
    assert ranges_of(optimizer.step) == [f"Optimizer.step#{cls.__name__}.step"]


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_nobody_listens_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Torch's wrapper runs only for hooks and observers; where they cannot be asked for, always."""
    if native and tensor_watch.load_native()[0] is None:
        pytest.skip(tensor_watch.load_native()[1])
    if not native:
        monkeypatch.setattr(step_hooks, "load_native", lambda: (None, "not built"))
    wrapped = 0
    torchs_wrapper = Optimizer.profile_hook_step

    def counting(step: Callable[..., Any]) -> Callable[..., Any]:
        as_torch = torchs_wrapper(step)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal wrapped
            wrapped += 1
            return as_torch(*args, **kwargs)

        return call

    monkeypatch.setattr(Optimizer, "profile_hook_step", staticmethod(counting))

    class Counted(FusedAdamW):
        step = step_hooks.with_hooks(FusedAdamW.step.__wrapped__)

    optimizer = make(Counted)
    assert wrapped == (0 if native else 1)
    optimizer.step()
    assert wrapped == (0 if native else 2)
    before = wrapped
    with profile(activities=[ProfilerActivity.CPU]):
        optimizer.step()
    assert wrapped == before + 1
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        before = wrapped
        hook = register(lambda *args: None)
        optimizer.step()
        hook.remove()
        assert wrapped == before + 1
        optimizer.step()
        assert wrapped == before + (1 if native else 2)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_hook_with_a_wrong_answer(cls: Any) -> None:
    """Torch's error, and no step."""
    optimizer = make(cls)
    (weight,) = optimizer.param_groups[0]["params"]
    before = weight.detach().clone()
    optimizer.register_step_pre_hook(lambda *args: "no pair")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_of_ones_own(cls: Any) -> None:
    """Hooks run around the override and, as under torch, around the inherited step that it calls."""
    seen: list[str] = []

    class Own(cls):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            seen.append("own")
            return super().step(closure)

    make(cls)  # torch hooks a class's step when the first of its instances is made
    optimizer = make(Own)
    seen.clear()
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "own", "pre", "post", "post"]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_step_too(cls: Any, way: str) -> None:
    """A copied optimizer's step opens its range, and only one."""
    optimizer = make(cls)
    optimizer = copy.deepcopy(optimizer) if way == "copy" else pickle.loads(pickle.dumps(optimizer))
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.ones(3)
    assert len(ranges_of(optimizer.step)) == 1


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_closure_by_name_and_by_place(cls: Any) -> None:
    """Arguments reach the step as they were given."""
    optimizer = make(cls)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert optimizer.step(closure=lambda: 2.5) == 2.5
