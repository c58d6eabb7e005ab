"""Gradient release: steps taken in backward are those of the ordinary loop, bit for bit, and gradients are freed."""

import copy
import gc
import pathlib
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Path
from pairs import assert_same_bits, assert_unchanged, params_of, snapshot

from adamw_kernels import FusedAdamW, release_gradients, stepper

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class Network(torch.nn.Module):
    """Two linear layers, or three; `tied` uses the second one's weight twice."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> None:
        """Draw the weights from a fixed seed."""
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 5)
        self.second = torch.nn.Linear(5, 5)
        self.third = torch.nn.Linear(5, 5)
        if tied:
            self.third.weight = self.second.weight
        self.to(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        hidden = torch.tanh(self.second(hidden.to(self.second.weight.dtype)))
        return self.third(hidden.to(self.third.weight.dtype)).float().square().mean()


def batch(step: int, device: torch.device) -> torch.Tensor:
    """Return the input of a step."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(device)


def one_group(model: torch.nn.Module) -> Any:
    """All parameters."""
    return model.parameters()


def three_groups(model: Any) -> Any:
    """A group a layer, each with hyperparameters of its own."""
    return [
        {"params": [*model.first.parameters()], "lr": 0.1, "weight_decay": 0.5},
        {"params": [*model.second.parameters()], "betas": (0.5, 0.6), "maximize": True},
        {"params": [*model.third.parameters()], "eps": 0.1, "amsgrad": True, "ema_decay": 0.5},
    ]


def train(
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    steps: int = 4,
    *,
    schedule: bool = False,
    first: int = 0,
    between: Callable[[int], None] = lambda step: None,
) -> None:
    """The ordinary loop: forward, backward, step, schedule, zero_grad."""
    device = next(model.parameters()).device
    rates = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) if schedule else None
    for step in range(first, first + steps):
        between(step)
        model(batch(step, device)).backward()
        opt.step()
        if rates is not None:
            rates.step()
        opt.zero_grad()


# --- the same steps -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (one_group, {}),
    "groups": (three_groups, {}),
    "amsgrad": (one_group, dict(amsgrad=True)),
    "l2": (one_group, dict(decoupled=False, weight_decay=0.1, maximize=True)),
    "cautious": (one_group, dict(cautious=True, cautious_weight_decay=True)),
    "ema": (one_group, dict(ema_decay=0.9, ema_warmup=True)),
    "bfloat16-ema": (three_groups, dict(ema_decay=0.9, ema_format="bfloat16", seed=3)),
    "bfloat16-moments": (one_group, dict(moment_format="bfloat16", seed=3)),
    "tensors": (one_group, dict(lr=torch.tensor(0.01), betas=(torch.tensor(0.5), 0.9))),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_released_steps_equal_the_ordinary_loops(path: Path, options: str) -> None:
    """Weights, states, state dicts and learning rates after four iterations with a schedule, which does not complain.

    Random bits of stochastic rounding are those of the parameter's place over all groups.
    """
    groups, kwargs = OPTIONS[options]
    pair = []
    for released in (False, True):
        model = Network(path.device)
        opt = FusedAdamW(groups(model), **copy.deepcopy(kwargs))
        if released:
            release_gradients(model, opt)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # as if the scheduler were stepped before the optimizer
            train(model, opt, schedule=True)
        pair.append(opt)
    assert_same_bits(*pair)
    ordinary, released = (opt.state_dict() for opt in pair)
    assert ordinary["param_groups"] == released["param_groups"]
    assert ordinary["state"].keys() == released["state"].keys()
    for key, entry in ordinary["state"].items():
        assert entry.keys() == released["state"][key].keys()


def in_mixed_formats(model: Any) -> None:
    """Make the layers bfloat16, float32 and float64."""
    model.first.bfloat16()
    model.third.double()


