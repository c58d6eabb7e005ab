"""Warm restarts: the weights kept at each restart, and runs that are saved and go on with the same bits."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import Gradients, assert_same_bits, assert_unchanged, bits, make_params, params_of, snapshot
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
    through_file,
    times,
    train,
    with_decays,
)
from torch.optim import lr_scheduler

from adamw_kernels import FusedAdamW
from adamw_kernels.warm_restarts import Snapshot, WarmRestarts, normalized_weight_decay

pytestmark = pytest.mark.filterwarnings("error")  # the scheduler does not warn here

# --- snapshots -------------------------------------------------------------------------------------------------------


@every_optimizer
def test_snapshots_are_the_weights_at_each_restart(make: Make) -> None:
    """Those with which a cycle ended, the last two of four; copies, in the order of the parameters."""
    opt = make(make_params(torch.device("cpu"), torch.float32), lr=0.1)
    scheduler = WarmRestarts(opt, 1, 2, steps_per_epoch=2, snapshots=2)
    gradients, ends = Gradients(), []
    for batch in range(1, 31):
        gradients.give(params_of(opt))
        opt.step()
        weights = [p.detach().clone() for p in params_of(opt)]
        scheduler.step()
        if scheduler.position == 0.0:
            ends.append(Snapshot(scheduler.cycle - 1, batch / 2, weights))
    assert [kept[:2] for kept in ends] == [(0, 1.0), (1, 3.0), (2, 7.0), (3, 15.0)]
    assert [kept[:2] for kept in scheduler.snapshots] == [(2, 7.0), (3, 15.0)]
    gradients.give(params_of(opt))
    opt.step()
    for kept, expected in zip(scheduler.snapshots, ends[2:], strict=True):
        assert_same_tensors(kept.weights, expected.weights)


def assert_same_tensors(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Compare two lists of tensors: dtypes, shapes, bits."""
    assert [(x.dtype, x.shape) for x in a] == [(y.dtype, y.shape) for y in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_when_a_snapshot_is_taken() -> None:
    """One for a jump over several cycles, none on the way back, none unless asked for."""
    scheduler = WarmRestarts(stepped(), 1, snapshots=9)
    for time in (0.5, 3.25, 3.5, 1.0, 1.5, 2.0):
        scheduler.step(time)
    assert [kept[:2] for kept in scheduler.snapshots] == [(0, 3.25), (1, 2.0)]
    scheduler = WarmRestarts(stepped(), 1)
    scheduler.step(3)
    assert scheduler.snapshots == []


@pytest.mark.parametrize("param_format", ["split24", "split32", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_snapshots_hold_what_formats_remember(device: torch.device, dtype: torch.dtype, param_format: str) -> None:
    """Float32 weights on the CPU; loading them brings back weights and remainders bit for bit."""
    opt = FusedAdamW(make_params(device, dtype), lr=1e-3, param_format=param_format)
    scheduler, gradients = WarmRestarts(opt, 2, snapshots=2), Gradients()
    masters, stored = [], []
    for _ in range(4):
        train(opt, scheduler, gradients, 1)
        masters.append([weight.cpu() for weight in opt.fp32_weights().values()])
        stored.append(snapshot(opt))
    for kept, master in zip(scheduler.snapshots, (masters[1], masters[3]), strict=True):
        assert all((weight.dtype, weight.device.type) == (torch.float32, "cpu") for weight in kept.weights)
        assert_same_tensors(kept.weights, master)
    if param_format == "split32":
        assert any(bool((weight != weight.to(dtype).float()).any()) for weight in masters[1]), "more than 16 bits hold"
    train(opt, scheduler, gradients, 1)
    moments = [entry for entry in snapshot(opt) if not is_weight(entry)]
    for index, then in ((0, stored[1]), (-1, stored[3]), (1, stored[3])):
        scheduler.load_snapshot(index)
        assert_unchanged(list(filter(is_weight, then)), list(filter(is_weight, snapshot(opt))))
    assert_unchanged(moments, [entry for entry in snapshot(opt) if not is_weight(entry)])


def is_weight(entry: tuple[str, torch.Tensor]) -> bool:
    """Whether an entry of `pairs.snapshot` is a parameter or the rest of one."""
    return entry[0].startswith(("parameter", "param_remainder"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_load_snapshot_with_other_optimizers(device: torch.device, dtype: torch.dtype) -> None:
    """Their parameters' own bits, in place; the latest unless told otherwise."""
    opt = torch.optim.SGD(make_params(device, dtype), lr=0.1, momentum=0.9)
    scheduler = WarmRestarts(opt, 2, snapshots=1)
    train(opt, scheduler, Gradients(), 2)
    weights, places = [p.detach().clone() for p in params_of(opt)], [p.data_ptr() for p in params_of(opt)]
    assert all(weight.device.type == "cpu" for weight in scheduler.snapshots[0].weights)
    train(opt, scheduler, Gradients(), 1)
    assert not torch.equal(params_of(opt)[0], weights[0])
    scheduler.load_snapshot()
    assert_same_tensors(params_of(opt), weights)
    assert [p.data_ptr() for p in params_of(opt)] == places


def test_load_snapshot_refuses() -> None:
    """Each message says what there is; nothing is written."""
    opt = stepped()
    with pytest.raises(IndexError, match="none are kept; make the scheduler with snapshots=1 or more"):
        WarmRestarts(opt, 1).load_snapshot()
    scheduler = WarmRestarts(opt, 1, snapshots=2)
    with pytest.raises(IndexError, match="no cycle has ended yet"):
        scheduler.load_snapshot(0)
    scheduler.step(1)
    scheduler.step(2)
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"load_snapshot\({index}\); expected an index from -2 to 1"):
            scheduler.load_snapshot(index)
    for index in (0.0, None, True):
        with pytest.raises(TypeError, match=rf"index is {index!r}; expected an integer"):
            scheduler.load_snapshot(index)  # type: ignore[arg-type]
    before = snapshot(opt)
    added = make_params(torch.device("cpu"), shapes=((3,),))
    opt.add_param_group({"params": added})
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\]; the parameters have \[\(2,\), \(3,\)\]"):
        scheduler.load_snapshot()
    assert_unchanged(before, snapshot(opt)[:1])


def test_snapshot_that_cannot_be_taken() -> None:
    """While averages are shown the weights are not there: the schedule stays where it is, and goes on later."""
    opt = FusedAdamW(make_params(torch.device("cpu")), lr=0.1, ema_decay=0.9)
    scheduler = WarmRestarts(opt, 2, snapshots=1)
    train(opt, scheduler, Gradients(), 1)
    before = scheduler.state_dict(), rates_of(opt)
    with opt.ema_weights(), pytest.raises(RuntimeError, match=r"fp32_weights\(\) within ema_weights"):
        scheduler.step()
    assert (scheduler.state_dict(), rates_of(opt)) == before
    scheduler.step()
    assert_same_tensors(scheduler.snapshots[0].weights, [p.detach() for p in params_of(opt)])


# --- resuming --------------------------------------------------------------------------------------------------------


@explore
@given(schedule=schedules, moves=st.lists(times, min_size=1, max_size=12), data=st.data())
def test_resumed_at_any_time(schedule: dict[str, Any], moves: list[float | None], data: st.DataObject) -> None:
    """A state saved anywhere, through a file, into a scheduler made with other arguments: from then on the same."""
    opt = stepped(rates=(0.1, *tensors(0.3, dtype=torch.float32)))
    scheduler = WarmRestarts(opt, **schedule, snapshots=2)
    saved = data.draw(st.integers(0, len(moves)))
    for move in moves[:saved]:
        scheduler.step(move)
    state, optimizer_state = through_file([scheduler.state_dict(), opt.state_dict()])
    resumed = stepped(rates=(1.0, *tensors(1.0, dtype=torch.float32)))
    other = WarmRestarts(resumed, 99)
    resumed.load_state_dict(optimizer_state)
    other.load_state_dict(state)
    for move in (..., *moves[saved:]):
        for each in (scheduler, other):
            if move is not ...:
                each.step(move)
        assert rates_of(resumed) == rates_of(opt)
        assert other.get_last_lr() == scheduler.get_last_lr()
        states = [each.state_dict() | {"snapshots": None} for each in (scheduler, other)]
        assert states[0] == states[1]
        assert (other.time, other.cycle, other.position) == (scheduler.time, scheduler.cycle, scheduler.position)
        assert [kept[:2] for kept in other.snapshots] == [kept[:2] for kept in scheduler.snapshots]


@pytest.mark.parametrize("options", [{}, {"param_format": "split32"}, {"moment_format": "bfloat16"}], ids=str)
def test_resumed_run_has_the_bits_of_an_unbroken_one(device: torch.device, options: dict[str, Any]) -> None:
    """In the middle of the second cycle: weights, moments, rates, decays and snapshots are the same at the end."""

    def start(dtype: torch.dtype) -> tuple[FusedAdamW, WarmRestarts]:
        params = make_params(device, dtype)
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3}]
        opt = FusedAdamW(groups, lr=1e-2, **options)
        decay = functools.partial(normalized_weight_decay, 0.5, 4, 16)
        return opt, WarmRestarts(opt, 1.5, 2, steps_per_epoch=4, weight_decay=decay, snapshots=2, eta_min=0.01)

    dtype = torch.bfloat16 if options.get("param_format") else torch.float32
    (opt, scheduler), gradients = start(dtype), Gradients()
    train(opt, scheduler, gradients, 11)
    assert (scheduler.cycle, scheduler.position) == (1, 1.25)
    saved = [opt.state_dict(), scheduler.state_dict(), [p.detach() for p in params_of(opt)]]
    state = through_file(saved, map_location=device)
    resumed, other = start(dtype)
    with torch.no_grad():
        for p, weight in zip(params_of(resumed), state[2], strict=True):
            p.copy_(weight)
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert all(weight.device.type == "cpu" for weight in other.snapshots[0].weights)
    further = Gradients(2)
    train(opt, scheduler, further, 40)
    train(resumed, other, Gradients(2), 40)
    assert scheduler.cycle == 3
    assert_same_bits(opt, resumed)
    assert (rates_of(resumed), decays_of(resumed)) == (rates_of(opt), decays_of(opt))
    for kept, expected in zip(other.snapshots, scheduler.snapshots, strict=True):
        assert kept[:2] == expected[:2]
        assert_same_tensors(kept.weights, expected.weights)


def test_weight_decay_is_no_part_of_the_state() -> None:
    """A function cannot be; the loading scheduler's own says what the loaded cycle has, for groups that had decay."""
    opt = with_decays(torch.optim.SGD, 0.1, 0.0)
    scheduler = WarmRestarts(opt, 2, 2, weight_decay=halved)
    scheduler.step(7)
    state = through_file(scheduler.state_dict())
    tensor = torch.tensor(0.1)
    resumed = with_decays(torch.optim.SGD, tensor, 0.7)
    WarmRestarts(resumed, 3, weight_decay=lambda length: 2 * length).load_state_dict(state)
    assert decays_of(resumed) == [16.0, 6.0], "the second group was not in the loaded schedule"
    assert resumed.param_groups[0]["weight_decay"] is tensor
    plain = with_decays(torch.optim.SGD, 0.1, 0.0)
    WarmRestarts(plain, 3).load_state_dict(state)
    assert decays_of(plain) == [0.1, 0.0], "without a function, they are the optimizer's to load"


def test_states_that_cannot_be_loaded() -> None:
    """Each message says what does not fit, and nothing was loaded."""
    opt = stepped()
    scheduler = WarmRestarts(opt, 2, 2, snapshots=1)
    scheduler.step(2)
    good = scheduler.state_dict()
    two_groups, two_weights = stepped(rates=(0.1, 0.1)), stepped()
    two_weights.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(1)))
    foreign = lr_scheduler.StepLR(stepped(), 3).state_dict()
    for loading, state, message in (
        (opt, foreign, r"expected \['base_lrs', .* call step\(epoch\) with the time to go on from"),
        (opt, {key: good[key] for key in good if key != "eta_min"}, r"expected \['base_lrs'"),
        (opt, None, "the loaded state is NoneType"),
        (opt, good | {"first_cycle": -1.0}, r"loaded: first_cycle is -1\.0; expected a finite number of epochs > 0"),
        (two_groups, good, "the loaded base_lrs are of 1 groups; the optimizer has 2"),
        (two_weights, good, r"is of 1 parameters; the optimizer has 2\. Without it: set state_dict\['snapshots'\]"),
    ):
        other = WarmRestarts(loading, 5)
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)  # type: ignore[arg-type]
        assert other.state_dict() == before
