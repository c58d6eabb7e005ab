"""The acceptance figures of the 8-bit moments, each met by the optimizer itself; and what the metrics can tell.

The metrics are those of `bench/quality.py`, where also stands what each means. Every path gives the same bits, which
other tests show, so one path a device is enough here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import tolerance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adamw_kernels import FusedAdamW  # noqa: E402
from bench import quality, record_trace  # noqa: E402  # a neighbour of the tests, not an installed package

OURS = quality.FORMATS["8bit"]
PUBLISHED = [pytest.param(format, id=name) for name, format in quality.FORMATS.items() if format.published is not None]
DROPS = (5.0, 10.0, 25.0)
BETA2S = quality.BETA2S

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of a few thousand elements: on a busy machine threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def error_on_trace(format: quality.Format, beta2: float, device: torch.device) -> float:
    """The update error on the recorded trace."""
    return quality.on_trace(format, beta2, device=device)


@cache
def stress(
    format: quality.Format, beta2: float, device: torch.device, sigma: float = 1.0, seed: int = 0
) -> quality.Pair:
    """The stress case, without a bound."""
    return quality.stress(format, beta2, sigma=sigma, device=device, seed=seed)


def largest_update(format: quality.Format, beta2: float, device: torch.device, sigma: float) -> float:
    """The largest update in the stress case: of five streams of random bits the median, as it is one in ten million."""
    return float(np.median([stress(format, beta2, device, sigma, seed).largest for seed in range(5)]))


def largest_over_bound(pair: quality.Pair) -> float:
    """Largest |u| over the bound that many steps approach."""
    return pair.largest / quality.bound(pair.tested.step, pair.tested.beta2)


# ------------------------------------------------------------------------------------------------------ acceptance


def test_benchmark_has_the_limits_of_these_tests() -> None:
    """A row is called met exactly when the test of the same figure would pass."""
    assert quality.ACCEPTANCE == {name: tolerance(f"moments_8bit_{name}") for name in quality.ACCEPTANCE}


@pytest.mark.parametrize("beta2", BETA2S)
def test_updates_on_recorded_gradients(beta2: float, device: torch.device) -> None:
    """Updates on a GPT's gradients stay near those of exact Adam over 640 steps."""
    assert error_on_trace(OURS, beta2, device) <= tolerance(f"moments_8bit_update_error_beta2_{beta2:g}")


@pytest.mark.parametrize("exponent", [-3, -6, -9, -12])
@pytest.mark.parametrize("beta2", BETA2S)
def test_scale_of_gradients_does_not_matter(beta2: float, exponent: int, device: torch.device) -> None:
    """The same on gradients of 1e-3 to 1e-12, whose squares leave the range of many a scale."""
    error = quality.at_scale(OURS, beta2, 10.0**exponent, device=device)
    assert error <= tolerance(f"moments_8bit_update_error_beta2_{beta2:g}")


@pytest.mark.parametrize("beta2", BETA2S)
def test_weights_after_a_drop_of_unequal_gradients(beta2: float, device: torch.device) -> None:
    """Neighbours with scales far apart, then ten times smaller: the weights end near where exact Adam's do."""
    assert stress(OURS, beta2, device).weight_error() <= tolerance("moments_8bit_stress_weight_error")


@pytest.mark.parametrize("beta2", BETA2S)
def test_no_update_explodes_without_the_bound(beta2: float, device: torch.device) -> None:
    """In the same case no update exceeds what Adam itself could make, though nothing clamps it."""
    assert largest_over_bound(stress(OURS, beta2, device)) <= tolerance("moments_8bit_stress_largest_update")


@pytest.mark.parametrize("beta2", BETA2S)
def test_second_moment_follows_a_drop(beta2: float, device: torch.device) -> None:
    """The mean of v stays right after gradients fell, where rounding to nearest would freeze it."""
    biases = quality.bias_after_drops(OURS, beta2, DROPS, device=device)
    assert np.max(biases) <= tolerance("moments_8bit_second_moment_bias"), dict(zip(DROPS, biases, strict=True))


@pytest.mark.parametrize("betas", [(0.9, 0.9999), (0.7, 0.999), (0.5, 0.999)])
def test_first_updates_with_unequal_betas(betas: tuple[float, float], device: torch.device) -> None:
    """The first |m| / sqrt(v) is up to 16 here, and is held: updates are as near as with the usual betas."""
    rng = np.random.default_rng(7)
    param, exact = torch.nn.Parameter(torch.zeros(4096, device=device)), torch.nn.Parameter(torch.zeros(4096).double())
    param.grad = torch.zeros_like(param)
    ours = FusedAdamW([param], lr=1.0, betas=betas, weight_decay=0.0, moment_format="8bit")
    theirs = torch.optim.AdamW([exact], lr=1.0, betas=betas, weight_decay=0.0)
    wrong = total = 0.0
    for _ in range(20):
        grad = (rng.standard_normal(4096) * 1e-3).astype(np.float32)
        wanted = exact.detach().clone()
        exact.grad = torch.from_numpy(grad.astype(np.float64))
        theirs.step()
        wanted -= exact.detach()
        update = quality.update_of(ours, param, grad)
        wrong += float(np.sum((update - wanted.numpy()) ** 2))
        total += float(np.sum(wanted.numpy() ** 2))
    assert wrong / total <= tolerance("moments_8bit_update_error_beta2_0.999")


