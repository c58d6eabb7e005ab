"""The READMEs' tables of measurements, written from rows and from nothing else: `python -m bench tables`.

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`; all else of the file is left alone.
`tests/test_bench_tables.py` asserts that README says what the committed rows say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import rows
from bench.curves import RUNS
from bench.formats import CACHED, KEYS
from bench.formats import latest as latest_formats
from bench.machine import COUNTS, RESULTS
from bench.quality import FORMATS

README = Path(__file__).resolve().parents[1] / "README.md"
FILES = (README, Path(__file__).resolve().parent / "README.md")
Record = dict[str, Any]

CASES = {
    "one_large": "one tensor of 64 Mi elements",
    "gpt2_small": "GPT-2 small's 148 tensors",
    "resnet50": "ResNet-50's 161 tensors",
    "many_small": "2,000 tensors of 256 elements",
    "groups_465": "465 groups of one tensor",
}
WORKLOADS = {
    "clip": "clip + step",
    "clip+ema": "clip + step + EMA",
    "clip+scaler": "GradScaler, clip + step",
    "clip+guard": "clip, skip or step",
    "copy": "step + bfloat16 copy",
}
PEERS = {
    "torch_fused": "torch AdamW (fused)",
    "apex": "apex FusedAdam",
    "transformer_engine": "TransformerEngine FusedAdam",
    "deepspeed": "DeepSpeed FusedAdam",
    "deepspeed_cpu": "DeepSpeedCPUAdam",
    "torchao_8bit": "torchao AdamW8bit",
    "bitsandbytes_8bit": "bitsandbytes AdamW8bit",
    "flashoptim": "flashoptim FlashAdamW",
    "optimi": "optimi AdamW",
}


def table(heads: list[str], body: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, None, *body) if cells is not None).replace(
        "\n", "\n|" + "---|" * len(heads) + "\n", 1
    )


def milliseconds(us: float) -> str:
    """Three digits."""
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us / 1e3:.2f} ms"


def scientific(value: float) -> str:
    """Two digits, as 7.4e-07."""
    return f"{value:.1e}".replace("e-0", "e-")


def speedup(row: Record) -> str:
    """Median and spread."""
    return f"{row['speedup']:.2f}× ({row['speedup_p20']:.2f} to {row['speedup_p80']:.2f})"


# --- tables -----------------------------------------------------------------------------------------------------------


def throughput(folder: Path) -> str:
    """One step against torch fused, by case and dtype."""
    records = rows.latest(rows.read(folder, rows.ThroughputRow), "case", "dtype", "contender")
    found = {(row["case"], row["dtype"], row["contender"]): row for row in records}
    body = []
    for case, name in CASES.items():
        for dtype in ("float32", "bfloat16"):
            ours, theirs = found.get((case, dtype, "ours_cpu")), found.get((case, dtype, "torch_fused"))
            if ours is None or theirs is None:
                continue
            roof = "" if ours["pct_roof"] is None else f"{ours['pct_roof']:.0f} %"
            times = milliseconds(ours["median_us"]), milliseconds(theirs["median_us"])
            body.append([name, dtype, *times, speedup(ours), roof])
    heads = "case, dtype, FusedAdamW, torch fused, speed-up (20th to 80th percentile), of the measured roof"
    return table(heads.split(", "), body)


def loop(folder: Path) -> str:
    """A training loop's whole step against the usual one."""
    records = rows.latest(rows.read(folder, rows.LoopRow), "case", "dtype", "workload", "contender")
    pairs: dict[tuple[str, str, str], dict[str, Record]] = {}
    for row in records:
        side = "ours" if row["contender"].startswith("ours") else row["contender"]
        pairs.setdefault((row["case"], row["dtype"], row["workload"]), {})[side] = row
    body = []
    for case, name in CASES.items():
        for dtype in ("float32", "bfloat16"):
            for workload, what in WORKLOADS.items():
                sides = pairs.get((case, dtype, workload), {})
                if not {"ours", "usual"} <= sides.keys():
                    continue
                ours, usual = sides["ours"], sides["usual"]
                expected = "" if ours["expected_speedup"] is None else f"{ours['expected_speedup']:.2f}×"
                times = milliseconds(ours["median_us"]), milliseconds(usual["median_us"])
                body.append([name, dtype, what, *times, speedup(ours), expected])
                for peer in sides.keys() - {"ours", "usual"}:
                    ratio = f"{sides[peer]['median_us'] / ours['median_us']:.2f}×"
                    times = times[0], milliseconds(sides[peer]["median_us"])
                    body.append([name, dtype, f"{what}, beside {PEERS[peer]}", *times, ratio, ""])
    heads = "case, dtype, loop, FusedAdamW, usual, speed-up (20th to 80th percentile), from bytes moved"
    return table(heads.split(", "), body)


def formats(folder: Path) -> str:
    """A step in every storage format, beside the low-memory optimizers."""
    cached = {
        tuple(row[key] for key in KEYS): row["median_us"] / row["params"] for row in latest_formats(folder, CACHED)
    }  # microseconds an element
    body = []
    for row in latest_formats(folder):
        is_ours = row["contender"].startswith("ours")
        name = PEERS.get(row["contender"], row["contender"])
        if row["contender"] == "optimi" and row["param_format"] == "kahan":
            name += ", Kahan"
        what = f"`{row['param_format']}` / `{row['moment_format']}`" if is_ours else name
        time = f"{row['median_us'] / 1e3:.1f} ms ({row['p20_us'] / 1e3:.1f} to {row['p80_us'] / 1e3:.1f})"
        element = cached.get(tuple(row[key] for key in KEYS))
        from_caches = "" if element is None else f"{element * row['params'] / 1e3:.1f} ms"
        kept, moved = f"{row['kept_bytes_per_param']:.2f}", f"{row['moved_bytes_per_param']:.2f}"
        ratios = [f"{row[f'speedup_over_torch_{dtype}']:.2f}×" for dtype in ("float32", "bfloat16")]
        body.append([row["dtype"], what, kept, moved, time, f"{row['gb_s']:.1f}", *ratios, from_caches])
    heads = (
        "weights and gradients, formats, bytes kept, bytes moved, step, GB/s, over torch float32, over torch bfloat16, "
        "as many elements from caches"
    )
    return table(heads.split(", "), body)


