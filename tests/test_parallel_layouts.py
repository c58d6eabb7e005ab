"""Four gloo processes: the same bits on 1, 2 and 4 ranks; tensor parallelism, meshes of two dimensions, pipelines.

World sizes and layouts that shard rows are compared bit for bit with one unsharded process that gets the same
gradients. Where the layout changes the order in which gradients are added up, the model is float64 and the tolerance a
few of its roundings.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pairs import assert_close, params_of
from processes import Scenarios, gathered, whole
from shards import FORMATS, Model, assert_part, assert_parts_of, full_gradients, give

from adamw_kernels import FusedAdamW, grad_norm

WORLD = 4
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

SCENARIOS = scenario = Scenarios(__file__, WORLD, limit_s=240)


def fully_sharded(model: Any, mesh: Any) -> Any:
    """FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def two_by_two(*names: str) -> Any:
    """A mesh of two dimensions."""
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


# --- world sizes ------------------------------------------------------------------------------------------------------


def run(model: Any, dtype: torch.dtype, options: dict[str, Any]) -> FusedAdamW:
    """Three steps on gradients that do not depend on who takes them."""
    opt = FusedAdamW(model.parameters(), **options, **HYPER)
    for step in range(3):
        give(model, full_gradients(Model().to(dtype), step))
        opt.step()
    return opt


@scenario
def world_sizes(rank: int) -> None:
    """`fully_shard` over 1, 2 and 4 ranks and 2 x 2 replicas, in every format: the bits of one process without it."""
    from torch.distributed.device_mesh import DeviceMesh

    meshes = [DeviceMesh("cpu", [*range(n)]) for n in (1, 2, 4)] + [two_by_two("replicate", "shard")]
    cases = [(torch.bfloat16, formats) for formats in FORMATS.values()]
    cases.append((torch.float16, dict(param_format="stochastic", moment_format="bfloat16", seed=6)))
    cases.append((torch.float32, dict(moment_format="8bit", ema_decay=0.9, ema_format="bfloat16", seed=7)))
    local_rows = set()
    for dtype, options in cases:
        judge = run(Model().to(dtype), dtype, options)
        for mesh in meshes:
            if mesh.get_coordinate() is None:
                continue
            model = fully_sharded(Model().to(dtype), mesh)
            local_rows |= {(mesh.shape, p.shape[0], p._local_tensor.shape[0]) for p in model.parameters()}
            assert_parts_of(run(model, dtype, options), judge)
    # 71 rows, 64 rows and one row of 4 ranks: uneven, even, on one rank only.
    mine = {((4,), 71, 18 if rank < 3 else 17), ((4,), 64, 16), ((4,), 1, 1 if rank == 0 else 0)}
    assert mine <= local_rows


# --- tensor parallelism -----------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A norm, a layer to be cut by rows, one to be cut by columns; float64."""

    def __init__(self) -> None:
        """Draw the weights from a fixed seed."""
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(6)
        self.up = torch.nn.Linear(6, 8)
        self.down = torch.nn.Linear(8, 6)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a transformer's feed-forward block."""
        return self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


