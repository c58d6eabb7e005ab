"""The figure of steps on a machine, drawn from its rows and from nothing else (`plot_loop.py`: that of loops).

Left: how many times faster than torch's fused AdamW a step is. Right: GB/s of the cases that exceed the caches, and
the roof that was measured in the same rounds. Bars are medians, whiskers reach from the 20th to the 80th percentile.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench import rows
from bench.cases import Case, cases
from bench.contenders import BASELINE, CONTENDERS
from bench.disturbance import NOTICEABLE_CORES

Record = dict[str, Any]

INK, QUIET, GRID = "#1f2328", "#656d76", "#e4e7eb"
OUR_COLORS = ("#0b6bcb", "#c2410c")  # in the order of CONTENDERS: a machine has one or two of our backends
PEER_COLORS = {BASELINE: "#8b949e", "torch_foreach": "#c9d1d9", "deepspeed_cpu": "#57606a", "optimi": "#d8c9a3"}
BAR = 0.8  # of the distance between bars
DPI = 200
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class NoRowsError(RuntimeError):
    """There is nothing to draw."""


def draw(folder: Path) -> Path:
    """Draws `throughput.png` from the folder's latest rows and returns its path.

    Raises:
        NoRowsError: The folder has no rows to draw.
    """
    records = latest_runs(rows.read(folder, rows.ThroughputRow))
    if not records:
        raise NoRowsError(f"{folder / rows.ThroughputRow.file} has no rows; run `python -m bench throughput` first")
    large = [record for record in records if record["roof_gb_s"] is not None and record["dtype"] == "float32"]
    height = max(5.6, 1.9 + 0.17 * (len(speedups(records)) + len(present(records))))  # a line of text a bar
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, rect=(0, 0.67 / height, 1, 1 - 1.12 / height))
    figure = Figure(figsize=(11, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_speedups(left, records)
    draw_bandwidths(right, large)
    annotate(figure, records)
    path = folder / "throughput.png"
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def latest_runs(records: list[Record]) -> list[Record]:
    """Of each case and dtype, the rows of the last run that measured the baseline: never a mixture of runs."""
    last = {(row["case"], row["dtype"]): row["run"] for row in records if row["contender"] == BASELINE}
    kept = [row for row in records if last.get((row["case"], row["dtype"])) == row["run"]]
    return rows.latest(kept, "case", "dtype", "contender")


def speedups(records: list[Record]) -> list[Record]:
    """What the left half shows: ours in each dtype, peers in float32."""
    compared = [row for row in records if row["contender"] != BASELINE and row["speedup"] is not None]
    return [row for row in compared if CONTENDERS[row["contender"]].is_ours or row["dtype"] == "float32"]


def draw_speedups(axes: Axes, records: list[Record]) -> None:
    """One group of bars a case: ours in each dtype, then the peers in float32."""
    shown = speedups(records)
    place, ticks = 0.0, {}
    for case in present(shown):
        group = [row for row in shown if row["case"] == case.name]
        group.sort(key=lambda row: not CONTENDERS[row["contender"]].is_ours)  # peers below ours, order kept otherwise
        ticks[place + (len(group) - 1) / 2] = case.title.replace(", ", "\n", 1)
        for row in group:
            draw_speedup(axes, place, row)
            place += 1
        place += 0.8
    values = [row["speedup"] for row in shown] or [1.0]
    low, high = min(*values, 0.5) / 1.5, max(*values, 2.0) * 1.9
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(
        FixedLocator([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < tick < high])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.axvline(1, color=INK, linewidth=1.2, zorder=4)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(place - 0.8, -0.8)
    tidy(axes, "Speed-up over torch.optim.AdamW(fused=True)", grid="x")


def draw_speedup(axes: Axes, place: float, row: Record) -> None:
    """One bar from 1 to the speed-up, its whisker, who it is and its number."""
    value, ours = row["speedup"], CONTENDERS[row["contender"]].is_ours
    number = f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"
    axes.barh(place, value - 1, left=1, height=BAR, color=color(row), zorder=2)
    axes.plot((row["speedup_p20"], row["speedup_p80"]), (place, place), color=INK, linewidth=0.9, zorder=3)
    weight = "bold" if ours and row["dtype"] == "float32" else "normal"
    write = functools.partial(axes.annotate, va="center", textcoords="offset points", fontweight=weight)
    right = (max(value, row["speedup_p80"], 1.0), place)
    if ours:
        write(number, right, xytext=(6, 0), fontsize=9, color=INK)
        left = (min(value, row["speedup_p20"], 1.0), place)
        write(label(row), left, xytext=(-4, 0), ha="right", fontsize=8, color=INK)
    else:
        write(f"{number}  {label(row)}", right, xytext=(6, 0), fontsize=8, color=QUIET)


def draw_bandwidths(axes: Axes, records: list[Record]) -> None:
    """One group of bars a large case, and its roof."""
    place, ticks = 0.0, {}
    named: set[str] = set()
    roof_drawn = False
    for case in present(records):
        group = [row for row in records if row["case"] == case.name]
        ticks[place + (len(group) - 1) / 2] = case.title.replace(", ", "\n", 1)
        roof = group[0]["roof_gb_s"]
        ends = (place - 0.5, place + len(group) - 0.5)
        axes.plot(ends, (roof, roof), color=INK, linewidth=1.6, linestyle=(0, (4, 1.5)), zorder=4,
                  label=None if roof_drawn else f"roof: {group[0]['roof_kernel'].replace('_', ' ')}")  # fmt: skip
        roof_drawn = True
        for row in group:
            title = CONTENDERS[row["contender"]].title
            axes.bar(place, row["gb_s"], width=BAR, color=color(row), zorder=2,
                     label=None if title in named else title)  # fmt: skip
            slow, fast = (row["gb_s"] * row["median_us"] / row[key] for key in ("p80_us", "p20_us"))
            axes.plot((place, place), (slow, fast), color=INK, linewidth=0.9, zorder=3)
            inside = row["pct_roof"] > 40
            axes.annotate(
                f"{row['pct_roof']:.0f}%", (place, slow if inside else fast), ha="center",
                va="top" if inside else "bottom", xytext=(0, -3 if inside else 3), textcoords="offset points",
                fontsize=8 if len(group) < 4 else 7, zorder=5, rotation=0 if len(group) < 4 else 90,
                color="white" if inside else QUIET, fontweight="bold",
            )  # fmt: skip
            named.add(title)
            place += 1
        place += 0.8
    slanted: dict[str, Any] = dict(rotation=60, ha="right", rotation_mode="anchor") if len(ticks) > 4 else {}
    axes.set_xticks(list(ticks), list(ticks.values()), **slanted)
    axes.set_ylim(0, 1.32 * max([row["roof_gb_s"] for row in records] + [row["gb_s"] for row in records], default=1))
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.6)
    tidy(axes, "GB/s in fp32, and share of the measured roof", grid="y")
    axes.tick_params(axis="x", labelsize=9 if len(ticks) < 4 else 7)


def annotate(figure: Figure, records: list[Record]) -> None:
    """The title, and what was measured where and when."""
    lines = [
        f"Medians of {rounds_of(records)} interleaved rounds; whiskers: 20th to 80th percentile. "
        "Every optimizer was checked against float64 AdamW on these tensors before it was timed.",
        *unequal_bytes(records),
    ]
    write_around(figure, records, "One AdamW step", lines)


def write_around(figure: Figure, records: list[Record], title: str, lines: list[str]) -> None:
    """`title` and the device above; `lines`, disturbances and versions below."""
    newest = max(records, key=lambda row: row["run"])
    threads = f", {newest['threads']} threads" if newest["machine"].startswith("cpu") else ""
    ours = f"adamw_kernels {newest['package']}" if newest["package"] else "without adamw_kernels"
    facts = [
        f"torch {newest['torch']}",
        ours,
        newest["triton"] and not threads and f"triton {newest['triton']}",
        newest["driver"] and f"driver {newest['driver']}",
        newest["commit"] and f"commit {newest['commit']}{' with changes' if newest['dirty'] else ''}",
        newest["run"][:10],
    ]
    lines = [*lines, *disturbed(records), "  ·  ".join(fact for fact in facts if fact)]
    where = f"{title} on {newest['device']}{threads}"
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.14 * inch, where, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.012, 0.1 * inch, "\n".join(lines), fontsize=8, color=QUIET, va="bottom", linespacing=1.5)


def rounds_of(records: list[Record]) -> str:
    """How many rounds the rows had."""
    rounds = sorted({row["rounds"] for row in records})
    return f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])


def unequal_bytes(records: list[Record]) -> list[str]:
    """A line for each dtype in which our state, and so the bytes to move, is not the baseline's."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in records):
        own = [row for row in records if row["dtype"] == dtype and CONTENDERS[row["contender"]].is_ours]
        base = [row for row in records if row["dtype"] == dtype and row["contender"] == BASELINE]
        if own and base and own[0]["bytes_per_param"] != base[0]["bytes_per_param"]:
            lines.append(
                f"{SHORT_DTYPES.get(dtype, dtype)}: adamw_kernels keeps {own[0]['state_dtype']} moments and moves "
                f"{own[0]['bytes_per_param']:.3g} bytes a parameter; torch keeps {base[0]['state_dtype']} ones and "
                f"moves {base[0]['bytes_per_param']:.3g}."
            )
    return lines


