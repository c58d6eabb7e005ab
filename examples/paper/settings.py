"""What is trained: every run's settings, in the order in which they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

OPTIMIZERS = ("SGD", "SGDW", "Adam", "AdamW")  # the paper's names: L2 in the gradient, or W for decoupled decay
PAIRS = (("SGD", "SGDW"), ("Adam", "AdamW"))

# Few images to learn from leave something to regularization. Of the others, one is 0.07 % of the test error.
TRAIN_IMAGES = 300
TEST_IMAGES = 1797 - TRAIN_IMAGES


@dataclass(frozen=True)
class Setting:
    """What one run is determined by.

    Attributes:
        network: Key of `training.NETWORKS`.
        optimizer: One of `OPTIMIZERS`.
        lr: Initial learning rate, the paper's alpha.
        weight_decay: The paper's lambda: of L2 in the gradient, of decoupled decay multiplied by eta_t alone. Runs
            with restarts normalize it: a cycle of T epochs has lambda * sqrt(epochs / T).
        epochs: Length of the run.
        first_cycle: Epochs of the first cosine; each further cycle is twice as long. As many as `epochs`: no restart.
        seed: Of the split, the initial weights and the batches.
    """

    network: str
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    first_cycle: int
    seed: int


@dataclass(frozen=True)
class Grid:
    """One heat map a (network, optimizer): every learning rate with every weight decay, as exponents of 2."""

    network: str
    optimizer: str
    lr_exponents: range
    decay_exponents: range

    @property
    def lrs(self) -> list[float]:
        """The learning rates, ascending."""
        return [2.0**exponent for exponent in self.lr_exponents]

    @property
    def decays(self) -> list[float]:
        """The weight decays, ascending."""
        return [2.0**exponent for exponent in self.decay_exponents]


@dataclass(frozen=True)
class Curve:
    """One pair of learning curves: the same optimizer with and without restarts.

    Attributes:
        network: Key of `training.NETWORKS`.
        optimizer: One of `OPTIMIZERS`.
        lr: Initial learning rate.
        weight_decay: Of a run as long as the heat maps'; normalized to the length of these.
    """

    network: str
    optimizer: str
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """All experiments.

    Attributes:
        grids: The heat maps.
        grid_epochs: Length of their runs.
        grid_seeds: Runs per cell.
        curves: What is trained with and without restarts.
        curve_epochs: Length of these runs.
        first_cycle: Of the runs with restarts, in epochs.
        curve_seeds: Runs per curve.
    """

    grids: tuple[Grid, ...]
    grid_epochs: int
    grid_seeds: int
    curves: tuple[Curve, ...]
    curve_epochs: int
    first_cycle: int
    curve_seeds: int

    def grid_settings(self) -> Iterator[Setting]:
        """The runs of the heat maps; seed by seed, so that what an interruption leaves is whole panels."""
        epochs = self.grid_epochs
        for seed in range(self.grid_seeds):
            for grid in self.grids:
                for lr in grid.lrs:
                    for decay in grid.decays:
                        yield Setting(grid.network, grid.optimizer, lr, decay, epochs, epochs, seed)

    def cycle_ends(self) -> list[int]:
        """The epochs after which the runs with restarts begin a new cycle, and the run's end."""
        ends, length = [self.first_cycle], self.first_cycle
        while ends[-1] < self.curve_epochs:
            length *= 2
            ends.append(min(ends[-1] + length, self.curve_epochs))
        return ends

    def curve_settings(self) -> Iterator[Setting]:
        """The runs of the learning curves: without and with restarts."""
        normalized = math.sqrt(self.grid_epochs / self.curve_epochs)
        for seed in range(self.curve_seeds):
            for curve in self.curves:
                decay = curve.weight_decay * normalized
                for cycle in (self.curve_epochs, self.first_cycle):
                    yield Setting(curve.network, curve.optimizer, curve.lr, decay, self.curve_epochs, cycle, seed)


# One grid for all four optimizers and both networks, but Adam's learning rates, whose updates do not shrink with the
# gradients, lie lower. Ten by ten, so the best tenth is ten settings, as many as the paper marks.
LR_EXPONENTS = {"SGD": range(-8, 2), "SGDW": range(-8, 2), "Adam": range(-12, -2), "AdamW": range(-12, -2)}
DECAY_EXPONENTS = range(-10, 0)
NETWORKS = ("normalized", "plain")

FULL = Plan(
    grids=tuple(
        Grid(network, optimizer, LR_EXPONENTS[optimizer], DECAY_EXPONENTS)
        for network in NETWORKS
        for optimizer in OPTIMIZERS
    ),
    grid_epochs=50,
    grid_seeds=10,
    # The best settings of the heat maps: those of a single cosine, which is what restarts have to beat.
    curves=(
        Curve("normalized", "SGDW", lr=2.0**-5, weight_decay=2.0**-5),
        Curve("normalized", "AdamW", lr=2.0**-7, weight_decay=2.0**-5),
        Curve("plain", "SGDW", lr=2.0**-2, weight_decay=2.0**-6),
        Curve("plain", "AdamW", lr=2.0**-5, weight_decay=2.0**-6),
    ),
    curve_epochs=150,  # 10 + 20 + 40 + 80
    first_cycle=10,
    curve_seeds=20,
)
# Seconds: does everything once and shows nothing.
TINY = Plan(
    grids=tuple(Grid("plain", optimizer, range(-4, -2), range(-4, -2)) for optimizer in OPTIMIZERS),
    grid_epochs=1,
    grid_seeds=2,
    curves=(Curve("plain", "AdamW", lr=2.0**-6, weight_decay=2.0**-6),),
    curve_epochs=3,  # 1 + 2
    first_cycle=1,
    curve_seeds=2,
)
PLANS = {"full": FULL, "tiny": TINY}
