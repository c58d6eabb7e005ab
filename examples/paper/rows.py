"""The rows: one a finished run, appended when it ends, found again by its settings."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.paper.settings import Setting

GRID_FILE, CURVE_FILE = "grid.csv", "curves.csv"


class RowsError(RuntimeError):
    """Rows are missing, or of another schema."""


@dataclass(frozen=True)
class Result:
    """What one run ended with.

    Attributes:
        train_loss: Cross-entropy on the training images, nats, without any penalty, as a test would evaluate it.
        test_loss: The same on the test images.
        test_wrong: How many of the test images are classified wrongly.
        epoch_wrong: `test_wrong` after each epoch, separated by spaces; empty where only the end was asked for.
        seconds: How long the run took.
        torch: Version of torch.
        package: Version of adamw_kernels.
    """

    train_loss: float
    test_loss: float
    test_wrong: int
    epoch_wrong: str
    seconds: float
    torch: str
    package: str

    def curve(self) -> list[int]:
        """`test_wrong` after each epoch."""
        return [int(wrong) for wrong in self.epoch_wrong.split()]


SETTING_COLUMNS = [field.name for field in dataclasses.fields(Setting)]
COLUMNS = [*SETTING_COLUMNS, *(field.name for field in dataclasses.fields(Result))]
KINDS = {field.name: str(field.type) for part in (Setting, Result) for field in dataclasses.fields(part)}
PARSE = {"str": str, "int": int, "float": float}


def read(path: Path) -> dict[Setting, Result]:
    """The finished runs; none if there is no file.

    Raises:
        RowsError: The file has other columns.
    """
    if not path.exists():
        return {}
    found = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise RowsError(
                f"{path} has the columns {reader.fieldnames}, expected {COLUMNS}. Move the file aside and run again: "
                "rows of two schemas are never mixed in one file."
            )
        for row in reader:
            values = {name: PARSE[KINDS[name]](text) for name, text in row.items()}
            setting = Setting(**{name: values.pop(name) for name in SETTING_COLUMNS})
            found[setting] = Result(**values)
    return found


def finished(path: Path, settings: Iterable[Setting]) -> dict[Setting, Result]:
    """The rows of these settings, in their order, and no others that the file may hold.

    Raises:
        RowsError: Some are missing.
    """
    found = read(path)
    wanted = list(settings)
    missing = [setting for setting in wanted if setting not in found]
    if missing:
        raise RowsError(
            f"{path} lacks {len(missing)} of {len(wanted)} runs, the first is {missing[0]}. Train them with "
            "`python -m examples.paper run` (it goes on where it stopped)."
        )
    return {setting: found[setting] for setting in wanted}


def append(path: Path, setting: Setting, result: Result) -> None:
    """Add one row, in one write; a header first if the file is new."""
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        file.write(("" if not is_new else spell(COLUMNS)) + spell([*exact(setting), *rounded(result)]))


def drop_torn_row(path: Path) -> None:
    """Remove a last row without its end, which a power cut leaves."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)


def exact(setting: Setting) -> list[str]:
    """The values as text, to the last bit: a run is found again by them."""
    return [repr(value) if isinstance(value, float) else str(value) for value in dataclasses.astuple(setting)]


def rounded(result: Result) -> list[str]:
    """The values as text: losses to six digits."""
    return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in dataclasses.astuple(result)]


def spell(cells: list[str]) -> str:
    """One line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
