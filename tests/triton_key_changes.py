"""Which keys of compilations change with what is changed about the kernels' sources; nothing is compiled.

    python tests/triton_key_changes.py

prints, in JSON, names of kernels by what was changed: "nothing", "prose" (comments, docstrings, blank lines), the code
of a function, or the value of a constant. In a process of its own, for the same reason as `compile_triton.py`.
"""

import json
import re
import sys
from collections.abc import Container
from itertools import count

import compilation_keys
import compile_triton
from triton.language import constexpr

TARGET = "sm_90"


class Everything(Container[str]):
    """Any key is known."""

    def __contains__(self, key: object) -> bool:
        """It is."""
        return True


# Of the updates one of a kind is enough here: it is the same function for all.
combinations = list({combination[2:]: combination for combination in compile_triton.COMBINATIONS}.values())
devices = count()  # a new one for every question: for the same one, Triton remembers what it has been asked for


def keys() -> dict[str, str]:
    """Of every kernel, by its name."""
    compile_triton.pretend_to_have(compile_triton.gpu_target(TARGET), next(devices))
    with compilation_keys.keyed(Everything()):
        compiled = compile_triton.compile_all(combinations)
    return {name: kernel.key for name, kernel in compiled.items()}


def with_prose(source: str) -> str:
    """A function's source with comments, a blank line, and a docstring if there is none."""
    header, _, body = source.partition(":\n")
    docstring = "" if body.lstrip().startswith('"""') else '    """Words."""\n'
    return f"{header}:\n    # A comment.\n\n{docstring}{body}\n    # Another.\n"


def main() -> None:
    """Change one after the other, and change it back."""
    functions = compilation_keys.functions()
    as_written = [(function, function._src, function.starting_line_number) for function in functions]
    before = keys()

    def changed() -> list[str]:
        after = keys()
        for function, source, line in as_written:
            function._src, function.starting_line_number = source, line
        return [name for name, key in after.items() if key != before[name]]

    found = {"nothing": changed()}
    for function in functions:
        function._src = with_prose(function._src)
        function.starting_line_number += 100
    found["prose"] = changed()
    for function in functions:
        function._src += "\n    pass\n"
        found[f"{function.__module__}.{function.__name__}"] = changed()
    # By identity: a constant that other modules have imported is changed there, too.
    modules = [sys.modules[name] for name in {function.__module__: None for function in functions}]
    constants = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, constexpr)}
    code = "".join(compilation_keys.code_alone(function._src) for function in functions)
    for constant in constants.values():
        places = [(module, name) for module in modules for name, v in vars(module).items() if v is constant]
        if not any(re.search(rf"\b{name}\b", code) for _, name in places):
            continue  # no kernel uses it
        for module, name in places:
            setattr(module, name, constexpr(constant.value * 2))
        found[".".join((places[0][0].__name__, places[0][1]))] = changed()
        for module, name in places:
            setattr(module, name, constant)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
