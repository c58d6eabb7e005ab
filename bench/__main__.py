"""Command line: `python -m bench COMMAND`; without one: what is timed and measured on one machine, and its report.

Not among that: `curves`, half an hour of training; `hotpath`, `profile` and `instructions`, which time nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import (
    accuracy,
    bits,
    callgrind,
    contenders,
    curves,
    footprint,
    formats,
    host,
    hot_path,
    instructions,
    kernels,
    loop,
    machine,
    memory,
    profile,
    quality,
    report,
    roof,
    rows,
    tables,
    throughput,
)
from bench.cases import cases
from bench.disturbance import NOTICEABLE_CORES
from bench.machine import Environment
from bench.workloads import WORKLOADS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, runs the command and returns the exit status."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.device = torch.device(options.device)
    options.dtype = options.dtype or list(DTYPES)
    commands: dict[str | None, list[Callable[[argparse.Namespace, Environment, Path], bool]]] = {
        "list": [run_list],
        "peers": [run_peers],
        "throughput": [run_throughput],
        "loop": [run_loop],
        "memory": [run_memory],
        "host": [run_host],
        "accuracy": [run_accuracy],
        "quality": [run_quality],
        "instructions": [run_instructions],
        "hotpath": [run_hotpath],
        "profile": [run_profile],
        "bits": [run_bits],
        "kernels": [run_kernels],
        "formats": [run_formats],
        "footprint": [run_footprint],
        "curves": [run_curves],
        "plot": [run_plot],
        "tables": [run_tables],
        "report": [run_report],
        None: [
            run_peers,
            run_throughput,
            run_loop,
            run_memory,
            run_host,
            run_accuracy,
            run_quality,
            run_formats,
            run_report,
        ],
    }
    environment = machine.environment(options.device)
    folder = options.results or machine.results_folder(environment.machine)
    try:
        for place in (folder, machine.COUNTS):
            rows.check_headers(place, *rows.ROW_TYPES)
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
    add(
        "--workload",
        action="append",
        choices=list(WORKLOADS),
        default=argparse.SUPPRESS,
        help="only this part of a training loop; repeatable",
    )
    add(
        "--seconds",
        type=float,
        default=argparse.SUPPRESS,
        help="sampling time per case and dtype, and of `loop` per workload (default: 6)",
    )
    add(
        "--format",
        action="append",
        choices=list(quality.FORMATS),
        default=argparse.SUPPRESS,
        help="only this storage format of `quality`; repeatable",
    )
    add("--kind", action="append", choices=host.KINDS, default=argparse.SUPPRESS, help="only these tensors; repeatable")
    add("--isa", default=argparse.SUPPRESS, help="of `hotpath` and `profile` (default: avx2; valgrind has no AVX-512)")
    add("--results", type=Path, default=argparse.SUPPRESS, help="folder of rows and figures (default: the machine's)")
    result = argparse.ArgumentParser(prog="python -m bench", description=__doc__, parents=[shared])
    result.set_defaults(device=default, threads=None, case=None, dtype=None, contender=None, workload=None)
    result.set_defaults(seconds=6.0, results=None, format=None, kind=None, isa="avx2")
    commands = result.add_subparsers(dest="command")
    for name, summary in (
        ("list", "cases, contenders and why some cannot run"),
        ("peers", "rows of who can run here, and why others cannot"),
        ("throughput", "time of a step and GB/s of every case"),
        ("loop", "time of clipping, scaling, guarding, step and EMA against the usual training loop"),
        ("memory", "peak memory of training with gradients kept and released"),
        ("host", "Python cost per tensor and allocations of a warm step"),
        ("accuracy", "error of the weights against float64 AdamW"),
        ("quality", "errors of the moments' storage formats, ours and published ones"),
        ("instructions", "SASS instructions and bytes per element of every compiled update; needs no GPU"),
        ("hotpath", "instructions, opcodes and allocations of a warm step beside their bounds; nothing is timed"),
        ("profile", "instructions of a warm step function by function; nothing is timed"),
        ("bits", "whether this device's paths store the CPU's bits, format by format"),
        ("kernels", "time and, where readable, counters of every GPU kernel of a step"),
        ("formats", "time of a step in every storage format, beside low-memory optimizers"),
        ("footprint", "bytes that weights and state take from the allocator in every storage format"),
        ("curves", "training with several storage formats"),
        ("plot", "figures from the rows"),
        ("tables", "the READMEs' tables from the rows"),
        ("report", "figures and one Markdown report from the rows"),
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


def run_peers(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Tries everybody in every dtype and writes down how that went."""
    print("peers", flush=True)
    for dtype in options.dtype:
        running, reasons = contenders.available(options.device, DTYPES[dtype], options.contender)
        result: list[rows.Row] = [
            rows.PeerRow(
                contender=contender.name,
                dtype=dtype,
                distribution=contender.distribution,
                version=contender.version(),
                available=int(contender in running),
                reason=reasons.get(contender.name, ""),
            )
            for contender in contenders.CONTENDERS.values()
            if contender in running or contender.name in reasons
        ]
        rows.append(folder, environment, result)
        print_rows(result)
    return True


