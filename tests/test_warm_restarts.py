"""Warm restarts: rates by the equation, restarts at the batch they belong to, decay by the cycle.

The equation is worked in 40 decimal digits, on the decimals as they are written. What a scheduler sets depends on the
time alone, so most comparisons are exact. Snapshots and resuming: test_warm_restart_snapshots.py.
"""

import functools
import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import Gradients, make_params
from restarts import (
    Make,
    decays_of,
    every_optimizer,
    explore,
    halved,
    rates_of,
    schedules,
    stepped,
    tensors,
    times,
    train,
    with_decays,
)
from tolerances import tolerance
from torch.optim import lr_scheduler

from adamw_kernels import FusedAdamW
from adamw_kernels.warm_restarts import WarmRestarts, normalized_weight_decay

pytestmark = pytest.mark.filterwarnings("error")  # the scheduler warns where a test expects it, and nowhere else

# --- normalized weight decay -----------------------------------------------------------------------------------------


def test_normalized_weight_decay_worked_by_hand() -> None:
    """0.05 sqrt(128 / (50,000 * 4)) = 0.05 * 0.0252982...; a cycle four times longer has half the decay."""
    assert normalized_weight_decay(0.5, 16, 100, 4) == 0.5 * 0.2
    expected = 0.05 * math.sqrt(0.00064)
    assert normalized_weight_decay(0.05, 128, 50_000, 4) == pytest.approx(expected, rel=tolerance("hand_worked"))
    assert normalized_weight_decay(0.05, 1, 16, 0.25) == 0.05 * 0.5, "epochs may be fractional"
    assert normalized_weight_decay(0.0, 1, 1, 1) == 0.0
    of_a_cycle = functools.partial(normalized_weight_decay, 0.05, 128, 50_000)
    assert of_a_cycle(40.0) == 0.5 * of_a_cycle(10.0)


@pytest.mark.parametrize("name", ["lambda_norm", "batch_size", "num_samples", "epochs"])
@pytest.mark.parametrize("value", [-1.0, -1, math.nan, math.inf, "1", None, True])
def test_normalized_weight_decay_refuses(name: str, value: Any) -> None:
    """The message names the argument, what it was and what is expected."""
    arguments = {"lambda_norm": 0.1, "batch_size": 2, "num_samples": 8, "epochs": 1.0, name: value}
    sign = ">=" if name == "lambda_norm" else ">"
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; expected a finite number {sign} 0"):
        normalized_weight_decay(**arguments)


@pytest.mark.parametrize("name", ["batch_size", "num_samples", "epochs"])
@pytest.mark.parametrize("value", [0, 0.0])
def test_normalized_weight_decay_refuses_zero(name: str, value: float) -> None:
    """A run of no samples has no decay."""
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; expected a finite number > 0"):
        normalized_weight_decay(**{"lambda_norm": 0.1, "batch_size": 2, "num_samples": 8, "epochs": 1.0, name: value})


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_worked_by_hand() -> None:
    """Cycles of 1, 2 and 4 epochs in halves: where T_cur / T_i is a half the multiplier is a half, at a start one."""
    opt = stepped(rates=(0.5, 2.0))
    scheduler = WarmRestarts(opt, 1, 2, steps_per_epoch=2)
    seen = []
    for _ in range(8):
        eta = scheduler.multiplier
        seen.append((scheduler.cycle, scheduler.cycle_length, scheduler.position, round(eta, 4)))
        assert rates_of(opt) == scheduler.get_last_lr() == [0.5 * eta, 2.0 * eta]
        scheduler.step()
    quarter = round(0.5 + 0.5 * math.sqrt(0.5), 4)
    assert seen == [
        (0, 1.0, 0.0, 1.0),
        (0, 1.0, 0.5, 0.5),
        (1, 2.0, 0.0, 1.0),
        (1, 2.0, 0.5, quarter),
        (1, 2.0, 1.0, 0.5),
        (1, 2.0, 1.5, round(1 - quarter, 4)),
        (2, 4.0, 0.0, 1.0),
        (2, 4.0, 0.5, round(0.5 + 0.5 * math.cos(math.pi / 8), 4)),
    ]
    assert (scheduler.time, scheduler.last_epoch) == (4.0, 8)


