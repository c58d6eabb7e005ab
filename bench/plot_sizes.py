"""Two figures of how a step scales, drawn from throughput rows and from nothing else.

`roofline.png`: GB/s against the size of one tensor, and the roof measured in the same rounds, a panel a dtype.
`counts.png`: how many times faster than torch's fused AdamW, against the number of tensors.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from bench import rows
from bench.contenders import BASELINE, CONTENDERS
from bench.plot import DPI, GRID, INK, QUIET, Record, color, latest_runs, present, rounds_of, tidy, write_around

MARKS = "osD^v<>PXh*p"
PEER_PALETTE = ("#8b949e", "#6b4fa0", "#2f7d4f", "#a0522d", "#b8860b", "#c04f88", "#3f8f9f", "#777733", "#444444")
ONE_TENSOR = ("one_2p", "one_large")
SERIES = ("count_", "many_small", "lora_1000", "moe_10000", "gpt2_small", "resnet50", "groups_465", "llama3_8b")


def draw_roofline(folder: Path) -> Path | None:
    """Draws `roofline.png` and returns its path, or None where there are no two sizes to draw."""
    records = [row for row in latest_runs(rows.read(folder, rows.ThroughputRow)) if row["case"].startswith(ONE_TENSOR)]
    if len({row["case"] for row in records}) < 2:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row in records))
    figure = new_figure(len(dtypes))
    for axes, dtype in zip(panels(figure, len(dtypes)), dtypes, strict=True):
        own = [row for row in records if row["dtype"] == dtype]
        roofs = sorted({row["params"]: row["roof_gb_s"] for row in own if row["roof_gb_s"]}.items())
        if roofs:
            sizes, roof = zip(*roofs, strict=True)
            axes.plot(sizes, roof, color=INK, linewidth=1.6, linestyle=(0, (4, 1.5)), label="measured roof", zorder=2)
        draw_lines(axes, own, "params", "gb_s")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, None)
        axes.set_xlabel("elements of one tensor", color=INK, fontsize=9)
        tidy(axes, f"GB/s, {dtype} weights, bytes counted once per operand", grid="y")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    lines = [
        f"Medians of {rounds_of(records)} interleaved rounds, 20th to 80th percentile shaded. Sizes that a cache would "
        "hold are stepped in copies that take turns.",
    ]
    write_around(figure, records, "Bandwidth of an AdamW step", lines)
    return save(figure, folder / "roofline.png")


def draw_counts(folder: Path) -> Path | None:
    """Draws `counts.png` and returns its path, or None where there are no two numbers of tensors to draw."""
    records = [
        row
        for row in latest_runs(rows.read(folder, rows.ThroughputRow))
        if row["case"].startswith(SERIES) and row["speedup"] is not None and row["contender"] != BASELINE
    ]
    series = [row for row in records if row["case"].startswith("count_")]
    if len({row["tensors"] for row in series}) < 2:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row in series))
    figure = new_figure(len(dtypes))
    for axes, dtype in zip(panels(figure, len(dtypes)), dtypes, strict=True):
        draw_lines(axes, [row for row in series if row["dtype"] == dtype], "tensors", "speedup")
        others = [row for row in records if row["dtype"] == dtype and row not in series]
        named = {case.name: case for case in present(others)}
        for row in others:
            if CONTENDERS[row["contender"]].is_ours:
                axes.plot(
                    row["tensors"], row["speedup"], "o", markersize=5, color="white", markeredgecolor=INK, zorder=5
                )
                axes.annotate(
                    named[row["case"]].title.split(",")[0], (row["tensors"], row["speedup"]), xytext=(5, 4),
                    textcoords="offset points", fontsize=7, color=QUIET,
                )  # fmt: skip
        axes.axhline(1, color=INK, linewidth=1.2, zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tensors of 4,096 elements (circles: models)", color=INK, fontsize=9)
        tidy(axes, f"Speed-up over torch.optim.AdamW(fused=True), {dtype}", grid="y")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    lines = [f"Medians of {rounds_of(records)} interleaved rounds, 20th to 80th percentile shaded. Wall-clock, eager."]
    write_around(figure, records, "An AdamW step on many tensors", lines)
    return save(figure, folder / "counts.png")


def draw_lines(axes: Axes, records: list[Record], x: str, y: str) -> None:
    """A line with its spread for each contender."""
    peers = [name for name, contender in CONTENDERS.items() if not contender.is_ours]
    for mark, name in zip(MARKS * 2, CONTENDERS, strict=False):
        own = sorted((row for row in records if row["contender"] == name), key=lambda row: row[x])
        if not own:
            continue
        ours = CONTENDERS[name].is_ours
        shade = color({**own[0], "dtype": "float32"}) if ours else PEER_PALETTE[peers.index(name) % len(PEER_PALETTE)]
        places, values = [row[x] for row in own], [row[y] for row in own]
        low, high = zip(*(spread_of(row, y) for row in own), strict=True)
        axes.fill_between(places, low, high, color=shade, alpha=0.18, linewidth=0, zorder=1)
        axes.plot(
            places, values, marker=mark, markersize=4, color=shade, linewidth=2.0 if ours else 1.0,
            label=CONTENDERS[name].title, zorder=4 if ours else 3,
        )  # fmt: skip


def spread_of(row: Record, y: str) -> tuple[float, float]:
    """The 20th and 80th percentile of a value."""
    if y == "speedup":
        return row["speedup_p20"], row["speedup_p80"]
    return row[y] * row["median_us"] / row["p80_us"], row[y] * row["median_us"] / row["p20_us"]


def new_figure(columns: int) -> Figure:
    """One look for figures of lines."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, rect=(0, 0.12, 1, 0.8))
    figure = Figure(figsize=(5.5 * columns + 0.5, 5.2), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panels(figure: Figure, columns: int) -> list[Axes]:
    """Panels side by side."""
    found = figure.subplots(1, columns, squeeze=False)
    for axes in found[0]:
        axes.grid(axis="x", color=GRID, zorder=0)
    return list(found[0])


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure without what would change from run to run."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
