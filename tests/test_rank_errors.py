"""Processes that disagree: an error on every one of them, naming the parameter, and never a wait without end.

Two gloo processes. Where a step reduces over them (norms, guards, a loss scaler's signal), what one of them cannot do
is raised on both, and nothing is written on either. Every scenario has a time-out of its own, which a wait would meet.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pairs import assert_same_bits, assert_unchanged, params_of, snapshot
from processes import Scenarios, gathered, whole

from adamw_kernels import FusedAdamW, clip_grad_norm_
from adamw_kernels.agreement import Agreement

WORLD = 2
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
MEASURED: dict[str, Any] = dict(max_grad_norm=0.5, **HYPER)

SCENARIOS = scenario = Scenarios(__file__, WORLD, limit_s=180)


def sharded(shape: tuple[int, ...], placement: Any = None, mesh: Any = None) -> Any:
    """Return a DTensor parameter, over rows unless said otherwise, of values that every rank knows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    values = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    mesh = mesh or dist.init_device_mesh("cpu", (WORLD,))
    placements = [placement or Shard(0)] * mesh.ndim
    return torch.nn.Parameter(distribute_tensor(values, mesh, placements, src_data_rank=None))


def give_gradients(*params: Any, size: float = 0.1) -> None:
    """Set `.grad` to a multiple of the parameter, placed as it is."""
    for p in params:
        p.grad = (size * p.detach()).clone()


def local_snapshot(opt: FusedAdamW) -> list[tuple[str, torch.Tensor]]:
    """Return copies of the local part of every weight and state tensor."""
    return [(name, value.to_local() if hasattr(value, "to_local") else value) for name, value in snapshot(opt)]


@contextlib.contextmanager
def raises(*parts: str, kinds: tuple[type[Exception], ...] = (RuntimeError,)) -> Iterator[None]:
    """An error of one of these kinds, whose text has all parts."""
    try:
        yield
    except kinds as error:
        assert all(part in str(error) for part in parts), error
    else:
        raise AssertionError("no error")


def assert_refused(opt: FusedAdamW, *parts: str, kinds: tuple[type[Exception], ...] = (RuntimeError,)) -> None:
    """A step raises, and changes no weight and no state that was there; what it made is untouched, too."""
    before, known = local_snapshot(opt), {*opt.state}
    with raises(*parts, kinds=kinds):
        opt.step()
    for p in {*opt.state} - known:
        assert float(opt.state[p].get("step", 0)) == 0
    after = [item for item in local_snapshot(opt) if item[0] in dict(before)]
    assert_unchanged(before, after)


# --- lists that differ ------------------------------------------------------------------------------------------------


@scenario
def one_parameter_more(rank: int) -> None:
    """Clipping, a guard, a signal alone: whichever makes the step reduce, both ranks name what only one has."""
    for options in (MEASURED, dict(skip_nonfinite=True), dict(max_skip_norm=9.0), dict(fused=True)):
        for who in range(WORLD):
            params = [sharded((5, 3)), *([sharded((4,))] if rank == who else [])]
            give_gradients(*params)
            opt = FusedAdamW(params, **options)
            assert_refused(
                opt, "hold different parameters", "param_groups[0]['params'][1]: float32 (4,) Shard", "nothing"
            )
            opt = FusedAdamW(params[:1], **options)
            opt.step()
            assert opt.state[params[0]]["step"] == 1


@scenario
def another_order(rank: int) -> None:
    """Shapes tell, names tell; the message has both sides."""
    params = [sharded((5, 3)), sharded((4, 3))]
    give_gradients(*params)
    shapes = "params'][0]: float32 (5, 3) Shard(dim=0) on a mesh of (2,)", "params'][0]: float32 (4, 3) Shard(dim=0)"
    assert_refused(FusedAdamW(params[:: 1 - 2 * rank], **MEASURED), "rank 0 and rank 1", *shapes)
    named = [("wide", sharded((4, 3))), ("deep", sharded((4, 3)))]
    give_gradients(*(p for _, p in named))
    names = "parameter 'wide' (param_groups[0]['params'][0])", "parameter 'deep' (param_groups[0]['params'][0])"
    assert_refused(FusedAdamW(named[:: 1 - 2 * rank], **MEASURED), *names)


