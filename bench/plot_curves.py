"""The figure of training in several storage formats: loss against steps and validation losses against float32's."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench import rows
from bench.curves import RUNS
from bench.plot import DPI, Record, tidy, write_around

COLOURS = ("#333333", "#1c7293", "#d9480f", "#f59f00", "#7048e8", "#2b8a3e")
BASELINE = RUNS[0].name


def draw(folder: Path) -> Path | None:
    """Draws `curves.png` from the folder's latest rows and returns its path, or None if there are none to draw."""
    records = rows.latest(rows.read(folder, rows.CurveRow), "format", "seed", "step")
    if not records:
        return None
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, rect=(0, 0.12, 1, 0.79))
    figure = Figure(figsize=(11, 5), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    curves, gaps = figure.subplots(1, 2, width_ratios=(1, 1))
    baseline = losses(records, BASELINE, "val_loss")
    for place, (run, colour) in enumerate(zip(RUNS, COLOURS, strict=True)):
        trained = losses(records, run.name, "train_loss")
        points = sorted((step, fmean(by_seed.values())) for step, by_seed in trained.items())
        curves.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, label=run.name)
        shift = (place - (len(RUNS) - 1) / 2) * 18  # steps: side by side
        relative = sorted(
            (step, [100 * (loss / baseline[step][seed] - 1) for seed, loss in by_seed.items()])
            for step, by_seed in losses(records, run.name, "val_loss").items()
        )
        if run.name == BASELINE:
            gaps.axhline(0, color=colour, linewidth=1.1)
            continue
        for step, values in relative:
            gaps.plot([step + shift] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.55)
        means = [(step + shift, fmean(values)) for step, values in relative]
        gaps.plot(*zip(*means, strict=True), color=colour, linewidth=1.1)
    curves.set_ylim(top=sorted(row["train_loss"] for row in records)[-len(records) // 20])
    curves.legend(frameon=False)
    tidy(curves, "training loss, nats a byte, mean of the seeds, against steps", grid="y")
    tidy(gaps, f"validation loss against {BASELINE}'s of the same seed, %; lines: means", grid="y")
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


def losses(records: list[Record], name: str, key: str) -> dict[int, dict[int, float]]:
    """A format's losses by step and seed, where they were measured."""
    found: dict[int, dict[int, float]] = {}
    for row in records:
        if row["format"] == name and row[key] is not None:
            found.setdefault(row["step"], {})[row["seed"]] = row[key]
    return found
