"""The options of storage: which names are accepted for which parameters, what they create, and how they may change."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pairs import (
    REMAINDER_KEYS,
    Gradients,
    assert_same_bits,
    assert_unchanged,
    bits,
    copies,
    make_params,
    params_of,
    snapshot,
)
from reference import largest_update

from adamw_kernels import FusedAdamW
from adamw_kernels.formats import MIN_8BIT_NUMEL, MOMENT_FORMATS, PARAM_FORMATS

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
LARGE = (67, 63)  # 4,221 elements: 8-bit moments, the last group of 16 ragged
SMALL = (5, 3)
COMBINATIONS = list(itertools.product(PARAM_FORMATS, MOMENT_FORMATS))
PLACE = r"param_groups\[0\]\['params'\]\[0\]"


def parameter(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = SMALL, seed: int = 0) -> torch.nn.Parameter:
    """A parameter with random values on the CPU."""
    return make_params(torch.device("cpu"), dtype, (shape,), seed)[0]


def train(opt: FusedAdamW, gradients: Gradients, steps: int) -> None:
    """Step on the next gradients."""
    for _ in range(steps):
        gradients.give(params_of(opt))
        opt.step()


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "param_format": (
        dict(param_format="split16"),
        "param_format is 'split16'; expected one of auto, native, stochastic, split24, split32",
    ),
    "param_format-dtype": (dict(param_format=torch.float32), "param_format is torch.float32; expected one of auto"),
    "param_format-none": (dict(param_format=None), "param_format is None; expected one of auto"),
    "moment_format": (dict(moment_format="fp8"), "moment_format is 'fp8'; expected one of float32, bfloat16, 8bit"),
    "moment_format-auto": (dict(moment_format="auto"), "moment_format is 'auto'; expected one of float32"),
    "moment_format-number": (dict(moment_format=8), "moment_format is 8; expected one of float32, bfloat16, 8bit"),
    "update_bound-zero": (dict(update_bound=0.0), r"update_bound is 0\.0; expected 'auto', None or a number above 0"),
    "update_bound-negative": (dict(update_bound=-1), "update_bound is -1; expected 'auto', None or a number above 0"),
    "update_bound-nan": (dict(update_bound=math.nan), "update_bound is nan; expected 'auto', None or a number above 0"),
    "update_bound-bool": (dict(update_bound=True), "update_bound is True; expected 'auto', None or a number above 0"),
    "update_bound-word": (dict(update_bound="off"), "update_bound is 'off'; expected 'auto', None or a number above 0"),
    "update_bound-tensor": (dict(update_bound=torch.ones(2)), r"update_bound is tensor\(\[1\., 1\.\]\); expected"),
    "amsgrad": (
        dict(amsgrad=True, moment_format="8bit"),
        "amsgrad=True with moment_format='8bit': a running maximum .* expected moment_format='float32', or amsgrad=F",
    ),
    "amsgrad-bfloat16": (dict(amsgrad=True, moment_format="bfloat16"), "amsgrad=True with moment_format='bfloat16'"),
}
BAD = pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())


@BAD
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    """Unknown formats, bounds that are none and contradictions, each with what is accepted."""
    with pytest.raises(ValueError, match=f"^FusedAdamW: {message}"):
        FusedAdamW([parameter()], **options)


@BAD
def test_group_is_refused(options: dict[str, Any], message: str) -> None:
    """The same in one group of the constructor, and in one that is added, which leaves the optimizer as it was."""
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {message}"):
        FusedAdamW([dict(params=[parameter()]), dict(params=[parameter()], **options)])
    opt = FusedAdamW([parameter()])
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {message}"):
        opt.add_param_group(dict(params=[parameter()], **options))
    assert len(opt.param_groups) == 1


def test_contradiction_between_a_group_and_the_defaults() -> None:
    """The constructor's format counts for a group that asks for amsgrad, and the other way round."""
    for whole, own in (
        (dict(moment_format="8bit"), dict(amsgrad=True)),
        (dict(amsgrad=True), dict(moment_format="8bit")),
    ):
        with pytest.raises(ValueError, match=r"^param_groups\[0\]: amsgrad=True with moment_format='8bit'"):
            FusedAdamW([dict(params=[parameter()], **own)], **whole)