def batch(step: int) -> torch.Tensor:
    """Four sequences of four vectors."""
    return torch.randn(4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def assert_layout(
    model: Any, placements: dict[str, str], backward: Callable[[Any, int], None], **options: Any
) -> FusedAdamW:
    """Train beside an unsharded model, through backward: norms, weights and states within float64's roundings.

    Args:
        model: a parallel Block.
        placements: of each of its parameters, as text.
        backward: of this rank's share of a step.
        options: of both optimizers.
    """
    found = {name: repr(p.placements) if hasattr(p, "placements") else "plain" for name, p in model.named_parameters()}
    assert found == placements
    judge = Block()
    ours, theirs = (FusedAdamW(m.parameters(), max_grad_norm=0.05, **options, **HYPER) for m in (model, judge))
    for step in range(3):
        backward(model, step)
        judge(batch(step)).square().mean().backward()
        ours.step()
        theirs.step()
        assert theirs.grad_norm > 0.05
        assert all(torch.equal(norm, ours.grad_norm) for norm in gathered(ours.grad_norm))
        assert_close(ours.grad_norm, theirs.grad_norm, "norm_in_float32", "norm")
        ours.zero_grad()
        theirs.zero_grad()
    for (name, p), q in zip(model.named_parameters(), judge.parameters(), strict=True):
        assert_close(whole(p), q, "sharded_against_whole", name)
        for key, value in ours.state[p].items():
            if hasattr(p, "placements") and key != "step":
                assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
            assert_close(whole(value), theirs.state[q][key], "sharded_against_whole", f"{key} of {name}")
    return ours


def plan_of(*, sequence: bool = False) -> dict[str, Any]:
    """Rows of `up`, columns of `down`; `norm` on its own part of each sequence."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if not sequence:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return {
        "norm": SequenceParallel(use_local_output=True),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }


UP_AND_DOWN = {
    "up.weight": "(Shard(dim=0),)",
    "up.bias": "(Shard(dim=0),)",
    "down.weight": "(Shard(dim=1),)",
    "down.bias": "(Replicate(),)",
}


@scenario
def tensor_parallel(rank: int) -> None:
    """`parallelize_module`: rows, columns, replicas and plain parameters in one optimizer, against the whole."""
    from torch.distributed.tensor.parallel import parallelize_module

    model = parallelize_module(Block(), dist.init_device_mesh("cpu", (WORLD,)), plan_of())

    def backward(model: Any, step: int) -> None:
        model(batch(step)).square().mean().backward()

    assert_layout(model, {"norm.weight": "plain", "norm.bias": "plain"} | UP_AND_DOWN, backward)


@scenario
def sequence_parallel(rank: int) -> None:
    """The norm's gradients are sums that are still to be made over the ranks: the step makes them."""
    from torch.distributed.tensor.parallel import parallelize_module

    model = parallelize_module(Block(), dist.init_device_mesh("cpu", (WORLD,)), plan_of(sequence=True))

    def backward(model: Any, step: int) -> None:
        x = batch(step)
        (model(x.chunk(WORLD, dim=1)[rank]).square().sum() / x.numel()).backward()
        assert "Partial" in repr(model.norm.weight.grad.placements)

    replicas = {"norm.weight": "(Replicate(),)", "norm.bias": "(Replicate(),)"}
    assert_layout(model, replicas | UP_AND_DOWN, backward)


@scenario
def tensor_parallel_under_fsdp2(rank: int) -> None:
    """A mesh of 2 x 2: rows cut twice (strided shards), rows and columns, rows of replicas."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = two_by_two("data", "tensor")
    model = parallelize_module(Block(), mesh["tensor"], plan_of())
    fully_shard(model, mesh=mesh["data"])

    def backward(model: Any, step: int) -> None:
        model(batch(step).chunk(2)[mesh.get_local_rank("data")]).square().mean().backward()

    strided = "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    placements = {
        "norm.weight": "(Shard(dim=0),)",
        "norm.bias": "(Shard(dim=0),)",
        "up.weight": strided,
        "up.bias": strided,
        "down.weight": "(Shard(dim=0), Shard(dim=1))",
        "down.bias": "(Shard(dim=0), Replicate())",
    }
    opt = assert_layout(model, placements, backward, ema_decay=0.9)
    (table,) = opt._internals.stepper.plan.tables  # type: ignore[union-attr]
    assert len(table.batches) == 1, "two meshes, one update"


@scenario
def hybrid_sharding(rank: int) -> None:
    """HSDP on 2 x 2: each half of the batch on one pair of replicas."""
    mesh = two_by_two("replicate", "shard")
    model = fully_sharded(Block(), mesh)

    def backward(model: Any, step: int) -> None:
        model(batch(step).chunk(WORLD)[rank]).square().mean().backward()

    assert_layout(model, dict.fromkeys(dict(model.named_parameters()), "(Replicate(), Shard(dim=0))"), backward)


@scenario
def deterministic_formats_in_any_layout(rank: int) -> None:
    """Without chance in the formats, the same gradients give the bits of the whole under any cut, strided or not."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    def made() -> Any:
        return Block().bfloat16()

    def strided() -> Any:
        mesh = two_by_two("data", "tensor")
        model = parallelize_module(made(), mesh["tensor"], plan_of())
        fully_shard(model, mesh=mesh["data"])
        return model

    line = dist.init_device_mesh("cpu", (WORLD,))
    for model in (strided(), parallelize_module(made(), line, plan_of(sequence=True))):
        judge = made()
        ours, theirs = (FusedAdamW(m.parameters(), ema_decay=0.9, **HYPER) for m in (model, judge))
        for step in range(3):
            gradients = full_gradients(judge, step)
            give(model, gradients)
            give(judge, gradients)
            ours.step()
            theirs.step()
        assert_parts_of(ours, theirs)


@scenario
def replicas_draw_the_same(rank: int) -> None:
    """Stochastic formats under tensor parallelism: random bits of each shard's own, the same on every replica."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = two_by_two("replicate", "tensor")
    full = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dim in (0, 1):
        p = torch.nn.Parameter(distribute_tensor(full, mesh, [Replicate(), Shard(dim)], src_data_rank=None))
        opt = FusedAdamW([p], param_format="split24", moment_format="8bit", **HYPER)
        for step in range(2):
            grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)).bfloat16()
            p.grad = distribute_tensor(grad, mesh, p.placements, src_data_rank=None)
            opt.step()
        for key in ("exp_avg_code", "exp_avg_sq_code", "moment_groups", "param_remainder_8bit"):
            parts = gathered(opt.state[p][key].to_local().to(torch.int32))
            assert torch.equal(parts[rank], parts[(rank + 2) % WORLD]), key
            assert not torch.equal(parts[rank], parts[rank ^ 1]), key


# --- pipelines --------------------------------------------------------------------------------------------------------


def stage_of(layers: list[Any], pipeline: Any) -> Any:
    """This rank's stage of a pipeline of two, and a schedule that has run once it is called."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    index = dist.get_rank(pipeline)
    stage = PipelineStage(layers[index], index, 2, torch.device("cpu"), group=pipeline)
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=lambda out, target: (out - target).square().mean())

    def backward(x: torch.Tensor, target: torch.Tensor) -> None:
        if index == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)

    return backward


