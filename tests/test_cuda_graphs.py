"""CUDA graphs: a captured step, replayed, gives the bits of eager steps, with hyperparameters that stay live.

Every test of replays runs on each kind of graph this machine has. "recorded" needs no GPU: tables are kept in CPU
memory as they would be on a GPU, uploads included, and whatever would be enqueued on the device during a capture is
remembered instead of run. It shows that the host sends the right words at the right time; that CUDA can capture what we
enqueue, only the others show.
"""

import copy
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CPU, HAS_GPU
from pairs import SHAPES, Gradients, assert_same_bits, assert_unchanged, copies, make_params, params_of, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from adamw_kernels import FusedAdamW, backends, fused_adamw_, launch_table, release_gradients
from adamw_kernels.launch_table import UPLOADS_IN_FLIGHT, LaunchTable, Upload

# --- a graph without a GPU ------------------------------------------------------------------------------------------


class FakeEvent:
    """Stands for `torch.cuda.Event`; notes in `log` what is asked of it."""

    log: list[tuple[str, int]] = []
    made = 0

    def __init__(self) -> None:
        """Number it."""
        self.number = FakeEvent.made
        FakeEvent.made += 1

    def record(self, stream: object) -> None:
        """Note it."""
        assert stream == "the current stream"
        self.log.append(("record", self.number))

    def synchronize(self) -> None:
        """Note it."""
        self.log.append(("synchronize", self.number))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uploads work without a GPU: ordinary memory instead of pinned memory, events that note what happens."""
    empty = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(FakeEvent, "log", [])
    monkeypatch.setattr(FakeEvent, "made", 0)


class PretendedGpu:
    """What a table's device is during a capture: equal to the CPU, where its tensors are, and of type "cuda"."""

    type = "cuda"

    def __eq__(self, other: object) -> bool:
        """Whether it is the CPU."""
        return other == CPU

    def __hash__(self) -> int:
        """The CPU's."""
        return hash(CPU)

    def __str__(self) -> str:
        """As messages show it."""
        return "cuda:0"


class Recording(TorchDispatchMode):
    """Stands for a stream: runs what is enqueued on it, or remembers it while a graph is being captured."""

    def __init__(self) -> None:
        """Nothing is device memory yet."""
        super().__init__()
        self.device_memory: set[int] = set()
        self.work: list[Callable[[], Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A tensor operation: work for the device if it writes device memory."""
        kwargs = kwargs or {}
        writes = func._schema.is_mutable and args[0].untyped_storage().data_ptr() in self.device_memory
        if not writes or self.work is None:
            return func(*args, **kwargs)
        self.work.append(lambda: func(*args, **kwargs))
        return args[0]

    def enqueue(self, work: Callable[[], Any]) -> None:
        """A kernel launch."""
        if self.work is None:
            work()
        else:
            self.work.append(work)

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        """Remember what `function` enqueues; what is returned replays it."""
        work: list[Callable[[], Any]] = []
        self.work = work
        try:
            with self:
                function()
        finally:
            self.work = None

        def replay() -> None:
            for each in work:
                each()

        return replay


def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Make tables in CPU memory behave as on a GPU."""
    recording = Recording()

    class Launcher:
        """A table's backend, behind the recording."""

        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def launch(self, table: LaunchTable, stages: int) -> None:
            recording.enqueue(lambda: self.backend.launch(table, stages))

        def warm_up(self, table: LaunchTable, stages: int) -> None:
            self.backend.warm_up(table, stages)

    class Table(LaunchTable):
        """A table whose device copies of gradients' addresses and hyperparameters are sent by uploads."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._uploads = (Upload(self.grads, CPU), Upload(self._hyper_words, CPU))
            self.device_grads, self.hypers = (upload.on_device for upload in self._uploads)
            for i, tensor in enumerate((self.device_grads, self.hypers), 1):
                assert self._struct[i] != tensor.data_ptr()
                self._struct[i] = tensor.data_ptr()
            for tensor in (*self._device_tensors(), self.verdict.signals, self.verdict.decision):
                recording.device_memory.add(tensor.untyped_storage().data_ptr())
            self.backend = Launcher(self.backend)

        @property
        def device(self) -> Any:
            return PretendedGpu() if recording.work is not None else CPU

        @device.setter
        def device(self, value: torch.device) -> None:
            assert value == CPU

    monkeypatch.setattr(launch_table, "LaunchTable", Table)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording.work is not None)
    return recording


class Graphs:
    """A way to capture: where tensors go, and what makes a replayable graph of a function."""

    def __init__(self, device: torch.device, capture: Callable[[Callable[[], Any]], Callable[[], None]]) -> None:
        """Remember both."""
        self.device = device
        self.capture = capture


def capture_on_gpu(function: Callable[[], Any]) -> Callable[[], None]:
    """Capture what `function` does on the current GPU; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="captures a CUDA graph, which needs a GPU")


@pytest.fixture(params=["recorded", pytest.param("triton", marks=needs_gpu), pytest.param("cuda", marks=needs_gpu)])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Each kind of graph: recorded on a CPU, captured on a GPU with either backend."""
    if request.param == "recorded":
        monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpu")
        request.getfixturevalue("fake_cuda")
        return Graphs(CPU, recorded_graphs(monkeypatch).capture)
    device = torch.device("cuda", 0)
    reason = backends.why_not(request.param, device)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, request.param)
    return Graphs(device, capture_on_gpu)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A list whose only element says whether a graph is being captured, as far as anybody asks."""
    answer = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answer[0])
    yield answer


