"""Inside Hugging Face accelerate, Lightning and Fabric: their clipping, loss scaling, wrappers and checkpoints.

Each test trains a small network twice, with FusedAdamW and with torch.optim.AdamW, through the same lines. In float64,
which autocast leaves alone, so that whatever differs by more than roundings went a different way. The loss scaler is a
real one on CPUs too: accelerate and Lightning make one for GPUs only, so here they are handed one.
"""

import itertools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from pairs import assert_agree, assert_close, assert_same_bits, params_of

from adamw_kernels import FusedAdamW

pytestmark = [
    # Lightning steps the schedule after a skipped first step; this is what torch says about it, for any optimizer.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    # Lightning's own use of torch.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:Warning"),
]

TOLERANCE = "float64_trajectory_against_torch"
HYPER = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}

# The gradients' norms are all larger than either limit allows, so every step is clipped.
CLIP = {"norm": 0.1, "value": 0.01}
LARGEST_NORM_CLIPPED_BY_VALUE = CLIP["value"] * 8  # the network has 57 weights, fewer than 8 squared

INIT_SCALE = 1024.0
BATCHES = 6
BROKEN = (0, 3)  # the batches with an infinite loss; the first step of all is one, as under a scale too high

FULL = {"fused": True, "max_grad_norm": CLIP["norm"], "skip_nonfinite": True, "ema_decay": 0.9}

Batch = tuple[torch.Tensor, torch.Tensor]


class Network(torch.nn.Module):
    """Two layers and the loss, in float64 whatever its input is cast to on the way here."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        """The same weights for the same seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(5, 8, dtype=dtype), torch.nn.Tanh(), torch.nn.Linear(8, 1, dtype=dtype)
            )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error: Fabric rounds it to float32, which leaves its gradient, 1, as it is."""
        dtype = self.layers[0].weight.dtype
        return (self.layers(x.to(dtype)) - y.to(dtype)).square().mean()


class Batches(Sequence[Batch]):
    """Batches of random numbers, the same each time; those at `broken` have an infinite target, or are left out."""

    def __init__(self, count: int = BATCHES, broken: Sequence[int] = (), leave_out: bool = False) -> None:
        """All of them at once."""
        rng = torch.Generator().manual_seed(1)
        drawn = [
            (torch.randn(4, 5, generator=rng).double(), torch.randn(4, 1, generator=rng).double()) for _ in range(count)
        ]
        for index in broken:
            drawn[index][1][0] = torch.inf
        self._all = [batch for index, batch in enumerate(drawn) if not (leave_out and index in broken)]

    def __len__(self) -> int:
        """How many."""
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        """One batch, or several."""
        return self._all[index]


def make_scaler(device: torch.device, **options: Any) -> torch.amp.GradScaler:
    """A scaler whose scale, a power of two, costs no roundings."""
    return torch.amp.GradScaler(device.type, **{"init_scale": INIT_SCALE, **options})


def norm_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The norm of the gradients as they are now."""
    return torch.nn.utils.get_total_norm([p.grad for p in params_of(optimizer) if p.grad is not None])


def steps_of(optimizer: torch.optim.Optimizer) -> set[float]:
    """The step counts of all parameters; empty before the first step."""
    return {float(optimizer.state[p]["step"]) for p in params_of(optimizer) if p in optimizer.state}


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of a model's weights, on the CPU."""
    return [p.detach().cpu().clone() for p in model.parameters()]