def pipeline_layers() -> list[torch.nn.Module]:
    """Two stages."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 6)
    return [torch.nn.Sequential(*layers[:2]).double(), torch.nn.Sequential(*layers[2:]).double()]


@scenario
def pipeline_stages(rank: int) -> None:
    """Two pipelines of two stages, an optimizer a rank: norm, clipping and guard over both stages of a pipeline."""
    mesh = two_by_two("pipeline", "stage")
    group = mesh.get_group("stage")
    layers, whole_layers = pipeline_layers(), pipeline_layers()
    backward = stage_of(layers, group)
    mine = layers[dist.get_rank(group)]
    options: dict[str, Any] = dict(max_grad_norm=0.1, skip_nonfinite=True, **HYPER)
    ours = FusedAdamW(mine.parameters(), process_group=group, **options)
    ours.check_ranks(process_group=mesh.get_group("pipeline"))  # the same stage of the other pipeline
    judge = FusedAdamW([p for layer in whole_layers for p in layer.parameters()], **options)
    of_judge = [*whole_layers[dist.get_rank(group)].parameters()]
    for step in range(4):
        x = batch(step).flatten(1)[:, :6]
        backward(x, torch.ones(4, 6, dtype=torch.float64))
        (whole_layers[1](whole_layers[0](x)) - 1).square().mean().backward()
        if step == 2:  # an infinity in one stage of the first pipeline: its other stage skips, too
            if rank == 1:
                next(mine.parameters()).grad[0] = math.inf
            ours.step()
            assert bool(ours.last_step_skipped) == (rank < 2)
            if rank >= 2:
                judge.step()
        else:
            ours.step()
            judge.step()
            if step < 2:
                assert judge.grad_norm > 0.1
                assert_close(ours.grad_norm, judge.grad_norm, "norm_in_float32", "norm over both stages")
        ours.zero_grad()
        judge.zero_grad()
        if step < 2 or rank >= 2:
            for i, (p, q) in enumerate(zip(params_of(ours), of_judge, strict=True)):
                assert_close(p, q, "sharded_against_whole", f"parameter {i} of the stage in step {step}")


@scenario
def pipeline_of_sharded_stages(rank: int) -> None:
    """FSDP2 within each stage: a stage's norm is its own; the norm of all is made of them, and clips from outside."""
    mesh = two_by_two("stage", "data")
    stages, data = mesh.get_group("stage"), mesh.get_group("data")
    layers, whole_layers = pipeline_layers(), pipeline_layers()
    index = dist.get_rank(stages)
    backward = stage_of([fully_sharded(layers[i], mesh["data"]) if i == index else None for i in range(2)], stages)
    ours = FusedAdamW(layers[index].parameters(), **HYPER)
    ours.check_ranks(process_group=data)
    everything = [p for layer in whole_layers for p in layer.parameters()]
    judge = FusedAdamW(everything, max_grad_norm=0.1, **HYPER)
    for step in range(2):
        x = batch(step).flatten(1)[:, :6]
        backward(x.chunk(2)[dist.get_rank(data)], torch.ones(2, 6, dtype=torch.float64))
        (whole_layers[1](whole_layers[0](x)) - 1).square().mean().backward()
        total = grad_norm(layers[index].parameters()) ** 2
        dist.all_reduce(total, group=stages)
        torch.nn.utils.clip_grads_with_norm_(layers[index].parameters(), 0.1, total.sqrt())
        ours.step()
        judge.step()
        assert_close(total.sqrt().float(), judge.grad_norm, "norm_in_float32", "norm of all")
        ours.zero_grad()
        judge.zero_grad()
    for p, q in zip(layers[index].parameters(), whole_layers[index].parameters(), strict=True):
        assert_close(whole(p), q, "sharded_against_whole", "weight")


