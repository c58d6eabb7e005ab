"""The benchmark suite itself: what is stepped, what is left out and why, what a report says. Nothing is timed."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402  # a neighbour of the tests, not an installed package
    bits,
    check,
    contenders,
    gpu_report,
    host,
    inputs,
    kernels,
    machine,
    plot_formats,
    plot_sizes,
    profile,
    report,
    rotation,
    rows,
    throughput,
)
from bench.cases import Case, Group, cases  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders name their backend; a forced one would be refused."""
    monkeypatch.delenv("ADAMW_KERNELS_BACKEND", raising=False)


@pytest.fixture(scope="module")
def environment() -> machine.Environment:
    """Of this machine."""
    return machine.environment(CPU)


# --- what is stepped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("one_2p20", 1, 2**20),
        ("one_2p32", 1, 2**32),
        ("gpt2_small", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("llama3_8b", 291, 8_030_261_248),
        ("llama3_8b_of_8", 291, 8_030_261_248 // 8),
        ("moe_10000", 10_000, 52 * 64 * 3 * 256 * 32 + 16 * 256),
        ("lora_1000", 1_000, 4_096_000),
        ("groups_465", 465, 929_119),
    ],
)
def test_cases_are_their_models(name: str, tensors: int, numel: int) -> None:
    """As many tensors and elements as published."""
    assert (len(cases()[name].shapes), cases()[name].numel) == (tensors, numel)


def test_most_rows_of_an_embedding_have_no_gradient() -> None:
    """Of the case's share, the rest of the rows is zero throughout."""
    small = replace(cases()["embedding"], groups=(Group(((20_000, 4),)),))
    (grad,) = inputs.draw(small, CPU, torch.float32).grads
    hit = (grad != 0).any(dim=1)
    assert bool(((grad != 0) == hit[:, None]).all())
    assert hit.float().mean().item() == pytest.approx(4096 / 50257, rel=0.1)


def test_copies_exceed_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as twice the cache takes, one where one is enough."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 32 << 20)
    assert rotation.copies_of(1 << 20, 16, CPU) == 4
    assert rotation.copies_of(1 << 22, 16, CPU) == 1
    assert rotation.copies_of(16, 16, CPU) == rotation.MAX_COPIES


def test_copies_take_turns() -> None:
    """Every copy is stepped once a round, on tensors of its own."""
    case = Case("small", "small", (Group(((64,),)),), exceeds_caches=True)
    masters = inputs.draw(case, CPU, torch.float32)
    build = contenders.CONTENDERS["torch_fused"].build
    made = [build(masters.clone_groups())]

    def remembered(groups: contenders.ParamGroups) -> torch.optim.Optimizer:
        made.append(build(groups))
        return made[-1]

    step = rotation.take_turns(made[0], remembered, masters, 3)
    for _ in range(6):
        step()
    steps = [int(next(iter(optimizer.state.values()))["step"]) for optimizer in made]
    assert steps == [2, 3, 3]  # copies are warm before their first turn
    assert len({optimizer.param_groups[0]["params"][0].data_ptr() for optimizer in made}) == 3


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the baseline get memory first; every other one has a row with its reason."""
    case = Case("small", "small", (Group(((1 << 20,),)),), exceeds_caches=False)
    running = [contenders.CONTENDERS[name] for name in ("torch_foreach", "torch_fused", "ours_cpu")]
    monkeypatch.setattr(machine, "available_bytes", lambda device: throughput.SPARE_BYTES + (24 + 36 << 20))
    chosen, skipped = throughput.fitting(case, CPU, torch.float32, running)
    assert [contender.name for contender in chosen] == ["torch_fused", "ours_cpu"]
    assert [(row.contender, row.case) for row in skipped] == [("torch_foreach", "small")]
    assert skipped[0].reason == "needs about 0.0 GB beside the others; 0.0 of 2.2 GB are left"
    monkeypatch.setattr(machine, "available_bytes", lambda device: 0)
    chosen, skipped = throughput.fitting(case, CPU, torch.float32, running)
    assert not chosen and len(skipped) == 3


# --- who is measured --------------------------------------------------------------------------------------------------


def test_every_peer_is_listed_with_its_reason() -> None:
    """None is missing, and none is left out without a word."""
    named = {"apex", "transformer_engine", "deepspeed", "deepspeed_cpu", "bitsandbytes_8bit", "torchao_8bit", "optimi"}
    assert named | {"flashoptim", "torch_fused", "torch_foreach"} <= contenders.CONTENDERS.keys()
    missing = replace(contenders.CONTENDERS["optimi"], build=contenders.peer("no_such_module_anywhere", "AdamW"))
    assert missing.unavailable(CPU, torch.float32) == ("ModuleNotFoundError: No module named 'no_such_module_anywhere'")
    assert contenders.CONTENDERS["apex"].unavailable(CPU, torch.float32) == "runs on cuda, not on cpu"


def test_an_optimizer_that_does_nothing_is_not_measured() -> None:
    """It is tried, and its weights looked at."""
    lazy = replace(
        contenders.CONTENDERS["torch_fused"],
        build=lambda groups: torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.0),
    )
    assert lazy.unavailable(CPU, torch.float32) == "step() changed nothing"


def test_an_optimizer_that_is_not_adamw_is_not_timed() -> None:
    """The host's bench compares weights with float64 AdamW after the warm-up."""
    with host.wrapper("tensor", CPU) as wrap:
        right = host.build(contenders.CONTENDERS["torch_fused"], "tensor", wrap, 3, "same", CPU)
        adam = replace(contenders.CONTENDERS["torch_fused"], build=lambda groups: torch.optim.SGD(groups, lr=1e-3))
        wrong = host.build(adam, "tensor", wrap, 3, "same", CPU)
    assert host.check_weights(right) is None
    assert "off float64 AdamW's" in str(host.check_weights(wrong))


