"""Makes Triton's interpreter take less time without changing what it computes (`test_interpreter.py`).

Before a kernel runs, and before every call of a function within it, the interpreter puts functions of its own in the
place of all that `triton.language` has. After the first time there is nothing left to be replaced within the kernel,
but looking for it took a third of the interpreter's time.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def languages(function: Callable[..., Any]) -> list[ModuleType]:
    """The modules of the language that a function sees."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def is_replaced(function: Callable[..., Any]) -> bool:
    """Whether all that a function may call is the interpreter's at present; what is left of Triton's own is marked."""
    samples = [tl.tensor.__add__, tl.core.tensor_descriptor_base.load, tl.math.exp]
    samples += [module.load for module in languages(function)]
    return not any(tl.core.is_builtin(sample) for sample in samples)


def replace_once() -> None:
    """Leave out what has been replaced already. Nothing under a Triton whose interpreter is of another make."""
    if not {"_patch_lang", "_LangPatchScope"} <= vars(interpreter).keys():
        return
    replace = interpreter._patch_lang

    @functools.wraps(replace)
    def patch_lang(function: Callable[..., Any]) -> Any:
        return interpreter._LangPatchScope() if is_replaced(function) else replace(function)

    interpreter._patch_lang = patch_lang


def look_up_dtypes_once() -> None:
    """Keep NumPy's dtype for one of Triton's, for which a table of all of them was made each time. Likewise."""
    if not hasattr(interpreter, "_get_np_dtype"):
        return
    find = interpreter._get_np_dtype
    known = functools.cache(find)

    def get_np_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return known(element) if type(element) is tl.dtype else find(dtype)  # pointers cannot be keys

    interpreter._get_np_dtype = get_np_dtype


def check_no_overflow_in_vain() -> None:
    """Leave out what nobody asked for: sums and products of integers once more, in 64 bits, to see that they fit.

    Without the interpreter's debug option, which has no switch, the assertion that this is for asserts nothing.
    """
    options = getattr(interpreter.interpreter_builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def key_of(dtype: Any) -> Any:
    """What a scalar or pointer type is known by; None for others."""
    if type(dtype) is tl.dtype:
        return dtype.name
    if type(dtype) is tl.pointer_type:
        element = key_of(dtype.element_ty)
        return element and (element, dtype.address_space, dtype.const)
    return None


def type_key(type_: Any) -> Any:
    """What the type of a tensor is known by; None for those of which there may be others."""
    return id(type_) if "made_once" in type_.__dict__ else key_of(type_)


def unwrap_at_once() -> None:
    """Let what is plainly no constant of the language be found so at once. Likewise."""
    unwrap = getattr(tl.core, "_unwrap_if_constexpr", None)
    if unwrap is None:
        return
    plain = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}

    @functools.wraps(unwrap)
    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        return value if kind in plain else value.value if kind is tl.constexpr else unwrap(value)

    tl.core._unwrap_if_constexpr = unwrap_if_constexpr


def make_types_once() -> None:
    """Let there be one type of tensors for every element type and shape, whose attributes are found once. Likewise.

    Half of the interpreter's time went into them: nearly every operation makes a type, of it a tensor whose shape is a
    tuple of constants with a type each, and compares them. Nothing ever changes one.
    """
    if not hasattr(interpreter, "interpreter_builder"):
        return
    make, equal, make_tensor = tl.block_type.__init__, tl.dtype.__eq__, tl.tensor.__init__
    make_ir = tl.block_type.to_ir
    types: dict[Any, Any] = {}
    attributes: dict[Any, dict[str, Any]] = {}  # of tensors

    def new(cls: type, element_ty: Any, shape: Any) -> Any:
        element = key_of(element_ty)
        sizes = (*(shape.values if type(shape) is tl.tuple else shape),)
        if element is None or any(type(size) is not int for size in sizes):
            return object.__new__(cls)
        key = (cls, element, sizes)
        if key not in types:
            made = object.__new__(cls)
            make(made, element_ty, shape)  # or it raises
            made.made_once = sizes
            types[key] = made
        return types[key]

    @functools.wraps(make)
    def initialize(self: Any, element_ty: Any, shape: Any) -> None:
        if "made_once" not in self.__dict__:
            make(self, element_ty, shape)

    @functools.wraps(equal)
    def is_equal(self: Any, other: Any) -> Any:
        return self is other or equal(self, other)

    @functools.wraps(make_tensor)
    def initialize_tensor(self: Any, handle: Any, type: Any) -> None:
        known = attributes.get(id(type))
        if known is None:
            make_tensor(self, handle, type)
            if type.__class__ is tl.dtype or "made_once" in type.__dict__:
                # The type is among them, and thus no other has its identity.
                attributes[id(type)] = {key: value for key, value in self.__dict__.items() if key != "handle"}
        else:
            self.__dict__.update(known)
            self.handle = handle

    @functools.wraps(make_ir)
    def to_ir(self: Any, builder: Any) -> Any:
        # What the interpreter has in place of an intermediate language is the types themselves.
        is_own = builder is interpreter.interpreter_builder and type(self.element_ty) is tl.dtype
        return self if is_own and "made_once" in self.__dict__ else make_ir(self, builder)

    tl.block_type.__new__ = new
    tl.block_type.__init__ = initialize
    tl.dtype.__eq__ = is_equal
    tl.tensor.__init__ = initialize_tensor

    tl.block_type.to_ir = to_ir


