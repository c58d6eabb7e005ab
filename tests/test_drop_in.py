"""FusedAdamW in the place of torch.optim.AdamW: its constructor, its life, its neighbours, its trajectories.

Wherever torch's optimizer can do the same, it stands beside ours, gets the same treatment, and must end up at the same
weights, moments and step counts.
"""

import contextlib
import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, Path
from pairs import (
    Gradients,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    copies,
    make_params,
    params_of,
    snapshot,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adamw_kernels import FusedAdamW, fused_adamw_

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def make_both(device: torch.device, **options: Any) -> tuple[FusedAdamW, torch.optim.AdamW]:
    """Return both optimizers over the same float64 parameters."""
    params = make_params(device)
    options = {**HYPER, **options}
    return FusedAdamW(copies(params), **options), torch.optim.AdamW(copies(params), **options)


def step_both(
    ours: FusedAdamW, theirs: torch.optim.Optimizer, gradients: Gradients, steps: int = 1, **kwargs: Any
) -> None:
    """Give both the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(params_of(ours), params_of(theirs), **kwargs)
        ours.step()
        theirs.step()


def one_param(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Return a parameter of four ones."""
    return torch.nn.Parameter(torch.ones(4, dtype=dtype, device=device))


# --- the constructor --------------------------------------------------------------------------------------------------


def test_signature_is_torchs() -> None:
    """Every argument of torch.optim.AdamW: same name, default, kind and place; what we add is keyword-only."""
    ours = inspect.signature(FusedAdamW).parameters
    theirs = inspect.signature(torch.optim.AdamW).parameters
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    for name in ours.keys() - theirs.keys():
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert ours[name].default is not inspect.Parameter.empty, name


def test_step_has_torchs_signature() -> None:
    """`step` takes what torch's takes, and no `grad_scaler`, by which GradScaler would recognise another protocol."""
    assert list(inspect.signature(FusedAdamW.step).parameters) == ["self", "closure"]


def test_defaults_and_groups_are_torchs() -> None:
    """Without arguments, defaults and group hold torch's keys and values."""
    ours, theirs = FusedAdamW([one_param()]), torch.optim.AdamW([one_param()])
    assert ours.defaults == theirs.defaults
    group, other = dict(ours.param_groups[0]), dict(theirs.param_groups[0])
    assert len(group.pop("params")) == len(other.pop("params")) == 1
    assert group == other
    assert isinstance(ours, torch.optim.Optimizer)


def test_without_decoupling_the_groups_are_adams() -> None:
    """`decoupled=False` is torch.optim.Adam with weight decay, also in what the groups say."""
    ours = FusedAdamW([one_param()], weight_decay=0.1, decoupled=False)
    assert ours.defaults == torch.optim.Adam([one_param()], weight_decay=0.1).defaults


def test_repr_shows_the_groups() -> None:
    """The representation names the class and the hyperparameters, as torch's does."""
    text = repr(FusedAdamW([one_param()], lr=0.125))
    assert text.startswith("FusedAdamW (") and "lr: 0.125" in text


OUT_OF_RANGE = [
    pytest.param(dict(lr=-1.0), "Invalid learning rate: -1.0", id="lr"),
    pytest.param(dict(lr=float("nan")), "Invalid learning rate: nan", id="lr-nan"),
    pytest.param(dict(lr=torch.tensor(-1.0)), "Invalid learning rate: -1.0", id="lr-tensor"),
    pytest.param(dict(lr=torch.ones(2)), "Tensor lr must be 1-element", id="lr-two-elements"),
    pytest.param(dict(eps=-1e-8), "Invalid epsilon value: -1e-08", id="eps"),
    pytest.param(dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1", id="weight_decay"),
    pytest.param(dict(betas=(1.0, 0.999)), "Invalid beta parameter at index 0: 1.0", id="beta1"),
    pytest.param(dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1", id="beta2"),
    pytest.param(
        dict(betas=(torch.tensor(0.9), torch.full((2,), 0.5))), r"Tensor betas\[1\] must be 1-element", id="betas-shape"
    ),
]


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A value that torch refuses is refused with torch's message, in the constructor and, unlike torch's, per group."""
    if message not in (r"Tensor betas\[1\] must be 1-element", "Tensor lr must be 1-element"):
        with pytest.raises(ValueError, match=message):
            torch.optim.AdamW([one_param()], **options)
    with pytest.raises(ValueError, match=f"FusedAdamW: {message}"):
        FusedAdamW([one_param()], **options)
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: {message}"):
        FusedAdamW([{"params": [one_param()]}, {"params": [one_param()], **options}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(dict(lr=float("inf")), "lr is inf; expected a finite number", id="lr-inf"),
        pytest.param(dict(eps=float("inf")), "eps is inf; expected a finite number", id="eps-inf"),
        pytest.param(dict(betas=(0.9, 0.99, 0.999)), "betas has 3 entries; expected two", id="three-betas"),
        pytest.param(dict(eps=torch.ones(3)), "Tensor eps must be 1-element", id="eps-shape"),
        pytest.param(
            dict(weight_decay=torch.ones(3)), "Tensor weight_decay must be 1-element", id="weight_decay-shape"
        ),
        pytest.param(dict(backend="gpu"), "expected one of auto, cpu, triton, cuda", id="backend"),
    ],
)
def test_values_that_would_destroy_weights_are_refused(options: dict[str, Any], message: str) -> None:
    """So are values that torch lets through to a step."""
    with pytest.raises(ValueError, match=message):
        FusedAdamW([one_param()], **options)


CANNOT_BE_MET = [
    pytest.param(dict(differentiable=True), r"differentiable=True.*Use torch\.optim\.AdamW", id="differentiable"),
    pytest.param(dict(fused=False), r"fused=False.*Use torch\.optim\.AdamW", id="not-fused"),
    pytest.param(dict(fused=True, foreach=True), "`fused` and `foreach` cannot be `True` together", id="both"),
]


@pytest.mark.parametrize(("options", "message"), CANNOT_BE_MET)
def test_options_that_cannot_be_met_are_errors(options: dict[str, Any], message: str) -> None:
    """What there is no implementation for says so and names the way out, in the constructor and per group."""
    with pytest.raises(RuntimeError, match=f"FusedAdamW: {message}"):
        FusedAdamW([one_param()], **options)
    with pytest.raises(RuntimeError, match=rf"param_groups\[0\]: {message}"):
        FusedAdamW([{"params": [one_param()], **options}])


@pytest.mark.parametrize(
    "options",
    [
        dict(foreach=True),
        dict(foreach=False),
        dict(fused=True),
        dict(fused=True, foreach=False),
        dict(capturable=True),
        dict(foreach=True, capturable=True),
        dict(fused=True, capturable=True),
        dict(foreach=True, lr=torch.tensor(1e-2, dtype=torch.float64)),
    ],
    ids=lambda options: "-".join(f"{key}_{value}" for key, value in options.items() if not torch.is_tensor(value)),
)
def test_accepted_flags_choose_nothing(device: torch.device, options: dict[str, Any]) -> None:
    """`foreach`, `fused` and `capturable` stay in the groups and change no bit: there is one implementation."""
    plain, flagged = (FusedAdamW(make_params(device), **{**HYPER, **extra}) for extra in ({}, options))
    for name, value in options.items():
        assert flagged.param_groups[0][name] is value
    gradients = Gradients()
    for _ in range(3):
        gradients.give(params_of(plain), params_of(flagged))
        plain.step()
        flagged.step()
    assert_same_bits(plain, flagged)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        pytest.param(lambda: [], ValueError, id="nothing"),
        pytest.param(lambda: one_param(), TypeError, id="a-tensor"),
        pytest.param(lambda: [{"params": {one_param()}}], TypeError, id="a-set"),
        pytest.param(lambda: [one_param() * 2], ValueError, id="not-a-leaf"),
        pytest.param(lambda: [1.0], TypeError, id="not-a-tensor"),
        pytest.param(lambda: [("a", one_param()), one_param()], ValueError, id="half-named"),
    ],
)
def test_parameters_that_torch_refuses(make: Callable[[], Any], error: type[Exception]) -> None:
    """What cannot be optimized is refused with torch's kind of error."""
    for optimizer in (torch.optim.AdamW, FusedAdamW):
        with pytest.raises(error):
            optimizer(make())


def test_parameters_may_be_named_grouped_or_generated(device: torch.device) -> None:
    """Generators, groups and names are taken as torch takes them."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).to(device)
    assert len(FusedAdamW(model.parameters()).param_groups[0]["params"]) == 4
    named = FusedAdamW(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].weight}]
    grouped = FusedAdamW(groups, weight_decay=0.0)
    assert [group["lr"] for group in grouped.param_groups] == [0.5, 1e-3]
    assert [len(group["params"]) for group in grouped.param_groups] == [2, 1]
    assert [group["weight_decay"] for group in grouped.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("wrong", ["grad-dtype", "state-shape"])
def test_errors_name_the_parameter(device: torch.device, wrong: str) -> None:
    """A parameter that the user named is called by that name, and by its place."""
    named = [("encoder.weight", one_param(device)), ("encoder.bias", one_param(device))]
    opt = FusedAdamW(named)
    for _, p in named:
        p.grad = torch.ones_like(p)
    opt.step()
    bias = named[1][1]
    if wrong == "grad-dtype":
        bias.grad = None
        bias.grad_dtype = torch.float64
        bias.grad = torch.ones(4, dtype=torch.float64, device=device)
    else:
        opt.state[bias]["exp_avg"] = torch.zeros(5, device=device)
    before = [p.detach().clone() for _, p in named]
    with pytest.raises(
        (TypeError, ValueError), match=r"parameter 'encoder\.bias' \(param_groups\[0\]\['params'\]\[1\]\)"
    ):
        opt.step()
    assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))


# --- hyperparameters that move ----------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6, eta_min=1e-4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8, cycle_momentum=True),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.8)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
}


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(path: Path, name: str, kind: str) -> None:
    """Torch's schedulers move a float or tensor learning rate (OneCycleLR the betas too), and every step follows."""
    ours, theirs = make_both(path.device)
    if kind == "tensor":
        ours.param_groups[0]["lr"] = torch.tensor(HYPER["lr"], dtype=torch.float64, device=path.device)
    with warnings.catch_warnings():
        # "lr_scheduler.step() before optimizer.step()": it watches `step` being called.
        warnings.simplefilter("error", UserWarning)
        schedulers = [SCHEDULERS[name](opt) for opt in (ours, theirs)]
        gradients, rates, momenta, plans = Gradients(), set(), set(), []
        for _ in range(6):
            step_both(ours, theirs, gradients)
            plans.append(ours._internals.stepper.plan)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.add(float(ours.param_groups[0]["lr"]))
            momenta.add(float(ours.param_groups[0]["betas"][0]))
    assert_agree(ours, theirs)
    assert len(rates) > 2, "the schedule moved"
    assert (len(momenta) > 2) == (name == "OneCycleLR")
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")
    assert all(plan is plans[0] for plan in plans), "a schedule does not rebuild the launch table"


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_values_written_into_a_group(path: Path, key: str) -> None:
    """A value assigned between steps counts from the next step on."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    step_both(ours, theirs, gradients)
    for value in (0.5, 0.25, 0):
        for opt in (ours, theirs):
            opt.param_groups[0][key] = (value, value / 2) if key == "betas" else value
        step_both(ours, theirs, gradients)
    assert_agree(ours, theirs)


def test_betas_in_a_list_written_in_place(path: Path) -> None:
    """Betas may be a list, and its entries be assigned."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    for opt in (ours, theirs):
        opt.param_groups[0]["betas"] = [0.9, 0.99]
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        opt.param_groups[0]["betas"][0] = 0.5
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)


def test_groups_have_their_own_values(path: Path) -> None:
    """Each group's parameters move with the group's values, whatever the others do."""
    params = make_params(path.device)
    options = [dict(lr=1e-2), dict(lr=1e-3, weight_decay=0.3, betas=(0.5, 0.9)), dict(lr=0.1, eps=1e-3)]
    ours, theirs = (
        cls([{"params": [p], **o} for p, o in zip(copies(params), options, strict=True)])
        for cls in (FusedAdamW, torch.optim.AdamW)
    )
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        opt.param_groups[1]["lr"] = 0.05
        opt.param_groups[2]["weight_decay"] = 0.0
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dtype", "place"),
    [((), torch.float32, "device"), ((1,), torch.float64, "device"), ((1,), torch.bfloat16, "cpu")],
    ids=["0-dim-float32", "1-element-float64", "1-element-bfloat16-on-cpu"],
)
def test_tensor_hyperparameters_are_read_by_every_step(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, place: str
) -> None:
    """Tensors filled in place, given new memory or replaced by floats and back act as floats of their values do."""
    opt, judge = (FusedAdamW(make_params(path.device), **HYPER) for _ in range(2))
    gradients = Gradients()
    where = path.device if place == "device" else torch.device("cpu")

    def tensor(value: float) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=where)

    def step() -> None:
        group, beside = opt.param_groups[0], judge.param_groups[0]
        for key in ("lr", "eps", "weight_decay"):
            beside[key] = float(group[key])
        beside["betas"] = tuple(float(beta) for beta in group["betas"])
        gradients.give(params_of(opt), params_of(judge))
        opt.step()
        judge.step()
        assert_same_bits(opt, judge)

    group = opt.param_groups[0]
    step()
    lr, beta1, beta2, decay = tensor(0.1), tensor(0.8), tensor(0.9), tensor(0.3)
    group.update(lr=lr, betas=(beta1, beta2), weight_decay=decay, eps=tensor(1e-3))
    step()
    lr.fill_(0.2)
    beta1.fill_(0.5)
    decay.zero_()
    step()
    lr.data = tensor(0.05)
    step()
    group["lr"] = 0.4
    step()
    group["lr"] = lr
    step()
    lr.mul_(2)
    step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_learning_rate_given_another_dtype(path: Path, dtype: torch.dtype) -> None:
    """`lr.data = ...` may even change the tensor's dtype; the next step reads the value, not the old width."""
    opt, judge = (FusedAdamW(make_params(path.device), **HYPER) for _ in range(2))
    lr = torch.tensor(0.25, device=path.device)
    opt.param_groups[0]["lr"] = lr
    gradients = Gradients()
    for value in (0.25, 0.5):
        judge.param_groups[0]["lr"] = value
        gradients.give(params_of(opt), params_of(judge))
        opt.step()
        judge.step()
        assert_same_bits(opt, judge)
        lr.data = torch.tensor(0.5, dtype=dtype, device=path.device)


