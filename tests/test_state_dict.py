"""Checkpoints: to and from torch.optim.AdamW and Adam, to and from ourselves, at any step, by every usual way."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, Path
from pairs import (
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
from torch.distributed.checkpoint import state_dict as dcp

from adamw_kernels import FusedAdamW, fused_adamw_

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
OTHER_HYPER: dict[str, Any] = dict(lr=0.5, betas=(0.1, 0.2), eps=1.0, weight_decay=0.7)  # what loading must replace
MIXED_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

Optimizers = tuple[torch.optim.Optimizer, ...]


def make_mixed(device: torch.device) -> list[torch.nn.Parameter]:
    """Return one parameter of each dtype."""
    return [make_params(device, dtype, shapes=((3, 5),), seed=i)[0] for i, dtype in enumerate(MIXED_DTYPES)]


def train(optimizers: Optimizers, gradients: Gradients, steps: int) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


def through_file(state: Any) -> Any:
    """Return what torch.load makes of what torch.save wrote, trusting nothing in the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def storages(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the addresses of every state tensor's memory."""
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


# --- what a checkpoint looks like -------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dict_looks_like_torchs(device: torch.device, amsgrad: bool) -> None:
    """Same keys, shapes and dtypes as torch.optim.AdamW's, for state and groups, with names and without."""
    params = make_params(device, torch.float32)
    for named in (False, True):
        dicts = []
        for make in (FusedAdamW, torch.optim.AdamW):
            own = copies(params)
            opt = make(
                zip("abc", own, strict=True) if named else own, amsgrad=amsgrad, capturable=device.type == "cuda"
            )
            train((opt,), Gradients(), 2)
            dicts.append(opt.state_dict())
        ours, theirs = dicts
        assert ours.keys() == theirs.keys()
        assert ours["param_groups"] == theirs["param_groups"]
        assert ("param_names" in ours["param_groups"][0]) == named
        assert ours["state"].keys() == theirs["state"].keys()
        for key, entry in theirs["state"].items():
            assert list(ours["state"][key]) == list(entry)
            for name, value in entry.items():
                mine = ours["state"][key][name]
                assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device), name


# --- to and from torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_checkpoints_load_both_ways(path: Path, direction: str, steps: int, amsgrad: bool) -> None:
    """A checkpoint of one optimizer, loaded into the other at any step, goes on as if nothing had happened."""
    params = make_params(path.device)
    make = {"ours": FusedAdamW, "theirs": torch.optim.AdamW}
    source, target = ("theirs", "ours") if direction == "from-torch" else ("ours", "theirs")
    saved = make[source](copies(params), amsgrad=amsgrad, **HYPER)
    gradients = Gradients()
    train((saved,), gradients, steps)
    loaded = make[target](copies(params_of(saved)), **OTHER_HYPER)
    loaded.load_state_dict(through_file(saved.state_dict()))
    train((saved, loaded), gradients, 3)
    ours, theirs = (saved, loaded) if source == "ours" else (loaded, saved)
    assert_agree(ours, theirs)
    assert all(float(ours.state[p]["step"]) == steps + 3 for p in params_of(ours))
    assert all(("max_exp_avg_sq" in ours.state[p]) == amsgrad for p in params_of(ours))


@pytest.mark.parametrize("flags", [dict(fused=True), dict(foreach=True), dict(capturable=True), dict(foreach=False)])
@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_checkpoints_of_torchs_other_implementations(
    device: torch.device, direction: str, flags: dict[str, bool]
) -> None:
    """Checkpoints of torch's fused, foreach and capturable optimizers load, and so do ours in them."""
    capturable = flags.get("capturable", False)
    params = make_params(device)
    theirs = torch.optim.AdamW(copies(params), **HYPER, **{**flags, "capturable": capturable and device.type == "cuda"})
    ours = FusedAdamW(copies(params), **HYPER)
    gradients = Gradients()
    train((ours, theirs), gradients, 2)
    source, target = (theirs, ours) if direction == "from-torch" else (ours, theirs)
    source.param_groups[0]["capturable"] = capturable
    target.load_state_dict(through_file(source.state_dict()))
    assert target.param_groups[0]["capturable"] == capturable
    theirs.param_groups[0]["capturable"] = capturable and device.type == "cuda"  # torch has no such kernel for CPUs
    train((ours, theirs), gradients, 2)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_checkpoints_of_adam_with_l2(path: Path, direction: str) -> None:
    """torch.optim.Adam's checkpoints bring their L2 along, whatever the optimizer that loads them was made with."""
    params = make_params(path.device)
    ours = FusedAdamW(copies(params), decoupled=direction == "from-torch", **HYPER)
    theirs = torch.optim.Adam(copies(params), **HYPER)
    gradients = Gradients()
    if direction == "from-torch":
        train((theirs,), gradients, 3)
        ours.load_state_dict(through_file(theirs.state_dict()))
        assert ours.param_groups[0]["decoupled_weight_decay"] is False
    else:
        train((ours,), gradients, 3)
        theirs.load_state_dict(through_file(ours.state_dict()))
    source, target = (theirs, ours) if direction == "from-torch" else (ours, theirs)
    with torch.no_grad():
        for p, q in zip(params_of(target), params_of(source), strict=True):
            p.copy_(q)
    train((ours, theirs), gradients, 3)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("steps", [1, 7])
