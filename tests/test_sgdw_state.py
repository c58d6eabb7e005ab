"""State of FusedSGDW: checkpoints to and from torch.optim.SGD and ourselves, storage formats, what is refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from pairs import (
    Gradients,
    assert_same_bits,
    assert_unchanged,
    bits,
    copies,
    make_params,
    params_of,
    snapshot,
)
from pairs_sgd import FORMATS, HYPER, assert_agree, make_both, name_of, train
from problems import stored
from reference_formats import merge_weight
from restarts import through_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import SGD

from adamw_kernels import FusedAdamW, FusedSGDW

CPU = torch.device("cpu")

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.0), dict(dampening=0.4), dict(nesterov=True)], ids=name_of)
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_checkpoints_load_both_ways(path: Path, direction: str, steps: int, options: dict[str, Any]) -> None:
    """A checkpoint of one optimizer, loaded into the other at any step, goes on as if nothing had happened."""
    ours, theirs = make_both(path.device, **options)
    saved, other = (theirs, ours) if direction == "from-torch" else (ours, theirs)
    gradients = Gradients()
    train((saved,), gradients, steps)
    kinds = dict(decoupled=False) if other is ours else {}
    loaded = type(other)(copies(params_of(saved)), lr=0.5, momentum=0.1, weight_decay=0.7, **kinds)
    loaded.load_state_dict(through_file(saved.state_dict()))
    train((saved, loaded), gradients, 3)
    assert_agree(*((saved, loaded) if saved is ours else (loaded, saved)))


def test_checkpoint_with_buffers_that_are_none(path: Path) -> None:
    """As torch once wrote them without momentum: such a buffer is made when momentum asks for it."""
    ours, theirs = make_both(path.device, momentum=0.0)
    state = theirs.state_dict()
    state["state"] = {i: {"momentum_buffer": None} for i in range(3)}
    ours.load_state_dict(state)
    gradients = Gradients()
    train((ours, theirs), gradients, 2)
    for opt in (ours, theirs):
        opt.param_groups[0]["momentum"] = 0.9
    train((ours, theirs), gradients, 2)
    assert_agree(ours, theirs)


def test_a_buffer_without_a_count_has_received_a_gradient(device: torch.device) -> None:
    """Torch does not count: the first step after loading is dampened."""
    ours, theirs = make_both(device, dampening=0.9)
    train((theirs,), Gradients())
    ours.load_state_dict(theirs.state_dict())
    assert all("step" not in entry for entry in ours.state.values())
    with torch.no_grad():
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            p.copy_(q)
    train((ours, theirs), Gradients(2))
    assert_agree(ours, theirs)
    assert {float(ours.state[p]["step"]) for p in params_of(ours)} == {2.0}


def resume_from_file(opt: FusedSGDW) -> FusedSGDW:
    """Save weights and state dict, load them into an optimizer that was made with other hyperparameters."""
    saved = through_file({"weights": [p.detach() for p in params_of(opt)], "optimizer": opt.state_dict()})
    fresh = FusedSGDW([torch.nn.Parameter(weight) for weight in saved["weights"]], lr=0.7, momentum=0.1)
    fresh.load_state_dict(saved["optimizer"])
    return fresh


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize(
    "resume",
    [resume_from_file, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))],
    ids=["file", "deepcopy", "pickle"],
)
def test_training_resumes_with_the_same_bits(
    path: Path, resume: Callable[[FusedSGDW], FusedSGDW], options: str
) -> None:
    """16-bit and float32 parameters go on bit for bit where they were, and the two optimizers share nothing."""
    params = [make_params(path.device, dtype, ((3, 5),))[0] for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    opt = FusedSGDW(params, **HYPER | FORMATS[options])
    gradients = Gradients()
    train((opt,), gradients, 3)
    opt.param_groups[0]["lr"] = 0.005
    resumed = resume(opt)
    assert_same_bits(opt, resumed)
    before = snapshot(opt)
    gradients.give(params_of(resumed), params_of(opt))
    resumed.step()
    assert_unchanged(before, snapshot(opt))
    opt.step()
    train((opt, resumed), gradients, 2)
    assert_same_bits(opt, resumed)


@pytest.mark.parametrize("options", FORMATS)
def test_distributed_checkpoint(device: torch.device, options: str) -> None:
    """`get_` and `set_optimizer_state_dict` bring the bits back; their step at rate 0 beforehand does no harm."""
    models = [torch.nn.Linear(7, 3, device=device, dtype=torch.bfloat16) for _ in range(2)]
    opt, resumed = (FusedSGDW(model.parameters(), **HYPER | FORMATS[options]) for model in models)
    train((opt,), Gradients(), 3)
    saved = through_file(dcp.get_optimizer_state_dict(models[0], opt))
    models[1].load_state_dict(models[0].state_dict())
    dcp.set_optimizer_state_dict(models[1], resumed, saved)
    assert_same_bits(opt, resumed)
    train((opt, resumed), Gradients(5), 2)
    assert_same_bits(opt, resumed)


@pytest.mark.parametrize("groups_too", [True, False], ids=["whole", "state-alone"])
@pytest.mark.parametrize("into", [FusedSGDW, FusedAdamW])
def test_state_dict_of_the_other_rule_is_refused(device: torch.device, into: Any, groups_too: bool) -> None:
    """Ours or torch's, the groups' or only the state's: nothing has changed after the error."""
    sources = (FusedAdamW, torch.optim.AdamW) if into is FusedSGDW else (FusedSGDW, SGD)
    opt = into(make_params(device), **({"momentum": 0.9} if into is FusedSGDW else {}))
    train((opt,), Gradients())
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    for make in sources:
        other = make(make_params(device), **({} if into is FusedSGDW else {"momentum": 0.9}))
        train((other,), Gradients())
        state = other.state_dict()
        if not groups_too:
            state["param_groups"] = opt.state_dict()["param_groups"]
        key = "exp_avg" if into is FusedSGDW else "momentum_buffer"
        message = r"loaded param_groups\[0\] is of an optimizer of another rule" if groups_too else f"has {key}, which"
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
        assert_unchanged(before, snapshot(opt))
        assert opt.state_dict()["param_groups"] == groups


