"""Loss scaling and guards over whole runs: what is skipped, what is applied, what the scaler and the user then see.

Gradients are those of a linear loss, so that each equals its coefficient times the scale, exactly. The bits of scaled
and skipped steps are compared with the judge in tests/test_whole_step.py.
"""

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Path
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

from adamw_kernels import FusedAdamW

# The interpreter computes with NumPy, which warns of the infinities that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

# Iterations of a run of RUN that overflow.
RUN = 6
OVERFLOWS: dict[str, set[int]] = {
    "none": set(),
    "first": {0},
    "first-two": {0, 1},
    "middle": {3},
    "last": {5},
    "most": {0, 2, 3, 5},
}

Scaler = torch.amp.GradScaler


def make_scaler(device: torch.device, scale: float = 2.0**16) -> Scaler:
    """Return a scaler that grows after every two good iterations."""
    return Scaler(device.type, init_scale=scale, growth_interval=2)


def coefficients(params: list[Any], iteration: int, *, overflow: bool = False) -> list[torch.Tensor]:
    """Return one tensor a parameter, the same for the same iteration; the last holds an infinity if `overflow`."""
    generator = torch.Generator().manual_seed(100 + iteration)
    values = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    if overflow:
        values[-1].fill_(math.inf)
    return [value.to(p.device, p.dtype) for value, p in zip(values, params, strict=True)]


def backward(scaler: Scaler, params: list[Any], iteration: int, *, overflow: bool = False) -> None:
    """Give every parameter its scaled gradient, by autograd."""
    for p in params:
        p.grad = None
    terms = [(p * c).sum() for p, c in zip(params, coefficients(params, iteration, overflow=overflow), strict=True)]
    scaler.scale(torch.stack(terms).sum()).backward()


def train(
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
    overflows: set[int],
    *,
    unscale: bool,
    max_norm: float | None = None,
    iterations: int = RUN,
) -> list[float]:
    """Run the usual loop; the scales it passed through.

    Args:
        optimizer: ours or torch's.
        scaler: of the loss.
        overflows: iterations whose gradients hold an infinity.
        unscale: call `unscale_` before the step.
        max_norm: clip in between, as without `max_grad_norm`.
        iterations: how many.
    """
    params = params_of(optimizer)
    scales = []
    for iteration in range(iterations):
        backward(scaler, params, iteration, overflow=iteration in overflows)
        if unscale:
            scaler.unscale_(optimizer)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def pair(device: torch.device, fused: bool | None, **options: Any) -> tuple[FusedAdamW, torch.optim.AdamW]:
    """Return ours, with options of ours, and torch's over the same values, in two groups."""
    ours = make_params(device)
    theirs = copies(ours)
    groups = [[{"params": params[:1], "lr": 0.1}, {"params": params[1:]}] for params in (ours, theirs)]
    return (
        FusedAdamW(groups[0], fused=fused, **options, **HYPER),
        torch.optim.AdamW(groups[1], fused=fused, **HYPER),
    )


