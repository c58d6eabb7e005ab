"""examples/paper: the claims are what the rows say, the README's table is the claims', and the pipeline goes on."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the paper's experiments need scikit-learn")
pytest.importorskip("tqdm", reason="the paper's experiments need tqdm")
pytest.importorskip("matplotlib", reason="the paper's experiments need matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.paper import claims, figures, rows, runner, training  # noqa: E402  # neighbours of the tests
from examples.paper.__main__ import RESULTS, main  # noqa: E402
from examples.paper.settings import FULL, OPTIMIZERS, TEST_IMAGES, TINY, TRAIN_IMAGES, Setting  # noqa: E402

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GRID_RUNS, CURVE_RUNS = 4 * 2 * 2 * 2, 2 * 2  # optimizers, learning rates, decays, seeds; with and without, seeds


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give torch its threads back, which a run in this process takes away."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny plan writes with two processes: 2 x 2 heat maps of one epoch, curves of three."""
    folder = tmp_path_factory.mktemp("paper")
    assert main(["--plan", "tiny", "--results", str(folder), "--workers", "2"]) == 0
    return folder


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    """A copy of the tiny plan's rows."""
    for name in (rows.GRID_FILE, rows.CURVE_FILE):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings that are trained from now on, in this process."""
    settings: list[Setting] = []

    def noting(setting: Setting, every_epoch: bool = False) -> rows.Result:
        settings.append(setting)
        return training.train(setting, every_epoch)

    monkeypatch.setattr(runner, "train", noting)
    return settings


# --------------------------------------------------------------------------------------------------- committed rows


@pytest.fixture(scope="module")
def computed() -> list[claims.Claim]:
    """The claims, from the committed rows."""
    return claims.compute(FULL, RESULTS)


def test_committed_claims_are_those_of_the_committed_rows(computed: list[claims.Claim], tmp_path: Path) -> None:
    """Character by character: nothing was written by hand, and nothing is older than the rows."""
    assert claims.write(computed, tmp_path).read_text() == (RESULTS / claims.FILE).read_text()


def test_readme_says_what_the_claims_say(computed: list[claims.Claim]) -> None:
    """The table of verdicts is the one that `python -m examples.paper claims` prints."""
    assert claims.table(computed) in (ROOT / "examples" / "paper" / "README.md").read_text()


NOT_WORSE, EQUAL_LOSS = "the best test error is not worse", "lower test error at equal training loss"
SENTENCES = {
    ("normalized", "the ridge tilts", "SGD"): "SGD (correlation of log lr and log λ {value}, 95 % interval {interval})",
    ("normalized", "the ridge tilts", "Adam"): "Adam ({value}, {interval})",
    ("normalized", "the ridge stands upright", "SGDW"): "SGDW's stands upright ({value}, {interval})",
    ("normalized", "the ridge stands upright", "AdamW"): "AdamW's is not shown to: {value}, {interval}",
    ("normalized", NOT_WORSE, "AdamW - Adam"): "is not worse than Adam's ({value} points, {interval})",
    ("normalized", EQUAL_LOSS, "AdamW - Adam"): "differs by {value} points ({interval})",
    ("plain", "the ridge stands upright", "SGDW"): "SGDW's ridge tilts the other way ({value}, {interval})",
    ("plain", NOT_WORSE, "AdamW - Adam"): "no worse either ({value} points, {interval})",
    ("plain", EQUAL_LOSS, "AdamW - Adam"): "L2 is ahead ({value} points for Adam, {interval})",
}
VERDICTS = {  # of those sentences, by whose runs they are about
    "shown": ["SGD", "Adam", "SGDW", "AdamW - Adam", "AdamW - Adam", "AdamW - Adam"],
    "not shown": ["AdamW"],
    "contrary": ["SGDW", "AdamW - Adam"],
}


def test_readmes_sentences_have_the_claims_numbers(computed: list[claims.Claim]) -> None:
    """Each with its value and interval, and the words fit the verdict."""
    section = (ROOT / "README.md").read_text().partition("## From the paper")[2].partition("## Backends")[0]
    text = " ".join(section.replace("**", "").split())
    spoken_of: dict[str, list[str]] = {}
    for claim in computed:
        key = claim.network, claim.claim, claim.optimizers
        if key in SENTENCES:
            value, low, high = (claims.decimals(x, 2).replace("-", "−") for x in (claim.value, claim.low, claim.high))
            assert SENTENCES[key].format(value=value, interval=f"{low} to {high}") in text
            spoken_of.setdefault(claim.verdict, []).append(claim.optimizers)
    assert {verdict: sorted(names) for verdict, names in spoken_of.items()} == {
        verdict: sorted(names) for verdict, names in VERDICTS.items()
    }
    restarts = {claim.claim: [] for claim in computed if claim.claim.startswith("better at any time")}
    for claim in computed:
        if claim.claim in restarts:
            restarts[claim.claim].append(claim.verdict)
    assert sorted(restarts["better at any time, by the last restart's weights"]) == ["contrary", *["shown"] * 3]
    assert restarts["better at any time, by the weights of the moment"] == ["contrary"] * 4
    assert "better at any time in three cases of four, and behind in all with the weights of the moment" in text
    assert f"What {len(list(FULL.grid_settings())) + len(list(FULL.curve_settings())):,} small runs show" in text


def test_every_run_of_the_plan_has_its_row_and_no_other() -> None:
    """What the figures show is what is committed, from one version of torch."""
    for name, settings in ((rows.GRID_FILE, FULL.grid_settings()), (rows.CURVE_FILE, FULL.curve_settings())):
        found = rows.read(RESULTS / name)
        assert set(found) == set(settings)
        assert len({result.torch for result in found.values()}) == 1


def test_readme_says_how_long_the_rows_took() -> None:
    """Their seconds, each of one thread, summed: what a reader with one core waits for."""
    seconds = sum(
        result.seconds for name in (rows.GRID_FILE, rows.CURVE_FILE) for result in rows.read(RESULTS / name).values()
    )
    assert f"{round(seconds / 60)} minutes of one core" in (ROOT / "examples" / "paper" / "README.md").read_text()


def test_figures_are_there_and_small() -> None:
    """Under a megabyte each."""
    paths = sorted(RESULTS.glob("*.png"))
    assert [path.name for path in paths] == [
        "heatmaps-normalized.png", "heatmaps-plain.png", "restarts.png", "test-error-against-training-loss.png",
    ]  # fmt: skip
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(PNG_MAGIC)
        assert len(content) < 1_000_000


# ---------------------------------------------------------------------------------------------------- the pipeline


def test_tiny_plan_writes_everything(trained: Path) -> None:
    """A row a run, every figure, every claim."""
    for name, runs in ((rows.GRID_FILE, GRID_RUNS), (rows.CURVE_FILE, CURVE_RUNS)):
        with (trained / name).open(newline="") as file:
            written = list(csv.DictReader(file))
        assert len(written) == runs
        assert all(0 <= int(row["test_wrong"]) <= 1497 and math.isfinite(float(row["train_loss"])) for row in written)
    assert len(rows.read(trained / rows.GRID_FILE)) == GRID_RUNS
    for result in rows.read(trained / rows.CURVE_FILE).values():
        assert len(result.curve()) == TINY.curve_epochs
        assert result.curve()[-1] == result.test_wrong
    with (trained / claims.FILE).open(newline="") as file:
        assert {row["verdict"] for row in csv.DictReader(file)} <= {"shown", "not shown", "contrary"}
    for path in figures.draw(TINY, trained):
        assert path.read_bytes().startswith(PNG_MAGIC)


def test_second_call_trains_nothing(results: Path, started: list[Setting]) -> None:
    """Every row is found again by its settings."""
    before = (results / rows.GRID_FILE).read_bytes()
    assert runner.run(TINY, results, workers=1) == 0
    assert started == []
    assert (results / rows.GRID_FILE).read_bytes() == before


@pytest.mark.parametrize("name", [rows.GRID_FILE, rows.CURVE_FILE])
def test_deleted_row_is_trained_again_to_the_same_bits(results: Path, started: list[Setting], name: str) -> None:
    """Just that run, from its settings alone."""
    path = results / name
    before = rows.read(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    (deleted,) = set(before) - set(rows.read(path))

    assert runner.run(TINY, results, workers=1) == 1
    assert started == [deleted]
    after = rows.read(path)
    assert set(after) == set(before)
    assert dataclasses.replace(after[deleted], seconds=0) == dataclasses.replace(before[deleted], seconds=0)


def test_torn_row_is_dropped_and_trained_again(results: Path, started: list[Setting]) -> None:
    """Half a last line is no row, whatever its numbers look like."""
    path = results / rows.GRID_FILE
    whole = path.read_text()
    path.write_text(whole[:-5])
    assert runner.run(TINY, results, workers=1) == 1
    assert len(started) == 1
    assert len(path.read_text().splitlines()) == len(whole.splitlines())


def test_interrupted_run_leaves_no_row(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C keeps what was finished and says how to go on."""

    def interrupt(*_: object) -> rows.Result:
        raise KeyboardInterrupt

    (results / rows.CURVE_FILE).unlink()
    monkeypatch.setattr(runner, "train", interrupt)
    assert main(["run", "--plan", "tiny", "--results", str(results), "--workers", "1"]) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert len(rows.read(results / rows.GRID_FILE)) == GRID_RUNS
    assert not (results / rows.CURVE_FILE).exists()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="sends a signal to a process group")