def test_bfloat16_checkpoint_from_torch(path: Path, steps: int) -> None:
    """Torch's bfloat16 moments load as they are and are widened, exactly, by the next step."""
    params = make_params(path.device, torch.bfloat16)
    theirs = torch.optim.AdamW(copies(params), amsgrad=True, **HYPER)
    gradients = Gradients()
    train((theirs,), gradients, steps)
    ours = FusedAdamW(copies(params_of(theirs)), **OTHER_HYPER)
    ours.load_state_dict(through_file(theirs.state_dict()))
    gradients.give(params_of(ours))
    expected = []
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        loaded, saved = ours.state[p], theirs.state[q]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert loaded[key].dtype == torch.bfloat16 and torch.equal(loaded[key], saved[key])
        moments = [saved[key].float() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        expected.append([p.detach().clone(), p.grad.clone(), *moments, saved["step"].to(path.device)])
    lists = [list(column) for column in zip(*expected, strict=True)]
    options = dict(lr=HYPER["lr"], beta1=HYPER["betas"][0], beta2=HYPER["betas"][1], weight_decay=HYPER["weight_decay"])
    fused_adamw_(*lists, amsgrad=True, **options)
    ours.step()
    for p, (weight, _, m, v, v_max, step) in zip(params_of(ours), expected, strict=True):
        state = ours.state[p]
        assert torch.equal(p, weight) and torch.equal(state["step"], step) and float(step) == steps + 1
        for key, moment in (("exp_avg", m), ("exp_avg_sq", v), ("max_exp_avg_sq", v_max)):
            assert state[key].dtype == torch.float32 and torch.equal(state[key], moment)


def test_bfloat16_checkpoint_to_torch(path: Path) -> None:
    """Our float32 moments of bfloat16 weights load into torch's optimizer, which rounds them to bfloat16, and step."""
    params = make_params(path.device, torch.bfloat16)
    ours = FusedAdamW(copies(params), **{**HYPER, "lr": 0.2})  # steps that dwarf the rounding of the weights
    gradients = Gradients()
    train((ours,), gradients, 7)
    theirs = torch.optim.AdamW(copies(params_of(ours)), **OTHER_HYPER)
    theirs.load_state_dict(through_file(ours.state_dict()))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(theirs.state[q]["exp_avg"], ours.state[p]["exp_avg"].bfloat16())
    train((ours, theirs), gradients, 3)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert_close(p, q, "bfloat16_against_torch", "a parameter")
        assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"]) == 10


@pytest.mark.parametrize(
    "missing",
    [
        ["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"],
        ["decoupled_weight_decay"],
        ["lr", "betas", "eps", "weight_decay"],
    ],
    ids=["all-flags", "newest-flag", "hyperparameters"],
)
@pytest.mark.parametrize("decoupled", [True, False])
def test_checkpoints_that_lack_newer_keys(device: torch.device, missing: list[str], decoupled: bool) -> None:
    """What a checkpoint of an older torch does not say is what the loading optimizer was made with."""
    opt, judge = (FusedAdamW(make_params(device), decoupled=decoupled, **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    state = copy.deepcopy(opt.state_dict())
    for key in missing:
        del state["param_groups"][0][key]
    opt.load_state_dict(state)
    assert opt.param_groups[0].keys() == judge.param_groups[0].keys()
    train((opt, judge), gradients, 2)
    assert_same_bits(opt, judge)


# --- to and from ourselves --------------------------------------------------------------------------------------------


def resume_through_file(opt: FusedAdamW) -> FusedAdamW:
    """Save weights and state dict, load them into a new optimizer."""
    saved = through_file({"weights": [p.detach() for p in params_of(opt)], "optimizer": opt.state_dict()})
    fresh = FusedAdamW([torch.nn.Parameter(weight) for weight in saved["weights"]], **OTHER_HYPER)
    fresh.load_state_dict(saved["optimizer"])
    return fresh


def resume_in_memory(opt: FusedAdamW) -> FusedAdamW:
    """Hand the state dict over in memory."""
    fresh = FusedAdamW(copies(params_of(opt)), **OTHER_HYPER)
    fresh.load_state_dict(opt.state_dict())
    return fresh


def resume_by_pickle(opt: FusedAdamW) -> FusedAdamW:
    """Pickle the optimizer itself, parameters and all."""
    return pickle.loads(pickle.dumps(opt))


RESUMES = [resume_through_file, resume_in_memory, resume_by_pickle, copy.deepcopy]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("resume", RESUMES, ids=lambda resume: resume.__name__)
def test_training_resumes_with_the_same_bits(
    path: Path, resume: Callable[[FusedAdamW], FusedAdamW], amsgrad: bool
) -> None:
    """Every dtype goes on bit for bit where it was, and from then on the two optimizers share nothing."""
    opt = FusedAdamW(make_mixed(path.device), amsgrad=amsgrad, **HYPER)
    gradients = Gradients()
    train((opt,), gradients, 3)
    resumed = resume(opt)
    assert_same_bits(opt, resumed)
    assert not storages(opt) & storages(resumed)
    before = snapshot(opt)
    gradients.give(params_of(resumed), params_of(opt))
    resumed.step()
    assert_unchanged(before, snapshot(opt))
    opt.step()
    train((opt, resumed), gradients, 2)
    assert_same_bits(opt, resumed)


@pytest.mark.parametrize("resume", [copy.deepcopy, resume_by_pickle], ids=lambda resume: resume.__name__)
def test_copies_keep_what_the_optimizer_was_made_with(resume: Callable[[FusedAdamW], FusedAdamW]) -> None:
    """A copy has the backend, the defaults and the groups of the original, and none of its caches."""
    opt = FusedAdamW(make_params(torch.device("cpu")), backend="cpu", decoupled=False, **HYPER)
    train((opt,), Gradients(), 2)
    twin = resume(opt)
    assert twin._internals.options.backend == "cpu"
    assert twin.defaults == opt.defaults
    assert twin._internals is not opt._internals and twin._internals.stepper is None
    twin.add_param_group({"params": make_params(torch.device("cpu"), seed=4)})
    assert twin.param_groups[1]["decoupled_weight_decay"] is False
    assert len(opt.param_groups) == 1


def test_deepcopy_of_model_and_optimizer_together(device: torch.device) -> None:
    """Copied in one go, the copy's optimizer trains the copy's model, and only that."""
    model = torch.nn.Linear(3, 2).to(device)
    opt = FusedAdamW(model.parameters(), **HYPER)
    train((opt,), Gradients(), 2)
    twin, twin_opt = copy.deepcopy((model, opt))
    assert all(p is q for p, q in zip(twin.parameters(), params_of(twin_opt), strict=True))
    weight = model.weight.detach().clone()
    train((twin_opt,), Gradients(9), 1)
    assert torch.equal(model.weight, weight) and not torch.equal(twin.weight, weight)


def test_load_into_a_running_optimizer(path: Path) -> None:
    """Loading an earlier checkpoint in the middle of training goes back to it."""
    opt = FusedAdamW(make_params(path.device), **HYPER)
    gradients = Gradients()
    train((opt,), gradients, 2)
    checkpoint = through_file({"weights": [p.detach() for p in params_of(opt)], "optimizer": opt.state_dict()})
    train((opt,), Gradients(3), 2)
    first = snapshot(opt)
    train((opt,), Gradients(4), 2)
    opt.param_groups[0]["lr"] = 77.0
    with torch.no_grad():
        for p, weight in zip(params_of(opt), checkpoint["weights"], strict=True):
            p.copy_(weight)
    opt.load_state_dict(checkpoint["optimizer"])
    train((opt,), Gradients(3), 2)
    assert_unchanged(first, snapshot(opt))


def test_round_trip_before_the_first_step(device: torch.device) -> None:
    """`load_state_dict(state_dict())` of a fresh optimizer, which accelerate does, changes nothing."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    opt.load_state_dict(opt.state_dict())
    train((opt, judge), gradients, 2)
    assert_same_bits(opt, judge)


def test_state_of_parameters_without_gradients_is_kept(device: torch.device) -> None:
    """A parameter that never had a gradient has no entry; one that had keeps it through a checkpoint."""
    opt = FusedAdamW(make_params(device), **HYPER)
    gradients = Gradients()
    for present in ((True, True, False), (True, False, False)):
        gradients.give(params_of(opt), present=present)
        opt.step()
    assert opt.state_dict()["state"].keys() == {0, 1}
    fresh = resume_in_memory(opt)
    for o in (opt, fresh):
        o.zero_grad()
    train((opt, fresh), gradients, 1)
    assert_same_bits(opt, fresh)
    assert [float(fresh.state[p]["step"]) for p in params_of(fresh)] == [3, 2, 1]


def test_tensor_learning_rate_in_a_checkpoint(path: Path) -> None:
    """A tensor learning rate travels by value; filled afterwards, it moves the optimizer that holds it, only that."""
    opt = FusedAdamW(make_params(path.device), **{**HYPER, "lr": torch.tensor(1e-2, device=path.device)})
    judge = FusedAdamW(make_params(path.device), **{**HYPER, "lr": float(torch.tensor(1e-2))})
    gradients = Gradients()
    train((opt, judge), gradients, 1)
    fresh = resume_in_memory(opt)
    fresh.param_groups[0]["lr"].fill_(0.5)
    assert float(opt.param_groups[0]["lr"]) == judge.param_groups[0]["lr"]
    train((opt, judge), gradients, 1)
    assert_same_bits(opt, judge)
    gradients.give(params_of(fresh))
    before = [p.detach().clone() for p in params_of(fresh)]
    fresh.step()
    moved = [(p.detach() - q).abs().max().item() for p, q in zip(params_of(fresh), before, strict=True)]
    assert min(moved) > 0.1, "a step of 0.5, not of 0.01"


# --- dtypes, devices, shapes of what is loaded ------------------------------------------------------------------------


def test_every_state_tensor_keeps_its_own_dtype(device: torch.device) -> None:
    """Loading casts nothing to the parameter's dtype: no moment, no integer, however deep it lies in an entry."""
    params = [make_params(device, dtype, shapes=((3, 5),))[0] for dtype in (torch.bfloat16, torch.float32)]
    source = FusedAdamW(copies(params), **HYPER)
    train((source,), Gradients(), 2)
    state = copy.deepcopy(source.state_dict())
    half = {key: value.bfloat16() for key, value in state["state"][1].items() if key != "step"}
    state["state"][1].update(half)
    own = {
        "seed": torch.tensor(2**40 + 1),
        "remainder": torch.arange(15, dtype=torch.int16, device=device).view(3, 5),
        "mask": torch.ones(3, dtype=torch.bool),
        "history": [torch.tensor(2**40 + 3), (torch.ones(2, dtype=torch.float64),)],
        "nested": {"count": torch.tensor(7, dtype=torch.uint8)},
        "note": "from run 3",
        "ratio": 0.1,
    }
    state["state"][0].update(own)
    kept = copy.deepcopy(state)
    assert kept["state"][0]["param_remainder"].dtype == torch.bfloat16  # saved so, bit for bit, and kept as int16
    kept["state"][0]["param_remainder"] = kept["state"][0]["param_remainder"].view(torch.int16)
    target = FusedAdamW(copies(params), **HYPER)
    target.load_state_dict(state)

    def compare(got: Any, expected: Any) -> None:
        assert type(got) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert got.dtype == expected.dtype and torch.equal(got.cpu(), expected.cpu())
            assert got.device.type == device.type
        elif isinstance(expected, dict):
            assert list(got) == list(expected)
            for key, value in expected.items():
                compare(got[key], value)
        elif isinstance(expected, (list, tuple)):
            for a, b in zip(got, expected, strict=True):
                compare(a, b)
        else:
            assert got == expected

    for i, p in enumerate(params_of(target)):
        compare(target.state[p], kept["state"][i])
        assert state["state"][i].keys() == kept["state"][i].keys(), "the dict that was loaded is the caller's"


def test_nothing_is_shared_with_the_source(device: torch.device) -> None:
    """What was loaded is a copy: even nested tensors, even where device and dtype already fit."""
    source = FusedAdamW(make_params(device), amsgrad=True, **HYPER)
    train((source,), Gradients(), 2)
    history = [torch.ones(2, device=device)]
    source.state[params_of(source)[0]]["history"] = history
    target = FusedAdamW(make_params(device), **HYPER)
    target.load_state_dict(source.state_dict())
    assert not storages(source) & storages(target)
    history[0].zero_()
    assert target.state[params_of(target)[0]]["history"][0].all()


STEP_FORMS: dict[str, Callable[[int], Any]] = {
    "int": lambda t: t,
    "float": float,
    "0-dim-float32": lambda t: torch.tensor(float(t)),
    "1-element": lambda t: torch.tensor([float(t)]),
    "1-1-1-element": lambda t: torch.full((1, 1, 1), float(t)),
    "int64": lambda t: torch.tensor(t),
    "float64": lambda t: torch.tensor(float(t), dtype=torch.float64),
    "int32-1-element": lambda t: torch.tensor([t], dtype=torch.int32),
}


@pytest.mark.parametrize("form", STEP_FORMS)
def test_step_counts_in_any_form(device: torch.device, form: str) -> None:
    """A loaded count may be a number or a one-element tensor of any dtype, even one for all; it goes on counting."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    state = copy.deepcopy(opt.state_dict())
    count = STEP_FORMS[form](2)
    for entry in state["state"].values():
        entry["step"] = count  # the same object for all
    opt.load_state_dict(state)
    train((opt, judge), gradients, 2)
    for p in params_of(opt):
        step = opt.state[p]["step"]
        assert (step.numel(), step.dtype, step.device) == (1, torch.float32, device)
        opt.state[p]["step"] = step.reshape(())
    assert_same_bits(opt, judge)
    if isinstance(count, torch.Tensor):
        assert count.item() == 2, "the loaded tensor is the caller's"


def test_one_step_count_for_all(path: Path) -> None:
    """A tensor that stands for several parameters' counts is parted by the next step: each counts its own."""
    opt, judge = (FusedAdamW(make_params(path.device), **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    count = opt.state[params_of(opt)[0]]["step"]
    for entry in opt.state.values():
        entry["step"] = count
    train((opt, judge), gradients, 2)
    assert_same_bits(opt, judge)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        pytest.param(-1, "step of .* is -1.0; expected a whole number", id="negative"),
        pytest.param(2.5, "step of .* is 2.5; expected a whole number", id="fraction"),
        pytest.param(float("nan"), "step of .* is nan", id="nan"),
        pytest.param(torch.ones(2), r"step of .* has shape \(2,\); expected one element", id="two-elements"),
    ],
)
def test_step_counts_that_cannot_be(step: Any, message: str) -> None:
    """A count that is none is refused by name before anything is written."""
    opt = FusedAdamW(make_params(torch.device("cpu")), **HYPER)
    gradients = Gradients()
    train((opt,), gradients, 2)
    opt.state[params_of(opt)[1]]["step"] = step
    weights = [p.detach().clone() for p in params_of(opt)]
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(opt), weights, strict=True))


@pytest.mark.skipif(not HAS_GPU, reason="a checkpoint on another device than the parameters")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_checkpoint_on_another_device(place: str) -> None:
    """State is loaded onto its parameter's device, wherever the checkpoint was mapped to."""
    source = torch.device("cuda" if place == "cpu" else "cpu")
    opt, judge = (FusedAdamW(make_params(torch.device(place)), **HYPER) for _ in range(2))
    other = FusedAdamW(make_params(source), **HYPER)
    gradients = Gradients()
    train((opt, judge, other), gradients, 2)
    opt.load_state_dict(other.state_dict())
    assert {value.device.type for entry in opt.state.values() for value in entry.values()} == {place}
    train((opt, judge), gradients, 2)
    assert_agree(opt, judge)


# --- checkpoints that do not fit --------------------------------------------------------------------------------------


def wrong_shape(state: dict[str, Any]) -> None:
    """A moment of another shape."""
    state["state"][1]["exp_avg_sq"] = torch.zeros(8)


def transposed_shape(state: dict[str, Any]) -> None:
    """As many elements, another shape."""
    state["state"][0]["exp_avg"] = torch.zeros(5, 3)


def no_second_moment(state: dict[str, Any]) -> None:
    """An entry torn in two."""
    del state["state"][1]["exp_avg_sq"]


def no_step(state: dict[str, Any]) -> None:
    """Moments of unknown age."""
    del state["state"][1]["step"]


def integer_moment(state: dict[str, Any]) -> None:
    """A moment that is no number of the right kind."""
    state["state"][1]["exp_avg"] = torch.zeros(7, dtype=torch.int64)


def moment_that_is_no_tensor(state: dict[str, Any]) -> None:
    """A moment as a list."""
    state["state"][1]["exp_avg"] = [0.0] * 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wrong_shape, r"exp_avg_sq of .*\[1\] has shape \(8,\), the parameter \(7,\); expected the same shape"),
        (transposed_shape, r"exp_avg of .*\[0\] has shape \(5, 3\), the parameter \(3, 5\)"),
        (no_second_moment, r"the state of .*\[1\] has step, exp_avg but no exp_avg_sq; expected all three or none"),
        (no_step, r"the state of .*\[1\] has exp_avg, exp_avg_sq but no step; expected all three or none"),
        (integer_moment, r"exp_avg of .*\[1\] is torch\.int64; expected a floating-point tensor"),
        (moment_that_is_no_tensor, r"exp_avg of .*\[1\] is list; expected a floating-point tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_checkpoints(device: torch.device, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    """Loading names the parameter and what is wrong, and the run goes on as if nothing had been loaded."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    state = copy.deepcopy(opt.state_dict())
    damage(state)
    state["param_groups"][0]["lr"] = 0.5
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(state)
    train((opt, judge), gradients, 2)
    assert_same_bits(opt, judge)


def two_groups(state: dict[str, Any]) -> None:
    """One group too many."""
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def one_parameter_less(state: dict[str, Any]) -> None:
    """One parameter too few."""
    state["param_groups"][0]["params"].pop()


def differentiable(state: dict[str, Any]) -> None:
    """An option that cannot be met."""
    state["param_groups"][0]["differentiable"] = True


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (two_groups, ValueError, "different number of parameter groups"),
        (one_parameter_less, ValueError, "doesn't match the size of optimizer's group"),
        (differentiable, RuntimeError, r"loaded param_groups\[0\]: differentiable=True"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checkpoints_that_are_refused(
    device: torch.device, damage: Callable[[dict[str, Any]], None], error: type[Exception], message: str
) -> None:
    """Groups that do not match are refused at once; the optimizer, its hooks too, is as it was."""
    opt, judge = (FusedAdamW(make_params(device), **HYPER) for _ in range(2))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    state = copy.deepcopy(opt.state_dict())
    damage(state)
    with pytest.raises(error, match=message):
        opt.load_state_dict(state)
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks
    train((opt, judge), gradients, 2)
    assert_same_bits(opt, judge)


def test_more_state_than_is_needed(path: Path) -> None:
    """A maximum saved by AMSGrad is kept, unused, where the group no longer asks for it, and used when it does."""
    opt, judge = (FusedAdamW(make_params(path.device), amsgrad=amsgrad, **HYPER) for amsgrad in (True, False))
    gradients = Gradients()
    train((opt, judge), gradients, 2)
    maxima = [opt.state[p]["max_exp_avg_sq"].clone() for p in params_of(opt)]
    with torch.no_grad():
        for p, q in zip(params_of(opt), params_of(judge), strict=True):
            q.copy_(p)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["amsgrad"] = False
    opt.load_state_dict(state)
    train((opt, judge), gradients, 2)
    for p, q, maximum in zip(params_of(opt), params_of(judge), maxima, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(opt.state[p]["max_exp_avg_sq"], maximum)
    opt.param_groups[0]["amsgrad"] = True
    train((opt,), gradients, 1)
    for p, maximum in zip(params_of(opt), maxima, strict=True):
        state = opt.state[p]
        assert torch.equal(state["max_exp_avg_sq"], torch.maximum(maximum, state["exp_avg_sq"]))


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_load_hooks_see_plain_tensors(device: torch.device) -> None:
    """A user's hooks get tensors, may replace the dict or edit the state, and stay the only hooks."""
    source = FusedAdamW(make_params(device), **HYPER)
    train((source,), Gradients(), 2)
    target = FusedAdamW(make_params(device), **HYPER)
    seen: list[str] = []

    def check_plain(entries: Any) -> None:
        for entry in entries:
            assert {type(value) for value in entry.values()} == {torch.Tensor}

    def before(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        assert optimizer is target
        check_plain(state["state"].values())
        seen.append("pre")
        state = copy.deepcopy(state)
        for entry in state["state"].values():
            entry["step"].fill_(40)
        return state

    def after(optimizer: torch.optim.Optimizer) -> None:
        check_plain(optimizer.state.values())
        seen.append("post")
        optimizer.state[params_of(optimizer)[0]]["exp_avg"].zero_()

    target.register_load_state_dict_pre_hook(before)
    target.register_load_state_dict_post_hook(after)
    for _ in range(2):
        target.load_state_dict(source.state_dict())
        assert len(target._optimizer_load_state_dict_pre_hooks) == 1
        assert len(target._optimizer_load_state_dict_post_hooks) == 1
    assert seen == ["pre", "post"] * 2
    first, *others = params_of(target)
    assert all(float(target.state[p]["step"]) == 40 for p in params_of(target))
    assert not target.state[first]["exp_avg"].any()
    assert all(target.state[p]["exp_avg"].any() for p in others)
    assert all(float(source.state[p]["step"]) == 2 for p in params_of(source))


def test_state_dict_hooks(device: torch.device) -> None:
    """Hooks before and after `state_dict` run as in torch's optimizers."""
    opt = FusedAdamW(make_params(device), **HYPER)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda optimizer: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": "ours"})
    assert opt.state_dict()["note"] == "ours"
    assert seen == ["pre"]


# --- distributed checkpoints ------------------------------------------------------------------------------------------


def exact_values(dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """Return both zeros, a subnormal, the smallest and largest numbers, and some in between."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny * info.eps, -info.tiny, info.tiny, info.max, -info.max, 1.0 + info.eps, 0.1, -3e-3]
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64).to(device=device, dtype=dtype))


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("lr", ["float", "cpu-tensor"])
def test_step_that_only_creates_state(path: Path, lr: str, amsgrad: bool) -> None:
    """Zero gradients and lr = 0, by which DCP makes an optimizer create its state, change no bit of any parameter."""
    params = [exact_values(dtype, path.device) for dtype in MIXED_DTYPES]
    opt = FusedAdamW(params, amsgrad=amsgrad, **HYPER)
    before = [bits(p).clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = 0.0 if lr == "float" else torch.tensor(0.0)
    opt.step(closure=None)
    for p, was in zip(params, before, strict=True):
        assert torch.equal(bits(p), was), p.dtype
        state = opt.state[p]
        assert float(state["step"]) == 1
        assert not any(state[key].any() for key in state if key != "step")
        assert ("max_exp_avg_sq" in state) == amsgrad


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_distributed_checkpoint_of_a_plain_model(device: torch.device, source: str, flatten: bool) -> None:
    """torch.distributed.checkpoint's getters and setters carry the state over by name, from torch's optimizer too."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(device).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    make = FusedAdamW if source == "ours" else torch.optim.AdamW
    saved = make(models[0].parameters(), **HYPER)
    loaded = FusedAdamW(models[1].parameters(), **OTHER_HYPER)
    gradients = Gradients()
    train((saved,), gradients, 3)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = dcp.get_optimizer_state_dict(models[0], saved, options=options)
    models[1].load_state_dict(models[0].state_dict())
    weights = [bits(p).clone() for p in params_of(loaded)]
    dcp.set_optimizer_state_dict(models[1], loaded, copy.deepcopy(state), options=options)
    assert all(torch.equal(bits(p), was) for p, was in zip(params_of(loaded), weights, strict=True))
    train((saved, loaded), gradients, 2)
    if source == "ours":
        assert_same_bits(saved, loaded)
    else:
        assert_agree(loaded, saved)