def read_somewhere(folder: Path, row_type: type[rows.Row]) -> list[Record]:
    """Rows that say nothing of speed: the folder's or, where it has none, the first other machine's that has."""
    folders = (folder, *sorted(path for path in RESULTS.iterdir() if path.is_dir()))
    return next((found for path in folders if (found := rows.read(path, row_type))), [])


def quality(folder: Path) -> str:
    """The 8-bit moments beside published formats: the worst over both beta2, or each."""
    records = rows.latest(read_somewhere(folder, rows.QualityRow), "format", "metric", "setting", "beta2")
    body = []
    for name in FORMATS:
        own = [row for row in records if row["format"] == name]
        if not own or name == "float32":
            continue

        def values(metric: str, setting: str, own: list[Record] = own) -> list[float]:
            return [
                row["value"] for row in own if row["metric"] == metric and (row["setting"] or "").startswith(setting)
            ]

        errors = [row["value"] for row in own if (row["metric"], row["setting"]) == ("update_error", "trace")]
        stress = [[max(values(metric, f"stress, sigma {sigma}")) for sigma in (1, 2)] for metric in STRESS]
        body.append(
            [
                f"`{name}`" if name in ("8bit", "bfloat16") else name,
                f"{own[0]['bytes_per_param']:.3f}",
                " / ".join(short(error) for error in errors),
                *(" / ".join(short(value) for value in pair) for pair in stress),
                f"{100 * max(values('second_moment_bias', 'drop')):.2g} %",
                f"{max(values('dead_drift', '')):.3g}×",
            ]
        )
    heads = (
        "format; bytes; update error, β2 = 0.999 / 0.95; weights' error, stress σ = 1 / 2; "
        "largest update σ = 1 / 2; v after drops, off by; drift without gradients"
    )
    return table(heads.split("; "), body)


STRESS = ("weight_error", "largest_update")


def short(value: float) -> str:
    """Three digits, or two in scientific notation."""
    return f"{value:.3g}" if 0.01 <= value < 1000 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def curves(folder: Path) -> str:
    """Last validation losses."""
    records = rows.latest(read_somewhere(folder, rows.CurveRow), "format", "seed", "step")
    last = max(row["step"] for row in records)
    losses = {
        run.name: [
            row["val_loss"]
            for row in sorted(records, key=lambda row: row["seed"])
            if row["format"] == run.name and row["step"] == last
        ]
        for run in RUNS
    }
    baseline = losses[RUNS[0].name]
    body = []
    for name, own in losses.items():
        gaps = [100 * (mine / theirs - 1) for mine, theirs in zip(own, baseline, strict=True)]
        each = ", ".join(f"{loss:.4f}" for loss in own)
        relative = "" if own is baseline else f"{100 * (fmean(own) / fmean(baseline) - 1):+.2f} %"
        spread = "" if own is baseline else f"{min(gaps):+.2f} to {max(gaps):+.2f} %"
        body.append([name, f"{fmean(own):.4f} ({each})", relative, spread])
    heads = "weights/moments; last validation loss, mean of the seeds (each); against float32; seed by seed"
    return table(heads.split("; "), body)


def accuracy(folder: Path) -> str:
    """Error of float32 weights against float64 AdamW."""
    keys = "contender", "lr", "weight_decay", "beta2"
    records = rows.latest(read_somewhere(folder, rows.AccuracyRow), *keys)
    body = []
    for row in (row for row in records if row["contender"].startswith("ours")):
        same = [other for other in records if all(other[key] == row[key] for key in keys[1:])]
        theirs = min(other["relative_error"] for other in same if other["contender"].startswith("torch"))
        setting = ", ".join(f"{row[key]:g}" for key in keys[1:])
        errors = f"{row['relative_error']:.1e}", f"{theirs:.1e}"
        body.append([setting, *errors, f"{theirs / row['relative_error']:.1f}"])
    return table(["lr, λ, β2", "FusedAdamW", "torch.optim.AdamW", "factor"], body)


def profile(folder: Path) -> str:
    """Where the instructions of a warm step go, with the gradients of the step before; whatever the machine."""
    found = rows.read(COUNTS, rows.ProfileRow)
    last = max((row["run"] for row in found), default="")
    records = [row for row in found if (row["run"], row["grads"]) == (last, "same")]
    records = [row for row in records if row["instructions_per_tensor"] >= 1]  # others belong to the step
    body = [
        [f"`{row['function']}`", row["library"], f"{row['instructions_per_tensor']:.0f}", f"{row['share']:.1f} %"]
        for row in records
    ]
    return table(["function", "in", "instructions a tensor", "share"], body)


TABLES: dict[str, Callable[[Path], str]] = {
    function.__name__: function for function in (throughput, loop, formats, quality, curves, accuracy, profile)
}


def fill(text: str, folder: Path) -> str:
    """A Markdown text with its tables as the folder's rows have them.

    Raises:
        KeyError: it names a table that there is none of.
    """

    def write(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](folder)}\n{match[3]}"

    return re.sub(r"(<!-- rows: (\w+) -->)\n.*?\n(<!-- end of rows -->)", write, text, flags=re.DOTALL)