@pytest.mark.parametrize("number", [np.float32(0.01), np.float64(0.01), 1, np.int64(1)], ids=lambda n: type(n).__name__)
def test_any_real_number_is_a_hyperparameter(device: torch.device, number: Any) -> None:
    """Integers and NumPy scalars, which torch takes, mean what they mean as floats; also when assigned later."""
    at_once, later, judge = (
        FusedAdamW(make_params(device), lr=lr, weight_decay=0.1) for lr in (number, 0.5, float(number))
    )
    later.param_groups[0]["lr"] = number
    gradients = Gradients()
    for _ in range(2):
        gradients.give(*map(params_of, (at_once, later, judge)))
        for opt in (at_once, later, judge):
            opt.step()
    assert_same_bits(at_once, judge)
    assert_same_bits(later, judge)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", float("nan"), r"param_groups\[1\]: lr is nan"),
        ("betas", (0.9, 1.5), r"param_groups\[1\]: beta2 is 1\.5; expected 0 <= beta2 < 1"),
        ("eps", -1.0, r"param_groups\[1\]: eps is -1\.0; expected eps >= 0"),
        ("lr", torch.ones(2), r"param_groups\[1\]: lr is a tensor of shape \(2,\)"),
        ("weight_decay", "much", r"param_groups\[1\]: weight_decay is 'much'"),
    ],
)
def test_a_bad_value_written_into_a_group(device: torch.device, key: str, value: Any, message: str) -> None:
    """The step that meets it says so and writes nothing; corrected, training goes on as if it had not been."""
    opt, judge = (FusedAdamW([{"params": [p]} for p in make_params(device)], **HYPER) for _ in range(2))
    gradients = Gradients()
    gradients.give(params_of(opt), params_of(judge))
    opt.step()
    judge.step()
    before = snapshot(opt)
    good = opt.param_groups[1][key]
    opt.param_groups[1][key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opt.step()
    assert_unchanged(before, snapshot(opt))
    opt.param_groups[1][key] = good
    opt.step()
    judge.step()
    assert_same_bits(opt, judge)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "decoupled_weight_decay"])
