"""What `load_state_dict` checks before it replaces anything: options, seeds, states, remainders that are missing.

And that a step which fails leaves what was loaded as it was.

How states of each kind may be damaged is in test_state_dict.py and, for those of the storage formats, in
test_interchange.py.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import (
    REMAINDER_KEYS,
    Gradients,
    assert_same_bits,
    assert_unchanged,
    copies,
    make_params,
    params_of,
    snapshot,
)

from adamw_kernels import BackendUnavailableError, FusedAdamW, backends

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

SHAPES = ((67, 63), (7,))  # 4,221 elements: 8-bit moments; and what stays float32
StateDict = dict[str, Any]


def train(opt: torch.optim.Optimizer, steps: int = 1, seed: int = 1) -> None:
    """Step on random gradients."""
    gradients = Gradients(seed)
    for _ in range(steps):
        gradients.give(params_of(opt))
        opt.step()


def two_groups(device: torch.device, dtype: torch.dtype = torch.bfloat16, **options: Any) -> FusedAdamW:
    """An optimizer of two groups after two steps."""
    params = [make_params(device, dtype, SHAPES, seed) for seed in (0, 1)]
    opt = FusedAdamW([dict(params=group) for group in params], lr=1e-2, seed=5, **options)
    train(opt, 2)
    return opt


def assert_refused(opt: FusedAdamW, state: StateDict, kind: type[Exception], message: str) -> None:
    """Loading raises, and leaves weights, state, groups, seed and plan as they were."""
    before, groups = snapshot(opt), [{**group} for group in opt.param_groups]
    own = opt._internals
    identities = opt.param_groups, opt.state, own.stepper, own.stepper and own.stepper.plan, own.options
    with pytest.raises(kind, match=message):
        opt.load_state_dict(state)
    assert_unchanged(before, snapshot(opt))
    assert opt.param_groups == groups
    now = opt.param_groups, opt.state, own.stepper, own.stepper and own.stepper.plan, own.options
    assert all(a is b for a, b in zip(identities, now, strict=True))
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks


# --- options ----------------------------------------------------------------------------------------------------------

SEED = "expected an int"
BAD_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "moment_format": (dict(moment_format="4bit"), ValueError, "moment_format is '4bit'; expected one of float32"),
    "param_format": (dict(param_format="split8"), ValueError, "param_format is 'split8'; expected one of auto"),
    "ema_format": (dict(ema_decay=0.9, ema_format="8bit"), ValueError, "ema_format is '8bit'; expected one of"),
    "update_bound": (dict(update_bound=0), ValueError, "update_bound is 0; expected 'auto', None or a number above 0"),
    "amsgrad": (dict(amsgrad=True, moment_format="8bit"), ValueError, "amsgrad=True with moment_format='8bit'"),
    "cautious": (
        dict(cautious_weight_decay=True, decoupled_weight_decay=False),
        ValueError,
        "cautious_weight_decay=True with decoupled=False",
    ),
    "differentiable": (dict(differentiable=True), RuntimeError, "differentiable=True"),
    "lr": (dict(lr=math.nan), ValueError, "lr is nan; expected a finite number"),
    "betas": (dict(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
    "eps": (dict(eps=-1e-8), ValueError, "Invalid epsilon value: -1e-08"),
    "max_grad_norm": (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm is -1.0; expected a number above 0"),
    "seed-float": (dict(seed=1.5), TypeError, f"seed is 1.5; {SEED}"),
    "seed-none": (dict(seed=None), TypeError, f"seed is None; {SEED}"),
    "seed-tensor": (dict(seed=torch.ones(())), TypeError, rf"seed is tensor\(1.\); {SEED}"),
    "seed-bool": (dict(seed=True), TypeError, f"seed is True; {SEED}"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_bad_options(device: torch.device, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """In the second of two groups, the first having others than the optimizer."""
    opt = two_groups(device)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(lr=0.5, moment_format="8bit", seed=9)
    state["param_groups"][1].update(options)
    assert_refused(opt, state, kind, rf"^loaded param_groups\[1\]: {message}")


def test_options_that_contradict_the_optimizers_own(device: torch.device) -> None:
    """What the loaded group does not say stays, or is the constructor's, and must agree with what it says."""
    plain = two_groups(device, amsgrad=True).state_dict()
    opt = two_groups(device, moment_format="8bit")
    assert_refused(opt, plain, ValueError, r"^loaded param_groups\[0\]: amsgrad=True with moment_format='8bit'")
    del opt.param_groups[0]["moment_format"]  # float32 from here on, if nothing is loaded
    message = r"^loaded param_groups\[0\]: amsgrad=True with moment_format='8bit'"
    assert_refused(opt, plain, ValueError, message)
    opt = two_groups(device, cautious_weight_decay=True)
    older = copy.deepcopy(opt.state_dict())
    for group in older["param_groups"]:
        del group["cautious_weight_decay"], group["amsgrad"]
        group["decoupled_weight_decay"] = False
    assert_refused(
        opt, older, ValueError, r"^loaded param_groups\[0\]: cautious_weight_decay=True with decoupled=False"
    )