# --- one upload -----------------------------------------------------------------------------------------------------


def pinned_slot(upload: Upload) -> torch.Tensor:
    """Return the memory from which the last eager copy was sent."""
    return upload._pinned[upload._slot]


@pytest.mark.usefixtures("fake_cuda")
def test_eager_uploads_are_sent_when_something_changed() -> None:
    """The first time, and after a change; the copy leaves from another slot each time."""
    words = array("q", [1, 2, 3])
    upload = Upload(words, CPU)
    assert not upload.is_current()
    upload.send()
    assert upload.is_current() and upload.on_device.tolist() == [1, 2, 3]
    upload.send()
    assert FakeEvent.log == [("synchronize", 0), ("record", 0)]
    words[1] = 7
    assert not upload.is_current()
    upload.send()
    assert upload.on_device.tolist() == [1, 7, 3]
    assert FakeEvent.log[2:] == [("synchronize", 1), ("record", 1)]


@pytest.mark.usefixtures("fake_cuda")
def test_slots_are_reused_after_their_copy_has_arrived() -> None:
    """A round of slots in order; each is waited for, and only then written, before it is sent again."""
    words = array("q", [0])
    upload = Upload(words, CPU)
    addresses = []
    for i in range(2 * UPLOADS_IN_FLIGHT):
        words[0] = i + 1
        upload.send()
        addresses.append(pinned_slot(upload).data_ptr())
    assert addresses[:UPLOADS_IN_FLIGHT] == addresses[UPLOADS_IN_FLIGHT:]
    assert len(set(addresses)) == UPLOADS_IN_FLIGHT
    order = [*range(UPLOADS_IN_FLIGHT)] * 2
    assert FakeEvent.log == [(what, slot) for slot in order for what in ("synchronize", "record")]