def test_flags_toggled_between_steps(path: Path, flag: str) -> None:
    """A group's flags count from the next step on; amsgrad switched on late starts its maximum at zero."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for _ in range(2):
        for opt in (ours, theirs):
            opt.param_groups[0][flag] = not opt.param_groups[0][flag]
        if flag == "amsgrad":  # torch's own fails here for want of the state
            for p in params_of(theirs):
                theirs.state[p].setdefault("max_exp_avg_sq", torch.zeros_like(p))
        step_both(ours, theirs, gradients, 2)
        assert_agree(ours, theirs)


# --- closures, hooks, subclasses --------------------------------------------------------------------------------------


def test_closure(path: Path) -> None:
    """A closure is called once, before the update, with gradients enabled even under no_grad; its loss is returned."""
    ours, theirs = make_both(path.device)
    calls: list[bool] = []

    def closure_of(opt: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss = torch.stack([p.square().sum() for p in params_of(opt)]).sum()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        with torch.no_grad():
            losses = [opt.step(closure_of(opt)) for opt in (ours, theirs)]
            assert not torch.is_grad_enabled()
        assert losses[0].requires_grad
        assert_close(losses[0], losses[1], "host_logic_in_float64", "the loss")
    assert calls == [True] * 6
    assert_agree(ours, theirs)


def test_step_without_closure_returns_none(device: torch.device) -> None:
    """There is no loss to return."""
    opt = FusedAdamW(make_params(device))
    Gradients().give(params_of(opt))
    assert opt.step() is None
    assert opt.step(closure=lambda: 3.0) == 3.0


def test_closure_that_raises(device: torch.device) -> None:
    """Its exception comes through and nothing is updated."""
    opt = FusedAdamW(make_params(device))
    Gradients().give(params_of(opt))
    opt.step()
    before = snapshot(opt)

    def closure() -> float:
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss today"):
        opt.step(closure)
    assert_unchanged(before, snapshot(opt))


def test_closure_may_change_the_learning_rate(path: Path) -> None:
    """What a closure writes into a group counts for the step that called it."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    step_both(ours, theirs, gradients)
    gradients.give(params_of(ours), params_of(theirs))
    for opt in (ours, theirs):
        opt.step(lambda opt=opt: opt.param_groups[0].update(lr=0.3))
    assert_agree(ours, theirs)


