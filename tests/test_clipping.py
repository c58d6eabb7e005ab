"""Clipping by the gradients' norm: within the step and by itself, against torch's `clip_grad_norm_`.

The bits of norms and clipped steps are compared with the judge in tests/test_whole_step.py. Here: that they mean what
torch's mean, from the argument list to the weights after a run, and what torch's do not promise: accuracy, range, and
gradients that are read only.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from pairs import (
    Gradients,
    assert_agree,
    assert_close,
    assert_unchanged,
    bits,
    copies,
    make_params,
    params_of,
    snapshot,
)
from tolerances import tolerance

import adamw_kernels
from adamw_kernels import FusedAdamW

# The interpreter computes with NumPy, which warns of the overflows and NaN that some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

# How large the gradients of successive steps are; a limit of LIMIT clips the larger ones.
SIZES = (1.0, 0.01, 30.0, 0.02, 5.0, 0.0)
LIMIT = 1.0


def scale_grads(factor: float, *lists: list[Any]) -> None:
    """Multiply every gradient."""
    for p in (p for params in lists for p in params):
        if p.grad is not None:
            p.grad.mul_(factor)


def exact_norm(params: list[Any]) -> torch.Tensor:
    """Return the norm of all gradients, by exact sums of float64 squares."""
    flat = [p.grad.detach().cpu().to(torch.complex128) for p in params if p.grad is not None]
    squares = math.fsum(x * x for grad in flat for x in torch.view_as_real(grad).flatten().tolist())
    return torch.tensor(math.sqrt(squares), dtype=torch.float64)


def grad_bits(params: list[Any]) -> list[Any]:
    """Return every gradient's bytes."""
    return [None if p.grad is None else bits(p.grad).clone() for p in params]


def assert_grads_are(params: list[Any], expected: list[Any]) -> None:
    """Compare every gradient with what `grad_bits` returned."""
    for i, (got, want) in enumerate(zip(grad_bits(params), expected, strict=True)):
        assert (got is None) == (want is None) and (want is None or torch.equal(got, want)), f"gradient {i} was written"


# --- within the step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "host_logic_in_float64"), (torch.float32, "float32_against_torch")], ids=str
)
def test_step_agrees_with_clipping_before_it(path: Path, dtype: torch.dtype, name: str) -> None:
    """`max_grad_norm` gives the weights and moments of `clip_grad_norm_` followed by a step, and writes no gradient."""
    ours = make_params(path.device, dtype)
    theirs = copies(ours)
    fused = FusedAdamW([{"params": ours[:1], "lr": 0.1}, {"params": ours[1:]}], max_grad_norm=LIMIT, **HYPER)
    rival = torch.optim.AdamW([{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:]}], **HYPER)
    gradients = Gradients()
    clipped = []
    for size in SIZES:
        gradients.give(ours, theirs)
        scale_grads(size, ours, theirs)
        before = grad_bits(ours)
        norm = torch.nn.utils.clip_grad_norm_(theirs, LIMIT)
        clipped.append(bool(norm > LIMIT))
        rival.step()
        fused.step()
        assert_grads_are(ours, before)
        assert_agree(fused, rival, name)
        assert_close(fused.grad_norm, norm, "norm_in_float32", f"norm of gradients of size {size}")
    assert clipped == [True, False, True, False, True, False], "both happen"


def test_clipping_comes_before_l2_decay(path: Path) -> None:
    """Clipping comes before L2 decay is added, as it does when gradients are clipped before torch's Adam."""
    ours = make_params(path.device)
    theirs = copies(ours)
    fused = FusedAdamW(ours, decoupled=False, maximize=True, amsgrad=True, max_grad_norm=LIMIT, **HYPER)
    rival = torch.optim.Adam(theirs, maximize=True, amsgrad=True, **HYPER)
    gradients = Gradients()
    for _ in range(3):
        gradients.give(ours, theirs)
        assert torch.nn.utils.clip_grad_norm_(theirs, LIMIT) > LIMIT
        rival.step()
        fused.step()
    assert_agree(fused, rival)


