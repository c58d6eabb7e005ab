"""FusedSGDW in the place of torch.optim.SGD: its constructor, its trajectories, its neighbours, its errors.

Wherever torch's optimizer can do the same, it stands beside ours, gets the same treatment, and must end up at the same
weights and buffers.
"""

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from pairs import Gradients, assert_same_bits, assert_unchanged, copies, make_params, params_of, snapshot
from pairs_sgd import FORMATS, HYPER, assert_agree, make_both, name_of, train
from tolerances import tolerance
from torch.optim import SGD, lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from adamw_kernels import FusedAdamW, FusedSGDW, release_gradients

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

CPU = torch.device("cpu")
# All that torch has, but Nesterov without momentum or with dampening, which both refuse.
OPTIONS = [
    dict(momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov, maximize=maximize)
    for momentum, dampening, decay, nesterov, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)
]


# --- the constructor --------------------------------------------------------------------------------------------------


def test_signature_is_torchs() -> None:
    """Every argument of torch.optim.SGD: same name, default, kind and place; what we add is keyword-only."""
    ours, theirs = inspect.signature(FusedSGDW).parameters, inspect.signature(SGD).parameters
    assert [*ours][: len(theirs)] == [*theirs]
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    for name in ours.keys() - theirs.keys():
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name


def test_defaults_and_groups_are_torchs() -> None:
    """Without arguments, defaults and groups hold torch's keys and values, and the kind of decay."""
    ours, theirs = FusedSGDW(make_params(CPU)), SGD(make_params(CPU))
    assert ours.defaults == theirs.defaults | dict(decoupled_weight_decay=True)
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys() | {"decoupled_weight_decay"}


NESTEROV = "nesterov=True with momentum={} and dampening={}: Nesterov momentum requires a momentum and zero dampening"
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(momentum=-0.9), "Invalid momentum value: -0.9; expected momentum >= 0"),
    (dict(momentum=float("nan")), "Invalid momentum value: nan; expected momentum >= 0"),
    (dict(momentum=torch.ones(2)), "Tensor momentum must be 1-element, not of shape (2,)"),
    (dict(dampening=float("inf")), "dampening is inf; expected a finite number or a one-element tensor"),
    (dict(dampening=torch.ones(2)), "Tensor dampening must be 1-element, not of shape (2,)"),
    (dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (dict(nesterov=True, momentum=0.0), NESTEROV.format(0.0, 0.0)),
    (dict(nesterov=True, momentum=torch.tensor(0.0)), NESTEROV.format(0.0, 0.0)),
    (dict(nesterov=True, momentum=0.9, dampening=0.1), NESTEROV.format(0.9, 0.1)),
    (dict(moment_format="8bit"), "moment_format='8bit': its codes hold a first moment beside a second one"),
    (dict(moment_format="int4"), "moment_format is 'int4'; expected one of"),
    (dict(decay_coupling="cosine"), "decay_coupling is 'cosine'; expected one of lr, schedule"),
    (
        dict(decay_coupling="schedule", lr=0.0),
        "decay_coupling='schedule' with an initial lr of 0.0: the decay is lr over the initial lr times weight_decay; "
        "expected an initial lr > 0",
    ),
    (dict(decay_coupling="schedule", decoupled=False), "decay_coupling='schedule' with decoupled=False"),
]
REFUSED_IN_GROUPS: list[tuple[dict[str, Any], str]] = [
    (dict(cautious=True), "cautious=True is no option of FusedSGDW"),
    (dict(update_bound=1.0), "update_bound=1.0 is no option of FusedSGDW"),
    (dict(betas=(0.9, 0.999)), "betas=(0.9, 0.999) is no option of FusedSGDW"),
    (dict(decay_coupling="schedule", initial_lr=0.0), "initial_lr is 0.0; decay_coupling='schedule' divides by it"),
    (dict(decay_coupling="schedule", initial_lr=None), "initial_lr is None; decay_coupling='schedule' divides by it"),
    (dict(decay_coupling="schedule", initial_lr=-1.0), "initial_lr is -1.0; decay_coupling='schedule' divides by it"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=name_of)
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    """Each message names the option, its value and what was expected."""
    with pytest.raises(ValueError) as caught:
        FusedSGDW(make_params(CPU), **options)
    assert str(caught.value).startswith(f"FusedSGDW: {message}")


@pytest.mark.parametrize(("options", "message"), [*REFUSED, *REFUSED_IN_GROUPS], ids=name_of)
def test_added_group_is_refused(device: torch.device, options: dict[str, Any], message: str) -> None:
    """So does that of an added group, and the optimizer goes on as if nothing had been asked."""
    opt, twin = (FusedSGDW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, twin), gradients)
    group = {"params": make_params(device, seed=3), **HYPER, **options}
    with pytest.raises(ValueError) as caught:
        opt.add_param_group(group)
    assert str(caught.value).startswith(f"param_groups[1]: {message}")
    assert len(opt.param_groups) == 1
    train((opt, twin), gradients)
    assert_same_bits(opt, twin)