# --- torch.amp.GradScaler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True], ids=["step-alone", "unscale-first"])
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
@pytest.mark.parametrize("overflows", OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_scaler_agrees_with_torch(path: Path, overflows: set[int], fused: bool | None, unscale: bool) -> None:
    """In both orders, weights, moments, step counts and scales are those of torch's AdamW under the same scaler."""
    ours, theirs = pair(path.device, fused)
    scales = [train(o, make_scaler(path.device), overflows, unscale=unscale) for o in (ours, theirs)]
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 1, "the scale moved"
    assert_agree(ours, theirs)
    for p in params_of(ours):
        assert ours.state[p]["step"] == RUN - len(overflows)
    # What the device skipped is counted; what the host skipped never came here.
    assert ours.skipped_steps == (len(overflows) if fused else 0)
    assert bool(ours.last_step_skipped) == bool(fused and RUN - 1 in overflows)


@pytest.mark.parametrize("unscale", [False, True], ids=["step-alone", "unscale-first"])
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_scaler_with_clipping(path: Path, fused: bool | None, unscale: bool) -> None:
    """`max_grad_norm` under a scaler is torch's `unscale_`, `clip_grad_norm_`, `step`; the norm is the unscaled one."""
    ours, theirs = pair(path.device, fused, max_grad_norm=2.0)
    overflows = OVERFLOWS["most"]
    scales = train(ours, make_scaler(path.device), overflows, unscale=unscale, iterations=RUN + 1)
    wanted = train(theirs, make_scaler(path.device), overflows, unscale=True, max_norm=2.0, iterations=RUN + 1)
    assert scales == wanted
    assert_agree(ours, theirs)
    last = coefficients(params_of(ours), RUN)
    norm = torch.nn.utils.get_total_norm(last)
    assert norm > 2.0, "it was clipped"
    assert_close(ours.grad_norm, norm, "norm_in_float32", "norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_as_the_user_left_them(path: Path, dtype: torch.dtype) -> None:
    """With `fused=True` gradients stay scaled unless `unscale_` was called; without, the scaler unscales them.

    torch's fused step writes the unscaled ones back: a pass over memory that nobody reads.
    """
    for fused, unscale in ((True, False), (True, True), (None, False), (None, True)):
        params = make_params(path.device, dtype)
        optimizer = FusedAdamW(params, fused=fused, max_grad_norm=0.5)
        scaler = make_scaler(path.device, scale=8.0)
        backward(scaler, params, 0)
        if dtype == torch.float16 and (unscale or fused is None):
            # torch refuses to unscale float16 gradients, since they are those of float16 weights.
            with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
                scaler.step(optimizer) if not unscale else scaler.unscale_(optimizer)
            continue
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        factor = 8.0 if fused and not unscale else 1.0
        for p, c in zip(params, coefficients(params, 0), strict=True):
            assert torch.equal(p.grad, factor * c), (fused, unscale)
        assert optimizer.state[params[0]]["step"] == 1


def test_scaled_and_unscaled_steps_have_the_same_bits(path: Path) -> None:
    """A scale that is a power of two changes no bit: scaled on the device, on the host, or never."""
    runs = []
    for fused, scale in ((True, 2.0**10), (True, 1.0), (None, 2.0**10), (None, 2.0**-6)):
        optimizer = FusedAdamW(make_params(path.device, torch.float32), fused=fused, max_grad_norm=1.0, **HYPER)
        scaler = Scaler(path.device.type, init_scale=scale)
        train(optimizer, scaler, set(), unscale=False)
        runs.append(optimizer)
    never = FusedAdamW(make_params(path.device, torch.float32), max_grad_norm=1.0, **HYPER)
    for iteration in range(RUN):
        for p, c in zip(params_of(never), coefficients(params_of(never), iteration), strict=True):
            p.grad = c
        never.step()
    for optimizer in runs:
        assert_same_bits(never, optimizer)


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_unscaling_twice_is_torchs_error(device: torch.device, fused: bool | None) -> None:
    """`unscale_` twice in an iteration raises what it raises with torch's optimizer; the step then still works."""
    messages = []
    for optimizer in pair(device, fused):
        scaler = make_scaler(device)
        backward(scaler, params_of(optimizer), 0)
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError) as error:
            scaler.unscale_(optimizer)
        messages.append(str(error.value))
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match=re.escape("step() has already been called since the last update()")):
            scaler.step(optimizer)
        scaler.update()
        assert all(optimizer.state[p]["step"] == 1 for p in params_of(optimizer))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_two_optimizers_under_one_scaler(path: Path, fused: bool | None) -> None:
    """Only the optimizer whose gradients overflowed skips; the scale shrinks for both. As with torch's."""
    pairs = [pair(path.device, fused), pair(path.device, fused)]
    scalers = make_scaler(path.device), make_scaler(path.device)
    for iteration, overflowing in enumerate([{0}, set(), {1}, {0, 1}, set()]):
        for side, scaler in enumerate(scalers):
            optimizers = [both[side] for both in pairs]
            for which, optimizer in enumerate(optimizers):
                backward(scaler, params_of(optimizer), 10 * which + iteration, overflow=which in overflowing)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for which, (ours, theirs) in enumerate(pairs):
            assert bool(ours.last_step_skipped) == bool(fused and which in overflowing)
            assert_agree(ours, theirs)
    for ours, _ in pairs:
        assert all(ours.state[p]["step"] == 3 for p in params_of(ours))


def test_disabled_scaler(device: torch.device) -> None:
    """A disabled scaler changes nothing, with `fused=True` neither."""
    ours, theirs = pair(device, True)
    for optimizer in (ours, theirs):
        train(optimizer, Scaler(device.type, enabled=False), set(), unscale=True)
    assert_agree(ours, theirs)
    assert ours.skipped_steps == 0


def twice_pickled(optimizer: FusedAdamW) -> Any:
    """Return it after two trips through bytes."""
    return pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(optimizer))))