def test_complex_parameters(path: Path) -> None:
    """A complex gradient counts with the squares of both its parts, as in torch."""
    parts = [make_params(path.device, shapes=((2, 3), ()), seed=seed) for seed in (1, 2)]
    ours = [torch.nn.Parameter(torch.complex(a.detach(), b.detach())) for a, b in zip(*parts, strict=True)]
    ours += make_params(path.device, shapes=((4,),))
    theirs = copies(ours)
    fused, rival = FusedAdamW(ours, max_grad_norm=LIMIT, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator).to(path.device)
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, LIMIT)
        assert norm > LIMIT
        rival.step()
        fused.step()
        assert_close(fused.grad_norm, norm, "norm_in_float32", "norm")
    assert_agree(fused, rival)


def expanded(p: torch.Tensor) -> torch.Tensor:
    """Return a gradient that has one value in memory."""
    return torch.full((1,) * p.ndim, 0.7, dtype=p.dtype, device=p.device).expand(p.shape)


GRAD_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda p: torch.randn_like(p).to(memory_format=torch.channels_last),
    "permuted": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype, device=p.device).permute(3, 2, 1, 0),
    "every-other": lambda p: torch.randn(*p.shape[:-1], 2 * p.shape[-1], dtype=p.dtype, device=p.device)[..., ::2],
    "expanded": expanded,
}