def test_step_hooks(device: torch.device) -> None:
    """Hooks of the instance and of all optimizers run around the update, see its effect, and may replace arguments."""
    opt = FusedAdamW([one_param(device)], lr=0.5)
    p = params_of(opt)[0]
    p.grad = torch.ones_like(p)
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: seen.append((name, bool((p == 1).all())))

    def replace_closure(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {"closure": lambda: 42}

    handles = [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
        opt.register_step_pre_hook(replace_closure),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        assert opt.step() == 42
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    assert opt.step() is None and len(seen) == 4, "removed hooks stay silent"


def test_gradient_made_in_a_pre_hook(path: Path) -> None:
    """A pre-hook may replace gradients (clipping does): the step uses what it leaves."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()

    def halve(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p in params_of(opt):
            p.grad = p.grad * 0.5

    for opt in (ours, theirs):
        opt.register_step_pre_hook(halve)
    step_both(ours, theirs, gradients, 3)
    assert_agree(ours, theirs)


def test_post_accumulate_grad_hooks(device: torch.device) -> None:
    """An optimizer a parameter, stepped inside backward and freeing each gradient there, does what one step does."""
    params = make_params(device)
    ours, theirs = copies(params), copies(params)
    single = {p: FusedAdamW([p], **HYPER) for p in ours}

    def step_and_free(p: torch.Tensor) -> None:
        single[p].step()
        single[p].zero_grad()

    for p in ours:
        p.register_post_accumulate_grad_hook(step_and_free)
    whole = FusedAdamW(theirs, **HYPER)
    for _ in range(3):
        for group in (ours, theirs):
            torch.stack([p.pow(3).sum() for p in group]).sum().backward()
        whole.step()
        whole.zero_grad()
        assert all(p.grad is None for p in ours)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_wrapped_and_remade_optimizers(device: torch.device) -> None:
    """A class made at run time over a copied `__dict__` steps, and so does a `step` patched onto the instance."""
    plain, remade, patched = (FusedAdamW(make_params(device), **HYPER) for _ in range(3))

    class Wrapper:
        """Lightning's way: takes over the attributes, never calls FusedAdamW.__init__."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}

    wrapper = type("WrappedFusedAdamW", (Wrapper, FusedAdamW), {})(remade)
    calls = []
    original = patched.step

    def counted(self: FusedAdamW, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(*args, **kwargs)

    patched.step = types.MethodType(counted, patched)  # type: ignore[method-assign]  # accelerate's way
    scheduler = lr_scheduler.StepLR(patched, step_size=100)  # wraps `patched.step.__func__`
    gradients = Gradients()
    for _ in range(3):
        gradients.give(*map(params_of, (plain, remade, patched)))
        plain.step()
        wrapper.step()
        patched.step()
        scheduler.step()
    assert isinstance(wrapper, FusedAdamW)
    assert calls == [patched] * 3
    assert_same_bits(plain, remade)
    assert_same_bits(plain, patched)


# --- groups and parameters that come and go ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, 3])
def test_group_added_at_any_time(path: Path, when: int) -> None:
    """A group added before, after or between steps starts at step 1 while the others go on."""
    params = make_params(path.device)
    ours, theirs = (cls(copies(params), **HYPER) for cls in (FusedAdamW, torch.optim.AdamW))
    gradients = Gradients()
    step_both(ours, theirs, gradients, when)
    more = make_params(path.device, shapes=((4,), (2, 2)), seed=7)
    for opt in (ours, theirs):
        opt.add_param_group({"params": copies(more), "lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True})
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)
    assert [float(ours.state[p]["step"]) for p in params_of(ours)] == [when + 2.0] * 3 + [2.0] * 2


def test_group_with_its_own_kind_of_decay(path: Path) -> None:
    """A group may name `decoupled`, as the constructor calls it; it is kept under torch's name."""
    params = make_params(path.device, shapes=((3, 4), (5,)))
    ours = FusedAdamW([{"params": copies(params[:1])}, {"params": copies(params[1:]), "decoupled": False}], **HYPER)
    theirs = torch.optim.AdamW([{"params": copies([p])} for p in params], **HYPER)
    theirs.param_groups[1]["decoupled_weight_decay"] = False
    assert ours.param_groups[0].keys() == ours.param_groups[1].keys() == theirs.param_groups[0].keys()
    step_both(ours, theirs, Gradients(), 3)
    assert_agree(ours, theirs)


@pytest.mark.parametrize(
    ("extra", "error"), [(dict(lr=-1.0), ValueError), (dict(differentiable=True), RuntimeError), (None, ValueError)]
)
def test_group_that_is_refused(device: torch.device, extra: dict[str, Any] | None, error: type[Exception]) -> None:
    """A refused group (a bad value, a parameter that another group has) leaves the optimizer as it was."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()
    gradients.give(params_of(opt), params_of(judge))
    opt.step()
    judge.step()
    params = [params_of(opt)[0]] if extra is None else [one_param(device)]
    with pytest.raises(error):
        opt.add_param_group({"params": params, **(extra or {})})
    assert len(opt.param_groups) == 1
    gradients.give(params_of(opt), params_of(judge))
    opt.step()
    judge.step()
    assert_same_bits(opt, judge)


REPLACEMENTS: dict[str, Callable[[torch.optim.Optimizer, list[torch.nn.Parameter]], None]] = {
    "one-in-place": lambda opt, new: opt.param_groups[0]["params"].__setitem__(1, new[1]),
    "list-swapped": lambda opt, new: opt.param_groups[0].update(params=list(new)),
    "tuple-swapped": lambda opt, new: opt.param_groups[0].update(params=tuple(new)),
    "groups-swapped": lambda opt, new: setattr(opt, "param_groups", [{**opt.param_groups[0], "params": list(new)}]),
    "reversed": lambda opt, new: opt.param_groups[0]["params"].reverse(),
    "one-removed": lambda opt, new: opt.param_groups[0]["params"].__delitem__(0),
    "one-appended": lambda opt, new: opt.param_groups[0]["params"].append(new[2]),
}


@pytest.mark.parametrize("keep_state", [True, False], ids=["state-kept", "state-dropped"])
@pytest.mark.parametrize("change", REPLACEMENTS)
def test_parameters_replaced_in_place(device: torch.device, change: str, keep_state: bool) -> None:
    """Whatever is in the groups at a step is updated, what left them is not; new parameters start at step 1."""
    ours, theirs = make_both(device)
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        old = params_of(opt)
        REPLACEMENTS[change](opt, make_params(device, seed=5))
        left = [p for p in old if not any(p is q for q in params_of(opt))]
        if not keep_state:
            for p in left:
                del opt.state[p]
        opt.left = [(p, p.detach().clone()) for p in left]
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)
    for p, before in ours.left:
        assert torch.equal(p, before), "a parameter that left was updated"


def test_stubs_in_the_place_of_parameters(device: torch.device) -> None:
    """Tensors put in the groups for a while, with an int where a method was (accelerate does this), do no harm."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()

    def step() -> None:
        gradients.give(params_of(opt), params_of(judge))
        opt.step()
        judge.step()

    step()
    real = opt.param_groups[0]["params"]
    opt.param_groups[0]["params"] = []
    for p in real:
        stub = torch.empty(1)
        stub.data_ptr = p.data_ptr()  # type: ignore[method-assign, assignment]
        opt.param_groups[0]["params"].append(stub)
    opt.step()  # no gradients: nothing to do
    opt.param_groups[0]["params"] = real
    step()
    assert_same_bits(opt, judge)


def test_parameters_frozen_and_thawed(path: Path) -> None:
    """A frozen layer stays as it is and keeps its step count; thawed, it goes on where it was."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.to(path.device, torch.float64)
    ours = FusedAdamW(models[0].parameters(), **HYPER)
    theirs = torch.optim.AdamW(models[1].parameters(), **HYPER)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(path.device)

    def train(steps: int) -> None:
        for _ in range(steps):
            for model, opt in zip(models, (ours, theirs), strict=True):
                opt.zero_grad()
                model(x).square().sum().backward()
                opt.step()

    train(2)
    for frozen, first in ((True, 3), (False, 5)):
        for model in models:
            model[0].requires_grad_(not frozen)
        train(2)
        assert_agree(ours, theirs)
        assert float(ours.state[models[0][2].weight]["step"]) == first + 1
        assert float(ours.state[models[0][0].weight]["step"]) == (2 if frozen else 4)


def test_gradients_that_come_and_go(path: Path) -> None:
    """Each parameter counts its own steps, exactly as torch counts them, and the launch table stays."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    pattern = [(1, 0, 0), (0, 1, 0), (1, 1, 1), (0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    plans = []
    for present in pattern:
        step_both(ours, theirs, gradients, present=map(bool, present))
        plans.append(ours._internals.stepper.plan)
        assert_agree(ours, theirs)
    assert [float(ours.state[p]["step"]) for p in params_of(ours)] == [
        float(sum(row)) for row in zip(*pattern, strict=True)
    ]
    assert all(plan is plans[2] for plan in plans[2:]), "once every parameter has had a gradient, nothing is rebuilt"


def test_no_gradients_at_all(device: torch.device) -> None:
    """A step with nothing to do does nothing, and creates no state, as torch's."""
    ours, theirs = make_both(device)
    before = snapshot(ours)
    for opt in (ours, theirs):
        opt.step()
        opt.step()
        assert not opt.state
    assert_unchanged(before, snapshot(ours))


def clear_state(opt: torch.optim.Optimizer) -> None:
    """Forget everything."""
    opt.state.clear()


def pop_one(opt: torch.optim.Optimizer) -> None:
    """Forget one parameter."""
    opt.state.pop(params_of(opt)[1])


def empty_one(opt: torch.optim.Optimizer) -> None:
    """Forget one parameter's entries and keep its dict."""
    opt.state[params_of(opt)[1]].clear()


def replace_moments(opt: torch.optim.Optimizer) -> None:
    """Put other tensors in the place of one parameter's moments."""
    state = opt.state[params_of(opt)[0]]
    state["exp_avg"] = state["exp_avg"] * 0.5
    state["exp_avg_sq"] = state["exp_avg_sq"].clone() + 1


def write_moments(opt: torch.optim.Optimizer) -> None:
    """Write into the moments that are there."""
    for state in opt.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].mul_(2)


def set_steps(opt: torch.optim.Optimizer) -> None:
    """Write steps in place and put another tensor in the place of one."""
    first, second, _ = params_of(opt)
    opt.state[first]["step"].fill_(20)
    opt.state[second]["step"] = torch.tensor(9.0)


def replace_entry(opt: torch.optim.Optimizer) -> None:
    """Put copies of a parameter's tensors into a new dict."""
    p = params_of(opt)[2]
    opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def swap_entries(opt: torch.optim.Optimizer) -> None:
    """Re-insert an entry, which changes the order of the state."""
    p = params_of(opt)[0]
    opt.state[p] = opt.state.pop(p)


STATE_EDITS = [clear_state, pop_one, empty_one, replace_moments, write_moments, set_steps, replace_entry, swap_entries]


@pytest.mark.parametrize("edit", STATE_EDITS, ids=lambda edit: edit.__name__)
def test_state_edited_by_the_user(device: torch.device, edit: Callable[[torch.optim.Optimizer], None]) -> None:
    """State that is deleted starts anew; state that is replaced or written is what the next step reads."""
    ours, theirs = make_both(device)
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        edit(opt)
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)


def test_state_of_the_users_own(path: Path) -> None:
    """Entries that FusedAdamW does not know, of any kind, stay untouched and disturb nothing."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    own = {"note": "best so far", "ema": torch.ones(3), "sparse": torch.eye(2).to_sparse(), "nested": [torch.ones(2)]}
    step_both(ours, theirs, gradients)
    for opt in (ours, theirs):
        opt.state[params_of(opt)[0]].update(own)
        opt.state["everyone"] = {"epoch": 3}
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        for key, value in own.items():
            assert opt.state[params_of(opt)[0]].pop(key) is value
        assert opt.state["everyone"] == {"epoch": 3}
    assert_agree(ours, theirs)


# --- parameters that move or change their type ------------------------------------------------------------------------


def test_data_swapped_between_steps(path: Path) -> None:
    """`p.data = ...` gives a parameter other memory and values; the next step writes there and nowhere else."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    old = [p.data for p in params_of(ours)]
    for opt in (ours, theirs):
        for p in params_of(opt):
            p.data = p.data * 0.5
    before = [memory.clone() for memory in old]
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True))


