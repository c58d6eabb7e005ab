"""Inside Hugging Face's Trainer: its groups, clipping, accumulation, schedules, guards, checkpoints.

Most train a small network twice, with FusedAdamW and with torch.optim.AdamW, through the same Trainer, in float64: what
differs by more than roundings went a different way.
"""

from __future__ import annotations

import gc
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from pairs import assert_agree, assert_close, assert_same_bits, params_of
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from adamw_kernels import FusedAdamW

TOLERANCE = "float64_trajectory_against_torch"
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9)}
DECAY = 0.5
CLIP = 0.05  # smaller than every gradient's norm here

FULL: dict[str, Any] = {"skip_nonfinite": True, "ema_decay": 0.9, "cautious": True}


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


class Network(torch.nn.Module):
    """A layer, a norm, a layer, and the loss, in float64 unless told otherwise."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 8) -> None:
        """The same weights for the same arguments."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = torch.nn.Linear(5, width)
            self.norm = torch.nn.LayerNorm(width)
            self.last = torch.nn.Linear(width, 1)
            torch.nn.init.normal_(self.norm.weight)
            torch.nn.init.normal_(self.norm.bias)
        self.to(dtype)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean squared error."""
        dtype = self.first.weight.dtype
        return {"loss": (self.last(self.norm(self.first(x.to(dtype)))) - y.to(dtype)).square().mean()}


DECAYS = {"first.weight": DECAY, "last.weight": DECAY}


def examples(count: int = 40, broken: Sequence[int] = ()) -> list[dict[str, torch.Tensor]]:
    """Random numbers, the same each time; those at `broken` have an infinite target."""
    rng = torch.Generator().manual_seed(1)
    drawn = [{"x": torch.randn(5, generator=rng), "y": torch.randn(1, generator=rng)} for _ in range(count)]
    for index in broken:
        drawn[index]["y"][0] = torch.inf
    return drawn


class Watch(TrainerCallback):
    """What `look` returns after each step."""

    def __init__(self, look: Callable[[], Any]) -> None:
        """Nothing seen yet."""
        self.look, self.seen = look, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Look."""
        self.seen.append(self.look())


