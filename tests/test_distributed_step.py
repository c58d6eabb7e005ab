"""Norms, clipping, guards, loss scaling and averages where parameters are sharded over processes.

Two gloo processes run every function registered with `scenario`, one after another, each in a process group of its own;
they are started once. A test a scenario shows what its ranks raised. Each compares a sharded run with the same run
unsharded: every rank must see the norm of the whole and take the decision of the whole.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Path
from pairs import Gradients, assert_close, assert_same_bits, bits, copies, make_params, params_of
from processes import Scenarios, gathered, whole
from tolerances import tolerance

import adamw_kernels
from adamw_kernels import FusedAdamW

WORLD = 2
LIMIT_S = 60  # for all scenarios together; they take a few seconds

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

SCENARIOS = scenario = Scenarios(__file__, WORLD, LIMIT_S, scenario_limit_s=LIMIT_S / 4)


def assert_same_everywhere(tensor: torch.Tensor, what: str) -> None:
    """All ranks have the same bits."""
    first, *others = gathered(tensor.detach())
    assert all(torch.equal(bits(first), bits(other)) for other in others), f"{what}: {[first, *others]}"


def assert_agree(sharded: FusedAdamW, judge: FusedAdamW) -> None:
    """Compare weights and every state tensor with those of the unsharded run."""
    for i, (p, q) in enumerate(zip(params_of(sharded), params_of(judge), strict=True)):
        assert_close(whole(p), q, "sharded_against_whole", f"parameter {i}")
        assert sharded.state[p].keys() == judge.state[q].keys()
        for key, value in sharded.state[p].items():
            assert_close(whole(value), judge.state[q][key], "sharded_against_whole", f"{key} of parameter {i}")


def assert_norms(sharded: FusedAdamW, judge: FusedAdamW, what: str) -> None:
    """Compare the reported norms, which must have the same bits on all ranks."""
    assert_same_everywhere(sharded.grad_norm, what)
    assert_close(sharded.grad_norm, judge.grad_norm, "norm_in_float32", what)


def make_model() -> torch.nn.Sequential:
    """Return a float64 model whose layers cut unevenly in two: 7, 3 and 1 rows, the last of which is all rank 0's."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1)
    return torch.nn.Sequential(*layers).double()


def fully_sharded(model: torch.nn.Module, mesh: Any = None, *, layers: bool = True) -> torch.nn.Module:
    """FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or dist.init_device_mesh("cpu", (WORLD,))
    for layer in model.children() if layers else ():
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward(sharded: torch.nn.Module, judge: torch.nn.Module, rank: int, iteration: int, size: float = 1.0) -> None:
    """Gradients of the same batch: a part a rank for the sharded model, all of it for the other."""
    generator = torch.Generator().manual_seed(iteration)
    batch = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    sharded.zero_grad()
    judge.zero_grad()
    (size * sharded(batch.chunk(WORLD)[rank]).square().mean()).backward()
    (size * judge(batch).square().mean()).backward()


@contextlib.contextmanager
def raises(kind: type[Exception], part: str) -> Iterator[None]:
    """`pytest.raises`, without its report."""
    try:
        yield
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


# --- FSDP2 and other DTensors -----------------------------------------------------------------------------------------


@scenario
def fsdp2_with_clipping(rank: int) -> None:
    """Shards of 7, 3 and 1 rows: the norm is the whole model's on both ranks, and so are the clipped weights."""
    sharded, model = fully_sharded(make_model()), make_model()
    assert [*sharded.parameters()][-1]._local_tensor.numel() == 1 - rank, "one shard is empty"
    ours, judge = (FusedAdamW(m.parameters(), max_grad_norm=0.5, **HYPER) for m in (sharded, model))
    clipped, plans = [], []
    for iteration, size in enumerate((1.0, 0.1, 3.0, 0.01)):
        backward(sharded, model, rank, iteration, size)
        ours.step()
        judge.step()
        clipped.append(bool(judge.grad_norm > 0.5))
        plans.append(ours._internals.stepper.plan)
        assert_norms(ours, judge, f"norm in iteration {iteration}")
        assert_agree(ours, judge)
    assert clipped == [True, False, True, False]
    assert all(plan is plans[0] for plan in plans)