def same_weights(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def assert_state_keys(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
    """The state that was compared is all there: with an EMA where one was asked for."""
    keys = {"step", "exp_avg", "exp_avg_sq"} | ({"param_ema"} if "ema_decay" in options else set())
    assert all(set(optimizer.state[p]) == keys for p in params_of(optimizer))


def assert_norms(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Compare norms step by step; where one is infinite or NaN, the other must be."""
    assert len(got) == len(expected) > 0
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if b.isfinite():
            assert_close(a, b, TOLERANCE, f"norm of step {i}")
        else:
            assert not a.isfinite(), f"norm of step {i} is {a}"


def assert_float32_norms(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Compare `grad_norm`, float32, with norms in float64: rounded once it is the same number."""
    assert len(got) == len(expected) > 0
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == torch.float32 and a.shape == ()
        assert a.item() == b.float().item() if b.isfinite() else not a.isfinite(), (i, a, b)


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_and_quiet() -> Iterator[None]:
    """Make accelerate's process-wide state anew for each test, and have Lightning log errors only."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Accelerated:
    """A training run under accelerate, and what was seen on the way, step by step."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        device: torch.device,
        *,
        clip: str | None = None,
        accumulation: int = 1,
        gamma: float = 0.9,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        """Prepare a network, an optimizer and a schedule; without a scaler, without mixed precision."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if scaler is None else "fp16",
            gradient_accumulation_steps=accumulation,
        )
        if scaler is not None:
            self.accelerator.native_amp = True
            self.accelerator.scaler = scaler
        network = Network(seed, dtype)
        self.inner = cls(network.parameters(), **{**HYPER, **options})
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.inner, gamma)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(network, self.inner, schedule)
        self.clip = clip
        self.losses: list[float] = []
        self.norms: list[torch.Tensor] = []  # as accelerate's clipping by norm returns them; after clipping by value
        self.skipped: list[bool] = []  # as accelerate sees it
        self.lrs: list[float] = []
        self.scales: list[float] = []

    def train(self, batches: Sequence[Batch], after_step: Callable[[], None] = lambda: None) -> "Accelerated":
        """The loop of accelerate's documentation."""
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(*(tensor.to(self.accelerator.device) for tensor in batch))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    if self.clip == "norm":
                        self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP["norm"]))
                    elif self.clip == "value":
                        self.accelerator.clip_grad_value_(self.model.parameters(), CLIP["value"])
                        self.norms.append(norm_of(self.inner))
                self.optimizer.step()
                self.schedule.step()
                if self.accelerator.sync_gradients:
                    self.losses.append(loss.item())
                    self.skipped.append(self.accelerator.optimizer_step_was_skipped)
                    self.lrs.append(self.inner.param_groups[0]["lr"])
                    self.scales.append(self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0)
                    after_step()
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_accelerate_sees_the_skip(device: torch.device, clip: str | None, accumulation: int) -> None:
    """By default accelerate knows of a skipped step and leaves the learning rate; its clipping is as with torch's."""
    ours, theirs = (
        Accelerated(cls, device, clip=clip, accumulation=accumulation, scaler=make_scaler(device)).train(
            Batches(broken=BROKEN)
        )
        for cls in (FusedAdamW, torch.optim.AdamW)
    )
    expected = [True, False, False, True, False, False] if accumulation == 1 else [True, True, False]
    assert ours.skipped == theirs.skipped == expected
    applied = expected.count(False)
    assert steps_of(ours.inner) == {applied}
    assert ours.lrs == theirs.lrs
    assert ours.lrs[0] == HYPER["lr"], "the schedule stood still"
    assert math.isclose(ours.lrs[-1], HYPER["lr"] * 0.9**applied)
    assert ours.scales == theirs.scales
    assert ours.scales[0] == INIT_SCALE / 2
    if clip:
        assert_norms(ours.norms, theirs.norms)
        limits = {"norm": (CLIP["norm"], math.inf), "value": (0.0, LARGEST_NORM_CLIPPED_BY_VALUE)}[clip]
        assert all(limits[0] < norm < limits[1] for norm in ours.norms if norm.isfinite())
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


def test_accelerate_cannot_see_a_skip_on_the_device(device: torch.device) -> None:
    """With fused=True, as with torch's: the step is called and skips itself, and accelerate's schedule moves on.

    This is why fused=True is not the default. `last_step_skipped` and `skipped_steps` say it without a sync.
    """
    seen: list[bool] = []
    ours = Accelerated(FusedAdamW, device, clip="norm", scaler=make_scaler(device), fused=True)
    ours.train(Batches(broken=BROKEN), lambda: seen.append(bool(ours.inner.last_step_skipped)))
    theirs = Accelerated(torch.optim.AdamW, device, clip="norm", scaler=make_scaler(device), fused=True)
    theirs.train(Batches(broken=BROKEN))
    assert ours.skipped == theirs.skipped == [False] * BATCHES
    assert seen == [i in BROKEN for i in range(BATCHES)]
    assert ours.inner.skipped_steps.item() == len(BROKEN)
    assert ours.lrs == theirs.lrs
    assert math.isclose(ours.lrs[-1], HYPER["lr"] * 0.9**BATCHES)
    assert ours.scales == theirs.scales
    assert_norms(ours.norms, theirs.norms)
    assert_agree(ours.inner, theirs.inner, TOLERANCE)
    assert steps_of(ours.inner) == {BATCHES - len(BROKEN)}


@pytest.mark.parametrize("fused", [None, True])
def test_accelerate_with_max_grad_norm(device: torch.device, fused: bool | None) -> None:
    """`max_grad_norm` replaces accelerate's clipping: the same weights, and `grad_norm` is what it returned."""
    norms: list[torch.Tensor] = []

    def after_step() -> None:
        if not ours.skipped[-1]:
            norms.append(ours.inner.grad_norm)

    ours = Accelerated(FusedAdamW, device, scaler=make_scaler(device), fused=fused, max_grad_norm=CLIP["norm"])
    ours.train(Batches(broken=BROKEN), after_step)
    theirs = Accelerated(torch.optim.AdamW, device, clip="norm", scaler=make_scaler(device), fused=fused)
    theirs.train(Batches(broken=BROKEN))
    called = [i for i in range(BATCHES) if fused or i not in BROKEN]
    assert ours.skipped == theirs.skipped == [i not in called for i in range(BATCHES)]
    assert_float32_norms(norms, [theirs.norms[i] for i in called])
    assert ours.inner.skipped_steps.item() == (len(BROKEN) if fused else 0), "what the scaler skips is never called"
    assert ours.lrs == theirs.lrs
    assert ours.scales == theirs.scales
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


def test_accelerate_skip_nonfinite_without_a_scaler(device: torch.device) -> None:
    """Bad batches change nothing: the weights are those of a run that never had them."""
    history: list[list[torch.Tensor]] = [weights_of(Network())]
    seen: list[bool] = []
    ours = Accelerated(FusedAdamW, device, gamma=1.0, skip_nonfinite=True, max_grad_norm=CLIP["norm"])

    def after_step() -> None:
        seen.append(bool(ours.inner.last_step_skipped))
        history.append(weights_of(ours.model))
        assert same_weights(*history[-2:]) is seen[-1]

    ours.train(Batches(broken=BROKEN), after_step)
    good = Batches(broken=BROKEN, leave_out=True)
    theirs = Accelerated(torch.optim.AdamW, device, clip="norm", gamma=1.0).train(good)
    assert seen == [i in BROKEN for i in range(BATCHES)]
    assert ours.skipped == [False] * BATCHES, "accelerate asks the scaler, and there is none"
    assert steps_of(ours.inner) == {len(good)}
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_accelerate_checkpoint(device: torch.device, tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    """`save_state` after three batches, `load_state` into new objects: the same bits as without the stop."""
    batches = Batches(broken=BROKEN)
    straight = Accelerated(FusedAdamW, device, scaler=make_scaler(device), **options).train(batches)
    first = Accelerated(FusedAdamW, device, scaler=make_scaler(device), **options).train(batches[:3])
    first.accelerator.save_state(str(tmp_path))
    second = Accelerated(FusedAdamW, device, scaler=make_scaler(device), seed=1, **options)
    second.accelerator.load_state(str(tmp_path))
    assert_same_bits(second.inner, first.inner)
    second.train(batches[3:])
    assert_same_bits(second.inner, straight.inner)
    assert second.lrs == straight.lrs[3:]
    assert second.scales == straight.scales[3:]
    assert_state_keys(straight.inner, options)


@pytest.mark.parametrize("fused", [None, True])
def test_accelerate_half_precision(device: torch.device, fused: bool | None) -> None:
    """Real overflows of float16 at the usual scale, 65536: it is halved until gradients fit, and training starts."""
    runs, histories = [], []
    for cls in (FusedAdamW, torch.optim.AdamW):
        history = [weights_of(Network(dtype=torch.float32))]
        scaler = make_scaler(device, init_scale=65536.0)
        run = Accelerated(cls, device, scaler=scaler, fused=fused, gamma=1.0, dtype=torch.float32)
        run.train([(x, 20 * y) for x, y in Batches(12)], lambda h=history, m=run.model: h.append(weights_of(m)))
        runs.append(run)
        histories.append(history)
    ours, theirs = runs
    halved = [after < before for before, after in itertools.pairwise([65536.0, *ours.scales])]
    assert halved[0] and not all(halved)
    assert ours.scales == theirs.scales
    assert ours.skipped == theirs.skipped == ([False] * 12 if fused else halved)
    for skipped, (before, after) in zip(halved, itertools.pairwise(histories[0]), strict=True):
        assert same_weights(before, after) is skipped
    # The first step that counts starts from the same weights and gradients; later ones from gradients in float16 of
    # weights that differ.
    applied = halved.index(False) + 1
    for got, expected in zip(histories[0][applied], histories[1][applied], strict=True):
        assert_close(got, expected, "float32_against_torch", "weights after the first step")
    assert ours.losses[-1] < ours.losses[0]


# --- Lightning --------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """A network to train with one of the optimizers, and what was seen on the way, batch by batch."""

    def __init__(self, cls: type[torch.optim.Optimizer], *, seed: int = 0, gamma: float = 0.9, **options: Any) -> None:
        """Automatic optimization; the optimizer is made in `configure_optimizers`."""
        super().__init__()
        self.network = Network(seed)
        self._make = lambda params: cls(params, **{**HYPER, **options})
        self._gamma = gamma
        self.before: list[torch.Tensor] = []  # norms of the gradients as Lightning is about to clip them
        self.after: list[torch.Tensor] = []  # and as the step left them
        self.lrs: list[float] = []
        self.scales: list[float] = []

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer itself, not Lightning's wrapper."""
        return self.trainer.optimizers[0]

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that is stepped with each of its steps."""
        optimizer = self._make(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self._gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, index: int) -> torch.Tensor | None:
        """Return the loss."""
        return self.network(*batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm."""
        self.before.append(norm_of(optimizer))

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """Note what a logger would log."""
        self.after.append(norm_of(self.inner))
        self.lrs.append(self.inner.param_groups[0]["lr"])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else 1.0)


def make_trainer(device: torch.device, folder: pathlib.Path, *, scaled: bool, **options: Any) -> lightning.Trainer:
    """A trainer that writes and shows nothing; with a loss scaler, or in plain float64."""
    plugin = MixedPrecision("16-mixed", device.type, make_scaler(device)) if scaled else None
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        plugins=[plugin] if plugin else None,
        precision=None if plugin else "64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, **options},
    )