@pytest.mark.parametrize("lay", GRAD_LAYOUTS.values(), ids=GRAD_LAYOUTS.keys())
def test_gradients_in_any_layout(path: Path, lay: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Norm, clipped step and `clip_grad_norm_` count each element once, wherever it lies."""
    torch.manual_seed(4)
    ours = make_params(path.device, shapes=((2, 3, 4, 5), (3,)))
    theirs = copies(ours)
    fused, rival = FusedAdamW(ours, max_grad_norm=LIMIT, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    for _ in range(2):
        ours[0].grad, ours[1].grad = lay(ours[0]), torch.ones_like(ours[1])
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)  # torch's cannot write expanded ones
        before = grad_bits(ours)
        assert_close(adamw_kernels.grad_norm(ours), exact_norm(ours), "norm_in_float64", "norm")
        assert torch.nn.utils.clip_grad_norm_(theirs, LIMIT) > LIMIT
        rival.step()
        fused.step()
        assert_grads_are(ours, before)
    assert_agree(fused, rival)
    if lay is not expanded:
        adamw_kernels.clip_grad_norm_(ours, LIMIT)
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p.grad, q.grad, "norm_in_float64", "clipped gradient")


def test_each_group_by_its_own_norm(path: Path) -> None:
    """With `clip_per_group` each group is clipped as by a `clip_grad_norm_` of its own; a group may go without."""
    limits = (0.5, 2.0, None)
    ours = make_params(path.device)
    theirs = copies(ours)
    fused = FusedAdamW(
        [{"params": [p], "max_grad_norm": limit} for p, limit in zip(ours, limits, strict=True)],
        clip_per_group=True,
        **HYPER,
    )
    rival = torch.optim.AdamW([{"params": [p]} for p in theirs], **HYPER)
    gradients = Gradients()
    for size in SIZES[:4]:
        gradients.give(ours, theirs)
        scale_grads(size, ours, theirs)
        total = exact_norm(ours)
        norms = []
        for p, limit in zip(theirs, limits, strict=True):
            norms.append(torch.nn.utils.clip_grad_norm_(p, math.inf if limit is None else limit))
        rival.step()
        fused.step()
        assert fused.group_grad_norms.dtype == torch.float32 and fused.group_grad_norms.device == path.device
        assert_close(fused.group_grad_norms, torch.stack(norms), "norm_in_float32", "norms")
        assert_close(fused.grad_norm, total, "norm_in_float32", "norm of all")
    assert_agree(fused, rival)


def test_groups_clipped_by_the_norm_of_all(path: Path) -> None:
    """Without `clip_per_group` every group's limit is held against the norm of all gradients together."""
    limits = (0.5, 2.0, None)
    ours = make_params(path.device)
    theirs = copies(ours)
    groups = [{"params": [p], "max_grad_norm": limit} for p, limit in zip(ours, limits, strict=True)]
    fused, rival = FusedAdamW(groups, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    gradients = Gradients()
    for _ in range(3):
        gradients.give(ours, theirs)
        norm = exact_norm(ours)
        assert norm > 2.0
        for p, limit in zip(theirs, limits, strict=True):
            p.grad.mul_(1.0 if limit is None else limit / (norm + 1e-6))
        rival.step()
        fused.step()
        assert_close(fused.grad_norm, norm, "norm_in_float32", "norm")
    assert_agree(fused, rival)


def test_group_without_a_gradient_has_norm_zero(path: Path) -> None:
    """A group that has none yet has the norm 0 of its own; it had one, and has none now: 0 again."""
    first, second = make_params(path.device, shapes=((3,), (4,)))
    fused = FusedAdamW([{"params": [first]}, {"params": [second]}], clip_per_group=True, max_grad_norm=1.0)
    ones, nothing = torch.ones_like, (lambda p: None)
    for of_first, of_second in ((ones, nothing), (nothing, ones), (nothing, nothing), (ones, ones)):
        first.grad, second.grad = of_first(first), of_second(second)
        fused.step()
        present = [0.0 if p.grad is None else float(p.numel()) for p in (first, second)]
        expected = torch.tensor(present, dtype=torch.float64).sqrt().float()
        assert torch.equal(fused.group_grad_norms.cpu(), expected)


def test_gradients_that_come_and_go(path: Path) -> None:
    """A gradient counts towards the norm on the steps on which there is one, and never afterwards."""
    ours = make_params(path.device)
    theirs = copies(ours)
    fused, rival = FusedAdamW(ours, max_grad_norm=LIMIT, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    gradients = Gradients()
    present = [(True, False, False), (True, True, False), (False, True, True), (False,) * 3, (True,) * 3]
    for given in present:
        gradients.give(ours, theirs, present=given)
        norm = torch.nn.utils.clip_grad_norm_(theirs, LIMIT)
        rival.step()
        fused.step()
        assert_close(fused.grad_norm, norm, "norm_in_float32", f"norm of {given}")
    assert_agree(fused, rival)


def test_step_without_any_gradient(path: Path) -> None:
    """Before the first gradient a step changes nothing, and its norm is 0."""
    fused = FusedAdamW(make_params(path.device), max_grad_norm=LIMIT, **HYPER)
    before = snapshot(fused)
    fused.step()
    assert_unchanged(before, snapshot(fused))
    assert not fused.state
    assert fused.grad_norm.item() == 0.0 and fused.grad_norm.device == path.device
    assert not fused.last_step_skipped and fused.skipped_steps == 0


def test_empty_tensors(path: Path) -> None:
    """Parameters without elements have a gradient of norm 0 and change nobody else's."""
    shapes = ((0,), (3, 5), (0, 4), (7,), (2, 0))
    ours = make_params(path.device, shapes=shapes)
    theirs = copies(ours)
    fused, rival = FusedAdamW(ours, max_grad_norm=LIMIT, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    Gradients().give(ours, theirs)
    assert_close(adamw_kernels.grad_norm(ours), exact_norm(ours), "norm_in_float64", "norm")
    assert torch.nn.utils.clip_grad_norm_(theirs, LIMIT) > LIMIT
    rival.step()
    fused.step()
    assert_agree(fused, rival)
    assert adamw_kernels.grad_norm(ours[0]) == 0.0
    only_empty = FusedAdamW(make_params(path.device, shapes=((0,), (0, 2))), max_grad_norm=LIMIT)
    Gradients().give(params_of(only_empty))
    only_empty.step()
    assert only_empty.grad_norm == 0.0


def test_closure(device: torch.device) -> None:
    """The norm is that of the gradients which the closure leaves."""
    (p,) = make_params(device, shapes=((5,),))
    fused = FusedAdamW([p], max_grad_norm=0.5)

    def closure() -> torch.Tensor:
        fused.zero_grad()
        loss = (3.0 * p).sum()
        loss.backward()
        return loss

    loss = fused.step(closure)
    assert loss.requires_grad
    assert_close(fused.grad_norm, torch.tensor(3.0 * math.sqrt(5.0)), "norm_in_float32", "norm")


# --- what a step reports and keeps ------------------------------------------------------------------------------------


def test_reported_norm_is_a_tensor_of_its_own(path: Path) -> None:
    """Each read gives a new float32 scalar on the device; later steps do not change those read before."""
    params = make_params(path.device)
    fused = FusedAdamW(params, max_grad_norm=math.inf)
    kept = []
    for factor in (1.0, 2.0, 4.0):
        for p in params:
            p.grad = torch.full_like(p, factor)
        fused.step()
        first, second = fused.grad_norm, fused.grad_norm
        assert (first.dtype, first.shape, first.device) == (torch.float32, torch.Size([]), path.device)
        assert first.data_ptr() != second.data_ptr()
        second.fill_(-1.0)
        kept.append(first)
    expected = exact_norm(params) / 4 * torch.tensor([1.0, 2.0, 4.0])
    assert_close(torch.stack(kept), expected, "norm_in_float32", "norms")


def test_reading_a_norm_that_nobody_measures(device: torch.device) -> None:
    """Without an option that needs a norm an error says why; before the first step and on a fresh copy it is NaN."""
    plain = FusedAdamW(make_params(device))
    Gradients().give(params_of(plain))
    plain.step()
    with pytest.raises(RuntimeError, match=r"grad_norm: nothing asks for .*max_grad_norm="):
        plain.grad_norm  # noqa: B018  # reading it is the test
    with pytest.raises(RuntimeError, match="clip_per_group=True"):
        plain.group_grad_norms  # noqa: B018
    assert not hasattr(plain, "grad_norm") and not hasattr(plain, "group_grad_norms")
    for option in (dict(max_grad_norm=1.0), dict(skip_nonfinite=True), dict(max_skip_norm=1e9)):
        asked = FusedAdamW(make_params(device), **option)
        Gradients().give(params_of(asked))
        for _ in range(2):
            assert asked.grad_norm.isnan() and asked.grad_norm.device == params_of(asked)[0].device
            asked.step()
            assert asked.grad_norm > 0
            asked = copy.deepcopy(asked)
            Gradients().give(params_of(asked))
    with pytest.raises(RuntimeError, match="clip_per_group=True"):
        asked.group_grad_norms  # noqa: B018


def test_warm_steps_build_nothing(path: Path) -> None:
    """With clipping on, new gradients, missing ones, other rates and limits all use the same tables."""
    params = make_params(path.device, torch.float32)
    fused = FusedAdamW(params, max_grad_norm=LIMIT, **HYPER)
    gradients = Gradients()
    gradients.give(params)
    fused.step()
    plan = fused._internals.stepper.plan
    for i in range(5):
        gradients.give(params, present=(True, i % 2 == 0, True))
        fused.param_groups[0]["lr"] = 0.1 / (1 + i)
        fused.param_groups[0]["max_grad_norm"] = float(1 + i)
        fused.step()
        assert fused._internals.stepper.plan is plan
        assert_close(fused.grad_norm, exact_norm(params), "norm_in_float32", "norm")


# --- by itself: arguments like torch's --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adamw_kernels.clip_grad_norm_, torch.nn.utils.clip_grad_norm_),
        (adamw_kernels.grad_norm, torch.nn.utils.get_total_norm),
    ],
    ids=["clip_grad_norm_", "grad_norm"],
)
def test_arguments_are_torchs(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Names, order and defaults are torch's; what is ours comes after them, by keyword only."""
    mine = [*inspect.signature(ours).parameters.values()]
    other = [*inspect.signature(theirs).parameters.values()]
    # get_total_norm takes the gradients themselves and calls them so.
    assert [p.name for p in mine[1 : len(other)]] == [p.name for p in other[1:]]
    assert mine[0].name == "parameters"
    assert [p.default for p in mine[: len(other)]] == [p.default for p in other]
    assert [p.kind for p in mine[: len(other)]] == [p.kind for p in other]
    assert {p.kind for p in mine[len(other) :]} == {inspect.Parameter.KEYWORD_ONLY}


def mixed_params(device: torch.device) -> list[torch.nn.Parameter]:
    """Parameters of every dtype with gradients, and one without."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.complex64)
    params = [make_params(device, dtype, shapes=((6, 5),), seed=i)[0] for i, dtype in enumerate(dtypes)]
    Gradients().give(params)
    return [*params[:2], *make_params(device, shapes=((3,),)), *params[2:]]


CLIPPED = {
    torch.float64: "norm_in_float64",
    torch.bfloat16: "clipped_in_bfloat16",
    torch.float16: "clipped_in_float16",
}


def test_mixed_dtypes(path: Path) -> None:
    """Gradients of all dtypes are measured together, exactly, and each clipped in its own dtype."""
    params = mixed_params(path.device)
    norm = exact_norm(params)
    expected = [None if p.grad is None else p.grad.to(torch.complex128) * (1.0 / (norm + 1e-6)) for p in params]
    got = adamw_kernels.clip_grad_norm_(params, 1.0)
    assert (got.dtype, got.shape, got.device) == (torch.float64, torch.Size([]), path.device)
    assert_close(got, norm, "norm_in_float64", "norm")
    for p, want in zip(params, expected, strict=True):
        if want is None:
            assert p.grad is None
            continue
        assert p.grad.dtype == p.dtype
        assert_close(p.grad, want, CLIPPED.get(p.dtype, "norm_in_float32"), f"clipped gradient, {p.dtype}")
    assert_close(adamw_kernels.grad_norm(params), torch.tensor(1.0), "clipped_in_bfloat16", "norm after clipping")


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("size", [30.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_agrees_with_torchs(path: Path, dtype: torch.dtype, size: float, foreach: bool | None) -> None:
    """The same arguments give the same norm, dtype and clipped gradients, to rounding; torch calls nothing twice."""
    ours = make_params(path.device, dtype)
    theirs = copies(ours)
    Gradients().give(ours, theirs, present=(True, False, True))
    scale_grads(size, ours, theirs)
    norm = adamw_kernels.clip_grad_norm_(ours, LIMIT, 2, False, foreach)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, LIMIT, 2, False, foreach)
    name = "norm_in_float64" if dtype == torch.float64 else "norm_in_float32"
    assert (norm.dtype, norm.shape, norm.device) == (wanted.dtype, wanted.shape, wanted.device)
    assert_close(norm, wanted, name, "norm")
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert_close(p.grad, q.grad, name, "clipped gradient")


@pytest.mark.parametrize("norm_type", [math.inf, 1, 0.5, "inf", 3.0])
def test_other_norms_are_torchs(path: Path, norm_type: Any) -> None:
    """Norms but the 2-norm are torch's own, bit for bit, and so is the clipping by them."""
    ours = make_params(path.device, torch.float32)
    theirs = copies(ours)
    Gradients().give(ours, theirs)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.1, norm_type)
    assert torch.equal(adamw_kernels.grad_norm(ours, norm_type), wanted)
    assert torch.equal(adamw_kernels.clip_grad_norm_(ours, 0.1, norm_type), wanted)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad, q.grad)


def test_forms_of_parameters(path: Path) -> None:
    """One tensor, a list, a tuple, a generator that can be read once: each counts every gradient once."""
    params = make_params(path.device)
    Gradients().give(params)
    norm = adamw_kernels.grad_norm(params)
    assert_close(norm, exact_norm(params), "norm_in_float64", "norm")
    assert torch.equal(adamw_kernels.grad_norm(tuple(params)), norm)
    assert torch.equal(adamw_kernels.grad_norm(p for p in params), norm)
    module = torch.nn.ParameterList(params)
    assert torch.equal(adamw_kernels.grad_norm(module.parameters()), norm)
    assert torch.equal(adamw_kernels.clip_grad_norm_((p for p in params), 0.5), norm)
    assert_close(adamw_kernels.grad_norm(params), torch.tensor(0.5), "clipped_to_the_limit", "norm after clipping")
    before = grad_bits(params[1:])
    alone = adamw_kernels.clip_grad_norm_(params[0], torch.tensor(0.01, device=path.device))
    assert 0.01 < alone < 0.5
    assert_close(adamw_kernels.grad_norm(params[0]), torch.tensor(0.01), "clipped_to_the_limit", "norm of one")
    assert_grads_are(params[1:], before)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_no_gradients(path: Path, norm_type: float) -> None:
    """No parameters, or none that has a gradient: the norm is torch's 0."""
    params = make_params(path.device)
    for nothing in ([], params, params[0], iter(params)):
        norm = adamw_kernels.grad_norm(nothing, norm_type)
        assert torch.equal(norm, torch.nn.utils.get_total_norm([], norm_type))
    assert adamw_kernels.clip_grad_norm_(params, 1.0, norm_type) == 0.0
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_error_if_nonfinite(path: Path, value: float) -> None:
    """It raises torch's error before anything is written; without it, gradients become what torch makes of them."""
    ours = make_params(path.device)
    theirs = copies(ours)
    Gradients().give(ours, theirs)
    for params in (ours, theirs):
        params[1].grad[2] = value
    before = grad_bits(ours)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        adamw_kernels.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        adamw_kernels.grad_norm(ours, error_if_nonfinite=True)
    assert_grads_are(ours, before)
    norm = adamw_kernels.clip_grad_norm_(ours, 1.0)
    assert torch.equal(norm.isnan(), torch.nn.utils.clip_grad_norm_(theirs, 1.0).isnan())
    assert not norm.isfinite()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0), q.grad.nan_to_num(7.0))