def test_eta_min_is_the_least_share() -> None:
    """A quarter of each group's rate remains, and half way 0.25 + 0.75 / 2."""
    opt = stepped(rates=(1.0, 4.0))
    scheduler = WarmRestarts(opt, 2**30, eta_min=0.25)
    for time, eta in ((2**29, 0.625), (2**30 - 1, 0.25), (2**30, 1.0)):
        scheduler.step(time)
        assert rates_of(opt) == [eta, 4 * eta]


def cosine(x: Decimal) -> Decimal:
    """cos(x) by its series, in the precision of the context."""
    total = term = Decimal(1)
    for k in range(1, 60):
        term *= -x * x / ((2 * k - 1) * (2 * k))
        total += term
    return total


PI = Decimal("3.141592653589793238462643383279502884197169399375")


def equation(first: str, mult: str, eta_min: str, time: Fraction) -> tuple[int, Decimal]:
    """The cycle and the multiplier by the equation, from decimals as they are written."""
    cycle, start, length = 0, Fraction(0), Fraction(first)
    if mult == "1":
        cycle, start = time // length, time // length * length
    while time >= start + length:
        cycle, start, length = cycle + 1, start + length, length * Fraction(mult)
    x = (time - start) / length
    with localcontext() as context:
        context.prec = 40
        cos = cosine(PI * x.numerator / x.denominator)
        return cycle, Decimal(eta_min) + (1 - Decimal(eta_min)) * (1 + cos) / 2


@pytest.mark.parametrize("per_epoch", [None, 1, 3, 100, 391])
@pytest.mark.parametrize("mult", ["1", "2", "1.5", "1.1", "2.75"])
@pytest.mark.parametrize(
    ("first", "eta_min"), [("1", "0"), ("0.07", "0"), ("2.5", "0.1"), ("0.7", "0"), ("11", "0.01")]
)
def test_rates_follow_the_equation(first: str, eta_min: str, mult: str, per_epoch: int | None) -> None:
    """Every rate of 300 steps, for whole and fractional cycles; and every restart at its step."""
    opt = stepped(rates=(1.0,))
    scheduler = WarmRestarts(opt, float(first), float(mult), eta_min=float(eta_min), steps_per_epoch=per_epoch)
    for k in range(300):
        cycle, eta = equation(first, mult, eta_min, Fraction(k, per_epoch or 1))
        assert scheduler.cycle == cycle, f"step {k}"
        assert abs(Decimal(rates_of(opt)[0]) - eta) <= tolerance("schedule_by_the_equation"), f"step {k}"
        scheduler.step()


