"""One Markdown report of a machine's rows and figures, `report.md` beside them: `python -m bench report`.

Assembled from rows alone, so that it can be written anywhere, any time; a part without rows says so and goes on. Rows
are the latest of their kind; the head of the report says which runs and commits they are of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import rows, tables
from bench.cases import cases
from bench.contenders import BASELINE, CONTENDERS
from bench.disturbance import NOTICEABLE_CORES
from bench.machine import COUNTS
from bench.rows import RowType
from bench.tables import Record, milliseconds, speedup, table

FIGURES = ("throughput.png", "roofline.png", "counts.png", "formats.png", "loop.png", "curves.png")


def write(folder: Path) -> Path:
    """Writes the report and returns its path."""
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(assemble(folder))
    return path


def assemble(folder: Path) -> str:
    """The report's text."""
    parts = [f"# {folder.name}", head(folder)]
    for title, part in PARTS.items():
        body = part(folder)
        parts.append(f"## {title}\n\n{body or 'No rows.'}")
    figures = [f"![{name.removesuffix('.png')}]({name})" for name in FIGURES if (folder / name).exists()]
    parts.append("## Figures\n\n" + ("\n\n".join(figures) or "None drawn."))
    return "\n\n".join(parts) + "\n"


def newest(folder: Path, row_type: RowType, *keys: str) -> list[Record]:
    """The latest rows that agree in `keys`."""
    return rows.latest(rows.read(folder, row_type), *keys)


# --- parts ------------------------------------------------------------------------------------------------------------


def head(folder: Path) -> str:
    """Machine, versions, commits, and whether it was quiet."""
    records = [row for row_type in rows.ROW_TYPES for row in rows.read(folder, row_type)]
    if not records:
        return "There are no rows in this folder."
    last = max(records, key=lambda row: row["run"])
    facts = [
        ("device", last["device"]),
        ("cores, threads", f"{last['cores']}, {last['threads']}"),
        (
            "versions",
            ", ".join(f"{name} {last[name]}" for name in ("torch", "triton", "python", "package") if last[name]),
        ),
        ("CUDA, driver", f"{last['cuda']}, {last['driver']}" if last["driver"] else ""),
        ("settings", last["settings"]),
        ("runs", f"{min(row['run'] for row in records)} to {last['run']}"),
        (
            "commits",
            ", ".join(dict.fromkeys(row["commit"] + (" with changes" if row["dirty"] else "") for row in records)),
        ),
    ]
    others = max((row.get("other_cores") or 0.0 for row in records), default=0.0)
    if others > NOTICEABLE_CORES:
        facts.append(("not quiet", f"other processes kept up to {others:.2f} cores busy during some rounds"))
    return table(["", ""], [[name, value] for name, value in facts if value])


def stages(folder: Path) -> str:
    """Those of the last `make gpu-report`."""
    records = rows.read(folder, rows.StageRow)
    last = max((row["run"] for row in records), default="")
    body = [
        [row["stage"], row["outcome"], f"{row['seconds']:.0f} of {row['limit']:.0f} s", cell(row["detail"])]
        for row in records
        if row["run"] == last
    ]
    return table(["stage", "outcome", "time", "detail"], body) if body else ""


def peers(folder: Path) -> str:
    """Who could run, who not and why."""
    body = [
        [title(row["contender"]), row["dtype"], f"{row['distribution']} {row['version'] or '(not installed)'}"]
        + ["yes" if row["available"] else "no", cell(row["reason"])]
        for row in newest(folder, rows.PeerRow, "contender", "dtype")
    ]
    return table(["optimizer", "dtype", "distribution", "measured", "why not"], body) if body else ""


def throughput(folder: Path) -> str:
    """Every contender on every case."""
    records = newest(folder, rows.ThroughputRow, "case", "dtype", "contender")
    body = []
    for case in cases().values():
        for row in (row for row in records if row["case"] == case.name):
            roof = "" if row["pct_roof"] is None else f"{row['pct_roof']:.0f} %"
            time = f"{milliseconds(row['median_us'])} ({milliseconds(row['p20_us'])} to {milliseconds(row['p80_us'])})"
            ratio = speedup(row) if row["speedup"] is not None and row["contender"] != BASELINE else ""
            gb_s = f"{row['gb_s']:.1f}" if roof else ""
            body.append([case.title, row["dtype"], title(row["contender"]), time, gb_s, roof, ratio])
    heads = "case; dtype; optimizer; median (20th to 80th percentile); GB/s; of the roof; over torch fused"
    return table(heads.split("; "), body) if body else ""


def losses(folder: Path) -> str:
    """Cases in which one of ours is slower than somebody else."""
    records = newest(folder, rows.ThroughputRow, "case", "dtype", "contender")
    body = []
    for own in (row for row in records if is_ours(row)):
        for other in records:
            same = (other["case"], other["dtype"], other["run"]) == (own["case"], own["dtype"], own["run"])
            if same and not is_ours(other) and other["median_us"] < own["median_us"]:
                ratio = own["median_us"] / other["median_us"]
                bytes_ = f"{own['bytes_per_param']:.3g} against {other['bytes_per_param']:.3g}"
                body.append(
                    [
                        own["case"],
                        own["dtype"],
                        title(own["contender"]),
                        title(other["contender"]),
                        f"{ratio:.2f}×",
                        bytes_,
                    ]
                )
    if not records:
        return ""
    return table(["case", "dtype", "ours", "is slower than", "by", "bytes a parameter"], body) if body else "None."