# --- errors -----------------------------------------------------------------------------------------------------------


@scenario
def an_error_crosses_a_mesh(rank: int) -> None:
    """What one rank of 2 x 2 cannot do is raised on all four, in the first step and later, and then all go on."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = two_by_two("data", "tensor")
    model = parallelize_module(Block(), mesh["tensor"], plan_of())
    fully_shard(model, mesh=mesh["data"])
    judge = Block()
    ours, theirs = (FusedAdamW(m.named_parameters(), max_grad_norm=1e9, **HYPER) for m in (model, judge))
    for step in range(4):
        gradients = full_gradients(judge, step)
        give(model, gradients)
        give(judge, gradients)
        good = model.up.weight.grad._local_tensor
        if rank == step:
            model.up.weight.grad._local_tensor = good.to("meta")
        try:
            ours.step()
        except (ValueError, RuntimeError) as error:
            text = str(error)
        else:
            raise AssertionError(f"no error on rank {rank}")
        assert "the gradient of parameter 'up.weight'" in text, text
        assert rank == step or f"rank {step} cannot take this step" in text, text
        model.up.weight.grad._local_tensor = good
        ours.step()
        theirs.step()
    assert_parts_of(ours, theirs)


@scenario
def lists_that_differ_across_a_mesh(rank: int) -> None:
    """One rank of 2 x 2 has a parameter less: all four raise, whichever rank it is."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = two_by_two("data", "tensor")
    names = ("rows", "columns", "both")
    placements = ([Shard(0), Shard(0)], [Shard(1), Shard(1)], [Shard(0), Shard(1)])
    for who in range(WORLD):
        named = []
        for name, placement in zip(names, placements, strict=True):
            p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, placement, src_data_rank=None))
            p.grad = p.detach().clone()
            named.append((name, p))
        opt = FusedAdamW(named[: 2 if rank == who else 3], skip_nonfinite=True)
        try:
            opt.step()
        except RuntimeError as error:
            assert "parameter 'both'" in str(error) and "nothing more" in str(error), error
        else:
            raise AssertionError(f"no error on rank {rank}")
        assert all(float(entry["step"]) == 0 for entry in opt.state.values())
        assert_part(named[0][1].detach(), torch.ones(4, 8), "weight")


test_four_processes = SCENARIOS.test()

if __name__ == "__main__":
    SCENARIOS.main()
