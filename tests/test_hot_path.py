"""A warm step does no more work than it did: instructions, opcodes and allocations are counted, nothing is timed.

The bounds, and what was measured when they were set, stand in `bench/hot_path.py`; `python -m bench hotpath` prints the
present figures beside them.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import callgrind, hot_path, instructions, warm_steps  # noqa: E402  # a neighbour, not installed

LIMIT_S = 300


@pytest.fixture(autouse=True)
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths under test are the CPU's, whatever the environment asks for."""
    monkeypatch.delenv("ADAMW_KERNELS_BACKEND", raising=False)


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python_counts() -> dict[tuple[str, str], float]:
    """Opcodes and allocations, counted in a process of their own: a process group is left behind there."""
    code = (
        "from bench import hot_path\n"
        "print({**{('opcodes', *key): value for key, value in hot_path.opcodes().items()},"
        " **{('allocations', *key): value for key, value in hot_path.allocated().items()}})"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ADAMW_KERNELS_", "TRITON_"))}
    paths = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert finished.returncode == 0, finished.stderr
    counts: dict[tuple[str, str], float] = eval(finished.stdout.splitlines()[-1], {"__builtins__": {}})
    return counts


@pytest.mark.parametrize(("name", "per"), hot_path.OPCODES)
def test_opcodes(python_counts: dict[tuple[str, str], float], name: str, per: str) -> None:
    """CPython executes no more opcodes; per plain tensor, none."""
    assert 0 <= python_counts["opcodes", name, per] <= hot_path.OPCODES[name, per].bound


@pytest.mark.parametrize(("name", "per"), hot_path.ALLOCATIONS)
def test_allocations(python_counts: dict[tuple[str, str], float], name: str, per: str) -> None:
    """Nothing is allocated that a step does not need."""
    assert 0 <= python_counts["allocations", name, per] <= hot_path.ALLOCATIONS[name, per].bound


def test_an_opcode_more_per_tensor_would_be_noticed() -> None:
    """A loop over the parameters is counted, however short."""
    step = warm_steps.optimizer([hot_path_tensor() for _ in range(20)])
    params = step.param_groups[0]["params"]
    step.step()
    step.step()

    def looped() -> None:
        for _ in params:
            pass
        step.step()

    assert hot_path.opcodes_of(looped) - hot_path.opcodes_of(step.step) >= len(params)


def hot_path_tensor() -> torch.Tensor:
    """A weight of one element."""
    return torch.full((1,), 0.5)


def test_memory_kept_by_a_step_would_be_noticed() -> None:
    """A list that grows by an object a call is seen."""
    kept: list[object] = []
    assert hot_path.python_blocks_kept(lambda: kept.append(object())) >= 1
    assert hot_path.python_blocks_kept(lambda: None) < 1


# --- native code ------------------------------------------------------------------------------------------------------


@functools.cache
def counted() -> dict[tuple[str, str], float]:
    """All counts of instructions, by one process under callgrind."""
    return hot_path.instructions()


@pytest.mark.parametrize(("name", "per"), hot_path.INSTRUCTIONS)
def test_instructions(name: str, per: str) -> None:
    """A step executes no more instructions."""
    reason = callgrind.why_not()
    if reason is not None:
        pytest.skip(reason)
    found = counted()
    assert 0 < found[name, per] <= hot_path.INSTRUCTIONS[name, per].bound


def test_profiles_are_read() -> None:
    """Inclusive costs of calls are left out, what belongs to one function in several places is summed."""
    text = """
ob=/usr/lib/libone.so.1
fl=one.c
fn=first
0 5
cob=/usr/lib/libtwo.so
cfn=second
calls=2 0
0 70
0 3
ob=/usr/lib/libtwo.so
fn=second
0 70
totals: 78
"""
    profile = callgrind.parse(text.splitlines())
    assert profile.instructions == 78
    assert profile.functions == {("first", "libone.so.1"): 8, ("second", "libtwo.so"): 70}


# --- GPU code ---------------------------------------------------------------------------------------------------------

# Of the plain rule, at most: SASS instructions per element. Measured with CUDA 13.0; sm_90, sm_100.
SASS = {
    ("float", "float", "float", "native"): 54,  # 46.5, 46.75
    ("bf16", "bf16", "float", "split32"): 72,  # 63.1, 60.6
    ("bf16", "bf16", "8bit", "split24"): 220,  # 194.8, 182.4
}


@functools.cache
def sass_rows() -> "list[instructions.InstructionRow]":
    """Of every update in the extension module."""
    return instructions.measure("cuda", "sm_90", "sm_100")


@pytest.mark.parametrize(("param", "grad", "moments", "param_format"), SASS)
def test_sass_instructions(param: str, grad: str, moments: str, param_format: str) -> None:
    """An element takes no more instructions on sm_90 and sm_100."""
    try:
        rows = sass_rows()
    except instructions.UnavailableError as error:
        pytest.skip(str(error))
    found = [
        row
        for row in rows
        if (row.param, row.grad, row.moments, row.param_format) == (param, grad, moments, param_format)
    ]
    assert found
    for row in found:
        assert 0 < row.instructions_per_element <= SASS[param, grad, moments, param_format], row.target