@pytest.fixture
def fit(device: torch.device, tmp_path: pathlib.Path) -> Callable[..., Any]:
    """A function that trains a module for an epoch and returns it."""

    def fit(module: Module, batches: Sequence[Batch], *, scaled: bool, **options: Any) -> Any:
        make_trainer(device, tmp_path, scaled=scaled, **options).fit(module, batches)
        return module

    return fit


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "double"])
def test_lightning_clips(fit: Callable[..., Any], scaled: bool, clip: str | None, accumulation: int) -> None:
    """`gradient_clip_val` works: with a loss scaler, whose skips change nothing, and without, inside closures."""
    broken = BROKEN if scaled else ()
    ours, theirs = (
        fit(
            Module(cls),
            Batches(broken=broken),
            scaled=scaled,
            gradient_clip_val=CLIP[clip] if clip else None,
            gradient_clip_algorithm=clip,
            accumulate_grad_batches=accumulation,
        )
        for cls in (FusedAdamW, torch.optim.AdamW)
    )
    steps = BATCHES // accumulation
    skipped = {i // accumulation for i in broken}
    assert steps_of(ours.inner) == {steps - len(skipped)}
    assert ours.lrs == theirs.lrs
    assert math.isclose(ours.lrs[-1], HYPER["lr"] * 0.9**steps), "Lightning's schedules count skipped steps, for all"
    assert ours.scales == theirs.scales
    assert ours.scales[-1] == (INIT_SCALE / 2 ** len(skipped) if scaled else 1.0)
    assert_norms(ours.before, theirs.before)
    assert_norms(ours.after, theirs.after)
    for i in set(range(steps)) - skipped:
        before, after = ours.before[i], ours.after[(i + 1) * accumulation - 1]
        assert before > max(CLIP["norm"], LARGEST_NORM_CLIPPED_BY_VALUE)
        if clip == "norm":  # torch's coefficient is max_norm / (norm + 1e-6)
            assert_close(after, CLIP["norm"] * before / (before + 1e-6), TOLERANCE, f"norm after step {i}")
        elif clip == "value":
            assert after < LARGEST_NORM_CLIPPED_BY_VALUE
        else:
            assert after == before
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("cls", [FusedAdamW, torch.optim.AdamW])
def test_lightning_refuses_to_clip_with_fused(fit: Callable[..., Any], cls: type[torch.optim.Optimizer]) -> None:
    """fused=True with `gradient_clip_val` under a scaler is refused by Lightning, as torch's is.

    This is why fused=True is not the default.
    """
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Module(cls, fused=True), Batches(), scaled=True, gradient_clip_val=CLIP["norm"])