@pytest.mark.filterwarnings("ignore:param_format='native'")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_released_steps_in_storage_formats(device: torch.device, dtype: torch.dtype) -> None:
    """Another format of weights and of moments in each group, all of them large enough for 8 bits, one ragged."""
    pair = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 700), torch.nn.Linear(700, 6), torch.nn.Linear(6, 683), torch.nn.Linear(683, 6)
        ).to(device, dtype)
        weights = ("stochastic", "split24", "split32", "native")
        moments = ("8bit", "bfloat16", "8bit", "float32")
        groups = [
            dict(params=layer.parameters(), param_format=weight, moment_format=moment)
            for layer, weight, moment in zip(model, weights, moments, strict=True)
        ]
        opt = FusedAdamW(groups, lr=0.01, weight_decay=0.1, seed=3)
        if released:
            release_gradients(model, opt)
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(device, dtype)
            model(x).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        pair.append(opt)
    assert_same_bits(*pair)
    assert opt.state[model[2].weight]["exp_avg_code"].dtype == torch.int8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "mixed"])
def test_released_steps_in_other_dtypes(path: Path, dtype: str) -> None:
    """The same for other dtypes, and for three of them in one model."""
    pair = []
    for released in (False, True):
        model = Network(path.device, torch.float32 if dtype == "mixed" else getattr(torch, dtype))
        if dtype == "mixed":
            in_mixed_formats(model)
        opt = FusedAdamW(model.parameters(), lr=0.01, ema_decay=0.9)
        if released:
            release_gradients(model, opt)
        train(model, opt)
        pair.append(opt)
    assert_same_bits(*pair)


@pytest.fixture
def twins(device: torch.device) -> tuple[Network, FusedAdamW, Network, FusedAdamW]:
    """Two models with optimizers alike, whose averages depend on every parameter's position."""
    found: list[Any] = []
    for _ in range(2):
        model = Network(device)
        found += model, FusedAdamW(three_groups(model), ema_decay=0.75, ema_format="bfloat16")
    return tuple(found)  # type: ignore[return-value]


Twins = tuple[Network, FusedAdamW, Network, FusedAdamW]


def test_tied_weights(device: torch.device) -> None:
    """A weight that is used twice is stepped once, when both uses have contributed."""
    pair = []
    for released in (False, True):
        model = Network(device, tied=True)
        opt = FusedAdamW(model.parameters(), lr=0.1)
        if released:
            release_gradients(model, opt)
        train(model, opt)
        pair.append(opt)
    assert_same_bits(*pair)
    assert pair[1].state[params_of(pair[1])[2]]["step"] == 4


def test_parameters_without_gradients(twins: Twins) -> None:
    """Unused and frozen parameters are left alone; one that is thawed later was not among those released.

    It is then stepped by `opt.step()`, as are parameters of the optimizer that are not the model's.
    """
    model, opt, other, ordinary = twins
    extra = [torch.nn.Parameter(torch.ones(3, device=p.device)) for p in (model.first.weight, other.first.weight)]
    for each, optimizer, p in ((model, opt, extra[0]), (other, ordinary, extra[1])):
        each.unused = torch.nn.Parameter(torch.ones(2))
        each.first.bias.requires_grad_(False)
        optimizer.add_param_group({"params": [each.unused, p]})
    release_gradients(model, opt)
    for each, optimizer in ((model, opt), (other, ordinary)):
        train(each, optimizer, 2)
        each.first.bias.requires_grad_(True)
        train(each, optimizer, 2, first=2)
    for optimizer, p in ((opt, extra[0]), (ordinary, extra[1])):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same_bits(opt, ordinary)
    assert model.unused not in opt.state
    assert opt.state[model.first.bias]["step"] == 2 and opt.state[extra[0]]["step"] == 1


def test_parameters_that_the_optimizer_does_not_hold(device: torch.device) -> None:
    """They keep their gradients, and the optimizer's state does not hear of them."""
    model = Network(device)
    opt = FusedAdamW(model.second.parameters())
    release_gradients(model, opt)
    model(batch(0, device)).backward()
    assert model.first.weight.grad is not None and model.second.weight.grad is None
    opt.step()
    assert set(opt.state) == set(model.second.parameters())