def test_ctrl_c_with_processes(tmp_path: Path) -> None:
    """Ctrl-C reaches parent and workers: no traceback, every row that was written is whole, and a run would go on."""
    command = [sys.executable, "-m", "examples.paper", "run", "--results", str(tmp_path), "--workers", "2"]
    grid = tmp_path / rows.GRID_FILE
    with (tmp_path / "log").open("w") as log:
        # What started the tests may have them ignore Ctrl-C, as a shell's background jobs do; children inherit that.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True, preexec_fn=heed)
        try:
            deadline = time.monotonic() + 300
            while not (grid.exists() and len(rows.read(grid)) >= 3):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    printed = (tmp_path / "log").read_text()
    assert "goes on from here" in printed
    assert "Traceback" not in printed
    found = rows.read(grid)
    assert 3 <= len(found) < len(list(FULL.grid_settings()))
    assert found.keys() < set(FULL.grid_settings())


def test_missing_rows_are_an_error_and_not_a_smaller_figure(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message counts them and says what trains them."""
    path = results / rows.GRID_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    for command in ("claims", "plot"):
        assert main([command, "--plan", "tiny", "--results", str(results)]) == 1
        message = capsys.readouterr().err
        assert f"lacks 2 of {GRID_RUNS} runs" in message
        assert "python -m examples.paper run" in message


def test_rows_of_another_schema_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not appended to."""
    path = results / rows.GRID_FILE
    path.write_text(path.read_text().replace("weight_decay", "wd", 1))
    assert main(["run", "--plan", "tiny", "--results", str(results), "--workers", "1"]) == 1
    assert "Move the file aside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers is 0, expected at least 1"),
        (["--plan", "tiny"], "--plan tiny needs --results"),
    ],
    ids=["workers", "results"],
)
def test_impossible_flags_are_refused(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    """The error names the flag, what it was and what was expected."""
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- training


def setting(optimizer: str, lr: float, weight_decay: float = 2.0**-4, **changes: int) -> Setting:
    """A run of one epoch."""
    return dataclasses.replace(Setting("plain", optimizer, lr, weight_decay, 1, 1, 0), **changes)


@pytest.mark.parametrize("lr", [2.0**-1, 2.0**-6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decoupled_decay_does_not_know_the_learning_rate(optimizer: str, lr: float) -> None:
    """Without gradients the first step of SGDW and AdamW is theta * (1 - lambda), exactly; L2's depends on lr."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    before = [param.detach().clone() for param in model.parameters()]
    stepper = training.make_optimizer(setting(optimizer, lr), model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    stepper.step()
    for param, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.detach(), was * (1 - 2.0**-4)) == optimizer.endswith("W")
        assert not torch.equal(param.detach(), was)


@pytest.mark.parametrize("pair", [("SGD", "SGDW"), ("Adam", "AdamW")], ids="-".join)
def test_without_decay_the_two_of_a_pair_are_the_same(pair: tuple[str, str]) -> None:
    """So what differs between their heat maps is the decay and nothing else."""
    ends = [training.train(setting(name, 2.0**-5, 0.0)) for name in pair]
    assert dataclasses.replace(ends[0], seconds=0) == dataclasses.replace(ends[1], seconds=0)


def test_restarts_double_and_decay_with_the_cycle() -> None:
    """1 + 2 + 4 epochs: the learning rate jumps back up at each, and lambda is normalized to each."""
    chosen = setting("AdamW", 2.0**-6, epochs=7, first_cycle=1)
    model = training.plain_network()
    optimizer = training.make_optimizer(chosen, model)
    schedule = training.make_schedule(chosen, optimizer)
    group = optimizer.param_groups[0]
    rates, decays = [], []
    for _ in range(7 * training.STEPS_PER_EPOCH):
        rates.append(group["lr"])
        decays.append(group["weight_decay"])
        optimizer.step()
        schedule.step()
    starts = [step for step, rate in enumerate(rates) if rate == chosen.lr]
    assert starts == [0, training.STEPS_PER_EPOCH, 3 * training.STEPS_PER_EPOCH]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False) if later != chosen.lr)
    factor = training.lambda_norm(chosen)
    lengths = [training.normalized_weight_decay(factor, training.BATCH, TRAIN_IMAGES, t) for t in (1, 2, 4)]
    assert list(dict.fromkeys(decays)) == lengths
    assert [decays[start] for start in starts] == lengths


def test_curves_differ_in_restarts_alone() -> None:
    """Each seed has the pair, with the same learning rate, decay and length."""
    listed = list(FULL.curve_settings())
    for once, again in zip(listed[::2], listed[1::2], strict=True):
        assert once.first_cycle == once.epochs == FULL.curve_epochs
        assert dataclasses.replace(again, first_cycle=once.first_cycle) == once
        assert again.first_cycle == FULL.first_cycle


def test_split_has_every_image_once() -> None:
    """Other seeds, other images; none is in both parts."""
    images, labels, test_images, test_labels = training.split(0)
    assert (len(images), len(test_images)) == (TRAIN_IMAGES, TEST_IMAGES)
    every = torch.cat([labels, test_labels]).bincount(minlength=10)
    assert torch.equal(every, training.digits()[1].bincount(minlength=10))
    assert not torch.equal(images, training.split(1)[0])


def test_diverged_run_counts_as_all_wrong() -> None:
    """No number is no class, not class 0."""
    model = training.plain_network()
    nn.init.constant_(next(model.parameters()), math.nan)
    loss, wrong = training.evaluate(model, *training.split(0)[2:])
    assert math.isnan(loss)
    assert wrong == TEST_IMAGES


# -------------------------------------------------------------------------------------------------------- measures

PLACES = np.mgrid[0:10, 0:10].astype(float)


@pytest.mark.parametrize(
    ("errors", "value"),
    [
        (abs(PLACES[0] + PLACES[1] - 9), -1.0),
        (abs(PLACES[0] - PLACES[1]), 1.0),
        (abs(PLACES[0] - 4), 0.0),
        (abs(PLACES[1] - 4), 0.0),
    ],
    ids=["lr times lambda", "lambda over lr", "one lr", "one lambda"],
)
def test_tilt_of_known_ridges(errors: np.ndarray, value: float) -> None:
    """Ridges of ten cells: diagonals are -1 and 1 to rounding, a single row or column 0."""
    assert claims.best_cells(errors).sum() == 10
    assert round(claims.tilt(errors), 12) == value


def test_best_tenth_includes_ties_and_is_never_empty() -> None:
    """Which of two equal cells is better cannot depend on their order."""
    errors = np.arange(100.0).reshape(10, 10)
    errors[1, 0] = errors[0, 9]
    assert claims.best_cells(errors).sum() == 11
    assert claims.best_cells(np.arange(4.0).reshape(2, 2)).sum() == 1


@pytest.mark.parametrize(
    ("region", "low", "high", "verdict"),
    [
        (claims.NEGATIVE, -2, -1, "shown"),
        (claims.NEGATIVE, -1, 1, "not shown"),
        (claims.NEGATIVE, 0, 0, "not shown"),
        (claims.NEGATIVE, 1, 2, "contrary"),
        (claims.AROUND_ZERO, -0.4, 0.4, "shown"),
        (claims.AROUND_ZERO, -0.6, 0.4, "not shown"),
        (claims.AROUND_ZERO, 0.6, 0.9, "contrary"),
        (claims.AROUND_ZERO, -0.9, -0.6, "contrary"),
        (claims.NOT_WORSE, -1, 0.1, "shown"),
        (claims.NOT_WORSE, 0.1, 0.3, "not shown"),
    ],
)
def test_verdicts(region: claims.Region, low: float, high: float, verdict: str) -> None:
    """All of the interval inside, none of it, or neither."""
    assert region.verdict(low, high) == verdict


def test_bootstrap_draws_seeds_with_replacement() -> None:
    """As many as there are, each equally often, the same in every call; means are those of the drawn seeds."""
    weights = claims.seed_weights(5)
    assert weights.shape == (claims.RESAMPLES, 5)
    assert np.array_equal(weights.sum(axis=1), np.full(claims.RESAMPLES, 5.0))
    assert abs(weights.mean(axis=0) - 1).max() < 0.05  # five standard errors of 0.9 / sqrt(10,000)
    assert np.array_equal(weights, claims.seed_weights(5))
    values = np.arange(30.0).reshape(2, 3, 5)
    drawn = [seed for seed, count in enumerate(weights[0]) for _ in range(int(count))]
    assert np.array_equal(claims.means(values, weights)[0], values[:, :, drawn].sum(axis=-1) / 5)


def test_equal_training_loss_compares_octave_by_octave() -> None:
    """Two optimizers with the same errors at the same losses differ by 0, wherever each has most of its runs."""
    draws = np.random.default_rng(0)
    panels = {}
    for name, exponents in (("Adam", (-3, -1)), ("AdamW", (-1, -3)), ("SGD", (-3, -1)), ("SGDW", (-1, -3))):
        places = np.where(draws.random((10, 10, 3)) < 0.8, *exponents)
        offset = -8.0 if name == "AdamW" else 0.0
        panels[name] = claims.Panel(FULL.grids[0], np.where(places == -3, 60.0, 90.0) + offset, 1.5 * 2.0**places)
    by_name = {claim.optimizers: claim for claim in claims.equal_losses("plain", panels)}
    assert claims.loss_bins(panels["Adam"], panels["AdamW"]) == [-3, -1]
    assert by_name["SGDW - SGD"].value == 0
    assert by_name["SGDW - SGD"].verdict == "not shown"
    assert by_name["AdamW - Adam"].value == -8 * claims.PERCENT
    assert by_name["AdamW - Adam"].verdict == "shown"


def test_last_restarts_weights_stay_until_the_next_cycle_ends() -> None:
    """Cycles of 1, 2 and 4 epochs; the first has no snapshot before it."""
    plan = dataclasses.replace(FULL, first_cycle=1, curve_epochs=7)
    assert plan.cycle_ends() == [1, 3, 7]
    assert FULL.cycle_ends() == [10, 30, 70, 150]
    wrong = np.array([[9.0, 8, 7, 6, 5, 4, 3], [19.0, 18, 17, 16, 15, 14, 13]])
    kept = [[9.0, 9, 7, 7, 7, 7, 3], [19.0, 19, 17, 17, 17, 17, 13]]
    assert claims.snapshots(wrong, plan.cycle_ends()).tolist() == kept
