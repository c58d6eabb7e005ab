"""Closures, step hooks and torch.compile around a step that clips, skips and averages."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Path
from pairs import assert_same_bits

from adamw_kernels import FusedAdamW, release_gradients

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": dict(max_grad_norm=0.1),
    "clip-per-group": dict(max_grad_norm=0.1, clip_per_group=True),
    "guards": dict(skip_nonfinite=True, max_skip_norm=10.0),
    "ema": dict(ema_decay=0.9, ema_warmup=True),
    "everything": dict(
        max_grad_norm=0.1,
        skip_nonfinite=True,
        ema_decay=0.9,
        ema_format="bfloat16",
        cautious=True,
        cautious_weight_decay=True,
        amsgrad=True,
    ),
}


def make(device: torch.device, **options: Any) -> tuple[torch.nn.Module, FusedAdamW]:
    """Return a small model, the same each time, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(device)
    return model, FusedAdamW(model.parameters(), lr=0.01, **options)


def batch(step: int, device: torch.device) -> torch.Tensor:
    """Return the input of a step."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(device)


def ordinary_loop(device: torch.device, steps: int, **options: Any) -> tuple[list[torch.Tensor], FusedAdamW]:
    """Forward, backward, step, zero_grad, `steps` times: the losses, and the optimizer afterwards."""
    model, opt = make(device, **options)
    losses = []
    for step in range(steps):
        loss = model(batch(step, device)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return losses, opt


def assert_same_losses(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compare every bit."""
    assert torch.equal(torch.stack(got), torch.stack(expected))


# --- closures and hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_closures(path: Path, options: str) -> None:
    """`opt.step(closure)` is forward, backward and step, under no_grad too; what it returns is the closure's loss."""
    model, opt = make(path.device, **OPTIONS[options])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss: torch.Tensor = model(batch(len(calls) - 1, path.device)).square().mean()
        loss.backward()
        return loss

    losses = []
    for step in range(4):
        with torch.set_grad_enabled(step % 2 == 0):
            losses.append(opt.step(closure).detach())
    assert calls == [True] * 4
    expected, ordinary = ordinary_loop(path.device, 4, **OPTIONS[options])
    assert_same_losses(losses, expected)
    assert_same_bits(opt, ordinary)
    if opt._measures():
        assert torch.equal(opt.grad_norm, ordinary.grad_norm)


