"""`param_copy=`: the step also writes 16-bit copies of CPU weights, in the same pass."""

import copy
import math
from typing import Any

import pytest
import torch
from conftest import PATHS, Path
from pairs import bits, make_params

from adamw_kernels import FusedAdamW, FusedSGDW, release_gradients
from adamw_kernels.param_copies import COPY_DTYPES

CPU = torch.device("cpu")
NATIVE = [path for path in PATHS if path.backend == "cpu"]
# Below, at and above the tile after which copies follow, more than a chunk, none, a scalar, two dimensions.
SHAPES = ((1023,), (1024,), (1025,), (40_000,), (0,), (), (17, 33))
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
GUARD = 8

pytestmark = pytest.mark.filterwarnings("ignore:param_format='native'")


@pytest.fixture(params=NATIVE, ids=str)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each ISA of the native path."""
    chosen: Path = request.param
    monkeypatch.setenv("ADAMW_KERNELS_BACKEND", chosen.backend)
    monkeypatch.setenv("ADAMW_KERNELS_CPU_ISA", chosen.isa)
    return chosen


def guarded(p: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole buffer, the copy within it, one element off alignment)."""
    buffer = torch.full((p.numel() + 2 * GUARD + 1,), 7.0, dtype=dtype)
    return buffer, buffer[GUARD + 1 : GUARD + 1 + p.numel()].view(p.shape)


def assert_copied(params: Any, copies: Any) -> None:
    """Each copy is its weight, rounded to nearest even by torch."""
    for p, written in zip(params, copies, strict=True):
        assert torch.equal(bits(written), bits(p.detach().to(written.dtype)))


@pytest.mark.parametrize("copy_dtype", COPY_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"moment_format": "bfloat16"}),
        (torch.float32, {"moment_format": "8bit", "ema_decay": 0.9, "ema_format": "bfloat16"}),
        (torch.float32, {"ema_decay": 0.9, "amsgrad": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"param_format": "native"}),
        (torch.float16, {"param_format": "split24", "moment_format": "8bit"}),
    ],
    ids=str,
)
def test_copies_are_the_rounded_weights(
    native: Path, dtype: torch.dtype, options: dict[str, Any], copy_dtype: torch.dtype
) -> None:
    """In every format, on every ISA, nothing beside the copies is written, and no bit of the step changes."""
    params, plain = (make_params(CPU, dtype, SHAPES) for _ in range(2))
    buffers, copies = zip(*(guarded(p, copy_dtype) for p in params), strict=True)
    opt = FusedAdamW(params, param_copy=copies, **HYPER, **options)
    judge = FusedAdamW(plain, **HYPER, **options)
    assert_copied(params, copies)  # filled at once
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        opt.step()
        judge.step()
        assert_copied(params, copies)
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(bits(p.detach()), bits(q.detach()))
    for buffer in buffers:
        assert (buffer[: GUARD + 1] == 7.0).all() and (buffer[-GUARD:] == 7.0).all()


def test_nearest_even_at_every_binade(native: Path) -> None:
    """Ties, subnormals, overflow to infinity and NaN, with a learning rate of 0."""
    patterns = torch.arange(-(2**31), 2**31, 40_503, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 2**31, 2**15, dtype=torch.int64).to(torch.int32)
    values = torch.cat((patterns, ties)).view(torch.float32)
    for dtype in COPY_DTYPES:
        p = torch.nn.Parameter(values.clone())
        written = torch.empty_like(p, dtype=dtype)
        opt = FusedAdamW([p], lr=0.0, weight_decay=0.0, param_copy=[written])
        p.grad = torch.zeros_like(p)
        opt.step()
        expected = p.detach().to(dtype)
        is_nan = expected.isnan()
        assert torch.equal(written.isnan(), is_nan)
        assert torch.equal(written.view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan])


def test_sgd_and_gradient_release() -> None:
    """Copies belong to the engine: any rule has them, and gradients that are released."""
    layers = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 3))
    params = [*layers.parameters()]
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    for opt in (
        FusedSGDW(params, lr=0.1, momentum=0.9, param_copy=copies),
        FusedAdamW(params, lr=0.1, param_copy=copies),
    ):
        for _ in range(2):
            layers(torch.ones(2, 40)).sum().backward()
            opt.step()
            opt.zero_grad()
            assert_copied(params, copies)
    release_gradients(layers, opt)
    before = [p.detach().clone() for p in params]
    layers(torch.ones(2, 40)).sum().backward()
    opt.step()
    assert any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert_copied(params, copies)


def test_by_parameter_by_group_and_none() -> None:
    """A mapping, an entry of a group, groups added later, parameters without a copy."""
    a, b, c, d = make_params(CPU, torch.float32, ((5,), (6,), (7,), (8,)))
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in (a, c, d)}
    opt = FusedAdamW([{"params": [a, b]}, {"params": [c], "param_copy": [copies[c]]}], param_copy={a: copies[a]})
    opt.add_param_group({"params": [d], "param_copy": {d: copies[d]}, "lr": 0.1})
    assert all("param_copy" not in group for group in opt.param_groups)
    for p in (a, b, c, d):
        p.grad = torch.ones_like(p)
    opt.step()
    assert_copied(copies.keys(), copies.values())
    b.grad = None
    a.grad = None
    before = copies[a].clone()
    opt.step()
    assert torch.equal(copies[a], before)
    assert_copied(copies.keys(), copies.values())


