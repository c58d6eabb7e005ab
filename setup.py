"""Metadata lives in pyproject.toml; this shim runs CMake for the extension modules.

It imports neither torch nor numpy and touches no network. Pass CMake options through `CMAKE_ARGS`,
for example `CMAKE_ARGS="-DADAMW_KERNELS_CUDA=OFF" pip install .`.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
MIN_CMAKE = (3, 25)  # as CMakeLists.txt says


class CMakeBuild(build_ext):
    """Each module is a target of CMakeLists.txt."""

    def build_extensions(self) -> None:
        """Configure once; CMake's own messages say what was found."""
        self.cmake = shutil.which("cmake")
        if self.cmake is None:
            raise RuntimeError(
                "cmake was not found. Install it (`pip install cmake` or your system's package) and build again."
            )
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        # One folder for wheels and editable installs, which outlives them: only what has changed is compiled again. Of
        # the two minutes that the CUDA kernels take, a change elsewhere costs none.
        self.tree = ROOT / "build" / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.tree.mkdir(parents=True, exist_ok=True)
        # An option or a compiler of the last build must not linger, as with `--fresh`; that would remove objects, too.
        (self.tree / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (self.tree / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(found)
        configure = [
            self.cmake,
            "-S",
            str(ROOT),
            "-B",
            str(self.tree),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build the target of the module's name, and put it where setuptools expects it."""
        target = ext.name.rpartition(".")[2]
        try:
            subprocess.run([self.cmake, "--build", str(self.tree), "--parallel", "--target", target], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the module {ext.name} cannot be compiled") from error  # a warning if it is optional


def missing_tools() -> list[str]:
    """What pip should fetch for an isolated build: a CMake, where the machine has none or one that is too old."""
    try:
        words = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout.split()
        if tuple(int(part) for part in words[2].split(".")[:2]) >= MIN_CMAKE:
            return []
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        pass
    return [f"cmake>={MIN_CMAKE[0]}.{MIN_CMAKE[1]}"]


# CMake knows the sources; `depends` puts them into the source distribution.
NATIVE = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())]

setup(
    ext_modules=[
        Extension("adamw_kernels._C", sources=[], depends=NATIVE),
        # Without torch in the build environment there is none; its twin in Python takes over.
        Extension("adamw_kernels._tensor_watch", sources=[], depends=NATIVE, optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
