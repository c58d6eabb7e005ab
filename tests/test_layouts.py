"""Whatever the memory layout, each element meets its own gradient and state, and nothing else is written.

The judge computes in logical order, so agreeing with it means: as the same values in any other layout. Every tensor
lies between rows of sentinel bytes, and `check` compares the whole buffer.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    AMSGRAD,
    DTYPE_PAIRS,
    FLAGS,
    HYPER,
    MOMENTS,
    PLAIN,
    Case,
    Group,
    Guarded,
    Training,
    check_all,
    explore,
    make_case,
    ordinary_values,
    step_lists,
    stored,
)

from adamw_kernels import FusedAdamW, fused_adamw_

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# --- dense layouts --------------------------------------------------------------------------------------------------

# Shape and strides. All are dense: a permutation of dimensions, or a dimension of one element with any stride.
LAYOUTS = {
    "contiguous": ((2, 3, 4, 5), (60, 20, 5, 1)),
    "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3)),
    "channels_last_one_image": ((1, 3, 4, 5), (60, 1, 15, 3)),
    "channels_last_one_channel": ((2, 1, 4, 5), (20, 1, 5, 1)),
    "channels_last_3d": ((2, 3, 2, 4, 5), (120, 1, 60, 15, 3)),
    "transposed": ((6, 7), (1, 6)),
    "permuted": ((3, 4, 5), (5, 15, 1)),
    "permuted_cyclic": ((3, 4, 5), (1, 15, 3)),
    "odd_stride_of_one_element": ((3, 1, 4), (4, 999, 1)),
    "zero_stride_of_one_element": ((1, 5, 1), (0, 1, 0)),
    "scalar": ((), ()),
    "empty": ((3, 0, 2), (1, 77, 5)),
}


def spread(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides that leave a gap after every element."""
    return tuple(2 * stride for stride in torch.empty(shape, device="meta").stride())


# Strides that a gradient of the given shape may have beside a parameter of any layout.
GRAD_STRIDES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "contiguous": lambda shape: torch.empty(shape, device="meta").stride(),
    "reversed": lambda shape: torch.empty(shape[::-1], device="meta").stride()[::-1],
    "channels_last": lambda shape: (
        torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
        if len(shape) == 4
        else spread(shape)
    ),
    "gaps": spread,
}


def relaid(case: Case, kind: str) -> Guarded:
    """Return the case's gradient in another memory layout."""
    shape = case.arrays["grad"].shape
    grad = Guarded(shape, case.grad_dtype, case["grad"].device, strides=GRAD_STRIDES[kind](shape))
    grad.write(case.arrays["grad"])
    return grad


def layout_cases(rng: np.random.Generator, path: Path) -> list[Case]:
    """Return one case a layout, of all pairs of dtypes in turn."""
    return [
        make_case(rng, shape, *DTYPE_PAIRS[i % len(DTYPE_PAIRS)], path.device, strides=strides)
        for i, (shape, strides) in enumerate(LAYOUTS.values())
    ]


def test_dense_layouts(path: Path) -> None:
    """Parameter, gradient and moments in the same layout, every layout in one table."""
    rng = np.random.default_rng(31)
    cases = layout_cases(rng, path)
    for step, flags in enumerate((PLAIN, AMSGRAD, FLAGS[1])):
        step_lists(cases, HYPER, flags)
        check_all(cases, f"step {step + 1}")


def test_optimizer_keeps_the_layout_in_new_state(path: Path) -> None:
    """Moments that the optimizer creates lie as their parameter does, and the steps are the judge's."""
    rng = np.random.default_rng(32)
    cases = layout_cases(rng, path)
    training = Training([Group(cases, HYPER, AMSGRAD)])
    training.optimizer.state.clear()
    for case in cases:
        for key in MOMENTS:
            case.arrays[key] = np.zeros_like(case.arrays[key])
    for step in range(2):
        training.step()
        for p, case, _ in training:
            state = training.optimizer.state[p]
            case.tensors["param"].check(case.arrays["param"], f"step {step + 1}: param with strides {p.stride()}")
            for key in MOMENTS:
                same = [a == b for n, a, b in zip(p.shape, p.stride(), state[key].stride(), strict=True) if n > 1]
                assert all(same) or p.numel() == 0
                assert np.array_equal(stored(state[key]), case.arrays[key]), key
            case.renew_grad(rng)


def test_moments_differ_only_in_strides_of_one_element(path: Path) -> None:
    """The stride of a dimension of one element means nothing: parameter, gradient and moments may disagree on it."""
    rng = np.random.default_rng(33)
    case = make_case(rng, (3, 1, 4), "float32", "bfloat16", path.device)
    for key, stride in zip(("param", "grad", *MOMENTS), (999, 4, 1, 0, 12), strict=True):
        array = case.arrays[key]
        case.tensors[key] = Guarded((3, 1, 4), case.dtypes[key], path.device, strides=(4, stride, 1))
        case.write(key, array)
    step_lists([case], HYPER, AMSGRAD)
    check_all([case], "lists")
    training = Training([Group([case], HYPER, AMSGRAD)])
    training.step()
    training.check("optimizer")


