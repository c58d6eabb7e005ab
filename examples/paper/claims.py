"""The paper's claims, each as a number with an interval, computed from the rows and judged by one rule.

Each claim names the region in which its value must lie. "shown": the whole interval does. "contrary": none of the
interval does. "not shown": the rows cannot tell.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.paper import rows
from examples.paper.settings import OPTIMIZERS, PAIRS, TEST_IMAGES, Grid, Plan, Setting

FILE = "claims.csv"
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
INTERVAL = (2.5, 97.5)  # percentiles

BEST_SHARE = 0.1
UPRIGHT = 0.5  # a ridge is upright if less than a quarter of log lambda's variance goes with log lr
MARGIN = 0.2  # percentage points, three of the 1,497 test images: "not worse" means by less than this
LEARNT = 1.0  # nats: runs that end above, ln(10) = 2.3 being chance, have not learnt the training images
RUNS_IN_BIN = 10  # of each optimizer, for a mean

PERCENT = 100 / TEST_IMAGES  # of the test error, a wrongly classified image

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """One row of claims.csv.

    Attributes:
        claim: What the paper says.
        network: Key of `training.NETWORKS`.
        optimizers: Whose runs.
        measure: What `value` is.
        value: From all seeds.
        low: 2.5th percentile of the bootstrap over seeds.
        high: 97.5th percentile.
        expected: The region in which the claim puts the value.
        verdict: "shown", "not shown" or "contrary".
        seeds: How many there are.
        resamples: How many the bootstrap drew.
    """

    claim: str
    network: str
    optimizers: str
    measure: str
    value: float
    low: float
    high: float
    expected: str
    verdict: str
    seeds: int
    resamples: int


@dataclass(frozen=True)
class Region:
    """An open interval of values."""

    above: float
    below: float

    def __str__(self) -> str:
        """As the rows say it."""
        if math.isinf(self.above):
            return f"below {self.below:g}"
        return f"between {self.above:g} and {self.below:g}"

    def verdict(self, low: float, high: float) -> str:
        """Whether all, none or some of [low, high] lies within."""
        if self.above < low and high < self.below:
            return "shown"
        return "contrary" if high < self.above or self.below < low else "not shown"


NEGATIVE = Region(-math.inf, 0.0)
AROUND_ZERO = Region(-UPRIGHT, UPRIGHT)
NOT_WORSE = Region(-math.inf, MARGIN)


# ------------------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Panel:
    """The runs of one heat map, as (learning rate, weight decay, seed).

    Attributes:
        grid: What the axes are.
        wrong: Wrongly classified test images: whole numbers, whose sums are exact, so that ties are ties.
        losses: Training losses.
    """

    grid: Grid
    wrong: Array
    losses: Array


def panels(plan: Plan, folder: Path) -> dict[tuple[str, str], Panel]:
    """The heat maps by network and optimizer.

    Raises:
        RowsError: Runs are missing.
    """
    found = rows.finished(folder / rows.GRID_FILE, plan.grid_settings())
    results = {}
    for grid in plan.grids:
        own = {key: result for key, result in found.items() if (key.network, key.optimizer) == panel_key(grid)}
        shape = (plan.grid_seeds, len(grid.lrs), len(grid.decays))  # the order in which a plan lists them
        wrong = np.array([result.test_wrong for result in own.values()], dtype=np.float64).reshape(shape)
        losses = np.array([result.train_loss for result in own.values()]).reshape(shape)
        results[panel_key(grid)] = Panel(grid, np.moveaxis(wrong, 0, -1), np.moveaxis(losses, 0, -1))
    return results


def panel_key(grid: Grid) -> tuple[str, str]:
    """Network and optimizer."""
    return grid.network, grid.optimizer


def curves(plan: Plan, folder: Path) -> dict[tuple[str, str, bool], Array]:
    """Wrongly classified test images as (seed, epoch) by network, optimizer and whether there were restarts.

    Raises:
        RowsError: Runs are missing.
    """
    found = rows.finished(folder / rows.CURVE_FILE, plan.curve_settings())

    def wrong(key: tuple[str, str, bool]) -> list[list[int]]:
        return [result.curve() for setting, result in found.items() if curve_key(setting) == key]

    return {key: np.array(wrong(key), dtype=np.float64) for key in dict.fromkeys(map(curve_key, found))}


def curve_key(setting: Setting) -> tuple[str, str, bool]:
    """Network, optimizer, restarts."""
    return setting.network, setting.optimizer, setting.first_cycle < setting.epochs


# -------------------------------------------------------------------------------------------------------- measures


def best_cells(errors: Array) -> NDArray[np.bool_]:
    """The tenth of the cells with the least error, rounded up; cells that tie with the last of them included."""
    count = math.ceil(BEST_SHARE * errors.size)
    limit: float = np.partition(errors, count - 1, axis=None)[count - 1]
    return errors <= limit


def tilt(errors: Array) -> float:
    """Pearson's correlation of log lr and log lambda over the best cells of a (learning rate, weight decay) array.

    0 where one of them is the same in all best cells: such a ridge does not tilt.
    """
    lrs, decays = np.nonzero(best_cells(errors))  # indices: the grid is even in the logarithms
    if np.ptp(lrs) == 0 or np.ptp(decays) == 0:
        return 0.0
    correlations: Array = np.asarray(np.corrcoef(np.stack([lrs, decays])))
    return float(correlations[0, 1])


def seed_weights(seeds: int) -> Array:
    """(RESAMPLES, seeds): how often each seed is drawn in each resample. All runs of a seed go together."""
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(seeds, size=(RESAMPLES, seeds))
    return np.stack([(drawn == seed).sum(axis=1) for seed in range(seeds)], axis=1).astype(np.float64)


def all_of(seeds: int) -> Array:
    """(1, seeds): each once."""
    return np.ones((1, seeds))


def means(values: Array, weights: Array) -> Array:
    """Means over seeds, the last axis of `values`, with the weights of each resample: (resamples, ...)."""
    result: Array = np.moveaxis(values @ weights.T / weights.sum(axis=1), -1, 0)
    return result


def loss_bins(first: Panel, second: Panel) -> list[int]:
    """The octaves of the training loss, as exponents, in which both have runs enough."""
    octaves = [octave(panel.losses) for panel in (first, second)]
    exponents = np.arange(-64, math.ceil(math.log2(LEARNT)))
    return [int(e) for e in exponents if all((places == e).sum() >= RUNS_IN_BIN for places in octaves)]


def octave(losses: Array) -> Array:
    """floor(log2(loss)); NaN where there is no loss."""
    with np.errstate(divide="ignore"):
        return np.floor(np.log2(losses))


def mean_by_loss(panel: Panel, exponents: list[int], weights: Array) -> Array:
    """(resamples, bins): mean number of wrong images of the runs whose training loss lies in each octave."""
    places = octave(panel.losses)
    columns = []
    for exponent in exponents:
        inside = places == exponent
        wrong, counts = (x.sum(axis=(0, 1)) @ weights.T for x in (panel.wrong * inside, inside.astype(np.float64)))
        columns.append(np.divide(wrong, counts, out=np.full_like(wrong, np.nan), where=counts > 0))
    return np.stack(columns, axis=1)


def snapshots(wrong: Array, ends: list[int]) -> Array:
    """(seed, epoch) with, after each cycle's end, what the weights of that moment give until the next cycle's end.

    That is what a user has who stops at some time and takes the last snapshot; in the first cycle, the weights then.
    """
    kept: Array = wrong.copy()
    for start, stop in zip(ends, ends[1:], strict=False):
        kept[:, start : stop - 1] = wrong[:, start - 1 : start]
    return kept


# ---------------------------------------------------------------------------------------------------------- claims


def compute(plan: Plan, folder: Path) -> list[Claim]:
    """All claims, from the rows in `folder`.

    Raises:
        RowsError: Runs are missing.
    """
    maps = panels(plan, folder)
    lines = curves(plan, folder)
    results: list[Claim] = []
    for network in dict.fromkeys(grid.network for grid in plan.grids):
        own = {optimizer: maps[network, optimizer] for optimizer in OPTIMIZERS}
        results += ridges(network, own)
        results += best_errors(network, own)
        results += equal_losses(network, own)
    for network, optimizer, restarts in lines:
        if restarts:
            once, again = lines[network, optimizer, False], lines[network, optimizer, True]
            results += anytime(network, optimizer, once, again, plan.cycle_ends())
    return results


def ridges(network: str, own: dict[str, Panel]) -> Iterator[Claim]:
    """Where the best settings lie, for each optimizer, and L2 against decoupled."""
    measure = "correlation of log lr and log lambda over the best tenth of the settings"
    sampled, exact, seeds = {}, {}, 0
    for optimizer, panel in own.items():
        seeds = panel.wrong.shape[-1]
        exact[optimizer] = tilt(panel.wrong.mean(axis=-1))
        sampled[optimizer] = np.array([tilt(errors) for errors in means(panel.wrong, seed_weights(seeds))])
        upright = optimizer.endswith("W")
        claim, region = ("the ridge stands upright", AROUND_ZERO) if upright else ("the ridge tilts", NEGATIVE)
        yield judge(claim, network, optimizer, measure, exact[optimizer], sampled[optimizer], region, seeds)
    for coupled, decoupled in PAIRS:
        value = abs(exact[decoupled]) - abs(exact[coupled])
        resamples = np.abs(sampled[decoupled]) - np.abs(sampled[coupled])
        yield judge(
            "decoupled decay separates better", network, f"{decoupled} - {coupled}",
            "difference of the correlations' sizes", value, resamples, NEGATIVE, seeds,
        )  # fmt: skip


def best_errors(network: str, own: dict[str, Panel]) -> Iterator[Claim]:
    """The best cell of one heat map against the other's; each resample finds its own best."""
    for coupled, decoupled in PAIRS:
        first, second = own[decoupled], own[coupled]
        seeds = first.wrong.shape[-1]
        yield judge(
            "the best test error is not worse", network, f"{decoupled} - {coupled}",
            "difference of the best settings' test errors, points", float(best_gaps(first, second, all_of(seeds))[0]),
            best_gaps(first, second, seed_weights(seeds)), NOT_WORSE, seeds,
        )  # fmt: skip