@pytest.mark.usefixtures("fake_cuda")
def test_an_interrupted_upload_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happened before the copy was recorded, the next step does not take it for done."""
    upload = Upload(array("q", [1, 2]), CPU)

    def interrupt(event: FakeEvent, stream: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeEvent, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            upload.send()
    assert not upload.is_current()
    upload.on_device.zero_()
    upload.send()
    assert upload.on_device.tolist() == [1, 2]


@pytest.mark.usefixtures("fake_cuda")
def test_a_captured_upload_has_memory_of_its_own() -> None:
    """It leaves from a slot that eager uploads never write, and that lives as long as the upload."""
    words = array("q", [1, 2, 3])
    upload = Upload(words, CPU)
    upload.send()
    words[0] = 4
    upload.capture()
    (slot,) = upload._captured
    assert slot.tolist() == [4, 2, 3]
    assert slot.untyped_storage().data_ptr() != upload._pinned.untyped_storage().data_ptr()
    for i in range(3 * UPLOADS_IN_FLIGHT):
        words[0] = 10 + i
        upload.send()
    assert slot.tolist() == [4, 2, 3]
    words[0] = 5
    upload.capture()
    assert [each.tolist() for each in upload._captured] == [[4, 2, 3], [5, 2, 3]]
    assert upload._captured[0] is slot
    assert len({each.data_ptr() for each in upload._captured}) == 2


@pytest.mark.usefixtures("fake_cuda")
def test_after_a_capture_eager_uploads_are_always_sent() -> None:
    """A replay overwrites the words on the device, and nobody is told."""
    upload = Upload(array("q", [1, 2]), CPU)
    upload.send()
    upload.capture()
    upload.send()
    upload.on_device.zero_()  # a replay
    upload.send()
    assert upload.on_device.tolist() == [1, 2]
    assert [what for what, _ in FakeEvent.log].count("record") == 3


@pytest.mark.usefixtures("fake_cuda")
def test_a_second_capture_needs_an_eager_step() -> None:
    """Pinned memory cannot be allocated during a capture: the next eager upload allocates it, and says so meanwhile."""
    upload = Upload(array("q", [1]), CPU)
    upload.capture()
    with pytest.raises(RuntimeError, match="take one eager step before capturing it again"):
        upload.capture()
    assert len(upload._captured) == 1
    upload.send()
    upload.capture()
    assert len(upload._captured) == 2


# --- a step replayed ------------------------------------------------------------------------------------------------

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


class Pair:
    """An optimizer whose steps are replayed, and one that takes them eagerly, on the same gradients.

    The replayed one's gradients stay where they are and get new values, as within a captured backward.
    """

    def __init__(
        self,
        graphs: Graphs,
        *,
        groups: int = 1,
        dtype: torch.dtype = torch.float32,
        shapes: tuple[tuple[int, ...], ...] = SHAPES,
        **options: Any,
    ) -> None:
        """Take one eager step with each, then capture one."""
        self.graphs = graphs
        params = make_params(graphs.device, dtype, shapes)
        self.replayed, self.eager = (
            FusedAdamW(self._grouped(copies(params), groups), **{**HYPER, **copy.deepcopy(options)}) for _ in range(2)
        )
        self.gradients = Gradients()
        self.gradients.give(params_of(self.replayed), params_of(self.eager))
        self.step_eagerly()
        self.replay = self.capture()

    @staticmethod
    def _grouped(params: list[torch.nn.Parameter], groups: int) -> Any:
        return [{"params": params[i::groups], "lr": 0.01 * (i + 1)} for i in range(groups)] if groups > 1 else params

    def both(self, change: Callable[[FusedAdamW], Any]) -> None:
        """Change both optimizers."""
        change(self.replayed)
        change(self.eager)

    def renew(self, factor: float = 1.0) -> None:
        """Give new gradients: to the replayed one in the same memory."""
        static = [p.grad for p in params_of(self.replayed)]
        self.gradients.give(params_of(self.replayed), params_of(self.eager))
        for p, q, grad in zip(params_of(self.replayed), params_of(self.eager), static, strict=True):
            q.grad *= factor
            p.grad = grad.copy_(q.grad)

    def step_eagerly(self) -> None:
        """One eager step of both."""
        self.both(FusedAdamW.step)

    def capture(self) -> Callable[[], None]:
        """Capture a step of the replayed one, which changes nothing but host memory."""
        before = snapshot(self.replayed)
        replay = self.graphs.capture(self.replayed.step)
        assert_unchanged(before, snapshot(self.replayed))
        return replay

    def check(self) -> None:
        """Compare weights, states and what the last step found."""
        assert_same_bits(self.replayed, self.eager)
        assert torch.equal(self.replayed.skipped_steps, self.eager.skipped_steps)
        assert torch.equal(self.replayed.last_step_skipped, self.eager.last_step_skipped)
        if self.eager._measures():
            assert torch.equal(self.replayed.grad_norm, self.eager.grad_norm)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": dict(dtype=torch.bfloat16),
    "float64": dict(dtype=torch.float64),
    "groups": dict(groups=3),
    "amsgrad-l2": dict(amsgrad=True, decoupled=False, maximize=True),
    "cautious": dict(cautious=True, cautious_weight_decay=True),
    "clip": dict(max_grad_norm=0.5),
    "clip-per-group": dict(groups=2, max_grad_norm=0.5, clip_per_group=True),
    "ema": dict(ema_decay=0.9, ema_warmup=True),
    "bfloat16-ema": dict(ema_decay=0.9, ema_format="bfloat16"),
    "stochastic": dict(dtype=torch.bfloat16, param_format="stochastic", moment_format="bfloat16", seed=3),
    "split24-8bit": dict(
        dtype=torch.float16, shapes=((67, 63), (7,)), param_format="split24", moment_format="8bit", seed=3
    ),
    "everything": dict(
        groups=2,
        max_grad_norm=0.5,
        ema_decay=0.9,
        ema_format="bfloat16",
        amsgrad=True,
        skip_nonfinite=True,
        max_skip_norm=100.0,
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_replays_equal_eager_steps(graphs: Graphs, options: str) -> None:
    """Five replays with new gradients in the captured memory: every bit of weights, states and norms.

    Step counts move on the device, and with them bias corrections, warm-up and random bits.
    """
    pair = Pair(graphs, **OPTIONS[options])
    for _ in range(5):
        pair.renew()
        pair.replay()
        pair.eager.step()
        pair.check()
    assert all(entry["step"] == 6 for entry in pair.replayed.state.values())


@pytest.mark.parametrize("guard", [dict(skip_nonfinite=True), dict(max_skip_norm=50.0)], ids=["nonfinite", "norm"])
def test_steps_are_skipped_within_a_graph(graphs: Graphs, guard: dict[str, Any]) -> None:
    """A replay with a bad gradient changes nothing and is counted; the next one goes on."""
    pair = Pair(graphs, ema_decay=0.9, **guard)
    for factor in (1.0, torch.inf if "skip_nonfinite" in guard else 1e4, 1.0):
        pair.renew(factor)
        before = snapshot(pair.replayed)
        pair.replay()
        pair.eager.step()
        pair.check()
        if factor != 1.0:
            assert_unchanged(before, snapshot(pair.replayed))
        assert pair.replayed.last_step_skipped.item() == (factor != 1.0)
    assert pair.replayed.skipped_steps.item() == 1


# --- live hyperparameters -------------------------------------------------------------------------------------------


def test_a_schedule_of_floats_is_uploaded_between_replays(graphs: Graphs) -> None:
    """`upload_hyperparameters` brings a scheduler's rates, and other floats, to the replays that follow."""
    pair = Pair(graphs, groups=2, max_grad_norm=0.5, ema_decay=0.9)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (pair.replayed, pair.eager)]
    for step in range(4):
        for scheduler, opt in zip(schedulers, (pair.replayed, pair.eager), strict=True):
            opt._opt_called = True  # a replay is not seen by the scheduler, which would warn
            scheduler.step()
        options = dict(betas=(0.1 * step, 0.5), eps=0.1, weight_decay=0.3, max_grad_norm=0.2, ema_decay=0.1 * step)
        pair.both(lambda opt, options=options: opt.param_groups[1].update(options))
        pair.renew()
        pair.replayed.upload_hyperparameters()
        pair.replay()
        pair.eager.step()
        pair.check()


