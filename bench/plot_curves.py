"""The figure of training in several storage formats: loss against steps, every seed, and the last validation losses."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench import rows
from bench.curves import RUNS
from bench.plot import DPI, Record, tidy, write_around

COLOURS = ("#333333", "#1c7293", "#d9480f", "#f59f00", "#7048e8", "#2b8a3e")


def draw(folder: Path) -> Path | None:
    """Draws `curves.png` from the folder's latest rows and returns its path, or None if there are none to draw."""
    records = rows.latest(rows.read(folder, rows.CurveRow), "format", "seed", "step")
    if not records:
        return None
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, rect=(0, 0.12, 1, 0.79))
    figure = Figure(figsize=(11, 5), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    curves, last = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (run, colour) in enumerate(zip(RUNS, COLOURS, strict=True)):
        own = [row for row in records if row["format"] == run.name]
        for index, seed in enumerate(sorted({row["seed"] for row in own})):
            points = sorted((row["step"], row["train_loss"]) for row in own if row["seed"] == seed)
            name = run.name if index == 0 else None
            curves.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, alpha=0.8, label=name)
        losses = last_losses(own)
        last.plot(losses, [-place] * len(losses), "o", color=colour, markersize=5)
    curves.set_ylim(top=sorted(row["train_loss"] for row in records)[-len(records) // 20])
    curves.legend(frameon=False)
    last.set_yticks([-place for place in range(len(RUNS))], [run.name for run in RUNS])
    tidy(curves, "training loss, nats a byte, against steps", grid="y")
    tidy(last, "validation loss after the last step, one point a seed", grid="x")
    lines = ["The model of examples/train_gpt.py; of a seed, all runs have the same weights and batches."]
    write_around(
        figure,
        [{**row, "other_cores": None} for row in records],
        "Training in several storage formats: weights/moments",
        lines,
    )
    path = folder / "curves.png"
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def last_losses(records: list[Record]) -> list[float]:
    """The validation loss of each seed's last step."""
    validated = [row for row in records if row["val_loss"] is not None]
    steps = max((row["step"] for row in validated), default=0)
    return [row["val_loss"] for row in sorted(validated, key=lambda row: row["seed"]) if row["step"] == steps]
