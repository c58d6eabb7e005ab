"""A good citizen of torch: autograd, garbage collection, fork, threads and every kind of parameter stay as they were.

What a step remembers of the last one is tested for both implementations that watch over it, the native one and its twin
in Python: they must notice the same changes, and keep nothing alive.
"""

import copy
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, Path
from pairs import (
    Gradients,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    copies,
    make_params,
    params_of,
    snapshot,
)
from torch.distributed.checkpoint import state_dict as dcp
from torch.utils._python_dispatch import TorchDispatchMode

from adamw_kernels import FusedAdamW, tensor_watch
from adamw_kernels.tensor_watch import PythonTensorWatch

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SQUARES = ((3, 3), (4,), (2, 2), (5,))
ASKS_WHO_RECORDS = tensor_watch.load_native()[0] is not None


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch, and so the CPU path, use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step_all(gradients: Gradients, *optimizers: torch.optim.Optimizer, steps: int = 1) -> None:
    """Give all the same gradients, except parameters that are frozen, and step."""
    for _ in range(steps):
        lists = [params_of(opt) for opt in optimizers]
        gradients.give(*lists, present=[p.requires_grad for p in lists[0]])
        for opt in optimizers:
            opt.step()


# --- what a step notices ----------------------------------------------------------------------------------------------