def test_without_an_upload_replays_keep_the_old_floats(graphs: Graphs) -> None:
    """Documented: a float changed on the host reaches no replay by itself; the upload changes no weight."""
    pair = Pair(graphs)
    pair.replayed.param_groups[0]["lr"] = 0.5
    pair.renew()
    pair.replay()
    pair.eager.step()  # at the old rate
    pair.check()
    pair.eager.param_groups[0]["lr"] = 0.5
    pair.replayed.upload_hyperparameters()
    pair.check()
    pair.renew()
    pair.replay()
    pair.eager.step()
    pair.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_on_the_device_are_read_by_each_replay(graphs: Graphs, dtype: torch.dtype) -> None:
    """Every hyperparameter as a tensor, changed in place between replays: no call is needed."""

    def tensor(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype, device=graphs.device)

    pair = Pair(
        graphs,
        lr=tensor(0.01),
        betas=(tensor(0.9), tensor(0.99)),
        eps=tensor(1e-8),
        weight_decay=tensor(0.1),
        max_grad_norm=tensor(0.5),
        ema_decay=tensor(0.9),
    )
    for step in range(3):
        for opt in (pair.replayed, pair.eager):
            group = opt.param_groups[0]
            group["lr"].mul_(0.5)
            group["betas"][0].fill_(0.3 * step)
            group["betas"][1].fill_(0.5 + 0.1 * step)
            group["eps"].fill_(10.0**-step)
            group["weight_decay"].fill_(0.2 * step)
            group["max_grad_norm"].fill_(0.1 + step)
            group["ema_decay"].fill_(0.4 * step)
        pair.renew()
        pair.replay()
        pair.eager.step()
        pair.check()