# --- gradients in another layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRAD_STRIDES)
def test_gradient_in_another_layout(path: Path, kind: str) -> None:
    """A gradient that lies otherwise than its parameter is paired by index, and is itself left alone."""
    rng = np.random.default_rng(34)
    cases = layout_cases(rng, path)
    grads = [relaid(case, kind) for case in cases]
    step_lists(cases, HYPER, PLAIN, grads=[grad.tensor for grad in grads])
    check_all(cases, "lists")
    for grad, case in zip(grads, cases, strict=True):
        grad.check(case.arrays["grad"], "gradient")


def test_gradient_layout_changes_from_step_to_step(path: Path) -> None:
    """A warm optimizer re-lays what needs it on each step: the layout of a step's gradient is that step's affair."""
    rng = np.random.default_rng(35)
    cases = layout_cases(rng, path)
    training = Training([Group(cases, HYPER, AMSGRAD)])
    kinds = [None, "reversed", None, *GRAD_STRIDES, "reversed"]
    for step, kind in enumerate(kinds):
        kept = []
        for p, case, _ in training:
            case.renew_grad(rng)
            kept.append(case.tensors["grad"] if kind is None else relaid(case, kind))
            p.grad = kept[-1].tensor
        training.step()
        training.check(f"step {step + 1}, gradient {kind or 'as the parameter'}")
        for grad, case in zip(kept, cases, strict=True):
            grad.check(case.arrays["grad"], "gradient")


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_expanded_gradient(path: Path, grad_dtype: str, expanded: tuple[int, ...]) -> None:
    """A gradient with stride 0, as the backward of a sum makes, counts as often as it has elements."""
    rng = np.random.default_rng(36)
    case = make_case(rng, (37, 6), "float32", grad_dtype, path.device, strides=(1, 37))
    index = tuple(slice(0, 1) if dim in expanded else slice(None) for dim in range(2))
    small = case["grad"][index].clone()
    case.write("grad", stored(small.expand(37, 6)))
    grad = small.expand(37, 6)
    step_lists([case], HYPER, PLAIN, grads=[grad])
    check_all([case], "lists")
    training = Training([Group([case])])
    for p, _, _ in training:
        p.grad = grad
    for step in range(2):
        training.step()
        training.check(f"optimizer, step {step + 1}")