@scenario
def other_groups_dtypes_or_placements(rank: int) -> None:
    """The same tensors in other groups, another dtype, another placement, a plain tensor more."""
    from torch.distributed.tensor import Shard

    def refused(make: Callable[[], list[Any]], *parts: str) -> None:
        groups = make()
        params = [p for group in groups for p in group["params"]]
        give_gradients(*params)
        assert_refused(FusedAdamW(groups, **MEASURED), "hold different parameters", *parts)

    def as_groups(*lists: list[Any]) -> list[Any]:
        return [{"params": params} for params in lists]

    p, q = sharded((4, 2)), sharded((6,))
    refused(lambda: as_groups([p], [q]) if rank else as_groups([p, q]), "[1]['params'][0]: float32 (6,)")
    refused(lambda: as_groups([torch.nn.Parameter(q.double()) if rank else q]), "float64 (6,)", "float32 (6,)")
    refused(lambda: as_groups([sharded((4, 2), Shard(rank))]), "Shard(dim=0)", "Shard(dim=1)")
    plain = torch.nn.Parameter(torch.ones(3))
    refused(lambda: as_groups([p, plain] if rank else [p]), "[0]['params'][1]: float32 (3,)", "nothing")


@scenario
def a_process_group_that_one_rank_does_not_know(rank: int) -> None:
    """The parameter that only rank 0 has is sharded over processes of its own: nobody waits for them."""
    mesh, other = (dist.init_device_mesh("cpu", shape) for shape in ((WORLD,), (1, WORLD)))
    params = [sharded((5, 3), mesh=mesh), *([sharded((4, 4), mesh=other)] if rank == 0 else [])]
    give_gradients(*params)
    for order in (1, -1):
        assert_refused(FusedAdamW(params[::order], **MEASURED), "float32 (4, 4)", "on a mesh of (1, 2)")


@scenario
def a_parameter_that_one_rank_adds_later(rank: int) -> None:
    """In the middle of a run: both raise until the other has it, too, and the run goes on as if nothing had been."""
    first, second, third = sharded((5, 3)), sharded((4, 3)), sharded((2, 2), mesh=dist.init_device_mesh("cpu", (1, 2)))
    opt = FusedAdamW([first], **MEASURED)
    judge = FusedAdamW([torch.nn.Parameter(whole(first).clone())], **MEASURED)

    def step_both() -> None:
        give_gradients(*params_of(opt))
        for p, q in zip(params_of(opt), params_of(judge), strict=True):
            q.grad = whole(p.grad)
        opt.step()
        judge.step()
        for p, q in zip(params_of(opt), params_of(judge), strict=True):
            assert torch.equal(whole(p), q)
        assert torch.equal(opt.grad_norm, judge.grad_norm)

    step_both()
    for added in (second, third):  # sharded over the same processes; over others
        if rank == 0:
            opt.add_param_group({"params": [added]})
        for _ in range(2):
            give_gradients(*params_of(opt))
            assert_refused(opt, "hold different parameters", f"{tuple(added.shape)} Shard", "nothing")
        if rank == 1:
            opt.add_param_group({"params": [added]})
        judge.add_param_group({"params": [torch.nn.Parameter(whole(added).clone())]})
        step_both()
        step_both()


@scenario
def other_numbers_of_norms(rank: int) -> None:
    """Plain shards over a process group may be any, but groups with norms of their own must be as many."""
    params = [torch.nn.Parameter(torch.ones(2 + rank)) for _ in range(1 + rank)]
    give_gradients(*params)
    options = dict(clip_per_group=True, process_group=dist.group.WORLD, **MEASURED)
    assert_refused(FusedAdamW([{"params": [p]} for p in params], **options), "1 gradient norm", "2 gradient norm")
    FusedAdamW([{"params": params}], **options).step()


