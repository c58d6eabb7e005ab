"""What Triton made of every kernel for every target, on record: only what has changed since is compiled again.

    python tests/triton_record.py

writes the record, `triton_record.csv`, anew: it compiles everything, four minutes on two cores. Until that is done
after a change to the kernels, the tests compile what has changed; with another version of Triton, of nvdisasm or of
what reads their output, everything. Whatever is on record is compiled all the same in its turn, some of it every day,
and must come out as it stands there.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compilation_keys import code_alone
from machine_code import nvidia_tool

import adamw_kernels

TESTS = Path(__file__).resolve().parent
FILE = TESTS / "triton_record.csv"
NVIDIA = ["sm_80", "sm_90", "sm_100", "sm_120"]
AMD = ["gfx942"]
TARGETS = [*NVIDIA, *AMD]
PROCESSES = 2  # each with a share of the kernels, for all targets
SAMPLE = 2  # kernels of every target that are compiled though they are on record

# What comes of compiling: of a target, by the kernel's name. See `compile_triton.collect`.
Kernels = dict[str, dict[str, dict[str, Any]]]


@dataclass
class Record:
    """Compiled kernels, and what a reader must have in common with whoever compiled them beside their keys."""

    made_with: dict[str, str]
    kernels: Kernels

    @classmethod
    def read(cls, file: Path = FILE) -> Record:
        """The committed one. A row holds one number, or digest, of every kernel."""
        with file.open(newline="") as lines:
            (_, _, _, *names), *rows = csv.reader(lines)
        record = cls({}, {})
        for target, kind, what, *values in rows:
            if not target:
                record.made_with[what] = values[0]
                continue
            kernels = record.kernels.setdefault(target, {})
            for name, value in zip(names, values, strict=True):
                if not value:
                    continue
                kernel = kernels.setdefault(name, {})
                if kind == "digest":
                    kernel[what] = value
                else:
                    kernel.setdefault(kind, {})[what] = int(value)
        return record

    def write(self, file: Path = FILE) -> None:
        """Commit it afterwards."""
        names = list(dict.fromkeys(name for kernels in self.kernels.values() for name in kernels))
        with file.open("w", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(["target", "kind", "what", *names])
            for what, value in self.made_with.items():
                writer.writerow(["", "made with", what, value])
            for target, kernels in self.kernels.items():
                flat = {name: flattened(kernel) for name, kernel in kernels.items()}
                for row in sorted({row for kernel in flat.values() for row in kernel}):
                    writer.writerow([target, *row, *(flat.get(name, {}).get(row, "") for name in names)])

    def in_turn(self, day: int) -> set[str]:
        """Keys of the kernels to be compiled on a day: in half as many days as there are kernels, of all of them."""
        keys = set()
        for target, kernels in self.kernels.items():
            ordered = sorted(kernels)
            for i in range(SAMPLE):
                # Other kernels for other targets.
                position = SAMPLE * (day + 7 * TARGETS.index(target)) + i
                keys.add(kernels[ordered[position % len(ordered)]]["key"])
        return keys

    def disagreements(self, compiled: Kernels) -> list[str]:
        """Which of these were compiled, are on record under the same key, and came out differently."""
        return [
            f"{name} for {target}"
            for target, kernels in self.by_key().items()
            for name, kernel in compiled.get(target, {}).items()
            if was_compiled(kernel) and kernel.get("key") in kernels and kernels[kernel["key"]] != kernel
        ]

    def by_key(self) -> dict[str, dict[str, dict[str, Any]]]:
        """A target's kernels by their keys."""
        return {
            target: {kernel["key"]: kernel for kernel in kernels.values()} for target, kernels in self.kernels.items()
        }

    def filled_in(self, compiled: Kernels) -> Kernels:
        """These, with what is on record for those that were not compiled."""
        recorded = self.by_key()
        return {
            target: {
                name: kernel if was_compiled(kernel) else recorded[target][kernel["key"]]
                for name, kernel in kernels.items()
            }
            for target, kernels in compiled.items()
        }


def flattened(kernel: dict[str, Any]) -> dict[tuple[str, str], int | str]:
    """By kind and name: what stands in one table within it, and its digests."""
    found: dict[tuple[str, str], int | str] = {}
    for kind, value in kernel.items():
        if isinstance(value, dict):
            found |= {(kind, what): number for what, number in value.items()}
        else:
            found["digest", kind] = value
    return found


def was_compiled(kernel: dict[str, Any]) -> bool:
    """Whether there is more than its key."""
    return bool(kernel.keys() - {"key"})


def made_with_here() -> dict[str, str]:
    """Versions of the compiler and the disassembler, and a digest of the code that drives and reads them."""
    tool = nvidia_tool("nvdisasm")
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if tool else "there is none"
    readers = ["compile_triton.py", "compilation_keys.py", "machine_code.py", "triton_front_end.py"]
    code = "".join(code_alone((TESTS / name).read_text()) for name in readers)
    return {
        "triton": importlib.metadata.version("triton"),
        "nvdisasm": version.split("\n")[-2] if "\n" in version else version,
        "readers": hashlib.sha256(code.encode()).hexdigest()[:16],
    }


def known_here(record: Record, day: int | None = None) -> set[str] | None:
    """Keys that need not be compiled, today or on a day of the calendar; None if the record says nothing here."""
    if record.made_with != made_with_here():
        return None
    today = datetime.datetime.now(datetime.timezone.utc).date().toordinal()
    keys = {kernel["key"] for kernels in record.kernels.values() for kernel in kernels.values()}
    return keys - record.in_turn(today if day is None else day)


def compile_kernels(folder: Path, known: set[str] | None) -> Kernels:
    """What `compile_triton.py` writes about all kernels, in several processes; `known`: keys of those to leave out."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(adamw_kernels.__file__).parents[1])
    options = []
    if known is not None:
        (folder / "known.json").write_text(json.dumps(sorted(known)))
        options = ["--known", str(folder / "known.json")]

    def compile_share(number: int) -> Kernels:
        output = folder / f"{number}.json"
        result = subprocess.run(
            [
                sys.executable,
                str(TESTS / "compile_triton.py"),
                str(output),
                f"{number}/{PROCESSES}",
                *TARGETS,
                *options,
            ],
            env={**environment, "TRITON_CACHE_DIR": str(folder / f"cache-{number}")},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        found: Kernels = json.loads(output.read_text())
        return found

    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = list(pool.map(compile_share, range(PROCESSES)))
    return {target: {name: kernel for share in shares for name, kernel in share[target].items()} for target in TARGETS}


def main() -> None:
    """Compile everything and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        Record(made_with_here(), compile_kernels(Path(folder), set())).write()


if __name__ == "__main__":
    main()