def test_options_of_the_other_optimizer() -> None:
    """A keyword that SGD has no use for is a TypeError, and AdamW's groups have no rate in their buffers."""
    for key in ("cautious", "cautious_weight_decay", "update_bound", "amsgrad", "betas", "eps"):
        with pytest.raises(TypeError, match=key):
            FusedSGDW(make_params(CPU), **{key: 0.1})
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr_in_momentum=True is no option of FusedAdamW"):
        FusedAdamW([{"params": make_params(CPU), "lr_in_momentum": True}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(differentiable=True), r"differentiable=True.*Use torch\.optim\.SGD\("),
        (dict(fused=False), r"fused=False.*Use torch\.optim\.SGD\."),
        (dict(fused=True, foreach=True), "`fused` and `foreach` cannot be `True` together"),
    ],
)
def test_options_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    """What there is no implementation for says so and names the way out."""
    with pytest.raises(RuntimeError, match=f"FusedSGDW: {message}"):
        FusedSGDW(make_params(CPU), **options)


def test_bad_value_written_into_a_group(device: torch.device) -> None:
    """A step refuses it before anything is written, naming momentum and dampening as such."""
    opt = FusedSGDW(make_params(device), **HYPER)
    gradients = Gradients()
    train((opt,), gradients)
    before = snapshot(opt)
    gradients.give(params_of(opt))
    for key, value, expected in (("momentum", -1.0, ">= 0"), ("dampening", float("nan"), "a finite number")):
        kept = opt.param_groups[0][key]
        opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: {key} is {value}; expected.*{expected}"):
            opt.step()
        opt.param_groups[0][key] = kept
        assert_unchanged(before, snapshot(opt))


# --- trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v:g}" for k, v in o.items() if v) or "plain")
def test_agrees_with_torch(path: Path, options: dict[str, Any]) -> None:
    """Twenty steps (the interpreter: four) of float64 parameters end where torch's end, under all its options."""
    ours, theirs = make_both(path.device, **options)
    train((ours, theirs), Gradients(), 4 if path.backend == "triton" and path.device == CPU else 20)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: "-".join(f"{k}{v:g}" for k, v in o.items() if v))
def test_decoupled_decay_agrees_with_decay_before_the_step(device: torch.device, options: dict[str, Any]) -> None:
    """SGDW is torch's SGD without decay on weights that were multiplied by 1 - lr lambda."""
    params = make_params(device)
    decay = options["weight_decay"]
    ours = FusedSGDW(copies(params), lr=0.05, **options)
    theirs = SGD(copies(params), lr=0.05, **options | dict(weight_decay=0.0))
    gradients = Gradients()
    for _ in range(20):
        gradients.give(params_of(ours), params_of(theirs))
        ours.step()
        with torch.no_grad():
            for q in params_of(theirs):
                q.mul_(1 - 0.05 * decay)
        theirs.step()
    assert_agree(ours, theirs)


