"""Training in the storage formats: averages, clipping, skipped steps, loss scaling, copies, rates of 0, decay alone."""

import copy
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Path
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
from tolerances import tolerance

from adamw_kernels import FusedAdamW
from adamw_kernels.formats import MOMENT_FORMATS, PARAM_FORMATS

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SHAPES = ((67, 63), (7,))  # 4,221 elements: 8-bit moments, the last group of 16 ragged; and what stays float32

every_combination = pytest.mark.parametrize(
    ("param_format", "moment_format"), [*itertools.product(PARAM_FORMATS, MOMENT_FORMATS)]
)
# Every format once: enough where kernels are what is tested and the interpreter takes a second a step.
each_format = pytest.mark.parametrize(
    ("param_format", "moment_format"), [("split24", "8bit"), ("stochastic", "bfloat16"), ("split32", "float32")]
)


def make(device: torch.device, param_format: str, moment_format: str, **options: Any) -> FusedAdamW:
    """An optimizer of bfloat16 parameters, always the same."""
    params = make_params(device, torch.bfloat16, SHAPES)
    return FusedAdamW(params, param_format=param_format, moment_format=moment_format, **HYPER | options)


def train(optimizers: tuple[FusedAdamW, ...], gradients: Gradients, steps: int) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


# --- beside float32 training ------------------------------------------------------------------------------------------

BESIDE: dict[str, dict[str, Any]] = {
    "ema": dict(ema_decay=0.9),
    "ema-warmup": dict(ema_decay=0.9, ema_warmup=True),
    "bfloat16-ema": dict(ema_decay=0.9, ema_format="bfloat16"),
    "clip": dict(max_grad_norm=0.5),
    "guards": dict(skip_nonfinite=True, max_skip_norm=1e3),
    "amsgrad-l2": dict(amsgrad=True, decoupled=False, maximize=True),
    "cautious": dict(cautious=True, cautious_weight_decay=True),
    "bound": dict(update_bound=0.3),
    "bfloat16-moments": dict(moment_format="bfloat16"),
    "8bit-moments": dict(moment_format="8bit"),
}


