"""The figure of training loops on a machine: how many times faster than the usual loop, workload by workload.

One panel a case. Bars are medians of the ratios of each round, whiskers reach from the 20th to the 80th percentile;
diamonds are what the bytes of both sides would give, where memory traffic is the limit.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from bench import rows
from bench.plot import BAR, DPI, INK, Record, color, label, present, rounds_of, tidy, write_around
from bench.workloads import USUAL, WORKLOADS


def draw(folder: Path) -> Path | None:
    """Draws `loop.png` from the folder's latest rows and returns its path, or None if there are none to draw."""
    shown = [row for row in latest_runs(rows.read(folder, rows.LoopRow)) if row["contender"] != USUAL]
    if not shown:
        return None
    cases = present(shown)
    bars = max(sum(row["case"] == case.name for row in shown) for case in cases)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, rect=(0, 0.12, 1, 0.79))
    figure = Figure(figsize=(11, 2.6 + 0.3 * bars), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        draw_case(axes, [row for row in shown if row["case"] == case.name])
        tidy(axes, case.title, grid="x")
        axes.tick_params(axis="y", pad=6 + 5 * max(len(label(row)) for row in shown))  # the bars' names stand between
    lines = [
        f"Medians of {rounds_of(shown)} interleaved rounds; whiskers: 20th to 80th percentile; "
        "diamonds: what the bytes of both sides would give.",
        "The usual loop: clip_grad_norm_(foreach), torch AdamW(fused), EMA by _foreach_lerp_, GradScaler. "
        "Both sides were checked against the loop in float64 before they were timed.",
    ]
    write_around(figure, shown, "Clip, step, average: speed-up over the usual loop", lines)
    path = folder / "loop.png"
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def latest_runs(records: list[Record]) -> list[Record]:
    """Of each case, dtype and workload, the rows of the last run that measured both sides: never a mixture of runs."""
    keys = ("case", "dtype", "workload")
    compared = [row for row in records if row["contender"] != USUAL and row["speedup"] is not None]
    last = {tuple(row[key] for key in keys): row["run"] for row in compared}
    kept = [row for row in records if last.get(tuple(row[key] for key in keys)) == row["run"]]
    return rows.latest(kept, *keys, "contender")


def draw_case(axes: Axes, records: list[Record]) -> None:
    """One group of bars a workload, one bar a backend and dtype."""
    place, ticks = 0.0, {}
    for workload in WORKLOADS.values():
        group = [row for row in records if row["workload"] == workload.name]
        if not group:
            continue
        ticks[place + (len(group) - 1) / 2] = workload.title
        for row in group:
            axes.barh(place, row["speedup"], height=BAR, color=color(row), zorder=2)
            axes.plot((row["speedup_p20"], row["speedup_p80"]), (place, place), color=INK, linewidth=0.9, zorder=3)
            end = max(row["speedup"], row["speedup_p80"], row["expected_speedup"] or 0.0)
            if row["expected_speedup"] is not None:
                axes.plot(
                    row["expected_speedup"], place, "D", markersize=4, color="white", markeredgecolor=INK, zorder=5
                )
            weight = "bold" if row["dtype"] == "float32" else "normal"
            axes.annotate(
                f"{row['speedup']:.3g}×", (end, place), xytext=(6, 0), textcoords="offset points", va="center",
                fontsize=9, color=INK, fontweight=weight,
            )  # fmt: skip
            axes.annotate(
                label(row), (0, place), xytext=(-4, 0), textcoords="offset points", va="center", ha="right",
                fontsize=8, color=INK,
            )  # fmt: skip
            place += 1
        place += 0.8
    axes.axvline(1, color=INK, linewidth=1.2, zorder=4)
    axes.set_xlim(0, 1.18 * max(max(row["speedup_p80"], row["expected_speedup"] or 0.0, 1.0) for row in records))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(place - 0.8, -0.8)