def test_skipped_steps_write_nothing() -> None:
    """A step that changes nothing changes no copy either."""
    (p,) = make_params(CPU, torch.float32, ((3000,),))
    written = torch.empty_like(p, dtype=torch.bfloat16)
    opt = FusedAdamW([p], param_copy=[written], skip_nonfinite=True)
    written.fill_(3.0)
    p.grad = torch.full_like(p, math.inf)
    opt.step()
    assert (written == 3.0).all()
    p.grad = torch.ones_like(p)
    opt.step()
    assert_copied([p], [written])


def test_weights_changed_otherwise() -> None:
    """`write_param_copies` follows what no step wrote; the next step follows a copy whose memory was replaced."""
    (p,) = make_params(CPU, torch.float32, ((30,),))
    written = torch.empty_like(p, dtype=torch.float16)
    opt = FusedAdamW([p], param_copy=[written])
    with torch.no_grad():
        p.fill_(0.25)
    opt.write_param_copies()
    assert (written == 0.25).all()
    p.grad = torch.ones_like(p)
    opt.step()
    old = written.data
    written.data = torch.zeros_like(written)
    opt.step()
    assert_copied([p], [written])
    assert not torch.equal(old, written)


def test_state_dicts_and_copies_of_the_optimizer() -> None:
    """State dicts do not hold them; a deep copy of the optimizer leaves them to the original."""
    (p,) = make_params(CPU, torch.float32, ((30,),))
    written = torch.empty_like(p, dtype=torch.bfloat16)
    opt = FusedAdamW([p], param_copy=[written])
    p.grad = torch.ones_like(p)
    opt.step()
    plain = FusedAdamW(make_params(CPU, torch.float32, ((30,),)))
    assert opt.state_dict()["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    other = copy.deepcopy(opt)
    before = written.clone()
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    other.step()
    assert torch.equal(written, before)
    opt.load_state_dict(other.state_dict())
    opt.step()
    assert_copied([p], [written])


P = torch.nn.Parameter
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "too-few": (
        [P(torch.ones(3)), P(torch.ones(3))],
        [torch.ones(3).half()],
        ValueError,
        "has 1 entries beside 2 para",
    ),
    "no-tensor": ([P(torch.ones(3))], ["x"], TypeError, r"param_copy\[0\] is a str"),
    "float32": ([P(torch.ones(3))], [torch.ones(3)], TypeError, "is torch.float32 beside a torch.float32"),
    "float64": ([P(torch.ones(3).double())], [torch.ones(3).half()], TypeError, "beside a torch.float64"),
    "complex": ([P(torch.ones(3) + 0j)], [torch.ones(3, 2).half()], TypeError, "complex64"),
    "shape": ([P(torch.ones(3))], [torch.ones(4).half()], ValueError, r"shape \(4,\)"),
    "layout": ([P(torch.ones(3, 4))], [torch.ones(4, 3).half().t()], ValueError, "strides"),
    "device": ([P(torch.ones(3))], [torch.ones(3, device="meta").half()], ValueError, "is on meta"),
    "stranger": ([P(torch.ones(3))], {P(torch.ones(3)): torch.ones(3).half()}, ValueError, "no parameter of this"),
}


@pytest.mark.parametrize(("params", "copies", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(params: Any, copies: Any, error: type[Exception], message: str) -> None:
    """Errors name the copy, when constructed."""
    with pytest.raises(error, match=message):
        FusedAdamW(params, param_copy=copies)


def test_refused_without_a_trace() -> None:
    """A group whose copies are refused is not added; no copy of another is written."""
    a, b = make_params(CPU, torch.float32, ((5,), (6,)))
    opt = FusedAdamW([a])
    good = torch.full_like(b, 3.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: param_copy"):
        opt.add_param_group({"params": [b], "param_copy": [good, good]})
    assert len(opt.param_groups) == 1 and (good == 3.0).all()


def test_memory_that_is_shared() -> None:
    """One copy for two parameters, or a copy that is the weight: an error before anything is written."""
    a, b = make_params(CPU, torch.bfloat16, ((5,), (5,)))
    shared = torch.empty_like(a)
    for copies in ([shared, shared], [a.detach(), None]):
        opt = FusedAdamW([a, b], param_copy=copies)
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        before = a.detach().clone(), b.detach().clone()
        with pytest.raises(ValueError, match="share memory"):
            opt.step()
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_other_backends_refuse() -> None:
    """Triton on CPU tensors (its interpreter) writes no copies and says so."""
    with pytest.raises(ValueError, match="expected 'cpu', which alone writes copies"):
        FusedAdamW([P(torch.ones(3))], param_copy=[torch.ones(3).half()], backend="triton")


def test_tables_without_copies_hold_none() -> None:
    """What nobody asked for costs a null pointer."""
    (p,) = make_params(CPU, torch.float32, ((5,),))
    opt = FusedAdamW([p])
    p.grad = torch.ones_like(p)
    opt.step()
    assert len(opt._internals.stepper.plan.tables[0]._copy_words) == 0
