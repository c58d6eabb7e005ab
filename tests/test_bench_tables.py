"""The READMEs' measurements are those of the committed rows."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import curves, rows, tables  # noqa: E402  # a neighbour of the tests, not an installed package

FOLDER = ROOT / "bench/results/cpu-intel-xeon-processor-2c"  # of the rows that tell of speed


def test_readmes_have_the_rows_figures() -> None:
    """`python -m bench tables` would change nothing."""
    texts = [path.read_text() for path in tables.FILES]
    assert all(sum(f"<!-- rows: {name} -->" in text for text in texts) == 1 for name in tables.TABLES)
    for text in texts:
        assert tables.fill(text, FOLDER) == text


def test_wrong_figures_are_overwritten() -> None:
    """Whatever stands between the marks, and nothing else."""
    text = "before\n<!-- rows: accuracy -->\n| 1 |\n<!-- end of rows -->\nafter\n"
    filled = tables.fill(text, FOLDER)
    assert filled.startswith("before\n<!-- rows: accuracy -->\n| lr, λ, β2 |") and filled.endswith(" -->\nafter\n")
    assert tables.fill(filled, FOLDER) == filled and "| 1 |\n" not in filled


def test_curves_meet_the_acceptance_figure() -> None:
    """The last validation losses of split24 with 8-bit moments, mean of three seeds, are within 0.3 % of float32's."""
    found = rows.latest(tables.read_somewhere(FOLDER, rows.CurveRow), "format", "seed", "step")
    last = [row for row in found if row["step"] == curves.STEPS]
    means = {}
    for name in ("float32/float32", "split24/8bit"):
        losses = {row["seed"]: row["val_loss"] for row in last if row["format"] == name}
        assert sorted(losses) == sorted(curves.SEEDS)
        means[name] = sum(losses.values()) / len(losses)
    assert abs(means["split24/8bit"] / means["float32/float32"] - 1) <= 0.003


def test_unknown_table() -> None:
    """A mark that names no table is an error."""
    with pytest.raises(KeyError, match="weather"):
        tables.fill("<!-- rows: weather -->\n\n<!-- end of rows -->\n", FOLDER)