class Watched(Module):
    """Notes what FusedAdamW says of each step, through Lightning's wrapper, which is what `self.optimizers()` gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As a Module."""
        super().__init__(*args, **kwargs)
        self.norms: list[torch.Tensor] = []
        self.skipped: list[bool] = []

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """The wrapper is an instance of a subclass of FusedAdamW that has none of its attributes: it forwards reads."""
        super().on_train_batch_end(outputs, batch, index)
        wrapper = self.optimizers()
        assert wrapper is not self.inner and isinstance(wrapper, FusedAdamW)
        assert wrapper.last_step_skipped.item() == self.inner.last_step_skipped.item()
        assert wrapper.skipped_steps.item() == self.inner.skipped_steps.item()
        self.skipped.append(bool(wrapper.last_step_skipped))
        if self.inner.state:  # the step was called
            self.norms.append(wrapper.grad_norm)


@pytest.mark.parametrize("fused", [None, True])
def test_lightning_with_max_grad_norm(fit: Callable[..., Any], fused: bool | None) -> None:
    """`max_grad_norm` under a scaler, with fused=True and without, gives what torch and `gradient_clip_val` do."""
    ours = fit(Watched(FusedAdamW, fused=fused, max_grad_norm=CLIP["norm"]), Batches(broken=BROKEN), scaled=True)
    theirs = fit(Module(torch.optim.AdamW), Batches(broken=BROKEN), scaled=True, gradient_clip_val=CLIP["norm"])
    assert ours.lrs == theirs.lrs
    assert ours.scales == theirs.scales
    assert_agree(ours.inner, theirs.inner, TOLERANCE)
    assert steps_of(ours.inner) == {BATCHES - len(BROKEN)}
    if fused:
        assert ours.skipped == [i in BROKEN for i in range(BATCHES)]
        assert ours.inner.skipped_steps.item() == len(BROKEN)
        assert_float32_norms(ours.norms, theirs.before)
        scales = [INIT_SCALE, *ours.scales]
        assert_norms([norm / scale for norm, scale in zip(ours.before, scales, strict=False)], theirs.before)
        assert_norms(ours.after, ours.before)
    else:
        assert not any(ours.skipped), "what the scaler skips is never called"
        # In place of the fourth, which was skipped, the norm of the step before is still there.
        assert_float32_norms(ours.norms, [theirs.before[i] for i in (1, 2, 2, 4, 5)])
        assert_norms(ours.after, ours.before)


