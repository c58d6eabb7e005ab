"""Trains what has no row yet, on all cores, and writes each row when its run ends."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterable
from multiprocessing.pool import Pool
from pathlib import Path

import torch
from tqdm import tqdm

from examples.paper import rows
from examples.paper.rows import Result
from examples.paper.settings import Plan, Setting
from examples.paper.training import train


def run(plan: Plan, folder: Path, workers: int) -> int:
    """Train the runs of `plan` that `folder` has no rows of; how many they were."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = train_missing(folder / rows.GRID_FILE, plan.grid_settings(), "heat maps", workers, every_epoch=False)
    curves = train_missing(folder / rows.CURVE_FILE, plan.curve_settings(), "curves", workers, every_epoch=True)
    return grid + curves


def train_missing(path: Path, settings: Iterable[Setting], title: str, workers: int, every_epoch: bool) -> int:
    """Train the settings that have no row in `path`; this process alone writes, so rows never mix."""
    rows.drop_torn_row(path)
    found = rows.read(path)
    wanted = list(settings)
    missing = [setting for setting in wanted if setting not in found]
    one_run = functools.partial(labelled_run, every_epoch=every_epoch)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=title, unit="run", dynamic_ncols=True)
    with bar:
        if not missing:
            return 0
        if workers == 1:
            start_worker()
            for setting, result in map(one_run, missing):
                rows.append(path, setting, result)
                bar.update()
            return len(missing)
        with pool_of(min(workers, len(missing))) as pool:
            for setting, result in pool.imap_unordered(one_run, missing, chunksize=1):
                rows.append(path, setting, result)
                bar.update()
    return len(missing)


def labelled_run(setting: Setting, every_epoch: bool) -> tuple[Setting, Result]:
    """A run with its setting, for results arrive as they end."""
    return setting, train(setting, every_epoch)


def start_worker() -> None:
    """One thread a process: matrices of this size are not worth sharing."""
    torch.set_num_threads(1)


def pool_of(workers: int) -> Pool:
    """Fresh processes: a fork of one in which torch has run threads may hang in them.

    They inherit that Ctrl-C is ignored, which reaches them too: this process ends them, without their tracebacks.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return multiprocessing.get_context("spawn").Pool(workers, start_worker)
    finally:
        signal.signal(signal.SIGINT, before)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