def host(folder: Path) -> str:
    """The host's share of a step."""
    records = newest(folder, rows.HostRow, "contender", "kind", "mode", "grads", "tensors")
    body, seen = [], set()
    for row in records:
        key = (row["contender"], row["kind"], row["mode"], row["grads"])
        if key in seen:
            continue
        seen.add(key)
        largest = max((one for one in records if all(one[k] == row[k] for k in ("contender", "kind", "mode", "grads"))),
                      key=lambda one: one["tensors"])  # fmt: skip
        body.append(
            [title(row["contender"]), row["kind"], "real" if row["mode"] == "full" else "stubbed", row["grads"]]
            + [f"{row['ns_per_tensor'] / 1e3:.3f}", f"{row['fixed_us']:.1f}"]
            + [f"{largest['allocations']} / {largest['new_tensors']} for {largest['tensors']}"]
        )
    heads = "optimizer; tensors; kernels; gradients; µs per tensor; µs fixed; buffers / new tensors"
    return table(heads.split("; "), body) if body else ""


def memory(folder: Path) -> str:
    """Peaks of training."""
    body = [
        [
            title(row["contender"]),
            row["gradients"],
            *(f"{row[key]:.0f}" for key in ("peak_mib", "state_mib", "transient_mib")),
        ]
        for row in newest(folder, rows.MemoryRow, "contender", "gradients")
    ]
    return (
        table(["optimizer", "gradients", "peak MiB", "state MiB", "gradients and the rest MiB"], body) if body else ""
    )


def bits(folder: Path) -> str:
    """Whether paths agree."""
    records = newest(folder, rows.BitsRow, "backend", "param", "grad", "param_format", "moment_format", "options")
    if not records:
        return ""
    wrong = [row for row in records if row["differing"]]
    elements = sum(row["elements"] for row in records)
    text = (
        f"{len(records)} comparisons of formats and options, {elements:,} elements, against {records[0]['against']}: "
    )
    if not wrong:
        return text + "no bit differs."
    keys = ("backend", "param", "grad", "param_format", "moment_format", "options", "differing")
    return text + f"{len(wrong)} differ.\n\n" + table(list(keys), [[str(row[key]) for key in keys] for row in wrong])


def kernels(folder: Path) -> str:
    """GPU kernels one by one."""
    body = [
        [row["case"], row["dtype"], title(row["contender"]), f"`{row['kernel'][:60]}`", f"{row['launches']:g}"]
        + [f"{row['median_us']:.1f}", cell(row["counters"] or row["source"])]
        for row in newest(folder, rows.KernelRow, "case", "dtype", "contender", "kernel", "source")
    ]
    return table(["case", "dtype", "optimizer", "kernel", "launches", "µs", "counters"], body) if body else ""


def hot_path(folder: Path) -> str:
    """Counts beside their bounds."""
    body = [
        [row["name"], row["per"], row["tool"], f"{row['count']:.5g}", f"{row['bound']:.5g}"]
        for row in newest(COUNTS, rows.HotPathRow, "tool", "name", "per")
    ]
    return table(["warm step", "per", "counted by", "count", "bound"], body) if body else ""


def skipped(folder: Path) -> str:
    """What was not measured in the last run that asked for it."""
    body = [
        [row["command"], row["case"], row["dtype"], title(row["contender"]), cell(row["reason"])]
        for row in newest(folder, rows.SkippedRow, "command", "case", "dtype", "contender")
    ]
    return table(["command", "case", "dtype", "optimizer", "reason"], body) if body else ""


def of_tables(name: str, row_type: RowType) -> Callable[[Path], str]:
    """A table of README's, where there are rows of it."""
    return lambda folder: tables.TABLES[name](folder) if rows.read(folder, row_type) else ""


PARTS: dict[str, Callable[[Path], str]] = {
    "Stages": stages,
    "Who was measured": peers,
    "A step": throughput,
    "Where we lose": losses,
    "The host's share": host,
    "A training loop's step": of_tables("loop", rows.LoopRow),
    "Storage formats": of_tables("formats", rows.FormatRow),
    "Memory": memory,
    "The same bits": bits,
    "GPU kernels": kernels,
    "Work of a warm step, counted": hot_path,
    "Instructions of a warm step by function": lambda _: of_tables("profile", rows.ProfileRow)(COUNTS),
    "Left out": skipped,
}


def is_ours(row: Record) -> bool:
    """Whether a row is of adamw_kernels."""
    contender = CONTENDERS.get(row["contender"])
    return contender is not None and contender.is_ours


def title(name: str) -> str:
    """How figures call a contender."""
    return CONTENDERS[name].title if name in CONTENDERS else name


def cell(text: str) -> str:
    """Text that fits a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