def agree_at_once() -> None:
    """Let operands that are of one type, as most are, be found so at once. Likewise.

    The rules for others are Triton's own; what they say about two dtypes is kept.
    """
    semantic = getattr(interpreter, "interpreter_semantic", None)
    names = ("broadcast_impl_value", "computation_type_impl", "binary_op_type_checking_impl", "cast")
    if not all(hasattr(semantic, name) for name in names):
        return
    broadcast, cast, check = semantic.broadcast_impl_value, semantic.cast, semantic.binary_op_type_checking_impl
    computation_type = functools.cache(semantic.computation_type_impl)

    constants: dict[Any, Any] = {}  # data and type, by what they are made of

    def with_number(tensor: Any, number: Any, is_left: bool, *options: Any, **more: Any) -> Any:
        """The tensor, and the number as a tensor like it; None where the tensor would not stay as it is."""
        own = type_key(tensor.type)
        # 0.0 and -0.0 are equal, and so are 1, 1.0 and True.
        key = own, type(number), repr(number), is_left, options, *more.items()
        if own is None or key not in constants:
            lhs, rhs = check(*((tensor, number) if is_left else (number, tensor)), *options, **more)
            same, other = (lhs, rhs) if is_left else (rhs, lhs)
            if own is None or same is not tensor:
                return lhs, rhs
            constants[key] = other.handle.data, other.handle.dtype, other.type
        data, dtype, type_ = constants[key]
        other = tl.tensor(interpreter.TensorHandle(data, dtype), type_)
        return (tensor, other) if is_left else (other, tensor)

    @functools.wraps(check)
    def binary_op_type_checking(lhs: Any, rhs: Any, *options: Any, **more: Any) -> Any:
        if type(lhs) is tl.tensor:
            if type(rhs) is tl.tensor:
                if lhs.type is rhs.type and type(lhs.dtype) is tl.dtype:
                    # As in a division, which takes 16 bits to 32.
                    if computation_type(lhs.dtype, False, rhs.dtype, False, True) is lhs.dtype:
                        return lhs, rhs
            elif type(rhs) in (int, float, bool):
                return with_number(lhs, rhs, True, *options, **more)
        elif type(rhs) is tl.tensor and type(lhs) in (int, float, bool):
            return with_number(rhs, lhs, False, *options, **more)
        return check(lhs, rhs, *options, **more)

    @functools.wraps(broadcast)
    def broadcast_impl_value(lhs: Any, rhs: Any) -> Any:
        if lhs.type is rhs.type:
            return lhs, rhs
        sizes = lhs.type.__dict__.get("made_once")  # of blocks alone
        alike = sizes is not None and sizes == rhs.type.__dict__.get("made_once")
        return (lhs, rhs) if alike else broadcast(lhs, rhs)

    @functools.wraps(cast)
    def cast_unless_same(input: Any, dst_ty: Any, *rounding: Any, **more: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(input, dst_ty, *rounding, **more)

    semantic.computation_type_impl = computation_type
    semantic.binary_op_type_checking_impl = binary_op_type_checking
    semantic.broadcast_impl_value = broadcast_impl_value
    semantic.cast = cast_unless_same
