"""`load_fp32_weights`: the state that it begins before the first step, what it leaves behind, what it refuses.

That weights of any format come back as they were loaded is in test_interchange.py.
"""

import copy
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from pairs import REMAINDER_KEYS, Gradients, assert_same_bits, assert_unchanged, bits, copies, params_of, snapshot
from torch.distributed.checkpoint import state_dict as dcp

from adamw_kernels import FusedAdamW, FusedSGDW
from adamw_kernels.formats import MOMENT_FORMATS

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
NARROW = (torch.bfloat16, torch.float16)
SPLIT = ("split24", "split32")
MOMENTS = {
    "float32": {"exp_avg", "exp_avg_sq"},
    "bfloat16": {"exp_avg", "exp_avg_sq"},
    "8bit": {"exp_avg_code", "exp_avg_sq_code", "moment_groups", "exp_avg_sq_scale"},
}

every_split = pytest.mark.parametrize(("param_format", "moment_format"), [*itertools.product(SPLIT, MOMENT_FORMATS)])
every_narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)


def make_model(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """4,221 16-bit weights and a bias; a norm whose parameters stay float32, as mixed models have them."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(67, 63, device=device, dtype=dtype), torch.nn.LayerNorm(63, device=device)
    )


def wide_weights(model: torch.nn.Module, seed: int = 3) -> list[torch.Tensor]:
    """Random float32 weights, which 16 bits cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device) for p in model.parameters()]


def train(optimizers: tuple[torch.optim.Optimizer, ...], gradients: Gradients, steps: int = 1) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


def train_beside(opt: torch.optim.Optimizer, judge: torch.optim.Optimizer, gradients: Gradients) -> None:
    """One step of both; the float32 judge gets the same gradients, as the narrower parameters hold them."""
    gradients.give(params_of(opt))
    for p, q in zip(params_of(opt), params_of(judge), strict=True):
        q.grad = p.grad.to(q.dtype)  # type: ignore[union-attr]
    opt.step()
    judge.step()


# --- before the first step --------------------------------------------------------------------------------------------


@every_split
@every_narrow
def test_state_is_complete(device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str) -> None:
    """Every parameter has what a step would create, float32 ones too: no steps taken, no moments."""
    model = make_model(device, dtype)
    opt = FusedAdamW(model.parameters(), param_format=param_format, moment_format=moment_format, **HYPER)
    opt.load_fp32_weights(wide_weights(model))
    stepped = FusedAdamW(copies(model.parameters()), param_format=param_format, moment_format=moment_format, **HYPER)
    train((stepped,), Gradients())
    for p, q in zip(params_of(opt), params_of(stepped), strict=True):
        entries = opt.state[p], stepped.state[q]
        kinds, expected = ({key: (x.dtype, x.shape) for key, x in entry.items()} for entry in entries)
        assert kinds == expected
        key_of_rest = REMAINDER_KEYS[param_format]
        assert (key_of_rest in kinds) == (p.dtype == dtype)
        assert not any(opt.state[p][key].any() for key in kinds.keys() - {key_of_rest, "exp_avg_sq_scale"})
    exported = opt.export_state_dict()["state"]
    assert all(not value.any() for entry in exported.values() for value in entry.values())


