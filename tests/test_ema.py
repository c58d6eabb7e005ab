"""Averages of the weights: what they are, how they are shown, and what becomes of them in checkpoints.

The expected average is a separate pass over the weights after each step, in torch's own operations: bit for bit where
it rounds in the same places. The arithmetic of bfloat16 averages is the reference's (tests/test_bits.py).
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Path
from pairs import (
    REMAINDER_KEYS,
    Gradients,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    bits,
    copies,
    make_params,
    params_of,
    snapshot,
)
from problems import stored
from reference_formats import merge_weight
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adamw_kernels import FusedAdamW

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]


def ema_of(opt: torch.optim.Optimizer, index: int = 0) -> torch.Tensor:
    """Return the average of a parameter, by its position."""
    average: torch.Tensor = opt.state[params_of(opt)[index]]["param_ema"]
    return average


def train(opt: torch.optim.Optimizer, steps: int = 1, seed: int = 1) -> None:
    """Step on a stream of random gradients."""
    gradients = Gradients(seed)
    for _ in range(steps):
        gradients.give(params_of(opt))
        opt.step()


class SeparateAverage:
    """An average kept beside an optimizer by a pass of its own, rounding once after each operation."""

    def __init__(self, p: torch.Tensor) -> None:
        """Start at the weight as it is."""
        self.param = p
        self.value = self._weight().clone()

    def _weight(self, remainder: torch.Tensor | None = None) -> torch.Tensor:
        p = self.param.detach()
        if remainder is not None:
            dtype = str(p.dtype).removeprefix("torch.")
            param_format = "split24" if remainder.dtype == torch.int8 else "split32"
            return torch.from_numpy(merge_weight(stored(p), stored(remainder), dtype, param_format)).to(p.device)
        p = torch.view_as_real(p) if p.is_complex() else p
        return p if p.dtype == torch.float64 else p.float()

    def update(self, decay: float, remainder: torch.Tensor | None = None) -> None:
        """One step: e = e + (1 - decay) * (p - e), p with what is remembered of it beside."""
        difference = self._weight(remainder) - self.value
        weight = torch.tensor(1.0 - decay, dtype=torch.float64).to(difference.dtype).to(difference.device)
        self.value += difference * weight

    def check(self, opt: torch.optim.Optimizer, what: str) -> None:
        """Compare the optimizer's average bit for bit."""
        average = opt.state[self.param]["param_ema"]
        average = torch.view_as_real(average) if average.is_complex() else average
        assert average.dtype == self.value.dtype, what
        assert torch.equal(bits(average), bits(self.value)), what


# --- the average ----------------------------------------------------------------------------------------------------


def test_average_worked_by_hand(path: Path) -> None:
    """From 1, in steps of a half: with decay 0.75 the average is 1 - 1/4 * 1/2 = 0.875, then 0.875 * 3/4 = 0.65625.

    It starts at the weight before the first update: from the one after it, the first average were 0.5.
    """
    p = torch.nn.Parameter(torch.tensor([1.0], device=path.device))
    opt = FusedAdamW([p], lr=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, ema_decay=0.75)
    for weight, average in ((0.5, 0.875), (0.0, 0.65625)):
        p.grad = torch.ones_like(p)
        opt.step()
        assert (p.item(), ema_of(opt).item()) == (weight, average)


