"""What one optimizer step costs where no machine at hand can show it: models of 7 B to 1 T parameters over many ranks.

    python -m bench.scale_model                                        # every model, a few formats
    python -m bench.scale_model --model 405b --ranks 1024 --format split24/8bit --bandwidth 4800

A simulation, and printed as one. Its inputs are measured rows of one machine (`--machine`, a folder of bench/results):

    bytes per rank   elements of the largest shard * (kept_bytes_per_param of formats.csv + bytes of a gradient)
    launch table     a real one, built here over meta tensors of the shards' sizes: its bytes, the seconds it took
    host             ns_per_tensor * tensors + fixed_us of host.csv: DTensors, gradients that moved, kernels stubbed
    device           elements * moved_bytes_per_param / (bandwidth * gb_s of formats.csv / roof of roof.csv)

The last says: a format that reached this share of the measured machine's memory speed reaches the same share of
`--bandwidth`. Rows of a CPU, where the narrow formats are bound by instructions, therefore say little about a GPU;
those of a GPU do not exist yet. Where a row is missing, so is the figure. What a step takes is the larger of host and
device: the host runs ahead. Communication is not part of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adamw_kernels.backends import Backend
from adamw_kernels.functional import chooser
from adamw_kernels.launch_table import MAX_CHUNKS, LaunchTable, TensorSpec
from bench import machine, rows
from bench.formats import KEYS, latest

Shape = tuple[int, ...]
CPU = torch.device("cpu")


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A transformer by its shapes; every matrix and every expert's matrices are tensors of their own."""

    name: str
    title: str
    layers: int
    width: int
    hidden: int
    kv_width: int
    vocabulary: int
    experts: int = 0  # of a layer; each has three matrices of `expert_hidden`
    expert_hidden: int = 0
    dense_layers: int = 0  # first layers without experts

    def shapes(self) -> Iterator[Shape]:
        """Every parameter, in the order of the layers."""
        w = self.width
        yield self.vocabulary, w
        for layer in range(self.layers):
            yield from ((w, w), (self.kv_width, w), (self.kv_width, w), (w, w), (w,), (w,))
            if self.experts and layer >= self.dense_layers:
                yield self.experts, w  # router
                for _ in range(self.experts + 1):  # and one that all tokens share
                    yield from ((self.expert_hidden, w), (self.expert_hidden, w), (w, self.expert_hidden))
            else:
                yield from ((self.hidden, w), (self.hidden, w), (w, self.hidden))
        yield (w,)
        yield self.vocabulary, w


MODELS = {
    model.name: model
    for model in (
        Model("7b", "7 B (Llama 2)", 32, 4096, 11008, 4096, 32000),
        Model("70b", "70 B (Llama 3)", 80, 8192, 28672, 1024, 128256),
        Model("405b", "405 B (Llama 3.1)", 126, 16384, 53248, 1024, 128256),
        Model("1t", "1 T, mixture of 384 experts", 61, 7168, 18432, 1024, 163840, 384, 2048, 1),
    )
}


