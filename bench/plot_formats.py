"""`formats.png`: bytes kept per parameter against the time of a step, ours and others', from format rows alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.transforms import Bbox

from bench import formats
from bench.plot import INK, QUIET, Record, color, rounds_of, tidy, write_around
from bench.plot_sizes import MARKS, PEER_PALETTE, new_figure, panels, save
from bench.tables import PEERS

Point: TypeAlias = tuple[str, float, float, str]  # label, x, y, color
# Where a label may stand, in points off its point, the nearest first; to the right or to the left.
PLACES = [(6, dy) for dy in (0, 6, -6, 12, -12, 18, -18, 24, -24, 30, -30, 36, -36)]


def draw(folder: Path) -> Path | None:
    """Draws the figure and returns its path, or None where there are no rows."""
    records = formats.latest(folder)
    if not records:
        return None
    figure = new_figure(2)
    (axes, beside), names = panels(figure, 2), list(PEERS)
    points: dict[Any, list[Point]] = {axes: [], beside: []}
    for row in records:
        ours = row["contender"] not in PEERS
        shade = color(row) if ours else PEER_PALETTE[names.index(row["contender"]) % len(PEER_PALETTE)]
        mark = "o" if ours else MARKS[1 + names.index(row["contender"]) % (len(MARKS) - 1)]
        filled = shade if row["dtype"] == "bfloat16" else "white"
        for panel, y in ((axes, row["median_us"] / 1e3), (beside, row["gb_s"])):
            panel.plot(
                row["kept_bytes_per_param"], y, mark, markersize=6, color=filled, markeredgecolor=shade, zorder=4
            )
            points[panel].append((label(row, ours), row["kept_bytes_per_param"], y, INK if ours else QUIET))
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
    for panel, labelled in points.items():
        place_labels(panel, labelled)
    write_around(figure, records, "A step in every storage format", lines)
    return save(figure, folder / "formats.png")


def place_labels(axes: Any, points: list[Point]) -> None:
    """Labels each point where no other label or point is: the first free place around it, else the least crowded."""
    figure = axes.figure
    figure.canvas.draw()  # before, nothing has an extent
    taken = []
    for _, x, y, _ in points:
        at = axes.transData.transform((x, y))
        taken.append(Bbox.from_bounds(at[0] - 6, at[1] - 6, 12, 12))
    frame = axes.get_window_extent()
    for text, x, y, shade in sorted(points, key=lambda point: -point[2]):
        best, best_cost = None, math.inf
        for (dx, dy), side in itertools.product(PLACES, ("left", "right")):
            note = axes.annotate(
                text, (x, y), xytext=(dx if side == "left" else -dx, dy), textcoords="offset points", ha=side,
                va="center", fontsize=6, color=shade,
            )  # fmt: skip
            box = note.get_window_extent()
            inside = Bbox.intersection(box, frame)
            outside = box.width * box.height - (inside.width * inside.height if inside is not None else 0.0)
            shared = (Bbox.intersection(box, other) for other in taken)
            cost = outside + sum(part.width * part.height for part in shared if part is not None)
            if cost < best_cost:
                if best is not None:
                    best.remove()
                best, best_cost = note, cost
            else:
                note.remove()
            if best_cost == 0:
                break
        assert best is not None
        taken.append(best.get_window_extent())


def label(row: Record, ours: bool) -> str:
    """Formats of ours, the name of others."""
    if not ours:
        return PEERS[row["contender"]]
    return f"{row['param_format']}/{row['moment_format']}" if row["dtype"] == "bfloat16" else row["moment_format"]
