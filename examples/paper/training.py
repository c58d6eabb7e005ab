"""One run: data, network, optimizer, training loop."""

from __future__ import annotations

import functools
import math
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adamw_kernels
from adamw_kernels import FusedAdamW, FusedSGDW, WarmRestarts, normalized_weight_decay
from examples.paper.rows import Result
from examples.paper.settings import TRAIN_IMAGES, Setting

BATCH = 60
STEPS_PER_EPOCH = TRAIN_IMAGES // BATCH
WIDTH = 128
MOMENTUM = 0.9  # of SGD; Adam keeps its defaults


# ------------------------------------------------------------------------------------------------------------- data


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn: (1797, 64) pixels in [0, 1] and the ten classes."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


@functools.cache
def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; standardized by the training images' mean and spread."""
    pixels, labels = digits()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    mean, spread = pixels[train].mean(), pixels[train].std()
    scaled = (pixels - mean) / spread
    return scaled[train], labels[train], scaled[test], labels[test]


# ---------------------------------------------------------------------------------------------------------- network


def normalized_network() -> nn.Module:
    """A multilayer perceptron of 25,866 weights, every hidden layer batch-normalized: its weights' scale is free."""
    return nn.Sequential(
        nn.Linear(64, WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH, affine=False),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH, affine=False),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def plain_network() -> nn.Module:
    """The same without normalization, with biases: 26,122 weights, whose scale is the function's."""
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip


NETWORKS = {"normalized": normalized_network, "plain": plain_network}


# -------------------------------------------------------------------------------------------------------- optimizer


def make_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """The paper's Algorithm 1 (SGD, SGDW) or 2 (Adam, AdamW); all weights decay, as there."""
    decoupled = setting.optimizer.endswith("W")
    coupling = "schedule" if decoupled else "lr"  # with L2 there is no decay to couple
    if setting.optimizer.startswith("SGD"):
        return FusedSGDW(
            model.parameters(),
            lr=setting.lr,
            momentum=MOMENTUM,
            weight_decay=setting.weight_decay,
            decoupled=decoupled,
            decay_coupling=coupling,
            lr_in_momentum=True,
        )
    return FusedAdamW(
        model.parameters(),
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        decoupled=decoupled,
        decay_coupling=coupling,
    )


def make_schedule(setting: Setting, optimizer: torch.optim.Optimizer) -> WarmRestarts:
    """Cosine annealing batch by batch: one cosine over the run, or restarts with normalized decay."""
    if setting.first_cycle == setting.epochs:
        return WarmRestarts(optimizer, setting.epochs, steps_per_epoch=STEPS_PER_EPOCH)
    return WarmRestarts(
        optimizer,
        setting.first_cycle,
        cycle_mult=2,
        steps_per_epoch=STEPS_PER_EPOCH,
        weight_decay=functools.partial(normalized_weight_decay, lambda_norm(setting), BATCH, TRAIN_IMAGES),
    )


def lambda_norm(setting: Setting) -> float:
    """The paper's lambda_norm of which `weight_decay` is the lambda of a run of `epochs`."""
    return setting.weight_decay / normalized_weight_decay(1.0, BATCH, TRAIN_IMAGES, setting.epochs)


# --------------------------------------------------------------------------------------------------------- training


def train(setting: Setting, every_epoch: bool = False) -> Result:
    """One run from its settings alone; with `every_epoch`, how many were wrong after each epoch too."""
    start = time.perf_counter()
    images, labels, test_images, test_labels = split(setting.seed)
    torch.manual_seed(setting.seed)  # the same weights and batches for every optimizer, learning rate and decay
    model = NETWORKS[setting.network]()
    batches = [torch.randperm(TRAIN_IMAGES).split(BATCH) for _ in range(setting.epochs)]
    optimizer = make_optimizer(setting, model)
    schedule = make_schedule(setting, optimizer)
    epoch_wrong = []
    for epoch in batches:
        for batch in epoch:
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if every_epoch:
            epoch_wrong.append(evaluate(model, test_images, test_labels)[1])
    train_loss, _ = evaluate(model, images, labels)
    test_loss, test_wrong = evaluate(model, test_images, test_labels)
    return Result(
        train_loss=train_loss,
        test_loss=test_loss,
        test_wrong=test_wrong,
        epoch_wrong=" ".join(map(str, epoch_wrong)),
        seconds=round(time.perf_counter() - start, 3),
        torch=torch.__version__,
        package=adamw_kernels.__version__,
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """Cross-entropy in nats, and how many are classified wrongly: all of them if the outputs are no numbers."""
    model.eval()
    logits = model(images)
    model.train()
    loss = float(F.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        return math.nan, len(labels)
    return loss, int((logits.argmax(1) != labels).sum())