@pytest.mark.parametrize(("first", "per_epoch", "batches"), [(0.07, 100, 7), (5 / 3, 3, 5), (0.1, 1000, 100)])
def test_every_cycle_has_as_many_batches(first: float, per_epoch: int, batches: int) -> None:
    """Also where the cycle's length is no float64, by whole batches counted or by times computed."""
    counted = WarmRestarts(stepped(), first, steps_per_epoch=per_epoch)
    told = WarmRestarts(stepped(), first)
    for k in range(20 * batches):
        told.step(k / per_epoch)
        for scheduler in (counted, told):
            assert (scheduler.cycle, scheduler.position == 0.0) == (k // batches, k % batches == 0), f"batch {k}"
        counted.step()


@explore
@given(
    first=st.fractions(Fraction(1, 50), 20, max_denominator=50),
    mult=st.fractions(1, 3, max_denominator=4),
    per_epoch=st.integers(1, 50),
)
def test_closed_form_is_the_running_sum(first: Fraction, mult: Fraction, per_epoch: int) -> None:
    """Cycles, lengths and positions are those of time added up batch by batch, without a rounding."""
    scheduler = WarmRestarts(stepped(), float(first), float(mult), steps_per_epoch=per_epoch)
    cycle, length, position = 0, first, Fraction(0)
    for _ in range(100):
        expected = cycle, float(length), float(position)
        assert (scheduler.cycle, scheduler.cycle_length, scheduler.position) == expected
        scheduler.step()
        position += Fraction(1, per_epoch)
        while position >= length:
            cycle, position, length = cycle + 1, position - length, length * mult


@pytest.mark.parametrize("mult", ["1.1", "1.01", "1.001", "1.0471975511965976"])
def test_starts_that_no_short_fraction_holds(mult: str) -> None:
    """150 cycles on, with exact fractions of up to 8,000 bits: the position in a cycle is their rounded difference."""
    scheduler = WarmRestarts(stepped(), 1.0, float(mult))
    exact = Fraction(mult) if len(mult) < 8 else Fraction(float(mult))
    start, length = Fraction(0), Fraction(1)
    for cycle in range(150):
        for after in (start, start + length / 3):
            time = Fraction(math.ceil(after * 2**16), 2**16)  # a float64, and a simple fraction
            scheduler.step(float(time))
            assert scheduler.cycle == cycle
            assert scheduler.position == float(time - start), f"cycle {cycle}"
            assert scheduler.cycle_length == float(length)
        start, length = start + length, length * exact
    assert length.denominator > 2**400


def test_a_cycle_longer_than_any_number() -> None:
    """The next one never comes."""
    scheduler = WarmRestarts(stepped(), 10.0, 1e308)
    scheduler.step(10.0)
    assert (scheduler.cycle, scheduler.position, scheduler.multiplier) == (1, 0.0, 1.0)
    assert math.isfinite(scheduler.cycle_length)


# --- step() and step(epoch) ------------------------------------------------------------------------------------------


@explore
@given(schedule=schedules, moves=st.lists(times, max_size=8), time=times.filter(lambda time: time is not None))
def test_rates_depend_on_the_time_alone(schedule: dict[str, Any], moves: list[float | None], time: float) -> None:
    """Wherever a scheduler went before, forwards and backwards: a new one that goes there has its bits, then too."""
    opt, fresh = stepped(rates=(0.1, 0.3)), stepped(rates=(0.1, 0.3))
    scheduler, other = WarmRestarts(opt, **schedule), WarmRestarts(fresh, **schedule)
    for move in moves:
        scheduler.step(move)
    for move in (time, None, None):
        for each in (scheduler, other):
            each.step(move)
        assert rates_of(opt) == rates_of(fresh)
        assert (scheduler.time, scheduler.cycle, scheduler.position) == (other.time, other.cycle, other.position)
        assert move is None or scheduler.time == move


@explore
@given(schedule=schedules, count=st.integers(0, 2000))
def test_counting_goes_where_the_time_does(schedule: dict[str, Any], count: int) -> None:
    """A count of batches of n an epoch is step(count / n), whose division rounds."""
    counted, told = stepped(), stepped()
    scheduler = WarmRestarts(counted, **schedule)
    for _ in range(count):
        scheduler.step()
    WarmRestarts(told, **schedule).step(count / (schedule["steps_per_epoch"] or 1))
    assert rates_of(counted) == rates_of(told)


def test_step_goes_on_from_a_time_that_was_given() -> None:
    """One epoch, or one batch; a time between two counts keeps its distance from them, one that is a count counts."""
    scheduler = WarmRestarts(stepped(), 100)
    moves = [(None, 1.0, 1), (26.5, 26.5, 26), (None, 27.5, 27), (3, 3.0, 3), (None, 4.0, 4)]
    for argument, time, last_epoch in moves:
        scheduler.step(argument)
        assert (scheduler.time, scheduler.last_epoch) == (time, last_epoch)
    scheduler = WarmRestarts(stepped(), 100, steps_per_epoch=10)
    for argument, time, last_epoch in (
        (None, 0.1, 1),
        (0.75, 0.75, 7),
        (None, 0.85, 8),
        (2.3, 2.3, 23),
        (None, 2.4, 24),
    ):
        scheduler.step(argument)
        assert (scheduler.time, scheduler.last_epoch) == (time, last_epoch)


@pytest.mark.parametrize("begin", [None, 0.1])
def test_nothing_accumulates(begin: float | None) -> None:
    """After 30,000 batches the time is the rounded quotient, which added up would be 4e-11 off."""
    scheduler = WarmRestarts(stepped(), 1e6, steps_per_epoch=7)
    if begin is not None:
        scheduler.step(begin)
    for _ in range(30_000):
        scheduler.step()
    assert scheduler.time == float(Fraction(30_000, 7) + Fraction(str(begin or 0)))
    assert sum(itertools.repeat(1 / 7, 30_000), 0.0) != float(Fraction(30_000, 7))


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf, "3", True])
def test_times_that_are_none(value: Any) -> None:
    """They are refused before anything changes."""
    opt = stepped()
    scheduler = WarmRestarts(opt, 3, weight_decay=None, snapshots=1)
    scheduler.step(2.5)
    before = scheduler.state_dict(), rates_of(opt)
    with pytest.raises(ValueError, match=rf"epoch is {value!r}; expected a finite number >= 0"):
        scheduler.step(value)
    assert (scheduler.state_dict(), rates_of(opt)) == before