def test_lightning_skip_nonfinite_without_a_scaler(fit: Callable[..., Any]) -> None:
    """Bad batches change nothing: the weights are those of a run that never had them."""
    options = {"skip_nonfinite": True, "max_grad_norm": CLIP["norm"]}
    ours = fit(Watched(FusedAdamW, gamma=1.0, **options), Batches(broken=BROKEN), scaled=False)
    good = Batches(broken=BROKEN, leave_out=True)
    theirs = fit(Module(torch.optim.AdamW, gamma=1.0), good, scaled=False, gradient_clip_val=CLIP["norm"])
    assert ours.skipped == [i in BROKEN for i in range(BATCHES)]
    assert steps_of(ours.inner) == {len(good)}
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_lightning_checkpoint(
    device: torch.device, tmp_path: pathlib.Path, fit: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Saved after an epoch and resumed by new objects through `ckpt_path`: the same bits as without the stop."""
    batches = Batches(3, broken=(0,))
    straight = fit(Module(FusedAdamW, **options), batches, scaled=True, max_epochs=2)
    first = fit(Module(FusedAdamW, **options), batches, scaled=True)
    path = tmp_path / "epoch.ckpt"
    first.trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)  # holds nothing that this refuses
    second = Module(FusedAdamW, seed=1, **options)
    make_trainer(device, tmp_path, scaled=True, max_epochs=2).fit(second, batches, ckpt_path=path)
    assert len(second.lrs) == 3, "the first epoch was not repeated"
    assert_same_bits(second.inner, straight.inner)
    assert second.lrs == straight.lrs[3:]
    assert second.scales == straight.scales[3:]
    assert_state_keys(straight.inner, options)


class Manual(Module):
    """Manual optimization: the user's loop in `training_step`, through Lightning's wrapper of the optimizer."""

    def __init__(self, *args: Any, clip_in: str = "", closure: bool = False, **kwargs: Any) -> None:
        """Clip in `training_step`, where gradients are still scaled, in the hook, where they are not, or not at all."""
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._clip_in = clip_in
        self._closure = closure

    def training_step(self, batch: Batch, index: int) -> None:
        """Zero, backward, clip, step, schedule."""
        optimizer = self.optimizers()

        def backward() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.network(*batch))

        if self._closure:
            optimizer.step(backward)
        else:
            backward()
            if self._clip_in == "training_step":
                self.clip_gradients(optimizer, gradient_clip_val=CLIP["norm"], gradient_clip_algorithm="norm")
            optimizer.step()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm, and clip."""
        super().on_before_optimizer_step(optimizer)
        if self._clip_in == "hook":
            torch.nn.utils.clip_grad_norm_(params_of(optimizer), CLIP["norm"])


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "double"])
def test_lightning_manual_optimization(fit: Callable[..., Any], scaled: bool, closure: bool) -> None:
    """Steps made by hand, with and without a closure, clipped where gradients are unscaled."""
    ours, theirs = (
        fit(Manual(cls, clip_in="hook", closure=closure), Batches(broken=BROKEN if scaled else ()), scaled=scaled)
        for cls in (FusedAdamW, torch.optim.AdamW)
    )
    assert steps_of(ours.inner) == {BATCHES - (len(BROKEN) if scaled else 0)}
    assert_norms(ours.before, theirs.before)
    assert_norms(ours.after, theirs.after)
    assert ours.scales == theirs.scales
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


