"""What `interpreter.py` puts in the place of parts of Triton's interpreter does what those do."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import HAS_GPU

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

SEMANTIC = getattr(interpreter, "interpreter_semantic", None)

pytestmark = pytest.mark.skipif(
    HAS_GPU
    or not hasattr(tl.block_type.__init__, "__wrapped__")
    or not hasattr(SEMANTIC.cast, "__wrapped__")
    or not hasattr(interpreter, "_LangPatchScope"),
    reason="Triton's interpreter is not in use, or of another make",
)

NUMPY = {
    tl.int1: np.bool_,
    tl.int8: np.int8,
    tl.uint8: np.uint8,
    tl.int16: np.int16,
    tl.int32: np.int32,
    tl.uint32: np.uint32,
    tl.int64: np.int64,
    tl.uint64: np.uint64,
    tl.float16: np.float16,
    tl.bfloat16: np.uint16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}
DTYPES = [*NUMPY]
POINTERS = [tl.pointer_type(dtype) for dtype in DTYPES]
SHAPES = [[1], [4], [16], [4, 16], [1, 16], [4, 1]]


def operand(dtype: Any, shape: list[int]) -> Any:
    """A tensor; a scalar where there is no shape."""
    element = NUMPY[dtype] if type(dtype) is tl.dtype else np.uint64
    data = np.arange(1, 1 + int(np.prod(shape or [1]))).reshape(shape or [1]).astype(element)
    return tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


OPERANDS = [operand(dtype, shape) for dtype in (*DTYPES, *POINTERS[-2:]) for shape in ([], *SHAPES)]


def described(value: Any) -> Any:
    """Everything about a tensor, or tensors."""
    if isinstance(value, tuple):
        return tuple(described(one) for one in value)
    sizes = [size.value for size in value.shape]
    data = value.handle.data
    return str(value.type), str(value.dtype), sizes, value.numel.value, data.dtype, data.shape, data.tobytes()


def outcome(function: Any, *arguments: Any) -> Any:
    """What a function returns, or how it fails."""
    try:
        return described(function(*arguments))
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("element", [*DTYPES, *POINTERS], ids=str)
def test_types_are_those_that_would_be_made(element: Any, shape: list[int]) -> None:
    """There is one for each element type and shape, however the shape is given; its attributes are Triton's."""
    made = tl.block_type(element, shape)
    anew = object.__new__(tl.block_type)
    tl.block_type.__init__.__wrapped__(anew, element, shape)
    assert {key: str(value) for key, value in vars(anew).items()}.items() <= {
        key: str(value) for key, value in vars(made).items()
    }.items()
    assert made == anew and made.shape == anew.shape
    assert tl.block_type(element, tuple(shape)) is tl.block_type(element, made.shape) is made
    assert made != tl.block_type(element, [2 * size for size in shape])
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_core(tl, scope)  # as while a kernel runs
    try:
        builder = interpreter.interpreter_builder
        assert str(made.to_ir(builder)) == str(tl.block_type.to_ir.__wrapped__(anew, builder)) == str(made)
    finally:
        scope.restore()
    for attribute in ("const", "address_space"):
        if isinstance(element, tl.pointer_type):
            other = tl.pointer_type(element.element_ty, **{attribute: {"const": True}.get(attribute, "shared")})
            assert tl.block_type(other, shape) is not made


@pytest.mark.parametrize("shape", [[], [3], [0], [1.0], [1 << 30]], ids=str)
def test_shapes_that_cannot_be_are_refused(shape: list[Any]) -> None:
    """Time and again, as by Triton."""
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as error:
            tl.block_type(tl.float32, shape)
        with pytest.raises(type(error.value), match=".") as expected:
            tl.block_type.__init__.__wrapped__(object.__new__(tl.block_type), tl.float32, shape)
        assert str(error.value) == str(expected.value)


def test_types_are_equal_as_ever() -> None:
    """Those of one name are."""
    types = [*DTYPES, *POINTERS, *(tl.block_type(dtype, shape) for dtype in DTYPES for shape in SHAPES[:3])]
    for a, b in product(types, types):
        assert (a == b) == (str(a) == str(b))
    assert tl.dtype("fp32") == tl.float32 != tl.dtype("fp64")


def test_tensors_are_those_that_would_be_made() -> None:
    """Beside their data they hold what Triton finds for their type."""
    for value in OPERANDS:
        anew = object.__new__(tl.tensor)
        tl.tensor.__init__.__wrapped__(anew, value.handle, value.type)
        again = tl.tensor(value.handle, value.type)
        assert vars(anew).keys() == vars(again).keys()
        assert described(anew) == described(again)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_operands_come_to_agree_as_ever() -> None:
    """Of every two tensors or numbers: broadcast, cast, and made ready for an operation of any kind."""
    for value, dtype in product(OPERANDS, DTYPES):
        assert outcome(SEMANTIC.cast, value, dtype) == outcome(SEMANTIC.cast.__wrapped__, value, dtype)
    kinds = list(product((False, True), repeat=4))  # pointers left, right; arithmetic; division
    numbers = [0, 1, True, -1, 1.0, 0.0, -0.0, 2.5, float("nan"), 1 << 40]
    sized = [value for value in OPERANDS if [size.value for size in value.shape] in ([], [4], [4, 16])]
    for lhs, rhs in [*product(sized, [*sized, *numbers]), *product(numbers, sized)]:
        if not (isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)) or lhs.type is rhs.type:
            chosen = kinds
        else:
            chosen = kinds[-2:]
            assert outcome(SEMANTIC.broadcast_impl_value, lhs, rhs) == outcome(
                SEMANTIC.broadcast_impl_value.__wrapped__, lhs, rhs
            )
        for kind in chosen:
            expected = outcome(SEMANTIC.binary_op_type_checking_impl.__wrapped__, lhs, rhs, *kind)
            for _ in range(2):  # what is made of a number is kept
                assert outcome(SEMANTIC.binary_op_type_checking_impl, lhs, rhs, *kind) == expected


def test_constants_are_unwrapped_as_ever() -> None:
    """Of every kind of value, alone and within others."""
    constant = tl.constexpr(3)
    unwrap = tl.core._unwrap_if_constexpr
    for value in (constant, 3, 2.5, True, "x", None, tl.float32, OPERANDS[0], OPERANDS[1].type, object()):
        assert unwrap(value) is unwrap.__wrapped__(value)
    assert unwrap([constant, (constant, 4)]) == [3, (3, 4)]
    assert unwrap(tl.tuple([constant, constant])).values == [3, 3]


def test_overflow_is_not_asserted_either_way() -> None:
    """Without its debug option the interpreter drops assertions: what integers are checked for changes nothing."""
    assert interpreter.InterpreterOptions().debug is False
    false = operand(tl.int1, [])
    false.handle.data[:] = False
    assert SEMANTIC.device_assert(false, "", None) is None