def test_group_added_later() -> None:
    """The message says what to do, and no group's rate is changed before it."""
    opt = stepped()
    scheduler = WarmRestarts(opt, 3)
    opt.add_param_group({"params": make_params(torch.device("cpu"), shapes=((3,),)), "lr": 1.0})
    with pytest.raises(ValueError, match=r"has 2 groups, and had 1 .* Make the scheduler after add_param_group"):
        scheduler.step()
    assert rates_of(opt) == [0.1, 1.0]
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize("per_epoch", [None, 4])
def test_last_epoch_goes_on_without_a_state_dict(per_epoch: int | None) -> None:
    """As torch's: `last_epoch=k` is a scheduler of which `step()` was called k + 1 times."""
    opt = stepped()
    scheduler = WarmRestarts(opt, 3, 2, steps_per_epoch=per_epoch)
    for _ in range(8):
        scheduler.step()
    again = stepped()
    again.param_groups[0]["initial_lr"] = 0.1
    assert WarmRestarts(again, 3, 2, steps_per_epoch=per_epoch, last_epoch=7).time == scheduler.time
    assert rates_of(again) == rates_of(opt)
    with pytest.raises(KeyError, match="initial_lr"):
        WarmRestarts(stepped(), 3, last_epoch=7)


# --- beside torch's schedulers ---------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "floats": lambda: (0.1, 3e-4),
    "float64": lambda: tensors(0.1, 3e-4),
    "float32": lambda: tensors(0.1, 3e-4, dtype=torch.float32),
    "float and tensor of one element": lambda: (0.1, torch.tensor([3e-4], dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "mult"), [(1, 1), (5, 1), (1, 2), (7, 2), (4, 3)])
@pytest.mark.parametrize("stepping", ["epochs", "fractions"])
@every_optimizer
def test_agrees_with_torchs_scheduler(make: Make, stepping: str, first: int, mult: int, kind: str) -> None:
    """CosineAnnealingWarmRestarts, every epoch or every batch; tensors are written in place."""
    ours, theirs = (stepped(make, KINDS[kind]()) for _ in range(2))
    objects = [group["lr"] for group in ours.param_groups]
    initial = rates_of(ours)
    scheduler = WarmRestarts(ours, first, mult)
    reference = lr_scheduler.CosineAnnealingWarmRestarts(theirs, first, mult)
    limit = 0.0 if kind == "float32" else tolerance("schedule_against_torch")  # too little for float32 to show
    for epoch, batch in itertools.product(range(60), range(1 if stepping == "epochs" else 3)):
        for each in (scheduler, reference):
            each.step(*([] if stepping == "epochs" else [epoch + batch / 3]))
        for rate, expected, base in zip(rates_of(ours), rates_of(theirs), initial, strict=True):
            assert abs(rate - expected) <= limit * base, f"epoch {epoch}, batch {batch}"
        assert scheduler.last_epoch == reference.last_epoch
    for group, was in zip(ours.param_groups, objects, strict=True):
        assert isinstance(group["lr"], float) if isinstance(was, float) else group["lr"] is was
    for last, group in zip(scheduler.get_last_lr(), ours.param_groups, strict=True):
        assert type(last) is type(group["lr"])
        assert last == group["lr"]
        assert not isinstance(last, torch.Tensor) or last is not group["lr"], "a copy"