def test_refused_gradients(device: torch.device) -> None:
    """What cannot be measured is named by its parameter's place, gradients or none before it."""
    params = make_params(device, torch.float32, shapes=((2, 3), (4,), (5,)))
    params[1].grad, params[2].grad = torch.ones(4, device=device), torch.ones(5, device=device).to_sparse()
    for function in (adamw_kernels.grad_norm, lambda p: adamw_kernels.clip_grad_norm_(p, 0.1)):
        with pytest.raises(RuntimeError, match=r"gradient of parameters\[2\] has layout torch.sparse_coo"):
            function(params)
    half = torch.ones(5, dtype=torch.uint8, device=device)
    integers = torch.nn.Parameter(half, requires_grad=False)
    integers.grad = half.clone()
    with pytest.raises(TypeError, match=r"gradient of parameters\[1\] has dtype torch.uint8; expected one of float32"):
        adamw_kernels.grad_norm([params[1], integers])
    assert torch.equal(params[1].grad, torch.ones(4, device=device)), "nothing was clipped"
    with pytest.raises(ValueError, match="backend='cdua'"):
        adamw_kernels.grad_norm(params[1], backend="cdua")


def test_changes_between_calls_are_seen(path: Path) -> None:
    """Whatever is kept between calls fits the gradients of each: other memory, dtypes, layouts, shapes, none."""
    params = make_params(path.device, torch.float32, shapes=((4, 6), (5,)))

    def check(what: str) -> None:
        norm = adamw_kernels.grad_norm(params)
        assert_close(norm, exact_norm(params), "norm_in_float32", what)

    gradients = Gradients()
    for what in ("first", "new gradients"):
        gradients.give(params)
        check(what)
    params[0].grad.mul_(3.0)
    check("same memory")
    params[1].grad = None
    check("one less")
    gradients.give(params)
    check("one more")
    params[0].grad = torch.randn(6, 4, device=path.device).t()
    check("transposed")
    params[0].grad = torch.randn(4, 1, device=path.device).expand(4, 6)
    check("expanded")
    for p in params:
        p.grad = None
        p.data = p.data.double()
    gradients.give(params)
    check("float64")
    assert adamw_kernels.grad_norm(params).dtype == torch.float64
    for size in (7, 3000, 2):
        params[1].grad = None
        params[1].data = torch.zeros(size, device=path.device)
        params[1].grad = torch.randn(size, device=path.device)
        check(f"{size} elements")
    for i in range(20):  # more lists than any cache keeps, dying as they go
        params = make_params(path.device, torch.float32, shapes=((1 + i,), (2,)), seed=i)
        gradients.give(params)
        check(f"list {i}")