def test_layout_changed_at_the_same_address(path: Path) -> None:
    """A transposed view of the same memory is another layout: gradients and moments are paired by index, not place."""
    params = make_params(path.device, shapes=((4, 4),))
    ours, theirs = (cls(copies(params), **HYPER) for cls in (FusedAdamW, torch.optim.AdamW))
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for opt in (ours, theirs):
        (p,) = params_of(opt)
        p.data = p.data.t()
    step_both(ours, theirs, gradients, 2)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_model_retyped_between_steps(path: Path, convert: str) -> None:
    """After `.half()`, `.bfloat16()`, `.double()` or `.float()` training goes on with the same moments and counts.

    `.float()` knows nothing of the rest of a 16-bit weight, which is then dropped with a warning.
    """
    model = torch.nn.Linear(3, 4).to(path.device)
    if convert == "float":
        model.bfloat16()
    opt = FusedAdamW(model.parameters(), **HYPER)
    gradients = Gradients()
    for _ in range(2):
        gradients.give(model.parameters())
        opt.step()
    getattr(model, convert)()
    dtype = model.weight.dtype
    moment_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    expected = []
    gradients.give(model.parameters())
    for p in model.parameters():
        state = opt.state[p]
        p_copy, grad = p.detach().to(moment_dtype, copy=True), p.grad.to(moment_dtype, copy=True)
        m, v, step = (
            state["exp_avg"].to(moment_dtype, copy=True),
            state["exp_avg_sq"].to(moment_dtype, copy=True),
            state["step"].clone(),
        )
        options = dict(
            lr=HYPER["lr"], beta1=HYPER["betas"][0], beta2=HYPER["betas"][1], weight_decay=HYPER["weight_decay"]
        )
        fused_adamw_([p_copy], [grad], [m], [v], [], [step], **options)
        expected.append((p_copy, m, v))
    dropped = pytest.warns(UserWarning, match="is torch.float32 now and its param_remainder")
    with dropped if convert == "float" else contextlib.nullcontext():
        opt.step()
    for p, (p_copy, m, v) in zip(model.parameters(), expected, strict=True):
        assert p.dtype == dtype and torch.equal(p, p_copy.to(dtype))
        assert torch.equal(opt.fp32_weights()[p], p_copy)
        assert float(opt.state[p]["step"]) == 3
        for key, moment in (("exp_avg", m), ("exp_avg_sq", v)):
            assert opt.state[p][key].dtype == moment_dtype and torch.equal(opt.state[p][key], moment)