def test_complex_parameters(device: torch.device) -> None:
    """A complex weight is its pairs of reals, as in torch."""
    params = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex128, device=device))]
    ours, theirs = FusedSGDW(copies(params), decoupled=False, **HYPER), SGD(copies(params), **HYPER)
    for seed in range(3):
        value = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)).to(device)
        for opt in (ours, theirs):
            params_of(opt)[0].grad = value.clone()
            opt.step()
    assert_agree(ours, theirs)


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_schedules_of_rate_and_momentum(path: Path, kind: str) -> None:
    """OneCycleLR moves both, and no step builds another table for it."""
    ours, theirs = make_both(path.device)
    if kind == "tensor":
        ours.param_groups[0]["lr"] = torch.tensor(HYPER["lr"], dtype=torch.float64, device=path.device)
    schedules = [lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8) for opt in (ours, theirs)]
    gradients, momenta, plans = Gradients(), set(), []
    for _ in range(6):
        train((ours, theirs), gradients)
        plans.append(ours._internals.stepper.plan)
        for schedule in schedules:
            schedule.step()
        momenta.add(ours.param_groups[0]["momentum"])
    assert_agree(ours, theirs)
    assert len(momenta) > 3 and all(plan is plans[0] for plan in plans)


def test_momentum_switched_on_and_off(path: Path) -> None:
    """A buffer comes into being with momentum, is kept without it, and goes on where it was."""
    ours, theirs = make_both(path.device, momentum=0.0)
    gradients = Gradients()
    for momentum in (0.0, 0.9, 0.5, 0.0, 0.9):
        for opt in (ours, theirs):
            opt.param_groups[0]["momentum"] = momentum
        train((ours, theirs), gradients, 2)
        assert_agree(ours, theirs)


def test_gradients_that_come_and_go(path: Path) -> None:
    """A parameter's own first gradient is the one that is not dampened, whenever it comes."""
    ours, theirs = make_both(path.device, dampening=0.5)
    gradients = Gradients()
    for present in ((True, False, False), (True, True, False), (False, True, True), (True, True, True)):
        gradients.give(params_of(ours), params_of(theirs), present=present)
        ours.step()
        theirs.step()
    assert_agree(ours, theirs)
    assert [float(ours.state[p]["step"]) for p in params_of(ours)] == [3, 3, 2]


# --- accuracy ---------------------------------------------------------------------------------------------------------

RIVALS = {"single-tensor": dict(foreach=False), "fused": dict(fused=True)}


def final_weights(make: Any, dtype: torch.dtype, decay_before: float = 0.0, **options: Any) -> np.ndarray:
    """Return float64 weights after 300 steps over 8,192 weights from the same start, on the same gradients.

    A gradient is a mean of its own for each weight and as much noise.
    """
    rng = np.random.default_rng(5)
    p = torch.nn.Parameter(torch.from_numpy((0.3 * rng.standard_normal(8192)).astype(np.float32)).to(dtype))
    scale, mean = 1e-2 * np.exp(rng.standard_normal(8192)), rng.standard_normal(8192)
    opt = make([p], **options)
    for _ in range(300):
        gradient = (scale * (mean + rng.standard_normal(8192))).astype(np.float32)
        p.grad = torch.from_numpy(gradient).to(dtype)
        if decay_before:
            with torch.no_grad():
                p.mul_(1 - options["lr"] * decay_before)
        opt.step()
    return p.detach().double().numpy()


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
@pytest.mark.parametrize("lr", [0.1, 1e-3])
def test_error_against_float64(decoupled: bool, lr: float) -> None:
    """float32 weights lie closer to SGDW in float64 than torch's, decayed before the step; with L2 as close as torch's.

    Torch rounds 1 - lr lambda to float32, always to the same side. With L2 it rounds what we round.
    """
    options: dict[str, Any] = dict(lr=lr, momentum=0.9)
    before, l2 = (0.01, 0.0) if decoupled else (0.0, 0.01)
    truth = final_weights(SGD, torch.float64, before, weight_decay=l2, **options)

    def error(weights: np.ndarray) -> float:
        return float(np.sqrt(np.mean((weights - truth) ** 2)))

    ours = error(final_weights(FusedSGDW, torch.float32, weight_decay=0.01, decoupled=decoupled, **options))
    least = tolerance("sgdw_accuracy_margin" if decoupled else "sgd_accuracy_with_l2")
    for name, rival in RIVALS.items():
        theirs = error(final_weights(SGD, torch.float32, before, weight_decay=l2, **rival, **options))
        assert theirs >= least * ours, f"{name}: {theirs:.2e}, {theirs / ours:.2f} times ours"


