"""`formats.png`: bytes kept per parameter against the time of a step, ours and others', from format rows alone."""

from __future__ import annotations

from pathlib import Path

from bench import rows
from bench.plot import INK, QUIET, Record, color, rounds_of, tidy, write_around
from bench.plot_sizes import MARKS, PEER_PALETTE, new_figure, panels, save
from bench.tables import PEERS

KEYS = "contender", "dtype", "param_format", "moment_format"


def draw(folder: Path) -> Path | None:
    """Draws the figure and returns its path, or None where there are no rows."""
    records = rows.latest(rows.read(folder, rows.FormatRow), *KEYS)
    if not records:
        return None
    figure = new_figure(2)
    (axes, beside), names = panels(figure, 2), list(PEERS)
    for row in records:
        ours = row["contender"] not in PEERS
        shade = color(row) if ours else PEER_PALETTE[names.index(row["contender"]) % len(PEER_PALETTE)]
        mark = "o" if ours else MARKS[1 + names.index(row["contender"]) % (len(MARKS) - 1)]
        filled = shade if row["dtype"] == "bfloat16" else "white"
        for panel, y in ((axes, row["median_us"] / 1e3), (beside, row["gb_s"])):
            panel.plot(
                row["kept_bytes_per_param"], y, mark, markersize=6, color=filled, markeredgecolor=shade, zorder=4
            )
            panel.annotate(
                label(row, ours), (row["kept_bytes_per_param"], y), xytext=(5, 2), textcoords="offset points",
                fontsize=6, color=INK if ours else QUIET,
            )  # fmt: skip
    axes.set_yscale("log")
    tidy(axes, "Milliseconds a step, 16 Mi elements", grid="y")
    tidy(beside, "GB/s, bytes counted once per operand", grid="y")
    roofs = [row["roof_gb_s"] for row in records if row["roof_gb_s"]]
    if roofs:
        beside.axhline(max(roofs), color=INK, linewidth=1.6, linestyle=(0, (4, 1.5)), zorder=2)
        beside.annotate("measured roof", (0.02, max(roofs)), xycoords=("axes fraction", "data"), fontsize=8, color=INK)
    beside.set_ylim(0, None)
    for panel in (axes, beside):
        panel.set_xlabel("bytes of weight and state kept per parameter", color=INK, fontsize=9)
    lines = [f"Medians of {rounds_of(records)} interleaved rounds. Filled: bfloat16 weights; hollow: float32 weights."]
    write_around(figure, records, "A step in every storage format", lines)
    return save(figure, folder / "formats.png")


def label(row: Record, ours: bool) -> str:
    """Formats of ours, the name of others."""
    if not ours:
        return PEERS[row["contender"]]
    return f"{row['param_format']}/{row['moment_format']}" if row["dtype"] == "bfloat16" else row["moment_format"]