@scenario
def fsdp2_with_norms_by_group(rank: int) -> None:
    """Each group's norm is that of its whole tensors, also where this rank holds nothing of a group."""
    sharded, model = fully_sharded(make_model()), make_model()
    ours, judge = (
        FusedAdamW(
            [{"params": [*m[:1].parameters()], "max_grad_norm": 0.1}, {"params": [*m[1:].parameters()]}],
            max_grad_norm=0.2,
            clip_per_group=True,
            **HYPER,
        )
        for m in (sharded, model)
    )
    for iteration in range(2):
        backward(sharded, model, rank, iteration)
        ours.step()
        judge.step()
        assert (judge.group_grad_norms > torch.tensor([0.1, 0.2])).all()
        assert_same_everywhere(ours.group_grad_norms, "norms")
        assert_close(ours.group_grad_norms, judge.group_grad_norms, "norm_in_float32", "norms")
        assert_norms(ours, judge, "norm of all")
        assert_agree(ours, judge)


@scenario
def one_rank_sees_the_infinity(rank: int) -> None:
    """A value that is no number in one rank's shard skips the step on both; the run goes on as if it had not been."""
    sharded, model = fully_sharded(make_model()), make_model()
    options = dict(max_grad_norm=0.5, ema_decay=0.9, **HYPER)
    ours = FusedAdamW(sharded.parameters(), skip_nonfinite=True, **options)
    judge = FusedAdamW(model.parameters(), **options)
    for iteration, (where, value) in enumerate([(None, 0), (0, math.inf), (1, math.nan), (None, 0), (1, -math.inf)]):
        backward(sharded, model, rank, iteration)
        if where == rank:
            next(sharded.parameters()).grad._local_tensor[0, 0] = value
        ours.step()
        if where is None:
            judge.step()
        assert bool(ours.last_step_skipped) == (where is not None), iteration
        assert_agree(ours, judge)
    assert ours.skipped_steps == 3


@scenario
def norm_above_the_limit_only_together(rank: int) -> None:
    """`max_skip_norm` is held against the norm of the whole: 5 from 3 and 4."""
    p = distributed(torch.zeros(1), [torch.distributed.tensor.Shard(0)], (WORLD,))
    for limit, skipped in ((4.9, True), (5.0, False)):
        ours = FusedAdamW([p], max_skip_norm=limit)
        p.grad = distributed(torch.tensor([3.0 + rank]), p.placements, (WORLD,)).detach()
        ours.step()
        assert bool(ours.last_step_skipped) == skipped
        assert ours.grad_norm == 5.0
        assert ours.state[p]["step"] == 1 - skipped


def distributed(local: torch.Tensor, placements: Any, shape: tuple[int, ...], mesh: Any = None) -> Any:
    """Return a parameter of this global shape from this rank's part."""
    from torch.distributed.tensor import DTensor

    mesh = mesh or dist.init_device_mesh("cpu", (WORLD,))
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return torch.nn.Parameter(tensor)


