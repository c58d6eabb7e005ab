"""Models whose dtype changes between steps (`model.half()`), beside remainders of the weights of before.

What a step, reading weights and loading them make of such models is in test_interchange.py; here are parameters that no
step looks at, and what changes nothing.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pairs import REMAINDER_KEYS, Gradients, assert_unchanged, bits, params_of, snapshot

from adamw_kernels import FusedAdamW

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SHAPE = (67, 63)  # 4,221 elements: 8-bit moments

# One of these dtypes to the other, whose remainders look alike, and to one that has none.
casts = pytest.mark.parametrize(
    ("before", "after"),
    [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
each_split = pytest.mark.parametrize("param_format", ["split24", "split32"])


def train(opt: FusedAdamW, gradients: Gradients, present: tuple[bool, ...] = (True, True)) -> None:
    """Step on the next gradients; where not `present`, a parameter has none."""
    gradients.give(params_of(opt), present=present)
    opt.step()


def trained(device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[torch.nn.ParameterList, FusedAdamW]:
    """A model of two parameters and its optimizer after some steps."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(2)]
    model = torch.nn.ParameterList(values)
    opt = FusedAdamW(model.parameters(), **HYPER | options)
    gradients = Gradients()
    for _ in range(3):
        train(opt, gradients)
    return model, opt


@pytest.fixture
def dropped() -> Iterator[Callable[[], list[str]]]:
    """The places of the parameters whose remainders a warning has said to be dropped since the last call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def places() -> list[str]:
            found = [str(warning.message) for warning in caught if "param_remainder" in str(warning.message)]
            caught.clear()
            assert all("is dropped: the cast did not know of it" in message for message in found)
            return [message.split(" is ")[0] for message in found]

        yield places


FIRST, SECOND = (f"param_groups[0]['params'][{i}]" for i in range(2))


@each_split
@casts
def test_idle_parameter(
    device: torch.device, before: torch.dtype, after: torch.dtype, param_format: str, dropped: Callable[[], list[str]]
) -> None:
    """A parameter without a gradient in the next step: its remainder goes, too, once, and is not taken up later."""
    model, opt = trained(device, before, param_format=param_format)
    model.to(after)
    casted = [p.detach().clone() for p in model.parameters()]
    first, second = model.parameters()
    opt.param_groups[0]["lr"] = 0.0
    gradients = Gradients(5)
    train(opt, gradients, (True, False))
    assert sorted(dropped()) == [FIRST, SECOND]
    key = REMAINDER_KEYS[param_format]
    assert key not in opt.state[second] and (key in opt.state[first]) == (after != torch.float32)
    assert torch.equal(opt.fp32_weights()[second], casted[1].float())
    for present in ((True, True), (False, True)):
        train(opt, gradients, present)
    assert dropped() == []
    for p, was in zip(model.parameters(), casted, strict=True):
        assert torch.equal(p, was) and torch.equal(opt.fp32_weights()[p], was.float())


@each_split
@casts
def test_only_an_idle_parameter_is_recast(
    device: torch.device, before: torch.dtype, after: torch.dtype, param_format: str, dropped: Callable[[], list[str]]
) -> None:
    """Nothing of what a warm step looks at has changed: the remainder goes when the parameter has a gradient again."""
    model, opt = trained(device, before, param_format=param_format)
    _, second = model.parameters()
    second.data = second.data.to(after)
    casted = second.detach().clone()
    second.grad = None
    opt.param_groups[0]["lr"] = 0.0
    gradients = Gradients(5)
    for present in ((True, False), (True, True)):
        train(opt, gradients, present)
    assert dropped() == [SECOND]
    assert torch.equal(second, casted) and torch.equal(opt.fp32_weights()[second], casted.float())


def test_remainder_is_kept_where_warnings_are_errors(device: torch.device) -> None:
    """A warning that is raised stops every call, not only the first: no remainder is read beside another dtype."""
    model, opt = trained(device, torch.bfloat16)
    model.half()
    before = snapshot(opt)
    Gradients(5).give(params_of(opt))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for use in (opt.step, opt.fp32_weights, lambda: opt.convert(param_format="split24"), opt.step):
            with pytest.raises(UserWarning, match="param_remainder, the rest of a 16-bit weight, is dropped"):
                use()
            assert_unchanged(before, snapshot(opt))
    model.bfloat16()
    opt.step()


# --- what changes nothing ---------------------------------------------------------------------------------------------

NOTHING: dict[str, Callable[[FusedAdamW], Any]] = {
    "formats": FusedAdamW.formats,
    "convert-unknown": lambda opt: opt.convert(param_format="split8"),
    "convert-both-unknown": lambda opt: opt.convert(param_format="native", moment_format="4bit"),
    "weights-too-few": lambda opt: opt.load_fp32_weights([torch.ones(SHAPE)]),
    "weights-of-another-shape": lambda opt: opt.load_fp32_weights([torch.ones(SHAPE), torch.ones(3)]),
    "weights-of-another-type": lambda opt: opt.load_fp32_weights([torch.ones(SHAPE), torch.ones(SHAPE).int()]),
    "weights-on-meta": lambda opt: opt.load_fp32_weights([torch.ones(SHAPE), torch.ones(SHAPE, device="meta")]),
}


@each_split
@pytest.mark.parametrize("use", NOTHING.values(), ids=NOTHING.keys())
def test_remainders_stay(
    device: torch.device, param_format: str, use: Callable[[FusedAdamW], Any], dropped: Callable[[], list[str]]
) -> None:
    """`formats()` and calls that fail leave the remainders of a recast model, and say nothing: it may be cast back."""
    model, opt = trained(device, torch.bfloat16, param_format=param_format)
    exact = opt.fp32_weights()
    stored = [p.detach().clone() for p in model.parameters()]
    model.half()
    before, groups = snapshot(opt), [{**opt.defaults}, *({**group} for group in opt.param_groups)]
    if use is FusedAdamW.formats:
        assert {*opt.formats().values()} == {(param_format, "float32")}
    else:
        with pytest.raises((TypeError, ValueError)):
            use(opt)
    assert dropped() == []
    assert_unchanged(before, snapshot(opt))
    assert [opt.defaults, *opt.param_groups] == groups
    for p, was in zip(model.parameters(), stored, strict=True):
        p.data = was
    assert all(torch.equal(bits(x), bits(exact[p])) for p, x in opt.fp32_weights().items())
    train(opt, Gradients(5))
    assert dropped() == []


def test_conversion_that_a_damaged_state_stops(device: torch.device, dropped: Callable[[], list[str]]) -> None:
    """The last parameter's state is looked at before the first one's remainder is dropped."""
    model, opt = trained(device, torch.bfloat16)
    model.half()
    _, second = model.parameters()
    whole = opt.state[second]["exp_avg"]
    opt.state[second]["exp_avg"] = torch.zeros(3, device=device)
    before = snapshot(opt)
    weights = [torch.ones(SHAPE, device=device)] * 2
    for use in (lambda: opt.convert(moment_format="8bit"), lambda: opt.load_fp32_weights(weights)):
        with pytest.raises(ValueError, match=r"exp_avg of .*\[1\] has shape \(3,\)"):
            use()
        assert_unchanged(before, snapshot(opt))
    assert dropped() == []
    opt.state[second]["exp_avg"] = whole
    opt.convert(moment_format="8bit")
    assert dropped() == [FIRST, SECOND]
    assert all("exp_avg_code" in opt.state[p] for p in model.parameters())