@pytest.mark.parametrize("beta2", BETA2S)
def test_dead_elements_stop(beta2: float, device: torch.device) -> None:
    """Elements whose gradient stops drift no further than exact Adam's, among live neighbours and in dead blocks."""
    dead = quality.dead(OURS, beta2, device=device)
    assert np.max([dead.mixed, dead.blocks]) <= tolerance("moments_8bit_dead_drift"), dead


@pytest.mark.parametrize("beta2", BETA2S)
def test_sparse_updates_keep_to_the_bound(beta2: float, device: torch.device) -> None:
    """Embedding-like gradients, where exact Adam itself reaches the bound, never exceed it by more than its margin."""
    pair = quality.sparse(OURS, beta2, device=device, bounded=True)
    assert pair.over_bound <= tolerance("moments_8bit_sparse_update_over_bound")


def test_metadata(device: torch.device) -> None:
    """What the codes need beside them is at most an eighth of a byte a parameter; both moments are one byte each."""
    adam = quality.Adam(OURS, 16384, 0.999, 1e-8, bounded=True, device=device)
    adam.update(np.ones(16384))
    total, metadata = adam.bytes_per_param()
    assert metadata <= tolerance("moments_8bit_metadata_bytes")
    assert total == 2 + metadata


# ------------------------------------------------------------------------------------------- beside published formats


@pytest.mark.parametrize("beta2", BETA2S)
@pytest.mark.parametrize("format", PUBLISHED)
def test_no_published_format_is_better(format: quality.Format, beta2: float, device: torch.device) -> None:
    """Best on recorded gradients and in the stress cases alike: update error, weights' error and largest update.

    Not in every figure of the rows: some follow v after a drop, or an element without gradients, more closely.
    """
    assert error_on_trace(OURS, beta2, device) <= error_on_trace(format, beta2, device)
    for sigma in (1.0, 2.0):
        ours, theirs = (stress(tried, beta2, device, sigma) for tried in (OURS, format))
        assert ours.weight_error() <= theirs.weight_error(), sigma
        assert largest_update(OURS, beta2, device, sigma) <= theirs.largest, sigma


def test_metrics_tell_known_failures(device: torch.device) -> None:
    """Each limit is missed by a published format with the fault that the metric is there to find."""
    formats, where = quality.FORMATS, dict(device=device)
    dynamic, float8 = formats["blockwise dynamic int8"], formats["float8 blocks"]
    softsign, nearest_log = formats["softsign and root int8"], formats["adaptive log"]

    # v is rounded to 0 beside m that is not
    assert largest_over_bound(stress(float8, 0.999, device)) > 100
    assert quality.sparse(dynamic, 0.999, bounded=False, **where).over_bound > 100
    # scales that end above the gradients
    assert quality.at_scale(softsign, 0.999, 1e-6, **where) > 10 * quality.at_scale(softsign, 0.999, 1e-3, **where)
    # v does not move by a step of its code
    assert quality.bias_after_drops(nearest_log, 0.999, (10.0,), **where)[0] > 0.1
    # m does not decay by a step of its code
    assert quality.dead(softsign, 0.95, **where).mixed > 10


# ------------------------------------------------------------------------------------------------------------ trace


def test_recorded_trace() -> None:
    """The committed files hold what the metrics rely on, in files of less than a mebibyte."""
    gradients, real = record_trace.load()
    assert gradients.shape == (record_trace.STEPS, len(real))
    assert np.isfinite(gradients).all()
    assert (gradients[:, ~real] == 0).all()
    assert (gradients[:, real] != 0).any(axis=0).all()
    assert all(path.stat().st_size < MEBIBYTE for path in record_trace.DATA.glob("*.npz"))


def test_recorder_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short recording has the elements of the committed one, and reading it gives the recorded gradients."""
    pytest.importorskip("tqdm", reason="the examples need tqdm")
    pytest.importorskip("matplotlib", reason="the examples need matplotlib")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with torch.random.fork_rng():
        recorded = record_trace.record(steps=2)
    for name in ("train_gpt", "plot_training"):
        sys.modules.pop(name, None)
    record_trace.save(recorded, tmp_path)
    gradients, real = record_trace.load(tmp_path)
    committed, committed_real = record_trace.load()
    np.testing.assert_array_equal(real, committed_real)
    rows = np.concatenate(list(recorded.values())).astype(np.float32) / record_trace.SCALE
    np.testing.assert_array_equal(gradients[:, real].T, rows)
