"""FSDP2 on two gloo processes: DTensor parameters, gradients and states in every format, beside an unsharded run.

The gradients are those that `fully_shard` has reduced; the unsharded run gets the same ones, gathered, and must store
the same bits.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from pairs import assert_unchanged, params_of
from processes import Scenarios, whole
from shards import FORMATS, KEYS, Model, assert_part, assert_parts_of, full_gradients, give, part_like, tokens

from adamw_kernels import FusedAdamW, tensor_watch

WORLD = 2
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

SCENARIOS = scenario = Scenarios(__file__, WORLD, limit_s=180)


def fully_sharded(model: Any, **options: Any) -> Any:
    """FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    options.setdefault("mesh", dist.init_device_mesh("cpu", (WORLD,)))
    for layer in model.children():
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def train_step(model: Any, judge: torch.nn.Module, rank: int, step: int) -> None:
    """Backward of a part of the batch on each rank; the judge gets the gradients that come out, gathered."""
    model(tokens(step).chunk(WORLD)[rank]).float().square().mean().backward()
    for p, q in zip(model.parameters(), judge.parameters(), strict=True):
        assert (p.grad.device_mesh, p.grad.placements, p.grad.dtype) == (p.device_mesh, p.placements, p.dtype)
        q.grad = whole(p.grad).clone()


def tables(opt: FusedAdamW) -> list[Any]:
    """Return the launch tables of the last step."""
    plan = opt._internals.stepper.plan  # type: ignore[union-attr]
    return plan.tables  # type: ignore[union-attr, no-any-return]


@scenario
def every_format(rank: int) -> None:
    """Even, uneven and empty shards: weights, float32 weights and states have the bits of the unsharded run."""
    for name, formats in FORMATS.items():
        original = Model().bfloat16()
        model, judge = fully_sharded(copy.deepcopy(original)), original
        shapes = {tuple(p._local_tensor.shape) for p in model.parameters()}
        assert shapes >= ({(36, 64), (32, 64), (1, 4096)} if rank == 0 else {(35, 64), (33, 64), (0, 4096)})
        ours, theirs = (FusedAdamW(m.parameters(), **formats, **HYPER) for m in (model, judge))
        plans = []
        for step in range(4):
            train_step(model, judge, rank, step)
            ours.step()
            theirs.step()
            ours.zero_grad()
            plans.append(ours._internals.stepper.plan)  # type: ignore[union-attr]
            assert_parts_of(ours, theirs)
        assert all(plan is plans[0] for plan in plans[1:]), "a warm step builds nothing"
        for p in (model.embedding.weight, model.even.weight, model.last.weight):
            assert ours.state[p].keys() == {"step"} | KEYS[name], name
        assert len({moments for _, moments in ours.formats().values()}) == (2 if "8bit" in name else 1)
        assert not any(
            torch.equal(p, q) for p, q in zip(judge.parameters(), Model().bfloat16().parameters(), strict=True)
        )


@scenario
def on_two_threads(rank: int) -> None:
    """Warm steps look at DTensors on torch's threads where there are many: the same, had these been many."""
    threads, per_thread = torch.get_num_threads(), tensor_watch.PARAMS_PER_THREAD
    torch.set_num_threads(2)
    tensor_watch.PARAMS_PER_THREAD = 1
    try:
        every_format(rank)
    finally:
        tensor_watch.PARAMS_PER_THREAD = per_thread
        torch.set_num_threads(threads)


@scenario
def clipping_in_every_format(rank: int) -> None:
    """Norms of 16-bit gradients over even, uneven and empty shards: the coefficient of the whole, on both ranks."""
    for formats in FORMATS.values():
        original = Model().bfloat16()
        model, judge = fully_sharded(copy.deepcopy(original)), original
        ours, theirs = (FusedAdamW(m.parameters(), max_grad_norm=2.0**10, **formats, **HYPER) for m in (model, judge))
        for step in range(2):
            # Sums of squares that are exact in any order, and a coefficient with a few bits: whole numbers.
            gradients = [grad.float().clamp(-3, 3).mul(8).round().bfloat16() for grad in full_gradients(judge, step)]
            give(model, gradients)
            give(judge, gradients)
            ours.step()
            theirs.step()
            assert torch.equal(ours.grad_norm, theirs.grad_norm)
            assert theirs.grad_norm > 2.0**10
            assert_parts_of(ours, theirs)