@scenario
def placements_over_two_dimensions(rank: int) -> None:
    """Sums are reduced over the dimensions that shard, strided shards among them, and not over those that replicate."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    wide, tall = dist.init_device_mesh("cpu", (1, WORLD)), dist.init_device_mesh("cpu", (WORLD, 1))
    cases = [
        (wide, [Replicate(), Shard(0)], True),
        (wide, [Shard(0), Replicate()], False),
        (tall, [Replicate(), Shard(0)], False),
        (tall, [Shard(0), Shard(1)], True),
        (tall, [_StridedShard(0, split_factor=2), Shard(0)], True),
        (tall, [Replicate(), Replicate()], False),
    ]
    params, squares = [], 0.0
    for i, (mesh, placements, is_cut) in enumerate(cases):
        local = torch.full((2, 3), float(i + 1 + (rank if is_cut else 0)))
        p = distributed(local, placements, (2 * WORLD if is_cut else 2, 3), mesh)
        p.grad = p.detach().clone()
        params.append(p)
        squares += sum(6.0 * (i + 1 + r) ** 2 for r in range(WORLD if is_cut else 1))
    plain = torch.nn.Parameter(torch.ones(4))  # replicated, as far as anybody knows
    plain.grad = torch.ones(4)
    ours = FusedAdamW([*params, plain], max_grad_norm=1.0)
    ours.step()
    expected = torch.tensor(squares + 4.0, dtype=torch.float64).sqrt().float()
    assert torch.equal(ours.grad_norm, expected)
    assert torch.equal(adamw_kernels.grad_norm([*params, plain]), expected)


@scenario
def hybrid_sharding(rank: int) -> None:
    """HSDP on meshes of 1 x 2 and 2 x 1: the norm and the clipped weights are those of the whole model."""
    for shape in ((1, WORLD), (WORLD, 1)):
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        sharded, model = fully_sharded(make_model(), mesh), make_model()
        ours, judge = (FusedAdamW(m.parameters(), max_grad_norm=0.5, **HYPER) for m in (sharded, model))
        for iteration in range(2):
            backward(sharded, model, rank, iteration)
            ours.step()
            judge.step()
            assert_norms(ours, judge, f"norm on a mesh of {shape}")
            assert_agree(ours, judge)
        assert judge.grad_norm > 0.5


@scenario
def dtensors_beside_plain_tensors(rank: int) -> None:
    """Parameters that FSDP2 left alone count once, not once a rank."""
    sharded, model = make_model(), make_model()
    fully_sharded(sharded[2])  # type: ignore[arg-type]
    ours, judge = (FusedAdamW(m.parameters(), max_grad_norm=0.5, **HYPER) for m in (sharded, model))
    for iteration in range(2):
        backward(sharded, model, rank, iteration)
        for p in sharded.parameters():
            if not hasattr(p, "placements"):
                dist.all_reduce(p.grad)
                p.grad.div_(WORLD)
        ours.step()
        judge.step()
        assert judge.grad_norm > 0.5
        assert_norms(ours, judge, "norm")
        assert_agree(ours, judge)


# --- plain tensors as shards ------------------------------------------------------------------------------------------


@scenario
def plain_shards(rank: int) -> None:
    """With `process_group` plain tensors are shards of a larger vector, cut anywhere, also into nothing."""
    for cut in (5, 0, 12):
        flat = make_params(torch.device("cpu"), shapes=((12,), (3,)))
        judge = FusedAdamW(copies(flat), max_grad_norm=0.5, **HYPER)
        span = slice(0, cut) if rank == 0 else slice(cut, 12)
        mine = [torch.nn.Parameter(flat[0].detach()[span].clone())]
        if rank == 0:  # a tensor that is not cut lies on one rank
            mine.append(torch.nn.Parameter(flat[1].detach().clone()))
        ours = FusedAdamW(mine, max_grad_norm=0.5, process_group=dist.group.WORLD, **HYPER)
        gradients = Gradients()
        for _ in range(3):
            gradients.give(params_of(judge))
            first, second = (p.grad for p in params_of(judge))
            for p, grad in zip(mine, (first[span], second), strict=False):
                p.grad = grad.clone()
            judge.step()
            ours.step()
            assert judge.grad_norm > 0.5
            assert_norms(ours, judge, f"cut at {cut}")
            norm = adamw_kernels.grad_norm(mine, process_group=dist.group.WORLD)
            assert_same_everywhere(norm, "norm by itself")
            assert_close(norm, adamw_kernels.grad_norm(params_of(judge)), "sharded_against_whole", "norm by itself")
        for p, q in zip(mine, (params_of(judge)[0].detach()[span], params_of(judge)[1]), strict=False):
            assert_close(p, q, "sharded_against_whole", "weights")


@scenario
def ranks_with_different_groups(rank: int) -> None:
    """A group that has nothing on one rank, or gradients on one rank only, has the same norm on both."""
    params = make_params(torch.device("cpu"), shapes=((4,), (3,)))
    mine = [[params[0]], [params[1]] if rank == 0 else [], [torch.nn.Parameter(torch.zeros(2).double())]]
    ours = FusedAdamW(
        [{"params": group} for group in mine],
        max_grad_norm=1.0,
        clip_per_group=True,
        skip_nonfinite=True,
        process_group=dist.group.WORLD,
    )
    present = [(False, False, False), (False, rank == 0, False), (rank == 1, rank == 0, False), (True, True, rank == 1)]
    for who in present:
        for group, here in zip(mine, who, strict=True):
            for p in group:
                p.grad = torch.ones_like(p) if here else None
        ours.step()
        here = torch.tensor([float(sum(p.numel() for p in group if p.grad is not None)) for group in mine])
        expected = sum(gathered(here))
        assert torch.equal(ours.group_grad_norms, expected.sqrt()), (who, ours.group_grad_norms)  # type: ignore[attr-defined]
        assert not ours.last_step_skipped
    # What only one rank sees, in a group that the other does not have, stops both.
    before = [p.detach().clone() for p in params_of(ours)]
    if rank == 0:
        params[1].grad.fill_(math.nan)
    ours.step()
    assert ours.last_step_skipped and ours.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))


@scenario
def flag_that_one_rank_sets(rank: int) -> None:
    """Where nothing is measured, a `found_inf` of one rank still skips the step on both."""
    (p,) = make_params(torch.device("cpu"), shapes=((3,),))
    q = distributed(torch.ones(2), [torch.distributed.tensor.Shard(0)], (2 * WORLD,))
    for params, group in (([p], dist.group.WORLD), ([q], None)):
        ours = FusedAdamW(params, fused=True, process_group=group)
        params[0].grad = params[0].detach().clone()
        for who, value in ((None, 0.0), (0, 1.0), (1, math.nan), (None, 0.0)):
            ours.found_inf = torch.tensor(value if who == rank else 0.0)  # type: ignore[attr-defined]
            ours.step()
            assert bool(ours.last_step_skipped) == (who is not None)
        assert ours.state[params[0]]["step"] == 2


# --- norms by themselves ----------------------------------------------------------------------------------------------


@scenario
def norms_by_themselves(rank: int) -> None:
    """`grad_norm` and `clip_grad_norm_` of DTensors are those of the whole, as plain tensors, equal on both ranks."""
    sharded, model = fully_sharded(make_model()), make_model()
    backward(sharded, model, rank, 0)
    theirs = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert theirs > 0.3
    norm = adamw_kernels.grad_norm(sharded.parameters())
    assert type(norm) is torch.Tensor and norm.dtype == torch.float64
    assert_same_everywhere(norm, "norm")
    assert_close(norm, theirs, "sharded_against_whole", "norm")
    assert torch.equal(adamw_kernels.clip_grad_norm_(sharded.parameters(), 0.3, error_if_nonfinite=True), norm)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    for p, q in zip(sharded.parameters(), model.parameters(), strict=True):
        assert type(p.grad) is type(p.data), "still a DTensor"
        assert_close(whole(p.grad), q.grad, "sharded_against_whole", "clipped gradient")
    first = next(sharded.parameters())
    for norm_type in (math.inf, 1.0):  # of a shard on both ranks: torch has no infinity norm of an empty one
        wanted = torch.nn.utils.get_total_norm([next(model.parameters()).grad], norm_type)
        norm = adamw_kernels.grad_norm(first, norm_type)
        assert type(norm) is torch.Tensor
        assert_close(norm, wanted, "sharded_against_whole", f"norm of order {norm_type}")


@scenario
def norms_without_gradients_on_one_rank(rank: int) -> None:
    """A rank that has no gradient, or no parameter, takes part all the same."""
    group = dist.group.WORLD
    p = torch.nn.Parameter(torch.zeros(9))
    p.grad = torch.ones(9) if rank == 0 else None
    for mine in (p, [p] if rank == 0 else []):
        assert adamw_kernels.grad_norm(mine, process_group=group) == 3.0
    assert adamw_kernels.clip_grad_norm_(p, 1.5, process_group=group) == 3.0
    assert_close(adamw_kernels.grad_norm(p, process_group=group), torch.tensor(1.5), "clipped_to_the_limit", "norm")
    q = distributed(torch.ones(2), [torch.distributed.tensor.Shard(0)], (2 * WORLD,))
    q.grad = q.detach().clone() if rank == 1 else None
    assert adamw_kernels.grad_norm(q) == torch.tensor(2.0).sqrt()
    with raises(ValueError, "norm_type=inf with a process_group"):
        adamw_kernels.grad_norm(p, math.inf, process_group=group)
    if rank == 0:
        p.grad[3] = math.inf
    with raises(RuntimeError, "non-finite"):
        adamw_kernels.clip_grad_norm_(p, 1.0, error_if_nonfinite=True, process_group=group)


# --- loss scaling -----------------------------------------------------------------------------------------------------


@scenario
def fsdp2_under_a_scaler(rank: int) -> None:
    """An infinity in one rank's shard skips on both and lowers both scales, on the device and on the host."""
    for fused in (True, None):
        for unscale in (False, True):
            sharded, model = fully_sharded(make_model()), make_model()
            ours = FusedAdamW(sharded.parameters(), fused=fused, max_grad_norm=0.5, **HYPER)
            judge = FusedAdamW(model.parameters(), max_grad_norm=0.5, **HYPER)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            scaler.scale(torch.zeros(()))
            for iteration, where in enumerate((None, 0, 1, None)):
                backward(sharded, model, rank, iteration)
                for p in sharded.parameters():
                    p.grad.mul_(scaler.get_scale())
                if where == rank:
                    next(sharded.parameters()).grad._local_tensor[0, 0] = math.inf
                if unscale:
                    scaler.unscale_(ours)
                scaler.step(ours)
                scaler.update()
                if where is None:
                    judge.step()
                assert bool(ours.last_step_skipped) == bool(fused and where is not None)
                assert_agree(ours, judge)
            assert scaler.get_scale() == 2.0
            assert ours.skipped_steps == (2 if fused else 0)