@pytest.mark.parametrize("moment_format", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_moments_too_coarse_for_their_parameter(dtype: torch.dtype, moment_format: str) -> None:
    """16-bit and 8-bit moments beside float64 or complex parameters: the parameter is named, nothing is changed."""
    what = f"has dtype {dtype}, and moment_format is '{moment_format}'; .* Use moment_format='float32'"
    with pytest.raises(TypeError, match=rf"^param_groups\[0\]\['params'\]\[1\] {what}"):
        FusedAdamW([parameter(), parameter(dtype)], moment_format=moment_format)
    with pytest.raises(TypeError, match=rf"^parameter 'b' \(param_groups\[0\]\['params'\]\[1\]\) {what}"):
        FusedAdamW([("a", parameter()), ("b", parameter(dtype))], moment_format=moment_format)
    opt = FusedAdamW([parameter()], moment_format=moment_format)
    with pytest.raises(TypeError, match=rf"^param_groups\[1\]\['params'\]\[0\] {what}"):
        opt.add_param_group(dict(params=[parameter(dtype)]))
    assert len(opt.param_groups) == 1
    opt.add_param_group(dict(params=[parameter(dtype)], moment_format="float32"))


LATER: dict[str, tuple[dict[str, Any], torch.dtype, type[Exception], str]] = {
    "param_format": (dict(param_format="fp24"), torch.bfloat16, ValueError, "param_format .*is 'fp24'; expected"),
    "moment_format": (dict(moment_format=None), torch.bfloat16, ValueError, "moment_format .*is None; expected"),
    "update_bound": (dict(update_bound=-1.0), torch.float32, ValueError, r"update_bound .*is -1\.0; expected"),
    "update_bound-nan": (dict(update_bound=math.nan), torch.float32, ValueError, "update_bound .*is nan; expected"),
    "amsgrad": (
        dict(amsgrad=True, moment_format="8bit"),
        torch.bfloat16,
        ValueError,
        r"amsgrad=True (beside|with) moment_format='8bit'",
    ),
    "float64": (dict(moment_format="8bit"), torch.float64, TypeError, r"param_groups\[1\].* has dtype torch\.float64"),
}


@pytest.mark.parametrize(("options", "dtype", "kind", "message"), LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("way", ["written-into-the-group", "loaded"])
def test_bad_option_found_later(
    device: torch.device, way: str, options: dict[str, Any], dtype: torch.dtype, kind: type[Exception], message: str
) -> None:
    """Written into a group, it is refused by the next step before anything is converted; loaded, at once."""
    params = make_params(device, torch.bfloat16, (LARGE,)) + make_params(device, dtype, (SMALL,), seed=1)
    opt = FusedAdamW([dict(params=params[:1]), dict(params=params[1:])], **HYPER)
    train(opt, Gradients(), 2)
    if way == "loaded":
        state = opt.state_dict()
        state["param_groups"] = [dict(group) for group in state["param_groups"]]
        state["param_groups"][0]["moment_format"] = "8bit"
        state["param_groups"][1].update(options)
    else:
        opt.param_groups[0]["moment_format"] = "8bit"  # is fine, and must wait
        opt.param_groups[1].update(options)
    before, groups = snapshot(opt), [{**group} for group in opt.param_groups]
    with pytest.raises(kind, match=message) as raised:
        opt.load_state_dict(state) if way == "loaded" else opt.step()
    assert "param_groups[1]" in str(raised.value)
    assert_unchanged(before, snapshot(opt))
    assert opt.param_groups == groups
    opt.param_groups[0]["moment_format"] = "8bit"
    for key in options:
        opt.param_groups[1][key] = False if key == "amsgrad" else {"moment_format": "float32"}.get(key, "auto")
    opt.step()
    assert opt.state[params[0]]["exp_avg_code"].dtype == torch.int8


# --- betas that 8-bit moments cannot hold -----------------------------------------------------------------------------

# After the first gradient |m| is (1 - beta1) / sqrt(1 - beta2) times sqrt(v), of which 8 bits hold 21.
every_bad_betas = pytest.mark.parametrize(
    ("betas", "ratio"), [((0.9, 0.99999), "31.6"), ((0.0, 0.999), "31.6"), ((0.9, 0.99998), "22.4")], ids=str
)


def cannot_hold(betas: tuple[float, float], ratio: str) -> str:
    """What the error says, as a pattern."""
    words = f"moment_format='8bit' with betas=({betas[0]}, {betas[1]}): first moments would be {ratio} times the root"
    return re.escape(words) + ".* 8 bits hold 21; expected a smaller beta2, a larger beta1, or moment_format='bfloat16'"


@every_bad_betas
def test_betas_of_8_bit_moments(betas: tuple[float, float], ratio: str) -> None:
    """Refused by the constructor, in a group, and in one that is added; other formats take them."""
    message, options = cannot_hold(betas, ratio), dict(betas=betas, moment_format="8bit")
    with pytest.raises(ValueError, match=f"^FusedAdamW: {message}"):
        FusedAdamW([parameter()], **options)
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: {message}"):
        FusedAdamW([dict(params=[parameter()], betas=betas)], moment_format="8bit")
    opt = FusedAdamW([parameter()], betas=betas)
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {message}"):
        opt.add_param_group(dict(params=[parameter()], moment_format="8bit"))
    assert len(opt.param_groups) == 1
    opt.add_param_group(dict(params=[parameter()], moment_format="bfloat16"))


@every_bad_betas
def test_betas_found_later(device: torch.device, betas: tuple[float, float], ratio: str) -> None:
    """By loading and by `convert`, which change nothing."""
    message = cannot_hold(betas, ratio)
    plain, coded = (
        FusedAdamW(make_params(device, torch.bfloat16, (LARGE, SMALL)), **HYPER | options)
        for options in (dict(betas=betas), dict(moment_format="8bit"))
    )
    for opt in (plain, coded):
        train(opt, Gradients(), 1)
    before = snapshot(plain), snapshot(coded)
    saved = plain.state_dict()
    with pytest.raises(ValueError, match=rf"^loaded param_groups\[0\]: {message}"):
        coded.load_state_dict(saved)
    with pytest.raises(ValueError, match=rf"^convert: param_groups\[0\]: {message}"):
        plain.convert(moment_format="8bit")
    assert_unchanged(before[0], snapshot(plain))
    assert_unchanged(before[1], snapshot(coded))
    assert coded.param_groups[0]["betas"] == HYPER["betas"] and "moment_format" not in plain.param_groups[0]


@every_bad_betas
@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
@pytest.mark.parametrize("steps", [0, 2])
def test_betas_changed_between_steps(
    device: torch.device, steps: int, moment_format: str, betas: tuple[float, float], ratio: str
) -> None:
    """The next step raises, in the second group too, before anything is created, converted or written."""
    groups = [dict(params=make_params(device, torch.bfloat16, (LARGE, SMALL), seed)) for seed in range(2)]
    opt = FusedAdamW(groups, moment_format=moment_format, **HYPER)
    gradients = Gradients()
    train(opt, gradients, steps)
    before = snapshot(opt)
    for group in opt.param_groups:
        group["moment_format"] = "8bit"
    opt.param_groups[1]["betas"] = betas
    gradients.give(params_of(opt))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {cannot_hold(betas, ratio)}"):
            opt.step()
        assert_unchanged(before, snapshot(opt))
    opt.param_groups[1]["moment_format"] = "bfloat16"
    opt.step()
    assert [opt.state[group["params"][0]].keys() >= {"exp_avg_code"} for group in opt.param_groups] == [True, False]


@pytest.mark.parametrize("betas", [(0.9, 0.9999), (0.5, 0.999), (0.9, 1 - 2.27e-5), (0.0, 0.0)], ids=str)
def test_betas_that_8_bit_moments_hold(device: torch.device, betas: tuple[float, float]) -> None:
    """Accepted everywhere; the first moment that is stored after the first gradient is not cut."""
    opt = FusedAdamW(make_params(device, torch.float32, (LARGE,)), moment_format="8bit", **HYPER | dict(betas=betas))
    opt.add_param_group(dict(params=[parameter()]))
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    m = opt.export_state_dict()["state"][0]["exp_avg"]
    assert ((m - (1 - betas[0])).abs() <= (1 - betas[0]) / 100).all()  # the nearest of 127 steps up to 21, or closer
    opt.convert(moment_format="float32")
    opt.convert(moment_format="8bit")
    opt.step()


# --- the warning ------------------------------------------------------------------------------------------------------


def warnings_of(run: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """Every warning about native weights while `run` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [warning for warning in caught if "param_format='native'" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_16_bit_weights_warn_once(dtype: torch.dtype) -> None:
    """One warning an optimizer, at the caller's line, however many groups, steps and parameters."""
    opt: Any = None

    def use() -> None:
        nonlocal opt
        groups = [dict(params=[parameter(dtype), parameter(dtype)]), dict(params=[parameter(dtype)])]
        opt = FusedAdamW(groups, param_format="native")
        opt.add_param_group(dict(params=[parameter(dtype)]))
        train(opt, Gradients(), 2)

    (warning,) = warnings_of(use)
    assert warning.category is UserWarning and warning.filename == __file__
    assert f"rounds {dtype} weights to nearest" in str(warning.message)
    assert all(word in str(warning.message) for word in ("'stochastic'", "'split24'", "'split32'"))
    later = FusedAdamW([parameter(dtype)])
    (warning,) = warnings_of(lambda: later.add_param_group(dict(params=[parameter(dtype)], param_format="native")))
    assert warning.filename == __file__


def test_nothing_else_warns() -> None:
    """Neither native weights that hold everything, nor any other format."""
    for param_format, dtype in itertools.product(PARAM_FORMATS, (torch.float32, torch.float64, torch.complex64)):
        assert not warnings_of(lambda d=dtype, f=param_format: FusedAdamW([parameter(d)], param_format=f))
    for param_format in ("auto", "stochastic", "split24", "split32"):
        assert not warnings_of(lambda f=param_format: train(FusedAdamW([parameter()], param_format=f), Gradients(), 1))


# --- what is stored ---------------------------------------------------------------------------------------------------

MOMENTS_IN = {
    "float32": dict(exp_avg=torch.float32, exp_avg_sq=torch.float32),
    "bfloat16": dict(exp_avg=torch.bfloat16, exp_avg_sq=torch.bfloat16),
    "8bit": dict(
        exp_avg_code=torch.int8,
        exp_avg_sq_code=torch.uint8,
        moment_groups=torch.int16,
        exp_avg_sq_scale=torch.float32,
    ),
}
REMAINDERS = {"split24": torch.int8, "split32": torch.int16}

LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.randn(67, 63),
    "whole-rows": lambda: torch.randn(66, 80),
    "transposed": lambda: torch.randn(63, 67).t(),
    "channels_last": lambda: torch.randn(5, 7, 11, 13).to(memory_format=torch.channels_last),
    "one-dimension": lambda: torch.randn(4096),
}


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
@pytest.mark.parametrize("param_format", PARAM_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_tensors(device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str) -> None:
    """Keys, dtypes, shapes and layouts of what a step creates; wider weights need nothing beside them."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(make().to(device, dtype)) for make in LAYOUTS.values()]
    opt = FusedAdamW(params, param_format=param_format, moment_format=moment_format, **HYPER)
    train(opt, Gradients(), 1)
    expected = {"step": torch.float32} | MOMENTS_IN[moment_format]
    if dtype != torch.float32 and param_format in REMAINDERS:
        expected[REMAINDER_KEYS[param_format]] = REMAINDERS[param_format]
    for p in params:
        state = opt.state[p]
        assert {key: value.dtype for key, value in state.items()} == expected
        for key, value in state.items():
            assert value.device == p.device
            if key in ("step", "exp_avg_sq_scale"):
                assert value.shape == ()
            elif key == "moment_groups":
                whole_rows = p.shape[-1] % 16 == 0 and p.is_contiguous()
                shape = (*p.shape[:-1], p.shape[-1] // 16) if whole_rows else (-(-p.numel() // 16),)
                assert value.shape == shape and value.is_contiguous()
            else:
                assert (value.shape, value.stride()) == (p.shape, p.stride()), key


def test_formats_says_what_was_chosen(device: torch.device) -> None:
    """`formats()`: what "auto" stands for, and that 8-bit moments begin at 4,096 elements; before and after a step."""
    assert MIN_8BIT_NUMEL == 4096
    shapes = (), (4095,), (4096,), (64, 64), (13, 315)  # the last: 4,095
    narrow, wide = make_params(device, torch.bfloat16, shapes), make_params(device, torch.float32, shapes)
    double = make_params(device, torch.float64, shapes)
    groups = [
        dict(params=narrow, moment_format="8bit"),
        dict(params=wide, moment_format="8bit", param_format="split24"),
        dict(params=double, param_format="stochastic"),
    ]
    opt = FusedAdamW(groups)
    for _ in range(2):
        formats = opt.formats()
        assert [*formats] == [*narrow, *wide, *double]
        moments = ["float32", "float32", "8bit", "8bit", "float32"]
        assert [formats[p] for p in narrow] == [("split32", name) for name in moments]
        assert [formats[p] for p in wide] == [("native", name) for name in moments]
        assert {formats[p] for p in double} == {("native", "float32")}
        train(opt, Gradients(), 1)
    for p, (_, moments_of_p) in formats.items():
        assert ("exp_avg_code" in opt.state[p], "exp_avg" in opt.state[p]) == (
            moments_of_p == "8bit",
            moments_of_p != "8bit",
        )


def test_default_options_are_not_in_groups(device: torch.device) -> None:
    """Without a format asked for, groups and their state dict have torch's keys alone, also if defaults are spelled."""
    theirs = torch.optim.AdamW([parameter()])
    for options in ({}, dict(param_format="auto", moment_format="float32", update_bound="auto")):
        opt = FusedAdamW(make_params(device, torch.bfloat16), **options)
        train(opt, Gradients(), 1)
        assert opt.param_groups[0].keys() == theirs.param_groups[0].keys()
        assert opt.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    opt = FusedAdamW([parameter()], param_format="split24", moment_format="bfloat16", update_bound=None)
    further = {key: value for key, value in opt.param_groups[0].items() if key not in theirs.param_groups[0]}
    assert further == dict(param_format="split24", moment_format="bfloat16", update_bound=None, seed=0)
    opt.convert(param_format="auto", moment_format="float32")
    assert opt.param_groups[0].keys() - theirs.param_groups[0].keys() == {"update_bound"}


# --- options that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.permutations([*COMBINATIONS[::2], ("split32", "float32")], 2)]
)
def test_options_written_into_a_group_convert_the_state(
    device: torch.device, before: tuple[str, str], after: tuple[str, str]
) -> None:
    """The next step converts, not sooner, with the bits of `convert()`; weights stay if the new format holds them."""
    params = make_params(device, torch.bfloat16, (LARGE, SMALL))
    gradients = Gradients()
    opt = FusedAdamW(params, param_format=before[0], moment_format=before[1], **HYPER)
    train(opt, gradients, 3)
    twin = FusedAdamW(copies(params), param_format=before[0], moment_format=before[1], **HYPER)
    twin.load_state_dict(opt.state_dict())
    exact = opt.fp32_weights()

    left_alone = snapshot(opt)
    opt.param_groups[0].update(param_format=after[0], moment_format=after[1])
    assert_unchanged(left_alone, snapshot(opt))
    twin.convert(param_format=after[0], moment_format=after[1])
    keeps = before[0] in ("native", "stochastic", after[0]) or after[0] == "split32"
    converted = twin.fp32_weights()
    for p, q in zip(params, params_of(twin), strict=True):
        assert torch.equal(exact[p], converted[q]) or not keeps
    gradients.give(params, params_of(twin))
    for optimizer in (opt, twin):
        optimizer.step()
    assert_same_bits(opt, twin)
    for p, moments in zip(params, (after[1], "float32" if after[1] == "8bit" else after[1]), strict=True):
        found = {key: value.dtype for key, value in opt.state[p].items()}
        rest = {key: found.pop(key) for key in REMAINDER_KEYS.values() if key in found}
        assert {key: found[key] for key in found.keys() - {"step"}} == MOMENTS_IN[moments]
        assert rest == ({REMAINDER_KEYS[after[0]]: REMAINDERS[after[0]]} if after[0] in REMAINDERS else {})


@pytest.mark.parametrize(
    "change",
    [
        dict(param_format="stochastic"),
        dict(param_format="split24"),
        dict(moment_format="bfloat16"),
        dict(moment_format="8bit"),
        dict(update_bound=0.5),
    ],
    ids=str,
)
def test_changed_option_counts_at_once(device: torch.device, change: dict[str, Any]) -> None:
    """The very next step has the bits of an optimizer that was constructed with the option, and no others."""
    params = make_params(device, torch.bfloat16, (LARGE,))
    opt = FusedAdamW(params, **HYPER)
    gradients = Gradients()
    train(opt, gradients, 2)
    others = [FusedAdamW(copies(params), **options, **HYPER) for options in (change, {})]
    for other in others:
        other.load_state_dict(opt.state_dict())
    opt.param_groups[0].update(change)
    gradients.give(params, *map(params_of, others))
    for optimizer in (opt, *others):
        optimizer.step()
    constructed, unchanged = others
    assert_same_bits(opt, constructed)
    tensors = [dict(snapshot(optimizer)) for optimizer in (opt, unchanged)]
    assert any(
        tensors[0].keys() != tensors[1].keys() or not torch.equal(bits(value), bits(tensors[1][key]))
        for key, value in tensors[0].items()
    ), "the option has no effect"


def test_unchanged_options_keep_the_plan(device: torch.device) -> None:
    """Formats, bounds and warm steps: one plan, built once."""
    params = make_params(device, torch.bfloat16, (LARGE, SMALL))
    opt = FusedAdamW(params, param_format="split24", moment_format="8bit", update_bound=2.0, **HYPER)
    train(opt, Gradients(), 1)
    plan = opt._internals.stepper.plan
    train(opt, Gradients(), 3)
    assert opt._internals.stepper.plan is plan
    opt.param_groups[0]["update_bound"] = 3.0
    train(opt, Gradients(), 1)
    assert opt._internals.stepper.plan is not plan


# --- the bound of updates ---------------------------------------------------------------------------------------------

STEPS = 1_000_000


def with_large_moments(device: torch.device, shape: tuple[int, ...], **options: Any) -> FusedAdamW:
    """Loaded moments far beyond what gradients leave: |m_hat| is 90 times sqrt(v_hat), in 8 bits more than 20 times."""
    p = torch.nn.Parameter(torch.zeros(shape, device=device))
    p.grad = torch.zeros_like(p)
    opt = FusedAdamW([p], lr=1.0, eps=0.0, weight_decay=0.0, **options)
    state = opt.state_dict()
    state["state"][0] = dict(step=STEPS, exp_avg=torch.ones(shape), exp_avg_sq=torch.full(shape, 1e-4))
    opt.load_state_dict(state)
    return opt


def update_of(opt: FusedAdamW) -> torch.Tensor:
    """|m_hat| / sqrt(v_hat) as a step applies it."""
    (p,) = params_of(opt)
    p.data.zero_()
    opt.step()
    return -p.detach()


def limit_at(step: int, betas: tuple[float, float]) -> float:
    """What exact moments cannot exceed, in float32."""
    return float(np.float32(largest_update(step, *betas)))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.9, 0.9995)], ids=str)