@pytest.mark.filterwarnings("ignore:param_format='native'")
@pytest.mark.parametrize(
    ("dtype", "param_format"),
    [
        *((dtype, "auto") for dtype in DTYPES),
        *itertools.product((torch.bfloat16, torch.float16), ("native", "stochastic", "split24")),
    ],
    ids=str,
)
def test_average_equals_a_separate_pass(path: Path, dtype: torch.dtype, param_format: str) -> None:
    """Over 30 steps: the bits of a pass over the weights as remembered after each step, and a storage of its own."""
    params = make_params(path.device, dtype)
    opt = FusedAdamW(params, ema_decay=0.9, param_format=param_format, **HYPER)
    plain = FusedAdamW(copies(params), param_format=param_format, **HYPER)
    averages = [SeparateAverage(p) for p in params]
    gradients = Gradients()
    for step in range(30):
        gradients.give(params, params_of(plain))
        opt.step()
        plain.step()
        for average in averages:
            state = opt.state[average.param]
            average.update(0.9, state.get(REMAINDER_KEYS["split24" if param_format == "split24" else "split32"]))
            average.check(opt, f"step {step}")
    for p, q in zip(params, params_of(plain), strict=True):
        assert torch.equal(bits(p), bits(q)), "the weights do not depend on their average"
        assert ema_of(opt).untyped_storage().data_ptr() != p.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "float64_against_torch"), (torch.float32, "float32_against_torch")], ids=str
)
def test_average_agrees_with_torchs_averaged_model(path: Path, dtype: torch.dtype, name: str) -> None:
    """`torch.optim.swa_utils.AveragedModel`, started at the same weights and updated after each of 30 steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to(path.device, dtype)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    averaged.update_parameters(model)  # its first update copies
    opt = FusedAdamW(model.parameters(), ema_decay=0.95, **HYPER)
    gradients = Gradients()
    for _ in range(30):
        gradients.give([*model.parameters()])
        opt.step()
        averaged.update_parameters(model)
    for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
        assert not torch.equal(p, q), "an average that is the weight shows nothing"
        assert_close(opt.state[p]["param_ema"], q, name, "average")


def test_warm_up(path: Path) -> None:
    """(1 + t) / (10 + t) while that is less than the decay, t being the parameter's own step count.

    The second parameter has its first gradient in the third step. At t = 4, 5/14 is more than 0.35.
    """
    params = make_params(path.device, torch.float32, shapes=((3,), (4,)))
    opt = FusedAdamW(params, ema_decay=0.35, ema_warmup=True, **HYPER)
    averages = [SeparateAverage(p) for p in params]
    decays = [2 / 11, 3 / 12, 4 / 13, 0.35, 0.35, 0.35]
    gradients = Gradients()
    for step in range(6):
        gradients.give(params, present=[True, step >= 2])
        opt.step()
        averages[0].update(decays[step])
        averages[0].check(opt, f"step {step}")
        if step >= 2:
            averages[1].update(decays[step - 2])
            averages[1].check(opt, f"step {step}, second parameter")


def test_each_group_has_its_own_decay(path: Path) -> None:
    """Groups with other decays, a warm-up of their own, and one without an average."""
    params = make_params(path.device, torch.float32, shapes=((3,),) * 4)
    groups: list[dict[str, Any]] = [
        {"params": [params[0]]},
        {"params": [params[1]], "ema_decay": 0.5},
        {"params": [params[2]], "ema_decay": None},
        {"params": [params[3]], "ema_decay": 0.1, "ema_warmup": True},
    ]
    opt = FusedAdamW(groups, ema_decay=0.9, **HYPER)
    averages = [SeparateAverage(p) for p in params]
    gradients = Gradients()
    for step in range(3):
        gradients.give(params)
        opt.step()
        for index, decay in ((0, 0.9), (1, 0.5), (3, 0.1)):  # the warm-up, 2/11 at first, is above 0.1
            averages[index].update(decay)
            averages[index].check(opt, f"step {step}, group {index}")
    assert "param_ema" not in opt.state[params[2]]


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_may_be_a_tensor(path: Path, where: str, dtype: torch.dtype) -> None:
    """A one-element tensor, changed in place, counts as it is at each step; nothing is built anew."""
    p = make_params(path.device, torch.float32)[0]
    decay = torch.tensor([0.5], dtype=dtype, device=path.device if where == "device" else "cpu")
    opt = FusedAdamW([p], ema_decay=decay, **HYPER)
    average = SeparateAverage(p)
    plans = set()
    for step, value in enumerate((0.5, 0.25, 0.875)):
        decay.fill_(value)
        train(opt, seed=step)
        average.update(value)
        average.check(opt, f"step {step}")
        plans.add(id(opt._internals.stepper.plan))
    assert len(plans) == 1


def test_average_switched_on_and_off(path: Path) -> None:
    """Switched on, it starts at the weight of that moment; switched off, it stays in the state and is not shown."""
    p = make_params(path.device, torch.float32)[0]
    opt = FusedAdamW([p], **HYPER)
    train(opt, 3)
    assert "param_ema" not in opt.state[p]
    opt.param_groups[0]["ema_decay"] = 0.5
    average = SeparateAverage(p)
    train(opt, seed=2)
    average.update(0.5)
    average.check(opt, "switched on")
    opt.param_groups[0]["ema_decay"] = 0.25  # a value, no switch
    train(opt, seed=3)
    average.update(0.25)
    average.check(opt, "another decay")
    opt.param_groups[0]["ema_decay"] = None
    train(opt, 2, seed=4)
    average.check(opt, "switched off")
    with pytest.raises(RuntimeError, match="no group has an ema_decay"):
        enter_again(opt)  # what no longer follows its weight is not shown


def test_frozen_parameters(path: Path) -> None:
    """Without a gradient there is no average; a parameter frozen later keeps the one it had, and it is shown."""
    params = make_params(path.device, torch.float32, shapes=((3,), (4,)))
    params[0].requires_grad_(False)
    opt = FusedAdamW(params, ema_decay=0.5, **HYPER)
    gradients = Gradients()
    gradients.give(params, present=[False, True])
    opt.step()
    assert params[0] not in opt.state and "param_ema" in opt.state[params[1]]
    params[0].requires_grad_(True)
    params[1].requires_grad_(False)
    before = ema_of(opt, 1).clone()
    started = SeparateAverage(params[0])
    for _ in range(3):
        gradients.give(params, present=[True, False])
        opt.step()
        started.update(0.5)
    assert torch.equal(ema_of(opt, 1), before)
    started.check(opt, "thawed")
    with opt.ema_weights():
        assert torch.equal(params[1], before)


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_skipped_steps_leave_the_average_alone(path: Path, ema_format: str) -> None:
    """A gradient that is not finite changes no bit of it, nor of the random bits of later steps."""
    params = make_params(path.device, torch.float32)
    opt = FusedAdamW(params, ema_decay=0.5, ema_format=ema_format, skip_nonfinite=True, **HYPER)
    other = FusedAdamW(copies(params), ema_decay=0.5, ema_format=ema_format, skip_nonfinite=True, **HYPER)
    train(opt)
    before = snapshot(opt)
    params[0].grad[0, 0] = torch.inf
    opt.step()
    assert_unchanged(before, snapshot(opt))
    assert opt.skipped_steps.item() == 1
    train(other)
    for each in (opt, other):
        train(each, 2, seed=2)
    assert_same_bits(opt, other)


# --- bfloat16, rounded stochastically -------------------------------------------------------------------------------


def test_bfloat16_average_is_unbiased(device: torch.device) -> None:
    """At decay 0.9999 it follows the float32 average on average, where rounding to nearest would not move at all.

    16,384 elements over 400 steps: their mean difference is within five standard errors of zero, and the distance that
    the average went is a hundred such errors.
    """
    weights = torch.linspace(1.0, 1.25, 16_384, device=device)
    weights = weights.bfloat16().float()  # all averages start at the same values
    exact, rounded = (
        FusedAdamW([torch.nn.Parameter(weights.clone())], lr=1e-3, ema_decay=0.9999, ema_format=form)
        for form in ("float32", "bfloat16")
    )
    nearest = weights.bfloat16()
    gradients = Gradients()
    for _ in range(400):
        gradients.give(params_of(exact), params_of(rounded))
        for p in (*params_of(exact), *params_of(rounded)):
            p.grad += 2.0  # so that weights go one way
        exact.step()
        rounded.step()
        wide = nearest.float()
        nearest = (wide + 1e-4 * (params_of(exact)[0].detach() - wide)).bfloat16()
    assert torch.equal(nearest.float(), weights), "rounded to nearest, an average is frozen"
    assert torch.equal(params_of(exact)[0], params_of(rounded)[0])
    went = (ema_of(exact) - weights).mean().item()
    error = ema_of(rounded).double() - ema_of(exact).double()
    standard_error = (error.std() / len(weights) ** 0.5).item()
    assert ema_of(rounded).dtype == torch.bfloat16
    assert abs(error.mean().item()) < 5 * standard_error
    assert abs(went) > 100 * standard_error


def test_random_bits_depend_on_seed_and_position_alone(path: Path) -> None:
    """The same seed gives the same averages, another seed others, and so does another place among the parameters."""

    def averages(seed: int) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.linspace(1, 2, 64, device=path.device)) for _ in range(2)]
        opt = FusedAdamW(params, lr=0.01, ema_decay=0.75, ema_format="bfloat16", seed=seed)
        torch.manual_seed(seed + 1)  # torch's own generators play no part
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        assert torch.equal(*params)
        return [ema_of(opt, i).clone() for i in range(2)]

    first, second = averages(0), averages(1)
    assert torch.equal(torch.stack(first), torch.stack(averages(0)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


# --- showing the averages -------------------------------------------------------------------------------------------


def make_shown(device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> FusedAdamW:
    """Return a trained optimizer over contiguous, channels-last and transposed parameters."""
    shapes = ((3, 5), (2, 3, 4, 5), ())
    params = make_params(device, dtype, shapes=shapes)
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params.append(torch.nn.Parameter(make_params(device, dtype, shapes=((4, 6),))[0].detach().t()))
    opt = FusedAdamW(params, **{"ema_decay": 0.9, **HYPER, **options})
    train(opt, 3)
    return opt


def memory_of(opt: FusedAdamW) -> list[tuple[Any, ...]]:
    """Return where each parameter and state tensor lies, and how."""
    tensors = [*params_of(opt), *(t for entry in opt.state.values() for t in entry.values())]
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_swapped_out_and_in(path: Path, dtype: torch.dtype, ema_format: str) -> None:
    """Within, each parameter holds its average rounded to its dtype; afterwards every bit and place is as before.

    Views of a parameter see the averages, autograd notices both writes, and the next step goes on with its old plan.
    """
    opt = make_shown(path.device, dtype, ema_format=ema_format)
    before, memory, plan = snapshot(opt), memory_of(opt), opt._internals.stepper.plan
    averages = [ema_of(opt, i).clone() for i in range(4)]
    weights = [p.detach().clone() for p in params_of(opt)]
    views = [p.detach() for p in params_of(opt)]
    versions = [p._version for p in params_of(opt)]
    with opt.ema_weights():
        shown = [p._version for p in params_of(opt)]
        for view, average, weight in zip(views, averages, weights, strict=True):
            assert torch.equal(view, average.to(dtype))
            assert not torch.equal(view, weight)
        assert memory_of(opt) == memory
    assert_unchanged(before, snapshot(opt))
    assert memory_of(opt) == memory
    assert all(a < b < p._version for a, b, p in zip(versions, shown, params_of(opt), strict=True))
    train(opt, seed=5)
    assert opt._internals.stepper.plan is plan


def test_averages_shown_differ_from_weights(device: torch.device) -> None:
    """What a model computes within is what its averages give."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2).to(device)
    opt = FusedAdamW(model.parameters(), ema_decay=0.9, lr=0.1)
    x = torch.randn(4, 3, device=device)
    for _ in range(3):
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    averaged = copy.deepcopy(model)
    averaged.load_state_dict({name: opt.state[p]["param_ema"] for name, p in model.named_parameters()})
    outside = model(x)
    with opt.ema_weights():
        inside = model(x)
    assert torch.equal(inside, averaged(x))
    assert not torch.equal(inside, outside)
    assert torch.equal(model(x), outside)