@every_optimizer
def test_warnings_are_torchs(make: Make) -> None:
    """`step` before the optimizer's warns, after it not; so does `get_lr` from outside; an epoch never does."""
    opt = make(make_params(torch.device("cpu")), lr=0.1)
    scheduler = WarmRestarts(opt, 3)
    before = scheduler.state_dict()
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    opt = make(make_params(torch.device("cpu")), lr=0.1)
    scheduler = WarmRestarts(opt, 3)
    with pytest.raises(UserWarning, match="Detected call"):  # where warnings are errors, nothing has happened
        scheduler.step(2.25)
    assert scheduler.state_dict() == before
    with pytest.warns(UserWarning, match="please use `get_last_lr"):
        assert scheduler.get_lr() == [0.1]
    train(opt, scheduler, Gradients(), 3)
    scheduler.step(4.5)
    assert (scheduler.cycle, scheduler.position) == (1, 1.5)


@pytest.mark.parametrize("place", [0, 1])
def test_part_of_torchs_sequence(place: int) -> None:
    """SequentialLR takes back the step of each scheduler's construction and begins each anew."""
    opt = stepped()
    ours = WarmRestarts(opt, 2, 2, steps_per_epoch=2, snapshots=4)
    other = lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=100)
    both = [ours, other] if place == 0 else [other, ours]
    sequence = lr_scheduler.SequentialLR(opt, both, milestones=[10])
    resumed = WarmRestarts(stepped(), 9)
    resumed.load_state_dict(ours.state_dict())
    assert (resumed.time, resumed.cycle) == (0.0, 0), "a time that was taken back is the beginning"
    rates = []
    for _ in range(20):
        rates += rates_of(opt)
        sequence.step()
    alone = stepped()
    scheduler = WarmRestarts(alone, 2, 2, steps_per_epoch=2)
    expected = []
    for _ in range(10):
        expected += rates_of(alone)
        scheduler.step()
    assert rates[10 * place : 10 * place + 10] == expected
    assert [(kept.cycle, kept.time) for kept in ours.snapshots] == [(0, 2.0)]


# --- weight decay by the cycle ---------------------------------------------------------------------------------------


@every_optimizer
def test_weight_decay_of_each_cycle(make: Make) -> None:
    """Set when a cycle begins, once; groups without decay stay so, and tensors are written in place."""
    in_place = torch.tensor(0.3, dtype=torch.float64)
    opt = with_decays(make, 0.3, 0.0, in_place, torch.tensor(0.0))
    calls = []
    scheduler = WarmRestarts(opt, 2, 3, weight_decay=lambda length: calls.append(length) or halved(length))
    assert decays_of(opt) == [1.0, 0.0, 1.0, 0.0]
    scheduler.step()
    opt.param_groups[0]["weight_decay"] = 0.5
    scheduler.step(1.9)
    assert decays_of(opt) == [0.5, 0.0, 1.0, 0.0], "within a cycle it is the user's"
    scheduler.step()
    assert decays_of(opt) == [3.0, 0.0, 3.0, 0.0]
    opt.param_groups[0]["weight_decay"] = 0.0
    scheduler.step(8)
    assert decays_of(opt) == [9.0, 0.0, 9.0, 0.0], "it is the value when the scheduler was made that counts"
    scheduler.step(0.5)
    assert decays_of(opt) == [1.0, 0.0, 1.0, 0.0], "on the way back, too"
    assert calls == [2.0, 6.0, 18.0, 2.0]
    assert opt.param_groups[2]["weight_decay"] is in_place