@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
def test_update_bound(device: torch.device, moment_format: str, betas: tuple[float, float]) -> None:
    """A number bounds any moments; "auto" rounded ones, by the limit of exact ones under these betas; None nothing."""
    options: dict[str, Any] = dict(betas=betas, moment_format=moment_format)
    at_most, free, auto = (
        update_of(with_large_moments(device, LARGE, update_bound=bound, **options)) for bound in (2.0, None, "auto")
    )
    limit = limit_at(STEPS + 1, betas)
    assert (at_most == 2.0).all()
    assert (free > 1.5 * limit).all()
    if moment_format == "float32":
        assert torch.equal(auto, free)
    else:
        assert (auto == limit).all()


def test_update_bound_of_the_default_betas(device: torch.device) -> None:
    """7.27 in the long run and a thousandth for rounding; none for tensors that are too small for 8-bit moments."""
    auto, free = (update_of(with_large_moments(device, shape, moment_format="8bit")) for shape in (LARGE, SMALL))
    assert round(auto[0, 0].item() / 1.001, 2) == 7.27
    assert (free > 90).all()


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS[1:])
def test_update_bound_follows_the_betas(device: torch.device, moment_format: str) -> None:
    """The bound is that of the betas of this very step, without a new plan."""
    opt = with_large_moments(device, LARGE, moment_format=moment_format)
    plans = []
    for step, betas in enumerate([(0.9, 0.999), (0.9, 0.99), (0.8, 0.999)], STEPS + 1):
        opt.param_groups[0]["betas"] = betas
        assert (update_of(opt) == limit_at(step, betas)).all()
        plans.append(opt._internals.stepper.plan)
    assert plans[0] is plans[1] is plans[2]