def disturbed(records: list[Record]) -> list[str]:
    """A line if others were computing while this was measured."""
    worst = max((row["other_cores"] or 0.0 for row in records), default=0.0)
    if worst <= NOTICEABLE_CORES:
        return []
    return [f"NOT A QUIET RUN: other processes kept up to {worst:.1f} cores busy meanwhile."]


def present(records: list[Record]) -> list[Case]:
    """The cases that have rows, in the order of the suite."""
    names = {row["case"] for row in records}
    return [case for case in cases().values() if case.name in names]


def color(row: Record) -> str:
    """Colour of a contender; paler for a dtype other than float32."""
    ours = [contender.name for contender in CONTENDERS.values() if contender.is_ours]
    if row["contender"] not in ours:
        return PEER_COLORS.get(row["contender"], "#afb8c1")
    # ours_cpu never meets the GPU backends in one figure, so it shares the first colour with Triton.
    base = OUR_COLORS[max(ours.index(row["contender"]) - 1, 0)]
    return base if row["dtype"] == "float32" else blend_with_white(base, 0.55)


def blend_with_white(color: str, share: float) -> str:
    """`color` (#rrggbb) with that share of itself."""
    channels = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(share * channel + 255 * (1 - share)):02x}" for channel in channels)


def label(row: Record) -> str:
    """What a speed-up bar is: who, in which dtype."""
    contender = CONTENDERS[row["contender"]]
    dtype = SHORT_DTYPES.get(row["dtype"], row["dtype"])
    if not contender.is_ours:
        return f"{contender.title.replace('torch AdamW, ', 'torch ')} {dtype}"
    return f"{contender.title.removeprefix('adamw_kernels').removeprefix(', ')} {dtype}".strip()


def tidy(axes: Axes, title: str, grid: Literal["x", "y"]) -> None:
    """One look for both panels."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.grid(axis=grid, color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
