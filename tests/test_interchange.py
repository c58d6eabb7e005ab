"""Ways in and out of the storage formats: checkpoints, exports, imports, conversions.

Every combination of a format of the weight with one of the moments. Bits where a format holds what it is given; where
it does not, at most half of its own step, which is computed from the format, element by element.
"""

import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_formats as formats
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
from problems import stored
from tolerances import tolerance
from torch.distributed.checkpoint import state_dict as dcp

from adamw_kernels import FusedAdamW, FusedSGDW, release_gradients
from adamw_kernels.formats import MOMENT_FORMATS, PARAM_FORMATS
from adamw_kernels.packing import in_memory_order, pack_moments, unpack_moments

pytestmark = [
    # The interpreter computes with NumPy, which warns of what masked lanes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:param_format='native'"),
]

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SHAPES = ((67, 63), (7,))  # 4,221 elements: 8-bit moments, the last group of 16 ragged; and what stays float32
COMBINATIONS = list(itertools.product(PARAM_FORMATS, MOMENT_FORMATS))
NARROW = (torch.bfloat16, torch.float16)

every_combination = pytest.mark.parametrize(("param_format", "moment_format"), COMBINATIONS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)


def train(optimizers: tuple[torch.optim.Optimizer, ...], gradients: Gradients, steps: int) -> None:
    """Give all the same gradients and step, `steps` times."""
    for _ in range(steps):
        gradients.give(*map(params_of, optimizers))
        for opt in optimizers:
            opt.step()


def trained(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str, steps: int = 4, **options: Any
) -> FusedAdamW:
    """An optimizer in these formats after some steps."""
    params = make_params(device, dtype, SHAPES)
    opt = FusedAdamW(params, param_format=param_format, moment_format=moment_format, **HYPER | options)
    train((opt,), Gradients(), steps)
    return opt


def through_file(state: Any) -> Any:
    """What torch.load makes of what torch.save wrote, trusting nothing in the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def wide_gradients(gradients: Gradients, narrow: list[torch.Tensor], wide: list[torch.Tensor]) -> None:
    """Give 16-bit parameters gradients, and their float32 twins the same values."""
    gradients.give(narrow)
    for p, q in zip(narrow, wide, strict=True):
        q.grad = p.grad.float()  # type: ignore[union-attr]


# --- how far a conversion may move a value ----------------------------------------------------------------------------


def half_a_code(state: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Half the step of the codes of m and of v, for each element in memory order, as its group's word says."""
    state = {key: stored(in_memory_order(state[key])) for key in ("exp_avg_code", "exp_avg_sq_code", "moment_groups")}
    book = formats.read_words(state["moment_groups"])
    size = state["exp_avg_code"].size
    position, octave = formats.position(formats.in_groups(state["exp_avg_sq_code"]).astype(np.int64), book)
    scale = 2.0**24
    # An octave, from a power of two to the next, has `per_octave` codes at equal distances.
    octave_begins = formats.float_of(position & 0x7F800000).astype(np.float64) / scale
    step_of_v = octave_begins / formats.CODES_PER_OCTAVE[book.mode]
    step_of_m = formats.reference_of(np.int64(1), octave).astype(np.float64) * formats.ratio_step(book.j)
    return tuple((0.5 * step).ravel()[:size] for step in (step_of_m, step_of_v))


def assert_moments_close(
    opt: FusedAdamW, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, coarsest: str, what: str
) -> None:
    """The moments that `opt` holds of `p` are these, within half a step of the coarsest format on the way.

    Args:
        opt: in the format whose codes say how long a step is, if there are any.
        p: its parameter.
        m: expected.
        v: expected.
        coarsest: one of MOMENT_FORMATS.
        what: for the message.
    """
    entry = opt.export_state_dict()["state"][[id(q) for q in params_of(opt)].index(id(p))]
    got = [stored(in_memory_order(entry[key])).astype(np.float64) for key in ("exp_avg", "exp_avg_sq")]
    expected = [stored(in_memory_order(x.float())).astype(np.float64) for x in (m, v)]
    slack = tolerance("half_a_code")
    if coarsest == "8bit":
        limits = [slack * limit for limit in half_a_code(opt.state[p])]
    else:
        share = tolerance("half_a_bfloat16_step") if coarsest == "bfloat16" else 0.0
        limits = [share * np.abs(x) for x in expected]
    for x, y, limit, name in zip(got, expected, limits, "mv", strict=True):
        worst = np.argmax(np.abs(x - y) - limit)
        assert (np.abs(x - y) <= limit).all(), f"{what}: {name}[{worst}] is {x[worst]}, expected {y[worst]}"