def best_gaps(first: Panel, second: Panel, weights: Array) -> Array:
    """(resamples,): by how many points of the test error the first one's best cell is above the second's."""
    least = [means(panel.wrong, weights).min(axis=(1, 2)) for panel in (first, second)]
    gaps: Array = PERCENT * (least[0] - least[1])
    return gaps


def equal_losses(network: str, own: dict[str, Panel]) -> Iterator[Claim]:
    """Test errors of all runs of two optimizers, compared where the training losses are equal."""
    claim = "lower test error at equal training loss"
    for coupled, decoupled in PAIRS:
        first, second = own[decoupled], own[coupled]
        seeds = first.wrong.shape[-1]
        exponents = loss_bins(first, second)
        names = f"{decoupled} - {coupled}"
        measure = f"test error at equal training loss, points, mean of {len(exponents)} octaves"
        if not exponents:
            nothing = 3 * (math.nan,)
            yield Claim(claim, network, names, measure, *nothing, str(NEGATIVE), "not shown", seeds, 0)
            continue
        value = float(equal_loss_gaps(first, second, exponents, all_of(seeds))[0])
        resamples = equal_loss_gaps(first, second, exponents, seed_weights(seeds))
        yield judge(claim, network, names, measure, value, resamples, NEGATIVE, seeds)