# --- a step that one rank cannot take ---------------------------------------------------------------------------------


def spoilt(p: Any) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """What one rank's parameter or its gradient may be that no step takes: its text, how to do it, how to undo it."""
    grad = p.grad

    def set_local(tensor: torch.Tensor) -> Callable[[], None]:
        def change() -> None:
            p.grad._local_tensor = tensor

        return change

    def restore() -> None:
        p.grad = grad

    good = grad._local_tensor

    def set_grad(tensor: Any) -> Callable[[], None]:
        def change() -> None:
            p.grad = tensor

        return change

    return [
        ("is on meta, the parameter on cpu", set_local(good.to("meta")), set_local(good)),
        ("has dtype torch.float64", set_local(good.double()), set_local(good)),
        ("has shape (9,)", set_local(torch.ones(9)), set_local(good)),
        ("has layout torch.sparse_coo", set_local(good.to_sparse()), set_local(good)),
        ("expected the same mesh", set_grad(sharded(p.shape, mesh=dist.init_device_mesh("cpu", (1, WORLD)))), restore),
    ]


@scenario
def one_rank_cannot_take_the_first_step(rank: int) -> None:
    """Both raise, the other one with the first one's reason; repaired, the run has the bits of one without it."""
    p = sharded((6, 3))
    give_gradients(p)
    cases = spoilt(p)
    for text, spoil, undo in cases:
        for who in range(WORLD):
            opt, twin = FusedAdamW([p], **MEASURED), FusedAdamW([copy.deepcopy(p)], **MEASURED)
            if rank == who:
                spoil()
            parts = ("the gradient of param_groups[0]['params'][0]", text)
            if rank == who:
                assert_refused(opt, *parts, kinds=(ValueError, TypeError, RuntimeError))
                undo()
            else:
                assert_refused(opt, f"rank {who} cannot take this step, so no rank does: ", *parts)
            give_gradients(*params_of(twin))
            opt.step()
            twin.step()
            assert_same_bits_of_shards(opt, twin)
            p.data.copy_(sharded((6, 3)).detach())
            give_gradients(p)
            for _, _, restore in cases:
                restore()
            cases = spoilt(p)
            _, spoil, undo = next(case for case in cases if case[0] == text)


@scenario
def one_rank_cannot_take_a_later_step(rank: int) -> None:
    """The other one is in its warm step, which builds nothing and asks nobody."""
    p = sharded((6, 3))
    opt = FusedAdamW([("weight", p)], **MEASURED)
    twin = FusedAdamW([torch.nn.Parameter(p.detach().clone())], **MEASURED)
    for step in range(5):
        for optimizer in (opt, twin):
            give_gradients(*params_of(optimizer))
            optimizer.step()
        give_gradients(p)
        plan = opt._internals.stepper.plan  # type: ignore[union-attr]
        text, spoil, undo = spoilt(p)[step]
        who = step % WORLD
        if rank == who:
            spoil()
            assert_refused(opt, "parameter 'weight'", text, kinds=(ValueError, TypeError, RuntimeError))
            undo()
        else:
            assert_refused(opt, f"rank {who} cannot take this step", "parameter 'weight'", text)
            assert opt._internals.stepper.plan is plan  # type: ignore[union-attr]
        assert_same_bits_of_shards(opt, twin)


def assert_same_bits_of_shards(a: FusedAdamW, b: FusedAdamW) -> None:
    """Compare the local parts of two optimizers' weights and states."""
    assert_unchanged(local_snapshot(a), local_snapshot(b))