@scenario
def one_optimizer_for_all(rank: int) -> None:
    """Meshes, replicas, plain tensors, two groups, empty shards: one table, one update a dtype combination."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line, row, column = (dist.init_device_mesh("cpu", shape) for shape in ((WORLD,), (1, WORLD), (WORLD, 1)))
    generator = torch.Generator().manual_seed(0)
    cuts: list[Any] = [
        None,
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (row, [Replicate(), Shard(0)]),
        (column, [Shard(0), Replicate()]),
        (column, [Shard(0), Shard(1)]),
    ]
    shapes = ((4, 6), (7, 3), (1, 5))
    for combinations in (
        [(torch.float32, None)],
        [(torch.bfloat16, None), (torch.float32, None)],
        [
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float64, None),
        ],
    ):
        params, judges = [], []
        for dtype, grad_dtype in combinations:
            for cut in cuts:
                for shape in shapes:
                    value, grad = (torch.randn(shape, generator=generator) for _ in range(2))
                    q = torch.nn.Parameter(value.to(dtype))
                    p = q.detach().clone()
                    p = torch.nn.Parameter(distribute_tensor(p, *cut, src_data_rank=None) if cut else p)
                    grad = grad.to(grad_dtype or dtype)
                    for tensor in (p, q):
                        tensor.grad_dtype = None
                    q.grad, p.grad = grad, part_like(grad, p) if cut else grad.clone()
                    params.append(p)
                    judges.append(q)
        options: dict[str, Any] = dict(ema_decay=0.5, **HYPER)
        ours, theirs = (
            FusedAdamW([{"params": ps[::2]}, {"params": ps[1::2], "lr": 3e-3}], **options) for ps in (params, judges)
        )
        for _ in range(3):
            ours.step()
            theirs.step()
        assert len(tables(ours)) == 1
        assert tables(ours)[0].num_tensors == len(params)
        assert len(tables(ours)[0].batches) == len(combinations)
        assert_parts_of(ours, theirs)


@scenario
def mixed_precision(rank: int) -> None:
    """A MixedPrecisionPolicy computes in bfloat16 and hands over gradients of the parameter's own dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    seen = set()
    for reduce_dtype in (torch.float32, None):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        for dtype in (torch.float32, torch.bfloat16):
            original = Model().to(dtype)
            model, judge = fully_sharded(copy.deepcopy(original), mp_policy=policy), original
            model.even.register_forward_pre_hook(lambda layer, args: seen.add((layer.weight.dtype, args[0].dtype)))
            ours, theirs = (FusedAdamW(m.parameters(), skip_nonfinite=True, **HYPER) for m in (model, judge))
            for step in range(2):
                train_step(model, judge, rank, step)
                ours.step()
                theirs.step()
                ours.zero_grad()
            assert_parts_of(ours, theirs)
            (batch,) = tables(ours)[0].batches
            assert (batch.param_dtype, batch.grad_dtype) == (dtype, dtype)
    assert seen == {(torch.bfloat16, torch.bfloat16)}


@scenario
def gradients_of_another_dtype(rank: int) -> None:
    """float32 gradients beside bfloat16 DTensors, where the user allows them, and the other way round."""
    for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        original = Model().to(dtype)
        model, judge = fully_sharded(copy.deepcopy(original)), original
        ours, theirs = (FusedAdamW(m.parameters(), moment_format="8bit", **HYPER) for m in (model, judge))
        for step in range(3):
            for p in (*model.parameters(), *judge.parameters()):
                p.grad = None
                p.grad_dtype = grad_dtype
            gradients = [grad.to(grad_dtype) for grad in full_gradients(judge, step)]
            give(model, gradients)
            give(judge, gradients)
            ours.step()
            theirs.step()
            assert_parts_of(ours, theirs)
        assert {(batch.param_dtype, batch.grad_dtype) for batch in tables(ours)[0].batches} == {(dtype, grad_dtype)}