def test_an_evaluation_in_between_changes_nothing(path: Path) -> None:
    """Training with averages shown after each step, and without: the same bits."""
    params = make_params(path.device, torch.bfloat16)
    shown, never = (FusedAdamW(copies(params), ema_decay=0.9, ema_format="bfloat16", **HYPER) for _ in range(2))
    gradients = Gradients()
    for _ in range(4):
        gradients.give(params_of(shown), params_of(never))
        shown.step()
        never.step()
        with shown.ema_weights():
            assert not torch.equal(params_of(shown)[0], params_of(never)[0])
    assert_same_bits(shown, never)


def test_weights_come_back_after_an_error(device: torch.device) -> None:
    """After an exception within, also one of those that are no `Exception`, and the next `with` works."""
    opt = make_shown(device)
    before = snapshot(opt)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), opt.ema_weights():
            raise error
        assert_unchanged(before, snapshot(opt))
    with opt.ema_weights():
        pass
    assert_unchanged(before, snapshot(opt))


def test_all_weights_come_back_that_can(device: torch.device) -> None:
    """A parameter that was given another shape within is an error at the end; the others have their weights again."""
    opt = make_shown(device)
    weights = [p.detach().clone() for p in params_of(opt)]
    with pytest.raises(RuntimeError, match="size"), opt.ema_weights():
        params_of(opt)[0].data = torch.zeros(2, device=device)
    for p, weight in zip(params_of(opt)[1:], weights[1:], strict=True):
        assert torch.equal(p, weight)
    params_of(opt)[0].data = weights[0].clone()
    train(opt)  # nothing is shown any more


