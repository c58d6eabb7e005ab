"""The figures, drawn from rows alone: heat maps, test error against training loss, learning curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from examples.paper import claims
from examples.paper.claims import Array, Panel
from examples.paper.settings import OPTIMIZERS, PAIRS, Plan

DPI = 130
INK, QUIET, GRID = "#1f2328", "#656d76", "#e4e7eb"
COLOURS = {"SGD": "#8b949e", "SGDW": "#2b8a3e", "Adam": "#c2410c", "AdamW": "#0b6bcb"}
ONCE, RESTARTS = "#c2410c", "#0b6bcb"
WORST_SHOWN = 4.0  # times the best error of a figure: all that is worse has one colour
HEADROOM = 1.8  # of the learning curves' axes: the legend stands above the errors after a restart
TITLES = {"normalized": "batch-normalized network", "plain": "network without normalization"}


def draw(plan: Plan, folder: Path) -> list[Path]:
    """Draw all figures and return their paths.

    Raises:
        RowsError: Runs are missing.
    """
    maps, lines = claims.panels(plan, folder), claims.curves(plan, folder)
    networks = list(dict.fromkeys(grid.network for grid in plan.grids))
    paths = []
    for network in networks:
        own = {optimizer: maps[network, optimizer] for optimizer in OPTIMIZERS}
        paths.append(save(heat_maps(network, own, plan), folder / f"heatmaps-{network}.png"))
    paths.append(save(scatters(networks, maps), folder / "test-error-against-training-loss.png"))
    paths.append(save(learning_curves(lines, plan), folder / "restarts.png"))
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG without the library's name and version in it."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def blank(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# -------------------------------------------------------------------------------------------------------- heat maps


def heat_maps(network: str, own: dict[str, Panel], plan: Plan) -> Figure:
    """Four panels, L2 left and decoupled right, one colour scale."""
    means = {optimizer: claims.PERCENT * panel.wrong.mean(axis=-1) for optimizer, panel in own.items()}
    least = min(float(errors.min()) for errors in means.values())
    norm = LogNorm(least, WORST_SHOWN * least, clip=True)
    figure = blank(9.4, 8.6)
    axes = figure.subplots(2, 2)
    mesh = None
    for place, optimizer in zip(axes.flat, OPTIMIZERS, strict=True):
        mesh = heat_map(place, optimizer, own[optimizer], means[optimizer], norm)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=axes, shrink=0.7, extend="max")
    bar.set_label("test error, %")
    ticks = [least * factor for factor in (1, 1.25, 1.5, 2, 3, 4)]
    bar.set_ticks(ticks, labels=[f"{tick:.1f}" for tick in ticks])
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"Test error after {plan.grid_epochs} epochs, {TITLES[network]}, mean of {plan.grid_seeds} seeds\n"
        "star: best setting; rings: best tenth, whose correlation r measures the tilt",
        fontsize=11, color=INK,
    )  # fmt: skip
    return figure


def heat_map(axes: Axes, optimizer: str, panel: Panel, errors: Array, norm: LogNorm) -> QuadMesh:
    """One optimizer: weight decay to the right, learning rate upwards."""
    grid = panel.grid
    x, y = np.array(grid.decay_exponents), np.array(grid.lr_exponents)
    mesh = axes.pcolormesh(x, y, errors, norm=norm, cmap="viridis_r", shading="nearest")
    rows, columns = np.nonzero(claims.best_cells(panel.wrong.sum(axis=-1)))
    axes.plot(x[columns], y[rows], "o", mfc="none", mec="black", ms=11, mew=1.3)
    best = np.unravel_index(int(errors.argmin()), errors.shape)
    axes.plot(x[best[1]], y[best[0]], "*", mfc="white", mec="black", ms=13)
    r = claims.tilt(panel.wrong.sum(axis=-1))
    regularizer = "decoupled decay" if optimizer.endswith("W") else "L2"
    axes.set_title(f"{optimizer} ({regularizer}): best {errors.min():.2f} %, r = {r:+.2f}", fontsize=10, color=INK)
    axes.set_xlabel("regularization factor λ")
    axes.set_ylabel("initial learning rate α")
    for axis, exponents in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_ticks(exponents)
        axis.set_major_formatter(FuncFormatter(lambda exponent, _: f"$2^{{{exponent:.0f}}}$"))
    axes.tick_params(length=0, labelsize=8)
    return mesh


# ------------------------------------------------------------------------------------- test error and training loss


def scatters(networks: list[str], maps: dict[tuple[str, str], Panel]) -> Figure:
    """A row a network, a panel a pair: every run, and the means by which the claim is judged."""
    figure = blank(10, 0.6 + 3.7 * len(networks))
    axes = figure.subplots(len(networks), len(PAIRS), squeeze=False)
    for row, network in zip(axes, networks, strict=True):
        for place, pair in zip(row, PAIRS, strict=True):
            scatter(place, {name: maps[network, name] for name in pair})
            place.set_title(f"{' and '.join(pair)}, {TITLES[network]}", fontsize=10, color=INK)
    figure.suptitle(
        "Every run of the heat maps; lines: means of octaves of the training loss", fontsize=11, color=INK
    )  # fmt: skip
    return figure


def scatter(axes: Axes, own: dict[str, Panel]) -> None:
    """The runs of one pair; an empty panel if none has learnt anything."""
    tidy(axes)
    if not any((panel.losses < claims.LEARNT).any() for panel in own.values()):
        return
    exponents = claims.loss_bins(*own.values())
    centres = 2.0 ** (np.array(exponents) + 0.5)
    for name, panel in own.items():
        learnt = panel.losses < claims.LEARNT
        points = panel.losses[learnt], claims.PERCENT * panel.wrong[learnt]
        axes.plot(*points, ".", ms=4, alpha=0.3, mew=0, color=COLOURS[name])
        if exponents:
            means = claims.mean_by_loss(panel, exponents, claims.all_of(panel.wrong.shape[-1]))[0]
            axes.plot(centres, claims.PERCENT * means, "o-", ms=4, color=COLOURS[name], label=name, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value in (2, 3, 5, 20) else ""))
    if exponents:
        axes.set_xlim(left=2.0 ** (min(exponents) - 1))
    axes.set_xlabel("training loss, nats")
    axes.set_ylabel("test error, %")
    if exponents:
        axes.legend(frameon=False, fontsize=9)


# ----------------------------------------------------------------------------------------------------------- curves


def learning_curves(lines: dict[tuple[str, str, bool], Array], plan: Plan) -> Figure:
    """A panel a network and optimizer: one cosine, and restarts."""
    pairs = list(dict.fromkeys((network, optimizer) for network, optimizer, _ in lines))
    ends = plan.cycle_ends()
    columns = min(2, len(pairs))
    figure = blank(5 * columns, 0.7 + 3.5 * -(-len(pairs) // columns))
    axes = figure.subplots(-(-len(pairs) // columns), columns, squeeze=False)
    for place, (network, optimizer) in zip(axes.flat, pairs, strict=False):
        for restarts, name in ((False, optimizer), (True, f"{optimizer}R")):
            curve(place, lines[network, optimizer, restarts], name, RESTARTS if restarts else ONCE)
        kept = claims.PERCENT * claims.snapshots(lines[network, optimizer, True], ends).mean(axis=0)
        epochs = np.arange(1, len(kept) + 1)
        place.step(
            epochs, kept, where="post", color=INK, lw=1.4, ls="--", label=f"{optimizer}R, last restart's weights"
        )
        for end in ends[:-1]:
            place.axvline(end, color=QUIET, lw=0.8, ls=":")
        place.set_title(f"{optimizer}, {TITLES[network]}", fontsize=10, color=INK)
        place.set_yscale("log")
        place.set_ylim(top=min(100.0, HEADROOM * place.get_ylim()[1]))
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        place.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value in (2, 3, 5, 20, 50) else "")
        )
        place.set_xlabel("epoch")
        place.set_ylabel("test error, %")
        place.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
        tidy(place)
    figure.suptitle(
        f"One cosine, and warm restarts (dotted), mean of {plan.curve_seeds} seeds; band: 20th to 80th percentile",
        fontsize=11, color=INK,
    )  # fmt: skip
    return figure


def curve(axes: Axes, wrong: Array, name: str, colour: str) -> None:
    """The mean of the seeds, and their spread."""
    epochs = np.arange(1, wrong.shape[1] + 1)
    low, high = np.percentile(wrong, (20, 80), axis=0)
    axes.fill_between(epochs, claims.PERCENT * low, claims.PERCENT * high, color=colour, alpha=0.18, lw=0)
    axes.plot(epochs, claims.PERCENT * wrong.mean(axis=0), color=colour, lw=1.5, label=name)


def tidy(axes: Axes) -> None:
    """One look for the panels with lines."""
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