def test_narrowing_float64_moments_is_said_aloud(device: torch.device) -> None:
    """Only float64 moments can lose something when the model becomes float32: a warning names them."""
    opt = FusedAdamW([("head", one_param(device, torch.float64))], **HYPER)
    (p,) = params_of(opt)
    p.grad = torch.ones_like(p)
    opt.step()
    wide = opt.state[p]["exp_avg"].clone()
    p.grad = None
    p.data = p.data.float()
    p.grad = torch.zeros_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
        opt.step()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2, "one for each moment, once"
    for key, text in zip(("exp_avg", "exp_avg_sq"), texts, strict=True):
        assert text.startswith(f"{key} of parameter 'head' (param_groups[0]['params'][0]) is float64 and its parameter")
        assert opt.state[p][key].dtype == torch.float32
    assert wide.dtype == torch.float64


@pytest.mark.skipif(not HAS_GPU, reason="a second device to move to")
@pytest.mark.parametrize("there_and_back", [False, True])
def test_model_moved_to_another_device(there_and_back: bool) -> None:
    """State follows its parameters from the CPU to the GPU and back."""
    ours, theirs = make_both(torch.device("cpu"))
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for place in ["cuda", "cpu"] if there_and_back else ["cuda"]:
        for p in params_of(ours):
            p.grad = None
            p.data = p.data.to(place)
        step_both(ours, theirs, gradients, 2)
        assert all(value.device.type == place for p in params_of(ours) for value in ours.state[p].values())
    assert_agree(ours, theirs)


