"""What the paper says, of these optimizers: its algorithms, the coupling of decay and schedule, its propositions.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019).
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from pairs import Gradients, assert_same_bits, copies, make_params, params_of
from problems import DTYPE_PAIRS, FLAGS, HYPER, Group, Launch, Training, check_all, is_interpreted, make_case, stored
from reference_formats import MOMENT_FORMATS
from restarts import through_file
from tolerances import tolerance
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from adamw_kernels import FusedAdamW, FusedSGDW, WarmRestarts

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

CPU = torch.device("cpu")
ALPHA, DECAY = 0.1, 0.04
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8


def steps_for(path: Path, native: int, interpreted: int) -> int:
    """Return how many steps a test on this path takes."""
    return interpreted if is_interpreted(path) else native


def with_gradient(params: list[Any], gradient: np.ndarray) -> None:
    """Give every parameter this gradient, in its own dtype."""
    for p in params:
        p.grad = torch.from_numpy(gradient.copy()).to(device=p.device, dtype=p.dtype)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference, over the largest value of either."""
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), np.max(np.abs(b))))


# --- Algorithms 1 and 2 -----------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1.0),
    "WarmRestarts": lambda opt: WarmRestarts(opt, 3, cycle_mult=1.5, eta_min=0.1),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t + 0.3 * (t % 2)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 9, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=8),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 3, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(opt, 6)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "SWALR": lambda opt: SWALR(opt, 0.02, anneal_epochs=5),
}


