"""Metadata lives in pyproject.toml; this shim runs CMake for the one extension module.

It imports neither torch nor numpy and touches no network. Pass CMake options through `CMAKE_ARGS`,
for example `CMAKE_ARGS="-DADAMW_KERNELS_CUDA=OFF" pip install .`.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MIN_CMAKE = (3, 25)  # as CMakeLists.txt says


class CMakeBuild(build_ext):
    """Configure and build the target `_C`, then put it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Run CMake in the build tree; its own messages say what was found."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError(
                "cmake was not found. Install it (`pip install cmake` or your system's package) and build again."
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "--fresh",  # an option of the last build must not linger in the cache
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", "--target", "_C"], check=True)


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
    ext_modules=[Extension("adamw_kernels._C", sources=[], depends=NATIVE)],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
