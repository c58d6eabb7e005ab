"""Adapters of PEFT: a thousand tiny tensors in one launch, state for them alone, and their life under PEFT's hands."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from pairs import assert_close, assert_same_bits, bits, copies, params_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adamw_kernels import FusedAdamW

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # PEFT's use of transformers

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage twice a run: most of its time, if it walks through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of accelerate's process-wide state is left, nothing is asked of a network, one thread is enough."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_model(layers: int = 2, rank: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A small Llama with adapters on all of its linear layers, 14 tensors a layer; the same for the same arguments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).to(dtype), lora, **options)


def adapters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What PEFT lets train."""
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: torch.nn.Module, step: int) -> float:
    """Gradients of the batch of a step; the loss."""
    rows = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step % 2))
    model.zero_grad()
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return loss.item()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state but the step counts."""
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for key, value in state.items() if key != "step")


def test_a_thousand_tiny_tensors_in_one_launch() -> None:
    """One batch, one plan for all steps; the bits are those of tensors stepped by themselves, a sample of them."""
    model = make_model(layers=72)
    tensors = adapters(model)
    assert len(tensors) == 1008 and max(p.numel() for p in tensors) < 4096
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    sample = tensors[::9]
    alone, theirs = copies(sample), copies(tensors)
    each = [FusedAdamW([p], **HYPER) for p in alone]
    torchs = torch.optim.AdamW(theirs, **HYPER)
    plans = []
    for step in range(2):
        backward(model, step)
        for own, others in ((sample, alone), (tensors, theirs)):
            for p, q in zip(own, others, strict=True):
                q.grad = p.grad.clone()
        for one in (optimizer, *each, torchs):
            one.step()
        plans.append(optimizer._internals.stepper.plan)
    (table,) = plans[0].tables
    assert len(table.batches) == 1
    assert plans[1] is plans[0]
    for i, (p, q) in enumerate(zip(sample, alone, strict=True)):
        assert torch.equal(bits(p), bits(q)), f"adapter {9 * i}"
    for i, (p, q) in enumerate(zip(tensors, theirs, strict=True)):
        assert_close(p, q, "float32_against_torch", f"adapter {i}")


def test_only_adapters_have_state() -> None:
    """Given all parameters, as many scripts do: the frozen ones get no state and keep their bits; the loss falls."""
    model = make_model()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = copies(frozen)
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    losses = []
    for step in range(12):
        losses.append(backward(model, step))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[1]  # both of the second batch
    assert set(optimizer.state) == set(adapters(model))
    for p, q in zip(frozen, before, strict=True):
        assert torch.equal(bits(p), bits(q))
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 28 and len(saved["param_groups"][0]["params"]) == 28 + len(frozen)


@pytest.mark.parametrize(
    ("options", "bfloat16", "per_parameter"),
    [
        ({}, False, 8),
        ({"moment_format": "8bit"}, False, 8),  # all are too small for codes
        ({"moment_format": "bfloat16"}, False, 4),
        ({}, True, 10),  # split32
        ({"param_format": "split24", "moment_format": "bfloat16"}, True, 5),
        ({"param_format": "stochastic", "moment_format": "bfloat16"}, True, 4),
    ],
)
def test_memory_of_the_state(options: dict[str, str], bfloat16: bool, per_parameter: int) -> None:
    """That of the adapters' parameters, to the byte; PEFT makes adapters float32 unless it is told not to."""
    model = make_model(dtype=torch.bfloat16, autocast_adapter_dtype=not bfloat16)
    optimizer = FusedAdamW(model.parameters(), **HYPER, **options)
    backward(model, 0)
    optimizer.step()
    trained = sum(p.numel() for p in adapters(model))
    assert trained < 0.25 * sum(p.numel() for p in model.parameters())
    assert state_bytes(optimizer) == per_parameter * trained


def test_codes_for_large_adapters_only() -> None:
    """Adapters of 4,096 elements and more take codes under "8bit", the others float32 moments: two batches."""
    model = make_model(rank=64)
    optimizer = FusedAdamW(model.parameters(), moment_format="8bit", **HYPER)
    backward(model, 0)
    optimizer.step()
    for p in adapters(model):
        assert ("exp_avg" in optimizer.state[p]) == (p.numel() < 4096), p.shape
    assert {p.numel() < 4096 for p in adapters(model)} == {True, False}
    (table,) = optimizer._internals.stepper.plan.tables
    assert len(table.batches) == 2


def test_another_adapter_in_the_middle() -> None:
    """`set_adapter` freezes one adapter and lets another train: neither moves while it is not the active one."""
    model = make_model()
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    named = {name: [p for key, p in model.named_parameters() if f".{name}." in key] for name in ("default", "second")}
    optimizer = FusedAdamW([*named["default"], *named["second"]], **HYPER)
    steps = dict.fromkeys(named, 0)
    for active, other in (("default", "second"), ("second", "default"), ("default", "second")):
        model.set_adapter(active)
        before = copies(named[other])
        for step in range(2):
            backward(model, step)
            optimizer.step()
            steps[active] += 1
        assert all(p.grad is None for p in named[other])
        for p, q in zip(named[other], before, strict=True):
            assert torch.equal(bits(p), bits(q))
        for name, params in named.items():
            assert {int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params} == {steps[name]}


@pytest.mark.parametrize("options", [{}, {"moment_format": "bfloat16", "ema_decay": 0.9, "max_grad_norm": 0.1}])
def test_trainer_resumes_adapters_with_the_same_bits(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    """The Trainer saves adapters without the model; resumed from them the run ends with the same bits."""
    rows = torch.randint(64, (24, 16), generator=torch.Generator().manual_seed(1))

    def make(model: PeftModel) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        chosen = (FusedAdamW, {"lr": 1e-2, **options})
        trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=chosen)
        trainer.remove_callback(PrinterCallback)
        return trainer

    straight = make(make_model())
    straight.train()
    saved = tmp_path / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").exists() and not (saved / "model.safetensors").exists()
    fresh = make_model()
    with torch.no_grad():
        for p in adapters(fresh):
            p.add_(1.0)
    resumed = make(fresh)
    resumed.train(resume_from_checkpoint=str(saved))
    assert_same_bits(resumed.optimizer.optimizer, straight.optimizer.optimizer)
    assert len(params_of(resumed.optimizer)) == 28