def test_hooks_see_the_step_from_both_sides(path: Path) -> None:
    """Before it: old weights, and gradients that may still be changed. After it: its norm, averages, and its skip."""
    model, opt = make(path.device, max_grad_norm=0.1, ema_decay=0.5, skip_nonfinite=True)
    weight = next(model.parameters())
    seen: list[tuple[Any, ...]] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert optimizer is opt
        for p in model.parameters():
            p.grad *= 2.0
        seen.append(("before", weight.detach().clone()))

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with opt.ema_weights():
            average = weight.detach().clone()
        seen.append(("after", opt.grad_norm, bool(opt.last_step_skipped), weight.detach().clone(), average))

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)
    for step, factor in enumerate((1.0, torch.inf)):
        start = weight.detach().clone()
        model(batch(step, path.device)).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        weight.grad *= factor
        opt.step()
        opt.zero_grad()
        (_, old), (_, norm, skipped, new, average) = seen[-2:]
        assert torch.equal(old, start)
        assert skipped == (factor == torch.inf)
        if not skipped:
            assert norm.item() == pytest.approx(2 * torch.nn.utils.get_total_norm(grads).item(), rel=1e-6)
            assert not torch.equal(new, start) and not torch.equal(average, new)
            assert torch.equal(average, start + 0.5 * (new - start))
        else:
            assert norm.isinf() and torch.equal(new, start)
    assert [what for what, *_ in seen] == ["before", "after"] * 2


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Compiled:
    """torch.compile with a backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        """No graph yet."""
        self.graphs = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function."""
        compiled: Callable[..., Any] = torch.compile(function, backend=self._backend)
        return compiled

    def _backend(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    """A fresh compiler."""
    torch._dynamo.reset()
    yield Compiled()
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_training_step(device: torch.device, compiled: Compiled, options: str) -> None:
    """Forward, backward, step and zero_grad as one compiled function: the bits of the loop that is not compiled.

    One graph, the forward's, serves all steps. Of the step nothing is traced: it would break the graph again and again.
    """
    model, opt = make(device, **OPTIONS[options])

    @compiled
    def iterate(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    losses = [iterate(batch(step, device)).detach() for step in range(5)]
    expected, ordinary = ordinary_loop(device, 5, **OPTIONS[options])
    assert_same_losses(losses, expected)
    assert_same_bits(opt, ordinary)
    assert compiled.graphs == 1


def test_a_compiled_step_follows_its_schedule(device: torch.device, compiled: Compiled) -> None:
    """`torch.compile(opt.step)` beside a scheduler: each rate counts, and none is compiled into anything."""
    rates = []
    for wrap in (lambda function: function, compiled):
        model, opt = make(device, max_grad_norm=0.1, ema_decay=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        step = wrap(lambda opt=opt: opt.step())
        for i in range(12):  # more than dynamo recompiles a function
            model(batch(i, device)).square().mean().backward()
            step()
            opt._opt_called = True  # the scheduler's own wrapper notes it, if it is not compiled away
            scheduler.step()
            opt.zero_grad()
        rates.append(opt)
    assert_same_bits(*rates)
    assert compiled.graphs == 0


def test_a_compiled_closure(device: torch.device, compiled: Compiled) -> None:
    """A compiled function that hands a closure to `opt.step`: the closure is compiled, the step is not traced."""
    model, opt = make(device, max_grad_norm=0.1)

    @compiled
    def iterate(x: torch.Tensor) -> torch.Tensor:
        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss: torch.Tensor = model(x).square().mean()
            loss.backward()
            return loss

        found: torch.Tensor = opt.step(closure)
        return found

    losses = [iterate(batch(step, device)).detach() for step in range(4)]
    expected, ordinary = ordinary_loop(device, 4, max_grad_norm=0.1)
    assert_same_losses(losses, expected)
    assert_same_bits(opt, ordinary)
    assert compiled.graphs <= 2


def test_compiled_with_released_gradients(device: torch.device, compiled: Compiled) -> None:
    """Steps taken by hooks of a compiled function's backward are not traced either."""
    model, opt = make(device, ema_decay=0.9)
    release_gradients(model, opt)

    @compiled
    def iterate(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss

    losses = []
    for step in range(4):
        losses.append(iterate(batch(step, device)).detach())
        assert all(p.grad is None for p in model.parameters())
    expected, ordinary = ordinary_loop(device, 4, ema_decay=0.9)
    assert_same_losses(losses, expected)
    assert_same_bits(opt, ordinary)
    assert compiled.graphs == 1


def test_what_a_step_found_within_a_compiled_function(device: torch.device, compiled: Compiled) -> None:
    """Norm and skips, read in a compiled function after the step, are that step's; so are averages shown in one."""
    options: dict[str, Any] = dict(max_grad_norm=0.1, ema_decay=0.5, skip_nonfinite=True)
    model, opt = make(device, **options)
    plain_model, plain = make(device, **options)

    @compiled
    def iterate(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        return opt.grad_norm, opt.skipped_steps, opt.last_step_skipped

    @compiled
    def evaluate(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), opt.ema_weights():
            result: torch.Tensor = model(x)
        return result

    for step in range(4):
        x = batch(step, device) * (torch.inf if step == 2 else 1.0)
        found = iterate(x)
        plain_model(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
        for got, expected in zip(found, (plain.grad_norm, plain.skipped_steps, plain.last_step_skipped), strict=True):
            assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
        with torch.no_grad(), plain.ema_weights():
            shown = plain_model(batch(9, device))
        assert torch.equal(evaluate(batch(9, device)), shown)
        assert_same_bits(opt, plain)
    assert plain.skipped_steps.item() == 1