def rest_of_24_bits(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the last bit that 'split24' keeps of these (normal) weights."""
    exponent = torch.frexp(weights).exponent - 1
    return torch.ldexp(torch.full_like(weights, 0.5), exponent - (15 if dtype == torch.bfloat16 else 18))


def assert_weights_held(
    got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, param_format: str, what: str
) -> None:
    """A weight as a format remembers it after it was given an exact one, to nearest."""
    if dtype == torch.float32 or param_format == "split32":
        assert torch.equal(bits(got), bits(exact)), what
    elif param_format == "split24":
        assert ((got - exact).abs() <= rest_of_24_bits(exact, dtype)).all(), what
        assert not torch.equal(got, exact), "24 bits hold everything here: nothing is tested"
    else:
        assert torch.equal(got, exact.to(dtype).float()), what


# --- resuming ---------------------------------------------------------------------------------------------------------


def resume_and_compare(device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str) -> None:
    """Save a run, load it through a file into an optimizer of other options, and continue both: the same bits."""
    opt = trained(device, dtype, param_format, moment_format, seed=11, ema_decay=0.9)
    resumed = FusedAdamW(copies(params_of(opt)), seed=11, lr=1.0)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert_same_bits(opt, resumed)
    train((opt, resumed), Gradients(5), 2)
    assert_same_bits(opt, resumed)


@every_combination
@every_dtype
def test_resumes_bit_for_bit(device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str) -> None:
    """A run that was saved, loaded and continued has the bits of one that was not, chance included."""
    resume_and_compare(device, dtype, param_format, moment_format)


def test_resumes_on_every_path(path: Path) -> None:
    """The same for the format with most parts, whichever backend runs it."""
    resume_and_compare(path.device, torch.bfloat16, "split24", "8bit")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_seed_is_part_of_a_checkpoint(device: torch.device, dtype: torch.dtype) -> None:
    """A run resumes bit for bit in an optimizer that was made with another seed; one without chance names no seed."""
    opt = trained(device, dtype, "stochastic", "8bit", seed=11)
    resumed = FusedAdamW(copies(params_of(opt)), seed=12)
    resumed.load_state_dict(opt.state_dict())
    assert [group["seed"] for group in resumed.param_groups] == [11]
    train((opt, resumed), Gradients(5), 3)
    assert_unchanged(snapshot(opt), snapshot(resumed))
    exact = FusedAdamW(copies(params_of(opt)))
    for groups in (exact.param_groups, exact.state_dict()["param_groups"]):
        assert all("seed" not in group for group in groups)


@every_combination
def test_loading_casts_nothing(device: torch.device, param_format: str, moment_format: str) -> None:
    """Base `load_state_dict` casts state to the parameter's dtype (pitfall 15); codes, remainders, scales keep theirs.

    Nor does the loaded optimizer share memory with the one it came from.
    """
    for dtype in (torch.float32, *NARROW):
        opt = trained(device, dtype, param_format, moment_format)
        before = snapshot(opt)
        resumed = FusedAdamW(copies(params_of(opt)))
        resumed.load_state_dict(opt.state_dict())
        assert_unchanged(before, snapshot(resumed))
        train((resumed,), Gradients(5), 1)
        assert_unchanged(before, snapshot(opt))


@every_combination
def test_distributed_checkpoint_functions(device: torch.device, param_format: str, moment_format: str) -> None:
    """`get_` and `set_optimizer_state_dict` bring the bits back; their step at rate 0 beforehand does no harm."""
    torch.manual_seed(0)
    model = torch.nn.Linear(67, 63, device=device, dtype=torch.bfloat16)
    options = dict(param_format=param_format, moment_format=moment_format)
    opt = FusedAdamW(model.parameters(), **options, **HYPER)
    train((opt,), Gradients(), 3)
    saved = through_file(dcp.get_optimizer_state_dict(model, opt))
    again = torch.nn.Linear(67, 63, device=device, dtype=torch.bfloat16)
    again.load_state_dict(model.state_dict())
    before = [bits(p) for p in again.parameters()]
    resumed = FusedAdamW(again.parameters(), **options)
    dcp.set_optimizer_state_dict(again, resumed, saved)
    assert all(torch.equal(bits(p), q) for p, q in zip(again.parameters(), before, strict=True))
    assert_same_bits(opt, resumed)
    train((opt, resumed), Gradients(5), 2)
    assert_same_bits(opt, resumed)


# --- out --------------------------------------------------------------------------------------------------------------


@every_combination
@every_dtype
def test_fp32_weights_are_the_judges(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str
) -> None:
    """New float32 tensors with what weight and remainder together stand for, as the NumPy judge merges them."""
    opt = trained(device, dtype, param_format, moment_format)
    weights = opt.fp32_weights()
    assert [*weights] == params_of(opt)
    name = str(dtype).removeprefix("torch.")
    is_split = dtype != torch.float32 and param_format.startswith("split")
    for p, weight in weights.items():
        assert (weight.dtype, weight.shape, weight.device) == (torch.float32, p.shape, p.device)
        assert weight.data_ptr() != p.data_ptr() and not weight.requires_grad
        remainder = stored(opt.state[p][REMAINDER_KEYS[param_format]]) if is_split else None
        expected = formats.load_weight(stored(p), remainder, name, param_format if is_split else "native")
        np.testing.assert_array_equal(stored(weight).view(np.uint32), expected.view(np.uint32))
        assert is_split != torch.equal(weight, p.float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_split32_is_training_in_float32(path: Path, dtype: torch.dtype) -> None:
    """Weights of float32 beside the same gradients: after each step the same bits, which an export takes over."""
    params = make_params(path.device, dtype, SHAPES)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    opt, judge = FusedAdamW(params, **HYPER), FusedAdamW(wide, **HYPER)
    gradients = Gradients()
    for _ in range(4):
        wide_gradients(gradients, params, wide)
        opt.step()
        judge.step()
        assert all(torch.equal(bits(x), bits(q)) for x, q in zip(opt.fp32_weights().values(), wide, strict=True))
    exported = FusedAdamW([torch.nn.Parameter(x) for x in opt.fp32_weights().values()])
    exported.load_state_dict(through_file(opt.export_state_dict("torch")))
    assert_same_bits(exported, judge)
    train((exported, judge), gradients, 2)
    assert_same_bits(exported, judge)


@every_combination
@every_dtype
def test_export_loads_into_torch(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str
) -> None:
    """`torch.optim.AdamW` on `fp32_weights()` goes on: torch's keys and dtypes, our moments, our options."""
    opt = trained(device, dtype, param_format, moment_format, ema_decay=0.9)
    weights = opt.fp32_weights()
    exported = through_file(opt.export_state_dict("torch"))
    theirs = torch.optim.AdamW([torch.nn.Parameter(x) for x in weights.values()])
    keys = theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(exported)
    assert exported["param_groups"][0].keys() == keys
    ours = FusedAdamW([torch.nn.Parameter(x.clone()) for x in weights.values()])
    ours.load_state_dict(exported)
    for p, q in zip(params_of(opt), params_of(theirs), strict=True):
        state = theirs.state[q]
        assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.float32
        )
        assert float(state["step"]) == 4
        assert_moments_close(opt, p, state["exp_avg"], state["exp_avg_sq"], "float32", "exported")
    train((ours, theirs), Gradients(5), 3)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert (p - q).abs().max() <= tolerance("float32_against_torch") * q.abs().max()


