"""The table and the picture of examples/train_gpt.py, made from the files that it wrote.

    python examples/plot_training.py runs/train_gpt

Trains nothing and needs no torch: it reads summary.json and the runs' CSV files, and writes training.png beside them.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only; works without a display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

# One row a step. `val_loss` is empty except where it was measured; `tokens_per_s` is the mean since the last reading.
COLUMNS = ("step", "lr", "train_loss", "val_loss", "grad_norm", "optimizer_ms", "tokens_per_s")
LAST_STEPS = 20  # the training loss of the table is the mean over these

BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps the grid out of the numbers
LABELS = {"fused": "FusedAdamW", "torch": "torch.optim.AdamW (fused=True)"}
SHORT = {"fused": "FusedAdamW", "torch": "torch AdamW"}
COLOURS = {"fused": "#d9480f", "torch": "#1c7293"}


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """The columns of one run's CSV file; what was not measured is NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS}


def summary_table(summary: dict[str, Any]) -> str:
    """The runs side by side, as text."""
    cells = {
        "steps": "{steps:,}",
        f"training loss, last {LAST_STEPS} steps (nats/byte)": "{train_loss:.4f}",
        "validation loss, last (nats/byte)": "{val_loss:.4f}",
        "clip + step, ms, median": "{optimizer_ms[median]:.3f}",
        "  20th - 80th percentile": "{optimizer_ms[p20]:.3f} - {optimizer_ms[p80]:.3f}",
        "tokens/s, median": "{tokens_per_s:,.0f}",
        "weights, bytes": "{weight_bytes:,}",
        "optimizer state, bytes": "{state_bytes:,}",
        "  per parameter": "{state_bytes_per_parameter:.3f}",
    }
    runs = summary["runs"]
    lines = [["", *(SHORT[name] for name in runs)]]
    lines += [[label, *(form.format(**run) for run in runs.values())] for label, form in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n" + "\n".join("   ".join(line) for line in aligned)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; near the ends over what there is."""
    weights = np.ones(window)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


def draw_losses(axes: Axes, runs: dict[str, dict[str, np.ndarray]]) -> None:
    """Training loss, smoothed over the raw values, and validation points.

    Where both optimizers agree the curves lie on each other, so torch's is drawn first, wide and pale.
    """
    for name in reversed(runs):
        rows = runs[name]
        count = len(rows["step"])
        window = 2 * min(count // 60, (count - 1) // 2) + 1
        wide = name == "torch"
        val_loss = next((x for x in rows["val_loss"][::-1] if not np.isnan(x)), np.nan)
        axes.plot(rows["step"], rows["train_loss"], color=COLOURS[name], lw=0.5, alpha=0.18)
        axes.plot(
            rows["step"],
            smoothed(rows["train_loss"], window),
            color=COLOURS[name],
            lw=5 if wide else 1.6,
            alpha=0.45 if wide else 1,
            label=f"{SHORT[name]}, training",
        )
        axes.plot(
            rows["step"],
            rows["val_loss"],
            color=COLOURS[name],
            marker="s" if wide else "o",
            ms=8 if wide else 4,
            mfc="white" if wide else COLOURS[name],
            ls="",
            label=f"{SHORT[name]}, validation (last: {val_loss:.3f})",
        )
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per byte)")
    axes.legend(frameon=False)


def draw_times(axes: Axes, runs: dict[str, dict[str, np.ndarray]]) -> None:
    """Every optimizer step as a point, its median as a bar, 20th to 80th percentile as a whisker.

    A step during which something else had the cores can take hundreds of times longer. Such steps would squeeze all
    others to a line, so they are counted instead of shown.
    """
    times = {name: rows["optimizer_ms"][1:] for name, rows in runs.items() if len(rows["step"]) > 1}
    spread = {name: np.percentile(values, (20, 50, 80)) for name, values in times.items()}
    top = 1.1 * max((high + 2 * (high - low) for low, _, high in spread.values()), default=1.0)
    jitter = np.random.default_rng(0)
    for place, (name, values) in enumerate(times.items()):
        low, median, high = spread[name]
        shown = values[values <= top]
        axes.bar(place, median, width=0.62, color=COLOURS[name], alpha=0.3)
        axes.scatter(place + jitter.uniform(-0.26, 0.26, len(shown)), shown, s=5, color=COLOURS[name], alpha=0.45, lw=0)
        axes.errorbar(place, median, [[median - low], [high - median]], color="black", capsize=7, lw=1.4, zorder=5)
        note = f"\n{len(values) - len(shown)} slower not shown" if len(shown) < len(values) else ""
        axes.text(
            place, 1.02 * top, f"{median:.3g} ms\n({low:.3g} – {high:.3g} ms){note}", ha="center", va="bottom", bbox=BOX
        )
    axes.set_xticks(range(len(times)), [SHORT[name] for name in times])
    axes.set(
        title="Time of clipping and one optimizer step",
        ylabel="milliseconds (median, 20th – 80th percentile)",
        ylim=(0, 1.28 * top),
    )
    axes.set_xlim(-0.6, max(len(times), 2) - 0.4)


def draw_state(axes: Axes, summary: dict[str, Any]) -> None:
    """Bytes of optimizer state, with the weights' bytes as a line to compare with."""
    runs = summary["runs"]
    for place, (name, run) in enumerate(runs.items()):
        mib = run["state_bytes"] / 2**20
        axes.bar(place, mib, width=0.62, color=COLOURS[name], alpha=0.8)
        axes.text(
            place,
            mib,
            f"{mib:,.4g} MiB\n{run['state_bytes_per_parameter']:.3g} B/parameter",
            ha="center",
            va="bottom",
            bbox=BOX,
        )
    weights = max(run["weight_bytes"] for run in runs.values()) / 2**20
    axes.axhline(weights, color="black", ls="--", lw=1, label=f"weights: {weights:,.4g} MiB")
    axes.legend(frameon=False, loc="upper right")
    axes.set_xticks(range(len(runs)), [SHORT[name] for name in runs])
    axes.set(title="Optimizer state", ylabel="MiB")
    axes.set_ylim(0, 1.35 * max([weights, *(run["state_bytes"] / 2**20 for run in runs.values())]))
    axes.set_xlim(-0.6, max(len(runs), 2) - 0.4)


def draw(folder: Path) -> Path:
    """Draw `training.png` from the files in `folder` and return its path."""
    summary = json.loads((folder / "summary.json").read_text())
    runs = {name: read_rows(folder / f"{name}.csv") for name, run in summary["runs"].items() if run["steps"]}
    flags, versions = summary["flags"], summary["environment"]
    parameters = next(iter(summary["runs"].values()))["parameters"]

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.grid.axis": "y",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
    }
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 3, figsize=(14, 5), width_ratios=(2, 1.25, 1), layout="constrained")
        draw_losses(panels[0], runs)
        draw_times(panels[1], runs)
        draw_state(panels[2], summary)
        machine, *rest = versions.values()
        names = list(versions)[1:]
        figure.suptitle(
            f"Byte-level GPT, {parameters / 1e6:.3g} M {flags['dtype']} parameters, "
            f"{flags['batch_size']} × {flags['block_size']} bytes a step\n"
            f"{machine}; " + ", ".join(f"{name} {version}" for name, version in zip(names, rest, strict=True)),
            fontsize=11,
        )
        path = folder / "training.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/train_gpt")
    print(summary_table(json.loads((folder / "summary.json").read_text())))
    print(f"\n{draw(folder)}")