def test_gradient_in_another_layout_beside_its_parameter(path: Path) -> None:
    """What a gradient shares memory with is judged by its own elements: next to the parameter is not inside it.

    One element expanded to the parameter's shape lies right before the parameter in one buffer; its 1,000 elements
    laid densely would reach into it.
    """
    rng = np.random.default_rng(37)
    case = make_case(rng, (1000,), "float32", "float32", path.device)
    grad = ordinary_values(rng, (1,), "float32")
    case.write("grad", np.repeat(grad, 1000))
    buffer = torch.zeros(1001, device=path.device)
    param = torch.nn.Parameter(buffer[1:])
    with torch.no_grad():
        param.copy_(case["param"])
        buffer[0] = float(grad[0])
    optimizer = FusedAdamW([param], lr=HYPER["lr"], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    param.grad = buffer[:1].expand(1000)
    optimizer.state[param] = {key: case[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.step()
    case.judge(HYPER, PLAIN)
    assert np.array_equal(stored(param), case.arrays["param"])
    assert float(buffer[0]) == float(grad[0])


def test_lazily_negated_gradient(path: Path) -> None:
    """The imaginary part of a conjugated tensor is negated on reading, not in memory; a step must see it negated."""
    rng = np.random.default_rng(38)
    for shape in [(1,), (23,)]:
        case = make_case(rng, shape, "float32", "float32", path.device)
        plain = case["grad"]
        grad = torch.complex(torch.zeros_like(plain), -plain).conj().imag
        assert grad.is_neg()
        step_lists([case], HYPER, PLAIN, grads=[grad])
        check_all([case], "lists")
        training = Training([Group([case])])
        for turn in (grad, plain, grad):
            for p, _, _ in training:
                p.grad = turn
            training.step()
            training.check("optimizer")


# --- views at any offset --------------------------------------------------------------------------------------------

OPERANDS = ("param", "grad", *MOMENTS)


def offsets_of_operands() -> list[dict[str, int]]:
    """Return offsets in elements: all operands alike, one of them alone off by one, and all different; 0 to 9 each."""
    alike = [dict.fromkeys(OPERANDS, offset) for offset in range(10)]
    one_off = [
        dict.fromkeys(OPERANDS, offset) | {operand: (offset + 1) % 10}
        for operand, offset in itertools.product(OPERANDS, (0, 3, 9))
    ]
    different = [{operand: (3 * i + k) % 10 for i, operand in enumerate(OPERANDS)} for k in range(10)]
    return alike + one_off + different


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "flags"),
    [
        ("float32", "float32", AMSGRAD),
        ("bfloat16", "bfloat16", PLAIN),
        ("bfloat16", "float32", AMSGRAD),
        ("float32", "float16", PLAIN),
        ("float64", "bfloat16", AMSGRAD),
        ("float64", "float64", PLAIN),
    ],
    ids=lambda value: value if isinstance(value, str) else "amsgrad" if value["amsgrad"] else "plain",
)
def test_every_element_offset(path: Path, param_dtype: str, grad_dtype: str, flags: dict[str, bool]) -> None:
    """Views into bigger buffers, aligned alike or not, over several chunks: every element once, nothing beside it.

    In chunks of 1,024 elements the 1,075 elements make a full chunk and a short one; where operands sit alike past a
    16-byte boundary, Triton and CUDA shift the chunk's boundaries by that much.
    """
    rng = np.random.default_rng(39)
    cases = [
        make_case(rng, (1075 if i % 3 else 1024,), param_dtype, grad_dtype, path.device, offsets=offsets)
        for i, offsets in enumerate(offsets_of_operands())
    ]
    step_lists(cases, HYPER, flags, chunk_size=1024)
    for case, offsets in zip(cases, offsets_of_operands(), strict=True):
        case.check(f"offsets {offsets}")


@pytest.mark.parametrize("chunk_size", [16, 2048])
def test_short_tensors_at_every_offset(path: Path, chunk_size: int) -> None:
    """Tensors no longer than what lies before the next 16-byte boundary, or hardly longer, at offsets 0 to 9."""
    rng = np.random.default_rng(40)
    cases = [
        make_case(rng, (n,), *DTYPE_PAIRS[(n + offset) % 13], path.device, offsets=dict.fromkeys(OPERANDS, offset))
        for n, offset in itertools.product((1, 2, 7, 9, 17), range(10))
    ]
    step_lists(cases, HYPER, PLAIN, chunk_size=chunk_size)
    check_all(cases, f"chunks of {chunk_size}")


@st.composite
def drawn_layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A shape of up to four dimensions, an order of dimensions for parameter and gradient each, and five offsets."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    orders = st.permutations(range(len(shape)))
    return dict(
        shape=shape,
        pair=draw(st.sampled_from(DTYPE_PAIRS)),
        param_order=draw(orders),
        grad_order=draw(orders),
        offsets={operand: draw(st.integers(0, 9)) for operand in OPERANDS},
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def strides_of_order(shape: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions lie in this order, outermost first."""
    permuted = torch.empty([shape[dim] for dim in order], device="meta")
    return tuple(permuted.stride()[order.index(dim)] for dim in range(len(shape)))


def test_drawn_layouts(path: Path) -> None:
    """Any order of dimensions of the parameter, any other of the gradient, any offsets: the judge's bits."""

    @explore(path, 50)
    @given(st.lists(drawn_layouts(), min_size=1, max_size=3))
    def check(problems: list[dict[str, Any]]) -> None:
        cases = []
        for drawn in problems:
            rng = np.random.default_rng(drawn["seed"])
            shape, offsets = drawn["shape"], drawn["offsets"]
            strides = strides_of_order(shape, drawn["param_order"])
            case = make_case(rng, shape, *drawn["pair"], path.device, strides=strides, offsets=offsets)
            strides = strides_of_order(shape, drawn["grad_order"])
            grad = Guarded(shape, case.grad_dtype, path.device, strides=strides, offset=offsets["grad"])
            grad.write(case.arrays["grad"])
            case.tensors["grad"] = grad
            cases.append(case)
        step_lists(cases, HYPER, AMSGRAD, chunk_size=16)
        check_all(cases, "lists")
        training = Training([Group(cases, HYPER, PLAIN)])
        training.step()
        training.check("optimizer")

    check()


# --- parameters of one flat buffer ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:param_format='native'")
def test_adjacent_views_of_flat_buffers(path: Path) -> None:
    """Weights of an RNN: parameters, gradients and moments, each end to end in one flat buffer, sizes odd.

    The whole buffers are compared: what belongs to the frozen view in the middle must not move.
    """
    rng = np.random.default_rng(41)
    shapes = [(3, 5), (5,), (), (7, 3), (1,), (11, 13), (2,)]
    frozen = 3
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    flat = make_case(rng, (int(ends[-1]),), "bfloat16", "float32", path.device, offsets=dict(param=1, grad=3))
    params, kept = [], []
    for shape, size, end in zip(shapes, sizes, ends, strict=True):
        views = {key: flat[key][end - size : end].view(shape) for key in OPERANDS}
        params.append(torch.nn.Parameter(views["param"]))
        kept.append(views)
    optimizer = FusedAdamW(
        [dict(params=params[:2]), dict(params=params[2:])],
        lr=HYPER["lr"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
        amsgrad=True,
        param_format="native",
    )
    for i, (p, views) in enumerate(zip(params, kept, strict=True)):
        p.grad_dtype = None
        p.grad = None if i == frozen else views["grad"]
        optimizer.state[p] = {key: views[key] for key in MOMENTS} | {"step": torch.zeros((), device=path.device)}
    before = {key: array.copy() for key, array in flat.arrays.items()}
    middle = slice(ends[frozen] - sizes[frozen], ends[frozen])
    for step in range(2):
        optimizer.step()
        flat.judge(HYPER, AMSGRAD)
        for key in ("param", *MOMENTS):
            flat.arrays[key][middle] = before[key][middle]
            flat.tensors[key].check(flat.arrays[key], f"step {step + 1}: {key}")


# --- empty tensors and sizes ----------------------------------------------------------------------------------------

# Which of six tensors are empty. A launch that happens only inside the loop over chunks forgets what is pending when
# the last tensor has none (torch #100701).
EMPTY_PLACES = {
    "first": {0},
    "middle": {2, 3},
    "last": {5},
    "first_and_last": {0, 1, 4, 5},
    "all_but_one": {0, 1, 2, 4, 5},
    "all": {0, 1, 2, 3, 4, 5},
}


@pytest.mark.parametrize("way", ["lists", "optimizer"])
@pytest.mark.parametrize("place", EMPTY_PLACES)
def test_empty_tensors(path: Path, place: str, way: str) -> None:
    """Empty tensors among others, in one dtype or several: the others are updated, and every step is counted."""
    rng = np.random.default_rng(42)
    for pairs in (DTYPE_PAIRS[:1], DTYPE_PAIRS[:6]):
        cases = [
            make_case(rng, (0, 3) if i in EMPTY_PLACES[place] else (i + 1, 3), *pairs[i % len(pairs)], path.device)
            for i in range(6)
        ]
        if way == "lists":
            step_lists(cases, HYPER, PLAIN)
            check_all(cases, place)
        else:
            training = Training([Group(cases[:3]), Group(cases[3:])])
            for step in range(2):
                training.step()
                training.check(f"step {step + 1}")
        assert all(float(case["step"]) == (1 if way == "lists" else 2) for case in cases)


def test_no_tensors_at_all(path: Path) -> None:
    """Empty lists are a step that does nothing."""
    fused_adamw_([], [], [], [], [], [], lr=1e-3)


def test_empty_tensors_at_the_slots_of_multi_tensor_apply(path: Path) -> None:
    """Empty tensors around slots 30 and 36, more than fifty tensors after them: every one gets its own update.

    Launchers that pack 30 or 36 tensors into one kernel's arguments have written out of bounds there
    (TransformerEngine #3202).
    """
    rng = np.random.default_rng(43)
    empty = {28, 29, 30, 31, 34, 35, 36, 37, 59, 60, 61, 89}
    cases = [make_case(rng, (0,) if i in empty else (i % 5 + 1,), "float32", "float32", path.device) for i in range(90)]
    step_lists(cases, HYPER, PLAIN)
    check_all(cases, "ninety tensors")


def test_scalars(path: Path) -> None:
    """0-dim and one-element parameters of every pair of dtypes, with moments and steps of their own."""
    rng = np.random.default_rng(44)
    cases = [make_case(rng, shape, *pair, path.device) for shape in [(), (1,), (1, 1)] for pair in DTYPE_PAIRS]
    training = Training([Group(cases, HYPER, AMSGRAD)])
    for step in range(2):
        training.step()
        training.check(f"step {step + 1}")
        for case in cases:
            case.renew_grad(rng)


def test_gradient_that_is_its_parameter(path: Path) -> None:
    """A gradient that is exactly its parameter's memory is read before the same element is written."""
    rng = np.random.default_rng(45)
    for dtype in ("float32", "bfloat16"):
        case = make_case(rng, (1100,), dtype, dtype, path.device, offsets=dict(param=3))
        case.arrays["grad"] = case.arrays["param"].copy()
        case.tensors["grad"] = case.tensors["param"]
        step_lists([case], HYPER, PLAIN, chunk_size=1024)
        case.arrays["grad"] = case.arrays["param"]
        check_all([case], "gradient and parameter in one place")