# --- better than torch's ----------------------------------------------------------------------------------------------


def test_norm_of_many_values_is_exact(path: Path) -> None:
    """The norm of millions of float32 values is the exact one, rounded; torch's float32 sums on a CPU are not."""
    interpreted = path.backend == "triton" and path.device.type == "cpu"
    count = 10**5 + 3 if interpreted else 4 * 10**6 + 3
    values = torch.from_numpy(np.random.default_rng(count).random(count, np.float32) + 0.5)
    p = torch.nn.Parameter(torch.zeros(count, device=path.device))
    p.grad = values.to(path.device)
    truth = float(np.sqrt(np.sum(values.numpy().astype(np.longdouble) ** 2)))
    fused = FusedAdamW([p], max_grad_norm=1.0)
    fused.step()
    for norm in (fused.grad_norm, adamw_kernels.grad_norm(p)):
        assert abs(norm.double().item() / truth - 1) <= tolerance("one_float32_rounding")
    if path.device.type == "cpu" and not interpreted:
        theirs = torch.nn.utils.get_total_norm([p.grad])
        assert abs(theirs.double().item() / truth - 1) > 10 * tolerance("one_float32_rounding")


def test_norm_of_large_values_does_not_overflow(path: Path) -> None:
    """Values whose squares no float32 holds have a norm, and clipping by it leaves a step that makes sense."""
    ours = make_params(path.device, torch.float32)
    Gradients().give(ours)
    scale_grads(1e30, ours)
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.double()
    assert not torch.nn.utils.get_total_norm([p.grad for p in ours]).isfinite()
    fused, rival = FusedAdamW(ours, max_grad_norm=LIMIT, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    norm = torch.nn.utils.clip_grad_norm_(theirs, LIMIT)
    rival.step()
    fused.step()
    assert_close(fused.grad_norm, norm, "norm_in_float32", "norm")
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, "float32_against_torch", "weight")
    assert_close(adamw_kernels.clip_grad_norm_(ours, LIMIT), norm, "norm_in_float32", "norm by itself")
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p.grad, q.grad, "norm_in_float32", "clipped gradient")