@scenario
def gradients_that_must_be_redistributed(rank: int) -> None:
    """Sums that are still to be made (sequence parallelism) are made on both ranks, also where one cannot step."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = dist.init_device_mesh("cpu", (WORLD,))

    def give_partial_sums(params: list[Any]) -> None:
        for i, p in enumerate(params):
            p.grad = DTensor.from_local(torch.full((3,), 1.0 + rank + i), mesh, [Partial()], run_check=False)

    for options in (HYPER, dict(fused=True, **HYPER), dict(skip_nonfinite=True, **HYPER)):
        weight, *params = sharded((6, 3)), *(sharded((3,), Replicate(), mesh) for _ in range(2))
        judges = [torch.nn.Parameter(torch.arange(1.0, 4.0)) for _ in params]
        opt, judge = FusedAdamW([weight, *params], **options), FusedAdamW(judges, **options)
        taken = []
        for step in range(4):
            give_gradients(weight)
            give_partial_sums(params)
            for i, p in enumerate(judges):
                p.grad = torch.full((3,), 3.0 + 2 * i)
            spoil = spoilt(weight)[step][1]
            if rank == step % WORLD:
                spoil()
            try:
                opt.step()
                taken.append(step)
            except (RuntimeError, ValueError, TypeError) as error:
                assert rank == step % WORLD or f"rank {step % WORLD} cannot take this step" in str(error), error
            if options is HYPER and rank != step % WORLD:  # without norms nobody has to be asked
                judge.step()
            give_gradients(weight)
            opt.step()
            judge.step()
            for p, q in zip(params, judges, strict=True):
                assert torch.equal(whole(p), q), (options, step)
        assert taken == ([step for step in range(4) if rank != step % WORLD] if options is HYPER else [])


@scenario
def hyperparameters_that_one_rank_cannot_use(rank: int) -> None:
    """What is checked before any tensor is looked at is told, too: a rate that is none, averages that are shown."""
    p = sharded((6, 3))
    opt = FusedAdamW([p], ema_decay=0.9, **MEASURED)
    give_gradients(p)
    opt.step()
    for who in range(WORLD):
        if rank == who:
            opt.param_groups[0]["lr"] = math.nan
        kinds = (ValueError,) if rank == who else (RuntimeError,)
        assert_refused(opt, *([] if rank == who else [f"rank {who} cannot"]), "lr", "nan", kinds=kinds)
        opt.param_groups[0]["lr"] = 1e-2
        with opt.ema_weights() if rank == who else contextlib.nullcontext(), raises("within ema_weights()"):
            opt.step()
    opt.step()
    assert opt.state[p]["step"] == 2


@scenario
def the_first_signal_comes_with_an_error(rank: int) -> None:
    """A plan that was built before there was a loss scaler is not taken for one that listens to it."""
    p = sharded((6, 3))
    opt = FusedAdamW([p], **HYPER)
    give_gradients(p)
    opt.step()
    good = p.grad._local_tensor
    opt.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    if rank == 0:
        p.grad._local_tensor = good.to("meta")
    assert_refused(opt, "is on meta", kinds=(ValueError, RuntimeError))
    p.grad._local_tensor = good
    opt.step()
    assert opt.last_step_skipped and opt.state[p]["step"] == 1


@scenario
def both_cannot_take_the_step(rank: int) -> None:
    """Each raises its own error, and the next step is taken."""
    p = sharded((6, 3))
    opt = FusedAdamW([p], **MEASURED)
    for taken in range(3):
        give_gradients(p)
        good = p.grad._local_tensor
        p.grad._local_tensor = good.to_sparse() if rank else good.to("meta")
        assert_refused(opt, "sparse" if rank else "on meta", kinds=(RuntimeError, ValueError))
        p.grad._local_tensor = good
        opt.step()
        assert opt.state[p]["step"] == taken + 1


@scenario
def where_nobody_looks(rank: int) -> None:
    """Sums on a GPU, as far as a CPU can play one: the other rank skips the step on the device, and both go on."""
    p = sharded((6, 3))
    opt, twin = FusedAdamW([p], **MEASURED), FusedAdamW([torch.nn.Parameter(p.detach().clone())], **MEASURED)
    is_visible = vars(Agreement)["is_visible"]
    Agreement.is_visible = staticmethod(lambda device: False)  # type: ignore[method-assign]
    try:
        for step in range(3):
            for optimizer in (opt, twin):
                give_gradients(*params_of(optimizer))
                optimizer.step()
            give_gradients(p)
            if rank == step % WORLD:
                spoil = spoilt(p)[0][1]
                spoil()
                assert_refused(opt, "is on meta", kinds=(ValueError,))
            else:
                before = local_snapshot(opt)
                opt.step()
                assert opt.last_step_skipped and opt.grad_norm.isnan()
                assert_unchanged(before, local_snapshot(opt))
            assert_same_bits_of_shards(opt, twin)
    finally:
        Agreement.is_visible = is_visible  # type: ignore[method-assign]


@scenario
def a_rank_that_does_not_come(rank: int) -> None:
    """One rank asks for a norm, the other for nothing: the group's time-out ends it, and says what to look at."""
    from torch.distributed.device_mesh import DeviceMesh

    group = dist.new_group(timeout=timedelta(seconds=1.5))
    p = sharded((6, 3), mesh=DeviceMesh.from_group(group, "cpu"))
    give_gradients(p)
    opt = FusedAdamW([p], **(HYPER if rank else MEASURED))
    if rank == 0:
        assert_refused(
            opt, "not all of them came to this step", "param_groups[0]['params'][0]: float32 (6, 3)", "check_ranks()"
        )
    else:
        opt.step()
        time.sleep(4)  # alive, but elsewhere