def test_two_backward_passes_over_different_parameters(twins: Twins) -> None:
    """Losses of their own for two halves of a model, then one `opt.step()`: each parameter has one gradient."""
    model, opt, other, ordinary = twins
    release_gradients(model, opt)
    for _ in range(3):
        for each, optimizer in ((model, opt), (other, ordinary)):
            each.first.weight.square().sum().backward()
            each.second.weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(opt, ordinary)


def test_closure(twins: Twins) -> None:
    """A closure that runs forward and backward: `opt.step(closure)` returns its loss, steps are the ordinary ones."""
    model, opt, other, ordinary = twins
    release_gradients(model, opt)
    for step in range(3):
        losses = []
        for each, optimizer in ((model, opt), (other, ordinary)):

            def closure(each: Any = each, optimizer: Any = optimizer, step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = each(batch(step, each.first.weight.device))
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        assert torch.equal(*losses)
    assert_same_bits(opt, ordinary)


def test_step_hooks_run_once_an_iteration(twins: Twins) -> None:
    """Pre- and post-hooks see `opt.step()`, not the steps in backward."""
    model, opt, _, _ = twins
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    release_gradients(model, opt)
    train(model, opt, 2)
    assert seen == ["pre", "post"] * 2


# --- what is freed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_gradients_are_freed_as_they_arrive(device: torch.device, released: bool) -> None:
    """At any time one gradient lives, besides the one that has just been stepped; without release, all do."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(8))).to(device)
    opt = FusedAdamW(model.parameters())
    params = [*model.parameters()]
    grads: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def count(p: torch.Tensor) -> None:
        grads.append(weakref.ref(p.grad))
        alive.append(sum(grad() is not None for grad in grads))

    for p in params:
        p.register_post_accumulate_grad_hook(count)  # runs before the step's
    if released:
        release_gradients(model, opt)
    for _ in range(3):
        model(torch.ones(2, 3, device=device)).sum().backward()
        assert all((p.grad is None) == released for p in params)
        opt.step()
        opt.zero_grad()
    assert max(alive) <= 2 if released else max(alive) == len(params)
    assert len(alive) == 3 * len(params)


def test_removed_parameters_are_not_kept_alive(device: torch.device) -> None:
    """A layer taken out of the model and the optimizer is freed by the next iteration."""
    model = Network(device)
    opt = FusedAdamW([*model.first.parameters(), *model.second.parameters(), *model.third.parameters()])
    handle = release_gradients(model, opt)
    train(model, opt, 2)
    old = weakref.ref(model.second.weight)
    for p in model.second.parameters():
        del opt.state[p]
    opt.param_groups[0]["params"] = [*model.first.parameters(), *model.third.parameters()]
    model.second = torch.nn.Identity()
    model.second.weight = model.third.weight  # type: ignore[assignment]  # for its dtype
    del p
    train(model, opt, 1)
    gc.collect()
    assert old() is None
    handle.remove()


# --- the handle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["remove", "with", "with-error"])
def test_release_is_undone(twins: Twins, how: str) -> None:
    """After `remove()`, or leaving the `with`, the ordinary loop goes on; then release can begin again."""
    model, opt, other, ordinary = twins
    handle = release_gradients(model, opt)
    assert handle.__enter__() is handle
    train(model, opt, 2)
    train(other, ordinary, 2)
    if how == "remove":
        handle.remove()
        handle.remove()  # which does nothing more
    else:
        error = ValueError() if how == "with-error" else None
        assert not handle.__exit__(type(error) if error else None, error, None), "errors are not swallowed"
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(batch(2, model.first.weight.device)).backward()
    assert all(p.grad is not None for p in model.parameters())
    opt.step()
    opt.zero_grad()
    train(model, opt, 1, first=3)
    train(other, ordinary, 2, first=2)
    assert_same_bits(opt, ordinary)
    with release_gradients(model, opt):
        train(model, opt, 1, first=4)
    train(other, ordinary, 1, first=4)
    assert_same_bits(opt, ordinary)


def test_removed_between_backward_and_step(twins: Twins) -> None:
    """What was stepped in backward is not stepped again."""
    model, opt, other, ordinary = twins
    handle = release_gradients(model, opt)
    model(batch(0, model.first.weight.device)).backward()
    handle.remove()
    opt.step()
    train(other, ordinary, 1)
    assert_same_bits(opt, ordinary)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_are_ordinary(twins: Twins, copied: Callable[[Any], Any]) -> None:
    """A copy of model and optimizer has no hooks, and can be released by itself."""
    model, opt, _, _ = twins
    release_gradients(model, opt)
    train(model, opt, 1)
    own_model, own_opt = copied((model, opt))
    own_model(batch(1, model.first.weight.device)).backward()
    assert all(p.grad is not None for p in own_model.parameters())
    own_opt.step()
    own_opt.zero_grad()
    train(model, opt, 1, first=1)
    assert_same_bits(opt, own_opt)
    release_gradients(own_model, own_opt)
    train(own_model, own_opt, 1, first=2)
    train(model, opt, 1, first=2)
    assert_same_bits(opt, own_opt)


# --- changes while gradients are released ---------------------------------------------------------------------------


def append_to_the_first_group(model: Any, opt: FusedAdamW) -> None:
    """A parameter more, before most others: their random bits are now those of the next place."""
    model.scale = torch.nn.Parameter(torch.full((3,), 0.5, device=model.first.weight.device))
    opt.param_groups[0]["params"].append(model.scale)


def remove_from_the_first_group(model: Any, opt: FusedAdamW) -> None:
    """A parameter less: it is not to be stepped any more."""
    del opt.param_groups[0]["params"][0]
    del opt.state[model.first.weight]


def remove_the_first_group(model: Any, opt: FusedAdamW) -> None:
    """All later groups move up."""
    for p in opt.param_groups.pop(0)["params"]:
        del opt.state[p]


def add_a_group(model: Any, opt: FusedAdamW) -> None:
    """With a parameter of its own."""
    model.scale = torch.nn.Parameter(torch.full((3,), 0.5, device=model.first.weight.device))
    opt.add_param_group({"params": [model.scale], "lr": 0.3})


def move_to_another_group(model: Any, opt: FusedAdamW) -> None:
    """From the first group to the last."""
    opt.param_groups[2]["params"].append(opt.param_groups[0]["params"].pop(0))


def replace_the_groups(model: Any, opt: FusedAdamW) -> None:
    """Another list of other dicts, as Megatron does, one of them lacking an option."""
    opt.param_groups = [dict(group) for group in opt.param_groups]
    del opt.param_groups[1]["weight_decay"]


def load_a_checkpoint(model: Any, opt: FusedAdamW) -> None:
    """Of the optimizer's own, with one moment changed."""
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["exp_avg"] += 1
    state["param_groups"][0]["lr"] = 0.02
    opt.load_state_dict(state)


def change_options(model: Any, opt: FusedAdamW) -> None:
    """Options and hyperparameters."""
    opt.param_groups[0].update(lr=0.5, amsgrad=True, cautious=True)
    opt.param_groups[1].update(ema_decay=0.25, weight_decay=torch.tensor(0.3))


def replace_state(model: Any, opt: FusedAdamW) -> None:
    """Another tensor in the state of a parameter."""
    opt.state[model.first.weight]["exp_avg"] = torch.ones_like(model.first.weight)


CHANGES = [
    append_to_the_first_group,
    remove_from_the_first_group,
    remove_the_first_group,
    add_a_group,
    move_to_another_group,
    replace_the_groups,
    load_a_checkpoint,
    change_options,
    replace_state,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_iterations(twins: Twins, change: Callable[[Any, FusedAdamW], None]) -> None:
    """Groups, options and states changed between two iterations count as they do in the ordinary loop."""
    model, opt, other, ordinary = twins
    release_gradients(model, opt)
    for each, optimizer in ((model, opt), (other, ordinary)):
        train(each, optimizer, 2)
        change(each, optimizer)
        for step in (2, 3):
            optimizer.zero_grad()
            each.zero_grad()
            loss = each(batch(step, each.first.weight.device))
            (loss + each.scale.square().sum() if hasattr(each, "scale") else loss).backward()
            optimizer.step()
    assert_same_bits(opt, ordinary)
    assert len(opt.state) == len(ordinary.state)
    opt.state_dict()  # which fails where a state belongs to no group


def test_warm_iterations_build_nothing(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first iteration each parameter gets its plan, and `opt.step()` one; in later ones no plan is built.

    Not even where the learning rate changes each time.
    """
    model, opt, _, _ = twins
    built: list[int] = []
    make = stepper.LaunchPlan

    def count(*args: Any, **kwargs: Any) -> Any:
        built.append(len(args[0]))
        return make(*args, **kwargs)

    monkeypatch.setattr(stepper, "LaunchPlan", count)
    release_gradients(model, opt)
    rates = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    train(model, opt, 1, between=lambda _: rates.step() if built else None)
    assert sorted(built) == [1] * 6 + [6]
    train(model, opt, 4, first=1, schedule=True)
    assert len(built) == 7


# --- what cannot work -------------------------------------------------------------------------------------------------


class Scaler:
    """A loss scaler, enabled or not."""

    def __init__(self, enabled: bool) -> None:
        """Remember which."""
        self.enabled = enabled

    def is_enabled(self) -> bool:
        """Whether it scales."""
        return self.enabled


def later_clipping(model: Any) -> FusedAdamW:
    """Clip one group."""
    groups = three_groups(model)
    groups[1]["max_grad_norm"] = 2.0
    return FusedAdamW(groups)


def with_a_gradient(model: Any) -> FusedAdamW:
    """Leave a gradient of an earlier backward."""
    model.second.bias.grad = torch.ones_like(model.second.bias)
    return FusedAdamW(three_groups(model))


def released_already(model: Any) -> FusedAdamW:
    """Release once."""
    opt = FusedAdamW(model.parameters())
    release_gradients(model, opt)
    return opt


REFUSALS: dict[str, tuple[Callable[[Any], FusedAdamW], dict[str, Any], type[Exception], str]] = {
    "max_grad_norm": (
        lambda model: FusedAdamW(model.parameters(), max_grad_norm=1.0),
        {},
        ValueError,
        r"param_groups\[0\] has max_grad_norm=1.0: the norm is known when the last gradient has arrived",
    ),
    "measuring": (
        lambda model: FusedAdamW(model.parameters(), max_grad_norm=float("inf")),
        {},
        ValueError,
        r"param_groups\[0\] has max_grad_norm=inf",
    ),
    "group": (later_clipping, {}, ValueError, r"param_groups\[1\] has max_grad_norm=2.0"),
    "skip_nonfinite": (
        lambda model: FusedAdamW(model.parameters(), skip_nonfinite=True),
        {},
        ValueError,
        "skip_nonfinite and max_skip_norm decide over a step when all gradients are there",
    ),
    "max_skip_norm": (
        lambda model: FusedAdamW(model.parameters(), max_skip_norm=9.0),
        {},
        ValueError,
        "skip_nonfinite and max_skip_norm decide over a step when all gradients are there",
    ),
    "accumulation": (
        lambda model: FusedAdamW(model.parameters()),
        dict(accumulation_steps=2),
        ValueError,
        "accumulation_steps=2: a released gradient is gone before the next backward",
    ),
    "scaler": (
        lambda model: FusedAdamW(model.parameters()),
        dict(grad_scaler=Scaler(True)),
        ValueError,
        "a GradScaler decides over the step when all gradients are there",
    ),
    "fused": (
        lambda model: FusedAdamW(model.parameters(), fused=True),
        {},
        ValueError,
        "fused=True announces a GradScaler",
    ),
    "gradient": (
        with_a_gradient,
        {},
        RuntimeError,
        r"param_groups\[1\]\['params'\]\[1\] has a gradient already",
    ),
    "other-model": (
        lambda model: FusedAdamW(Network(model.first.weight.device).parameters()),
        {},
        ValueError,
        "opt holds none of the model's parameters",
    ),
    "twice": (released_already, {}, RuntimeError, "released already"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_when_set_up(device: torch.device, case: str) -> None:
    """The message says which option and why, and no hook is left behind."""
    make, kwargs, kind, message = REFUSALS[case]
    model = Network(device)
    opt = make(model)
    hooks = [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    release = opt._internals.release
    with pytest.raises(kind, match=f"release_gradients: .*{message}"):
        release_gradients(model, opt, **kwargs)
    assert [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()] == hooks
    assert opt._internals.release is release


def test_another_optimizer_is_refused(device: torch.device) -> None:
    """A wrapper, or torch's own, is told apart by its type."""
    model = Network(device)
    with pytest.raises(TypeError, match=r"opt is a AdamW; expected a FusedAdamW"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))


def test_a_disabled_scaler_is_fine(twins: Twins) -> None:
    """As in loops that have one for float16 alone: its `step` and `update` do nothing of their own."""
    model, opt, other, ordinary = twins
    scaler = torch.amp.GradScaler(model.first.weight.device.type, enabled=False)
    release_gradients(model, opt, grad_scaler=scaler)
    for step in range(2):
        scaler.scale(model(batch(step, model.first.weight.device))).backward()
        scaler.step(opt)
        scaler.update()
    train(other, ordinary, 2)
    assert_same_bits(opt, ordinary)


def test_a_second_backward_raises_before_anything_is_written(twins: Twins) -> None:
    """The error names the parameter; afterwards the loop goes on as if the second backward had not been."""
    model, opt, other, ordinary = twins
    release_gradients(model, opt)
    train(model, opt, 1)
    train(other, ordinary, 2)
    model(batch(1, model.first.weight.device)).backward()
    before = snapshot(opt)
    with pytest.raises(
        RuntimeError, match=r"param_groups\[2\]\['params'\]\[\d\] got a second gradient before opt.step"
    ):
        model(batch(2, model.first.weight.device)).backward()
    assert_unchanged(before, snapshot(opt))
    opt.zero_grad()
    opt.step()
    assert_same_bits(opt, ordinary)
    train(model, opt, 1, first=2)
    train(other, ordinary, 1, first=2)
    assert_same_bits(opt, ordinary)


@pytest.mark.parametrize("supported", [False, True], ids=["host", "device"])
def test_a_scaler_at_work_raises_at_its_step(device: torch.device, supported: bool) -> None:
    """Torch's scaler finds no gradients to unscale; told that the optimizer unscales, it is stopped by ours."""
    model = Network(device)
    opt = FusedAdamW(model.parameters())
    if supported:
        opt._step_supports_amp_scaling = True
    release_gradients(model, opt)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(model(batch(0, device))).backward()
    if supported:
        expected: Any = pytest.raises(RuntimeError, match="a GradScaler called step.* while gradients are released")
    else:
        expected = pytest.raises(AssertionError, match="No inf checks were recorded")
    with expected:
        scaler.step(opt)


def test_clipping_switched_on_later_raises(twins: Twins) -> None:
    """At the next backward, before anything is written."""
    model, opt, _, _ = twins
    release_gradients(model, opt)
    train(model, opt, 1)
    opt.param_groups[1]["max_grad_norm"] = 1.0
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has max_grad_norm=1.0"):
        model(batch(1, model.first.weight.device)).backward()
    assert_unchanged(before, snapshot(opt))


def test_backward_while_averages_are_shown_raises(twins: Twins) -> None:
    """It would step the averages; the weights come back, and training goes on."""
    model, opt, other, ordinary = twins
    release_gradients(model, opt)
    train(model, opt, 1)
    with opt.ema_weights():
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=r"a backward pass that steps parameters within ema_weights\(\)"):
            model(batch(1, model.first.weight.device)).backward()
        assert_unchanged(before, snapshot(opt))
    opt.zero_grad()
    train(model, opt, 1, first=1)
    train(other, ordinary, 2)
    assert_same_bits(opt, ordinary)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 0)])
