"""`make gpu-report`: everything there is to know about one GPU, in one command and under nine minutes.

Works offline, with the interpreter that runs it: its own torch, triton and pytest, and an nvcc and cmake on PATH. Each
stage is a process of its own with a limit of its own; one that takes longer is ended, with all it started, and reported
as out of time; one that fails is reported as failed, and the others go on. Rows that a stage has written stay. The last
stage draws the figures and writes `report.md` into `bench/results/<machine>/`.

    python -m bench.gpu_report                       # all of it
    python -m bench.gpu_report --stage build --stage bits
    python -m bench.gpu_report --dry-run             # what would run
    python -m bench.gpu_report --device cpu          # the CPU stands in: for looking at this program itself
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import machine, rows
from bench.machine import REPOSITORY, Environment
from bench.rows import StageRow

BUDGET_S = 525.0
RESERVE_S = 30.0  # of it, for the last stage
LEAST_S = 5.0  # with less left, a stage is not begun
GRACE_S = 5.0  # between asking a stage to end and ending it
WORK = REPOSITORY / "build" / "gpu-report"

# These need no GPU, or only look at one; they come last.
NOT_ON_GPU = (
    "test_bench_tables",
    "test_bench",
    "test_compiled_cuda",
    "test_compiled_triton",
    "test_cuda_on_host",
    "test_cuda_stand_in",
    "test_example_train",
    "test_hot_path",
    "test_paper",
    "test_paper_examples",
    "test_quality",
    "test_reference",
    "test_reference_formats",
)
# The most telling first: what there is no time for is missing from the end.
THROUGHPUT_CASES = (
    *("one_large", "many_small", "groups_465", "gpt2_small", "llama3_8b_of_8", "one_2p20", "one_2p28", "moe_10000"),
    *("lora_1000", "resnet50", "embedding", "count_1", "count_100", "count_10000", "one_2p24", "one_2p30"),
)


def last_line(log: str) -> str:
    """What a stage said last."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def pytest_summary(log: str) -> str:
    """How many tests passed and failed, also of a run that did not end, and the first that failed."""
    ended = re.findall(r"(?m)^=* ?(\d+ (?:passed|failed|error|skipped).*?) ?=*$", log)
    counts = [(word, len(re.findall(rf"(?m)\b{word}\b", log))) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")]
    text = ended[-1] if ended else ", ".join(f"{count} {word.lower()}" for word, count in counts if count) + " so far"
    failed = list(dict.fromkeys(re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", log)))
    named = "; failed: " + ", ".join(failed[:8]) + (" and more" if len(failed) > 8 else "") if failed else ""
    return text + named


@dataclass(frozen=True)
class Stage:
    """One part of the report.

    Attributes:
        name: How rows call it.
        limit_s: The most it may take.
        commands: One after another, until one fails.
        why_not: Why it cannot run here; empty if it can.
        summary: One line from what it printed.
    """

    name: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]
    why_not: str = ""
    summary: Callable[[str], str] = last_line


# --- the stages -------------------------------------------------------------------------------------------------------


def stages(device: torch.device, folder: Path, seconds: float) -> list[Stage]:
    """All stages but the last, in order.

    Args:
        device: What the report is about.
        folder: Where rows go.
        seconds: Sampling time per case and dtype.
    """
    python = sys.executable
    on_gpu = device.type == "cuda"

    def bench(*arguments: str) -> tuple[str, ...]:
        return python, "-m", "bench", *arguments, "--device", str(device), "--results", str(folder)

    def short(*arguments: str) -> tuple[str, ...]:
        return bench(*arguments, "--seconds", f"{seconds:g}")

    cases = [word for case in THROUGHPUT_CASES for word in ("--case", case)]
    sanitizer = shutil.which("compute-sanitizer") or ""
    no_gpu = "" if on_gpu else f"the device is {device}"
    return [
        Stage("build", 120, build_commands(device), why_not=missing("cmake", *(("nvcc",) if on_gpu else ()))),
        Stage("describe", 20, ((python, "-m", "adamw_kernels"),), summary=lambda log: chosen(log, device)),
        Stage("peers", 40, (bench("peers"),), summary=lambda log: f"{log.count(': available')} available"),
        Stage("tests", 150, (pytest_command(NOT_ON_GPU, only=False),), pytest_missing(), pytest_summary),
        Stage("bits", 40, (bench("bits"),)),
        Stage(
            "sanitizer",
            40,
            (
                (
                    sanitizer,
                    "--tool",
                    "memcheck",
                    "--error-exitcode",
                    "1",
                    python,
                    "-m",
                    "bench.bits",
                    "--device",
                    "cuda",
                ),
            ),
            no_gpu or ("" if sanitizer else "compute-sanitizer, of the CUDA toolkit, is not on PATH"),
        ),
        Stage("throughput", 100, (short("throughput", *cases),)),
        Stage("host", 25, (short("host"),)),
        Stage("formats", 40, (bench("formats", "--seconds", f"{seconds / 5:g}"),)),
        Stage("kernels", 30, (bench("kernels"),), why_not=no_gpu),
        Stage("loop", 30, (short("loop"),)),
        Stage("memory", 25, (bench("memory"),)),
        Stage("other tests", 150, (pytest_command(NOT_ON_GPU, only=True),), pytest_missing(), pytest_summary),
    ]


def last_stage(device: torch.device, folder: Path) -> Stage:
    """Figures and the report."""
    command = (sys.executable, "-m", "bench", "report", "--device", str(device), "--results", str(folder))
    return Stage("report", RESERVE_S, (command,))


def build_commands(device: torch.device) -> tuple[tuple[str, ...], ...]:
    """The extension module for this interpreter and this GPU alone, put beside the package's Python files."""
    tree = WORK / "build"
    configure = ["cmake", "-S", str(REPOSITORY), "-B", str(tree), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={REPOSITORY / 'adamw_kernels'}"]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        configure += ["-DADAMW_KERNELS_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]
    else:
        configure += ["-DADAMW_KERNELS_CUDA=OFF"]
    if find_spec("pybind11") is None:
        configure += [f"-Dpybind11_DIR={REPOSITORY / 'bench' / 'pybind11_of_torch'}"]
    return tuple(configure), ("cmake", "--build", str(tree), "--parallel")


def missing(*tools: str) -> str:
    """Which of these programs are not on PATH."""
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    return f"not on PATH: {', '.join(lacking)}" if lacking else ""


def pytest_command(named: Sequence[str], *, only: bool) -> tuple[str, ...]:
    """The tests of these files only, or of all others; over many processes where pytest-xdist is installed."""
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    chosen_files = [str(path.relative_to(REPOSITORY)) for path in files if (path.stem in named) == only]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:
        command += ["-n", str(max(2, (os.cpu_count() or 2) - 2)), "--dist", "loadfile"]
    return (*command, *chosen_files)


def pytest_missing() -> str:
    """Why the tests cannot run."""
    lacking = [name for name in ("pytest", "hypothesis", "numpy") if find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def chosen(log: str, device: torch.device) -> str:
    """The backend that `describe()` says a device gets."""
    found = re.search(rf"tensors on {device.type}.*?chosen +(\S+)", log, re.DOTALL)
    return f"{found[1]} is chosen" if found else last_line(log)


# --- running them -----------------------------------------------------------------------------------------------------


def run(stage: Stage, left_s: float) -> StageRow:
    """Runs a stage in the time that is left."""
    limit = min(stage.limit_s, left_s)
    if stage.why_not or left_s < LEAST_S:
        return StageRow(stage.name, "not run", 0.0, stage.limit_s, stage.why_not or "there was no time left")
    WORK.mkdir(parents=True, exist_ok=True)
    log_path = WORK / f"{stage.name.replace(' ', '-')}.log"
    started = time.perf_counter()
    status: int | None = 0
    with log_path.open("w") as log:
        for command in stage.commands:
            status = run_command(command, log.fileno(), limit - (time.perf_counter() - started))
            if status != 0:
                break
    text = log_path.read_text(errors="replace")
    outcome = "out of time" if status is None else "passed" if status == 0 else "failed"
    detail = stage.summary(text)
    if outcome == "failed" and not detail:
        detail = f"exit status {status}"
    return StageRow(stage.name, outcome, time.perf_counter() - started, limit, detail[:1000])


def run_command(command: Sequence[str], log: int, limit_s: float) -> int | None:
    """Exit status of a command; None if it took too long and was ended, with all that it started."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ADAMW_KERNELS_")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
    except OSError as error:
        os.write(log, f"{command[0]}: {error}\n".encode())
        return 127
    try:
        return process.wait(max(limit_s, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its whole group, asking first; what outlived its leader, too."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages and returns 1 unless each that could run passed."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default=default, help=f"cuda, or cpu to stand in (default: {default})")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds for all (default: {BUDGET_S:g})")
    parser.add_argument("--seconds", type=float, default=1.0, help="sampling time per case and dtype (default: 1)")
    parser.add_argument("--stage", action="append", help="only this stage, and the report; repeatable")
    parser.add_argument("--results", type=Path, help="folder of rows, figures and the report (default: the machine's)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    environment = machine.environment(device)
    folder = options.results or machine.results_folder(environment.machine)
    wanted = stages(device, folder, options.seconds)
    unknown = set(options.stage or ()) - {stage.name for stage in wanted}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in wanted)}")
    wanted = [stage for stage in wanted if not options.stage or stage.name in options.stage]
    if options.dry_run:
        for stage in (*wanted, last_stage(device, folder)):
            print(f"{stage.name} ({stage.limit_s:g} s){': not run, ' + stage.why_not if stage.why_not else ''}")
            for command in stage.commands:
                print(f"  {' '.join(command)}")
        return 0
    return report(wanted, last_stage(device, folder), environment, folder, options.budget)


def report(wanted: list[Stage], last: Stage, environment: Environment, folder: Path, budget_s: float) -> int:
    """Runs these stages within the budget, and the last one whatever came before; a row each."""
    started = time.perf_counter()
    passed = True
    for stage in (*wanted, last):
        reserve = 0.0 if stage is last else RESERVE_S
        row = run(stage, max(budget_s - reserve - (time.perf_counter() - started), LEAST_S if stage is last else 0.0))
        passed = passed and row.outcome in ("passed", "not run")
        if stage is not last:
            rows.append(folder, environment, [row])
        print(f"{row.stage:12} {row.outcome:12} {row.seconds:6.1f} of {row.limit:3.0f} s  {row.detail}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s; logs are in {WORK}, the report is {folder / 'report.md'}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