# --- where no step communicates ---------------------------------------------------------------------------------------


@scenario
def check_ranks_without_norms(rank: int) -> None:
    """What no step asks is asked by `check_ranks`, of DTensors and of replicas alike."""
    shards, replicas = [sharded((5, 3)), sharded((4,))], [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
    for params in (shards, replicas, [*shards, *replicas]):
        FusedAdamW(params, **HYPER).check_ranks()
        for who in range(WORLD):
            opt = FusedAdamW(params[:-1] if rank == who else params, **HYPER)
            give_gradients(*params)
            opt.step()  # which asks nobody
            with raises(f"params'][{len(params) - 1}]: float32 {tuple(params[-1].shape)}", "nothing more"):
                opt.check_ranks()
    with raises("params'][0]: float32 (2,)", "params'][0]: float32 (3,)"):
        FusedAdamW(replicas[:: 1 - 2 * rank]).check_ranks()
    # Stages of a pipeline hold what they hold.
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    FusedAdamW([replicas[rank]]).check_ranks(process_group=alone)


# --- tensors that do not belong together ------------------------------------------------------------------------------


@scenario
def a_mesh_that_changed(rank: int) -> None:
    """Gradient, state or parameter on other processes than the rest: a ValueError on both ranks, norms or not."""
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor

    line, row, column = (dist.init_device_mesh("cpu", shape) for shape in ((WORLD,), (1, WORLD), (WORLD, 1)))
    for options in (HYPER, MEASURED):
        p = sharded((6, 3), mesh=line)
        opt = FusedAdamW([("weight", p)], **options)
        give_gradients(p)
        opt.step()
        # The same memory, said to lie elsewhere: only the mesh tells.
        p.grad = sharded((6, 3), mesh=row).detach()
        parts = "the gradient of parameter 'weight'", "(1, 2)", "(2,)", "expected the same mesh"
        assert_refused(opt, *parts, kinds=(ValueError,))
        assert_refused(FusedAdamW([("weight", p)], **options), *parts, kinds=(ValueError,))
        # A parameter that moved to another mesh, with its identity: its state did not.
        moved = sharded((6, 3), mesh=column)
        torch.utils.swap_tensors(p, moved)
        give_gradients(p)
        assert_refused(opt, "exp_avg of parameter 'weight'", "(2,)", "(2, 1)", kinds=(ValueError,))
        del opt.state[p]
        opt.step()
        # A new parameter in its place starts anew.
        opt.param_groups[0]["params"][0] = other = sharded((6, 3), mesh=line)
        give_gradients(other)
        opt.step()
        assert opt.state[other]["exp_avg"].device_mesh == line
    # A parameter that is a sum over processes is no parameter; a gradient of that kind is summed up.
    part = torch.nn.Parameter(torch.distributed.tensor.DTensor.from_local(torch.ones(3), line, [Partial()]))
    part.grad = part.detach()
    assert_refused(FusedAdamW([part]), "params'][0] is float32 (3,) Partial", kinds=(ValueError,))
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = distribute_tensor(torch.ones(3), line, [Replicate()], src_data_rank=None)
    assert_refused(FusedAdamW([plain]), "gradient of param_groups[0]['params'][0] is a DTensor", kinds=(ValueError,))


@scenario
def state_that_was_cut_otherwise(rank: int) -> None:
    """Loaded from another mesh, another placement, another shape: refused on both ranks, also where local parts fit."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    row = dist.init_device_mesh("cpu", (1, WORLD))
    p = sharded((8, 6))
    mine = FusedAdamW([p], **HYPER)
    give_gradients(p)
    mine.step()
    before = local_snapshot(mine)
    cases = [
        (sharded((8, 6), mesh=row), "on a mesh of (1, 2)"),
        (sharded((8, 6), Shard(1)), "Shard(dim=1)"),
        (sharded((4, 6), Replicate()), "(4, 6) Replicate"),  # as large here as a half
        (sharded((7, 6)), "(7, 6)"),  # as large as ours on rank 0 only
        (torch.nn.Parameter(torch.ones(4, 6)), "is float32 (4, 6), the parameter"),
    ]
    for q, text in cases:
        theirs = FusedAdamW([q], **HYPER)
        give_gradients(q)
        theirs.step()
        with raises(
            "exp_avg of param_groups[0]['params'][0]", text, "float32 (8, 6) Shard(dim=0)", kinds=(ValueError,)
        ):
            mine.load_state_dict(theirs.state_dict())
        assert_unchanged(before, local_snapshot(mine))
        # Put there by hand, the next step refuses it, on both ranks, with norms or without.
        for options in (HYPER, MEASURED):
            opt = FusedAdamW([p], **options)
            opt.state[p].update(theirs.state[q])
            assert_refused(opt, "exp_avg of param_groups[0]['params'][0]", text, kinds=(ValueError,))
    for key, wrong in (("param_remainder", "split32"), ("exp_avg_code", "8bit")):
        narrow = torch.nn.Parameter(sharded((64, 64)).detach().bfloat16())
        formats: dict[str, Any] = dict(param_format="split32", moment_format="8bit" if wrong == "8bit" else "float32")
        opt = FusedAdamW([narrow], **formats, **HYPER)
        give_gradients(narrow)
        opt.step()
        value = opt.state[narrow][key]
        opt.state[narrow][key] = distribute_tensor(  # not redistributed: gloo has no int16
            torch.zeros(value.shape, dtype=value.dtype), value.device_mesh, [Replicate()], src_data_rank=None
        )
        assert_refused(opt, f"{key} of param_groups[0]['params'][0]", "Replicate", kinds=(ValueError,))
        opt.state[narrow][key] = value
        opt.step()


@scenario
def clipping_by_itself(rank: int) -> None:
    """`clip_grad_norm_` of a gradient that one rank cannot read raises on both."""
    p = sharded((6, 3))
    give_gradients(p)
    expected = clip_grad_norm_([p], 1e9)
    good = p.grad._local_tensor
    for who in range(WORLD):
        if rank == who:
            p.grad._local_tensor = good.to(torch.int32)
        with raises("the gradient of parameters[0]", "int32", kinds=(TypeError, RuntimeError)):
            clip_grad_norm_([p], 1e9)
        p.grad._local_tensor = good
        assert torch.equal(clip_grad_norm_([p], 1e9), expected)
    assert all(torch.equal(norm, expected) for norm in gathered(expected))
    assert_same_bits(FusedAdamW([p]), FusedAdamW([p]))


test_two_processes = SCENARIOS.test()

if __name__ == "__main__":
    SCENARIOS.main()
