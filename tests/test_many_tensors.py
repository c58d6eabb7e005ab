"""A warm step over so many tensors that torch's threads share the look at them.

The native watch first reads all tensors without a call into Python, on all of torch's threads, and leaves what that
does not settle to the caller (`csrc/tensor_watch.h`). Among thousands every change must be noticed as among three,
wherever it is. Here they are a hundred, of which a few are worth a thread's while.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import TOLERANCES

from adamw_kernels import FusedAdamW, tensor_watch

COUNT = 101
PER_THREAD = 16
PLACES = (0, COUNT // 2, COUNT // 2 + 1, COUNT - 1)  # the first and the last of each thread
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch, and so the watch, use two threads."""
    monkeypatch.setattr(tensor_watch, "PARAMS_PER_THREAD", PER_THREAD)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Wrapped(torch.nn.Parameter):
    """A parameter whose type has a property named grad, which only Python can read."""

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient, elsewhere."""
        return getattr(self, "kept", None)

    @grad.setter
    def grad(self, grad: torch.Tensor | None) -> None:
        self.kept = grad


def parameter(index: int) -> torch.nn.Parameter:
    """One of every kind, in float64: 0 to 2 dimensions, none of its elements, transposed, with a property."""
    shape = (2, 3) if index in PLACES else ((), (3,), (2, 3), (0, 2))[index % 4]
    value = torch.linspace(0.1, 1, max(1, torch.Size(shape).numel()), dtype=torch.float64) + index % 17
    value = value[: torch.Size(shape).numel()].reshape(shape)
    if index % 12 == 2 and index not in PLACES:
        value = value.t()
    return Wrapped(value) if index % 41 == 5 else torch.nn.Parameter(value)


def optimizer(cls: Any = FusedAdamW) -> Any:
    """Of many parameters in groups of every size, one of them empty; some are frozen."""
    params = [parameter(index) for index in range(COUNT)]
    for index, p in enumerate(params):
        p.requires_grad_(index in PLACES or index % 31 != 7)
    cuts = [0, 1, 1, 30, 31, COUNT // 2 + 5, COUNT]
    return cls([{"params": params[a:b]} for a, b in zip(cuts, cuts[1:], strict=False)], **HYPER)


def params_of(opt: Any) -> list[Any]:
    """All its parameters."""
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(*optimizers: Any, step: int) -> None:
    """The same to all: new tensors, some as the parameter lies in memory and some not, some none."""
    for opt in optimizers:
        for index, p in enumerate(params_of(opt)):
            if not p.requires_grad or (index not in PLACES and (index + step) % 13 == 0):
                p.grad = None
                continue
            grad = torch.full_like(p, 0.5 + (index + step) % 5).detach()
            if p.ndim == 2 and index not in PLACES and (index + step) % 10 == 6:
                grad = grad.t().contiguous().t()
            p.grad = grad


def warm_pair() -> tuple[Any, Any]:
    """Ours and torch's after three steps."""
    pair = optimizer(), optimizer(torch.optim.AdamW)
    for step in range(3):
        give_gradients(*pair, step=step)
        for opt in pair:
            opt.step()
    return pair


def assert_agree(ours: Any, theirs: Any) -> None:
    """Weights and states."""
    tolerance, _ = TOLERANCES["host_logic_in_float64"]
    pairs = list(zip(params_of(ours), params_of(theirs), strict=True))
    stored = [(p.detach(), q.detach()) for p, q in pairs]
    stored += [(ours.state[p][key], value) for p, q in pairs for key, value in theirs.state[q].items()]
    got, expected = (torch.cat([value.double().flatten() for value in side]) for side in zip(*stored, strict=True))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_every_kind_of_parameter_and_gradient(watch: str) -> None:
    """Parameters and gradients of all kinds, which come and go, in groups of all sizes: what torch makes of them."""
    pair = warm_pair()
    for step in range(3, 7):
        give_gradients(*pair, step=step)
        for opt in pair:
            opt.step()
        assert_agree(*pair)


def answer(opt: Any) -> Any:
    """What the watch says of the tensors as they are now: None if the plan must be built anew."""
    stepper = opt._internals.stepper
    with torch._C.DisableTorchFunctionSubclass():
        result = stepper.watch.sweep(stepper.lists, stepper.state)
    stepper.watch.release()
    return result


def replace_entry(opt: Any, p: Any) -> None:
    """Another dict in the place of its state."""
    opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def replace_moment(opt: Any, p: Any) -> None:
    """Another tensor in the place of a moment."""
    opt.state[p]["exp_avg"] = torch.full_like(opt.state[p]["exp_avg"], 0.25)


def thaw(opt: Any, p: Any) -> None:
    """The frozen parameter after this one gets its first gradient."""
    params = params_of(opt)
    place = next(index for index, q in enumerate(params) if q is p)
    first = next(q for q in params[place:] + params if not q.requires_grad and q.numel())
    first.grad = torch.ones_like(first)