@pytest.mark.parametrize("moment_format", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_export_reads_what_the_kernels_read(path: Path, dtype: torch.dtype, moment_format: str) -> None:
    """A step from stored moments, and one from the float32 moments that an export makes of them: the same weights."""
    params = make_params(path.device, dtype, SHAPES)
    opt = FusedAdamW(params, moment_format=moment_format, update_bound=None, **HYPER)
    gradients = Gradients()
    train((opt,), gradients, 4)
    wide = [torch.nn.Parameter(x) for x in opt.fp32_weights().values()]
    judge = FusedAdamW(wide)
    judge.load_state_dict(opt.export_state_dict())
    wide_gradients(gradients, params, wide)
    opt.step()
    judge.step()
    for weight, q in zip(opt.fp32_weights().values(), wide, strict=True):
        assert torch.equal(bits(weight), bits(q))


def test_export_before_a_step_and_of_other_targets(device: torch.device) -> None:
    """Nothing was stepped: nothing is exported. Another target than torch is refused."""
    params = make_params(device, torch.bfloat16, SHAPES)
    opt = FusedAdamW(params, param_format="split24", moment_format="8bit", **HYPER)
    theirs = torch.optim.AdamW(copies(params))
    theirs.load_state_dict(opt.export_state_dict())
    assert not theirs.state and theirs.param_groups[0]["betas"] == (0.9, 0.99)
    with pytest.raises(ValueError, match="export_state_dict: 'apex'; expected 'torch'"):
        opt.export_state_dict("apex")


def test_export_of_amsgrad(device: torch.device) -> None:
    """The running maximum comes along."""
    opt = trained(device, torch.bfloat16, "split24", "float32", amsgrad=True)
    theirs = torch.optim.AdamW([torch.nn.Parameter(x) for x in opt.fp32_weights().values()])
    theirs.load_state_dict(opt.export_state_dict())
    for p, q in zip(params_of(opt), params_of(theirs), strict=True):
        assert torch.equal(opt.state[p]["max_exp_avg_sq"], theirs.state[q]["max_exp_avg_sq"])


@pytest.mark.parametrize(
    ("theirs_of", "ours_of", "keys"),
    [
        (torch.optim.AdamW, FusedAdamW, ("exp_avg", "exp_avg_sq")),
        (lambda params: torch.optim.SGD(params, momentum=0.9), FusedSGDW, ("momentum_buffer",)),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_export_widens_16_bit_moments(
    device: torch.device, dtype: torch.dtype, theirs_of: Callable[..., Any], ours_of: Callable[..., Any], keys: Any
) -> None:
    """Those that torch keeps in the weights' dtype, loaded and not stepped since, leave in float32, unchanged."""
    theirs = theirs_of(make_params(device, dtype, SHAPES))
    train((theirs,), Gradients(), 3)
    opt = ours_of(copies(params_of(theirs)))
    opt.load_state_dict(theirs.state_dict())
    exported = opt.export_state_dict()["state"].values()
    for p, q, entry in zip(params_of(opt), params_of(theirs), exported, strict=True):
        for key in keys:
            assert (opt.state[p][key].dtype, entry[key].dtype) == (dtype, torch.float32)
            assert torch.equal(bits(entry[key]), bits(theirs.state[q][key].float()))


def test_torch_refuses_codes(device: torch.device) -> None:
    """`torch.optim.AdamW` casts what it loads to floats: it must not find codes where it looks for moments."""
    opt = trained(device, torch.float32, "native", "8bit")
    theirs = torch.optim.AdamW(copies(params_of(opt)))
    theirs.load_state_dict(opt.state_dict())
    Gradients().give(params_of(theirs))
    before = snapshot(theirs)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()
    assert_unchanged(before, snapshot(theirs))
    theirs.load_state_dict(opt.export_state_dict("torch"))
    theirs.step()
    assert all(not torch.equal(p, q) for p, q in zip(params_of(opt), params_of(theirs), strict=True))


# --- in ---------------------------------------------------------------------------------------------------------------


@every_combination
@every_dtype
def test_import_of_a_float32_checkpoint(
    device: torch.device, dtype: torch.dtype, param_format: str, moment_format: str
) -> None:
    """Weights and AdamW state of a float32 run with torch, into any format: to nearest, and training goes on.

    The weights' change over six further steps is that of the float32 run but for what the format rounds; of chance the
    root mean square over eight seeds, as one parameter has but seven elements.
    """
    errors = []
    for seed in range(8 if param_format == "stochastic" else 1):
        wide = make_params(device, torch.float32, SHAPES)
        theirs = torch.optim.AdamW(wide, **HYPER)
        train((theirs,), Gradients(), 5)
        weights, saved = through_file([p.detach() for p in wide]), through_file(theirs.state_dict())
        params = [torch.nn.Parameter(torch.zeros_like(p, dtype=dtype)) for p in wide]
        opt = FusedAdamW(params, param_format=param_format, moment_format=moment_format, seed=seed)
        opt.load_state_dict(saved)
        opt.load_fp32_weights([weight.to(device) for weight in weights])
        opt.convert()  # what the next step would do
        remembered = opt.fp32_weights()
        for p, q in zip(params, wide, strict=True):
            assert_weights_held(remembered[p], q.detach(), dtype, param_format, "imported")
            state = theirs.state[q]
            coarsest = "float32" if moment_format == "8bit" and p.numel() < 4096 else moment_format
            assert_moments_close(opt, p, state["exp_avg"], state["exp_avg_sq"], coarsest, "imported")
            assert float(opt.state[p]["step"]) == 5
        before = [p.detach().clone() for p in wide]
        gradients = Gradients(5)
        for _ in range(6):
            wide_gradients(gradients, params, wide)
            opt.step()
            theirs.step()
        moved = opt.fp32_weights()
        errors.append(
            [
                float((moved[p] - q.detach()).norm() / (q.detach() - start).norm())
                for p, q, start in zip(params, wide, before, strict=True)
            ]
        )
    limit = "sixteen_bit_weights" if dtype != torch.float32 and "split" not in param_format else "rounded_moments"
    assert np.all(np.sqrt(np.mean(np.square(errors), axis=0)) <= tolerance(f"six_steps_with_{limit}")), errors


def test_weights_by_parameter_or_in_order(device: torch.device) -> None:
    """`load_fp32_weights` takes a mapping or a sequence, of any floating-point dtype, before the first step or later.

    A model may so start from float32 weights: training has the bits of one in float32 from the beginning.
    """
    wide = make_params(device, torch.float32, SHAPES)
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    opt, judge = FusedAdamW(params, **HYPER), FusedAdamW(wide, **HYPER)
    opt.load_fp32_weights(dict(zip(params, wide, strict=True)))
    versions = [p._version for p in params]
    opt.load_fp32_weights([p.detach().double() for p in wide])
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert all(torch.equal(x, q) for x, q in zip(opt.fp32_weights().values(), wide, strict=True))
    gradients = Gradients()
    for _ in range(3):
        wide_gradients(gradients, params, wide)
        opt.step()
        judge.step()
    assert all(torch.equal(bits(x), bits(q)) for x, q in zip(opt.fp32_weights().values(), wide, strict=True))
    plan, remainder = opt._internals.stepper.plan, opt.state[params[0]]["param_remainder"]
    opt.load_fp32_weights(opt.fp32_weights())
    wide_gradients(gradients, params, wide)
    opt.step()
    judge.step()
    assert all(torch.equal(bits(x), bits(q)) for x, q in zip(opt.fp32_weights().values(), wide, strict=True))
    assert opt._internals.stepper.plan is plan and opt.state[params[0]]["param_remainder"] is remainder


BAD_WEIGHTS: dict[str, tuple[Callable[[list[torch.Tensor]], Any], type[Exception], str]] = {
    "too-few": (lambda ws: ws[:1], ValueError, "1 weights for 2 parameters; expected one each, in their order"),
    "missing": (lambda ws: {}, ValueError, r"no weight for param_groups\[0\]\['params'\]\[0\]; expected one for each"),
    "shape": (lambda ws: [ws[0], ws[1][:3]], ValueError, r"\[1\] has shape \(3,\).* the parameter has \(7,\)"),
    "transposed-shape": (lambda ws: [ws[0].t(), ws[1]], ValueError, r"\[0\] has shape \(63, 67\)"),
    "integer": (lambda ws: [ws[0], ws[1].int()], TypeError, r"\[1\] is .* expected a floating-point tensor"),
    "complex": (lambda ws: [ws[0], ws[1].to(torch.complex64)], TypeError, r"\[1\] has dtype torch.complex64"),
    "number": (lambda ws: [ws[0], 1.0], TypeError, r"\[1\] is float; expected a floating-point tensor"),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_refused(
    device: torch.device, make: Callable[[list[torch.Tensor]], Any], kind: type[Exception], message: str
) -> None:
    """Each by name, and not one of the others is written."""
    opt = trained(device, torch.bfloat16, "split24", "8bit")
    before = snapshot(opt)
    with pytest.raises(kind, match=message):
        opt.load_fp32_weights(make([torch.ones_like(p, dtype=torch.float32) for p in params_of(opt)]))
    assert_unchanged(before, snapshot(opt))


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(COMBINATIONS, 2)])
def test_convert_in_the_middle_of_a_run(device: torch.device, before: tuple[str, str], after: tuple[str, str]) -> None:
    """Weights are those of before where the new format holds them, else the nearest; moments too; training goes on."""
    opt = trained(device, torch.bfloat16, *before)
    first, _ = params = params_of(opt)
    exact, stored_before = opt.fp32_weights(), [bits(p) for p in params]
    moments = [*opt.export_state_dict()["state"].values()]
    opt.convert(param_format=after[0], moment_format=after[1])

    remembered = opt.fp32_weights()
    for p, was in zip(params, stored_before, strict=True):
        if after[0] == "split24" and before[0] == "split32":
            assert_weights_held(remembered[p], exact[p], torch.bfloat16, "split24", "converted")
        elif after[0] in ("native", "stochastic"):
            assert torch.equal(bits(p), was), "was the nearest already"
            assert opt.state[p].keys().isdisjoint(REMAINDER_KEYS.values())
        else:
            assert torch.equal(bits(remembered[p]), bits(exact[p]))
    for p, moment in zip(params, moments, strict=True):
        coarsest = "float32" if after[1] == "8bit" and p is not first else after[1]
        if after[1] == before[1]:
            coarsest = "float32"
        assert_moments_close(opt, p, moment["exp_avg"], moment["exp_avg_sq"], coarsest, "converted")
        assert float(opt.state[p]["step"]) == 4
    resumed = FusedAdamW(copies(params), param_format=after[0], moment_format=after[1], **HYPER)
    resumed.load_state_dict(opt.state_dict())
    train((opt, resumed), Gradients(5), 2)
    assert_same_bits(opt, resumed)


REFUSED: dict[str, tuple[Callable[[FusedAdamW], Any], dict[str, str], type[Exception], str]] = {
    "unknown-weights": (
        lambda _: None,
        dict(param_format="split8"),
        ValueError,
        r"^convert: param_groups\[0\]: param_f",
    ),
    "unknown-moments": (
        lambda _: None,
        dict(moment_format="4bit"),
        ValueError,
        r"^convert: param_groups\[0\]: moment_",
    ),
    "amsgrad": (
        lambda opt: opt.add_param_group(dict(params=make_params(torch.device("cpu")), amsgrad=True)),
        dict(moment_format="8bit"),
        ValueError,
        r"^convert: param_groups\[1\]: amsgrad=True with moment_format='8bit'",
    ),
    "float64": (
        lambda opt: opt.add_param_group(dict(params=make_params(torch.device("cpu")))),
        dict(moment_format="8bit", param_format="split24"),
        TypeError,
        r"^param_groups\[1\]\['params'\]\[0\] has dtype torch.float64",
    ),
    "damaged-state": (
        lambda opt: opt.state[params_of(opt)[1]].update(exp_avg=torch.zeros(3)),
        dict(moment_format="8bit", param_format="split24"),
        ValueError,
        r"exp_avg of param_groups\[0\]\['params'\]\[1\] has shape \(3,\)",
    ),
}


@pytest.mark.parametrize(("prepare", "changes", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_conversion_changes_nothing(
    prepare: Callable[[FusedAdamW], Any], changes: dict[str, str], kind: type[Exception], message: str
) -> None:
    """Neither tensors nor options, not of any group."""
    opt = trained(torch.device("cpu"), torch.bfloat16, "split32", "float32")
    prepare(opt)
    before, options = snapshot(opt), [{**opt.defaults}, *({**group} for group in opt.param_groups)]
    with pytest.raises(kind, match=message):
        opt.convert(**changes)
    assert_unchanged(before, snapshot(opt))
    assert [opt.defaults, *opt.param_groups] == options


def test_convert_reaches_groups_to_come(device: torch.device) -> None:
    """The optimizer's own defaults are changed too, so a group that is added later has the new formats."""
    opt = trained(device, torch.bfloat16, "split32", "float32")
    opt.convert(param_format="stochastic")
    opt.add_param_group(dict(params=make_params(device, torch.bfloat16, seed=3)))
    assert {weights for weights, _ in opt.formats().values()} == {"stochastic"}


def test_convert_is_refused_under_a_graph(device: torch.device) -> None:
    """A CUDA graph would go on to update the state of before."""
    opt = trained(device, torch.bfloat16, "split32", "float32")
    opt._internals.captured.append(opt._internals.stepper.plan)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="convert: .* captured in a CUDA graph"):
        opt.convert(moment_format="8bit")
    assert_unchanged(before, snapshot(opt))


def test_within_inference_mode(device: torch.device) -> None:
    """Evaluation code may convert, export and import: what is made there can be trained on afterwards."""
    opt = trained(device, torch.bfloat16, "split32", "float32")
    other = FusedAdamW(copies(params_of(opt)))
    with torch.inference_mode():
        weights = opt.fp32_weights()
        opt.convert(param_format="split24", moment_format="8bit")
        other.load_fp32_weights([*weights.values()])
        exported = opt.export_state_dict()
    found = [*weights.values(), *exported["state"][0].values()]
    found += [value for optimizer in (opt, other) for entry in optimizer.state.values() for value in entry.values()]
    assert not any(tensor.is_inference() for tensor in found)
    train((opt, other), Gradients(5), 2)
    opt.convert(moment_format="float32")
    other.load_fp32_weights([*weights.values()])
    train((opt, other), Gradients(5), 1)


# --- packing ----------------------------------------------------------------------------------------------------------


def empty_codes(like: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state for `pack_moments` to write."""
    return {
        "exp_avg_code": torch.empty_like(like, dtype=torch.int8),
        "exp_avg_sq_code": torch.empty_like(like, dtype=torch.uint8),
        "moment_groups": torch.empty(-(-like.numel() // 16), dtype=torch.int16, device=like.device),
        "exp_avg_sq_scale": torch.empty((), device=like.device),
    }


def some_moments(device: torch.device, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of 4,221 elements in a transposed layout, their sizes log-normal with this deviation."""
    generator = torch.Generator().manual_seed(3)
    size = torch.exp(spread * torch.randn(63, 67, generator=generator)) * 1e-4
    v = size.square() * torch.rand(63, 67, generator=generator)
    m = v.sqrt() * torch.randn(63, 67, generator=generator)
    return m.t().to(device), v.t().to(device)


def odd_moments(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments with groups of zeros, outliers, dead elements, NaN and infinities among them; none at all in the last."""
    m, v = some_moments(device, 1.0)
    flat_m, flat_v = in_memory_order(m), in_memory_order(v)
    flat_m[:32] = flat_v[:32] = 0
    flat_v[40] = 1e30  # more than 32 octaves above its group, whose elements become its smallest codes
    flat_v[70], flat_m[70] = 1e-30, 0  # dead, and forgotten
    flat_v[90], flat_m[90] = 0, 1e-3  # a first moment that no second one allows
    flat_m[100], flat_v[120], flat_v[140], flat_m[160] = torch.nan, torch.nan, torch.inf, -torch.inf
    flat_v[180] = 2.0**103
    flat_v[200], flat_m[200] = 1e-42, 1e-22  # subnormal
    flat_m[-13:] = flat_v[-13:] = 0
    return m, v


@pytest.mark.parametrize("make", [lambda d: some_moments(d, 1.5), odd_moments], ids=["ordinary", "odd"])
def test_packing_is_the_judges(device: torch.device, make: Callable[[torch.device], Any]) -> None:
    """Codes are those of the NumPy judge where its chance rounds to nearest, and are read as it reads them."""
    m, v = make(device)
    codes = empty_codes(m)
    pack_moments(m, v, codes)
    flat = [stored(in_memory_order(x)) for x in (m, v)]
    nearest = np.full(m.numel(), 0x80000000, np.uint32)  # and first moments that have come from far away
    expected = formats.encode_moments(*flat, np.full_like(flat[0], 1e30), nearest, np.float32(2.0**24))
    for key, array in zip(("exp_avg_code", "exp_avg_sq_code", "moment_groups"), expected, strict=True):
        np.testing.assert_array_equal(stored(in_memory_order(codes[key])), array, key)
    assert float(codes["exp_avg_sq_scale"]) == 2.0**24
    for scale in (2.0**24, 1.7 * 2.0**24):
        codes["exp_avg_sq_scale"].fill_(scale)
        read = [stored(in_memory_order(x)) for x in unpack_moments(codes, m)]
        unscale = np.float32(1 / np.float64(np.float32(scale)))
        for got, array in zip(read, formats.decode_moments(*expected, unscale), strict=True):
            np.testing.assert_array_equal(got, array)


def test_any_codes_are_read_as_the_judge_reads_them(device: torch.device) -> None:
    """All codes under all modes and octaves, also what no step writes: code 1 in octave 0 is bits of 0, but not 0."""
    rng = np.random.default_rng(83)
    numel = 1 << 20
    arrays = {
        "exp_avg_code": rng.integers(-128, 128, numel).astype(np.int8),
        "exp_avg_sq_code": rng.integers(0, 256, numel).astype(np.uint8),
        "moment_groups": np.arange(1 << 16).astype(np.uint16).view(np.int16),
    }
    codes: dict[str, Any] = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
    codes["exp_avg_sq_scale"] = torch.tensor(2.0**24, device=device)
    read = [stored(x) for x in unpack_moments(codes, torch.zeros(numel, device=device))]
    for got, array in zip(read, formats.decode_moments(*arrays.values(), np.float32(2.0**-24)), strict=True):
        np.testing.assert_array_equal(got, array)


def test_packing_twice_is_stable(device: torch.device) -> None:
    """What was read from codes is packed again within half a code of itself, and from then on exactly."""
    m, v = some_moments(device, 0.5)  # no element falls so far behind its group that it is forgotten
    before: list[torch.Tensor] = [m, v]
    for i in range(3):
        codes = empty_codes(m)
        pack_moments(*before, codes)
        after = [*unpack_moments(codes, m)]
        for x, y, limit in zip(before, after, half_a_code(codes), strict=True):
            distance = (in_memory_order(x) - in_memory_order(y)).abs().cpu().double().numpy()
            assert (distance <= tolerance("half_a_code") * limit).all()
        assert (i < 2) or all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        before = after


# --- states that do not belong together -------------------------------------------------------------------------------


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    """Remove an entry of a state."""
    return lambda state: state.pop(key)


def change(key: str, edit: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    """Edit an entry of a state."""
    return lambda state: state.update({key: edit(state[key])})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no-groups": (drop("moment_groups"), TypeError, "moment_groups of .* is missing; expected torch.int16"),
    "no-scale": (drop("exp_avg_sq_scale"), TypeError, "exp_avg_sq_scale of .* is missing; expected torch.float32"),
    "no-second-moment": (
        drop("exp_avg_sq_code"),
        ValueError,
        "has step, exp_avg_code but no exp_avg_sq_code; expected all three",
    ),
    "no-codes": (
        lambda state: [state.pop(key) for key in ("exp_avg_code", "exp_avg_sq_code")],
        ValueError,
        "has step but no exp_avg, exp_avg_sq; expected all three",
    ),
    "codes-and-values": (
        lambda state: state.update(
            {key: torch.zeros(67, 63) for key in ("exp_avg", "exp_avg_sq")}, step=torch.ones(())
        ),
        ValueError,
        "has exp_avg, exp_avg_sq, exp_avg_code, exp_avg_sq_code; expected moments as real values or as codes, not both",
    ),
    "codes-as-values": (
        lambda state: state.update({key: state.pop(f"{key}_code") for key in ("exp_avg", "exp_avg_sq")}),
        TypeError,
        r"exp_avg of .* is torch.int8; expected a floating-point tensor. Moments in 8 bits are exp_avg_code \(int8\)",
    ),
    "cast-first": (change("exp_avg_code", torch.Tensor.bfloat16), TypeError, "code of .* has dtype torch.bfloat16"),
    "cast-second": (change("exp_avg_sq_code", torch.Tensor.float), TypeError, "sq_code of .* has dtype torch.float32"),
    "cast-groups": (change("moment_groups", torch.Tensor.int), TypeError, "moment_groups of .* has dtype torch.int32"),
    "cast-scale": (change("exp_avg_sq_scale", torch.Tensor.double), TypeError, "scale of .* has dtype torch.float64"),
    "number-as-scale": (change("exp_avg_sq_scale", float), TypeError, "exp_avg_sq_scale of .* is missing"),
    "too-few-groups": (
        change("moment_groups", lambda x: x[:-1]),
        ValueError,
        "moment_groups of .* has 263 elements; expected 264 beside 4221 elements of the parameter.* the same shards",
    ),
    "two-scales": (
        change("exp_avg_sq_scale", lambda x: x.expand(2)),
        ValueError,
        "scale of .* has 2 elements; expected 1",
    ),
    "shape": (change("exp_avg_code", lambda x: x[:-1]), ValueError, r"exp_avg_code of .* has shape \(66, 63\)"),
    "layout": (
        change("exp_avg_sq_code", lambda x: x.t().contiguous().t()),
        ValueError,
        r"exp_avg_sq_code of .* has strides \(1, 67\).* layout",
    ),
    "cast-remainder": (
        change("param_remainder_8bit", torch.Tensor.bfloat16),
        TypeError,
        "param_remainder_8bit of .* is torch.bfloat16; expected a tensor of torch.int8",
    ),
    "remainder-of-16-bits": (
        change("param_remainder_8bit", torch.Tensor.short),
        TypeError,
        "param_remainder_8bit of .* is torch.int16; expected a tensor of torch.int8",
    ),
    "remainder-shape": (change("param_remainder_8bit", torch.Tensor.flatten), ValueError, r"8bit of .* \(4221,\)"),
    "remainder-number": (change("param_remainder_8bit", lambda x: 3), TypeError, "_8bit of .* is int; expected"),
    "two-remainders": (
        lambda state: state.update(
            param_remainder=torch.zeros(67, 63).short(), param_remainder_8bit=state["param_remainder_8bit"].clone()
        ),
        ValueError,
        "has param_remainder and param_remainder_8bit; expected one rest of the weight at most",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("way", ["loaded", "edited"])
def test_damaged_state_is_refused(
    device: torch.device, way: str, damage: Callable[[dict[str, Any]], Any], kind: type[Exception], message: str
) -> None:
    """When it is loaded or, edited, by the next step: by name, before anything is written; mended, training goes on."""
    opt = trained(device, torch.bfloat16, "split24", "8bit")
    first, _ = params_of(opt)
    whole = opt.state_dict()
    state = opt.state_dict()
    state["state"] = {key: {**entry} for key, entry in state["state"].items()}
    if way == "loaded":
        damage(state["state"][0])
    else:
        opt.state[first] = {**opt.state[first]}
        damage(opt.state[first])
    tensors = {key: value for key, value in opt.state[first].items() if isinstance(value, torch.Tensor)}
    before = [(key, value.clone()) for key, value in tensors.items()], [bits(p) for p in params_of(opt)]
    with pytest.raises(kind, match=message) as raised:
        opt.load_state_dict(state) if way == "loaded" else opt.step()
    assert "param_groups[0]['params'][0]" in str(raised.value)
    assert_unchanged(before[0], [*tensors.items()])
    assert all(torch.equal(bits(p), was) for p, was in zip(params_of(opt), before[1], strict=True))
    opt.load_state_dict(whole)
    opt.step()


def test_leftovers_of_another_format_are_dropped(device: torch.device) -> None:
    """Codes' words beside float32 moments, as a converter of checkpoints may leave them, do no harm."""
    opt = trained(device, torch.bfloat16, "split32", "8bit")
    first, _ = params_of(opt)
    for key, value in zip(("exp_avg", "exp_avg_sq"), unpack_moments(opt.state[first], first), strict=True):
        opt.state[first][key] = value
        del opt.state[first][f"{key}_code"]
    opt.param_groups[0]["moment_format"] = "float32"
    opt.step()
    assert opt.state[first].keys() == {"step", "exp_avg", "exp_avg_sq", "param_remainder"}


@pytest.mark.parametrize(("cast", "back"), [("float", False), ("half", False), ("half", True)])
def test_retyped_model_drops_the_rest_of_its_weights(device: torch.device, cast: str, back: bool) -> None:
    """bfloat16's remainders mean nothing beside float32 or float16 weights: they go, with a warning, at the next step.

    A cast back before that step changes nothing.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(67, 63, device=device, dtype=torch.bfloat16)
    opt = FusedAdamW(model.parameters(), **HYPER)
    gradients = Gradients()
    train((opt,), gradients, 3)
    getattr(model, cast)()
    if back:
        model.bfloat16()
    start = [p.detach().clone() for p in model.parameters()]
    if back:
        weights = opt.fp32_weights()
        assert not any(torch.equal(weights[p], p.float()) for p in model.parameters())
        return
    gradients.give([*model.parameters()])
    for group in opt.param_groups:
        group["lr"] = 0.0
    with pytest.warns(UserWarning, match=f"is {model.weight.dtype} now and its param_remainder.*fp32_weights"):
        opt.step()
    for p, was in zip(model.parameters(), start, strict=True):
        assert torch.equal(p, was)
        assert ("param_remainder" in opt.state[p]) == (cast == "half")


@pytest.mark.parametrize("released", [False, True])
def test_weights_of_a_model_recast_since_the_last_step(device: torch.device, released: bool) -> None:
    """Asked for before the next step, weights are the cast ones; those that are then loaded are kept in full."""
    torch.manual_seed(0)
    model = torch.nn.Linear(67, 63, device=device, dtype=torch.bfloat16)
    opt = FusedAdamW(model.parameters(), **HYPER)
    if released:
        release_gradients(model, opt)

    def step() -> None:
        model(torch.ones(2, 67, dtype=model.weight.dtype, device=device)).sum().backward()
        opt.step()
        opt.zero_grad()

    step()
    kept = {p: weight / 8 for p, weight in opt.fp32_weights().items()}
    model.half()
    with pytest.warns(UserWarning, match="is torch.float16 now and its param_remainder"):
        weights = opt.fp32_weights()
    assert all(torch.equal(weights[p], p.float()) for p in model.parameters())
    opt.load_fp32_weights(kept)
    for group in opt.param_groups:
        group["lr"] = 0.0
    step()
    for p, weight in opt.fp32_weights().items():
        normal = kept[p].abs() >= 2.0**-14  # below, float16's remainder keeps multiples of 2^-37
        assert torch.equal(weight[normal], kept[p][normal]) and normal.any()


# --- while averages are shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        FusedAdamW.fp32_weights,
        lambda opt: opt.load_fp32_weights([*params_of(opt)]),
        lambda opt: opt.convert(param_format="split24"),
    ],
    ids=["fp32_weights", "load_fp32_weights", "convert"],
)
def test_not_while_averages_are_shown(device: torch.device, use: Callable[[FusedAdamW], Any]) -> None:
    """Parameters then hold averages, of which remainders are no part."""
    opt = trained(device, torch.bfloat16, "split32", "float32", ema_decay=0.9)
    before = snapshot(opt)
    with opt.ema_weights(), pytest.raises(RuntimeError, match=r"\(\) within ema_weights\(\)"):
        use(opt)
    assert_unchanged(before, snapshot(opt))