@pytest.mark.parametrize("copied", [copy.deepcopy, twice_pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_copies_stay_under_the_scaler(device: torch.device, fused: bool | None, copied: Callable[[Any], Any]) -> None:
    """A copied optimizer is scaled in the same place as the original, skips as it does, and trains to the same bits."""
    original, _ = pair(device, fused, max_grad_norm=1.0, skip_nonfinite=True)
    train(original, make_scaler(device), {1}, unscale=False, iterations=2)
    twin = copied(original)
    assert getattr(twin, "_step_supports_amp_scaling", False) == bool(fused)
    for optimizer in (original, twin):
        train(optimizer, make_scaler(device), OVERFLOWS["most"], unscale=False)
        assert optimizer.last_step_skipped == bool(fused)
    assert_same_bits(original, twin)
    assert twin.state[params_of(twin)[0]]["step"] == 3


def test_checkpoint_of_a_scaled_run(device: torch.device) -> None:
    """Saved and resumed between iterations, with the scaler's own state, a run ends on the same bits."""
    whole, _ = pair(device, True)
    train(whole, make_scaler(device), {1, 4}, unscale=False)
    first, _ = pair(device, True)
    scaler = make_scaler(device)
    train(first, scaler, {1}, unscale=False, iterations=3)
    second, _ = pair(device, True)
    for p, q in zip(params_of(second), params_of(first), strict=True):
        p.data.copy_(q)
    second.load_state_dict(first.state_dict())
    resumed = make_scaler(device)
    resumed.load_state_dict(scaler.state_dict())
    params = params_of(second)
    for iteration in range(3, RUN):
        backward(resumed, params, iteration, overflow=iteration == 4)
        resumed.step(second)
        resumed.update()
    assert_same_bits(whole, second)


# --- signals set by hand ----------------------------------------------------------------------------------------------

FLAGS = [1.0, 2.0, -1.0, 1e-30, math.nan, math.inf]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("flag", FLAGS)
def test_found_inf_set_by_hand(path: Path, flag: float, shape: tuple[int, ...]) -> None:
    """Any value but zero, of one element in any shape, skips: nothing but the count of skipped steps changes."""
    optimizer, _ = pair(path.device, None, ema_decay=0.9)
    Gradients().give(params_of(optimizer))
    optimizer.step()
    before = snapshot(optimizer)
    assert optimizer.skipped_steps == 0 and not optimizer.last_step_skipped
    optimizer.found_inf = torch.full(shape, flag, device=path.device)  # type: ignore[attr-defined]
    for count in (1, 2):
        optimizer.step()
        assert_unchanged(before, snapshot(optimizer))
        assert optimizer.last_step_skipped and optimizer.skipped_steps == count
    optimizer.found_inf.zero_()  # type: ignore[attr-defined]
    optimizer.step()
    assert not optimizer.last_step_skipped and optimizer.skipped_steps == 2
    del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 3 for p in params_of(optimizer))


@pytest.mark.parametrize("kind", ["scalar", "one-element", "float64", "on-the-cpu", "number"])
def test_grad_scale_set_by_hand(path: Path, kind: str) -> None:
    """A scale that the user sets divides the gradients until it is taken away, with and without a flag beside it."""
    make: dict[str, Callable[[float], Any]] = {
        "scalar": lambda x: torch.tensor(x, device=path.device),
        "one-element": lambda x: torch.tensor([x], device=path.device),
        "float64": lambda x: torch.tensor(x, device=path.device, dtype=torch.float64),
        "on-the-cpu": torch.tensor,
        "number": float,
    }
    scaled, plain = (FusedAdamW(make_params(path.device, torch.float32), **HYPER) for _ in range(2))
    gradients = Gradients()
    for scale, flag in ((None, None), (4.0, None), (0.5, 0.0), (None, None), (2.0**20, None)):
        gradients.give(params_of(scaled), params_of(plain))
        for name, value in (("grad_scale", scale), ("found_inf", flag)):
            if value is not None:
                setattr(scaled, name, make[kind](value))
            elif hasattr(scaled, name):
                delattr(scaled, name)
        for p in params_of(scaled):
            p.grad.mul_(scale or 1.0)
        scaled.step()
        plain.step()
        assert_same_bits(plain, scaled)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "warm"])
def test_signals_of_several_elements_are_refused(device: torch.device, name: str, warm: bool) -> None:
    """A scale or flag that is not one number is an error by name, before anything is written."""
    optimizer, _ = pair(device, True)
    Gradients().give(params_of(optimizer))
    if warm:
        optimizer.step()
    before = [p.detach().clone() for p in params_of(optimizer)]
    setattr(optimizer, name, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\); expected one element"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(optimizer), before, strict=True))
    assert all(entry["step"] == int(warm) for entry in optimizer.state.values())


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_one_bad_batch_does_not_destroy_a_run(path: Path, value: float) -> None:
    """With `skip_nonfinite`, 100 steps of which one has a gradient that is no number end where the other 99 do."""
    interpreted = path.backend == "triton" and path.device.type == "cpu"  # at tens of milliseconds a step
    guarded, without, unguarded = (make_params(path.device, torch.float32, shapes=((4,), (3,))) for _ in range(3))
    options = dict(max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True, amsgrad=True, **HYPER)
    run = FusedAdamW(guarded, skip_nonfinite=True, **options)
    judge = FusedAdamW(without, **options)
    victim = FusedAdamW(unguarded, **options)
    gradients = Gradients()
    for i in range(20 if interpreted else 100):
        gradients.give(guarded, without, unguarded)
        if i == 13:
            guarded[1].grad[0] = unguarded[1].grad[0] = value
            victim.step()
        else:
            judge.step()
        run.step()
        assert bool(run.last_step_skipped) == (i == 13)
    assert_same_bits(judge, run)
    assert run.skipped_steps == 1 and run.skipped_steps.dtype == torch.int64
    assert not torch.stack([p.isfinite().all() for p in unguarded]).all(), "without the guard it is destroyed"