def test_a_schedule_on_a_tensor_rate_needs_no_upload(graphs: Graphs) -> None:
    """Schedulers write into a tensor in place."""
    pair = Pair(graphs, lr=torch.tensor(0.01, device=graphs.device))
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5) for opt in (pair.replayed, pair.eager)]
    for _ in range(3):
        for scheduler, opt in zip(schedulers, (pair.replayed, pair.eager), strict=True):
            opt._opt_called = True
            scheduler.step()
        pair.renew()
        pair.replay()
        pair.eager.step()
        pair.check()
    assert pair.replayed.param_groups[0]["lr"].item() == pytest.approx(0.01 / 8, rel=1e-6)


def test_rates_on_the_cpu_are_uploaded(graphs: Graphs) -> None:
    """A CPU tensor beside parameters on a GPU is read by the host, at the upload."""
    if graphs.device == CPU:
        pytest.skip("beside recorded graphs every tensor is on the device")
    pair = Pair(graphs, lr=torch.tensor(0.01))
    for rate in (0.5, 0.25):
        pair.both(lambda opt, rate=rate: opt.param_groups[0]["lr"].fill_(rate))
        pair.renew()
        pair.replayed.upload_hyperparameters()
        pair.replay()
        pair.eager.step()
        pair.check()


def test_an_upload_of_what_does_not_fit(graphs: Graphs) -> None:
    """A value out of range is refused and nothing is sent; with the value mended, replays go on."""
    pair = Pair(graphs, groups=2)
    pair.replayed.param_groups[0]["lr"] = 0.5
    pair.replayed.param_groups[1]["betas"] = (1.0, 0.9)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: beta1 is 1.0; expected 0 <= beta1 < 1"):
        pair.replayed.upload_hyperparameters()
    pair.renew()
    pair.replay()
    pair.eager.step()  # with all the old values
    pair.check()
    pair.eager.param_groups[0]["lr"] = 0.5
    pair.replayed.param_groups[1]["betas"] = HYPER["betas"]
    pair.replayed.upload_hyperparameters()
    pair.replay()
    pair.eager.step()
    pair.check()


def new_group(opt: FusedAdamW) -> None:
    """Add a parameter."""
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device=params_of(opt)[0].device))]})