@scenario
def fsdp1_under_a_sharded_scaler(rank: int) -> None:
    """After `unscale_` an overflow on one rank skips on both; with `process_group` norms are those of the whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    for use_orig_params, knows_the_group in ((False, True), (True, True), (True, False)):
        model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        judged = make_model()
        clipping = dict(max_grad_norm=0.5) if knows_the_group else {}
        group = model.process_group if knows_the_group else None
        ours = FusedAdamW(model.parameters(), fused=True, process_group=group, **clipping, **HYPER)
        judge = FusedAdamW(judged.parameters(), **clipping, **HYPER)
        scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        for iteration, where in enumerate((None, 0, 1, None)):
            backward(model, judged, rank, iteration)
            for grad in flat_grads(model):
                grad.mul_(scaler.get_scale())
            if where == rank:
                flat_grads(model)[0].view(-1)[0] = math.inf
            scaler.unscale_(ours)
            scaler.step(ours)
            scaler.update()
            if where is None:
                judge.step()
            if where is None and knows_the_group:
                assert_norms(ours, judge, "norm")
            assert bool(ours.last_step_skipped) == (where is not None)
            with FullyShardedDataParallel.summon_full_params(model):
                for layer, other in zip(model.module, judged, strict=True):
                    if isinstance(other, torch.nn.Linear):
                        assert_close(layer.weight, other.weight, "sharded_against_whole", "weight")
                        assert_close(layer.bias, other.bias, "sharded_against_whole", "bias")
        assert scaler.get_scale() == 2.0 and ours.skipped_steps == 2
        assert {float(entry["step"]) for entry in ours.state.values()} == {2.0}


@scenario
def fsdp1_that_asks_too_little(rank: int) -> None:
    """What one rank cannot know by itself is refused on both, whoever holds a gradient; then nothing is written."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    backward(model, make_model(), rank, 0)
    if rank == 0:
        flat_grads(model)[0].view(-1)[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    for option in (dict(max_grad_norm=1.0), dict(skip_nonfinite=True), dict(max_skip_norm=1.0)):
        with raises(RuntimeError, "is sharded by FullyShardedDataParallel"):
            FusedAdamW(model.parameters(), **option).step()  # type: ignore[arg-type]
    for group in (None, model.process_group):
        ours = FusedAdamW(model.parameters(), fused=True, process_group=group)
        scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        if group is None:
            with raises(RuntimeError, "Call scaler.unscale_(optimizer) before"):
                scaler.step(ours)
        else:  # each rank's scaler asks its own gradients only, and the step the other ranks
            scaler.step(ours)
            assert ours.last_step_skipped
        assert all(entry["step"] == 0 for entry in ours.state.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def flat_grads(model: torch.nn.Module) -> list[Any]:
    """Return the gradients of which this rank holds something."""
    return [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]


# --- averages ---------------------------------------------------------------------------------------------------------


@scenario
def averages_of_sharded_weights(rank: int) -> None:
    """The average of a DTensor is one: placed as it is, equal to the unsharded run's, shown within `ema_weights`."""
    sharded, model = fully_sharded(make_model()), make_model()
    ours, judge = (FusedAdamW(m.parameters(), ema_decay=0.9, ema_warmup=True, **HYPER) for m in (sharded, model))
    for iteration in range(3):
        backward(sharded, model, rank, iteration)
        ours.step()
        judge.step()
    assert_agree(ours, judge)
    before = [p.detach().clone() for p in sharded.parameters()]
    for p in sharded.parameters():
        ema = ours.state[p]["param_ema"]
        assert type(ema) is type(p.data)
        assert (ema.placements, ema.device_mesh, ema.shape) == (p.placements, p.device_mesh, p.shape)
    batch = torch.ones(2, 5, dtype=torch.float64)
    with ours.ema_weights(), judge.ema_weights(), torch.no_grad():
        for p in sharded.parameters():
            assert torch.equal(p._local_tensor, ours.state[p]["param_ema"]._local_tensor)
        assert_close(sharded(batch), model(batch), "sharded_against_whole", "output of the averages")
        averaged = model(batch)
    with torch.no_grad():
        assert not torch.equal(model(batch), averaged)
        assert_close(sharded(batch), model(batch), "sharded_against_whole", "output of the weights")
    for p, q in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(p._local_tensor, q._local_tensor)


@scenario
def distributed_checkpoint_with_averages(rank: int) -> None:
    """A DCP state dict carries the averages; the zero-rate step with which DCP makes room moves no weight."""
    from torch.distributed.checkpoint import state_dict as dcp

    models = [fully_sharded(make_model()) for _ in range(2)]
    model = make_model()
    options = dict(ema_decay=0.5, max_grad_norm=0.5, skip_nonfinite=True)
    saved, judge = (FusedAdamW(m.parameters(), **options, **HYPER) for m in (models[0], model))
    for iteration in range(2):
        backward(models[0], model, rank, iteration)
        saved.step()
        judge.step()
    state = dcp.get_optimizer_state_dict(models[0], saved)
    assert all("param_ema" in entry for entry in state["state"].values())
    with torch.no_grad():
        for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
            p.copy_(q)

    fresh = FusedAdamW(models[1].parameters(), lr=0.7, **options)
    weights = [whole(p).clone() for p in models[1].parameters()]
    dcp.get_optimizer_state_dict(models[1], fresh)  # makes a state by a step at rate 0
    for p, weight in zip(models[1].parameters(), weights, strict=True):
        assert torch.equal(whole(p), weight)
        assert torch.equal(whole(fresh.state[p]["param_ema"]), weight)
    assert fresh.skipped_steps == 0

    loaded = FusedAdamW(models[1].parameters(), lr=0.7, **options)
    dcp.set_optimizer_state_dict(models[1], loaded, state)
    for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))
        for key, value in saved.state[q].items():
            assert type(loaded.state[p][key]) is type(value)
            assert torch.equal(whole(loaded.state[p][key]), whole(value)), key
    backward(models[1], model, rank, 7)
    loaded.step()
    judge.step()
    assert_agree(loaded, judge)
    assert_norms(loaded, judge, "norm after loading")