def test_buffers_in_other_units_are_refused(device: torch.device) -> None:
    """Buffers of lr times gradients and of gradients are not interchanged: neither loaded nor exported."""
    inside, behind = (FusedSGDW(make_params(device), lr_in_momentum=flag, **HYPER) for flag in (True, False))
    theirs = SGD(make_params(device), **HYPER)
    train((inside, behind, theirs), Gradients())
    before = snapshot(inside)
    for other in (behind, theirs):
        with pytest.raises(ValueError, match=r"loaded momentum_buffer of .* holds gradients.*lr_in_momentum=True"):
            inside.load_state_dict(other.state_dict())
        assert_unchanged(before, snapshot(inside))
    with pytest.raises(ValueError, match=r"export_state_dict: param_groups\[0\] has lr_in_momentum=True"):
        inside.export_state_dict()
    behind.load_state_dict(inside.state_dict())  # which says what its buffers are
    assert behind.param_groups[0]["lr_in_momentum"] is True
    assert_unchanged(before[1::3], snapshot(behind)[1::3])


# --- storage formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.0), dict(nesterov=True, lr_in_momentum=True)], ids=name_of)
@pytest.mark.parametrize("moment_format", ["float32", "bfloat16"])
def test_split32_follows_float32_weights(path: Path, moment_format: str, options: dict[str, Any]) -> None:
    """bfloat16 weights and their remainders are at each of 60 steps what float32 weights would be, bit for bit."""
    start = make_params(path.device, torch.bfloat16, ((300,),))[0]
    wide, narrow = torch.nn.Parameter(start.detach().float()), torch.nn.Parameter(start.detach().clone())
    narrow.grad_dtype = None
    options = HYPER | options | dict(moment_format=moment_format)
    opts = FusedSGDW([wide], **options), FusedSGDW([narrow], **options)
    gradients = Gradients()
    for step in range(6 if path.backend == "triton" and path.device == CPU else 60):
        gradients.give([wide])
        narrow.grad = wide.grad.clone()  # type: ignore[union-attr]
        for opt in opts:
            opt.step()
        remainder = opts[1].state[narrow]["param_remainder"]
        merged = merge_weight(stored(narrow), stored(remainder), "bfloat16", "split32")
        assert np.array_equal(merged.view(np.uint32), stored(wide).view(np.uint32)), f"step {step + 1}"
    assert not torch.equal(narrow, start)


def test_formats_convert_and_export(device: torch.device) -> None:
    """A run in split24 and bfloat16 is exported as torch's, converted to float32 and back; weights are kept whole."""
    params = make_params(device, torch.bfloat16, ((67, 63), (7,)))
    opt = FusedSGDW(params, param_format="split24", moment_format="bfloat16", **HYPER)
    assert {*opt.formats().values()} == {("split24", "bfloat16")}
    train((opt,), Gradients(), 3)
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in params]
    assert {buffer.dtype for buffer in buffers} == {torch.bfloat16}
    weights = opt.fp32_weights()
    theirs = SGD([torch.nn.Parameter(weights[p]) for p in params], lr=0.5)
    theirs.load_state_dict(through_file(opt.export_state_dict()))
    for q, buffer in zip(params_of(theirs), buffers, strict=True):
        assert torch.equal(theirs.state[q]["momentum_buffer"], buffer.float())
        assert theirs.state[q].keys() == {"momentum_buffer"}
    opt.convert(param_format="split32", moment_format="float32")
    for p, buffer in zip(params, buffers, strict=True):
        assert torch.equal(bits(opt.fp32_weights()[p]), bits(weights[p]))
        assert torch.equal(opt.state[p]["momentum_buffer"], buffer.float())
    with pytest.raises(ValueError, match="moment_format='8bit'"):
        opt.convert(moment_format="8bit")
    opt.convert(param_format="split24", moment_format="bfloat16")
    assert all(torch.equal(opt.state[p]["momentum_buffer"], b) for p, b in zip(params, buffers, strict=True))
    fresh = FusedSGDW(copies(params), param_format="split24", moment_format="bfloat16", **HYPER)
    fresh.load_fp32_weights([*weights.values()])
    for p, weight in zip(params_of(fresh), weights.values(), strict=True):
        assert torch.equal(bits(fresh.fp32_weights()[p]), bits(weight))


def test_moments_too_coarse_for_their_parameter(device: torch.device) -> None:
    """A bfloat16 buffer beside float64 weights is refused."""
    with pytest.raises(TypeError, match="float64, and moment_format is 'bfloat16'"):
        FusedSGDW(make_params(device), moment_format="bfloat16")