def make_watched(device: torch.device, make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return an optimizer with two groups; the last parameter of the second never had a gradient."""
    first, second, third, idle = make_params(device, shapes=SQUARES)
    idle.requires_grad_(False)
    return make([{"params": [first, second]}, {"params": [third, idle], "amsgrad": True}], **HYPER)


def parameter(opt: torch.optim.Optimizer, index: int) -> torch.nn.Parameter:
    """Return a parameter by its place over all groups."""
    return params_of(opt)[index]


def replace_by_clone(opt: torch.optim.Optimizer, index: int, key: str) -> None:
    """Put a copy in the place of a state tensor."""
    state = opt.state[parameter(opt, index)]
    state[key] = state[key].clone()


def change_memory(p: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give a parameter other memory."""
    p.data = change(p.data)


def new_param(device: torch.device, shape: tuple[int, ...] = (3, 3)) -> torch.nn.Parameter:
    """Return a parameter that no optimizer has seen."""
    return make_params(device, shapes=(shape,), seed=8)[0]


CHANGES: dict[str, Callable[[Any, torch.device], Any]] = {
    "parameter-replaced": lambda opt, d: opt.param_groups[0]["params"].__setitem__(0, new_param(d)),
    "parameter-replaced-in-the-same-memory": lambda opt, d: opt.param_groups[0]["params"].__setitem__(
        0, torch.nn.Parameter(parameter(opt, 0).detach())
    ),
    "idle-parameter-replaced": lambda opt, d: opt.param_groups[1]["params"].__setitem__(1, new_param(d)),
    "parameters-reversed": lambda opt, d: opt.param_groups[0]["params"].reverse(),
    "parameter-appended": lambda opt, d: opt.param_groups[0]["params"].append(new_param(d)),
    "parameter-removed": lambda opt, d: opt.param_groups[0]["params"].pop(),
    "last-parameters-removed": lambda opt, d: opt.param_groups[1]["params"].clear(),
    "group-added": lambda opt, d: opt.add_param_group({"params": [new_param(d)]}),
    "group-removed": lambda opt, d: opt.param_groups.pop(),
    "groups-swapped": lambda opt, d: opt.param_groups.reverse(),
    "other-memory": lambda opt, d: change_memory(parameter(opt, 0), torch.clone),
    "other-strides-at-the-same-address": lambda opt, d: change_memory(parameter(opt, 0), torch.t),
    "first-gradient": lambda opt, d: parameter(opt, 3).requires_grad_(),
    "state-cleared": lambda opt, d: opt.state.clear(),
    "state-popped": lambda opt, d: opt.state.pop(parameter(opt, 1)),
    "state-emptied": lambda opt, d: opt.state[parameter(opt, 1)].clear(),
    "step-replaced": lambda opt, d: opt.state[parameter(opt, 1)].update(step=torch.tensor(11.0)),
    "first-moment-replaced": lambda opt, d: replace_by_clone(opt, 0, "exp_avg"),
    "second-moment-replaced": lambda opt, d: replace_by_clone(opt, 1, "exp_avg_sq"),
    "maximum-replaced": lambda opt, d: replace_by_clone(opt, 2, "max_exp_avg_sq"),
    "moment-transposed-at-the-same-address": lambda opt, d: opt.state[parameter(opt, 0)].update(
        exp_avg=opt.state[parameter(opt, 0)]["exp_avg"].t()
    ),
    "moment-in-other-memory": lambda opt, d: change_memory(opt.state[parameter(opt, 0)]["exp_avg"], torch.clone),
    "step-in-other-memory": lambda opt, d: change_memory(opt.state[parameter(opt, 0)]["step"], torch.clone),
    "maximize-toggled": lambda opt, d: opt.param_groups[0].update(maximize=True),
    "amsgrad-switched-off": lambda opt, d: opt.param_groups[1].update(amsgrad=False),
    "decay-toggled": lambda opt, d: opt.param_groups[0].update(decoupled_weight_decay=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(device: torch.device, watch: str, change: str) -> None:
    """What invalidates an address or a flag makes the next step build its table anew, and end up where torch does."""
    ours, theirs = make_watched(device, FusedAdamW), make_watched(device, torch.optim.AdamW)
    gradients = Gradients()
    step_all(gradients, ours, theirs, steps=2)
    assert isinstance(ours._internals.stepper.watch, PythonTensorWatch) == (watch == "python")
    plan = ours._internals.stepper.plan
    for opt in (ours, theirs):
        CHANGES[change](opt, device)
    step_all(gradients, ours, theirs)
    assert ours._internals.stepper.plan is not plan
    step_all(gradients, ours, theirs)
    assert_agree(ours, theirs)


def transpose_gradients(opt: torch.optim.Optimizer) -> None:
    """Give matrices gradients in another layout."""
    for p in params_of(opt):
        if p.grad is not None and p.ndim == 2:
            p.grad = p.grad.t().contiguous().t()


class GradientSubclass(torch.Tensor):
    """A tensor of another type."""


def subclass_gradients(opt: torch.optim.Optimizer) -> None:
    """Give every parameter a gradient of another type."""
    for p in params_of(opt):
        if p.grad is not None:
            p.grad = p.grad.as_subclass(GradientSubclass)


def drop_gradient(opt: torch.optim.Optimizer) -> None:
    """Take one gradient away."""
    parameter(opt, 1).grad = None


def write_in_place(opt: torch.optim.Optimizer) -> None:
    """Write into parameters and moments where they are."""
    with torch.no_grad():
        parameter(opt, 0).mul_(0.5)
        opt.state[parameter(opt, 0)]["exp_avg"].zero_()


NOT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "new-gradients": lambda opt: None,
    "gradient-gone": drop_gradient,
    "gradients-transposed": transpose_gradients,
    "gradients-of-another-type": subclass_gradients,
    "gradients-of-parameter-type": lambda opt: setattr(
        parameter(opt, 0), "grad", torch.nn.Parameter(parameter(opt, 0).grad, requires_grad=False)
    ),
    "written-in-place": write_in_place,
    "rate-and-decay": lambda opt: opt.param_groups[1].update(lr=0.3, weight_decay=0.0),
    "betas-and-eps": lambda opt: opt.param_groups[0].update(betas=(0.5, 0.9), eps=1e-3),
    "users-own-state": lambda opt: opt.state[parameter(opt, 0)].update(average=torch.ones(3)),
    "frozen": lambda opt: parameter(opt, 0).requires_grad_(False),
}


@pytest.mark.parametrize("event", NOT_CHANGES)
def test_what_is_no_change_costs_nothing(device: torch.device, watch: str, event: str) -> None:
    """Gradients that move, come and go or look different, rates and values written in place leave the table alone."""
    ours, theirs = make_watched(device, FusedAdamW), make_watched(device, torch.optim.AdamW)
    gradients = Gradients()
    step_all(gradients, ours, theirs, steps=2)
    plan = ours._internals.stepper.plan
    for _ in range(2):
        gradients.give(params_of(ours), params_of(theirs), present=[p.requires_grad for p in params_of(ours)])
        for opt in (ours, theirs):
            if parameter(opt, 0).grad is not None or event == "frozen":
                NOT_CHANGES[event](opt)
            opt.step()
        assert ours._internals.stepper.plan is plan
    step_all(gradients, ours, theirs)
    assert ours._internals.stepper.plan is plan
    assert_agree(ours, theirs)


def short_moment(opt: FusedAdamW, p: torch.Tensor) -> None:
    """A moment cut short at the same address."""
    opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"][:2]


def short_parameter(opt: FusedAdamW, p: torch.Tensor) -> None:
    """A parameter cut short at the same address; its gradient is cut too, its moments are not."""
    p.grad = None
    p.data = p.data[:2]
    p.grad = torch.ones_like(p)


def complex_gradient(opt: FusedAdamW, p: torch.Tensor) -> None:
    """A gradient in a dtype that fits no kernel."""
    p.grad = None
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.complex64, device=p.device)


def sparse_gradient(opt: FusedAdamW, p: torch.Tensor) -> None:
    """A sparse gradient."""
    p.grad = None
    p.grad = torch.ones_like(p).to_sparse()


SPOILERS = [short_moment, short_parameter, complex_gradient, sparse_gradient]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_does_not_fit_is_found_in_a_warm_step(
    device: torch.device, watch: str, spoil: Callable[[FusedAdamW, torch.Tensor], None]
) -> None:
    """An error in the middle of training names the parameter; nothing is written, no version moves, no step counts."""
    opt = FusedAdamW(make_params(device, torch.float32, shapes=SQUARES), **HYPER)
    gradients = Gradients()
    step_all(gradients, opt, steps=2)
    gradients.give(params_of(opt))
    spoil(opt, parameter(opt, 1))
    before, versions = snapshot(opt), [p._version for p in params_of(opt)]
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"param_groups\[0\]\['params'\]\[1\]"):
            opt.step()
        assert_unchanged(before, snapshot(opt))
        assert [p._version for p in params_of(opt)] == versions


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_version_counters_move_for_what_is_written(path: Path, dtype: torch.dtype) -> None:
    """A step moves the version of each parameter with a gradient, first time and later; of nothing else."""
    first, second, idle = (torch.nn.Parameter(torch.ones(3, 3, dtype=dtype, device=path.device)) for _ in range(3))
    opt = FusedAdamW([first, second, idle])
    for with_second in (True, True, False, True):
        first.grad = torch.ones(3, 3, dtype=dtype, device=path.device).t()
        second.grad = torch.ones_like(second) if with_second else None
        views = [p.detach() for p in (first, second, idle)]
        versions = [tensor._version for tensor in (first, second, idle, first.grad, *views)]
        opt.step()
        after = [tensor._version for tensor in (first, second, idle, first.grad, *views)]
        moved = [b > a for a, b in zip(versions, after, strict=True)]
        assert moved == [True, with_second, False, False, True, with_second, False]