# --- what else runs around a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(path: Path, set_to_none: bool) -> None:
    """`zero_grad` drops gradients, whose parameters then stay, or zeroes them, and decay and momentum go on."""
    ours, theirs = make_both(path.device, fused=True)
    gradients = Gradients()
    step_both(ours, theirs, gradients, 2)
    for _ in range(2):
        for opt in (ours, theirs):
            opt.zero_grad(set_to_none=set_to_none)
            opt.step()
    for p in params_of(ours):
        assert p.grad is None if set_to_none else not p.grad.any()
        assert float(ours.state[p]["step"]) == (2 if set_to_none else 4)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("foreach", [True, False])
def test_gradients_clipped_by_norm(path: Path, foreach: bool) -> None:
    """`clip_grad_norm_` writes into the gradients; the step reads what it wrote."""
    ours, theirs = make_both(path.device)
    gradients = Gradients()
    for _ in range(3):
        gradients.give(params_of(ours), params_of(theirs))
        for opt in (ours, theirs):
            norm = torch.nn.utils.clip_grad_norm_(params_of(opt), 0.5, foreach=foreach)
            assert norm > 0.5
            opt.step()
    assert_agree(ours, theirs)


def test_grad_scaler_on_the_host(path: Path) -> None:
    """Under torch.amp.GradScaler scaled gradients are unscaled, and a step with an infinite one is skipped whole."""
    params = make_params(path.device, torch.float32)
    ours, theirs = (cls(copies(params), **HYPER) for cls in (FusedAdamW, torch.optim.AdamW))
    scalers = [torch.amp.GradScaler(path.device.type, init_scale=64.0, growth_interval=2) for _ in range(2)]
    for overflow in (False, True, False, False, True, False):
        for opt, scaler in zip((ours, theirs), scalers, strict=True):
            opt.zero_grad()
            loss = torch.stack([p.pow(3).sum() for p in params_of(opt)]).sum()
            scaler.scale(loss * torch.inf if overflow else loss).backward()
            before = snapshot(opt)
            if not overflow:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(params_of(opt), 1.0)
            scaler.step(opt)
            scaler.update()
            if overflow:
                assert_unchanged(before, snapshot(opt))
    assert scalers[0].get_scale() == scalers[1].get_scale() != 64.0
    assert_agree(ours, theirs, "float32_against_torch")
    assert all(float(ours.state[p]["step"]) == 4 for p in params_of(ours))