# --- launches ---------------------------------------------------------------------------------------------------------


def launches(groups: list[dict[str, Any]]) -> list[tuple[torch.dtype, torch.dtype, str]]:
    """What each update launch of a step is made for."""
    opt = FusedAdamW(groups, **HYPER)
    train(opt, Gradients(), 1)
    (table,) = opt._internals.stepper.plan.tables
    assert sum(batch.end - batch.begin for batch in table.batches) == table.num_chunks
    return [(batch.param_dtype, batch.grad_dtype, batch.moment_format) for batch in table.batches]


def test_one_launch_a_combination(device: torch.device) -> None:
    """All weights' formats share a launch; each format of the moments, and each pair of dtypes, has one."""

    def group(
        dtype: torch.dtype, moment_format: str, param_format: str = "auto", shape: tuple[int, ...] = LARGE
    ) -> Any:
        params = make_params(device, dtype, (shape,) * 3)
        return dict(params=params, moment_format=moment_format, param_format=param_format)

    narrow, wide = torch.bfloat16, torch.float32
    every_weight = [group(narrow, "float32", param_format) for param_format in PARAM_FORMATS]
    assert launches(every_weight) == [(narrow, narrow, "float32")]
    every_weight = [group(narrow, "8bit", param_format) for param_format in PARAM_FORMATS]
    assert launches(every_weight) == [(narrow, narrow, "8bit")]
    # What is too small for 8 bits joins the others with float32 moments, of whatever group.
    groups = [group(narrow, "8bit"), group(narrow, "8bit", shape=SMALL), group(narrow, "float32", "split24")]
    assert launches(groups) == [(narrow, narrow, "float32"), (narrow, narrow, "8bit")]
    groups = [group(dtype, moments, weights) for dtype in (narrow, wide) for weights, moments in COMBINATIONS]
    assert launches(groups) == [(dtype, dtype, moments) for moments in MOMENT_FORMATS for dtype in (wide, narrow)]


def test_state_dict_keeps_the_options(device: torch.device) -> None:
    """Formats travel with their group; a checkpoint that does not name one leaves the loading optimizer's."""
    options = dict(param_format="split24", moment_format="8bit", update_bound=3.0)
    saved = FusedAdamW(make_params(device, torch.bfloat16, (LARGE,)), **options)
    train(saved, Gradients(), 1)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    opt = FusedAdamW(copies(params_of(saved)))
    opt.load_state_dict(torch.load(file, weights_only=True))
    assert {key: opt.param_groups[0][key] for key in options} == options
    plain = FusedAdamW(copies(params_of(saved)))
    train(plain, Gradients(), 1)
    opt.load_state_dict(plain.state_dict())
    assert {key: opt.param_groups[0][key] for key in options} == options
    train(opt, Gradients(), 1)
    assert opt.state[params_of(opt)[0]]["exp_avg_code"].dtype == torch.int8