@pytest.fixture
def make(tmp_path: pathlib.Path, device: torch.device) -> Callable[..., Any]:
    """A function that makes a Trainer with one of the optimizers; what is no option of the optimizer is for it."""

    def make(
        cls: type[torch.optim.Optimizer],
        model: torch.nn.Module | None = None,
        data: Sequence[Any] | None = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        defaults: dict[str, Any] = dict(
            max_steps=12,
            per_device_train_batch_size=4,
            weight_decay=DECAY,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(
            Network() if model is None else model,
            TrainingArguments(str(tmp_path), **defaults | arguments),
            train_dataset=examples() if data is None else data,
            eval_dataset=examples(4),
            optimizer_cls_and_kwargs=(cls, HYPER | (options or {})),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def inner(trainer: Any) -> Any:
    """The optimizer itself, not accelerate's wrapper."""
    return trainer.optimizer.optimizer


def logged(trainer: Any, key: str) -> list[float]:
    """One number of the log, step by step."""
    return [row[key] for row in trainer.state.log_history if key in row]


def assert_logged_alike(ours: Any, theirs: Any, norms: list[float] | None = None) -> None:
    """The same losses and norms up to roundings, and the same learning rates; `norms` in place of those of our log.

    transformers 4 logs norms only where it clips.
    """
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    got, expected = logged(ours, "loss"), logged(theirs, "loss")
    assert len(got) == ours.state.max_steps
    if theirs.args.max_grad_norm:
        got += logged(ours, "grad_norm") if norms is None else norms
        expected += logged(theirs, "grad_norm")
        assert len(got) == 2 * ours.state.max_steps
        assert min(logged(theirs, "grad_norm")) > CLIP, "every step is clipped"
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(got, expected, strict=True))


# --- groups -----------------------------------------------------------------------------------------------------------


def no_decay_by_name(name: str) -> bool:
    """Biases and norms, by the names that these models give them."""
    return name.endswith("bias") or "norm" in name.lower()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            attention_bias=True, tie_word_embeddings=True,
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_groups_with_and_without_decay(make: Callable[..., Any], name: str) -> None:
    """Matrices decay, biases and norms do not, tied weights do once: seen in the weights, after a step on zeros."""
    model = MODELS[name]()
    trainer = make(FusedAdamW, model)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is FusedAdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert sorted(map(id, params_of(optimizer))) == sorted(map(id, model.parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = 0
    for key, p in model.named_parameters():
        if no_decay_by_name(key):
            assert torch.equal(p, before[key]), key
            kept += 1
        else:
            assert_close(p, before[key] * (1 - HYPER["lr"] * DECAY), "float32_against_torch", key)
    assert 0 < kept < len(before)
    plan = optimizer._internals.stepper.plan
    assert [len(table.batches) for table in plan.tables] == [1], "both groups are one launch"


def test_options_come_with_the_class(make: Callable[..., Any]) -> None:
    """Of TrainingArguments only the decay reaches the optimizer: lr, betas and eps are those given with the class."""
    trainer = make(FusedAdamW, learning_rate=0.9, adam_beta1=0.1, adam_beta2=0.2, adam_epsilon=1.0, weight_decay=0.25)
    optimizer = trainer.create_optimizer()
    for group, decay in zip(optimizer.param_groups, (0.25, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.05, (0.8, 0.9), 1e-8, decay)


def test_frozen_parameters_are_left_out(make: Callable[..., Any]) -> None:
    """What needs no gradient is in no group, has no state and keeps its bits."""
    network = Network()
    network.first.requires_grad_(False)
    before = network.first.weight.clone()
    trainer = make(FusedAdamW, network, max_steps=3)
    trainer.train()
    assert torch.equal(network.first.weight, before)
    assert set(inner(trainer).state) == {*network.norm.parameters(), *network.last.parameters()}


# --- the loop ---------------------------------------------------------------------------------------------------------


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 3},
    "cosine": {"lr_scheduler_type": "cosine"},
    "constant": {"lr_scheduler_type": "constant"},
    "min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 1e3, "factor": 0.5},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "label_names": ["y"],
    },
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [0.0, CLIP])
def test_clips_and_accumulates(make: Callable[..., Any], clip: float, accumulation: int) -> None:
    """`max_grad_norm` and `gradient_accumulation_steps`: an epoch's ten batches end with one that is left over."""
    arguments = {"max_grad_norm": clip, "gradient_accumulation_steps": accumulation}
    ours, theirs = (make(cls, **arguments) for cls in (FusedAdamW, torch.optim.AdamW))
    for trainer in (ours, theirs):
        trainer.train()
    assert_logged_alike(ours, theirs)
    assert_agree(inner(ours), inner(theirs), TOLERANCE)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(make: Callable[..., Any], schedule: str) -> None:
    """The Trainer's schedules set the learning rate, of each group and step."""
    trainers = [make(cls, **SCHEDULES[schedule]) for cls in (FusedAdamW, torch.optim.AdamW)]
    for trainer in trainers:
        trainer.train()
    ours, theirs = trainers
    assert_logged_alike(ours, theirs)
    assert len(set(logged(ours, "learning_rate"))) > 3 or schedule == "constant"
    assert_agree(inner(ours), inner(theirs), TOLERANCE)


def test_clipping_by_the_step(make: Callable[..., Any]) -> None:
    """The optimizer's own `max_grad_norm`, with the Trainer's at 0: the same clipping, by the same norm."""
    ours = make(FusedAdamW, options={"max_grad_norm": CLIP})
    watch = Watch(lambda: inner(ours).grad_norm.item())
    ours.add_callback(watch)
    theirs = make(torch.optim.AdamW, max_grad_norm=CLIP)
    for trainer in (ours, theirs):
        trainer.train()
    assert_logged_alike(ours, theirs, norms=watch.seen)
    assert_agree(inner(ours), inner(theirs), TOLERANCE)


def test_skips_steps_that_are_not_finite(make: Callable[..., Any]) -> None:
    """With `skip_nonfinite` a broken example costs its step and nothing else."""
    network = Network()
    ours = make(FusedAdamW, network, examples(broken=(7,)), options={"skip_nonfinite": True}, max_steps=10)
    skipped = Watch(lambda: bool(inner(ours).last_step_skipped))
    weights = Watch(lambda: [p.detach().clone() for p in network.parameters()])
    for watch in (skipped, weights):
        ours.add_callback(watch)
    ours.train()
    (broken,) = (i for i, skip in enumerate(skipped.seen) if skip)
    assert 0 < broken < 9
    for i in range(1, 10):
        unchanged = all(torch.equal(p, q) for p, q in zip(weights.seen[i - 1], weights.seen[i], strict=True))
        assert unchanged is (i == broken)
    assert inner(ours).skipped_steps.item() == 1
    assert {int(state["step"]) for state in inner(ours).state.values()} == {9}


def test_wrapped_by_accelerate(make: Callable[..., Any]) -> None:
    """Accelerate's wrapper forwards; `train` and `eval`, which it and the Trainer would call, are not there to call."""
    trainer = make(FusedAdamW, max_steps=2)
    trainer.train()
    assert type(trainer.optimizer) is AcceleratedOptimizer and type(inner(trainer)) is FusedAdamW
    assert not hasattr(FusedAdamW, "train") and not hasattr(FusedAdamW, "eval")
    trainer.optimizer.train()
    trainer.optimizer.eval()
    assert trainer.optimizer.param_groups is inner(trainer).param_groups
    assert trainer.optimizer.state is inner(trainer).state
    assert trainer.optimizer.defaults["weight_decay"] == inner(trainer).defaults["weight_decay"]


def test_an_optimizer_of_ones_own(make: Callable[..., Any]) -> None:
    """`optimizers=(FusedAdamW(...), None)`: with groups of its own, and the Trainer's schedule."""
    trainers = []
    for cls in (FusedAdamW, torch.optim.AdamW):
        trainer = make(cls, lr_scheduler_type="cosine")
        groups = [{"params": [*trainer.model.first.parameters()], "lr": 0.01}]
        groups += [{"params": [*trainer.model.norm.parameters(), *trainer.model.last.parameters()]}]
        trainer.optimizer_cls_and_kwargs = None
        trainer.optimizer = cls(groups, **HYPER)
        trainer.train()
        trainers.append(trainer)
    assert inner(trainers[0]).param_groups[0]["initial_lr"] == 0.01
    assert_agree(inner(trainers[0]), inner(trainers[1]), TOLERANCE)


# --- checkpoints ------------------------------------------------------------------------------------------------------


KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float64, {}),
    "full": (torch.float32, FULL),
    "split24-8bit": (torch.bfloat16, {"param_format": "split24", "moment_format": "8bit"}),
    "stochastic-bfloat16": (torch.bfloat16, {"param_format": "stochastic", "moment_format": "bfloat16", "seed": 3}),
    "split32": (torch.bfloat16, FULL),
}
SAVING: dict[str, Any] = dict(
    save_strategy="steps", save_steps=6, lr_scheduler_type="cosine", max_grad_norm=CLIP, gradient_accumulation_steps=2
)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_with_the_same_bits(make: Callable[..., Any], tmp_path: pathlib.Path, kind: str) -> None:
    """From the checkpoint halfway, in an epoch's middle, into a model and an optimizer made anew, with another seed."""
    dtype, options = KINDS[kind]
    straight = make(FusedAdamW, Network(0, dtype, 1024), options=options, **SAVING)
    straight.train()
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)  # as the Trainer loads it
    assert all(int(state["step"]) == 6 for state in saved["state"].values())

    resumed = make(FusedAdamW, Network(1, dtype, 1024), options=options | {"seed": 0}, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_bits(inner(resumed), inner(straight))
    assert logged(resumed, "learning_rate") == logged(straight, "learning_rate")
    assert logged(resumed, "loss") == logged(straight, "loss")
    if "moment_format" in options:
        assert len(set(inner(resumed).formats().values())) > (kind == "split24-8bit"), "codes, and what is too small"


def test_goes_on_from_a_run_with_torch(make: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """A Trainer's checkpoint written with torch.optim.AdamW is resumed with FusedAdamW."""
    theirs = make(torch.optim.AdamW, **SAVING)
    theirs.train()
    ours = make(FusedAdamW, Network(1), **SAVING)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_logged_alike(ours, theirs)
    assert_agree(inner(ours), inner(theirs), TOLERANCE)


def test_another_model_is_refused(make: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """A checkpoint whose optimizer state has other shapes: an error that names the parameter, and no step taken."""
    make(FusedAdamW, **SAVING).train()
    other = make(FusedAdamW, Network(width=9), **SAVING)
    file = tmp_path / "checkpoint-6" / "optimizer.pt"
    optimizer = other.create_optimizer()
    before = [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises(ValueError, match=r"param_groups\[0\]"):
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(params_of(optimizer), before, strict=True)) and not optimizer.state