def test_lightning_clips_by_hand(fit: Callable[..., Any]) -> None:
    """`self.clip_gradients` accepts the wrapper of a FusedAdamW."""
    ours, theirs = (
        fit(Manual(cls, clip_in="training_step"), Batches(), scaled=False) for cls in (FusedAdamW, torch.optim.AdamW)
    )
    assert max(ours.before) < CLIP["norm"]
    assert_norms(ours.before, theirs.before)
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("cls", [FusedAdamW, torch.optim.AdamW])
def test_lightning_refuses_to_clip_with_fused_by_hand(
    fit: Callable[..., Any], cls: type[torch.optim.Optimizer]
) -> None:
    """So does the refusal of fused=True: Lightning asks the wrapper, which must not answer for itself."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Manual(cls, clip_in="training_step", fused=True), Batches(), scaled=True)


@pytest.mark.parametrize("fused", [None, True])
def test_lightning_manual_optimization_with_max_grad_norm(fit: Callable[..., Any], fused: bool | None) -> None:
    """`max_grad_norm` clips unscaled gradients where `self.clip_gradients` would clip scaled ones."""
    batches = Batches(broken=BROKEN)
    ours = fit(Manual(FusedAdamW, fused=fused, max_grad_norm=CLIP["norm"]), batches, scaled=True)
    theirs = fit(Manual(torch.optim.AdamW, clip_in="hook"), batches, scaled=True)
    assert ours.scales == theirs.scales
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


class Averaged(Module):
    """Looks at the EMA of the weights after each batch, through Lightning's wrapper."""

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """Inside the block the network holds the EMA, and Lightning cannot step; after it the weights."""
        weights = weights_of(self.network)
        with self.optimizers().ema_weights():
            inside = weights_of(self.network)
            with pytest.raises(RuntimeError, match="ema_weights"):
                self.inner.step()
        assert same_weights(weights_of(self.network), weights)
        assert same_weights(inside, [self.inner.state[p]["param_ema"].cpu() for p in self.network.parameters()])
        assert not same_weights(inside, weights)