# --- the tests --------------------------------------------------------------------------------------------------------


test_two_processes = SCENARIOS.test()


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield dist.group.WORLD
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_reducing_in_between_changes_no_bit(path: Path, alone: Any) -> None:
    """On every path a step that is cut in two by a reduction has the bits of one that is not."""
    options = dict(max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.9, clip_per_group=True, fused=True, **HYPER)
    whole_step, cut = (
        FusedAdamW([{"params": [p]} for p in make_params(path.device, torch.float32)], process_group=group, **options)
        for group in (None, alone)
    )
    gradients = Gradients()
    for i in range(4):
        gradients.give(params_of(whole_step), params_of(cut), present=(True, i != 1, True))
        for optimizer in (whole_step, cut):
            if i == 2:
                params_of(optimizer)[0].grad[0] = math.inf
            optimizer.grad_scale = torch.tensor(2.0, device=path.device)
            optimizer.found_inf = torch.tensor(float(i == 3), device=path.device)
            optimizer.step()
        assert bool(cut.last_step_skipped) == (i >= 2)
        assert torch.equal(whole_step.group_grad_norms.nan_to_num(-1.0), cut.group_grad_norms.nan_to_num(-1.0))
        assert_same_bits(whole_step, cut)
    norm = adamw_kernels.grad_norm(params_of(cut)[1:])
    assert torch.equal(adamw_kernels.grad_norm(params_of(cut)[1:], process_group=alone), norm)
    assert norm > tolerance("clipped_to_the_limit")


if __name__ == "__main__":
    SCENARIOS.main()
