"""examples/trainers: each learns, and resumed from its checkpoint it ends with the same bits as without the stop.

The examples of one process run here, as `main` does for the command line; torchrun starts those of several.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pairs import assert_same_bits, bits

from adamw_kernels import FusedAdamW

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "trainers"
STEPS = 20  # saved after 10

# Without knowledge a byte costs ln(256) = 5.55 nats; twenty steps learn the text's most frequent ones.
FIRST_LOSS, LAST_LOSS = 5.0, 4.5
LIMIT_S = 120  # of two ranks from start to end; they take ten seconds

ALONE = {
    "hf_trainer": "checkpoint-20",
    "accelerate_loop": "step-000020",
    "lightning_module": "step=000020.ckpt",
    "lora": "step-000020.pt",
}
TOGETHER = {"fsdp2_loop": "step-000020", "ddp_loop": "step-000020.pt"}


# What the trainers say of themselves and of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage twice a run: most of its time, if it walks through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An example as a module, on a text so short that both halves of a run see several epochs; no process-wide state.

    One thread: so small a model mostly waits for others, and long if the machine is busy.
    """
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "rows_of_text", functools.partial(module.rows_of_text, count=48))
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    logger.setLevel(level)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in (request.param, "little_gpt"):
        sys.modules.pop(name, None)


def outcome(name: str, result: Any) -> tuple[FusedAdamW, list[float]]:
    """The optimizer itself and the losses, of what an example's `main` returned."""
    if name == "hf_trainer":
        return result.optimizer.optimizer, [row["loss"] for row in result.state.log_history if "loss" in row]
    if name == "lightning_module":
        return result.trainer.optimizers[0], result.losses
    optimizer, losses = result
    return optimizer, losses


@pytest.mark.parametrize("example", ALONE, indirect=True)
def test_learns_and_resumes_with_the_same_bits(example: ModuleType, tmp_path: Path) -> None:
    """Without its last checkpoint, and started anew, a run ends with the bits that it had: losses, weights, state."""
    name = example.__name__
    arguments = ["--steps", f"{STEPS}", "--out", f"{tmp_path}", *(["--layers", "4"] if name == "lora" else [])]
    straight, losses = outcome(name, example.main(arguments))
    assert losses[0] > FIRST_LOSS and sum(losses[-5:]) / 5 < LAST_LOSS
    last = tmp_path / ALONE[name]
    last.rename(tmp_path / "aside")

    resumed, rest = outcome(name, example.main([*arguments, "--resume"]))
    assert last.exists(), "it went on from the checkpoint before and wrote this one again"
    assert len(losses) // 2 <= len(rest) and rest == losses[-len(rest) :]
    assert_same_bits(resumed, straight)
    assert {int(state["step"]) for state in resumed.state.values()} == {STEPS}
    assert resumed.state_dict()["param_groups"] == straight.state_dict()["param_groups"]


@pytest.mark.parametrize("example", ["hf_trainer"], indirect=True)
@pytest.mark.parametrize("formats", [("stochastic", "bfloat16"), ("split32", "float32")])
def test_hf_trainer_in_other_formats(example: ModuleType, tmp_path: Path, formats: tuple[str, str]) -> None:
    """The same through `--formats`; the default is "split24" and "8bit"."""
    arguments = ["--steps", "8", "--out", f"{tmp_path}", "--formats", *formats]
    straight, _ = outcome("hf_trainer", example.main(arguments))
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed, _ = outcome("hf_trainer", example.main([*arguments, "--resume"]))
    assert_same_bits(resumed, straight)
    used = {tuple(found) for found in resumed.formats().values()}
    assert used == {formats}


@pytest.mark.parametrize("example", [name for name in ALONE if name != "hf_trainer"], indirect=True)
def test_nothing_to_resume_from(example: ModuleType, tmp_path: Path) -> None:
    """An error that says so, and what to do."""
    with pytest.raises(SystemExit, match=re.escape(f"no checkpoint in {tmp_path}")):
        example.main(["--steps", "2", "--out", f"{tmp_path}", "--resume"])


# --- several processes ------------------------------------------------------------------------------------------------


def torchrun(name: str, *arguments: str) -> dict[int, float]:
    """The losses that two ranks of an example printed, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # on a port that is free
    ranks = subprocess.Popen(
        [*command, *rendezvous, str(EXAMPLES / f"{name}.py"), *arguments],
        env={"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = ranks.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        ranks.terminate()  # torchrun then ends its ranks
        pytest.fail(f"the ranks took more than {LIMIT_S} s:\n{ranks.communicate(timeout=LIMIT_S)[0]}")
    assert ranks.returncode == 0, said
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries and lists, named."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{where}.{key}")
    else:
        yield where, value


def read(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint in one file, or in DCP's folder."""
    if checkpoint.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        file = checkpoint.with_suffix(".whole")
        dcp_to_torch_save(checkpoint, file)
        checkpoint = file
    return dict(leaves(torch.load(checkpoint, weights_only=True)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", TOGETHER)
def test_ranks_learn_and_resume_with_the_same_bits(tmp_path: Path, name: str) -> None:
    """The checkpoint at the end, of two ranks that went on from the one halfway, is that of a run without the stop."""
    arguments, last = ["--steps", f"{STEPS}", "--out", f"{tmp_path}"], tmp_path / TOGETHER[name]
    losses = torchrun(name, *arguments)
    assert list(losses) == [1, 11, 20]
    assert losses[1] > FIRST_LOSS and losses[20] < LAST_LOSS
    last.rename(tmp_path / "aside")
    assert torchrun(name, *arguments, "--resume") == {step: losses[step] for step in (11, 20)}

    expected, got = read(tmp_path / "aside"), read(last)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == got[key].dtype and torch.equal(bits(value), bits(got[key])), key
        else:
            assert value == got[key], key
    dtypes = {value.dtype for value in expected.values() if isinstance(value, torch.Tensor)}
    assert (torch.int8 in dtypes) == (name == "fsdp2_loop"), "24 bits of bfloat16 weights"