@pytest.mark.parametrize("updated", [True, False])
def test_autograd_notices_the_update(path: Path, updated: bool) -> None:
    """Backward through a weight saved before a step is an error; through one that had no gradient it is not."""
    used, other = (torch.nn.Parameter(torch.full((3,), 2.0, device=path.device)) for _ in range(2))
    opt = FusedAdamW([used, other])
    for _ in range(2):  # a first step and a warm one
        loss = used.pow(3).sum()
        opt.zero_grad()
        (used if updated else other).grad = torch.ones(3, device=path.device)
        opt.step()
        if updated:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_parameters_stay_leaves(device: torch.device) -> None:
    """No step leaves a trace in the graph: no grad_fn, same requires_grad, gradients untouched."""
    opt = FusedAdamW(make_params(device), **HYPER)
    gradients = Gradients()
    for _ in range(2):
        gradients.give(params_of(opt))
        before = [p.grad.clone() for p in params_of(opt)]
        held = [p.grad for p in params_of(opt)]
        opt.step()
        for p, value, grad in zip(params_of(opt), before, held, strict=True):
            assert p.is_leaf and p.requires_grad and p.grad_fn is None
            assert p.grad is grad and torch.equal(grad, value)
            assert not any(tensor.requires_grad for tensor in opt.state[p].values())


# --- what is kept alive -----------------------------------------------------------------------------------------------


def test_gradients_are_freed(device: torch.device, watch: str) -> None:
    """After `zero_grad` nothing holds a gradient: not one read as it was, re-laid, or met in a step that failed."""
    opt = FusedAdamW(make_params(device, shapes=SQUARES), **HYPER)
    gradients = Gradients()
    for spoiled in (False, False, True):
        gradients.give(params_of(opt))
        transpose_gradients(opt)
        references = [weakref.ref(p.grad) for p in params_of(opt)]
        if spoiled:
            opt.param_groups[0]["lr"] = float("nan")
            with pytest.raises(ValueError):
                opt.step()
        else:
            opt.step()
        opt.zero_grad()
        assert [reference() for reference in references] == [None] * 4


def test_old_parameters_and_states_are_freed(device: torch.device, watch: str) -> None:
    """A parameter that left the groups and the state is gone, with its moments, even before the next step."""
    opt = FusedAdamW(make_params(device), **HYPER)
    gradients = Gradients()
    step_all(gradients, opt, steps=2)
    p = parameter(opt, 0)
    references = [weakref.ref(tensor) for tensor in (p, p.grad, *opt.state.pop(p).values())]
    opt.param_groups[0]["params"][0] = torch.nn.Parameter(p.detach().clone())
    del p
    assert [reference() for reference in references] == [None] * 5
    replaced = weakref.ref(opt.state[parameter(opt, 1)]["exp_avg"])
    replace_by_clone(opt, 1, "exp_avg")
    assert replaced() is None
    step_all(gradients, opt)
    cleared = [weakref.ref(tensor) for entry in opt.state.values() for tensor in entry.values()]
    opt.state.clear()
    assert len(cleared) == 9 and not any(reference() is not None for reference in cleared)
    step_all(gradients, opt)


def test_old_learning_rates_are_freed(device: torch.device) -> None:
    """A tensor learning rate is let go by the first step that no longer reads it."""
    opt = FusedAdamW(make_params(device), **{**HYPER, "lr": 0.1})
    rate = torch.tensor(0.1, device=device)
    opt.param_groups[0]["lr"] = rate
    gradients = Gradients()
    step_all(gradients, opt)
    reference = weakref.ref(rate)
    del rate
    opt.param_groups[0]["lr"] = 0.2
    step_all(gradients, opt)
    assert reference() is None


def test_an_optimizer_is_freed(device: torch.device, watch: str) -> None:
    """Deleting the optimizer frees it and its state; parameters stay their owner's."""
    params = make_params(device)
    counts = [sys.getrefcount(p) for p in params]
    opt = FusedAdamW(params, **HYPER)
    step_all(Gradients(), opt, steps=2)
    plan = opt._internals.stepper.plan
    references = [weakref.ref(kept) for kept in (opt, plan, opt.state[params[0]]["exp_avg"])]
    del plan
    del opt
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert [sys.getrefcount(p) for p in params] == counts