def test_what_is_written_within_is_lost(device: torch.device) -> None:
    """Documented: weights written within do not survive, nor do they reach the averages."""
    opt = make_shown(device)
    before = snapshot(opt)
    with opt.ema_weights(), torch.no_grad():
        for p in params_of(opt):
            p.fill_(7)
    assert_unchanged(before, snapshot(opt))


def enter_again(opt: FusedAdamW) -> None:
    """Show the averages."""
    with opt.ema_weights():
        pass


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("step()", lambda opt: opt.step()),
        ("step()", lambda opt: opt.step(lambda: 1.0)),
        ("load_state_dict()", lambda opt: opt.load_state_dict(opt.state_dict())),
        ("ema_weights()", enter_again),
    ],
    ids=["step", "step-closure", "load", "nested"],
)
def test_what_would_mix_weights_and_averages_raises(
    device: torch.device, what: str, call: Callable[[FusedAdamW], Any]
) -> None:
    """Stepping, loading and nesting raise within, change nothing, and work again afterwards."""
    opt = make_shown(device)
    before = snapshot(opt)
    with opt.ema_weights():
        inside = snapshot(opt)
        with pytest.raises(RuntimeError) as error:
            call(opt)
        assert str(error.value).startswith(f"{what} within ema_weights()")
        assert_unchanged(inside, snapshot(opt))
    assert_unchanged(before, snapshot(opt))
    call(opt)