# --- bad options ------------------------------------------------------------------------------------------------------

BAD_NORMS: list[Any] = [-1, 0, 0.0, math.nan, -math.inf, "a", True, 1j, [1.0]]
BAD_NORM_TENSORS: list[Any] = [torch.ones(2), torch.tensor(-1.0), torch.tensor([math.nan]), torch.tensor(1j)]
BAD_GROUP_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *((dict(max_grad_norm=value), re.escape(f"max_grad_norm is {value!r}; expected")) for value in BAD_NORMS),
    *((dict(max_grad_norm=value), "max_grad_norm is .*; expected") for value in BAD_NORM_TENSORS),
    (dict(ema_decay=1.0), r"ema_decay is 1.0; expected 0 <= ema_decay < 1"),
    (dict(ema_decay=-0.1), r"ema_decay is -0.1; expected 0 <= ema_decay < 1"),
    (dict(ema_decay=math.nan), "ema_decay is nan; expected"),
    (dict(ema_decay="a"), "ema_decay is 'a'; expected"),
    (dict(ema_decay=torch.ones(2)), r"ema_decay is a tensor of shape \(2,\)"),
    (dict(ema_decay=0.9, ema_format="float8"), "ema_format is 'float8'; expected one of float32, bfloat16"),
    (dict(ema_warmup=True), r"ema_warmup=True, and (no group has an|the group has no) ema_decay; expected one"),
    (dict(ema_format="bfloat16"), r"ema_format='bfloat16', and (no group has an|the group has no) ema_decay"),
    (dict(decoupled=False, cautious_weight_decay=True), "cautious_weight_decay=True with decoupled=False"),
]
BAD_OPTIONS = [
    *BAD_GROUP_OPTIONS,
    (dict(clip_per_group=True), "clip_per_group=True, and no group has a max_grad_norm; expected one"),
    *((dict(max_skip_norm=x), re.escape(f"max_skip_norm is {x!r}; expected")) for x in (*BAD_NORMS, math.inf)),
    *((dict(max_skip_norm=value), "max_skip_norm is .*; expected") for value in BAD_NORM_TENSORS),
]