def advance(scheduler: Any) -> None:
    """Take a step of any of them; the loss does not improve."""
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def test_no_schedule_of_torch_is_missing() -> None:
    """Every class that torch has is among those under which decay is compared."""
    kinds = {name for name, kind in vars(lr_scheduler).items() if isinstance(kind, type)}
    kinds = {name for name in kinds if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert "CyclicLR" in kinds
    assert kinds - {"LRScheduler", "_LRScheduler"} <= SCHEDULES.keys()


def multiplier(opt: torch.optim.Optimizer, group: int = 0) -> float:
    """Return eta_t: what the schedule has made of the group's learning rate, over what it started from."""
    options = opt.param_groups[group]
    return float(options["lr"]) / float(options["initial_lr"])


@pytest.mark.parametrize("schedule", ["constant", "LambdaLR", "CosineAnnealingLR", "WarmRestarts"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["SGDW", "SGD"])
def test_algorithm_1(path: Path, decoupled: bool, schedule: str) -> None:
    """Line by line, in float64: lr in the momentum, decay by the schedule's multiplier; with L2, lambda in line 6."""
    rng = np.random.default_rng(1)
    theta, m = rng.standard_normal(50), np.zeros(50)
    p = torch.nn.Parameter(torch.from_numpy(theta.copy()).to(path.device))
    coupling = dict(decay_coupling="schedule") if decoupled else {}
    opt = FusedSGDW(
        [p], lr=ALPHA, momentum=BETA1, weight_decay=DECAY, lr_in_momentum=True, decoupled=decoupled, **coupling
    )
    rates = SCHEDULES[schedule](opt)
    for t in range(1, steps_for(path, 20, 5) + 1):
        gradient = rng.standard_normal(50)
        eta = multiplier(opt)
        g = gradient if decoupled else gradient + DECAY * theta  # line 6
        m = BETA1 * m + eta * ALPHA * g  # line 8
        theta = theta - m - (eta * DECAY * theta if decoupled else 0.0)  # line 9
        with_gradient([p], gradient)
        opt.step()
        assert difference(stored(p), theta) <= tolerance("equations_in_float64"), f"step {t}"
        assert difference(stored(opt.state[p]["momentum_buffer"]), m) <= tolerance("equations_in_float64"), f"step {t}"
        rates.step()


@pytest.mark.parametrize("schedule", ["constant", "LambdaLR", "CosineAnnealingLR", "WarmRestarts"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_algorithm_2(path: Path, decoupled: bool, schedule: str) -> None:
    """Likewise: the schedule multiplies the step and the decay, the learning rate alpha the step alone."""
    rng = np.random.default_rng(2)
    theta, m, v = rng.standard_normal(50), np.zeros(50), np.zeros(50)
    p = torch.nn.Parameter(torch.from_numpy(theta.copy()).to(path.device))
    coupling = dict(decay_coupling="schedule") if decoupled else {}
    opt = FusedAdamW([p], lr=ALPHA, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, decoupled=decoupled, **coupling)
    rates = SCHEDULES[schedule](opt)
    for t in range(1, steps_for(path, 20, 5) + 1):
        gradient = rng.standard_normal(50)
        eta = multiplier(opt)
        g = gradient if decoupled else gradient + DECAY * theta  # line 6
        m = BETA1 * m + (1 - BETA1) * g  # line 7
        v = BETA2 * v + (1 - BETA2) * g * g  # line 8
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)  # lines 9 and 10
        update = ALPHA * m_hat / (np.sqrt(v_hat) + EPS)
        theta = theta - eta * (update + (DECAY * theta if decoupled else 0.0))  # line 12
        with_gradient([p], gradient)
        opt.step()
        assert difference(stored(p), theta) <= tolerance("equations_in_float64"), f"step {t}"
        rates.step()


# --- decay that follows the schedule ----------------------------------------------------------------------------------

MAKE: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, **options: FusedAdamW(params, decay_coupling="schedule", **options),
    "SGDW": lambda params, **options: FusedSGDW(params, decay_coupling="schedule", **options),
}
TORCHS: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SGDW": torch.optim.SGD}
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


class DecayAlone:
    """Steps without a gradient to follow: float64 weights shrink by exactly lr / initial_lr * lambda of themselves."""

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        """Take the weights as they are."""
        self.opt = opt
        self.expected = [stored(p) for p in params_of(opt)]

    def step(self, *multipliers: tuple[float, float]) -> None:
        """Step, and compare every bit.

        Args:
            multipliers: of each group, learning rate and initial one, in float64.
        """
        for p in params_of(self.opt):
            p.grad = torch.zeros_like(p)
        self.opt.step()
        at = iter(range(len(self.expected)))
        for group, (lr, initial_lr) in zip(self.opt.param_groups, multipliers, strict=True):
            decay = np.float64(lr) / np.float64(initial_lr) * np.float64(group["weight_decay"])
            for p in group["params"]:
                i = next(at)
                self.expected[i] = self.expected[i] - decay * self.expected[i]
                assert np.array_equal(stored(p), self.expected[i]), f"parameter {i} at {lr} of {initial_lr}"


def own_rates(device: torch.device) -> list[dict[str, Any]]:
    """Return groups with a learning rate and a decay of their own each; the second and third rates are tensors."""
    rates = (0.1, torch.tensor(0.003, device=device), torch.tensor(0.02, dtype=torch.float64, device=device))
    return [
        {"params": make_params(device, seed=i), "lr": lr, "weight_decay": 0.1 * (i + 1)} for i, lr in enumerate(rates)
    ]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_follows_schedules(path: Path, name: str, schedule: str) -> None:
    """Exactly, under all of torch's schedules and ours, for groups with learning rates and decays of their own.

    The schedule itself must not notice: rates and initial ones are those that it gives torch's optimizer.
    """
    opt, theirs = MAKE[name](own_rates(path.device)), TORCHS[name](own_rates(CPU))
    rates = [float(group["lr"]) for group in theirs.param_groups]
    scheduler, same = SCHEDULES[schedule](opt), SCHEDULES[schedule](theirs)
    initial = [float(group.get("initial_lr", lr)) for group, lr in zip(theirs.param_groups, rates, strict=True)]
    judge, seen = DecayAlone(opt), set()
    for _ in range(steps_for(path, 8, 4)):
        for ours, other in zip(opt.param_groups, theirs.param_groups, strict=True):
            assert float(ours["lr"]) == float(other["lr"])
            assert ours.get("initial_lr") == other.get("initial_lr")
        judge.step(*((float(group["lr"]), lr) for group, lr in zip(opt.param_groups, initial, strict=True)))
        theirs.step()
        seen.add(opt.param_groups[0]["lr"])
        advance(scheduler)
        advance(same)
    assert len(seen) == 1 if schedule == "constant" else len(seen) >= (2 if schedule == "ConstantLR" else 3)


@every_optimizer
def test_schedule_made_in_the_middle_of_a_run(path: Path, make: Any) -> None:
    """It begins at the lr of that time, as torch's do, and the decay with it; until then the first lr counts."""
    opt = make(make_params(path.device), lr=0.3, weight_decay=0.2)
    judge = DecayAlone(opt)
    judge.step((0.3, 0.3))
    opt.param_groups[0]["lr"] = 0.1
    judge.step((0.1, 0.3))
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    judge.step((0.1, 0.1))
    scheduler.step()
    judge.step((0.05, 0.1))


@every_optimizer
def test_decay_follows_a_rate_set_by_hand(path: Path, make: Any) -> None:
    """Half the rate, half the decay; a rate of 0 or below it, none or growth; and another lambda counts at once."""
    opt = make(make_params(path.device), lr=0.3, weight_decay=0.2)
    judge = DecayAlone(opt)
    for lr in (0.3, 0.15, 0.7, 0.0, -0.1):
        opt.param_groups[0]["lr"] = lr
        judge.step((lr, 0.3))
    opt.param_groups[0].update(lr=0.1, weight_decay=0.5)
    judge.step((0.1, 0.3))
    opt.param_groups[0]["initial_lr"] = 0.9
    judge.step((0.1, 0.9))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_decay_follows_a_tensor(path: Path, make: Any, dtype: torch.dtype) -> None:
    """A rate in a tensor is live, and what it was in the beginning is not: a copy of it is kept."""
    lr = torch.tensor(0.3, dtype=dtype, device=path.device)
    initial = float(lr)
    opt = make(make_params(path.device), lr=lr, weight_decay=0.2)
    judge = DecayAlone(opt)
    judge.step((initial, initial))
    for factor in (0.5, 0.7):
        lr.mul_(factor)
        judge.step((float(lr), initial))
    opt.param_groups[0]["lr"] = 0.05
    judge.step((0.05, initial))


@every_optimizer
def test_decay_of_added_groups(device: torch.device, make: Any) -> None:
    """A group's initial rate is its rate when it was added, or the one that it brings."""
    opt = make(make_params(device), lr=0.3, weight_decay=0.2)
    opt.param_groups[0]["lr"] = 0.1
    opt.add_param_group({"params": make_params(device, seed=1)})
    opt.add_param_group({"params": make_params(device, seed=2), "lr": 0.05})
    opt.add_param_group({"params": make_params(device, seed=3), "lr": 0.05, "initial_lr": 0.2})
    judge = DecayAlone(opt)
    judge.step((0.1, 0.3), (0.3, 0.3), (0.05, 0.05), (0.05, 0.2))


@every_optimizer
@pytest.mark.parametrize("way", [copy.deepcopy, lambda opt: None], ids=["deepcopy", "state-dict"])
def test_initial_rate_is_part_of_a_checkpoint(device: torch.device, make: Any, way: Any) -> None:
    """What a run started from survives, so that its decay goes on, whatever the loading optimizer was made with."""
    opt = make(make_params(device), lr=0.3, weight_decay=0.2)
    DecayAlone(opt).step((0.3, 0.3))
    opt.param_groups[0]["lr"] = 0.1
    resumed = way(opt)
    if resumed is None:
        resumed = make(copies(params_of(opt)), lr=0.7, weight_decay=0.9)
        resumed.load_state_dict(through_file(opt.state_dict()))
    DecayAlone(resumed).step((0.1, 0.3))
    DecayAlone(opt).step((0.1, 0.3))
    assert_same_bits(opt, resumed)


@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("name", MAKE)
def test_torchs_checkpoint(device: torch.device, name: str, scheduled: bool) -> None:
    """One without an initial rate leaves ours, and the coupling; one that a schedule has been at brings its own."""
    theirs = TORCHS[name](make_params(device), lr=0.05, weight_decay=0.2)
    if scheduled:
        lr_scheduler.LambdaLR(theirs, lambda t: 0.5)
    opt = MAKE[name](make_params(device), lr=0.3, weight_decay=0.7)
    opt.load_state_dict(theirs.state_dict())
    DecayAlone(opt).step((0.025, 0.05) if scheduled else (0.05, 0.3))


def test_coupling_switched_in_the_middle_of_a_run(path: Path) -> None:
    """It counts at once; without an initial rate the step says what is missing, and writes nothing."""
    opt = FusedSGDW(make_params(path.device), lr=0.3, weight_decay=0.2)
    judge = DecayAlone(opt)
    judge.step((0.3, 1.0))  # torch's coupling: by lr itself
    opt.param_groups[0]["decay_coupling"] = "schedule"
    with pytest.raises(ValueError, match=r"param_groups\[0\]: decay_coupling='schedule', and the group has no initial"):
        opt.step()
    opt.param_groups[0]["initial_lr"] = 0.6
    judge.step((0.3, 0.6))
    del opt.param_groups[0]["decay_coupling"]
    judge.step((0.3, 1.0))


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_bad_initial_rate_written_into_a_group(device: torch.device, value: float) -> None:
    """A step refuses it before anything is written."""
    opt = FusedAdamW(make_params(device), decay_coupling="schedule")
    judge = DecayAlone(opt)
    judge.step((1e-3, 1e-3))
    opt.param_groups[0]["initial_lr"] = value
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: initial_lr is {value}.*expected"):
        opt.step()
    opt.param_groups[0]["initial_lr"] = 1e-3
    judge.step((1e-3, 1e-3))


def test_bits_of_adamw_under_a_schedule(path: Path) -> None:
    """Every dtype and flag in one table, each group with its own coupling: the judge's bits as the rate changes."""
    rng = np.random.default_rng(3)
    groups = []
    for i, flags in enumerate(flags for flags in FLAGS if flags["decoupled"]):
        for coupling in ({}, dict(initial_lr=0.02 * (i + 1))):
            cases = [make_case(rng, (5 + k,), *pair, path.device) for k, pair in enumerate(DTYPE_PAIRS)]
            groups.append(Group(cases, HYPER | dict(lr=3e-3 * (i + 1)) | coupling, flags))
    training = Training(groups)
    for step in range(steps_for(path, 4, 2)):
        training.step()
        training.check(f"step {step + 1}")
        training.renew_grads(rng)
        for group, of_optimizer in zip(groups, training.optimizer.param_groups, strict=True):
            group.hyper = {**group.hyper, "lr": group.hyper["lr"] * 0.7}
            of_optimizer["lr"] = group.hyper["lr"]


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
def test_bits_of_adamw_in_storage_formats(path: Path, moment_format: str) -> None:
    """The same coefficient decays weights however they and the moments are stored."""
    rng = np.random.default_rng(4)
    cases = [
        make_case(rng, (70,), dtype, "float32", path.device, param_format=form, moment_format=moment_format)
        for dtype, form in (("float32", "native"), ("bfloat16", "split24"), ("float16", "split32"))
    ]
    for hyper in (HYPER | dict(initial_lr=0.03), HYPER | dict(lr=-0.2, initial_lr=1e-3)):
        launch = Launch(cases, hyper)
        launch.step()
        check_all(cases, f"{hyper}")


# --- propositions -----------------------------------------------------------------------------------------------------


def sweep_of_l2(*wanted: float) -> list[float]:
    """Return many strengths of L2 decay over ten decades, none at all, and those wanted."""
    return [0.0, *np.logspace(-6, 4, 201), *wanted]


def trajectories(
    make: Any, strengths: list[float], start: np.ndarray, gradients: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights after every step, in float64.

    Args:
        make: the optimizer.
        strengths: of L2 decay, one run each, all in one optimizer.
        start: weights.
        gradients: one a step.
        options: of the optimizer.

    Returns:
        Under decoupled decay DECAY: (steps, elements); under L2: (strengths, steps, elements).
    """
    decoupled = torch.nn.Parameter(torch.from_numpy(start.copy()))
    l2 = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in strengths]
    groups = [{"params": [decoupled], "weight_decay": DECAY, "decay_coupling": "schedule"}]
    groups += [
        {"params": [p], "weight_decay": strength, "decoupled": False} for p, strength in zip(l2, strengths, strict=True)
    ]
    opt = make(groups, lr=ALPHA, **options)
    seen = []
    for gradient in gradients:
        with_gradient([decoupled, *l2], gradient)
        opt.step()
        seen.append(np.stack([stored(p) for p in (decoupled, *l2)]))
    runs = np.stack(seen)
    return runs[:, 0], runs[:, 1:].swapaxes(0, 1)


def far_apart(decoupled: np.ndarray, l2: np.ndarray, start: np.ndarray) -> list[float]:
    """Return, for each strength of L2, the largest difference over how far the decoupled run moved."""
    moved = np.max(np.abs(decoupled - start))
    return [float(np.max(np.abs(run - decoupled)) / moved) for run in l2]


@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_proposition_1(lr_in_momentum: bool) -> None:
    """Without momentum, decay lambda is L2 of strength lambda / alpha, over 400 steps; and of no other strength."""
    rng = np.random.default_rng(5)
    start, gradients = rng.standard_normal(40), rng.standard_normal((400, 40)) * 10.0 ** rng.uniform(-3, 1, 40)
    strengths = sweep_of_l2(DECAY / ALPHA)
    runs = trajectories(FusedSGDW, strengths, start, gradients, lr_in_momentum=lr_in_momentum)
    *others, same = far_apart(*runs, start)
    assert same <= tolerance("propositions_in_float64")
    assert min(others) >= 1e-3


def test_proposition_1_under_a_schedule() -> None:
    """A schedule multiplies both: the strength that agrees stays lambda / alpha, of the initial rate."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64)) for _ in range(2))
    decoupled = FusedSGDW([p], lr=ALPHA, weight_decay=DECAY, decay_coupling="schedule")
    l2 = FusedSGDW([q], lr=ALPHA, weight_decay=DECAY / ALPHA, decoupled=False)
    rates = [lr_scheduler.CosineAnnealingLR(opt, T_max=100) for opt in (decoupled, l2)]
    gradients = Gradients()
    for _ in range(100):
        gradients.give([p], [q])
        for opt, scheduler in zip((decoupled, l2), rates, strict=True):
            opt.step()
            scheduler.step()
    assert difference(stored(p), stored(q)) <= tolerance("propositions_in_float64")


def test_with_momentum_no_strength_of_l2_is_decoupled_decay() -> None:
    """The buffer remembers L2's decay, and not the decoupled one: lambda / alpha does not agree, nor does any other."""
    rng = np.random.default_rng(6)
    start, gradients = rng.standard_normal(40), rng.standard_normal((50, 40))
    strengths = sweep_of_l2(DECAY / ALPHA, DECAY * (1 - BETA1) / ALPHA)
    runs = trajectories(FusedSGDW, strengths, start, gradients, momentum=BETA1, lr_in_momentum=True)
    assert min(far_apart(*runs, start)) >= 1e-2


def test_decoupled_decay_with_momentum_as_a_gradient() -> None:
    """What holds: m_(t-1) is (1 - lambda) theta_(t-2) - theta_(t-1), hence a step of heavy ball without decay.

    Its gradient is g + lambda / alpha (theta_(t-1) - beta_1 theta_(t-2)), in the first step g + lambda / alpha theta_0:
    decay pulls at an extrapolated weight, in the long run 1 - beta_1 times as strongly.
    """
    rng = np.random.default_rng(7)
    start, gradients = rng.standard_normal(40), rng.standard_normal((100, 40))
    p, q = (torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2))
    decoupled = FusedSGDW([p], lr=ALPHA, momentum=BETA1, weight_decay=DECAY, decay_coupling="schedule")
    plain = FusedSGDW([q], lr=ALPHA, momentum=BETA1)
    before = np.zeros(40)
    for gradient in gradients:
        with_gradient([p], gradient)
        now = stored(q)
        with_gradient([q], gradient + DECAY / ALPHA * (now - BETA1 * before))
        before = now
        decoupled.step()
        plain.step()
    assert difference(stored(p), stored(q)) <= tolerance("propositions_in_float64")


def test_stationary_point_with_momentum() -> None:
    """Under a constant gradient both come to rest, at the same point for L2 of (1 - beta_1) lambda / alpha."""
    gradient = np.linspace(-1, 1, 20) + 0.01
    strength = (1 - BETA1) * DECAY / ALPHA
    runs = trajectories(FusedSGDW, [strength], np.ones(20), np.tile(gradient, (12_000, 1)), momentum=BETA1)
    rest = -gradient / strength
    assert difference(runs[0][-1], rest) <= tolerance("propositions_in_float64")
    assert difference(runs[1][0, -1], rest) <= tolerance("propositions_in_float64")


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_proposition_2(steps: int) -> None:
    """Adam: no strength of L2 comes near decoupled decay where gradients differ in size.

    The control is the same sweep under SGD, which finds the one that does.
    """
    rng = np.random.default_rng(8)
    start = rng.standard_normal(12)
    gradients = rng.standard_normal((steps, 12)) * np.logspace(-3, 2, 12)
    strengths = sweep_of_l2(DECAY / ALPHA, DECAY)
    adam = far_apart(*trajectories(FusedAdamW, strengths, start, gradients, betas=(BETA1, BETA2)), start)
    sgd = far_apart(*trajectories(FusedSGDW, strengths, start, gradients), start)
    assert min(adam) >= 1e-2
    assert min(sgd) <= tolerance("propositions_in_float64")


def test_proposition_3() -> None:
    """With a fixed preconditioner diag(1 / s), decay lambda is L2 scaled by s: strength lambda s_i / alpha for each.

    Preconditioned SGD is SGD with a learning rate alpha / s_i for element i, a group each.
    """
    rng = np.random.default_rng(9)
    start, gradients = rng.standard_normal(16), rng.standard_normal((300, 16))
    s = 10.0 ** rng.uniform(-1, 1, 16)

    def run(**options: Any) -> np.ndarray:
        """Final weights; options may be arrays, of which each element has its own."""
        params = [torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in start]
        groups = [
            {key: value[i] if isinstance(value, np.ndarray) else value for key, value in options.items()}
            | {"params": [p], "lr": ALPHA / s[i]}
            for i, p in enumerate(params)
        ]
        opt = FusedSGDW(groups)
        for gradient in gradients:
            for p, g in zip(params, gradient, strict=True):
                p.grad = torch.tensor([g], dtype=torch.float64)
            opt.step()
        return np.concatenate([stored(p) for p in params])

    decoupled = run(weight_decay=DECAY, decay_coupling="schedule")
    adjusted = run(weight_decay=DECAY * s / ALPHA, decoupled=False)
    assert difference(decoupled, adjusted) <= tolerance("propositions_in_float64")
    same_for_all = [run(weight_decay=strength, decoupled=False) for strength in np.logspace(-2, 1, 31)]
    assert min(difference(decoupled, l2) for l2 in same_for_all) >= 1e-2


def test_proposition_3_as_a_loss() -> None:
    """As the paper states it: steps on f_t with decay lambda are steps without on f_t + lambda' / 2 |theta sqrt(s)|^2.

    lambda' is lambda / alpha, and f_t are quadratic losses of batches, whose gradients autograd takes where a run is.
    """
    generator = torch.Generator().manual_seed(10)
    batches = torch.randn(200, 20, 12, dtype=torch.float64, generator=generator) / 4
    targets = torch.randn(200, 20, dtype=torch.float64, generator=generator)
    s = 10.0 ** torch.linspace(-0.5, 1, 12, dtype=torch.float64)

    def run(penalty: torch.Tensor, **decay: Any) -> np.ndarray:
        """Weights after every step, with `penalty` / 2 for each squared weight in the loss."""
        params = [torch.nn.Parameter(torch.full((), 0.5, dtype=torch.float64)) for _ in s]
        opt = FusedSGDW([{"params": [p], "lr": ALPHA / float(x)} for p, x in zip(params, s, strict=True)], **decay)
        seen = []
        for batch, target in zip(batches, targets, strict=True):
            theta = torch.stack([*params])
            opt.zero_grad()
            (0.5 * ((batch @ theta - target) ** 2).mean() + 0.5 * (penalty * theta**2).sum()).backward()
            opt.step()
            seen.append(torch.stack([*params]).detach().numpy())
        return np.stack(seen)

    with_decay = run(torch.zeros(12, dtype=torch.float64), weight_decay=DECAY, decay_coupling="schedule")
    adjusted = run(DECAY / ALPHA * s)
    assert difference(with_decay, adjusted) <= tolerance("propositions_in_float64")
    assert difference(with_decay, run(DECAY / ALPHA * torch.ones_like(s))) >= 1e-2, "and s is what makes it so"