# --- launches and neighbours ------------------------------------------------------------------------------------------


def test_one_launch_for_all_tensors(device: torch.device) -> None:
    """Tensors share a launch a combination of dtypes, whatever their groups' options, with momentum and without."""
    groups = [
        dict(params=make_params(device, dtype, seed=i), lr=0.1 / (1 + i), **options)
        for i, (dtype, options) in enumerate(
            itertools.product(
                (torch.float32, torch.bfloat16),
                (dict(), dict(momentum=0.9), dict(momentum=0.5, nesterov=True, maximize=True), dict(decoupled=False)),
            )
        )
    ]
    opt = FusedSGDW(groups, weight_decay=0.1)
    train((opt,), Gradients())
    (table,) = opt._internals.stepper.plan.tables
    assert [(batch.rule, batch.param_dtype) for batch in table.batches] == [
        ("sgdw", torch.float32),
        ("sgdw", torch.bfloat16),
    ]


class CountOperations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher, but for the named range that torch opens around any step."""

    def __init__(self) -> None:
        """Nothing was seen."""
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation and let it run."""
        if not str(func).startswith("profiler."):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_warm_step_runs_no_torch_operation(momentum: float) -> None:
    """So it allocates nothing either: new gradients, missing ones, other rates and momenta go into the same tables."""
    opt = FusedSGDW(make_params(CPU, torch.float32), **HYPER | dict(momentum=momentum))
    gradients = Gradients()
    with CountOperations() as counted:
        train((opt,), gradients, 2)
    assert counted.seen, "a first step makes state"
    plan = opt._internals.stepper.plan
    for i in range(4):
        gradients.give(params_of(opt), present=[True, i % 2 == 0, True])
        opt.param_groups[0].update(lr=0.1 * i, weight_decay=0.2 * i, momentum=momentum / (1 + i))
        with CountOperations() as counted:
            opt.step()
        assert counted.seen == []
    assert opt._internals.stepper.plan is plan


@pytest.mark.parametrize("unscale", [False, True], ids=["step-alone", "unscale-first"])
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_grad_scaler(path: Path, fused: bool | None, unscale: bool) -> None:
    """Weights, buffers and scales are those of torch's SGD under the same scaler, which overflows twice."""
    params = make_params(path.device)
    ours = FusedSGDW(copies(params), fused=fused, decoupled=False, dampening=0.2, **HYPER)
    theirs = SGD(copies(params), dampening=0.2, **HYPER)
    scalers = [torch.amp.GradScaler(path.device.type, init_scale=64.0, growth_interval=2) for _ in range(2)]
    for overflow in (True, False, False, True, False):
        for opt, scaler in zip((ours, theirs), scalers, strict=True):
            opt.zero_grad()
            loss = torch.stack([p.pow(3).sum() for p in params_of(opt)]).sum()
            scaler.scale(loss * torch.inf if overflow else loss).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() != 64.0
    assert_agree(ours, theirs, "host_logic_in_float64")
    assert ours.skipped_steps == (2 if fused else 0)
    assert {float(ours.state[p]["step"]) for p in params_of(ours)} == {3.0}


@pytest.mark.parametrize("options", FORMATS)
def test_gradient_release(device: torch.device, options: str) -> None:
    """Steps taken in backward have the ordinary loop's bits, under a schedule."""
    pair = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(
            device, torch.bfloat16
        )
        opt = FusedSGDW(model.parameters(), **HYPER | FORMATS[options])
        if released:
            release_gradients(model, opt)
        rates = lr_scheduler.ExponentialLR(opt, 0.5)
        for step in range(4):
            batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(device, torch.bfloat16)
            model(batch).square().mean().backward()
            assert not released or all(p.grad is None for p in model.parameters())
            opt.step()
            rates.step()
            opt.zero_grad()
        pair.append(opt)
    assert_same_bits(*pair)