def test_largest_norm_allowed(path: Path) -> None:
    """`max_skip_norm` skips what is above it, not what equals it, and NaN; it is held against the unscaled norm."""
    (p,) = make_params(path.device, shapes=((4,),))
    optimizer = FusedAdamW([p], max_skip_norm=6.0, **HYPER)  # four gradients of 3 have the norm 6
    taken = 0
    for value, scale, skipped in (
        (3.0, None, False),
        (math.nextafter(3.0, 4.0) + 1e-12, None, True),
        (3.0, None, False),
        (math.nan, None, True),
        (math.inf, None, True),
        (12.0, 4.0, False),
        (12.5, 4.0, True),
        (-2.0, None, False),
    ):
        p.grad = torch.full_like(p, value)
        optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=path.device)  # type: ignore[attr-defined]
        before = snapshot(optimizer)
        optimizer.step()
        assert bool(optimizer.last_step_skipped) == skipped, value
        taken += not skipped
        if skipped:
            assert_unchanged(before, snapshot(optimizer))
        assert optimizer.state[p]["step"] == taken
    assert optimizer.skipped_steps == 4


def test_limit_as_a_tensor(path: Path) -> None:
    """A tensor as `max_skip_norm` is read on every step, so that a running estimate can be kept in it."""
    (p,) = make_params(path.device, shapes=((4,),))
    p.grad = torch.full_like(p, 3.0)
    limit = torch.tensor(7.0, device=path.device)
    optimizer = FusedAdamW([p], max_skip_norm=limit)
    for value, skipped in ((7.0, False), (5.0, True), (math.inf, False), (math.nan, True), (6.0, False)):
        limit.fill_(value)
        optimizer.step()
        assert bool(optimizer.last_step_skipped) == skipped, value
    assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_guards_under_a_scaler(path: Path, fused: bool | None) -> None:
    """A step that both the scaler and a guard would skip is one skipped step; the scale moves as without guards."""
    guarded, plain = (pair(path.device, fused, **options)[0] for options in (dict(skip_nonfinite=True), {}))
    scales = [train(o, make_scaler(path.device), OVERFLOWS["most"], unscale=False) for o in (guarded, plain)]
    assert scales[0] == scales[1]
    assert_same_bits(plain, guarded)
    assert guarded.skipped_steps == (4 if fused else 0)


def test_count_of_skipped_steps_goes_on(device: torch.device) -> None:
    """It survives groups that are added, options that are switched on, and state that is loaded."""
    params = make_params(device)
    scaled = FusedAdamW(params[:1], fused=True)
    clipped = FusedAdamW(copies(params[:1]), max_grad_norm=1.0, clip_per_group=True)
    count = 0

    def skip() -> None:
        nonlocal count
        count += 1
        for optimizer in (scaled, clipped):
            Gradients().give(params_of(optimizer))
            optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
            optimizer.step()
            assert optimizer.skipped_steps == count and optimizer.last_step_skipped

    skip()
    scaled.add_param_group({"params": params[1:2]})
    clipped.add_param_group({"params": copies(params[1:2])})  # one norm more
    skip()
    scaled.param_groups[1]["max_grad_norm"] = 1.0  # the first norm
    skip()
    for optimizer in (scaled, clipped):
        optimizer.load_state_dict(optimizer.state_dict())
    skip()
    for group in scaled.param_groups:
        group["max_grad_norm"] = None  # no norm again
    skip()
    for optimizer in (scaled, clipped):
        assert all(entry["step"] == 0 for entry in optimizer.state.values())


def test_counters_exist_always(device: torch.device) -> None:
    """Before any step and where nothing can skip they are zeros of the same kinds, new ones on each read."""
    plain, guarded = FusedAdamW(make_params(device)), FusedAdamW(make_params(device), skip_nonfinite=True)
    for steps in (0, 1):
        for optimizer in (plain, guarded):
            skipped, count = optimizer.last_step_skipped, optimizer.skipped_steps
            assert (skipped.dtype, skipped.shape, skipped.device) == (torch.bool, torch.Size([]), device), steps
            assert (count.dtype, count.shape, count.device) == (torch.int64, torch.Size([]), device), steps
            assert not skipped and count == 0
            count.add_(5)
            assert optimizer.skipped_steps == 0
            Gradients().give(params_of(optimizer))
            optimizer.step()
