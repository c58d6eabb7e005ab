"""torch.distributed.checkpoint: what is saved on N ranks goes on, bit for bit, on M; what does not fit raises on all.

Four gloo processes run every scenario, most of them as worlds of one, two and four on one directory. The judge is one
process that trains without a break. A world of one has plain tensors, larger ones are sharded by FSDP2.
"""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pairs import bits, params_of
from processes import Scenarios
from tolerances import tolerance
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from adamw_kernels import FusedAdamW

pytestmark = pytest.mark.filterwarnings("ignore:param_format='native'")

WORLD = 4
SCENARIOS = scenario = Scenarios(__file__, WORLD, limit_s=240, scenario_limit_s=30)

STEPS = 3  # before the checkpoint
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
EVERYTHING: dict[str, Any] = dict(
    param_format="split24",
    moment_format="8bit",
    ema_decay=0.9,
    ema_format="bfloat16",
    decay_coupling="schedule",
    seed=7,
    **HYPER,
)
FORMATS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "split32 and float32": HYPER,
    "stochastic and bfloat16": dict(param_format="stochastic", moment_format="bfloat16", ema_decay=0.9, **HYPER),
}

# Rows that 2 and 4 ranks share evenly, unevenly, and of which the last ranks have none; a line of whole groups of 16 on
# every rank. What is large enough for 8 bits has them on 1, 2 and 4 ranks.
ALIGNED = {"even": (64, 80), "uneven": (66, 96), "few": (2, 3), "line": (4096,), "bias": (7,)}
# 8 bits on 1 and 2 ranks; on 1 rank alone.
OTHER_ON_4, OTHER_ON_1 = {"line": (4128,), "even": (64, 80)}, {"odd": (70, 81), "even": (64, 80)}


class Model(torch.nn.Module):
    """Parameters of given shapes, and nothing to compute."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> None:
        """The same for the same shapes, in every process."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def make_model(shapes: dict[str, tuple[int, ...]] = ALIGNED, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Sharded, if there is more than one rank."""
    model = Model(shapes, dtype)
    if dist.is_initialized() and dist.get_world_size() > 1:
        fully_shard(model)
    return model