def test_weak_references_to_parameters_are_none(device: torch.device, watch: str) -> None:
    """Torch refuses to swap a tensor that has weak references, so a step leaves none on parameters."""
    opt = FusedAdamW(make_params(device), **HYPER)
    step_all(Gradients(), opt, steps=2)
    assert [weakref.getweakrefcount(p) for p in params_of(opt)] == [0, 0, 0]


@pytest.mark.parametrize("rebuild", [False, True], ids=["warm", "rebuilding"])
def test_nothing_grows_over_thousands_of_steps(device: torch.device, watch: str, rebuild: bool) -> None:
    """New gradients, rates, gradients that go, layouts and rebuilt tables leave no object and no memory behind."""
    opt = FusedAdamW(make_params(device, torch.float32), **HYPER)
    first, second, third = params_of(opt)
    steps = 1500 if rebuild else 2000

    def run(count: int) -> None:
        for i in range(count):
            first.grad = torch.ones(5, 3, device=device).t() if i % 5 == 0 else torch.ones(3, 5, device=device)
            second.grad = None if i % 3 == 0 else torch.ones(7, device=device)
            third.grad = torch.ones((), device=device)
            opt.param_groups[0]["lr"] = 1e-3 / (1 + i) if i % 2 else torch.tensor(1e-3, device=device)
            if rebuild:
                opt.state.pop(first, None)
            opt.step()
        opt.zero_grad()
        gc.collect()

    def tensors() -> int:
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    run(steps)  # Python and torch fill caches of their own first
    # Blocks, not tracemalloc's bytes: it goes on counting what extension modules freed until the address is used again.
    objects, tensors_before, blocks = len(gc.get_objects()), tensors(), sys.getallocatedblocks()
    run(steps)
    # Anything kept per step would be far beyond these bounds; what Python itself caches is far below.
    assert sys.getallocatedblocks() - blocks < steps / 4
    assert len(gc.get_objects()) - objects < steps / 10
    assert tensors() == tensors_before
    assert weakref.getweakrefcount(opt.state[second]["exp_avg"]) <= 1


class CountOperations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        """Nothing was seen."""
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation and let it run."""
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_warm_step_runs_no_torch_operation(device: torch.device, watch: str) -> None:
    """On the CPU a warm step calls no operation of torch; on a GPU it allocates no memory there."""
    opt = FusedAdamW(make_params(device, torch.float32), **HYPER)
    gradients = Gradients()
    step_all(gradients, opt, steps=2)
    rate = torch.tensor(0.1, device=device)
    for i in range(6):
        gradients.give(params_of(opt), present=[True, i % 2 == 0, True])
        if i < 3:
            opt.param_groups[0].update(lr=0.1 * i, weight_decay=0.2 * i)
        elif i == 3:
            opt.param_groups[0]["lr"] = rate
            opt.step()  # checks the new tensor
        else:
            rate.fill_(0.1 * i)
        if device.type == "cuda":
            key = "allocation.all.allocated"
            before = torch.cuda.memory_stats(device)[key]
            opt.step()
            assert torch.cuda.memory_stats(device)[key] == before
        else:
            with CountOperations() as counted:
                opt.step()
            # Torch's range around any step, only where the native module cannot say that nobody records.
            named_range = [name for name in counted.seen if name.startswith("profiler.")]
            assert counted.seen == ([] if ASKS_WHO_RECORDS else named_range)


def test_random_numbers_are_the_users(path: Path) -> None:
    """No step draws from torch's generators."""
    opt = FusedAdamW(make_params(path.device, torch.bfloat16), **HYPER)
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if path.device.type == "cuda" else [])
    step_all(Gradients(), opt, steps=2)
    after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if path.device.type == "cuda" else [])
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


# --- fork and threads -------------------------------------------------------------------------------------------------

LIMIT_S = 60  # a hang fails; nothing else takes long


def in_forked_child(function: Callable[[], bytes]) -> bytes:
    """Return what `function` returns in a forked child; a child that hangs is killed and fails the test."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT_S)
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(function())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed, or hung until it was killed"
    return result


def large_optimizer() -> FusedAdamW:
    """Return an optimizer that two threads share, of tensors that torch's own operations do not share."""
    params = [torch.nn.Parameter(torch.full((1 << 14,), 0.1 * i)) for i in range(8)]
    for i, p in enumerate(params):
        p.grad = torch.linspace(-1, 1 + i, 1 << 14)
    return FusedAdamW(params, backend="cpu", **HYPER)


def weights_as_bytes(opt: FusedAdamW) -> bytes:
    """Return every weight's bits."""
    return b"".join(p.detach().numpy().tobytes() for p in params_of(opt))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("child", ["steps-on", "starts-anew", "forks-again"])