def run_throughput(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures every case in every dtype; rows are written after each, so an interrupted run keeps them."""
    report_unavailable(options)
    passed = True
    for name in options.case or cases():
        for dtype in options.dtype:
            print(f"{name}, {dtype}", flush=True)
            result, failures = throughput.measure(
                cases()[name], options.device, DTYPES[dtype], seconds=options.seconds, only=options.contender
            )
            passed = passed and not failures
            rows.append(folder, environment, result)
            print_rows(result)
    return passed


def run_loop(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures what follows backward in a training loop, against the usual loop; rows are written after each dtype."""
    report_unavailable(options)
    passed = True
    for name in options.case or loop.CASES:
        for dtype in options.dtype:
            print(f"loop, {name}, {dtype}", flush=True)
            result, failures = loop.measure(
                cases()[name],
                options.device,
                DTYPES[dtype],
                seconds=options.seconds,
                only=options.contender,
                names=options.workload,
            )
            passed = passed and not failures
            rows.append(folder, environment, result)
            print_rows(result)
    return passed


def run_memory(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures the peak memory of training, each in a process of its own."""
    print("memory", flush=True)
    result, failures = memory.measure(options.device, only=options.contender)
    for failure in failures:
        print(f"  {failure}", file=sys.stderr, flush=True)
    rows.append(folder, environment, result)
    print_rows(result)
    return not failures


def run_host(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures the host's side of a step."""
    print("host, tensors of one element", flush=True)
    result, reasons = host.measure(
        options.device,
        seconds=2 * options.seconds,
        only=options.contender,
        kinds=tuple(options.kind or host.KINDS),
    )
    for name, reason in reasons.items():
        print(f"  left out: {name}: {reason}")
    rows.append(folder, environment, result)
    print_rows(result)
    measured = {row.contender for row in result if isinstance(row, rows.HostRow)}
    return any(contenders.CONTENDERS[name].is_ours for name in measured) or options.contender is not None


def run_accuracy(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures how far float32 weights end from float64 AdamW."""
    print(f"accuracy, {accuracy.STEPS} steps", flush=True)
    result = accuracy.measure(options.device, only=options.contender)
    rows.append(folder, environment, result)
    print_rows(result)
    return True


def run_instructions(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Counts the instructions of the compiled updates; passes where there are none to count."""
    print("instructions", flush=True)
    result: list[rows.Row] = []
    for backend in instructions.BACKENDS:
        try:
            counted = instructions.measure(backend)
        except instructions.UnavailableError as error:
            print(f"  left out: {backend}: {error}")
            continue
        print_rows(counted)
        result += counted
    rows.append(options.results or machine.COUNTS, environment, result)
    return True


def run_hotpath(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Counts the warm step's work; fails where a bound is exceeded."""
    print("hotpath", flush=True)
    result: list[rows.Row] = []
    try:
        for row in hot_path.measure(options.isa):
            print_rows([row])
            result.append(row)
    except callgrind.UnavailableError as error:
        print(f"  hotpath: {error}")
    rows.append(options.results or machine.COUNTS, environment, result)
    return all(row.count <= row.bound for row in result if isinstance(row, rows.HotPathRow))


def run_profile(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Counts the warm step's instructions by function; passes where they cannot be counted."""
    print("profile", flush=True)
    try:
        result: list[rows.Row] = [*profile.measure(options.isa)]
    except callgrind.UnavailableError as error:
        print(f"  profile: {error}")
        return True
    rows.append(options.results or machine.COUNTS, environment, result)
    print_rows(result)
    return True


def run_bits(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Compares what this device's paths store with the CPU; fails where a bit differs."""
    print("bits", flush=True)
    passed = True
    for row in bits.measure(options.device):
        passed = passed and row.differing == 0
        rows.append(folder, environment, [row])
        print_rows([row])
    return passed


def run_kernels(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Asks the profilers about every kernel of a step; passes where there is no GPU to ask."""
    print("kernels", flush=True)
    result, reasons = kernels.measure(options.device)
    for reason in reasons:
        print(f"  kernels: {reason}")
    rows.append(folder, environment, result)
    print_rows(result)
    return True


def run_report(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Draws what there are rows for, and writes the report."""
    run_plot(options, environment, folder)
    print(report.write(folder))
    return True


def run_quality(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Measures every storage format of the moments; fails if our 8-bit moments miss an acceptance figure."""
    passed = True
    for name in options.format or quality.FORMATS:
        print(f"quality, {name}", flush=True)
        result: list[rows.Row] = []
        for row in quality.measure(quality.FORMATS[name], options.device):
            passed = passed and not (name == "8bit" and row.met == 0)
            result.append(row)
            print_rows([row])
        rows.append(folder, environment, result)
    return passed


def run_formats(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Times every storage format; fails if one of ours did not pass its check."""
    passed = True
    for case in formats.cases(options.device):
        print(f"formats, {case.title}", flush=True)
        result, reasons = formats.measure(case, options.device, seconds=10 * options.seconds)
        print_rows(result)
        for name, reason in reasons.items():
            print(f"  left out: {name}: {reason}")
        rows.append(folder, environment, result)
        passed = passed and not any(name.startswith("ours") for name in reasons)
    return passed


def run_footprint(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Counts bytes in every storage format; fails if one of ours did not run."""
    print("footprint", flush=True)
    result: list[rows.Row] = []
    reasons: dict[str, str] = {}
    for row in footprint.measure(options.device, reasons):
        result.append(row)
        print_rows([row])
    for name, reason in reasons.items():
        print(f"  left out: {name}: {reason}")
    rows.append(options.results or machine.COUNTS, environment, result)
    return not any(name.startswith("ours") for name in reasons)


def run_curves(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Trains in every format with every seed, one seed after the other."""
    for seed in curves.SEEDS:
        for run in curves.RUNS:
            result: list[rows.Row] = [*curves.train(run, seed, options.device)]
            print_rows(result[-1:])
            rows.append(folder, environment, result)
    return True


def run_tables(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Writes the tables of README and of this folder's README anew."""
    for path in tables.FILES:
        path.write_text(tables.fill(path.read_text(), folder))
    return True


def run_plot(options: argparse.Namespace, environment: Environment, folder: Path) -> bool:
    """Draws the figures from the rows in the folder."""
    try:
        from bench import plot, plot_curves, plot_formats, plot_loop, plot_sizes
    except ImportError as error:
        print(f"plot: {error}. Install matplotlib (`pip install matplotlib`) and run `python -m bench plot`.")
        return False
    others = (plot_loop.draw, plot_curves.draw, plot_sizes.draw_roofline, plot_sizes.draw_counts, plot_formats.draw)
    for figure in (draw(folder) for draw in others):
        if figure is not None:
            print(figure)
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


def print_rows(result: list[rows.Row]) -> None:
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
    if isinstance(row, rows.PeerRow):
        state = "available" if row.available else f"not available: {row.reason}"
        return f"{row.contender:18} {row.dtype:9} {row.distribution} {row.version or 'not installed'}: {state}"
    if isinstance(row, rows.SkippedRow):
        return f"{row.contender:14} left out: {row.reason}"
    if isinstance(row, rows.HotPathRow):
        mark = "" if row.count <= row.bound else "  <- above its bound"
        return f"{row.tool:12} {row.name:32} per {row.per:8} {row.count:10.2f}  bound {row.bound:g}{mark}"
    if isinstance(row, rows.ProfileRow):
        return (
            f"{row.grads:5} {row.place:3} {row.instructions_per_tensor:8.1f} instructions a tensor {row.share:5.1f} %  "
            f"{row.function} ({row.library})"
        )
    if isinstance(row, rows.BitsRow):
        formats_ = f"{row.param}/{row.grad} {row.param_format}/{row.moment_format} {row.options}"
        verdict = "the same bits" if row.differing == 0 else f"{row.differing} elements differ"
        return f"{row.backend:8} against {row.against}: {formats_:55} {row.elements} elements: {verdict}"
    if isinstance(row, rows.KernelRow):
        return (
            f"{row.case:12} {row.dtype:9} {row.contender:12} {row.median_us:9.1f} us x {row.launches:g} {row.kernel} "
            f"{row.counters}"
        )
    if isinstance(row, rows.StageRow):
        return f"{row.stage:14} {row.outcome:12} {row.seconds:6.1f} of {row.limit:.0f} s  {row.detail}"
    if isinstance(row, rows.HostRow):
        return (
            f"{row.contender:18} {row.kind:7} {row.mode:6} grads {row.grads:5} {row.tensors:5} tensors "
            f"{row.median_us:9.1f} us  "
            f"fit {row.ns_per_tensor:7.1f} ns/tensor + {row.fixed_us:6.1f} us  "
            f"{row.allocations} buffers, {row.new_tensors} new tensors"
        )
    if isinstance(row, rows.AccuracyRow):
        setting = f"lr {row.lr:g}, weight decay {row.weight_decay:g}, beta2 {row.beta2:g}"
        return f"{row.contender:14} {setting:42} relative error {row.relative_error:.2e}"
    if isinstance(row, rows.QualityRow):
        verdict = "" if row.limit is None else f"limit {row.limit:.4g}" + ("" if row.met else "  <- not met")
        return f"{row.metric:18} {row.setting:25} beta2 {row.beta2:<5g} {row.value:10.3g}  {verdict}"
    if isinstance(row, rows.FormatRow):
        name = f"{row.contender} {row.dtype} {row.param_format}/{row.moment_format}"
        return (
            f"{name:45} {row.kept_bytes_per_param:6.3f} B kept {row.median_us / 1e3:9.3f} ms {row.gb_s:6.1f} GB/s "
            f"{row.speedup_over_torch_float32:5.2f}x float32 {row.speedup_over_torch_bfloat16:5.2f}x bfloat16"
        )
    if isinstance(row, rows.FootprintRow):
        name = f"{row.contender} {row.dtype} {row.param_format}/{row.moment_format}"
        return (
            f"{name:45} {row.allocated_bytes_per_param:6.3f} B kept, a warm step's largest temporary "
            f"{row.largest_temporary_share:.2%} of the state, all {row.temporaries_share:.2%}"
        )
    if isinstance(row, rows.InstructionRow):
        return (
            f"{row.backend:6} {row.target:6} {row.param:6} {row.grad:6} {row.moments:6} {row.param_format:10} "
            f"{row.registers:3} regs  "
            f"{row.instructions_per_element:6.1f} instructions and {row.bytes_per_element:5.2f} bytes an element, "
            f"{row.h100_bound} bound on H100 ({row.h100_budget:.0f}), {row.h200_bound} on H200 ({row.h200_budget:.0f})"
        )
    if isinstance(row, rows.CurveRow):
        return (
            f"{row.format:18} seed {row.seed} step {row.step}: train {row.train_loss:.4f} val {row.val_loss or 0:.4f}"
        )
    if isinstance(row, rows.MemoryRow):
        return (
            f"{row.contender:14} gradients {row.gradients:8} peak {row.peak_mib:7.1f} MiB: "
            f"weights {row.weight_mib:.1f}, state {row.state_mib:.1f}, gradients and the rest {row.transient_mib:.1f}"
        )
    if isinstance(row, rows.LoopRow):
        speedup = f"{row.speedup:6.2f}x the usual loop" if row.speedup is not None else ""
        speedup += f" ({row.expected_speedup:.2f}x from bytes)" if row.expected_speedup is not None else ""
        return (
            f"{row.workload:11} {row.contender:11} {row.median_us:12.1f} us [{row.p20_us:.1f}, {row.p80_us:.1f}]  "
            f"{row.bytes_per_param:4.1f} B/param  {row.gb_s:7.1f} GB/s  {speedup}  check {row.check_error:.2f}"
        )
    share = f"{row.pct_roof:5.1f} % of {row.roof_kernel}" if row.pct_roof is not None else ""
    speedup = f"{row.speedup:6.2f}x torch fused" if row.speedup is not None else ""
    return (
        f"{row.contender:14} {row.median_us:12.1f} us [{row.p20_us:.1f}, {row.p80_us:.1f}]  "
        f"{row.bytes_per_param:4.1f} B/param  {row.gb_s:7.1f} GB/s  {speedup}  {share}  check {row.check_error:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