def equal_loss_gaps(first: Panel, second: Panel, exponents: list[int], weights: Array) -> Array:
    """(resamples,): mean over the octaves of how many points of the test error the first is above the second."""
    by_loss = [mean_by_loss(panel, exponents, weights) for panel in (first, second)]
    gaps: Array = np.nanmean(by_loss[0] - by_loss[1], axis=1)
    return PERCENT * gaps


def anytime(network: str, optimizer: str, once: Array, again: Array, ends: list[int]) -> Iterator[Claim]:
    """Curves with restarts against one cosine of the same length, seed by seed."""
    seeds = len(once)
    names = f"{optimizer}R - {optimizer}"
    kept = snapshots(again, ends)
    over_epochs = "mean test error over the epochs, points"
    measures = [
        ("better at any time, by the last restart's weights", over_epochs, (kept - once).mean(axis=1), NEGATIVE),
        ("better at any time, by the weights of the moment", over_epochs, (again - once).mean(axis=1), NEGATIVE),
        ("not worse at the end", "test error after the last epoch, points", (again - once)[:, -1], NOT_WORSE),
    ]
    for claim, measure, images, region in measures:
        gaps = PERCENT * images
        resamples = means(gaps, seed_weights(seeds))
        yield judge(claim, network, names, measure, float(gaps.mean()), resamples, region, seeds)


def judge(
    claim: str, network: str, optimizers: str, measure: str, value: float, resamples: Array, region: Region, seeds: int
) -> Claim:
    """The row of a claim."""
    low, high = (float(x) for x in np.percentile(resamples, INTERVAL))
    verdict = region.verdict(low, high)
    return Claim(
        claim, network, optimizers, measure, float(value), low, high, str(region), verdict, seeds, len(resamples)
    )


# ---------------------------------------------------------------------------------------------------------- output


def cells(claim: Claim) -> list[str]:
    """A claim as text; four decimals are more than the intervals allow."""
    return [decimals(value, 4) if isinstance(value, float) else str(value) for value in astuple(claim)]


def decimals(value: float, count: int) -> str:
    """`value` with so many decimals, and no minus before zeros."""
    return f"{round(value, count) + 0.0:.{count}f}"


def write(claims: list[Claim], folder: Path) -> Path:
    """Write claims.csv anew and return its path."""
    path = folder / FILE
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Claim)])
        writer.writerows(map(cells, claims))
    return path


def table(claims: list[Claim]) -> str:
    """The claims as a Markdown table, as in the README."""
    lines = ["| network | claim | runs | value | 95 % interval | expected | verdict |", "|" + 7 * "---|"]
    for claim in claims:
        lines.append(
            f"| {claim.network} | {claim.claim} | {claim.optimizers} | {decimals(claim.value, 2)} | "
            f"{decimals(claim.low, 2)} to {decimals(claim.high, 2)} | {claim.expected} | {claim.verdict} |"
        )
    return "\n".join(lines)
