"""Instructions of warm steps, counted by Valgrind's callgrind: the same on a busy machine as on a quiet one.

A process under callgrind builds every step (`warm_steps.py`) uncounted, then counts one call of each. It asks callgrind
to begin and to end by client requests, from a few lines of C that are compiled for the purpose. Valgrind knows no
AVX-512, so the kernels are those for AVX2, or for the baseline where that is asked for.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER = "valgrind/callgrind.h"  # Debian's package `valgrind` brings it along
REQUESTS = f"""
#include <{HEADER}>
void start(void) {{ CALLGRIND_START_INSTRUMENTATION; }}
void begin(void) {{ CALLGRIND_ZERO_STATS; }}
void end(const char *name) {{ CALLGRIND_DUMP_STATS_AT(name); }}
"""


class UnavailableError(RuntimeError):
    """There is no callgrind here, or no compiler for its requests."""


@dataclass(frozen=True)
class Profile:
    """Instructions of one call.

    Attributes:
        instructions: All of them.
        functions: Those of each function, callees not included, by its name and the file it is in.
    """

    instructions: int
    functions: dict[tuple[str, str], int]


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "counting instructions needs valgrind (`apt-get install valgrind`)"
    if compiler() is None:
        return "counting instructions needs a C compiler, for callgrind's requests"
    asked = subprocess.run(
        [compiler() or "cc", "-E", "-x", "c", "-"], input=f"#include <{HEADER}>\n", text=True, capture_output=True
    )
    return None if asked.returncode == 0 else f"counting instructions needs {HEADER}, which comes with valgrind"


def compiler() -> str | None:
    """A C compiler."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def count(names: Sequence[str], *, isa: str = "avx2", limit_s: float = 900.0) -> dict[str, Profile]:
    """One call of each warm step of these names, on one thread.

    Raises:
        UnavailableError: something is missing; says what.
        RuntimeError: the process failed or took longer than `limit_s`.
    """
    reason = why_not()
    if reason is not None:
        raise UnavailableError(reason)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ADAMW_KERNELS_", "TRITON_"))}
    environment = {
        **kept,
        "ADAMW_KERNELS_CPU_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
    }
    with tempfile.TemporaryDirectory() as folder:
        requests, out = Path(folder, "requests.so"), Path(folder, "out")
        build = [compiler() or "cc", "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", str(requests)]
        subprocess.run(build, input=REQUESTS, text=True, check=True, capture_output=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command += ["--compress-strings=no", "--compress-pos=no", "--dump-line=no", "--error-exitcode=0"]
        command += [sys.executable, "-m", "bench.callgrind", str(requests), *names]
        try:
            finished = subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"counting instructions took more than {limit_s:.0f} s") from None
        if finished.returncode != 0:
            raise RuntimeError(f"counting instructions failed:\n{finished.stderr[-4000:]}")
        found = {}
        for path in Path(folder).glob("out.*"):
            text = path.read_text()
            name = re.search(r"(?m)^desc: Trigger: Client Request: (.*)$", text)
            if name is not None:
                found[name[1]] = parse(text.splitlines())
    return {name: found[name] for name in names}


def parse(lines: Iterable[str]) -> Profile:
    """A profile from what callgrind writes without compression of names and positions."""
    functions: Counter[tuple[str, str]] = Counter()
    library, function = "", ""
    inclusive = False  # the line after `calls=` says what the callee cost
    total = 0
    for line in lines:
        key, _, value = line.partition("=")
        if key == "ob":
            library = value
        elif key == "fn":
            function = value
        elif key == "calls":
            inclusive = True
        elif re.match(r"[+*-]?\d+ \d+$|\* \d+$", line):
            if not inclusive:
                functions[function, Path(library).name] += int(line.split()[1])
            inclusive = False
        elif line.startswith("totals:"):
            total = int(line.split()[1])
    return Profile(total, dict(functions))


# --- in the process that is counted -----------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Build all steps, then count one call of each."""
    import torch

    from bench import warm_steps

    torch.set_num_threads(1)
    gc.disable()  # when it collects depends on all that was allocated before
    requests = ctypes.CDLL(arguments[0])
    steps = [(name.encode(), warm_steps.build(name)) for name in arguments[1:]]
    requests.start()
    for text, step in steps:
        requests.begin()
        step()
        requests.end(text)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # neither torch's nor a process group's end is of interest