def test_nothing_to_show_is_an_error(device: torch.device) -> None:
    """Without `ema_decay` `ema_weights` says what is missing; before the first step a weight is its own average."""
    params = make_params(device)
    with pytest.raises(RuntimeError, match="no group has an ema_decay; construct with ema_decay="):
        enter_again(FusedAdamW(params))
    opt = FusedAdamW(params, ema_decay=0.9)
    before = snapshot(opt)
    with opt.ema_weights():
        assert_unchanged(before, snapshot(opt))
    assert_unchanged(before, snapshot(opt))


def test_parameters_without_an_average_are_left_alone(device: torch.device) -> None:
    """A parameter that was never stepped, or whose group has no average, keeps weight and version within."""
    params = make_params(device, torch.float32, shapes=((3,),) * 3)
    opt = FusedAdamW([{"params": params[:2]}, {"params": params[2:], "ema_decay": None}], ema_decay=0.9)
    Gradients().give(params, present=[True, False, True])
    opt.step()
    before, versions = snapshot(opt), [p._version for p in params]
    with opt.ema_weights():
        assert torch.equal(params[0], ema_of(opt))
        for i in (1, 2):
            assert params[i]._version == versions[i]
    assert_unchanged(before, snapshot(opt))
    assert params[1] not in opt.state