def test_weight_decay_normalized_to_the_cycle() -> None:
    """As AdamWR has it: of the cycle, not of the run."""
    opt = with_decays(FusedAdamW, 1.0)
    of_a_cycle = functools.partial(normalized_weight_decay, 0.05, 128, 50_000)
    scheduler = WarmRestarts(opt, 10, 2, weight_decay=of_a_cycle)
    for time, length in ((0, 10), (9.5, 10), (10, 20), (30, 40)):
        scheduler.step(time)
        assert decays_of(opt) == [normalized_weight_decay(0.05, 128, 50_000, length)]


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, None, "0.1"])
def test_weight_decay_that_is_none(value: Any) -> None:
    """Refused before anything changes, when the scheduler is made or on the step that would set it."""
    with pytest.raises(ValueError, match=rf"weight_decay\(2\.0\).* is {value!r}; expected a finite number >= 0"):
        WarmRestarts(with_decays(torch.optim.SGD, 0.1), 2, weight_decay=lambda _: value)
    opt = with_decays(torch.optim.SGD, 0.1)
    scheduler = WarmRestarts(opt, 2, 2, weight_decay=lambda length: value if length > 2 else 0.2, snapshots=1)
    before = scheduler.state_dict(), rates_of(opt), decays_of(opt)
    with pytest.raises(ValueError, match=r"weight_decay\(4\.0\)"):
        scheduler.step(2)
    assert (scheduler.state_dict(), rates_of(opt), decays_of(opt)) == before


def test_weight_decay_that_no_group_would_get() -> None:
    """Asked for and without effect: the message says what to give the groups."""
    for opt in (with_decays(torch.optim.SGD, 0.0, 0), torch.optim.Rprop(make_params(torch.device("cpu")))):
        with pytest.raises(ValueError, match="every group's weight_decay is 0, which stays; expected one other than"):
            WarmRestarts(opt, 2, weight_decay=halved)


# --- arguments -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, type[Exception], str, tuple[Any, ...]]] = [
    ("first_cycle", ValueError, "a finite number of epochs > 0", (0, -1, 0.0, math.inf, math.nan, "2", None, True)),
    ("cycle_mult", ValueError, "a finite number >= 1", (0.99, 0, -2, math.inf, math.nan, "2")),
    ("eta_min", ValueError, "0 <= eta_min < 1, a share of lr", (-0.1, 1, 1.0, 2, math.nan)),
    ("steps_per_epoch", ValueError, "an integer >= 1", (0, -3)),
    ("steps_per_epoch", TypeError, "an integer >= 1", (2.0, "2", True)),
    ("snapshots", ValueError, "an integer >= 0", (-1,)),
    ("snapshots", TypeError, "an integer >= 0", (1.0, True)),
    ("last_epoch", ValueError, "an integer >= -1", (-2,)),
    ("last_epoch", TypeError, "an integer >= -1", (1.5, None)),
    ("weight_decay", TypeError, "a function of a cycle's length in epochs. A constant belongs in", (0.1,)),
]


@pytest.mark.parametrize(("name", "error", "expected", "values"), REFUSED)
def test_arguments_refused(name: str, error: type[Exception], expected: str, values: tuple[Any, ...]) -> None:
    """When the scheduler is made, before it touches the optimizer; the message names the argument and its value."""
    opt = stepped()
    groups = [dict(group) for group in opt.param_groups]
    for value in values:
        with pytest.raises(error) as raised:
            WarmRestarts(opt, **{"first_cycle": 2, name: value})
        assert str(raised.value).startswith(f"WarmRestarts: {name} is {value!r}; expected {expected}")
    assert opt.param_groups == groups
    assert not hasattr(opt.step, "_wrapped_by_lr_sched")


def test_no_optimizer() -> None:
    """A model, say."""
    with pytest.raises(TypeError, match=r"optimizer is a Linear; expected a torch\.optim\.Optimizer"):
        WarmRestarts(torch.nn.Linear(1, 1), 2)  # type: ignore[arg-type]