def test_fork_after_stepping_on_two_threads(two_threads: None, child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's threads do not survive a fork: the child steps without them, to the bits of its parent with them."""
    monkeypatch.setattr(tensor_watch, "PARAMS_PER_THREAD", 1)  # kernels are shared, and so is the look at tensors
    opt = large_optimizer()
    opt.step()

    def steps_on() -> bytes:
        opt.step()
        return weights_as_bytes(opt)

    def starts_anew() -> bytes:
        fresh = large_optimizer()
        fresh.step()
        fresh.step()
        return weights_as_bytes(fresh)

    functions = {
        "steps-on": steps_on,
        "starts-anew": starts_anew,
        "forks-again": lambda: in_forked_child(steps_on),
    }
    result = in_forked_child(functions[child])
    opt.step()
    assert result == weights_as_bytes(opt)


FORK_BEFORE_THE_FIRST_STEP = """
import os, signal, sys
import torch
from adamw_kernels import FusedAdamW, tensor_watch

assert "adamw_kernels._C" in sys.modules
tensor_watch.PARAMS_PER_THREAD = 1
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1).sum()  # torch's own operations start the threads
params = [torch.nn.Parameter(torch.ones(1 << 14)) for _ in range(8)]
for p in params:
    p.grad = torch.ones(1 << 14)
optimizer = FusedAdamW(params, backend="cpu")
pid = os.fork()
if pid == 0:
    signal.alarm(int(sys.argv[1]))
    optimizer.step()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_before_the_first_step() -> None:
    """Nor do threads that torch started: a child whose parent never took a step does not wait for them."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(tensor_watch.__file__)))
    done = subprocess.run(
        [sys.executable, "-c", FORK_BEFORE_THE_FIRST_STEP, str(LIMIT_S)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def run_in_thread(*functions: Callable[[], Any]) -> None:
    """Run each function in a thread of its own, all at once, and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "hung"
    if errors:
        raise errors[0]


def test_stepping_from_another_thread(path: Path) -> None:
    """An optimizer made in one thread steps in another, first step or later, to the same bits."""
    here, there = (FusedAdamW(make_params(path.device, torch.float32), **HYPER) for _ in range(2))
    gradients = Gradients()
    for in_thread in (True, False, True):
        gradients.give(params_of(here), params_of(there))
        here.step()
        if in_thread:
            run_in_thread(there.step)
        else:
            there.step()
    assert_same_bits(here, there)


def test_optimizers_in_several_threads_at_once(two_threads: None, watch: str) -> None:
    """The interpreter lock is released while elements are updated; optimizers in different threads do not meet."""
    judge, *others = (large_optimizer() for _ in range(4))

    def train(opt: FusedAdamW) -> None:
        for _ in range(20):
            opt.step()

    train(judge)
    run_in_thread(*[lambda opt=opt: train(opt) for opt in others])
    for opt in others:
        assert_same_bits(judge, opt)


# --- kinds of parameters ----------------------------------------------------------------------------------------------


class CountingParameter(torch.nn.Parameter):
    """Notes every torch function that it meets."""

    calls: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and pass on."""
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class RefusingParameter(torch.nn.Parameter):
    """Lets no torch function through."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse."""
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("kind", [CountingParameter, RefusingParameter], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_subclasses_are_not_called(device: torch.device, watch: str, kind: Any, dtype: torch.dtype) -> None:
    """A step calls no `__torch_function__`, when building its table or later, and updates like any parameter."""
    plain = make_params(device, dtype, shapes=((2, 3), (4,)))
    with torch._C.DisableTorchFunctionSubclass():
        own = [kind(p.detach().clone()) for p in plain]
        ours, judge = FusedAdamW(own, **HYPER), FusedAdamW(plain, **HYPER)
    for i in range(3):
        with torch._C.DisableTorchFunctionSubclass():
            Gradients(i).give(own, plain)
            if i == 2:
                own[1].grad = plain[1].grad = None
                own[0].grad = own[0].grad.t().contiguous().t()
        CountingParameter.calls.clear()
        ours.step()
        assert CountingParameter.calls == []
        judge.step()
    with torch._C.DisableTorchFunctionSubclass():
        assert all(type(p) is kind for p in params_of(ours))
        assert_same_bits(ours, judge)
        assert {type(value) for entry in ours.state.values() for value in entry.values()} == {torch.Tensor}


def test_lazy_modules(device: torch.device, watch: str) -> None:
    """Uninitialised parameters wait in the groups; once the first batch gave them a shape, they train like others."""
    lazy, judge = torch.nn.LazyLinear(2, device=device), torch.nn.Linear(3, 2, device=device)
    opt = FusedAdamW(lazy.parameters(), **HYPER)
    opt.step()
    opt.step()
    assert not opt.state
    with pytest.raises(RuntimeError):  # torch's: nothing without a shape has a gradient
        lazy.weight.grad = torch.ones(2, 3, device=device)
    x = torch.ones(4, 3, device=device)
    lazy(x)
    with torch.no_grad():
        for p, q in zip(lazy.parameters(), judge.parameters(), strict=True):
            p.copy_(q)
    beside = FusedAdamW(judge.parameters(), **HYPER)
    for _ in range(3):
        for model, o in ((lazy, opt), (judge, beside)):
            o.zero_grad()
            model(x).square().sum().backward()
            o.step()
    assert_same_bits(opt, beside)


def test_recurrent_weights(path: Path) -> None:
    """An LSTM's weights, which its kernels read from one flat buffer, are updated where they are."""
    torch.manual_seed(0)
    models = [torch.nn.LSTM(2, 3).to(path.device, torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.flatten_parameters()
    ours = FusedAdamW(models[0].parameters(), **HYPER)
    theirs = torch.optim.AdamW(models[1].parameters(), **HYPER)
    addresses = [p.data_ptr() for p in params_of(ours)]
    x = torch.linspace(-1, 1, 8, dtype=torch.float64, device=path.device).view(4, 1, 2)
    outputs = []
    for _ in range(3):
        outputs = []
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.zero_grad()
            outputs.append(model(x)[0].square().sum())
            outputs[-1].backward()
            opt.step()
    assert [p.data_ptr() for p in params_of(ours)] == addresses
    assert all(a is b for a, b in zip(models[0]._flat_weights, params_of(ours), strict=True))
    assert_agree(ours, theirs)


def test_parameters_in_one_flat_buffer(device: torch.device, watch: str) -> None:
    """Views of shared buffers train like parameters and gradients of their own; gaps between them stay as they were."""
    params = make_params(device, torch.float32)
    separate = FusedAdamW(copies(params), **HYPER)
    sizes = [p.numel() for p in params]
    buffers = [torch.full((sum(sizes) + 1 + len(sizes),), 7.0, device=device) for _ in range(2)]
    starts = [1 + sum(sizes[:i]) + i for i in range(len(sizes))]  # a gap of one element before and behind each
    flat = []
    for p, start in zip(params, starts, strict=True):
        view = buffers[0][start : start + p.numel()].view_as(p)
        view.copy_(p.detach())
        flat.append(torch.nn.Parameter(view))
    shared = FusedAdamW(flat, **HYPER)
    gradients = Gradients()
    for _ in range(3):
        gradients.give(params_of(separate), flat)
        for p, start in zip(flat, starts, strict=True):
            view = buffers[1][start : start + p.numel()].view_as(p)
            p.grad = view.copy_(p.grad)
        separate.step()
        shared.step()
    assert_same_bits(separate, shared)
    gaps = [start - 1 for start in starts] + [len(buffers[0]) - 1]
    assert all((buffer[gaps] == 7).all() for buffer in buffers)


def test_tied_weights(path: Path) -> None:
    """One Parameter in two modules is one parameter, updated once with the sum of its gradients."""
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        head.weight = embedding.weight
        models.append(torch.nn.Sequential(embedding, head).to(path.device, torch.float64))
    models[1].load_state_dict(models[0].state_dict())
    ours = FusedAdamW(models[0].parameters(), **HYPER)
    theirs = torch.optim.AdamW(models[1].parameters(), **HYPER)
    tokens = torch.tensor([0, 3, 3, 1], device=path.device)
    for _ in range(3):
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
            opt.step()
    assert len(params_of(ours)) == 1 and models[0][0].weight is models[0][1].weight
    assert_agree(ours, theirs)


def test_parameter_listed_twice(device: torch.device, watch: str) -> None:
    """Torch warns of a parameter listed twice in its group; it is updated once a step."""
    once, twice = make_params(device, shapes=((3,),)), make_params(device, shapes=((3,),))
    judge = FusedAdamW(once, **HYPER)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = FusedAdamW(twice * 2, **HYPER)
    plans = []
    for i in range(3):
        Gradients(i).give(once, twice)
        opt.step()
        judge.step()
        plans.append(opt._internals.stepper.plan)
    assert torch.equal(once[0], twice[0]) and float(opt.state[twice[0]]["step"]) == 3
    assert plans[0] is plans[1] is plans[2]


@pytest.mark.parametrize("overlap", ["whole", "part"])
def test_two_parameters_in_the_same_memory(device: torch.device, overlap: str) -> None:
    """Two Parameter objects that share memory have two moments for one weight: refused, naming both."""
    base = torch.ones(8, device=device)
    first = torch.nn.Parameter(base if overlap == "whole" else base[:5])
    second = torch.nn.Parameter(base if overlap == "whole" else base[4:])
    opt = FusedAdamW([("encoder", first), ("decoder", second)])
    for p in (first, second):
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"(?s)'(en|de)coder'.* and .*'(en|de)coder'.* share memory.*one Parameter"):
        opt.step()
    assert (base == 1).all()


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("convert", ["double", "bfloat16"])
def test_modules_converted_by_swapping(device: torch.device, watch: str, convert: str, swap: bool) -> None:
    """`module.to()` may swap the tensors behind the parameters instead of their data: it can, and training goes on."""
    model = torch.nn.Linear(3, 2, device=device)
    opt = FusedAdamW(model.parameters(), **HYPER)
    step_all(Gradients(), opt, steps=2)
    opt.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        getattr(model, convert)()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    weight = model.weight.detach().clone()
    step_all(Gradients(5), opt)
    assert all(p is q for p, q in zip(model.parameters(), params_of(opt), strict=True))
    assert float(opt.state[model.weight]["step"]) == 3 and not torch.equal(model.weight, weight)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(path: Path, dtype: torch.dtype, amsgrad: bool) -> None:
    """Complex parameters are updated through their real view, as torch's are, beside real ones."""
    name = "float32_against_torch" if dtype == torch.complex64 else "host_logic_in_float64"
    params = [*complex_params(path.device, dtype), *make_params(path.device, torch.empty(0, dtype=dtype).real.dtype)]
    ours, theirs = (cls(copies(params), amsgrad=amsgrad, **HYPER) for cls in (FusedAdamW, torch.optim.AdamW))
    plans = []
    for i in range(6):
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            generator = torch.Generator().manual_seed(100 * i + p.numel())
            values = torch.randn((*p.shape, 2), generator=generator, dtype=torch.float64)
            value = (torch.view_as_complex(values) if p.is_complex() else values[..., 0]).to(p.device, p.dtype)
            if p.is_complex() and i % 2:
                value = value.conj()  # lazily: the bytes are those before conjugation
                assert value.is_conj()
            p.grad, q.grad = (None, None) if (i, p.numel()) == (3, 6) else (value, value.clone())
        ours.step()
        theirs.step()
        plans.append(ours._internals.stepper.plan)
        if i == 3:
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
            state = ours.state[params_of(ours)[0]]
            state["exp_avg"] = state["exp_avg"].clone()
        if i == 4:
            for opt in (ours, theirs):
                parameter(opt, 0).data = parameter(opt, 0).data.clone()
    assert_agree(ours, theirs, name)
    assert plans[0] is plans[1] is plans[2] is plans[3]
    assert plans[3] is not plans[4] and plans[4] is not plans[5], "changes are noticed"
    assert all(ours.state[p]["exp_avg"].dtype == p.dtype for p in params_of(ours))


def complex_params(device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return complex parameters with something in both parts."""
    parts = [make_params(device, torch.float64, shapes=((2, 3), ()), seed=seed) for seed in (1, 2)]
    return [torch.nn.Parameter(torch.complex(a.detach(), b.detach()).to(dtype)) for a, b in zip(*parts, strict=True)]


# --- DTensor ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A device mesh of one process."""
    if not dist.is_available():
        pytest.skip("torch.distributed is not available")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield dist.init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


def sharded(params: list[torch.nn.Parameter], mesh: Any) -> list[torch.nn.Parameter]:
    """Return DTensor parameters of the same values, matrices sharded and the rest replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return [
        torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0) if p.ndim == 2 else Replicate()]))
        for p in params
    ]


def give_sharded(gradients: Gradients, plain: list[Any], distributed: list[Any], mesh: Any, *, other: bool) -> None:
    """Give both the same gradients; `other`: placed in another way than their parameters."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    gradients.give(plain)
    for p, q in zip(plain, distributed, strict=True):
        q.grad = distribute_tensor(p.grad.clone(), mesh, q.placements)
        if other and q.ndim:
            q.grad = q.grad.redistribute(mesh, [Replicate() if q.placements == (Shard(0),) else Shard(0)])
            assert q.grad.placements != q.placements


def local_snapshot(opt: FusedAdamW) -> list[tuple[str, torch.Tensor]]:
    """Return copies of every weight and state tensor, of DTensors their local part."""
    return [(name, t.to_local() if hasattr(t, "to_local") else t) for name, t in snapshot(opt)]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_dtensor_parameters(mesh: Any, watch: str) -> None:
    """A DTensor's local shard is updated like a plain tensor; its moments are DTensors placed as it is."""
    from torch.distributed.tensor import DTensor

    plain = make_params(CPU)
    distributed = sharded(plain, mesh)
    judge, opt = FusedAdamW(plain, **HYPER), FusedAdamW(distributed, **HYPER)
    gradients = Gradients()
    plans = []
    for i in range(5):
        give_sharded(gradients, plain, distributed, mesh, other=i == 2)
        if i == 3:
            plain[1].grad = distributed[1].grad = None
        versions = [p._version for p in distributed]
        judge.step()
        opt.step()
        moved = [b > a for a, b in zip(versions, (p._version for p in distributed), strict=True)]
        assert moved == [True, i != 3, True]
        plans.append(opt._internals.stepper.plan)
    assert_unchanged(local_snapshot(judge), local_snapshot(opt))
    assert all(plan is plans[0] for plan in plans)
    for p in distributed:
        assert type(opt.state[p]["step"]) is torch.Tensor
        for key in ("exp_avg", "exp_avg_sq"):
            moment = opt.state[p][key]
            assert isinstance(moment, DTensor)
            assert (moment.placements, moment.device_mesh, moment.shape) == (p.placements, p.device_mesh, p.shape)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_dtensor_changes_are_noticed(mesh: Any, watch: str) -> None:
    """New local memory, new moments, plain parameters beside DTensors and a conversion of the module are followed."""
    plain = make_params(CPU)
    module = torch.nn.Module()
    for i, p in enumerate(sharded(plain, mesh)):
        module.register_parameter(f"p{i}", p)
    distributed = list(module.parameters())
    judge, opt = FusedAdamW(plain, **HYPER), FusedAdamW(distributed, **HYPER)
    gradients = Gradients()

    def step(*, rebuilt: bool) -> None:
        give_sharded(gradients, plain, distributed, mesh, other=False)
        plan = opt._internals.stepper and opt._internals.stepper.plan
        judge.step()
        opt.step()
        assert (opt._internals.stepper.plan is not plan) == rebuilt
        judge.zero_grad()
        opt.zero_grad()

    step(rebuilt=True)
    step(rebuilt=False)
    distributed[0]._local_tensor = distributed[0]._local_tensor.clone()
    step(rebuilt=True)
    state = opt.state[distributed[1]]
    state["exp_avg"] = state["exp_avg"].clone()
    step(rebuilt=True)
    assert_unchanged(local_snapshot(judge), local_snapshot(opt))
    for o in (judge, opt):
        o.add_param_group({"params": make_params(CPU, shapes=((2, 2),), seed=3)})
        o.param_groups[1]["params"][0].grad = torch.ones(2, 2, dtype=torch.float64)
    step(rebuilt=True)
    assert_unchanged(local_snapshot(judge), local_snapshot(opt))
    for o in (judge, opt):
        for key, value in [(k, v) for entry in o.state.values() for k, v in entry.items()]:
            assert key == "step" or value.dtype == torch.float64
    module.float()  # for DTensors torch swaps the tensors behind the parameters
    assert distributed[0].dtype == torch.float32 and all(
        p is q for p, q in zip(distributed, module.parameters(), strict=True)
    )
    for p in plain:
        p.data = p.data.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float64 moments are narrowed, which has a test of its own
        step(rebuilt=True)
    assert_unchanged(local_snapshot(judge), local_snapshot(opt))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_dtensor_checkpoints(mesh: Any, source: str) -> None:
    """DCP's getters and setters carry DTensor state from torch's optimizer and from ours; training goes on."""
    from torch.distributed.tensor import DTensor

    def make_module() -> torch.nn.Module:
        module = torch.nn.Module()
        for i, p in enumerate(sharded(make_params(CPU), mesh)):
            module.register_parameter(f"p{i}", p)
        return module

    saved_model, loaded_model = make_module(), make_module()
    saved = (FusedAdamW if source == "ours" else torch.optim.AdamW)(saved_model.parameters(), **HYPER)
    loaded = FusedAdamW(loaded_model.parameters(), lr=0.5)
    judge = FusedAdamW(make_params(CPU), **HYPER)
    gradients = Gradients()

    def step(*optimizers: torch.optim.Optimizer) -> None:
        gradients.give(params_of(judge))
        for opt in optimizers:
            for p, q in zip(params_of(judge), params_of(opt), strict=True):
                q.grad = torch.distributed.tensor.distribute_tensor(p.grad.clone(), mesh, q.placements)
            opt.step()
        judge.step()

    step(saved)
    step(saved)
    state = dcp.get_optimizer_state_dict(saved_model, saved)
    with torch.no_grad():
        for p, q in zip(loaded_model.parameters(), saved_model.parameters(), strict=True):
            p.copy_(q)
    dcp.set_optimizer_state_dict(loaded_model, loaded, state)
    assert all(isinstance(entry["exp_avg"], DTensor) for entry in loaded.state.values())
    step(loaded)
    got, expected = local_snapshot(loaded), local_snapshot(judge)
    if source == "ours":
        assert_unchanged(expected, got)
    else:
        assert [name for name, _ in got] == [name for name, _ in expected]
        for (name, a), (_, b) in zip(got, expected, strict=True):
            assert_close(a, b, "host_logic_in_float64", name)


def test_steps_moved_into_shared_memory(watch: str) -> None:
    """Sending steps to another process moves their memory in place; the table follows."""
    params = make_params(CPU, torch.float32)
    opt = FusedAdamW(params, **HYPER)
    for taken in range(1, 6):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        for p in params:
            assert opt.state[p]["step"].item() == taken
            opt.state[p]["step"].share_memory_()


@pytest.mark.parametrize("value", [None, 1.5], ids=str)
def test_a_state_entry_that_is_no_tensor_and_not_in_use(device: torch.device, watch: str, value: float | None) -> None:
    """What stands under the name of the running maximum is nobody's business without AMSGrad."""
    params = make_params(device, torch.float32)
    opt = FusedAdamW(params, **HYPER)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for p in params:
        opt.state[p]["max_exp_avg_sq"] = value
    params[0].grad = None
    opt._internals.stepper.plan = None
    if value is None:
        opt.step()
        assert [opt.state[p]["step"].item() for p in params] == [1.0, 2.0, 2.0]
    else:
        with pytest.raises(TypeError, match="max_exp_avg_sq of .* is float"):
            opt.step()


@pytest.mark.parametrize("which", ["param", "exp_avg"])
def test_released_storage_is_an_error(device: torch.device, watch: str, which: str) -> None:
    """A tensor whose memory an offloading hook released is named, and nothing is written."""
    params = make_params(device, torch.float32)
    opt = FusedAdamW(params, **HYPER)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = params[1].detach().clone()
    released = params[0] if which == "param" else opt.state[params[0]]["exp_avg"]
    released.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="bytes of memory"):
        opt.step()
    assert torch.equal(params[1], before)