STRUCTURAL: dict[str, Callable[[FusedAdamW], Any]] = {
    "amsgrad": lambda opt: opt.param_groups[0].update(amsgrad=True),
    "cautious": lambda opt: opt.param_groups[0].update(cautious=True),
    "ema": lambda opt: opt.param_groups[0].update(ema_decay=0.9),
    "clip": lambda opt: opt.param_groups[0].update(max_grad_norm=1.0),
    "group": new_group,
    "load": lambda opt: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("change", STRUCTURAL)
def test_an_upload_that_the_graph_cannot_follow(graphs: Graphs, change: str) -> None:
    """An option, a group or a state that changed needs a new capture, and the error says so.

    Also after an eager step, which builds a plan that fits, and that the graph does not know. A new capture follows.
    """
    pair = Pair(graphs)
    pair.both(STRUCTURAL[change])
    with pytest.raises(RuntimeError, match="capture again"):
        pair.replayed.upload_hyperparameters()
    for opt in (pair.replayed, pair.eager):
        for p in params_of(opt):
            p.grad = torch.ones_like(p)
    pair.step_eagerly()
    if change != "load":
        with pytest.raises(RuntimeError, match="capture again"):
            pair.replayed.upload_hyperparameters()
    pair.replay = pair.capture()
    pair.replayed.upload_hyperparameters()
    pair.renew()
    pair.replay()
    pair.eager.step()
    pair.check()


def test_an_upload_before_the_first_step(device: torch.device) -> None:
    """There is nothing to send yet, and nothing happens."""
    opt = FusedAdamW(make_params(device))
    opt.upload_hyperparameters()
    assert not opt.state


# --- eager steps and other graphs between replays -------------------------------------------------------------------


def test_eager_steps_between_replays(graphs: Graphs) -> None:
    """Replays and eager steps in turn, on gradients in different memory: each reads its own, by the current rates."""
    pair = Pair(graphs, max_grad_norm=0.5)
    static = [p.grad for p in params_of(pair.replayed)]
    for step in range(4):
        for p, grad in zip(params_of(pair.replayed), static, strict=True):
            p.grad = grad
        pair.renew()
        pair.replay()
        pair.eager.step()
        pair.check()
        pair.gradients.give(params_of(pair.replayed), params_of(pair.eager))  # in fresh memory
        for grad in static:
            grad.fill_(torch.nan)
        pair.both(lambda opt, step=step: opt.param_groups[0].update(lr=0.01 * (step + 1)))
        pair.step_eagerly()
        pair.check()
        pair.step_eagerly()
        pair.check()


def test_two_graphs_of_one_optimizer(graphs: Graphs) -> None:
    """Captured with an eager step in between, on different gradients; replayed in any order."""
    pair = Pair(graphs)
    first, static = pair.replay, [p.grad for p in params_of(pair.replayed)]
    with pytest.raises(RuntimeError, match="take one eager step before capturing it again"):
        pair.capture()
    pair.gradients.give(params_of(pair.replayed), params_of(pair.eager))
    pair.step_eagerly()
    second, other = pair.capture(), [p.grad for p in params_of(pair.replayed)]
    for replay, grads in ((second, other), (first, static), (first, static), (second, other)):
        for p, grad in zip(params_of(pair.replayed), grads, strict=True):
            p.grad = grad
        pair.renew()
        for grad in static if grads is other else other:
            grad.fill_(torch.nan)
        replay()
        pair.eager.step()
        pair.check()


def test_graphs_outlive_the_plan_they_were_captured_with(graphs: Graphs) -> None:
    """A new group makes the optimizer build new tables; the old graph goes on with the old ones, which are kept."""
    pair = Pair(graphs)
    plan = pair.replayed._internals.stepper.plan  # type: ignore[union-attr]
    new_group(pair.replayed)
    (*old, new), static = params_of(pair.replayed), [p.grad for p in params_of(pair.replayed)[:-1]]
    for p in old:
        p.grad = None
    new.grad = torch.ones_like(new)
    pair.replayed.step()
    assert pair.replayed._internals.stepper.plan is not plan  # type: ignore[union-attr]
    assert pair.replayed._internals.captured == [plan]
    for q, grad in zip(params_of(pair.eager), static, strict=True):
        q.grad = grad.normal_().clone()
    pair.replay()
    pair.eager.step()
    for p, q in zip(old, params_of(pair.eager), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(pair.replayed.state[p]["exp_avg_sq"], pair.eager.state[q]["exp_avg_sq"])


def test_parameters_without_a_gradient_at_the_capture(graphs: Graphs) -> None:
    """A graph updates those that had one when it was captured, and no others, whatever happened before and after."""
    pair = Pair(graphs)
    idle = params_of(pair.replayed)[1]
    grad, idle.grad = idle.grad, None
    pair.replayed.step()
    replay = pair.capture()
    idle.grad = grad
    before, others = idle.detach().clone(), [p.detach().clone() for p in params_of(pair.replayed)[::2]]
    replay()
    assert torch.equal(idle, before)
    assert all(not torch.equal(p, q) for p, q in zip(params_of(pair.replayed)[::2], others, strict=True))


def test_an_optimizer_over_captured_tables_can_be_copied(graphs: Graphs) -> None:
    """A copy of it takes eager steps, and has to be captured anew."""
    pair = Pair(graphs)
    other = copy.deepcopy(pair.replayed)
    pair.gradients.give(params_of(other), params_of(pair.eager))
    other.step()
    pair.eager.step()
    assert_same_bits(other, pair.eager)
    assert not other._internals.captured


def test_steps_of_released_gradients_in_a_graph(graphs: Graphs) -> None:
    """Steps that hooks take while a backward is captured: replayed with new gradients and, once uploaded, new rates."""
    params = make_params(graphs.device, torch.float32)
    released, eager = (FusedAdamW(copies(params), ema_decay=0.9, **HYPER) for _ in range(2))
    model = torch.nn.ParameterList(params_of(released))
    release_gradients(model, released)
    gradients = Gradients()
    gradients.give(params_of(released), params_of(eager))
    static = [p.grad for p in params_of(released)]

    def backward() -> None:
        for p, grad in zip(params_of(released), static, strict=True):
            p.grad = grad
            for hook in p._post_accumulate_grad_hooks.values():  # as autograd and FSDP2 call them
                hook(p)
            assert p.grad is None
        released.step()

    backward()
    eager.step()
    before = snapshot(released)
    replay = graphs.capture(backward)
    assert_unchanged(before, snapshot(released))
    for step in range(3):
        gradients.give(static, params_of(eager))
        for grad in static:
            grad.copy_(grad.grad)
            grad.grad = None
        for opt in (released, eager):
            opt.param_groups[0]["lr"] = 0.1 * (step + 1)
        released.upload_hyperparameters()
        replay()
        eager.step()
        assert_same_bits(released, eager)


# --- loss scaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
def test_scale_and_flag_are_read_by_each_replay(graphs: Graphs, shape: tuple[int, ...]) -> None:
    """What GradScaler hands over with `fused=True`: tensors whose values change between replays, skips included."""

    def signal(opt: FusedAdamW) -> None:
        opt.grad_scale = torch.full(shape, 4.0, device=graphs.device)
        opt.found_inf = torch.zeros(shape, device=graphs.device)

    params = make_params(graphs.device)
    opts = [FusedAdamW(copies(params), fused=True, max_grad_norm=0.5, **HYPER) for _ in range(2)]
    replayed, eager = opts
    for opt in opts:
        signal(opt)
    gradients = Gradients()
    gradients.give(*map(params_of, opts))
    for opt in opts:
        opt.step()
    static = [p.grad for p in params_of(replayed)]
    replay = graphs.capture(replayed.step)
    for scale, flag in ((4.0, 0.0), (2.0, 0.0), (2.0, 2.0), (1.0, torch.nan), (1024.0, 0.0)):
        gradients.give(*map(params_of, opts))
        for p, grad in zip(params_of(replayed), static, strict=True):
            p.grad = grad.copy_(p.grad)
        for opt in opts:
            opt.grad_scale.fill_(scale)
            opt.found_inf.fill_(flag)
        replay()
        eager.step()
        assert_same_bits(replayed, eager)
        assert torch.equal(replayed.grad_norm, eager.grad_norm)
    assert replayed.skipped_steps.item() == 2
    # A replay leaves its scale on the device: a step without one must not divide by it.
    gradients.give(*map(params_of, opts))
    kept = [(opt.grad_scale, opt.found_inf) for opt in opts]  # the graph reads them
    for opt in opts:
        del opt.grad_scale, opt.found_inf
        opt.step()
    replay()
    for opt in opts:
        opt.step()
    assert replayed.grad_norm.item() == eager.grad_norm.item()
    del kept


# --- what cannot be captured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, *(key for key in STRUCTURAL if key != "load"), "gradient"])
def test_a_step_that_would_build_tables_cannot_be_captured(graphs: Graphs, change: str | None) -> None:
    """Before the first step, after a changed option, with a first gradient: the error says to take an eager step.

    Nothing is written, and after that step the capture works.
    """
    params = make_params(graphs.device, torch.float32)
    opt = FusedAdamW(params, **HYPER)
    Gradients().give(params, present=[True, change != "gradient", True])
    if change is not None:
        opt.step()
    if change == "gradient":
        params[1].grad = torch.ones_like(params[1])
    elif change is not None:
        STRUCTURAL[change](opt)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="Take one eager step before the capture"):
        graphs.capture(opt.step)
    assert_unchanged(before, snapshot(opt))
    opt.step()
    before = snapshot(opt)
    replay = graphs.capture(opt.step)
    assert_unchanged(before, snapshot(opt))
    replay()
    assert [*(entry["step"].item() for entry in opt.state.values())][0] >= 2


def test_changed_floats_cannot_be_captured(graphs: Graphs) -> None:
    """Sending them would be repeated by each replay; after the upload that the error names, the capture works."""
    pair = Pair(graphs)
    pair.step_eagerly()  # which reserves memory for a second graph
    pair.both(lambda opt: opt.param_groups[0].update(lr=0.3))
    with pytest.raises(RuntimeError, match=r"Call upload_hyperparameters\(\) before the capture"):
        pair.capture()
    pair.check()
    pair.replayed.upload_hyperparameters()
    replay = pair.capture()
    pair.renew()
    replay()
    pair.eager.step()
    pair.check()


def test_an_upload_cannot_be_captured(graphs: Graphs) -> None:
    """It would be repeated by each replay."""
    pair = Pair(graphs)
    pair.replayed.param_groups[0]["lr"] = 0.3
    with pytest.raises(RuntimeError, match=r"upload_hyperparameters\(\) belongs between replays"):
        graphs.capture(pair.replayed.upload_hyperparameters)


def test_lists_cannot_be_captured(graphs: Graphs) -> None:
    """`fused_adamw_` builds tables on each call; it says so and writes nothing."""
    p, grad, m, v = (torch.ones(3, device=graphs.device) for _ in range(4))
    step = torch.zeros((), device=graphs.device)
    with pytest.raises(RuntimeError, match="fused_adamw_ builds its launch table on each call"):
        graphs.capture(lambda: fused_adamw_([p], [grad], [m], [v], [], [step], lr=0.1))
    assert step.item() == 0 and torch.equal(p, torch.ones_like(p))


def test_parameters_on_a_cpu_cannot_be_captured(capturing: list[bool]) -> None:
    """A graph replays what a GPU does: a step on the CPU would be taken once, at the capture, and never again."""
    params = make_params(CPU)
    opt = FusedAdamW(params)
    Gradients().give(params)
    opt.step()
    before = snapshot(opt)
    capturing[0] = True
    with pytest.raises(RuntimeError, match="parameters with gradients on cpu: a graph replays the work of one GPU"):
        opt.step()
    capturing[0] = False
    assert_unchanged(before, snapshot(opt))
    opt.step()
    assert all(entry["step"] == 2 for entry in opt.state.values())


def test_parameters_on_several_devices_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, fake_cuda: None, capturing: list[bool]
) -> None:
    """The error names the devices."""
    recorded_graphs(monkeypatch)
    params = make_params(CPU)
    opt = FusedAdamW(params)
    Gradients().give(params)
    opt.step()
    plan: Any = opt._internals.stepper.plan  # type: ignore[union-attr]
    plan.tables.append(plan.tables[0])
    before = snapshot(opt)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="gradients on cpu, cpu: a graph replays the work of one GPU"):
        opt.step()
    assert_unchanged(before, snapshot(opt))