def shard_numels(shapes: Iterator[Shape], ranks: int) -> list[int]:
    """Elements that rank 0, whose shards are the largest, holds of each tensor: rows as `torch.chunk` deals them."""
    numels = []
    for shape in shapes:
        row = 1
        for size in shape[1:]:
            row *= size
        numels.append(-(-shape[0] // ranks) * row)
    return numels


# --- the launch table, built for real ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A launch table that was built.

    Attributes:
        seconds: wall-clock time, tensors' descriptions included.
        bytes: of all its arrays.
        chunks: of an update.
    """

    seconds: float
    bytes: int
    chunks: int


def build_table(numels: list[int]) -> Built:
    """Build the launch table of float32 tensors of these sizes; they are meta tensors, which have no memory."""
    backend: Backend = chooser("cpu")(CPU)
    step = torch.zeros(())
    of_size = {numel: torch.empty(numel, device="meta") for numel in {*numels}}
    started = time.perf_counter()
    tensors = (of_size[numel] for numel in numels)
    specs = [TensorSpec("a parameter", t, torch.float32, t, t, None, step, 0) for t in tensors]
    chunk_size = backend.chunk_size
    while sum(numels) // chunk_size > MAX_CHUNKS:
        chunk_size *= 2
    table = LaunchTable(CPU, specs, 1, backend, chunk_size)
    seconds = time.perf_counter() - started
    held = (table.rows, table.chunks, table.coefficients, table.device_grads, table.hypers, table.norm_chunks)
    return Built(seconds, sum(tensor.nbytes for tensor in held), table.num_chunks)


# --- measured rows ----------------------------------------------------------------------------------------------------


class Measured:
    """What one machine's rows say."""

    def __init__(self, folder: Path) -> None:
        """Read the latest rows.

        Raises:
            SystemExit: there are none.
        """
        self.folder = folder
        self.formats = {tuple(row[key] for key in KEYS): row for row in latest(folder)}
        host = [row for row in rows.read(folder, rows.HostRow) if (row["mode"], row["grads"]) == ("python", "moved")]
        self.host = {(row["contender"], row["kind"]): row for row in rows.latest(host, "contender", "kind")}
        roofs = [row for row in rows.read(folder, rows.RoofRow) if row["is_roof"]]
        if not self.formats or not self.host or not roofs:
            raise SystemExit(
                f"{folder} lacks rows of formats, host or roof: run `python -m bench formats host` there first"
            )
        # That of the run in which the formats were measured, where it has one.
        runs = {row["run"] for row in self.formats.values()}
        self.roof = float(max(row["peak_gb_s"] for row in [r for r in roofs if r["run"] in runs] or roofs))

    def ours(self, param_format: str, moment_format: str) -> dict[str, Any] | None:
        """Our row of a format; bfloat16 weights, but for "float32" ones."""
        dtype, stored = ("float32", "native") if param_format == "float32" else ("bfloat16", param_format)
        for (contender, *format_), row in self.formats.items():
            if contender.startswith("ours") and format_ == [dtype, stored, moment_format]:
                return row
        return None

    def torch_fused(self, dtype: str) -> dict[str, Any] | None:
        """The fused AdamW of torch on weights and gradients of a dtype."""
        moments = {"float32": "float32", "bfloat16": "bfloat16"}[dtype]
        return self.formats.get(("torch_fused", dtype, "native", moments))

    def host_us(self, is_ours: bool, tensors: int) -> float | None:
        """Host time of a warm step over this many DTensors."""
        for (contender, kind), row in self.host.items():
            if (
                kind == "dtensor"
                and contender.startswith("ours") == is_ours
                and (is_ours or contender == "torch_fused")
            ):
                return float(row["ns_per_tensor"] * tensors / 1e3 + row["fixed_us"])
        return None

    def device_s(self, row: dict[str, Any] | None, elements: int, bandwidth: float) -> float | None:
        """Seconds of a step over this many elements at this memory bandwidth, in GB/s."""
        if row is None:
            return None
        share = min(1.0, row["gb_s"] / self.roof)
        return float(elements * row["moved_bytes_per_param"] / (bandwidth * 1e9 * share))


# --- the table --------------------------------------------------------------------------------------------------------

FORMATS = ("float32/float32", "split32/float32", "split24/8bit", "stochastic/8bit")
GRAD_BYTES = {"float32": 4, "bfloat16": 2}
HEADER = (
    *("model", "ranks", "format", "tensors", "elements/rank", "GiB/rank", "table MB", "built in s"),
    *("host us", "device s", "step s", "torch fused: GiB/rank", "host us", "device s", "step s"),
)


def lines(
    measured: Measured, model: Model, ranks: int, formats: list[str], bandwidth: float
) -> Iterator[tuple[str, ...]]:
    """One line a format: ours, then torch fused on weights of the same dtype."""
    numels = shard_numels(model.shapes(), ranks)
    elements, table = sum(numels), build_table(numels)
    for name in formats:
        param_format, moment_format = name.split("/")
        dtype = "float32" if param_format == "float32" else "bfloat16"
        beginning = model.title, f"{ranks:,}", name, f"{len(numels):,}", f"{elements:.3e}"
        cells: list[str] = []
        for is_ours in (True, False):
            row = measured.ours(param_format, moment_format) if is_ours else measured.torch_fused(dtype)
            kept = None if row is None else elements * (row["kept_bytes_per_param"] + GRAD_BYTES[dtype]) / 2**30
            host, device = measured.host_us(is_ours, len(numels)), measured.device_s(row, elements, bandwidth)
            step = None if host is None or device is None else max(host / 1e6, device)
            if is_ours:
                cells += [spell(kept, ".2f"), f"{table.bytes / 1e6:.1f}", f"{table.seconds:.2f}"]
            else:
                cells += [spell(kept, ".2f")]
            cells += [spell(host, ",.0f"), spell(device, ".4f"), spell(step, ".4f")]
        yield (*beginning, *cells)


def spell(value: float | None, format_: str) -> str:
    """A number, or nothing where no row says it."""
    return "" if value is None else format(value, format_)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print the table, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale_model", description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=[*MODELS], help="only this model; repeatable")
    parser.add_argument(
        "--ranks", type=int, action="append", help="over how many ranks the model is sharded; repeatable"
    )
    parser.add_argument("--format", action="append", help="weights/moments, such as split24/8bit; repeatable")
    parser.add_argument(
        "--bandwidth", type=float, default=4800.0, help="of a rank's memory, in GB/s (default: an H200's)"
    )
    parser.add_argument("--machine", help="folder of bench/results whose rows count (default: this machine's)")
    options = parser.parse_args(arguments)
    if any(ranks < 1 for ranks in options.ranks or ()) or not options.bandwidth > 0:
        parser.error("--ranks and --bandwidth must be above 0")
    for name in options.format or ():
        known = ("float32", "native", "stochastic", "split24", "split32"), ("float32", "bfloat16", "8bit")
        if len(name.split("/")) != 2 or any(part not in of for part, of in zip(name.split("/"), known, strict=True)):
            parser.error(
                f"--format {name}: expected one of {', '.join(known[0])}, then / and one of {', '.join(known[1])}"
            )
    folder = machine.results_folder(options.machine or machine.environment(CPU).machine)
    measured = Measured(folder)
    print(f"A simulation: {options.bandwidth:,.0f} GB/s a rank, rows of {folder.name} (roof {measured.roof:.0f} GB/s)")
    table = [HEADER]
    for name in options.model or MODELS:
        for ranks in options.ranks or {"7b": [8], "70b": [64], "405b": [512], "1t": [1024]}[name]:
            table += lines(measured, MODELS[name], ranks, options.format or [*FORMATS], options.bandwidth)
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