def named(case: Any) -> str:
    """Return a readable test id."""
    options = case[0] if isinstance(case, tuple) else case
    return ",".join(f"{key}={value}" for key, value in options.items())


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[named(case) for case in BAD_OPTIONS])
def test_bad_option_when_constructed(options: dict[str, Any], message: str) -> None:
    """A value that makes no sense is refused at once, naming the option, the value and what is accepted."""
    params = make_params(torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"^(FusedAdamW|param_groups\[0\]): {message}"):
        FusedAdamW(params, **options)


@pytest.mark.parametrize(("options", "message"), BAD_GROUP_OPTIONS, ids=[named(case) for case in BAD_GROUP_OPTIONS])
@pytest.mark.parametrize("base", [{}, dict(max_grad_norm=1.0)], ids=["plain", "clipping"])
def test_bad_option_in_an_added_group(base: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """A bad group is not added: the optimizer has the groups it had, and goes on."""
    first, second = make_params(torch.device("cpu"), shapes=((3,), (4,)))
    fused = FusedAdamW([first], **base)
    twin = FusedAdamW(copies([first]), **base)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in fused.param_groups]
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {message}"):
        fused.add_param_group({"params": [second], **options})
    assert [{k: v for k, v in group.items() if k != "params"} for group in fused.param_groups] == groups
    assert [p for p in params_of(fused)][0] is first and len(params_of(fused)) == 1
    Gradients().give(params_of(fused), params_of(twin))
    fused.step()
    twin.step()
    assert_unchanged(snapshot(twin), snapshot(fused))