# --- whole iterations -----------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("released", [False, True], ids=["ordinary", "released"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_whole_iteration_in_a_graph(monkeypatch: pytest.MonkeyPatch, backend: str, released: bool) -> None:
    """Forward, backward with gradients allocated in the graph, and step: the losses and weights of the eager loop.

    Also with gradients released in backward, whose plans hear of uploaded rates too; and eager iterations after it.
    """
    device = torch.device("cuda", 0)
    reason = backends.why_not(backend, device)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, backend)
    torch.manual_seed(0)
    original = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(device)
    options: dict[str, Any] = {"ema_decay": 0.9} if released else {"ema_decay": 0.9, "max_grad_norm": 0.1}
    models = [copy.deepcopy(original) for _ in range(2)]
    opts = [FusedAdamW(model.parameters(), lr=0.01, **options) for model in models]
    if released:
        release_gradients(models[1], opts[1])
    x = torch.zeros(5, 8, device=device)
    losses = [torch.zeros((), device=device) for _ in range(2)]

    def iterate(i: int) -> None:
        losses[i].copy_(models[i](x).square().mean().detach())
        models[i](x).square().mean().backward()
        opts[i].step()

    def eagerly(i: int) -> None:
        opts[i].zero_grad()
        iterate(i)

    def check() -> None:
        assert torch.equal(*losses)
        assert_same_bits(*opts)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's manual warms up
        for step in range(3):
            x.normal_(generator=torch.Generator(device).manual_seed(step))
            for i in range(2):
                eagerly(i)
    torch.cuda.current_stream().wait_stream(side)
    check()
    opts[1].zero_grad()  # so that backward allocates in the graph's memory
    replay = capture_on_gpu(lambda: iterate(1))
    for step in range(3, 8):
        x.normal_(generator=torch.Generator(device).manual_seed(step))
        for opt in opts:
            opt.param_groups[0]["lr"] = 0.01 / step
        eagerly(0)
        opts[1].upload_hyperparameters()
        replay()
        check()
    opts[1].zero_grad()
    for step in range(8, 10):
        x.normal_(generator=torch.Generator(device).manual_seed(step))
        for i in range(2):
            eagerly(i)
        check()
        eagerly(0)
        replay()
        check()