def test_tolerances_of_coarse_peers_keep_the_weights_rounding() -> None:
    """Only the update may be coarser."""
    usual = check.TOLERANCES[torch.bfloat16]
    assert check.tolerance_of(torch.bfloat16, None) == usual
    assert check.tolerance_of(torch.bfloat16, 4.0) == check.Tolerance(usual.rounding, 4.0)


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_isas_store_the_same_bits() -> None:
    """The comparison of `bench bits`, with every ISA of this CPU."""
    found = list(bits.measure(CPU, bits.SMALL_VARIANTS, bits.SMALL_SHAPES))
    assert len(found) % len(bits.SMALL_VARIANTS) == 0
    assert not [row for row in found if row.differing]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_another_bit_is_counted(dtype: torch.dtype) -> None:
    """One element in one tensor of several; a missing tensor or another dtype counts as a whole."""
    wanted = [torch.zeros(5, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.empty(0, dtype=dtype)]
    found = [tensor.clone() for tensor in wanted]
    assert bits.differing(wanted, found) == 0
    found[1][1, 2] = 2
    assert bits.differing(wanted, found) == 1
    assert bits.differing(wanted, found[:2]) == 11
    assert bits.differing(wanted, [*found[:2], found[2].double()]) == 2


# --- the report -------------------------------------------------------------------------------------------------------


def throughput_row(case: str, contender: str, dtype: str, median_us: float) -> rows.ThroughputRow:
    """A row as `bench throughput` writes it."""
    numel = cases()[case].numel
    gb_s = 28.0 * numel / median_us / 1e3
    roof = 100.0 if cases()[case].exceeds_caches else None
    return rows.ThroughputRow(
        case=case, tensors=len(cases()[case].shapes), groups=1, params=numel, dtype=dtype, contender=contender,
        state_dtype="float32", bytes_per_param=28.0, rounds=11, steps_per_sample=1, copies=1, median_us=median_us,
        p20_us=0.9 * median_us, p80_us=1.1 * median_us, wall_us=median_us, gb_s=gb_s,
        roof_kernel="copy" if roof else "", roof_gb_s=roof, pct_roof=gb_s if roof else None,
        speedup=1000.0 / median_us, speedup_p20=900.0 / median_us, speedup_p80=1100.0 / median_us, checked_steps=3,
        check_error=0.1, other_cores=0.0, clock_mhz=None, memory_mhz=None,
    )  # fmt: skip


def written(folder: Path, environment: machine.Environment) -> str:
    """The report of a folder with a few rows of several kinds."""
    taken: list[rows.Row] = [
        throughput_row(case, contender, "float32", time)
        for case in ("one_2p20", "one_large", "count_1", "count_100", "gpt2_small")
        for contender, time in (("ours_cpu", 500.0), ("torch_fused", 1000.0), ("deepspeed_cpu", 400.0))
    ]
    taken += [
        rows.SkippedRow("throughput", "one_2p32", "float32", "torch_foreach", "needs about 69 GB | and more"),
        rows.PeerRow("apex", "float32", "apex", "", 0, "No module named 'apex'"),
        rows.StageRow("build", "passed", 61.0, 120.0, "done"),
        rows.StageRow("tests", "out of time", 150.0, 150.0, "12 passed so far"),
        rows.BitsRow("triton", "cpu avx512", "float32", "float32", "native", "float32", "", 8, 1000, 3, 0),
    ]
    rows.append(folder, environment, taken)
    return report.assemble(folder)


def test_report_is_assembled_from_rows(tmp_path: Path, environment: machine.Environment) -> None:
    """Every part that has rows has a table; the others say that they have none."""
    text = written(tmp_path, environment)
    assert environment.device in text and environment.torch in text
    assert "| tests | out of time | 150 of 150 s | 12 passed so far |" in text
    assert "| apex FusedAdam | float32 | apex (not installed) | no | No module named 'apex' |" in text
    assert "needs about 69 GB \\| and more" in text
    assert "no bit differs" in text
    (host_part,) = (part for part in text.split("\n## ") if part.startswith("The host's share"))
    assert "No rows." in host_part


def test_report_says_where_we_lose(tmp_path: Path, environment: machine.Environment) -> None:
    """Whoever is faster in the same run, by how much; nobody who is slower."""
    (part,) = (part for part in written(tmp_path, environment).split("\n## ") if part.startswith("Where we lose"))
    assert "| gpt2_small | float32 | adamw_kernels | DeepSpeedCPUAdam | 1.25× | 28 against 28 |" in part
    assert "fused" not in part


def test_report_without_rows(tmp_path: Path) -> None:
    """An empty folder has a report, too."""
    assert "There are no rows in this folder." in report.assemble(tmp_path)


def test_differing_bits_are_in_the_report(tmp_path: Path, environment: machine.Environment) -> None:
    """By name and number."""
    row = rows.BitsRow("cuda", "cpu avx512", "bfloat16", "bfloat16", "split24", "8bit", "", 8, 1000, 3, 7)
    rows.append(tmp_path, environment, [row])
    assert "1 differ" in report.assemble(tmp_path) and "| cuda | bfloat16 |" in report.assemble(tmp_path)


def test_figures_are_drawn_from_rows(tmp_path: Path, environment: machine.Environment) -> None:
    """Roofline and counts where there are two sizes; nothing where there are none."""
    pytest.importorskip("matplotlib")
    empty = tmp_path / "empty"
    assert plot_sizes.draw_roofline(empty) is plot_sizes.draw_counts(empty) is plot_formats.draw(empty) is None
    written(tmp_path, environment)
    for draw in (plot_sizes.draw_roofline, plot_sizes.draw_counts):
        path = draw(tmp_path)
        assert path is not None and path.stat().st_size > 10_000
        assert f"]({path.name})" in report.assemble(tmp_path)


def test_rows_come_back_as_written(tmp_path: Path, environment: machine.Environment) -> None:
    """Of every kind of this suite, also what has never been measured here."""
    samples: list[rows.Row] = [
        rows.KernelRow(
            "one_large", "float32", "ours_cuda", "update_kernel<float, float>", 1.0, 12.5, "ncu", "a=1 b=2%"
        ),
        rows.HotPathRow("tensors", "step", 1.0, 2.0, "opcodes", ""),
        rows.ProfileRow("same", 200, 1, "f", "_C", 10.0, 5.0),
    ]
    rows.append(tmp_path, environment, samples)
    for sample in samples:
        (record,) = rows.read(tmp_path, type(sample))
        assert {key: record[key] for key in vars(sample)} == vars(sample)


# --- make gpu-report --------------------------------------------------------------------------------------------------

PYTHON = sys.executable


def stage(name: str, code: str, limit_s: float = 30.0) -> gpu_report.Stage:
    """A stage that runs a few lines of Python."""
    return gpu_report.Stage(name, limit_s, ((PYTHON, "-c", code),))


def alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_out_of_time_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """And what it had said is kept."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import subprocess, sys, time\nprint('began', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    )
    row = gpu_report.run(stage("endless", code, 6.0), 100.0)
    assert (row.outcome, row.detail) == ("out of time", "began")
    deadline = time.monotonic() + 20
    while alive(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(note.read_text()))


def test_failures_do_not_stop_the_others(tmp_path: Path, environment: machine.Environment) -> None:
    """A row each: failed, passed, not run with its reason; the last stage runs whatever came before."""
    mark = tmp_path / "last ran"
    stages = [
        stage("breaks", "print('the reason'); raise SystemExit(3)"),
        stage("works", "print('fine')"),
        gpu_report.Stage("cannot", 10.0, ((PYTHON, "-c", "pass"),), "not on PATH: nvcc"),
        gpu_report.Stage("absent", 10.0, (("/no/such/program",),)),
    ]
    last = stage("report", f"open({str(mark)!r}, 'w')")
    assert gpu_report.report(stages, last, environment, tmp_path, 200.0) == 1
    found = {row["stage"]: (row["outcome"], row["detail"]) for row in rows.read(tmp_path, rows.StageRow)}
    assert found["breaks"] == ("failed", "the reason")
    assert found["works"] == ("passed", "fine")
    assert found["cannot"] == ("not run", "not on PATH: nvcc")
    assert found["absent"][0] == "failed" and "/no/such/program" in found["absent"][1]
    assert mark.exists()


def test_nothing_begins_when_the_budget_is_spent(tmp_path: Path, environment: machine.Environment) -> None:
    """But the report does."""
    mark = tmp_path / "last ran"
    stages = [stage("late", "pass")]
    gpu_report.report(stages, stage("report", f"open({str(mark)!r}, 'w')"), environment, tmp_path, 1.0)
    (row,) = rows.read(tmp_path, rows.StageRow)
    assert (row["outcome"], row["detail"]) == ("not run", "there was no time left")
    assert mark.exists()


def test_every_stage_is_bounded_and_names_real_commands(tmp_path: Path) -> None:
    """All tests run once, in one of two stages; cases and commands exist."""
    listed = gpu_report.stages(CPU, tmp_path, 1.0)
    assert all(0 < one.limit_s <= 150 for one in listed)
    tests = [word for one in listed for command in one.commands for word in command if word.startswith("tests/test_")]
    assert sorted(tests) == sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py"))
    from bench.__main__ import parser

    for one in (*listed, gpu_report.last_stage(CPU, tmp_path)):
        for command in one.commands:
            if command[1:3] == ("-m", "bench"):
                assert parser().parse_args(command[3:]).command
    assert set(gpu_report.THROUGHPUT_CASES) <= cases().keys()
    assert gpu_report.BUDGET_S + gpu_report.GRACE_S < 9 * 60


def test_pytest_summaries() -> None:
    """Of a run that ended, and of one that did not."""
    ended = "FAILED tests/a.py::b - x\n===== 1 failed, 5 passed in 3.1s =====\n"
    assert gpu_report.pytest_summary(ended) == "1 failed, 5 passed in 3.1s; failed: tests/a.py::b"
    cut = "[gw0] [  1%] PASSED tests/a.py::b\n[gw1] [  2%] FAILED tests/a.py::c\ntests/a.py::d \n"
    assert gpu_report.pytest_summary(cut) == "1 passed, 1 failed so far"


def test_dry_run_and_unknown_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """What would run is printed; a stage that does not exist is refused with those that do."""
    assert gpu_report.main(["--device", "cpu", "--dry-run", "--stage", "bits"]) == 0
    printed = capsys.readouterr().out
    assert "-m bench bits" in printed and "-m bench report" in printed and "throughput" not in printed
    with pytest.raises(SystemExit):
        gpu_report.main(["--device", "cpu", "--dry-run", "--stage", "weather"])
    assert "there are build" in capsys.readouterr().err


def test_torchs_own_pybind11_is_found(tmp_path: Path) -> None:
    """Without a network and a pybind11 of its own, CMake finds the headers in torch."""
    import shutil

    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        pytest.skip("configuring needs cmake, which is not on PATH")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DADAMW_KERNELS_CUDA=OFF"]
    command += [f"-DPython_EXECUTABLE={PYTHON}", f"-Dpybind11_DIR={ROOT / 'bench/pybind11_of_torch'}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    compiled = (tmp_path / "compile_commands.json").read_text()
    assert f"-isystem {Path(torch.__file__).parent / 'include'}" in compiled


# --- profilers --------------------------------------------------------------------------------------------------------


def test_counters_of_ncu_are_read() -> None:
    """Units are its second line, digits are grouped, and what it says before the table is skipped."""
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "dram__bytes_read.sum"]
    lines = [["", "", "ns", "Mbyte"], ["0", "update_kernel", "1,234,500", "768.5"]]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in [names, *lines])
    (row,) = kernels.parse(text, "one_large", "float32", "ours_cuda")
    assert (row.kernel, row.counters) == ("update_kernel", "dram_read=768.5Mbyte")
    assert math.isclose(row.median_us, 1234.5)
    assert kernels.parse("==ERROR== ERR_NVGPUCTRPERM", "one_large", "float32", "ours_cuda") == []


def test_there_are_no_gpu_kernels_on_a_cpu() -> None:
    """And that is said."""
    assert kernels.measure(CPU) == ([], ["there are no GPU kernels on cpu"])


def test_names_of_functions_are_plain() -> None:
    """Without arguments, recursion and versions of symbols."""
    assert profile.plain("void (anonymous namespace)::update_chunk<float, float>(Chunk const&)'2") == (
        "void update_chunk<float, float>"
    )
    assert profile.plain("_PyEval_EvalFrameDefault'2") == "_PyEval_EvalFrameDefault"
    assert profile.plain("pthread_getspecific@@GLIBC_2.34") == "pthread_getspecific"


def test_committed_rows_fit_the_schema() -> None:
    """Of every machine."""
    for folder in machine.RESULTS.iterdir():
        rows.check_headers(folder, *rows.ROW_TYPES)
