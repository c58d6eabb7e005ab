"""Command line: `python -m bench [list|throughput|host|accuracy|plot]`; without a command: all but list."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import accuracy, contenders, host, machine, roof, rows, throughput
from bench.cases import cases
from bench.disturbance import NOTICEABLE_CORES
from bench.machine import Environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, runs the command and returns the exit status."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.device = torch.device(options.device)
    options.case = options.case or list(cases())
    options.dtype = options.dtype or list(DTYPES)
    commands: dict[str | None, list[Callable[[argparse.Namespace, Environment, Path], bool]]] = {
        "list": [run_list],
        "throughput": [run_throughput],
        "host": [run_host],
        "accuracy": [run_accuracy],
        "plot": [run_plot],
        None: [run_throughput, run_host, run_accuracy, run_plot],
    }
    environment = machine.environment(options.device)
    folder = options.results or machine.results_folder(environment.machine)
    try:
        rows.check_headers(folder, rows.ThroughputRow, rows.RoofRow, rows.HostRow, rows.AccuracyRow)
    except rows.SchemaError as error:
        print(error, file=sys.stderr)
        return 1
    started = time.perf_counter()
    # Every command runs even if one before it found a failure; the status tells of any.
    successes = [command(options, environment, folder) for command in commands[options.command]]
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(successes) else 1


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; every option is valid for every command."""
    shared = argparse.ArgumentParser(add_help=False)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = shared.add_argument
    add("--device", default=argparse.SUPPRESS, help=f"cpu or cuda (default: {default})")
    add("--threads", type=int, default=argparse.SUPPRESS, help="CPU threads (default: torch's own choice)")
    add("--case", action="append", choices=list(cases()), default=argparse.SUPPRESS, help="only this case; repeatable")
    add("--dtype", action="append", choices=list(DTYPES), default=argparse.SUPPRESS, help="only this dtype; repeatable")
    add(
        "--contender",
        action="append",
        choices=list(contenders.CONTENDERS),
        default=argparse.SUPPRESS,
        help="only this optimizer; repeatable",
    )
    add("--seconds", type=float, default=argparse.SUPPRESS, help="sampling time per case and dtype (default: 6)")
    add("--results", type=Path, default=argparse.SUPPRESS, help="folder of rows and figures (default: the machine's)")
    result = argparse.ArgumentParser(prog="python -m bench", description=__doc__, parents=[shared])
    result.set_defaults(device=default, threads=None, case=None, dtype=None, contender=None, seconds=6.0, results=None)
    commands = result.add_subparsers(dest="command")
    for name, summary in (
        ("list", "cases, contenders and why some cannot run"),
        ("throughput", "time of a step and GB/s of every case"),
        ("host", "Python cost per tensor and allocations of a warm step"),
        ("accuracy", "error of the weights against float64 AdamW"),
        ("plot", "figures from the rows"),
    ):
        commands.add_parser(name, help=summary, description=summary, parents=[shared])
    return result


def run_list(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Prints what would run."""
    print(f"{environment.machine}: {environment.device}, {environment.threads} threads; rows in {folder}\n")
    for case in cases().values():
        print(f"{case.name:14} {len(case.shapes):5} tensors {len(case.groups):4} groups {case.numel:12,} parameters")
    print()
    for name in options.dtype:
        running, reasons = contenders.available(options.device, DTYPES[name], options.contender)
        for contender in running:
            print(f"{name:9} {contender.name:14} available")
        for contender_name, reason in reasons.items():
            print(f"{name:9} {contender_name:14} not available: {reason}")
    return True


def run_throughput(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures every case in every dtype; rows are written after each, so an interrupted run keeps them."""
    report_unavailable(options)
    passed = True
    for name in options.case:
        for dtype in options.dtype:
            print(f"{name}, {dtype}", flush=True)
            result, failures = throughput.measure(
                cases()[name], options.device, DTYPES[dtype], seconds=options.seconds, only=options.contender
            )
            passed = passed and not failures
            rows.append(folder, environment, result)
            report(result)
    return passed


def run_host(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures the host's side of a step."""
    print("host, tensors of one element", flush=True)
    result = host.measure(options.device, seconds=2 * options.seconds, only=options.contender)
    rows.append(folder, environment, result)
    report(result)
    return True


def run_accuracy(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures how far float32 weights end from float64 AdamW."""
    print(f"accuracy, {accuracy.STEPS} steps", flush=True)
    result = accuracy.measure(options.device, only=options.contender)
    rows.append(folder, environment, result)
    report(result)
    return True


def run_plot(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Draws the figures from the rows in the folder."""
    try:
        from bench import plot
    except ImportError as error:
        print(f"plot: {error}. Install matplotlib (`pip install matplotlib`) and run `python -m bench plot`.")
        return False
    try:
        print(plot.draw(folder))
    except plot.NoRowsError as error:
        print(f"plot: {error}", file=sys.stderr)
        return False
    return True


def report_unavailable(options: argparse.Namespace) -> None:
    """Prints who is left out, and why."""
    for dtype in options.dtype:
        _, reasons = contenders.available(options.device, DTYPES[dtype], options.contender)
        for name, reason in reasons.items():
            print(f"{dtype}: without {name}: {reason}")


def report(result: list[rows.Row]) -> None:
    """Prints rows, and a warning if others disturbed them."""
    for row in result:
        print(f"  {describe(row)}", flush=True)
    other_cores = max((getattr(row, "other_cores", None) or 0.0 for row in result), default=0.0)
    if other_cores > NOTICEABLE_CORES:
        print(f"  not quiet: other processes kept {other_cores:.2f} cores busy meanwhile", flush=True)


def describe(row: rows.Row) -> str:
    """One line for the terminal."""
    if isinstance(row, rows.RoofRow):
        mark = "  <- roof" if row.is_roof else ""
        size = roof.BYTES[row.kernel] >> 20
        speed = f"{row.gb_s:7.1f} GB/s, peak {row.peak_gb_s:.1f}"
        return f"{row.kernel:14} {row.median_us:12.1f} us  {speed}  ({size} MiB){mark}"
    if isinstance(row, rows.HostRow):
        return (
            f"{row.contender:14} {row.mode:6} grads {row.grads:5} {row.tensors:5} tensors {row.median_us:9.1f} us  "
            f"fit {row.ns_per_tensor:7.1f} ns/tensor + {row.fixed_us:6.1f} us  "
            f"{row.allocations} buffers, {row.new_tensors} new tensors"
        )
    if isinstance(row, rows.AccuracyRow):
        setting = f"lr {row.lr:g}, weight decay {row.weight_decay:g}, beta2 {row.beta2:g}"
        return f"{row.contender:14} {setting:42} relative error {row.relative_error:.2e}"
    share = f"{row.pct_roof:5.1f} % of {row.roof_kernel}" if row.pct_roof is not None else ""
    speedup = f"{row.speedup:6.2f}x torch fused" if row.speedup is not None else ""
    return (
        f"{row.contender:14} {row.median_us:12.1f} us [{row.p20_us:.1f}, {row.p80_us:.1f}]  "
        f"{row.bytes_per_param:4.1f} B/param  {row.gb_s:7.1f} GB/s  {speedup}  {share}  check {row.check_error:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
