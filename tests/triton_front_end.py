"""Translates a kernel to Triton's intermediate language once for all targets that it would be the same for.

Triton's front end, Python from the kernel's syntax tree to that language, takes a third of a compilation's time and
hardly ever asks what it translates for. Here it is watched: which options it reads, and whether it asks for the target.
A target whose options have the same values there is given the same text, to be parsed instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.compiler import ASTSource


class Watched:
    """An object's attributes, and a record of those that were read."""

    def __init__(self, watched: Any) -> None:
        """Nothing is read yet."""
        self._watched = watched
        self.read: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """An attribute's value goes on record."""
        self.read[name] = getattr(self._watched, name)
        return self.read[name]


class WatchedTable(dict[str, Any]):
    """What the back end lends the front end by name, and whether anything was taken."""

    used = False

    def __getitem__(self, name: str) -> Any:
        """A target's own function: what comes of it is this target's."""
        self.used = True
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Likewise."""
        self.used = True
        return super().get(name, default)


class SharedFrontEnd:
    """Translations, as text, by source."""

    def __init__(self, folder: Path) -> None:
        """None yet; the parser wants files, which go to `folder`."""
        self.folder = folder
        self.translations: dict[str, list[tuple[dict[str, Any], Path]]] = {}
        self.translated = self.shared = 0  # how many
        self.asked_for_target = False

    def target_asked(self) -> None:
        """Whoever asks for the target while a kernel is being translated gets a translation of its own."""
        self.asked_for_target = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Triton translates so meanwhile."""
        original = ASTSource.make_ir
        front_end = self

        def make_ir(self: Any, target: Any, options: Any, codegen_fns: Any, module_map: Any, context: Any) -> Any:
            # Of what the options do not say, the source's hash has the rest: functions, types, constants, alignment.
            return front_end.make_ir(
                lambda *watched: original(self, target, *watched, module_map, context),
                f"{target.backend}-{self.hash()}",
                options,
                codegen_fns,
                context,
            )

        ASTSource.make_ir = make_ir
        try:
            yield
        finally:
            ASTSource.make_ir = original

    def make_ir(
        self, translate: Callable[[Any, Any], Any], source: str, options: Any, codegen_fns: Any, context: Any
    ) -> Any:
        """A module: parsed, if one that this would be equal to has been made."""
        translations = self.translations.setdefault(source, [])
        for read, path in translations:
            if all(getattr(options, name) == value for name, value in read.items()):
                self.shared += 1
                module = ir.parse_mlir_module(str(path), context)
                module.context = context
                return module
        watched, table = Watched(options), WatchedTable(codegen_fns)
        self.asked_for_target = False
        module = translate(watched, table)
        self.translated += 1
        if not (self.asked_for_target or table.used):
            path = self.folder / f"{self.translated}.ttir"
            path.write_text(str(module))
            translations.append((watched.read, path))
        return module