def test_errors_name_the_parameter(device: torch.device, place: tuple[int, int], named: bool) -> None:
    """A state that does not fit is reported under the parameter's place over all groups, or its name."""
    model = Network(device)
    groups: list[Any] = three_groups(model)
    if named:
        groups = [{"params": [*layer.named_parameters(name)]} for name, layer in model.named_children()]
    opt = FusedAdamW(groups)
    release_gradients(model, opt)
    train(model, opt, 1)
    group, index = place
    p = opt.param_groups[group]["params"][index]
    opt.state[p]["exp_avg"] = torch.zeros(1, device=device)
    before = p.detach().clone()
    expected = rf"exp_avg of .*param_groups\[{group}\]\['params'\]\[{index}\]"
    with pytest.raises(ValueError, match=expected) as error:
        model(batch(1, device)).backward()
    name = next(name for name, other in model.named_parameters() if other is p)
    assert (repr(name) in str(error.value)) == named
    assert torch.equal(p, before)


# --- two processes ----------------------------------------------------------------------------------------------------

TWO_RANKS = """
import copy, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from adamw_kernels import FusedAdamW, release_gradients

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
original = torch.nn.Sequential(
    torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 1)
)
for mixed in (False, True):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for released in (False, True):
        model = copy.deepcopy(original)
        kwargs = {"mesh": mesh, **({"mp_policy": policy} if mixed else {})}
        for layer in (model[0], model[2], model[3]):
            fully_shard(layer, **kwargs)
        fully_shard(model, **kwargs)
        opt = FusedAdamW(model.parameters(), lr=0.1, ema_decay=0.9)
        if released:
            handle = release_gradients(model, opt)
        for step in range(3):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).float().square().mean().backward()
            assert all((p.grad is None) == released for p in model.parameters()), (released, step)
            opt.step()
            opt.zero_grad()
        tensors = []
        for p in model.parameters():
            assert not torch.equal(p.full_tensor(), torch.zeros(1))
            tensors += [p.to_local(), *(opt.state[p][key].to_local() for key in ("exp_avg", "exp_avg_sq", "param_ema"))]
            tensors.append(opt.state[p]["step"])
        found.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (rank, mixed)

model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(original))
try:
    release_gradients(model, FusedAdamW(model.parameters()))
except ValueError as error:
    assert "DistributedDataParallel" in str(error), error
else:
    raise AssertionError("DistributedDataParallel reduces gradients after the hooks")
for wrapped_first in (True, False):  # the module inside, which says nothing of its wrapper
    inner = copy.deepcopy(original)
    wrapper = torch.nn.parallel.DistributedDataParallel(inner) if wrapped_first else None
    with release_gradients(inner, FusedAdamW(inner.parameters())):
        wrapper = wrapper or torch.nn.parallel.DistributedDataParallel(inner)
        try:
            wrapper(torch.ones(2, 4))
        except RuntimeError as error:
            assert "DistributedDataParallel" in str(error), error
        else:
            raise AssertionError("the replicas would drift apart")
    wrapper(torch.ones(2, 4)).float().square().mean().backward()
dist.destroy_process_group()
print("agreed")
"""


@pytest.mark.slow
def test_fully_sharded_parameters(tmp_path: pathlib.Path) -> None:
    """FSDP2 on two ranks, in float32 and mixed precision: the weights and states of the loop without release.

    DistributedDataParallel, which reduces gradients after they have arrived, is refused.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, answers, strict=True):
        assert rank.returncode == 0, err
        assert out.strip() == "agreed"