def test_moments_too_coarse_for_their_parameter(device: torch.device) -> None:
    """A format that the optimizer's own parameter cannot have, whatever the saved one was."""
    state = two_groups(device, torch.float32, moment_format="bfloat16").state_dict()
    opt = two_groups(device, torch.float64)
    message = r"^param_groups\[0\]\['params'\]\[0\] has dtype torch.float64, and moment_format is 'bfloat16'"
    assert_refused(opt, state, TypeError, message)


def test_what_a_run_may_have_set(device: torch.device) -> None:
    """A rate that a schedule made negative, and how torch's optimizer was told to compute, are no errors."""
    theirs = torch.optim.AdamW(make_params(device, torch.float32, SHAPES), fused=False, foreach=False)
    train(theirs)
    state = theirs.state_dict()
    state["param_groups"][0].update(lr=-1e-9, weight_decay=-0.1)
    opt = FusedAdamW(make_params(device, torch.float32, SHAPES))
    opt.load_state_dict(state)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (-1e-9, -0.1)
    train(opt)
    state["param_groups"][0].update(fused=True, foreach=True)
    opt.load_state_dict(state)
    opt.convert(moment_format="8bit")
    train(opt)


@pytest.mark.parametrize("seed", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_seed_is_taken_over(device: torch.device, seed: Any) -> None:
    """As an int, whatever a checkpoint's reader makes of it."""
    opt = two_groups(device, param_format="stochastic")
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group["seed"] = seed
    opt.load_state_dict(state)
    assert type(opt._internals.options.seed) is int and opt._internals.options.seed == 7


# --- states -----------------------------------------------------------------------------------------------------------


def test_state_of_a_named_or_frozen_parameter(device: torch.device) -> None:
    """Checked under the name that the optimizer has for it, also where no gradient would make a step look at it."""
    params = make_params(device, torch.float32, SHAPES)
    opt = FusedAdamW([("first", params[0]), ("second", params[1])])
    train(opt)
    params[1].requires_grad_(False)
    params[1].grad = None
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(params=["a", "b"], lr=0.5)
    state["state"] = dict(zip("ab", state["state"].values(), strict=True))
    state["state"]["b"]["exp_avg"] = torch.zeros(3)
    message = r"^exp_avg of parameter 'second' \(param_groups\[0\]\['params'\]\[1\]\) has shape \(3,\)"
    assert_refused(opt, state, ValueError, message)


def test_codes_under_the_names_of_moments(device: torch.device) -> None:
    """Codes are moments under no other name: as `exp_avg` they are integers, which are refused."""
    opt = two_groups(device, moment_format="8bit")
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            if f"{key}_code" in entry:
                entry[key] = entry.pop(f"{key}_code")
    message = "exp_avg of .* is torch.int8; expected a floating-point tensor. Moments in 8 bits are exp_avg_code"
    assert_refused(opt, state, TypeError, message)


def test_users_hooks_come_first(device: torch.device) -> None:
    """A hook that was registered for loading may mend what would be refused."""
    opt = two_groups(device)
    state = copy.deepcopy(opt.state_dict())
    exp_avg = state["state"][1].pop("exp_avg")
    state["param_groups"][1]["moment_format"] = "4bit"

    def mend(_: torch.optim.Optimizer, loaded: StateDict) -> None:
        loaded["state"][1]["exp_avg"] = exp_avg
        loaded["param_groups"][1]["moment_format"] = "8bit"

    handle = opt.register_load_state_dict_pre_hook(mend)
    opt.load_state_dict(state)
    handle.remove()
    train(opt)
    assert "exp_avg_code" in opt.state[opt.param_groups[1]["params"][0]]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda groups: groups.pop(), "different number of parameter groups"),
        (lambda groups: groups[0]["params"].pop(), "doesn't match the size of optimizer's group"),
    ],
    ids=["groups", "params"],
)
def test_groups_that_do_not_match_are_torchs_errors(
    device: torch.device, cut: Callable[[list[StateDict]], Any], message: str
) -> None:
    """Whatever else is wrong with them."""
    opt = two_groups(device)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(moment_format="4bit", seed=0.5)
    cut(state["param_groups"])
    assert_refused(opt, state, ValueError, message)


# --- remainders that are missing --------------------------------------------------------------------------------------