@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_split32_with_every_option_is_training_in_float32(
    path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Weights, averages, moments and norms have the bits of float32 weights that are given the same gradients.

    Both start at float32 weights that 16 bits cannot hold, at which the averages begin.
    """
    wide = make_params(path.device, torch.float32, SHAPES)
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in wide]
    opt, judge = FusedAdamW(params, **HYPER, **options), FusedAdamW(wide, **HYPER, **options)
    opt.load_fp32_weights(wide)
    gradients = Gradients()
    for _ in range(3):
        gradients.give(params)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
        opt.step()
        judge.step()
        for p, q in zip(params, wide, strict=True):
            assert torch.equal(bits(opt.fp32_weights()[p]), bits(q))
            assert opt.state[p].keys() - judge.state[q].keys() == {"param_remainder"}
            for key, value in judge.state[q].items():
                assert torch.equal(bits(opt.state[p][key]), bits(value)), key
    if "max_grad_norm" in options:
        assert torch.equal(opt.grad_norm, judge.grad_norm) and opt.grad_norm > 0.5


@every_combination
def test_averages_are_shown_and_the_rest_of_the_weights_survives(
    device: torch.device, param_format: str, moment_format: str
) -> None:
    """Within `ema_weights()` parameters are averages to nearest; afterwards weights and remainders are as before."""
    opt = make(device, param_format, moment_format, ema_decay=0.5)
    train((opt,), Gradients(), 3)
    before, exact = snapshot(opt), opt.fp32_weights()
    with opt.ema_weights():
        for p in params_of(opt):
            assert torch.equal(p, opt.state[p]["param_ema"].bfloat16())
    assert_unchanged(before, snapshot(opt))
    assert all(torch.equal(bits(x), bits(exact[p])) for p, x in opt.fp32_weights().items())


# --- steps that change nothing ----------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("guard", [dict(skip_nonfinite=True), dict(max_skip_norm=1e4), dict(fused=True)], ids=str)
def test_skipped_step_leaves_everything(
    path: Path, guard: dict[str, Any], param_format: str, moment_format: str
) -> None:
    """Neither remainders nor codes, words, the scale or the step count; chance goes on as if it had not been."""
    opt = make(path.device, param_format, moment_format, **guard)
    gradients = Gradients()
    train((opt,), gradients, 1)
    other = make(path.device, param_format, moment_format)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params_of(other), params_of(opt), strict=True):
        p.data.copy_(q)
    before = snapshot(opt)
    gradients.give(params_of(opt), params_of(other))
    kept = [p.grad.clone() for p in params_of(opt)]  # type: ignore[union-attr]
    params_of(opt)[0].grad[3, 5] = math.inf  # type: ignore[index]
    if "fused" in guard:
        opt.found_inf = torch.ones((), device=path.device)
    opt.step()
    assert bool(opt.last_step_skipped)
    assert_unchanged(before, snapshot(opt))
    if "fused" in guard:
        del opt.found_inf
    for p, grad in zip(params_of(opt), kept, strict=True):
        p.grad = grad
    opt.step()
    other.step()
    assert_same_bits(opt, other)


@each_format
def test_loss_scale_is_taken_out(path: Path, param_format: str, moment_format: str) -> None:
    """Gradients scaled by a power of two, and the scale handed over as GradScaler does: the bits without it."""
    scaled, plain = (make(path.device, param_format, moment_format, fused=fused) for fused in (True, None))
    gradients = Gradients()
    for _ in range(2):
        gradients.give(params_of(scaled), params_of(plain))
        for p in params_of(scaled):
            p.grad.mul_(1024)  # type: ignore[union-attr]
        scaled.grad_scale = torch.tensor(1024.0, device=path.device)
        scaled.found_inf = torch.zeros((), device=path.device)
        scaled.step()
        plain.step()
    assert_same_bits(scaled, plain)


def test_grad_scaler(device: torch.device) -> None:
    """The real one, with float16 weights: it starts too high, steps are skipped, then training goes on exactly.

    Beside it the same gradients without the scale, which float32 holds.
    """
    params = make_params(device, torch.float16, SHAPES)
    opt = FusedAdamW(params, param_format="split24", moment_format="8bit", fused=True, **HYPER)
    plain = FusedAdamW(copies(params), param_format="split24", moment_format="8bit", **HYPER)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20)
    x = torch.linspace(-0.5, 0.5, 63, device=device, dtype=torch.float16)
    skipped = 0
    for _ in range(10):
        before = snapshot(opt)
        loss = (params[0] @ x).float().square().mean() + params[1].float().square().sum()
        scaler.scale(loss).backward()
        for p, q in zip(params, params_of(plain), strict=True):
            q.grad_dtype = None  # any
            q.grad = p.grad.float() / scaler.get_scale()  # type: ignore[union-attr]
        overflows = not all(p.grad.isfinite().all() for p in params)  # type: ignore[union-attr]
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if overflows:
            known = {name for name, _ in before}  # the first step creates state, whatever becomes of it
            assert_unchanged(before, [(name, value) for name, value in snapshot(opt) if name in known])
            skipped += 1
        else:
            plain.step()
    assert 0 < skipped < 9
    assert_same_bits(opt, plain)


def remembered(opt: FusedAdamW, p: torch.Tensor) -> list[torch.Tensor]:
    """Copies of a weight's bits and of its remainder's."""
    state = opt.state[p]
    return [bits(x).clone() for x in (p, *(state[key] for key in REMAINDER_KEYS.values() if key in state))]


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rate_of_zero_keeps_the_weights(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str
) -> None:
    """Ten steps at lr = 0 leave every bit of weights and remainders, while moments move."""
    params = make_params(device, dtype, SHAPES)
    opt = FusedAdamW(params, param_format=param_format, moment_format=moment_format, **HYPER)
    train((opt,), Gradients(), 2)
    opt.param_groups[0]["lr"] = 0.0
    exact = opt.fp32_weights()
    before = [remembered(opt, p) for p in params]
    keys = ["exp_avg_code" if moments == "8bit" else "exp_avg" for _, moments in opt.formats().values()]
    moments = [opt.state[p][key].clone() for p, key in zip(params, keys, strict=True)]
    train((opt,), Gradients(5), 10)
    for p, was, key, m in zip(params, before, keys, moments, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(was, remembered(opt, p), strict=True))
        assert torch.equal(bits(opt.fp32_weights()[p]), bits(exact[p]))
        assert not torch.equal(opt.state[p][key], m)


# --- copies -----------------------------------------------------------------------------------------------------------


@every_combination
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(device: torch.device, duplicate: Any, param_format: str, moment_format: str) -> None:
    """A deep copy and an unpickled optimizer, with the copied parameters, have the original's bits, random ones too."""
    opt = make(device, param_format, moment_format, seed=17, update_bound=2.0)
    gradients = Gradients()
    train((opt,), gradients, 3)
    twin = duplicate(opt)
    assert_same_bits(opt, twin)
    train((opt, twin), gradients, 3)
    assert_same_bits(opt, twin)
    for p, q in zip(params_of(opt), params_of(twin), strict=True):
        for key, value in opt.state[p].items():
            assert value.untyped_storage().data_ptr() != twin.state[q][key].untyped_storage().data_ptr()


# --- decay alone ------------------------------------------------------------------------------------------------------

STEPS = 1000


def decayed(opt: torch.optim.Optimizer, start: torch.Tensor, weights_of: Any) -> float:
    """The mean share of the weights that is left after STEPS steps on gradients of zero."""
    (p,) = params_of(opt)
    p.grad = torch.zeros_like(p)
    for _ in range(STEPS):
        opt.step()
    return (weights_of(opt)[p].double() / start).mean().item()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of steps of a fraction of a millisecond: waiting for another thread can take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("param_format", "moment_format"), [("split32", "float32"), ("split24", "8bit"), ("stochastic", "8bit")]
)
@pytest.mark.parametrize("decay", [1e-5, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decay_alone(
    device: torch.device, dtype: torch.dtype, decay: float, param_format: str, moment_format: str
) -> None:
    """Weights follow (1 - lr lambda)^T where one step's decay is less than half of the last of 16 bits."""
    weights = (1 + torch.rand(1 << 19, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    formats = dict(param_format=param_format, moment_format=moment_format)
    opt = FusedAdamW([torch.nn.Parameter(weights)], lr=1e-4, weight_decay=decay / 1e-4, **formats)
    start = weights.double()
    left = decayed(opt, start, FusedAdamW.fp32_weights)
    assert abs(left / (1 - decay) ** STEPS - 1) <= tolerance("decay_alone")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("decay", [1e-5, 1e-4, 1e-3])
def test_decay_alone_is_lost_by_rounding_to_nearest(device: torch.device, decay: float) -> None:
    """AdamW of torch on bfloat16 weights does not move them at all, nor does `native`: what the formats are for."""
    weights = (1 + torch.rand(1 << 10, generator=torch.Generator().manual_seed(0))).to(device, torch.bfloat16)
    options = dict(lr=1e-4, weight_decay=decay / 1e-4)
    theirs = torch.optim.AdamW([torch.nn.Parameter(weights.clone())], **options)
    ours = FusedAdamW([torch.nn.Parameter(weights.clone())], param_format="native", **options)
    for opt in (theirs, ours):
        assert decayed(opt, weights.double(), lambda o: {p: p.detach() for p in params_of(o)}) == 1.0