def test_lightning_ema_through_the_wrapper(fit: Callable[..., Any]) -> None:
    """`self.optimizers().ema_weights()` swaps the weights of the optimizer that Lightning wraps, and back."""
    ours = fit(Averaged(FusedAdamW, ema_decay=0.9), Batches(), scaled=False)
    theirs = fit(Module(torch.optim.AdamW), Batches(), scaled=False)
    assert same_weights(weights_of(ours), weights_of(fit(Module(FusedAdamW), Batches(), scaled=False)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, TOLERANCE, "weights")


# --- Fabric -----------------------------------------------------------------------------------------------------------


class Fabricated:
    """A training run under Lightning's Fabric."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        device: torch.device,
        *,
        clip: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Set up a network and an optimizer, with a loss scaler."""
        self.scaler = make_scaler(device)
        self.fabric = lightning.Fabric(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            plugins=[FabricMixedPrecision("16-mixed", device.type, self.scaler)],
        )
        network = Network(seed)
        self.inner = cls(network.parameters(), **{**HYPER, **options})
        self.model, self.optimizer = self.fabric.setup(network, self.inner)
        self.clip = clip
        self.norms: list[torch.Tensor] = []  # as Fabric's clipping returns them
        self.scales: list[float] = []

    def train(self, batches: Sequence[Batch], after_step: Callable[[], None] = lambda: None) -> "Fabricated":
        """The loop of Fabric's documentation."""
        for batch in batches:
            self.optimizer.zero_grad()
            self.fabric.backward(self.model(*(tensor.to(self.fabric.device) for tensor in batch)))
            if self.clip:
                norm = self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=CLIP["norm"], error_if_nonfinite=False
                )
                assert norm is not None
                self.norms.append(norm)
            self.optimizer.step()
            self.scales.append(self.scaler.get_scale())
            after_step()
        return self


def test_fabric_clips(device: torch.device) -> None:
    """`fabric.clip_gradients` works, its norms are torch's, and skipped steps are skipped whole."""
    ours, theirs = (
        Fabricated(cls, device, clip=True).train(Batches(broken=BROKEN)) for cls in (FusedAdamW, torch.optim.AdamW)
    )
    assert_norms(ours.norms, theirs.norms)
    assert min(ours.norms) > CLIP["norm"]
    assert ours.scales == theirs.scales
    assert steps_of(ours.inner) == {BATCHES - len(BROKEN)}
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("cls", [FusedAdamW, torch.optim.AdamW])
def test_fabric_refuses_to_clip_with_fused(device: torch.device, cls: type[torch.optim.Optimizer]) -> None:
    """fused=True with Fabric's clipping under a scaler is refused, as torch's is."""
    with pytest.raises(NotImplementedError, match="optimizers handling the unscaling"):
        Fabricated(cls, device, clip=True, fused=True).train(Batches())


@pytest.mark.parametrize("fused", [None, True])
def test_fabric_with_max_grad_norm(device: torch.device, fused: bool | None) -> None:
    """`max_grad_norm`, with fused=True and without, gives what torch and Fabric's clipping do."""
    norms: list[torch.Tensor] = []
    skipped: list[bool] = []

    def after_step() -> None:
        skipped.append(bool(ours.optimizer.last_step_skipped))
        if fused or len(skipped) - 1 not in BROKEN:
            norms.append(ours.optimizer.grad_norm)

    ours = Fabricated(FusedAdamW, device, fused=fused, max_grad_norm=CLIP["norm"])
    ours.train(Batches(broken=BROKEN), after_step)
    theirs = Fabricated(torch.optim.AdamW, device, clip=True).train(Batches(broken=BROKEN))
    assert_float32_norms(norms, [n for i, n in enumerate(theirs.norms) if fused or i not in BROKEN])
    assert skipped == [bool(fused) and i in BROKEN for i in range(BATCHES)]
    assert ours.optimizer.skipped_steps.item() == (len(BROKEN) if fused else 0)
    assert ours.scales == theirs.scales
    assert_agree(ours.inner, theirs.inner, TOLERANCE)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_fabric_checkpoint(device: torch.device, tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    """`fabric.save` after three batches, `fabric.load` into new objects: the same bits as without the stop."""
    batches = Batches(broken=BROKEN)
    straight = Fabricated(FusedAdamW, device, **options).train(batches)
    first = Fabricated(FusedAdamW, device, **options).train(batches[:3])
    path = tmp_path / "three.ckpt"
    state = {"model": first.model, "optimizer": first.optimizer, "scaler": first.scaler.state_dict()}
    first.fabric.save(path, state)
    second = Fabricated(FusedAdamW, device, seed=1, **options)
    rest = second.fabric.load(path, {"model": second.model, "optimizer": second.optimizer})
    second.scaler.load_state_dict(rest["scaler"])
    assert_same_bits(second.inner, first.inner)
    second.train(batches[3:])
    assert_same_bits(second.inner, straight.inner)
    assert second.scales == straight.scales[3:]
    assert_state_keys(straight.inner, options)