def warnings_of_loading(opt: FusedAdamW, state: StateDict) -> list[str]:
    """What loading warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(state)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("param_format", ["split24", "split32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_missing_remainder_warns(device: torch.device, dtype: torch.dtype, param_format: str) -> None:
    """By name, once a parameter; weights go on from their 16-bit values."""
    opt = two_groups(device, dtype, param_format=param_format)
    state = copy.deepcopy(opt.state_dict())
    assert not warnings_of_loading(opt, copy.deepcopy(state))
    del state["state"][1][REMAINDER_KEYS[param_format]]
    del state["state"][2][REMAINDER_KEYS[param_format]]
    messages = warnings_of_loading(opt, state)
    assert len(messages) == 2 and all(str(dtype) in message for message in messages)
    for message, place in zip(messages, ("[0]['params'][1]", "[1]['params'][0]"), strict=True):
        assert f"the loaded state of param_groups{place} has moments but no param_remainder" in message
    p = params_of(opt)[1]
    assert torch.equal(opt.fp32_weights()[p], p.float())
    train(opt)
    assert REMAINDER_KEYS[param_format] in opt.state[p]


def test_missing_remainder_as_an_error_changes_nothing(device: torch.device) -> None:
    """Where warnings are errors, it is one of the checks."""
    opt = two_groups(device, param_format="split24")
    state = copy.deepcopy(opt.state_dict())
    del state["state"][1][REMAINDER_KEYS["split24"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(opt, state, UserWarning, "no param_remainder")


def test_no_remainder_was_ever_there(device: torch.device) -> None:
    """Checkpoints of torch, of wider weights, of formats without one, of parameters that were not stepped: no word."""
    theirs = torch.optim.AdamW(make_params(device, torch.bfloat16, SHAPES))
    train(theirs)
    for param_format in ("auto", "split24", "split32"):
        opt = FusedAdamW(make_params(device, torch.bfloat16, SHAPES), param_format=param_format)
        assert not warnings_of_loading(opt, theirs.state_dict())
    for dtype, param_format in ((torch.float32, "split24"), (torch.bfloat16, "stochastic")):
        opt = two_groups(device, dtype, param_format=param_format)
        assert not warnings_of_loading(opt, opt.state_dict())
    fresh = FusedAdamW(make_params(device, torch.bfloat16, SHAPES), param_format="split24")
    assert not warnings_of_loading(fresh, fresh.state_dict())


# --- steps that fail afterwards ---------------------------------------------------------------------------------------


def in_the_first_ones_memory(params: list[torch.Tensor]) -> None:
    """The second parameter becomes a part of the first."""
    params[1].data = params[0].data.view(-1)[:7]


def gradient_in_the_first_ones_memory(params: list[torch.Tensor]) -> None:
    """The second one's gradient does."""
    params[1].grad = params[0].data.view(-1)[:7]


@pytest.mark.parametrize("overlap", [in_the_first_ones_memory, gradient_in_the_first_ones_memory])
@pytest.mark.parametrize("way", ["loaded", "options-edited"])
def test_parameters_that_share_memory(
    device: torch.device, way: str, overlap: Callable[[list[torch.Tensor]], None]
) -> None:
    """The step is refused before moments or remainders are brought into their formats; mended, it converts them."""
    params = make_params(device, torch.bfloat16, SHAPES)
    formats: dict[str, Any] = dict(param_format="split24", moment_format="8bit")
    if way == "loaded":
        theirs = torch.optim.AdamW(copies(params))
        train(theirs)
        opt, twin = (FusedAdamW(copies(params), **formats) for _ in range(2))
        for each in (opt, twin):
            each.load_state_dict(copy.deepcopy(theirs.state_dict()))
    else:
        opt, twin = (FusedAdamW(copies(params)) for _ in range(2))
        for each in (opt, twin):
            train(each)
            each.param_groups[0].update(formats)
    Gradients(5).give(params_of(opt), params_of(twin))
    data, grad = params_of(opt)[1].data, params_of(opt)[1].grad
    overlap(params_of(opt))
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[.\] share memory; expected separate"):
            opt.step()
        assert_unchanged(before, snapshot(opt))
    params_of(opt)[1].data, params_of(opt)[1].grad = data, grad
    opt.step()
    twin.step()
    assert "exp_avg_code" in opt.state[params_of(opt)[0]]
    assert_same_bits(opt, twin)


def test_backend_that_cannot_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise: the loaded state is still there, to be loaded into an optimizer that can."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    theirs = torch.optim.AdamW(make_params(device, torch.bfloat16, SHAPES))
    train(theirs)
    wrong = "cuda" if device.type == "cpu" else "cpu"
    opt = FusedAdamW(copies(params_of(theirs)), param_format="split24", moment_format="8bit", backend=wrong)
    opt.load_state_dict(theirs.state_dict())
    Gradients(5).give(params_of(opt))
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=f"backend='{wrong}' cannot be used"):
            opt.step()
        assert_unchanged(before, snapshot(opt))
    assert {key: value.dtype for key, value in opt.state[params_of(opt)[0]].items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }
