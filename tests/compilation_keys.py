"""Names a compilation by Triton by everything that decides what comes of it.

A key is made of what Triton's own cache goes by: its version and the bytes of its compiler, the assembler's version,
the kernel with all functions and constants that it uses, the types and values it is specialised for, the target and the
options. Of functions only the code counts here, not their comments, docstrings or line numbers.
"""

import ast
import contextlib
import functools
import hashlib
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from triton import JITFunction, compiler
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import get_cache_key, make_backend


@dataclass(frozen=True)
class Keyed:
    """A compilation: its key and what came of it, or None if that is known."""

    key: str
    asm: Any


@functools.cache
def code_alone(source: str) -> str:
    """Source text without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def functions() -> list[JITFunction]:
    """Those of the package."""
    modules = [module for name, module in sys.modules.items() if name.startswith("adamw_kernels.")]
    # By identity: what a function's `hash` asks for is the digest.
    return list({id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}.values())


def digest_code_alone() -> None:
    """Have Triton digest the package's functions by their code alone, wherever it stands; they are compiled as ever."""
    as_written = [(function, function._src, function.starting_line_number) for function in functions()]
    for function, source, _ in as_written:
        function._unsafe_update_src(code_alone(source))
        function.starting_line_number = 0
    for function, *_ in as_written:
        function.cache_key  # noqa: B018  # is made when it is first asked for, and kept
    for function, source, line in as_written:
        function._src, function.starting_line_number = source, line


def key_of(source: Any, target: Any, options: dict[str, Any] | None) -> str:
    """The key of what `triton.compile` would make of these."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options or {}, **source.parse_options()))
    key = f"{target}-{get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@contextlib.contextmanager
def keyed(known: Collection[str]) -> Iterator[None]:
    """Meanwhile kernels that are warmed up for the first time become `Keyed`; those that are known are not compiled."""
    original = compiler.compile
    digest_code_alone()

    def compile(src: Any, target: Any = None, options: Any = None, **more: Any) -> Keyed:
        key = key_of(src, target, options)
        return Keyed(key, None if key in known else original(src, target=target, options=options, **more).asm)

    compiler.compile = compile
    try:
        yield
    finally:
        compiler.compile = original