# --- checkpoints ----------------------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    """Return what torch.load makes of what torch.save wrote, trusting nothing in the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded_into_a_fresh_one(opt: FusedAdamW) -> FusedAdamW:
    """Save and load into an optimizer with other options for what the checkpoint must replace."""
    other = FusedAdamW(copies(params_of(opt)), lr=0.5, ema_decay=0.1, seed=opt._internals.options.seed)
    other.load_state_dict(through_file(opt.state_dict()))
    return other


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "again",
    [
        loaded_into_a_fresh_one,
        copy.deepcopy,
        lambda opt: pickle.loads(pickle.dumps(opt)),
    ],
    ids=["load_state_dict", "deepcopy", "pickle"],
)
def test_round_trips(path: Path, again: Callable[[FusedAdamW], FusedAdamW], ema_format: str) -> None:
    """An optimizer that was saved and loaded, copied or pickled goes on with the same bits, its average included."""
    params = make_params(path.device, torch.float32)
    opt = FusedAdamW(params, ema_decay=0.9, ema_warmup=True, ema_format=ema_format, seed=7, **HYPER)
    train(opt, 3)
    other = again(opt)
    assert_same_bits(opt, other)
    assert other.param_groups[0]["ema_decay"] == 0.9
    assert ema_of(other).data_ptr() != ema_of(opt).data_ptr()
    gradients = Gradients(9)
    for _ in range(3):
        gradients.give(params, params_of(other))
        opt.step()
        other.step()
    assert_same_bits(opt, other)
    with other.ema_weights():
        assert torch.equal(params_of(other)[0], ema_of(other).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_loaded_averages_keep_their_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Loading does not cast averages to the parameter's dtype, as torch's own method would."""
    opt = FusedAdamW(make_params(device, dtype), ema_decay=0.9, **HYPER)
    train(opt, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    other = loaded_into_a_fresh_one(opt)
    assert ema_of(opt).dtype == ema_of(other).dtype == wide
    assert_same_bits(opt, other)


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_torchs_checkpoint_starts_the_average(path: Path, ema_format: str) -> None:
    """torch.optim.AdamW's checkpoint has no average: it starts at the weights that were loaded with it.

    The options of averaging, which the checkpoint does not have either, stay as constructed, also a single group's.
    """
    theirs = torch.optim.AdamW(make_params(path.device, torch.float32, shapes=((8,), (8,))), **HYPER)
    train(theirs, 3)
    params = make_params(path.device, torch.float32, shapes=((8,), (8,)), seed=5)
    groups = [{"params": params, "ema_decay": 0.5, "ema_format": ema_format}]
    opt = FusedAdamW(groups, lr=0.7)
    with torch.no_grad():
        for p, q in zip(params, params_of(theirs), strict=True):
            p.copy_(q)
    opt.load_state_dict(through_file(theirs.state_dict()))
    assert opt.param_groups[0]["ema_decay"] == 0.5 and opt.param_groups[0]["ema_format"] == ema_format
    assert opt.param_groups[0]["lr"] == HYPER["lr"]
    average = SeparateAverage(params[0])
    before = params[0].detach().clone()
    train(opt, seed=3)
    assert opt.state[params[0]]["step"] == 4
    if ema_format == "float32":
        average.update(0.5)
        average.check(opt, "after loading")
    else:
        low, high = torch.minimum(before, params[0]), torch.maximum(before, params[0])
        step = 2.0**-7 * torch.maximum(low.abs(), high.abs())  # two roundings, each by less than a unit of 2^-8
        assert ((low - step <= ema_of(opt)) & (ema_of(opt) <= high + step)).all()


def test_options_that_a_checkpoint_lacks_stay(device: torch.device) -> None:
    """A checkpoint from before an option was used switches it off in no group; one that says None does."""
    params = make_params(device, torch.float32, shapes=((3,), (3,)))
    old = FusedAdamW([{"params": [p]} for p in copies(params)])
    opt = FusedAdamW([{"params": params[:1], "ema_decay": 0.5, "max_grad_norm": 2.0}, {"params": params[1:]}])
    opt.load_state_dict(old.state_dict())
    assert opt.param_groups[0]["ema_decay"] == 0.5 and opt.param_groups[0]["max_grad_norm"] == 2.0
    assert opt.param_groups[1].get("ema_decay") is None
    assert "ema_decay" not in old.param_groups[0], "the checkpoint is not written to"
    off = FusedAdamW([{"params": [p], "ema_decay": None} for p in copies(params)])
    opt.load_state_dict(off.state_dict())
    assert opt.param_groups[0]["ema_decay"] is None and opt.param_groups[0]["max_grad_norm"] == 2.0


@pytest.mark.parametrize("flags", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)
@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_torch_loads_our_checkpoint(device: torch.device, flags: dict[str, bool], ema_format: str) -> None:
    """torch.optim.AdamW goes on from a checkpoint with averages, which it keeps and does not use."""
    dtype = torch.float64 if ema_format == "float32" else torch.float32  # bfloat16 beside float64 is refused
    params = make_params(device, dtype)
    opt = FusedAdamW(params, ema_decay=0.9, ema_format=ema_format, **HYPER)
    train(opt, 3)
    theirs = torch.optim.AdamW(copies(params), **flags)
    theirs.load_state_dict(through_file(opt.state_dict()))
    gradients = Gradients(5)
    for _ in range(3):
        gradients.give(params, params_of(theirs))
        opt.step()
        theirs.step()
    for entry in (*opt.state.values(), *theirs.state.values()):
        del entry["param_ema"]
    assert_agree(opt, theirs, "host_logic_in_float64" if dtype == torch.float64 else "float32_against_torch")


@pytest.mark.parametrize("idle", [False, True], ids=["stepped-at-once", "stepped-later"])
@pytest.mark.parametrize(("source", "target"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_checkpoints_of_the_other_format_are_converted(path: Path, source: str, target: str, idle: bool) -> None:
    """The average is rounded to nearest, or widened, when its parameter is next stepped; not started anew."""
    params = make_params(path.device, torch.float32, shapes=((64,), (64,)))
    opt = FusedAdamW(params, ema_decay=0.5, ema_format=source, **HYPER)
    train(opt, 3)
    saved = opt.state_dict()
    del saved["param_groups"][0]["ema_decay"]
    saved["param_groups"][0].pop("ema_format", None)
    other = FusedAdamW(copies(params), ema_decay=0.0, ema_format=target, **HYPER)
    other.load_state_dict(through_file(saved))
    other.param_groups[0]["lr"] = 0.0
    other.param_groups[0]["ema_decay"] = 1 - 2.0**-24  # nothing moves by more than a rounding
    gradients = Gradients()
    wide = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    expected = ema_of(opt).to(wide[target])
    if idle:  # the plan is built while this parameter has no gradient
        for _ in range(2):
            gradients.give(params_of(other), present=[False, True])
            other.step()
        assert ema_of(other).dtype == wide[source]
    gradients.give(params_of(other))
    other.step()
    assert ema_of(other).dtype == wide[target]
    moved = (ema_of(other).float() - expected.float()).abs()
    unit = 2.0**-7 if target == "bfloat16" else 2.0**-22
    assert (moved <= unit * expected.float().abs()).all()
    assert not torch.equal(ema_of(other).float(), params_of(other)[0]), "it was not started anew"


@pytest.mark.parametrize("what", ["shape", "integer", "sparse"])
def test_a_loaded_average_that_does_not_fit_is_refused(device: torch.device, what: str) -> None:
    """The error names the average and its parameter, and nothing is written."""
    spoil: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "shape": lambda t: t.new_zeros(2),
        "integer": lambda t: t.long(),
        "sparse": lambda t: t.to_sparse(),
    }
    opt = FusedAdamW(make_params(device, torch.float32), ema_decay=0.9)
    train(opt)
    opt.state[params_of(opt)[0]]["param_ema"] = spoil[what](ema_of(opt))
    weights = [p.detach().clone() for p in params_of(opt)]
    with pytest.raises((ValueError, TypeError), match=r"param_ema of param_groups\[0\]\['params'\]\[0\]"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(opt), weights, strict=True))


# --- the distributed checkpoint's step with a learning rate of zero -------------------------------------------------


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_initialising_step_of_the_distributed_checkpoint(path: Path, rate: Any, dtype: torch.dtype) -> None:
    """It leaves every weight as it was, and every average at its weight: no drift of either."""
    params = make_params(path.device, dtype)
    opt = FusedAdamW(params, lr=rate, ema_decay=0.9, ema_warmup=True, weight_decay=0.5)
    weights = [p.detach().clone() for p in params]
    dcp._init_optim_state(opt)
    for i, (p, weight) in enumerate(zip(params, weights, strict=True)):
        assert torch.equal(bits(p), bits(weight))
        assert torch.equal(bits(ema_of(opt, i)), bits(weight.to(ema_of(opt, i).dtype)))
    assert opt.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_initialising_step_with_bfloat16_averages(path: Path, dtype: torch.dtype) -> None:
    """The average of a bfloat16 weight is that weight; of a float32 weight, one of its two neighbours in bfloat16."""
    p = make_params(path.device, dtype, shapes=((200,),))[0]
    opt = FusedAdamW([p], ema_decay=0.9, ema_format="bfloat16")
    dcp._init_optim_state(opt)
    assert ((ema_of(opt).float() - p.float()).abs() < 2.0**-7 * p.float().abs()).all()
    if dtype == torch.bfloat16:
        assert torch.equal(ema_of(opt), p)


@pytest.mark.parametrize("ema_format", ["float32", "bfloat16"])
def test_resume_through_the_distributed_checkpoint(device: torch.device, ema_format: str) -> None:
    """`get_optimizer_state_dict` and `set_optimizer_state_dict` carry the averages to a fresh optimizer."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False)).to(device)
    opt = FusedAdamW(model.parameters(), ema_decay=0.9, ema_format=ema_format, **HYPER)
    train(opt, 2)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt))
    copied = copy.deepcopy(model)
    copied.zero_grad()
    resumed = FusedAdamW(copied.parameters(), ema_decay=0.9, ema_format=ema_format, **HYPER)
    dcp.set_optimizer_state_dict(copied, resumed, saved)
    assert_same_bits(resumed, opt)
    for each in (opt, resumed):
        train(each, 2, seed=4)
    assert_same_bits(resumed, opt)


def test_averages_have_their_parameters_shape_and_layout(device: torch.device) -> None:
    """As sharded checkpoints require of every state tensor with dimensions."""
    opt = make_shown(device)
    averages = [ema_of(opt, i) for i in range(4)]
    assert [(e.shape, e.stride()) for e in averages] == [(p.shape, p.stride()) for p in params_of(opt)]
    assert averages[1].is_contiguous(memory_format=torch.channels_last)
