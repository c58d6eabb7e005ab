"""Makes Triton's interpreter take less time without changing what it computes.

Before a kernel runs, and before every call of a function within it, the interpreter puts functions of its own in the
place of all that `triton.language` has. After the first time there is nothing left to be replaced within the kernel,
but looking for it took a third of the interpreter's time.
"""

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
