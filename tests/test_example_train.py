"""examples/train_gpt.py: both optimizers learn, agree at first, and everything is written, also after Ctrl-C."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples need tqdm")
pytest.importorskip("matplotlib", reason="the examples need matplotlib")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# ln(256) = 5.55 nats is knowing nothing; the entropy of single bytes in this text is 3.24, so less than that means the
# model uses what came before. The tiny preset ends near 2.9: there is room for another Python's text.
TINY_FINAL_LOSS = 3.1

# The first loss has seen no optimizer: same weights, same batch, same bits.
# After that FusedAdamW and torch round differently, by about one unit in the last place of a weight a step. Two of
# torch's own implementations (fused and single-tensor) stay within 5e-7 nats over these steps, which is one unit in the
# last place of the loss; so does FusedAdamW. Small mistakes reach, in these ten steps: decay 10 % off 1.5e-4, decay on
# the norms 2.4e-3, beta2 0.951 for 0.95 6.8e-4, beta1 0.901 for 0.9 1.7e-3, eps 1e-7 for 1e-8 2.0e-4. All are caught.
FIRST_STEPS = 10
FIRST_STEPS_TOLERANCE = 1e-5


@pytest.fixture
def train_gpt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module; it imports its neighbour plot_training as a script does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of so small a model mostly wait for each other, and long if the machine is busy
    yield importlib.import_module("train_gpt")
    torch.set_num_threads(threads)
    for name in ("train_gpt", "plot_training"):
        sys.modules.pop(name, None)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a run."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_optimizers_learn_and_agree(train_gpt: ModuleType, tmp_path: Path) -> None:
    """The tiny preset, as `make train` runs it: the losses fall, the first steps agree, the files are there."""
    results = train_gpt.main(["--preset", "tiny", "--device", "cpu", "--seed", "1337", "--out", str(tmp_path)])

    assert list(results) == ["fused", "torch"]
    losses = {}
    for name, result in results.items():
        losses[name] = [row["train_loss"] for row in result["rows"]]
        assert losses[name][0] == pytest.approx(math.log(256), abs=0.5)
        assert result["train_loss"] < TINY_FINAL_LOSS
        assert result["val_loss"] < TINY_FINAL_LOSS
        assert result["state_bytes_per_parameter"] >= 8  # two float32 moments
        assert not result["interrupted"]

        rows = read_csv(tmp_path / f"{name}.csv")
        assert [float(row["train_loss"]) for row in rows] == losses[name]
        assert [int(row["step"]) for row in rows] == list(range(1, result["steps"] + 1))
        assert all(float(row["optimizer_ms"]) > 0 for row in rows)
        assert float(rows[-1]["val_loss"]) == result["val_loss"]

    assert losses["fused"][0] == losses["torch"][0]
    assert losses["fused"][:FIRST_STEPS] == pytest.approx(losses["torch"][:FIRST_STEPS], abs=FIRST_STEPS_TOLERANCE)
    assert (tmp_path / "training.png").read_bytes().startswith(PNG_MAGIC)
    assert set(json.loads((tmp_path / "summary.json").read_text())["runs"]) == {"fused", "torch"}


def test_ctrl_c_writes_what_there_is(
    train_gpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt ends the first run, keeps its steps, skips the second run, and still draws the picture."""

    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "validation_loss", interrupt)  # its first call comes after step 7 of 100
    results = train_gpt.main(["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path)])

    assert list(results) == ["fused"]
    assert results["fused"]["interrupted"]
    assert len(read_csv(tmp_path / "fused.csv")) == results["fused"]["steps"] == 7
    assert (tmp_path / "training.png").read_bytes().startswith(PNG_MAGIC)
    assert "interrupted" in capsys.readouterr().err


def test_gpt2_124m_is_gpt2_small(train_gpt: ModuleType) -> None:
    """The preset has GPT-2 small's parameter list: 148 tensors, 124,439,808 parameters."""
    config = train_gpt.GPTConfig.of(train_gpt.parse_arguments(["--preset", "gpt2-124m", "--device", "cpu"]))
    with torch.device("meta"):
        sizes = [param.numel() for param in train_gpt.GPT(config).parameters()]
    assert len(sizes) == 148
    assert sum(sizes) == 124_439_808


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "65"], "--width is 65, expected a multiple of --heads, which is 2"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--device", "mps"], "--device is mps, expected cpu, cuda or cuda:N"),
    ],
    ids=["width", "steps", "device"],
)
def test_flags_that_cannot_work_are_refused(
    train_gpt: ModuleType, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """The error names the flag, what it was and what was expected."""
    with pytest.raises(SystemExit):
        train_gpt.main(["--preset", "tiny", *flags])
    assert message in capsys.readouterr().err