def step(model: torch.nn.Module, opt: torch.optim.Optimizer, iteration: int) -> None:
    """One step on gradients that every rank knows."""
    generator = torch.Generator().manual_seed(100 + iteration)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None) if is_sharded(p) else grad
    opt.step()
    opt.zero_grad()


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def snapshot(model: torch.nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all weights and states, whole, by name; those of options."""
    state = opt.state_dict()
    found: dict[str, Any] = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        for key, value in {"": p.detach(), **state["state"].get(i, {})}.items():
            found[f"{name}.{key}"] = (value.full_tensor() if is_sharded(value) else value).clone()
    for i, group in enumerate(state["param_groups"]):
        found |= {f"group {i}: {key}": value for key, value in group.items() if key != "params"}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Compare two snapshots, every bit."""
    assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            other = expected[key]
            assert (value.dtype, value.shape) == (other.dtype, other.shape), f"{what}: {key}"
            assert torch.equal(bits(value), bits(other)), f"{what}: {key}"
        else:  # tuples come back as lists from some of torch's ways
            plain, other = (list(x) if isinstance(x, tuple) else x for x in (value, expected[key]))
            assert plain == other, f"{what}: {key}"


def uninterrupted(
    options: dict[str, Any], shapes: dict[str, tuple[int, ...]] = ALIGNED, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Snapshots of a run in one process: at the checkpoint, and a step later."""
    model = Model(shapes, dtype)
    opt = FusedAdamW(model.parameters(), **options)
    for iteration in range(STEPS):
        step(model, opt, iteration)
    before = snapshot(model, opt)
    step(model, opt, STEPS)
    return [before, snapshot(model, opt)]


def trained(
    options: dict[str, Any],
    shapes: dict[str, tuple[int, ...]] = ALIGNED,
    dtype: torch.dtype = torch.bfloat16,
    kind: Any = FusedAdamW,
) -> tuple[torch.nn.Module, Any]:
    """A model and its optimizer at the checkpoint."""
    model = make_model(shapes, dtype)
    opt = kind(model.parameters(), **options)
    for iteration in range(STEPS):
        step(model, opt, iteration)
    return model, opt


def fresh(
    options: dict[str, Any],
    shapes: dict[str, tuple[int, ...]] = ALIGNED,
    dtype: torch.dtype = torch.bfloat16,
    kind: Any = FusedAdamW,
) -> tuple[torch.nn.Module, Any]:
    """The same, never stepped, with other weights, another lr and another seed."""
    model = make_model(shapes, dtype)
    for p in model.parameters():
        torch.nn.init.constant_(p._local_tensor if is_sharded(p) else p, 0.3)
    other: dict[str, Any] = {"seed": 99} if "seed" in options else {}
    other["lr"] = torch.tensor(0.5) if isinstance(options["lr"], torch.Tensor) else 0.5
    return model, kind(model.parameters(), **{**options, **other})


def state_dicts(model: torch.nn.Module, opt: Any, options: StateDictOptions) -> dict[str, Any]:
    """What DCP saves, or loads into."""
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt, options=options)}


def save(path: str, options: dict[str, Any], flat: bool = False, **further: Any) -> None:
    """A checkpoint of a trained model."""
    model, opt = trained(options, **further)
    dcp.save(state_dicts(model, opt, StateDictOptions(flatten_optimizer_state_dict=flat)), checkpoint_id=path)


def load(
    path: str, options: dict[str, Any], flat: bool = False, planner: Any = None, **further: Any
) -> tuple[torch.nn.Module, Any]:
    """A fresh model, into which that was loaded; asking for what to load into moves nothing."""
    model, opt = fresh(options, **further)
    before = [bits(p._local_tensor if is_sharded(p) else p).clone() for p in model.parameters()]
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = state_dicts(model, opt, form)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(bits(p._local_tensor if is_sharded(p) else p), was), "a step at a rate of 0 moved a weight"
    dcp.load(states, checkpoint_id=path, planner=planner)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, opt, states["optim"], options=form)
    return model, opt


def goes_on(model: torch.nn.Module, opt: Any, expected: list[dict[str, Any]], what: str) -> None:
    """What was loaded, and the step after it, have the bits of a run without a break."""
    what = f"{what}, on {dist.get_world_size() if dist.is_initialized() else 1} ranks"
    assert_same(snapshot(model, opt), expected[0], what)
    step(model, opt, STEPS)
    assert_same(snapshot(model, opt), expected[1], f"{what}, a step later")


@contextmanager
def directory() -> Iterator[str]:
    """One for all ranks."""
    box = [tempfile.mkdtemp(dir=SCENARIOS.directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    assert box[0] is not None
    yield box[0]


@contextmanager
def raises(kind: type[BaseException] | tuple[type[BaseException], ...], *parts: str) -> Iterator[None]:
    """On this rank: an error that says all of this."""
    try:
        yield
    except kind as error:
        for part in parts:
            assert part in str(error), f"{part!r} is not in: {error}"
    else:
        raise AssertionError(f"nothing was raised about {parts}")


# --- other numbers of ranks -------------------------------------------------------------------------------------------


@scenario
def save_on_some_ranks_load_on_others(rank: int) -> None:
    """From each of 1, 2 and 4 ranks to each: a run without a break, to the bit; flattened checkpoints, too."""
    with directory() as path:
        for world in (1, 2, 4):
            SCENARIOS.in_world(world, functools.partial(_save_all, path))
        expected = {name: uninterrupted(options) for name, options in FORMATS.items()}
        for world in (1, 2, 4):
            SCENARIOS.in_world(world, functools.partial(_load_all, path, expected))


def _save_all(path: str) -> None:
    world = dist.get_world_size()
    for name, options in FORMATS.items():
        if name == "everything" or world > 1:
            model, opt = trained(options)
            for flat in (False, True):
                form = StateDictOptions(flatten_optimizer_state_dict=flat)
                dcp.save(state_dicts(model, opt, form), checkpoint_id=f"{path}/{flat}-{world}-{name}")


def _load_all(path: str, expected: dict[str, list[dict[str, Any]]]) -> None:
    here = dist.get_world_size()
    for name, options in FORMATS.items():
        # All ways for the format with most parts, nested and flattened in turn; for the others from 2 to 4 and back.
        for world in (1, 2, 4) if name == "everything" else {4: (2,), 2: (4,), 1: ()}[here]:
            flat = (world * here).bit_length() % 2 == 0
            model, opt = load(f"{path}/{flat}-{world}-{name}", options, flat)
            goes_on(model, opt, expected[name], f"{name}, saved on {world}, flattened: {flat}")


@scenario
def whole_state_dicts(rank: int) -> None:
    """`full_state_dict`, on all ranks or on the first alone, offloaded and broadcast: on any number of ranks."""
    expected = uninterrupted(EVERYTHING)
    for world, offload, others in ((2, False, (1, 4)), (4, True, (2, 4)), (1, True, (2,))):
        state = SCENARIOS.in_world(world, functools.partial(_whole, offload))
        box = [state if rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        for other in others:
            SCENARIOS.in_world(other, functools.partial(_load_whole, box[0], offload, expected))


def _whole(offload: bool) -> dict[str, Any]:
    model, opt = trained(EVERYTHING)
    form = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state = {
        "model": get_model_state_dict(model, options=form),
        "optim": get_optimizer_state_dict(model, opt, options=form),
    }
    held = {key for entry in state["optim"].get("state", {}).values() for key in entry}
    assert ("exp_avg_code" in held) == (not offload or dist.get_rank() == 0)
    return state


def _load_whole(state: dict[str, Any], broadcast: bool, expected: list[dict[str, Any]]) -> None:
    model, opt = fresh(EVERYTHING)
    form = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    mine = state if not broadcast or dist.get_rank() == 0 else {"model": {}, "optim": {}}
    set_model_state_dict(model, {**mine["model"]}, options=form)
    set_optimizer_state_dict(model, opt, {**mine["optim"]}, options=form)
    goes_on(model, opt, expected, f"whole, broadcast: {broadcast}")


@scenario
def saved_while_training_goes_on(rank: int) -> None:
    """An asynchronous save holds what was there when it was called, whatever steps write meanwhile."""
    with directory() as path:
        model, opt = trained(EVERYTHING)
        states = state_dicts(model, opt, StateDictOptions(flatten_optimizer_state_dict=True))
        saved = dcp.async_save(states, checkpoint_id=path, process_group=dist.new_group())
        for iteration in range(STEPS, STEPS + 3):
            step(model, opt, iteration)
        saved.result()
        goes_on(*load(path, EVERYTHING, flat=True), uninterrupted(EVERYTHING), "saved meanwhile")


@scenario
def rate_as_a_tensor(rank: int) -> None:
    """A learning rate in a tensor, for which DCP puts a CPU zero while it makes a state, is loaded like any other."""
    options = {**EVERYTHING, "lr": torch.tensor(1e-2), "decay_coupling": "lr"}
    with directory() as path:
        save(path, options)
        model, opt = load(path, options)
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
        goes_on(model, opt, uninterrupted(options), "a rate in a tensor")


# --- what does not fit ------------------------------------------------------------------------------------------------


def assert_refused(path: str, options: dict[str, Any], *parts: str, **further: Any) -> None:
    """Loading raises here, before a weight or a state is written."""
    model, opt = fresh(options, **further)
    states = {"optim": get_optimizer_state_dict(model, opt)}
    before = snapshot(model, opt)
    with raises(CheckpointException, *parts):
        dcp.load(states, checkpoint_id=path)
    assert_same(snapshot(model, opt), before, "refused")


@scenario
def other_shapes_and_formats(rank: int) -> None:
    """Every rank raises, by the parameter's name, before anything is written; no other format's bytes are taken."""
    with directory() as path:
        save(f"{path}/8bit", EVERYTHING)
        save(f"{path}/split32", HYPER)
        other = {**ALIGNED, "uneven": (66, 80)}
        assert_refused(f"{path}/8bit", EVERYTHING, "Size mismatch", "optim.state.uneven.", shapes=other)
        assert_refused(f"{path}/8bit", EVERYTHING, "optim.state.more.", shapes={**ALIGNED, "more": (3,)})
        for name, options in (
            ("8bit", {**EVERYTHING, "moment_format": "float32"}),
            ("8bit", {**EVERYTHING, "param_format": "split32"}),
            ("split32", {**HYPER, "param_format": "split24"}),
            ("split32", {**HYPER, "moment_format": "8bit"}),
        ):
            assert_refused(f"{path}/{name}", options, "Missing key in checkpoint", "optim.state.")
        # One format asked for where the checkpoint has it by default: options differ, which it names.
        assert_refused(f"{path}/split32", {**HYPER, "param_format": "split32"}, "optim.param_groups", "param_format")


@scenario
def formats_that_depend_on_the_shards(rank: int) -> None:
    """8 bits where this mesh would cut groups, or the other way round: every rank raises, or both keep float32."""
    with directory() as path:
        for world, after, name, shapes in (
            (2, 4, "line", OTHER_ON_4),
            (4, 2, "line", OTHER_ON_4),
            (2, 1, "odd", OTHER_ON_1),
            (1, 4, "odd", OTHER_ON_1),
        ):
            place = f"{path}/{world}-{after}-{name}"
            SCENARIOS.in_world(world, functools.partial(save, f"{place}-8bit", EVERYTHING, shapes=shapes))
            SCENARIOS.in_world(world, functools.partial(_save_in_float32, place, shapes))
            SCENARIOS.in_world(after, functools.partial(_load_in_float32, place, name, shapes))


def _save_in_float32(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model, opt = trained(EVERYTHING, shapes)
    opt.convert(moment_format="float32")
    dcp.save(state_dicts(model, opt, StateDictOptions()), checkpoint_id=path)
    if dist.get_rank() == 0:
        torch.save(opt.state_dict()["param_groups"], f"{path}.pt")
    found = snapshot(model, opt)
    if dist.get_rank() == 0:
        torch.save(found, f"{path}.snapshot")


def _load_in_float32(path: str, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert_refused(
        f"{path}-8bit", EVERYTHING, "Missing key in checkpoint", f"optim.state.{name}.exp_avg", shapes=shapes
    )
    options = {**EVERYTHING, "moment_format": "float32"}
    model, opt = load(path, options, shapes=shapes)
    expected = torch.load(f"{path}.snapshot", weights_only=True)
    assert_same(snapshot(model, opt), expected, "in float32")
    # Back in 8 bits, where this mesh has them: the second moment within half a code, at most 1 / 14 of an octave.
    opt.convert(moment_format="8bit")
    coded = [p for p in params_of(opt) if "exp_avg_code" in opt.state[p]]
    assert len(coded) == 1 + (opt.formats()[dict(model.named_parameters())[name]].moments == "8bit")
    opt.convert(moment_format="float32")
    for key, value in snapshot(model, opt).items():
        if key.endswith(".exp_avg_sq"):
            error = (value - expected[key]).abs()
            assert (error <= tolerance("half_a_code") / 14 * expected[key]).all(), key


@scenario
def one_rank_alone_cannot_load(rank: int) -> None:
    """All raise, with that rank's reason, before anything is replaced; the next load works."""
    model, opt = trained(EVERYTHING)
    state, before = opt.state_dict(), snapshot(model, opt)
    broken = {**state, "state": {key: {**entry} for key, entry in state["state"].items()}}
    if rank == 2:
        del broken["state"][1]["exp_avg_sq_scale"]
    place = "exp_avg_sq_scale of param_groups[0]['params'][1] is missing"
    with raises(TypeError if rank == 2 else RuntimeError, place, *(() if rank == 2 else ("rank 2 cannot load",))):
        opt.load_state_dict(broken)
    assert_same(snapshot(model, opt), before, "refused")
    opt.load_state_dict(state)
    assert_same(snapshot(model, opt), before, "loaded")


@scenario
def broadcast_of_another_format(rank: int) -> None:
    """Only the first rank sees what the broadcast state has too much, and no rank waits for it: all raise."""
    state = SCENARIOS.in_world(2, functools.partial(_whole_of, OTHER_ON_4))
    model, opt = fresh(EVERYTHING, OTHER_ON_4)
    form = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    before = snapshot(model, opt)
    with raises((ValueError, RuntimeError), "param_groups[0]['params'][0] has exp_avg, exp_avg_sq, exp_avg_code"):
        set_optimizer_state_dict(model, opt, state if rank == 0 else {}, options=form)
    found = snapshot(model, opt)
    assert all(torch.equal(bits(found[f"{name}."]), bits(before[f"{name}."])) for name in OTHER_ON_4)


def _whole_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    model, opt = trained(EVERYTHING, shapes)
    return get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# --- torch's optimizer ------------------------------------------------------------------------------------------------


@scenario
def checkpoints_of_torch(rank: int) -> None:
    """torch.optim.AdamW's, of float32 weights, goes on in FusedAdamW under FSDP2, and ours goes on there."""
    float32: dict[str, Any] = dict(dtype=torch.float32)
    with directory() as path:
        for flat in (False, True):
            save(f"{path}/theirs-{flat}", HYPER, flat, kind=torch.optim.AdamW, **float32)
            save(f"{path}/ours-{flat}", HYPER, flat, **float32)
            # `allow_partial_load`: torch's groups do not name our formats.
            formats = dict(param_format="split24", moment_format="bfloat16", seed=99)
            planner = DefaultLoadPlanner(allow_partial_load=True)
            theirs = load(f"{path}/theirs-{flat}", HYPER, flat, kind=torch.optim.AdamW, **float32)
            at_load = snapshot(*theirs)
            assert_same(snapshot(*load(f"{path}/theirs-{flat}", HYPER, flat, **float32)), at_load, "theirs in ours")
            ours = load(f"{path}/theirs-{flat}", HYPER, flat, **float32)
            coarse = load(f"{path}/theirs-{flat}", {**HYPER, **formats}, flat, planner, **float32)
            group = coarse[1].param_groups[0]
            assert {key: group[key] for key in formats} == formats and group["lr"] == HYPER["lr"]
            for model, opt in (theirs, ours, coarse):
                step(model, opt, STEPS)
            expected = snapshot(*theirs)
            for found, limit in (
                (snapshot(*ours), "float32_against_torch"),
                (snapshot(*coarse), "half_a_bfloat16_step"),
            ):
                for name in ALIGNED:
                    error = (found[f"{name}."] - expected[f"{name}."]).abs().max()
                    assert error <= tolerance(limit) * expected[f"{name}."].abs().max(), (name, error)
                    assert found[f"{name}.step"] == STEPS + 1
            back = load(f"{path}/ours-{flat}", HYPER, flat, kind=torch.optim.AdamW, **float32)
            assert_same(
                snapshot(*back), snapshot(*load(f"{path}/ours-{flat}", HYPER, flat, **float32)), "ours in theirs"
            )
            step(*back, STEPS)
            for name in ALIGNED:
                assert snapshot(*back)[f"{name}."].isfinite().all()


@scenario
def exported_to_torch(rank: int) -> None:
    """`export_state_dict` of sharded 16-bit weights and 8-bit moments: torch's, on `fp32_weights`, can be saved."""
    options = {**HYPER, "moment_format": "8bit"}
    with directory() as path:
        model, opt = trained(options)
        weights, exported = opt.fp32_weights(), opt.export_state_dict("torch")
        twin = make_model(dtype=torch.float32)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(weights[p])
        theirs = torch.optim.AdamW(twin.parameters(), lr=0.5)
        theirs.load_state_dict(exported)
        dcp.save(state_dicts(twin, theirs, StateDictOptions()), checkpoint_id=path)
        loaded, again = load(path, HYPER, dtype=torch.float32)
        assert_same(snapshot(loaded, again), snapshot(twin, theirs), "through torch's optimizer")
        for p, q in zip(params_of(opt), params_of(again), strict=True):
            assert torch.equal(q.to_local(), weights[p].to_local())
            assert again.state[q]["step"] == STEPS


# --- a crash ----------------------------------------------------------------------------------------------------------


class DiesMidway(DefaultSavePlanner):
    """Saves two tensors; before the third, SIGKILL."""

    saved = 0

    def resolve_data(self, write_item: Any) -> Any:
        """What is written next."""
        self.saved += 1
        if self.saved == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def crash(rank: int, path: pathlib.Path) -> None:
    """Save a checkpoint; then one rank of two is killed while it saves another."""
    store, timeout = f"file://{path}/store", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    model, opt = trained(EVERYTHING)
    dcp.save(state_dicts(model, opt, StateDictOptions()), checkpoint_id=path / "first")
    step(model, opt, STEPS)
    planner = DiesMidway() if rank == 1 else DefaultSavePlanner()
    dcp.save(state_dicts(model, opt, StateDictOptions()), checkpoint_id=path / "second", planner=planner)


def test_killed_while_it_saves(tmp_path: pathlib.Path) -> None:
    """The other rank learns of it, the second checkpoint is none, and the first goes on as if nothing had happened."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    ranks = []
    try:
        for rank in range(2):
            with (tmp_path / f"rank-{rank}.txt").open("w") as file:
                command = [sys.executable, __file__, str(rank), str(tmp_path), "crash"]
                ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "rank-0.txt").read_text()
    assert codes[1] == -signal.SIGKILL, (tmp_path / "rank-1.txt").read_text()
    assert codes[0] not in (0, -signal.SIGKILL), said
    assert not (tmp_path / "second" / ".metadata").exists()
    goes_on(*load(str(tmp_path / "first"), EVERYTHING), uninterrupted(EVERYTHING), "the checkpoint before")
    model, opt = fresh(EVERYTHING)
    with raises(CheckpointException, "metadata"):
        dcp.load(state_dicts(model, opt, StateDictOptions()), checkpoint_id=str(tmp_path / "second"))


# --- the tests --------------------------------------------------------------------------------------------------------

test_four_processes: Callable[..., None] = SCENARIOS.test()

if __name__ == "__main__":
    if sys.argv[3:] == ["crash"]:
        crash(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
    else:
        SCENARIOS.main()