@every_split
def test_first_step_is_that_of_float32(device: torch.device, param_format: str, moment_format: str) -> None:
    """The state that is there already begins as none would: the bits of a run that was never loaded into."""
    model = make_model(device)
    options = dict(param_format=param_format, moment_format=moment_format, ema_decay=0.9, **HYPER)
    opt, judge = FusedAdamW(model.parameters(), **options), FusedAdamW(copies(model.parameters()), **options)
    opt.load_fp32_weights([p.detach().float() for p in model.parameters()])
    train((opt, judge), Gradients(), 2)
    assert_same_bits(opt, judge)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_starts_with_an_empty_buffer(device: torch.device, nesterov: bool) -> None:
    """The buffer is there and takes the first gradient in whole, as in float32; torch's SGD goes on from the state."""
    model = make_model(device)
    weights = wide_weights(model)
    options: dict[str, Any] = dict(lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    if not nesterov:
        options["dampening"] = 0.5
    wide = [torch.nn.Parameter(weight.clone()) for weight in weights]
    opt, judge = FusedSGDW(model.parameters(), **options), FusedSGDW(wide, **options)
    opt.load_fp32_weights(weights)
    for p in model.parameters():
        remainder = {"param_remainder"} if p.dtype == torch.bfloat16 else set()
        assert opt.state[p].keys() == {"step", "momentum_buffer"} | remainder
        assert float(opt.state[p]["step"]) == 0 and not opt.state[p]["momentum_buffer"].any()
    gradients = Gradients()
    for _ in range(2):
        train_beside(opt, judge, gradients)
        assert all(torch.equal(bits(x), bits(q)) for x, q in zip(opt.fp32_weights().values(), wide, strict=True))


def test_averages_start_at_the_loaded_weights(device: torch.device) -> None:
    """At those of the last call before the first step; from then on loading leaves them alone."""
    model = make_model(device)
    opt = FusedAdamW(model.parameters(), ema_decay=0.5, **HYPER)
    for seed in (3, 4):
        weights = wide_weights(model, seed)
        opt.load_fp32_weights(weights)
        for p, weight in zip(model.parameters(), weights, strict=True):
            assert torch.equal(opt.state[p]["param_ema"], weight)
    train((opt,), Gradients())
    for p, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(opt.state[p]["param_ema"], weight + 0.5 * (opt.fp32_weights()[p] - weight))
    averages = [opt.state[p]["param_ema"].clone() for p in model.parameters()]
    opt.load_fp32_weights(wide_weights(model, 5))
    assert all(torch.equal(opt.state[p]["param_ema"], x) for p, x in zip(model.parameters(), averages, strict=True))


@pytest.mark.parametrize("param_format", ["native", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_state_where_weights_need_none(device: torch.device, dtype: torch.dtype, param_format: str) -> None:
    """Nothing is remembered beside the weights: the first step creates everything, as without loading."""
    model = make_model(device, dtype)
    opt = FusedAdamW(model.parameters(), param_format=param_format, ema_decay=0.5, **HYPER)
    weights = wide_weights(model)
    opt.load_fp32_weights(weights)
    assert not any(opt.state.values())
    for p, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, weight.to(p.dtype))


@every_split
def test_frozen_parameters_get_no_moments(device: torch.device, param_format: str, moment_format: str) -> None:
    """Only the rest of their weight, also through conversions; unfrozen, they are stepped like any other."""
    model = make_model(device)
    weights = wide_weights(model)
    frozen = model[0].weight.requires_grad_(False)
    opt = FusedAdamW(model.parameters(), param_format=param_format, moment_format=moment_format, ema_decay=0.5, **HYPER)
    opt.load_fp32_weights(weights)
    assert opt.state[frozen].keys() == {REMAINDER_KEYS[param_format]}
    rest = REMAINDER_KEYS[param_format]
    assert opt.state[model[0].bias].keys() == {"step", "exp_avg", "exp_avg_sq", "param_ema", rest}
    remembered = opt.fp32_weights()[frozen]
    other = {"split24": "split32", "split32": "split24"}[param_format]
    opt.convert(param_format=other, moment_format="float32")
    assert opt.state[frozen].keys() == {REMAINDER_KEYS[other]}
    dtypes = {"split24": torch.int8, "split32": torch.int16}
    assert opt.state[frozen][REMAINDER_KEYS[other]].dtype == dtypes[other]
    if other == "split32":
        assert torch.equal(bits(opt.fp32_weights()[frozen]), bits(remembered))
    opt.convert(param_format=param_format, moment_format=moment_format)
    kept = opt.fp32_weights()[frozen]
    Gradients().give(params_of(opt), present=[p is not frozen for p in params_of(opt)])
    opt.step()
    assert opt.state[frozen].keys() == {rest}
    assert torch.equal(bits(opt.fp32_weights()[frozen]), bits(kept))
    frozen.requires_grad_()
    train((opt,), Gradients())
    assert opt.state[frozen].keys() == MOMENTS[moment_format] | {"step", rest, "param_ema"}
    assert float(opt.state[frozen]["step"]) == 1


# --- saved and loaded in that state -----------------------------------------------------------------------------------


@every_split
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoint(
    device: torch.device, tmp_path: pathlib.Path, steps: int, flatten: bool, param_format: str, moment_format: str
) -> None:
    """Saved before the first step or later, and loaded into an optimizer that weights were loaded into.

    Distributed checkpoints make a state for optimizers that have none, and so must find a whole one or none.
    """
    options: dict[str, Any] = dict(param_format=param_format, moment_format=moment_format, ema_decay=0.9, seed=7)
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, again = make_model(device), make_model(device)
    opt, resumed = (FusedAdamW(each.parameters(), **options, **HYPER) for each in (model, again))
    opt.load_fp32_weights(wide_weights(model))
    resumed.load_fp32_weights(wide_weights(again, seed=8))
    train((opt,), Gradients(), steps)
    saved = {"model": dcp.get_model_state_dict(model), "optim": dcp.get_optimizer_state_dict(model, opt, options=how)}
    checkpoint.save(saved, checkpoint_id=tmp_path)
    loaded = {
        "model": dcp.get_model_state_dict(again),
        "optim": dcp.get_optimizer_state_dict(again, resumed, options=how),
    }
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    dcp.set_model_state_dict(again, loaded["model"])
    dcp.set_optimizer_state_dict(again, resumed, loaded["optim"], options=how)
    assert_same_bits(opt, resumed)
    train((opt, resumed), Gradients(5), 2)
    assert_same_bits(opt, resumed)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_distributed_checkpoint_beside_a_frozen_parameter(device: torch.device) -> None:
    """The functions leave frozen parameters' state out, and bring back all others'."""
    model, again = make_model(device), make_model(device)
    for each in (model, again):
        each[0].weight.requires_grad_(False)
    opt, resumed = (FusedAdamW(each.parameters(), **HYPER) for each in (model, again))
    opt.load_fp32_weights(wide_weights(model))
    resumed.load_fp32_weights(wide_weights(again, seed=8))
    again.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(again, resumed, dcp.get_optimizer_state_dict(model, opt))
    for p, q in list(zip(model.parameters(), again.parameters(), strict=True))[1:]:
        assert torch.equal(bits(opt.fp32_weights()[p]), bits(resumed.fp32_weights()[q]))
        assert opt.state[p].keys() == resumed.state[q].keys()


@pytest.mark.parametrize("moment_format", ["float32", "bfloat16"])
def test_torch_goes_on_from_the_state(device: torch.device, moment_format: str) -> None:
    """`torch.optim.AdamW` loads what `state_dict` and `export_state_dict` return and steps as one that is new."""
    model = make_model(device)
    weights = wide_weights(model)
    opt = FusedAdamW(model.parameters(), moment_format=moment_format, **HYPER)
    opt.load_fp32_weights(weights)
    for state in (opt.state_dict(), opt.export_state_dict()):
        theirs, new = (torch.optim.AdamW([torch.nn.Parameter(w.clone()) for w in weights], **HYPER) for _ in range(2))
        theirs.load_state_dict(copy.deepcopy(state))  # torch would share the step with us
        assert [float(entry["step"]) for entry in theirs.state.values()] == [0, 0, 0, 0]
        train((theirs, new), Gradients(), 2)
        for p, q in zip(params_of(theirs), params_of(new), strict=True):
            assert torch.equal(p, q)


# --- what is left of the weights before -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["native", "stochastic"])
@every_split
@every_narrow
def test_remainder_of_the_weight_before_is_dropped(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str, after: str
) -> None:
    """Written into a group that keeps no rest any more, weights are the nearest of 16 bits, and stay those."""
    model = make_model(device, dtype)
    opt = FusedAdamW(model.parameters(), param_format=param_format, moment_format=moment_format, **HYPER)
    train((opt,), Gradients(), 2)
    opt.param_groups[0]["param_format"] = after
    weights = wide_weights(model)
    opt.load_fp32_weights(weights)
    assert all(entry.keys().isdisjoint(REMAINDER_KEYS.values()) for entry in opt.state.values())
    opt.convert(param_format=param_format)
    for p, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(opt.fp32_weights()[p], weight.to(p.dtype).float())
    assert not opt.state[model[0].weight][REMAINDER_KEYS[param_format]].any()


@pytest.mark.parametrize("after", ["native", "stochastic"])
@every_split
def test_converted_before_the_first_step(
    device: torch.device, param_format: str, moment_format: str, after: str
) -> None:
    """What was remembered of the loaded weights goes when the format is given up, frozen or not."""
    model = make_model(device)
    model[0].bias.requires_grad_(False)
    opt = FusedAdamW(model.parameters(), param_format=param_format, moment_format=moment_format, **HYPER)
    opt.load_fp32_weights(wide_weights(model))
    stored = [p.detach().clone() for p in model.parameters()]
    opt.convert(param_format=after)
    assert all(entry.keys().isdisjoint(REMAINDER_KEYS.values()) for entry in opt.state.values())
    for p, weight in zip(model.parameters(), stored, strict=True):
        assert torch.equal(p, weight) and torch.equal(opt.fp32_weights()[p], weight.float())
    train((opt,), Gradients())
    assert all(entry.keys().isdisjoint(REMAINDER_KEYS.values()) for entry in opt.state.values())


# --- what is refused --------------------------------------------------------------------------------------------------


def column_slice(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.nn.Parameter]:
    """A matrix and a parameter that is some of its columns."""
    whole = torch.randn(80, 96, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return whole, torch.nn.Parameter(whole[:, 3:67])


@pytest.mark.parametrize(
    "use",
    [
        lambda opt, p: opt.load_fp32_weights([torch.ones(5, device=p.device), torch.ones(80, 64, device=p.device)]),
        lambda opt, p: opt.convert(param_format="split24", moment_format="8bit"),
        lambda opt, p: opt.fp32_weights(),
    ],
    ids=["load_fp32_weights", "convert", "fp32_weights"],
)
@every_narrow
def test_parameter_with_gaps(
    device: torch.device, dtype: torch.dtype, use: Callable[[FusedAdamW, torch.Tensor], Any]
) -> None:
    """Remainders are laid out as weights are, which must be dense: refused, and no byte of the neighbours is written.

    The state is of a dense parameter in the same place.
    """
    whole, columns = column_slice(device, dtype)
    params = [torch.nn.Parameter(torch.zeros(5, device=device, dtype=dtype)), columns]
    dense = FusedAdamW(copies(params), **HYPER)
    dense.param_groups[0]["params"][1].data = columns.detach().contiguous()
    train((dense,), Gradients(), 2)
    opt = FusedAdamW(params, **HYPER)
    opt.load_state_dict(dense.state_dict())
    before, memory = snapshot(opt), whole.clone()
    with pytest.raises(ValueError, match=r"\[1\] has shape \(80, 64\) and strides \(96, 1\).*leave gaps.*contiguous"):
        use(opt, columns)
    assert torch.equal(bits(whole), bits(memory))
    assert_unchanged(before, snapshot(opt))


@every_narrow
def test_parameter_with_gaps_before_the_first_step(device: torch.device, dtype: torch.dtype) -> None:
    """Loading is refused as later; without a remainder, reading weights is no harm."""
    whole, columns = column_slice(device, dtype)
    opt = FusedAdamW([columns], **HYPER)
    memory = whole.clone()
    with pytest.raises(ValueError, match="leave gaps"):
        opt.load_fp32_weights([torch.ones(80, 64, device=device)])
    assert not any(opt.state.values())
    assert torch.equal(opt.fp32_weights()[columns], columns.float())
    opt.convert(param_format="split24")
    assert torch.equal(bits(whole), bits(memory))


BAD_WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "meta": (lambda x: x.to("meta"), r"has layout torch.strided on meta; expected dense values"),
    "sparse": (torch.Tensor.to_sparse, r"has layout torch.sparse_coo on .*; expected dense values"),
    "csr": (torch.Tensor.to_sparse_csr, r"has layout torch.sparse_csr on .*; expected dense values"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("param_format", ["native", "split24", "split32"])
@pytest.mark.parametrize(("make", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
@pytest.mark.parametrize("steps", [0, 2])
def test_weights_without_dense_values(
    device: torch.device, steps: int, make: Callable[[torch.Tensor], torch.Tensor], message: str, param_format: str
) -> None:
    """Refused by name before the parameters ahead of it are written, and before there is a state."""
    params = [torch.nn.Parameter(torch.randn(5, 7, device=device).bfloat16()) for _ in range(2)]
    opt = FusedAdamW(params, param_format=param_format, **HYPER)
    train((opt,), Gradients(), steps)
    before = snapshot(opt)
    good = torch.ones(5, 7, device=device)
    with pytest.raises(ValueError, match=rf"the weight for param_groups\[0\]\['params'\]\[1\] {message}"):
        opt.load_fp32_weights([good, make(good)])
    assert_unchanged(before, snapshot(opt))
    opt.load_fp32_weights([good, good])
    assert all(torch.equal(x, good) for x in opt.fp32_weights().values())