@contextlib.contextmanager
def default_dtype_float64() -> Iterator[None]:
    """Make float64 what new tensors get."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Fill uninitialised memory with NaN and refuse what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default-device-meta": lambda: torch.device("meta"),
    "default-dtype-float64": default_dtype_float64,
    "autocast": lambda: torch.autocast("cuda" if HAS_GPU else "cpu", torch.bfloat16),
    "deterministic": deterministic_algorithms,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_do_not_matter(path: Path, surroundings: str) -> None:
    """Modes and defaults that the user set around a step, first or later, change no bit and are left as they were."""
    inside, outside = (FusedAdamW(make_params(path.device, torch.float32), **HYPER) for _ in range(2))
    gradients = Gradients()
    for _ in range(2):
        gradients.give(params_of(inside), params_of(outside))
        for p in params_of(inside)[:1]:
            p.grad = p.grad.t().contiguous().t()  # one gradient that has to be re-laid
        outside.step()
        with SURROUNDINGS[surroundings]():
            before = torch.is_grad_enabled()
            inside.step()
            assert torch.is_grad_enabled() == before
    assert_same_bits(inside, outside)


# --- trajectories -----------------------------------------------------------------------------------------------------


def make_model(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Return a small convolutional network with every usual kind of parameter."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.GroupNorm(2, 4),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 6 * 6, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 3, bias=False),
    ).to(device, dtype)


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Keep torch's threads from waiting for one another in layers this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RIVALS = {
    "AdamW": (torch.optim.AdamW, dict(weight_decay=0.1), {}),
    "AdamW-amsgrad-maximize": (torch.optim.AdamW, dict(weight_decay=0.1, amsgrad=True, maximize=True), {}),
    "Adam": (torch.optim.Adam, dict(weight_decay=1e-2), dict(decoupled=False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rival", RIVALS)
def test_trajectory_of_a_model(path: Path, single_thread: None, rival: str, dtype: torch.dtype) -> None:
    """Fifty steps (the interpreter: five) of a real network on its own gradients end where torch's end."""
    make, options, ours_only = RIVALS[rival]
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(24, 1, 6, 6, generator=generator, dtype=torch.float64).to(path.device, dtype)
    labels = torch.randint(3, (24,), generator=generator).to(path.device)
    models = [make_model(path.device, dtype) for _ in range(2)]
    ours = FusedAdamW(models[0].parameters(), lr=1e-3, **options, **ours_only)
    theirs = make(models[1].parameters(), lr=1e-3, **options)
    start = copy.deepcopy(models[0].state_dict())
    steps = 5 if path.backend == "triton" and not HAS_GPU else 50
    for _ in range(steps):
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            opt.step()
    name = "float32_trajectory_against_torch" if dtype == torch.float32 else "float64_trajectory_against_torch"
    assert_agree(ours, theirs, name)
    moved = [(p - start[key]).abs().max() for key, p in models[0].state_dict().items()]
    assert min(moved) > steps * 1e-4, "every parameter moved"