def set_attribute(name: str, make: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """A change of a parameter."""
    return lambda opt, p: setattr(p, name, make(p))


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "weights-elsewhere": set_attribute("data", lambda p: p.data.clone()),
    "weights-transposed": set_attribute("data", lambda p: p.data.t().contiguous().t()),
    "gradient-transposed": set_attribute("grad", lambda p: p.grad.t().contiguous().t()),
    "no-gradient": set_attribute("grad", lambda p: None),
    "first-gradient": thaw,
    "moment-elsewhere": lambda opt, p: setattr(opt.state[p]["exp_avg"], "data", opt.state[p]["exp_avg"].data.clone()),
    "moment-replaced": replace_moment,
    "moment-set": lambda opt, p: opt.state[p]["exp_avg_sq"].set_(opt.state[p]["exp_avg_sq"].clone()),
    "entry-replaced": replace_entry,
    "entry-gone": lambda opt, p: opt.state.pop(p),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_anywhere_is_noticed(change: str, place: int) -> None:
    """Whatever changed, and whoever looked at it: torch's optimizer, after the same change, has the same weights."""
    pair = warm_pair()
    give_gradients(*pair, step=3)
    before = answer(pair[0])
    assert before is not None and place not in before
    for opt in pair:
        CHANGES[change](opt, params_of(opt)[place])
    after = answer(pair[0])
    if change == "gradient-transposed":
        assert place in after
    elif change == "no-gradient":
        assert after is not None
    else:
        assert after is None
    for step in range(4, 6):
        for opt in pair:
            opt.step()
        assert_agree(*pair)
        give_gradients(*pair, step=step)


def few(count: int = 3) -> list[Any]:
    """Parameters with gradients."""
    params: list[Any] = [torch.nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for _ in range(count)]
    for p in params:
        p.grad = torch.linspace(-1, 1, 3, dtype=torch.float64)
    return params


@pytest.mark.parametrize(
    ("count", "threads", "parts"), [(101, 1, 1), (101, 2, 2), (16, 2, 1), (17, 2, 2), (101, 64, 1), (101, 8, 7)]
)
def test_as_many_threads_share_as_it_is_worth(count: int, threads: int, parts: int) -> None:
    """From so many parameters a thread on, and not where most of the threads would be woken for nothing."""
    if tensor_watch.load_native()[0] is None:
        pytest.skip(tensor_watch.load_native()[1])
    torch.set_num_threads(threads)
    opt = FusedAdamW(few(count), **HYPER)
    opt.step()
    opt.step()
    assert opt._internals.stepper.watch.parts == parts  # type: ignore[union-attr]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux lists a process's threads")
def test_no_thread_ends_between_steps() -> None:
    """GNU OpenMP ends threads where a team is smaller than the one before, and starts others for the next."""
    torch.set_num_threads(8)
    params = [torch.nn.Parameter(torch.ones(1 << 12)) for _ in range(9)]  # worth two threads' while
    for p in params:
        p.grad = torch.ones_like(p)
    opt = FusedAdamW(params, backend="cpu", **HYPER)
    large = torch.ones(1 << 20)
    opt.step()
    large.add_(1)
    threads = set(os.listdir("/proc/self/task"))
    for _ in range(5):
        opt.step()
        large.add_(1)
        assert threads <= set(os.listdir("/proc/self/task"))


class Meddling(torch.nn.Parameter):
    """A parameter whose property named grad does something else besides."""

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient, elsewhere."""
        getattr(self, "meddle", lambda: None)()
        return getattr(self, "kept", None)

    @grad.setter
    def grad(self, grad: torch.Tensor | None) -> None:
        self.kept = grad


def set_gradient(p: Any, step: int) -> None:
    """A new gradient."""
    p.grad = torch.full((3,), 0.5 + step, dtype=torch.float64)


MEDDLING: dict[str, Callable[[Any, int], None]] = {
    "gradient": set_gradient,
    "no-gradient": lambda p, step: setattr(p, "grad", None if step % 2 else torch.ones(3, dtype=torch.float64)),
    "weights": lambda p, step: setattr(p, "data", p.data.clone()),
}


def meddle_once(what: str, step: int, others: list[Any]) -> Callable[[], None]:
    """A function that changes the others when it is called for the first time."""
    todo = [*others]

    def meddle() -> None:
        while todo:
            MEDDLING[what](todo.pop(), step)

    return meddle


@pytest.mark.parametrize("what", MEDDLING)
def test_properties_are_read_before_anything_is_compared(what: str, watch: str) -> None:
    """A property that changes the other parameters, as one that fetches what was moved away: torch's weights."""
    pair = []
    for cls in (FusedAdamW, torch.optim.AdamW):
        meddling: Any = Meddling(torch.full((3,), 0.5, dtype=torch.float64))
        pair.append(cls([meddling, *few()], **HYPER))
    for step in range(6):
        for opt in pair:
            first, *others = params_of(opt)
            set_gradient(first, 0)
            first.meddle = meddle_once(what, step, others)
            opt.step()
        assert_agree(*pair)


def test_a_property_that_steps_again(watch: str) -> None:
    """Nothing is held for good where a property comes back to the same watch."""
    meddling: Any = Meddling(torch.full((3,), 0.5, dtype=torch.float64))
    params = [*few(), meddling, *few()]
    opt = FusedAdamW(params, **HYPER)
    set_gradient(meddling, 0)
    opt.step()
    opt.step()
    before = [sys.getrefcount(p) for p in params]
    for _ in range(5):
        nested = iter([True])
        meddling.meddle = lambda nested=nested: answer(opt) if next(nested, False) else None
        opt.step()
    assert [sys.getrefcount(p) for p in params] == before


def test_gradients_that_are_copied_when_written(watch: str) -> None:
    """A gradient that shares its memory until either is written needs the caller; the plan stays."""
    params = few(COUNT)
    opt, theirs = FusedAdamW(params, **HYPER), torch.optim.AdamW(few(1), **HYPER)
    for step in range(4):
        gradient = torch.full((3,), 0.5 + step, dtype=torch.float64)
        for p in (*params, *params_of(theirs)):
            p.grad = torch._lazy_clone(gradient)
        if step > 1:
            assert answer(opt) is not None
        opt.step()
        theirs.step()
    tolerance, _ = TOLERANCES["host_logic_in_float64"]
    for p in params:
        torch.testing.assert_close(p, params_of(theirs)[0], rtol=tolerance, atol=tolerance)


def test_versions_are_counted() -> None:
    """A step counts every parameter that has a gradient as written, once, and no other."""
    opt, _ = warm_pair()
    give_gradients(opt, step=3)
    before = [p._version for p in params_of(opt)]
    opt.step()
    after = [p._version for p in params_of(opt)]
    expected = [version + (p.grad is not None) for version, p in zip(before, params_of(opt), strict=True)]
    assert after == expected


def test_nothing_is_held_after_a_step(watch: str) -> None:
    """References are counted right by whichever thread: none is left, and none too many is given back."""
    opt, _ = warm_pair()
    before = [sys.getrefcount(p) for p in params_of(opt)]
    for step in range(3, 40):
        give_gradients(opt, step=step)
        opt.step()
    assert [sys.getrefcount(p) for p in params_of(opt)] == before
    gradients = [weakref.ref(p.grad) for p in params_of(opt) if p.grad is not None]
    opt.zero_grad()
    gc.collect()
    assert len(gradients) > COUNT // 2
    assert not any(gradient() is not None for gradient in gradients)


def test_one_gradient_of_all(watch: str) -> None:
    """All parameters share one gradient, whose references all threads count."""
    params = [torch.nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for _ in range(COUNT)]
    gradient = torch.linspace(-1, 1, 3, dtype=torch.float64)
    opt, theirs = (
        FusedAdamW(params, **HYPER),
        torch.optim.AdamW([torch.nn.Parameter(params[0].detach().clone())], **HYPER),
    )
    before = sys.getrefcount(gradient)
    for _ in range(30):
        for p in (*params, *params_of(theirs)):
            p.grad = gradient
        opt.step()
        theirs.step()
        for p in (*params, *params_of(theirs)):
            p.grad = None
        assert sys.getrefcount(gradient) == before
    tolerance, _ = TOLERANCES["host_logic_in_float64"]
    for p in params:
        torch.testing.assert_close(p, params_of(theirs)[0], rtol=tolerance, atol=tolerance)


def test_parameters_that_are_listed_twice(watch: str) -> None:
    """They step once (torch warns of them), and their references are counted by one thread at a time."""
    params = [torch.nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for _ in range(COUNT)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = FusedAdamW([*params, *params], **HYPER)
    once = FusedAdamW([torch.nn.Parameter(params[0].detach().clone())], **HYPER)
    counts = []
    for _ in range(30):
        for p in (*params, *params_of(once)):
            p.grad = torch.linspace(-1, 1, 3, dtype=torch.float64)
        opt.step()
        once.step()
        counts.append([sys.getrefcount(p) for p in params])
    assert all(count == counts[0] for count in counts)
    assert all(torch.equal(p, params_of(once)[0]) for p in params)


def test_a_tensor_of_the_state_cannot_be_swapped() -> None:
    """Warm steps look at a state tensor's implementation, not for it: torch swaps none that somebody has an eye on."""
    if tensor_watch.load_native()[0] is None:
        pytest.skip(tensor_watch.load_native()[1])
    opt, _ = warm_pair()
    give_gradients(opt, step=3)
    p = params_of(opt)[0]
    moment = opt.state[p]["exp_avg"]
    with pytest.raises(RuntimeError, match="Expected no weakrefs"):
        torch.utils.swap_tensors(moment, torch.zeros_like(moment))
    opt.step()