@scenario
def cpu_offload(rank: int) -> None:
    """CPUOffloadPolicy keeps parameters and gradients in host memory: a run as any other.

    Without pinned memory, which torch has for accelerators only.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    original = Model().bfloat16()
    model, judge = fully_sharded(copy.deepcopy(original), offload_policy=CPUOffloadPolicy(pin_memory=False)), original
    ours, theirs = (
        FusedAdamW(m.parameters(), param_format="split24", moment_format="8bit", **HYPER) for m in (model, judge)
    )
    for step in range(3):
        train_step(model, judge, rank, step)
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_parts_of(ours, theirs)


@scenario
def gradients_that_come_and_go(rank: int) -> None:
    """Frozen layers and layers without a gradient in some steps; parameters that are moved to other memory."""
    original = Model().bfloat16()
    model, judge = fully_sharded(copy.deepcopy(original)), original
    for m in (model, judge):
        m.norm.requires_grad_(False)
    ours, theirs = (
        FusedAdamW(m.parameters(), param_format="split24", moment_format="8bit", **HYPER) for m in (model, judge)
    )
    for step in range(5):
        gradients = full_gradients(judge, step)
        for m in (model, judge):
            give(m, gradients)
            for i, p in enumerate(m.parameters()):
                if not p.requires_grad or (i + step) % 3 == 0:
                    p.grad = None
        if step == 3:  # what an offloading hook does
            for p in model.parameters():
                p._local_tensor.data = p._local_tensor.clone()
        ours.step()
        theirs.step()
        assert_parts_of(ours, theirs)
    assert not ours.state.get(model.norm.weight)


@scenario
def a_resumed_run(rank: int) -> None:
    """`state_dict` of shards into another sharded optimizer: every side tensor, and the bits of what follows."""
    for formats in FORMATS.values():
        first, second = (fully_sharded(Model().bfloat16()) for _ in range(2))
        ours = FusedAdamW(first.parameters(), **formats, **HYPER)
        for step in range(4):
            if step == 2:
                other = FusedAdamW(second.parameters(), **formats, **HYPER)
                with torch.no_grad():
                    for p, q in zip(second.parameters(), first.parameters(), strict=True):
                        p.copy_(q)
                other.load_state_dict(ours.state_dict())
            gradients = full_gradients(Model().bfloat16(), step)
            give(first, gradients)
            ours.step()
            if step >= 2:
                give(second, gradients)
                other.step()
        for p, q in zip(params_of(other), params_of(ours), strict=True):
            pairs = [({"param": p.detach()} | other.state[p]), ({"param": q.detach()} | ours.state[q])]
            assert_unchanged(*([(key, _local(value)) for key, value in sorted(pair.items())] for pair in pairs))


def _local(value: Any) -> torch.Tensor:
    local: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


@scenario
def replicated_over_rows(rank: int) -> None:
    """HSDP over a mesh of 1 x 2 and of 2 x 1: as FSDP2, in every format."""
    for shape in ((1, WORLD), (WORLD, 1)):
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for formats in FORMATS.values():
            judge = Model().bfloat16()
            model = fully_sharded(Model().bfloat16(), mesh=mesh)
            ours, theirs = (FusedAdamW(m.parameters(), **formats, **HYPER) for m in (model, judge))
            for step in range(2):
                gradients = full_gradients(judge, step)
                give(model, gradients)
                give(judge, gradients)
                ours.step()
                theirs.step()
            assert_parts_of(ours, theirs)
            assert_part(next(model.parameters()).detach(), next(judge.parameters()).detach(), "embedding")


test_two_processes = SCENARIOS.test()

if __name__ == "__main__":
    SCENARIOS.main()
