"""Models whose memory layout changes (`model.to(memory_format=...)`) while their state stays in the one of before.

Weights are compared element by element, wherever the elements lie. Random bits of stochastic rounding go by the order
of memory: where a format uses them, the run that goes on is compared with one whose state was re-laid by hand.
"""

import itertools
from typing import Any

import pytest
import torch
from pairs import Gradients, assert_same_bits, assert_unchanged, bits, params_of, snapshot

from adamw_kernels import FusedAdamW
from adamw_kernels.formats import MOMENT_FORMATS, PARAM_FORMATS

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
NARROW = (torch.bfloat16, torch.float16)
OTHER = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}

every_combination = pytest.mark.parametrize(
    ("param_format", "moment_format"), [*itertools.product(PARAM_FORMATS, MOMENT_FORMATS)]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
both_ways = pytest.mark.parametrize("before", OTHER, ids=str)


def make_model(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> torch.nn.Module:
    """A convolution with 5,130 weights: 8-bit moments, the last group of 16 ragged; and a bias, which stays float32."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(19, 10, (3, 9)).to(device, dtype).to(memory_format=layout)


def train(optimizers: tuple[torch.optim.Optimizer, ...], gradients: Gradients, steps: int) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


def trained(model: torch.nn.Module, param_format: str, moment_format: str, **options: Any) -> FusedAdamW:
    """An optimizer of the model's parameters after some steps."""
    params = model.parameters()
    opt = FusedAdamW(params, param_format=param_format, moment_format=moment_format, **HYPER | options)
    train((opt,), Gradients(), 3)
    return opt


def relay(model: torch.nn.Module, layout: torch.memory_format) -> None:
    """Change the layout of the convolution's weight, which must not be in it already."""
    before = model.weight.stride()
    model.to(memory_format=layout)
    assert model.weight.stride() != before


def exchanged(opt: FusedAdamW) -> list[torch.Tensor]:
    """Copies of the float32 weights, two, and of the step and moments of each as other optimizers understand them."""
    found = [*opt.fp32_weights().values()]
    found += [value for entry in opt.export_state_dict()["state"].values() for _, value in sorted(entry.items())]
    assert len(found) == 2 + 2 * 3
    return [value.clone() for value in found]


def assert_values(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The same elements, bit for bit, in whatever layout."""
    for x, y in zip(got, expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(bits(x), bits(y))


# --- values that leave ------------------------------------------------------------------------------------------------


@both_ways
@every_combination
@every_dtype
def test_exports_do_not_depend_on_the_layout(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str, before: torch.memory_format
) -> None:
    """`fp32_weights` and `export_state_dict` of a re-laid model, its state not yet: the values of before."""
    model = make_model(device, dtype, before)
    opt = trained(model, param_format, moment_format)
    expected = exchanged(opt)
    relay(model, OTHER[before])
    state = snapshot(opt)
    assert_values(exchanged(opt), expected)
    assert_unchanged(state, snapshot(opt))
    assert opt.fp32_weights()[model.weight].stride() == model.weight.stride()


@both_ways
@every_combination
@every_dtype
def test_checkpoint_of_another_layout(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str, before: torch.memory_format
) -> None:
    """Loaded into a model in another layout, values are those of before; codes come as what an export makes of them."""
    saved_model, model = (make_model(device, dtype, layout) for layout in (before, OTHER[before]))
    saved = trained(saved_model, param_format, moment_format)
    expected = exchanged(saved)
    model.load_state_dict(saved_model.state_dict())
    assert model.weight.stride() != saved_model.weight.stride()
    opt = FusedAdamW(model.parameters(), param_format=param_format, moment_format=moment_format, **HYPER)
    if moment_format == "8bit":
        untouched = snapshot(opt)
        with pytest.raises(ValueError, match=r"exp_avg_code of .* expected the same memory layout.*export_state_dict"):
            opt.load_state_dict(saved.state_dict())
        assert_unchanged(untouched, snapshot(opt))
        opt.load_state_dict(saved.export_state_dict())
        assert_values(exchanged(opt)[2:], expected[2:])
        opt.load_fp32_weights([*saved.fp32_weights().values()])
        assert_values(exchanged(opt)[:2], expected[:2])
    else:
        opt.load_state_dict(saved.state_dict())
        assert_values(exchanged(opt), expected)
    train((opt,), Gradients(5), 1)
    assert ("exp_avg_code" in opt.state[model.weight]) == (moment_format == "8bit")
    assert all(value.stride() == model.weight.stride() for value in opt.state[model.weight].values() if value.ndim == 4)


# --- training goes on -------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_training_goes_on_as_if_nothing_had_changed(
    device: torch.device, dtype: torch.dtype, before: torch.memory_format
) -> None:
    """Nothing is rounded by chance: weights, moments and averages of a re-laid run are those of one that was not."""
    model, unchanged = (make_model(device, dtype, before) for _ in range(2))
    opt, twin = (trained(each, "split32", "float32", ema_decay=0.9) for each in (model, unchanged))
    gradients = Gradients(5)
    for layout in (OTHER[before], before):  # and back
        relay(model, layout)
        train((opt, twin), gradients, 2)
        assert_same_bits(opt, twin)
        state = opt.state[model.weight]
        expected = {"step", "exp_avg", "exp_avg_sq", "param_ema"}
        assert state.keys() == expected | ({"param_remainder"} if dtype != torch.float32 else set())
        assert all(value.stride() == model.weight.stride() for value in state.values() if value.ndim)


@both_ways
@pytest.mark.parametrize("moment_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_format", ["stochastic", "split24", "split32"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_state_is_relaid_by_the_next_step(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str, before: torch.memory_format
) -> None:
    """Remainders, moments and averages go on from their own elements: as after a copy of each by hand."""
    model, other = (make_model(device, dtype, layout) for layout in (before, OTHER[before]))
    opt = trained(model, param_format, moment_format, ema_decay=0.9, ema_format="bfloat16")
    other.load_state_dict(model.state_dict())
    twin = FusedAdamW(other.parameters())
    state = opt.state_dict()
    for p, entry in zip(other.parameters(), state["state"].values(), strict=True):
        for key, value in entry.items():
            if value.shape == p.shape:
                entry[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
    twin.load_state_dict(state)
    relay(model, OTHER[before])
    train((opt, twin), Gradients(5), 2)
    assert_same_bits(opt, twin)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_are_loaded_in_the_new_layout(device: torch.device, dtype: torch.dtype) -> None:
    """`load_fp32_weights` and `convert` of a re-laid model write remainders where its elements are now."""
    model, unchanged = (make_model(device, dtype, torch.contiguous_format) for _ in range(2))
    opt, twin = (trained(each, "split32", "float32") for each in (model, unchanged))
    weights = [-2 * x for x in opt.fp32_weights().values()]
    relay(model, torch.channels_last)
    for each in (opt, twin):
        each.load_fp32_weights(weights)
        assert_values([*each.fp32_weights().values()], weights)
    assert opt.state[model.weight]["param_remainder"].stride() == model.weight.stride()
    relay(model, torch.contiguous_format)
    for each in (opt, twin):
        each.convert(param_format="split24")
    assert_same_bits(opt, twin)
    assert not torch.equal(opt.fp32_weights()[model.weight], weights[0]), "24 bits hold everything here"


# --- codes ------------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("param_format", ["native", "split24", "split32"])
def test_codes_of_another_layout_are_refused(
    device: torch.device, param_format: str, before: torch.memory_format
) -> None:
    """By a step, by loading, by `convert`, and nothing is written; exported and loaded back, training goes on.

    Moments and weights are then those of before.
    """
    model = make_model(device, torch.bfloat16, before)
    opt = trained(model, param_format, "8bit")
    relay(model, OTHER[before])
    saved, untouched = opt.state_dict(), snapshot(opt)
    gradients = Gradients(5)
    gradients.give(params_of(opt))
    uses = opt.step, lambda: opt.convert(moment_format="float32"), lambda: opt.load_state_dict(saved)
    for use in uses:
        with pytest.raises(ValueError, match=r"exp_avg_code of .*\[0\] has strides .*convert\(moment_format='float32'"):
            use()
        assert_unchanged(untouched, snapshot(opt))
    expected, weights = exchanged(opt), opt.fp32_weights()
    opt.load_state_dict(opt.export_state_dict())
    assert_values(exchanged(opt)[2:], expected[2:])
    opt.load_fp32_weights(weights)
    assert_values(exchanged(opt)[:2], expected[:2])
    steps = [float(opt.state[p]["step"]) for p in model.parameters()]
    train((opt,), gradients, 1)
    assert [float(opt.state[p]["step"]) for p in model.parameters()] == [step + 1 for step in steps]
    assert opt.state[model.weight]["exp_avg_code"].stride() == model.weight.stride()


@both_ways
@pytest.mark.parametrize("param_format", ["native", "split24", "split32"])
def test_codes_are_converted_before_the_layout_changes(
    device: torch.device, param_format: str, before: torch.memory_format
) -> None:
    """The other way out: float32 moments while the layout changes, then 8 bits again; the values of before."""
    model = make_model(device, torch.bfloat16, before)
    opt = trained(model, param_format, "8bit")
    expected = exchanged(opt)
    opt.convert(moment_format="float32")
    relay(model, OTHER[before])
    assert_values(exchanged(opt), expected)
    opt.convert(moment_format="8bit")
    assert opt.state[model.weight]["exp_avg_code"].stride() == model.weight.stride()
    assert_values(exchanged(opt)[:2], expected[:2])
    train((opt,), Gradients(5), 1)
