"""Launch tables of models that no machine here holds, and the simulation that is made of measured rows."""

import math
import tracemalloc
from pathlib import Path

import pytest

from bench import rows, scale_model
from bench.scale_model import MODELS, build_table, shard_numels

LIMIT = 100_000_000  # bytes


@pytest.mark.slow
def test_table_of_a_hundred_thousand_tensors() -> None:
    """1e12 elements in 100,000 tensors: built for real, all memory of it counted while it is built."""
    tracemalloc.start()
    built = build_table([10_000_000] * 100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert built.bytes < LIMIT and peak < LIMIT
    assert built.chunks <= 2 * (1 << 20)


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.7), ("70b", 70.6), ("405b", 405.9), ("1t", 1026.0)])
def test_models_have_the_parameters_they_are_named_for(name: str, billions: float) -> None:
    """Within one per cent of the published counts; of the mixture, of what its sizes say."""
    count = sum(math.prod(shape) for shape in MODELS[name].shapes())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_shards_are_those_of_the_first_rank() -> None:
    """Rows as torch.chunk deals them: the first rank has one more where they do not divide."""
    assert shard_numels(iter([(10, 3), (7,), (1, 8)]), 4) == [9, 2, 8]


def row_of(row_type: type, **values: object) -> dict[str, object]:
    """A row with these values, 0 or nothing elsewhere."""
    return dict.fromkeys(rows.columns(row_type), 0) | values


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> scale_model.Measured:
    """Rows of a machine that does not exist, whose figures are easy to follow."""
    fused = dict(
        contender="torch_fused", param_format="native", kept_bytes_per_param=6, moved_bytes_per_param=14, gb_s=50
    )
    ours = dict(contender="ours_cpu", param_format="split24", kept_bytes_per_param=5.125, moved_bytes_per_param=12.25)
    host = dict(mode="python", grads="moved", kind="dtensor")
    found = {
        rows.FormatRow: [
            row_of(rows.FormatRow, case="one_16mi", dtype="bfloat16", moment_format="bfloat16", **fused),
            row_of(rows.FormatRow, case="one_16mi", dtype="bfloat16", moment_format="8bit", gb_s=25, **ours),
            row_of(
                rows.FormatRow, case="one_128ki", dtype="bfloat16", moment_format="8bit", gb_s=1, **ours
            ),  # not this
        ],
        rows.HostRow: [
            row_of(rows.HostRow, contender="ours_cpu", ns_per_tensor=500, fixed_us=20, **host),
            row_of(rows.HostRow, contender="torch_fused", ns_per_tensor=30_000, fixed_us=100, **host),
        ],
        rows.RoofRow: [row_of(rows.RoofRow, is_roof=1, peak_gb_s=100.0)],
    }
    monkeypatch.setattr(rows, "read", lambda folder, row_type: found[row_type])
    return scale_model.Measured(Path("nowhere"))


def test_figures_follow_from_the_rows(measured: scale_model.Measured) -> None:
    """Shares of the measured roof carry over to the bandwidth asked for; the step is the larger of host and device."""
    (line,) = scale_model.lines(measured, MODELS["7b"], 8, ["split24/8bit"], 1000.0)
    cells = dict(zip(scale_model.HEADER[:11], line[:11], strict=True))
    elements = sum(shard_numels(MODELS["7b"].shapes(), 8))
    assert float(cells["elements/rank"]) == pytest.approx(elements, rel=1e-3)
    assert float(cells["GiB/rank"]) == pytest.approx(elements * 7.125 / 2**30, abs=0.01)
    assert cells["host us"] == "166"  # 291 tensors
    assert float(cells["device s"]) == pytest.approx(elements * 12.25 / 250e9, abs=1e-4)
    assert cells["step s"] == cells["device s"]
    gib, host, device, step = line[11:]
    assert float(gib) == pytest.approx(elements * 8 / 2**30, abs=0.01)
    assert host == "8,830"
    assert float(device) == float(step) == pytest.approx(elements * 14 / 500e9, abs=1e-4)


def test_missing_rows_leave_gaps(measured: scale_model.Measured) -> None:
    """A format that was never measured has no figures; nothing is made up."""
    (line,) = scale_model.lines(measured, MODELS["7b"], 8, ["stochastic/8bit"], 1000.0)
    cells = dict(zip(scale_model.HEADER[:11], line[:11], strict=True))
    assert (cells["GiB/rank"], cells["device s"], cells["step s"]) == ("", "", "")


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--bandwidth", "-1"], ["--format", "split24"]], ids=str)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are named."""
    with pytest.raises(SystemExit):
        scale_model.main(arguments)
    assert arguments[0] in capsys.readouterr().err