@pytest.mark.parametrize("option", ["skip_nonfinite", "max_skip_norm", "clip_per_group", "seed", "process_group"])
def test_option_of_the_whole_optimizer_in_a_group(option: str) -> None:
    """A guard that a group asks for would not guard: it is refused, when constructed and when added."""
    first, second = make_params(torch.device("cpu"), shapes=((3,), (4,)))
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {option}=True in a group; .* option of the whole"):
        FusedAdamW([{"params": [first], option: True}])
    fused = FusedAdamW([first])
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: {option}=True in a group"):
        fused.add_param_group({"params": [second], option: True})
    assert len(fused.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_average_too_coarse_for_its_parameter(dtype: torch.dtype) -> None:
    """ema_format="bfloat16" beside float64 or complex parameters is refused when the group is made."""
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    options = dict(ema_decay=0.9, ema_format="bfloat16")
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[0\] has dtype .*bfloat16"):
        FusedAdamW([p], **options)
    fused = FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\] has dtype .*bfloat16"):
        fused.add_param_group({"params": [p], **options})
    assert len(fused.param_groups) == 1


@pytest.fixture(params=["from-the-start", "switched-on"])
def clipping(request: pytest.FixtureRequest, device: torch.device) -> Iterator[FusedAdamW]:
    """An optimizer that has taken a step, with or without clipping; its second group shall get a bad limit."""
    params = make_params(device)
    options = dict(max_grad_norm=1.0) if request.param == "from-the-start" else {}
    fused = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}], **options, **HYPER)
    Gradients().give(params)
    fused.step()
    return fused


@pytest.mark.parametrize("value", [*BAD_NORMS, *BAD_NORM_TENSORS], ids=str)
def test_bad_limit_assigned_later(clipping: FusedAdamW, value: Any) -> None:
    """A step with a limit that makes no sense raises before anything is written, names the group, and can be mended."""
    before = snapshot(clipping)
    clipping.param_groups[1]["max_grad_norm"] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^param_groups\[1\]: max_grad_norm is "):
            clipping.step()
        assert_unchanged(before, snapshot(clipping))
    clipping.param_groups[1]["max_grad_norm"] = 0.5
    clipping.step()
    assert clipping.grad_norm > 0.5
    assert all(clipping.state[p]["step"] == 2 for p in params_of(clipping))


@pytest.mark.parametrize("value", [-1.0, 1.0, math.nan, "a"], ids=str)
def test_bad_decay_assigned_later(device: torch.device, value: Any) -> None:
    """So does one with a decay of averages out of range."""
    fused = FusedAdamW(make_params(device), ema_decay=0.5)
    Gradients().give(params_of(fused))
    fused.step()
    before = snapshot(fused)
    fused.param_groups[0]["ema_decay"] = value
    with pytest.raises(ValueError, match=r"^param_groups\[0\]: ema_decay is "):
        fused.step()
    assert_unchanged(before, snapshot(fused))
