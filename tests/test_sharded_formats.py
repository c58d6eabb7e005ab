"""Storage formats of sharded parameters: how state is placed, and that shards have the bits of the whole.

A step reads and writes its own shard alone, so one process takes the part of each rank in turn, in a process group that
communicates nothing.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import bits, make_params
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from adamw_kernels import FusedAdamW
from adamw_kernels.formats import MOMENT_FORMATS, PARAM_FORMATS
from adamw_kernels.sharding import first_element

pytestmark = pytest.mark.filterwarnings("ignore:param_format='native'")

CPU = torch.device("cpu")
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, seed=5)
STEPS = 3


@contextlib.contextmanager
def as_rank(rank: int, shape: tuple[int, ...]) -> Iterator[Any]:
    """Be this rank of a mesh.

    Caches of DTensor tell equal meshes apart by the names of their dimensions, not by whose rank they know.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(shape))
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"{i}-of-{rank}" for i in range(len(shape))))
    finally:
        dist.destroy_process_group()


def sharded(tensor: torch.Tensor, mesh: Any, placements: tuple[Placement, ...]) -> Any:
    """This rank's part of a tensor that every rank knows."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


# --- where random bits begin ------------------------------------------------------------------------------------------

# Shape of the tensor, of the mesh, placements.
OF_WHOLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]] = {
    "one-rank": ((6, 5), (1,), (Shard(0),)),
    "even": ((8, 5), (4,), (Shard(0),)),
    "uneven": ((7, 5), (4,), (Shard(0),)),
    "an-empty-shard": ((5, 3, 2), (4,), (Shard(0),)),
    "one-dimension": ((10,), (4,), (Shard(0),)),
    "replicas": ((8, 5), (4,), (Replicate(),)),
    "replicas-of-shards": ((7, 5), (2, 2), (Replicate(), Shard(0))),
    "shards-of-replicas": ((7, 5), (2, 2), (Shard(0), Replicate())),
    "shards-of-shards": ((13, 3), (2, 3), (Shard(0), Shard(0))),
}


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), OF_WHOLE.values(), ids=OF_WHOLE.keys())
def test_first_element_is_the_index_in_the_whole(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    """Sharded over rows, evenly or not, over one mesh dimension or two: a shard's first element's own index."""
    whole, seen = torch.arange(math.prod(shape)).reshape(shape), set()
    for rank in range(math.prod(mesh_shape)):
        with as_rank(rank, mesh_shape) as mesh:
            part = sharded(whole, mesh, placements)
            local = part.to_local()
            if local.numel():
                assert first_element(part, None) == local.flatten()[0]
            seen |= {*local.flatten().tolist()}
    assert seen == {*range(whole.numel())}


APART: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]] = {
    "columns": ((6, 8), (4,), (Shard(1),)),
    "uneven-columns": ((6, 7), (4,), (Shard(1),)),
    "rows-and-columns": ((6, 8), (2, 2), (Shard(0), Shard(1))),
    "columns-of-replicas": ((6, 8), (2, 2), (Replicate(), Shard(1))),
}


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), APART.values(), ids=APART.keys())
def test_other_shards_draw_from_ranges_of_their_own(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    """Different shards never share an index, replicas share all of theirs."""
    ranges: dict[tuple[int, ...], set[int]] = {}
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank in range(math.prod(mesh_shape)):
        with as_rank(rank, mesh_shape) as mesh:
            part = sharded(whole, mesh, placements)
            first = first_element(part, None)
            ranges.setdefault(tuple(part.to_local().flatten().tolist()), set()).add(first)
    assert all(len(firsts) == 1 for firsts in ranges.values())
    spans = sorted((*firsts, len(elements)) for elements, firsts in ranges.items())
    assert len(spans) > 1
    assert all(first + length <= after for (first, length), (after, _) in itertools.pairwise(spans))


def test_plain_tensors_over_a_process_group() -> None:
    """Shards of which only the group is known: ranges of their own; without a group, all begin at 0."""
    firsts = []
    for rank in range(3):
        with as_rank(rank, (3,)):
            assert first_element(torch.zeros(5), None) == 0
            firsts.append(first_element(torch.zeros(5), dist.group.WORLD))
    assert firsts[0] == 0 and firsts[1] - firsts[0] >= 2**32 and firsts[2] - firsts[1] >= 2**32


# --- state ------------------------------------------------------------------------------------------------------------


def gradients(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Those of the whole, for each step."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(STEPS)]


def train(p: Any, grads: list[Any], **options: Any) -> FusedAdamW:
    """Step on these gradients."""
    opt = FusedAdamW([p], **HYPER | options)
    for grad in grads:
        p.grad = grad
        opt.step()
    return opt


def train_as_rank(shape: tuple[int, ...], mesh: Any, placements: tuple[Placement, ...], **options: Any) -> FusedAdamW:
    """The same with this rank's shards."""
    (p,) = make_params(CPU, torch.bfloat16, (shape,))
    part = torch.nn.Parameter(sharded(p.detach(), mesh, placements))
    return train(part, [sharded(grad, mesh, placements) for grad in gradients(shape)], **options)


def state_of(opt: FusedAdamW) -> dict[str, Any]:
    """Weight, state and float32 weight of an optimizer's only parameter."""
    ((p,),) = (group["params"] for group in opt.param_groups)
    return {"param": p.detach(), **opt.state[p], "fp32": opt.fp32_weights()[p]}


# The last two: shards of 16-column groups; shards that would cut them.
STATE_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]] = {
    "1-shard": ((66, 80), (1,), (Shard(0),)),
    "2-shards": ((66, 80), (2,), (Shard(0),)),
    "4-uneven-shards": ((66, 80), (4,), (Shard(0),)),
    "4-shards-of-one-dimension": ((4096,), (4,), (Shard(0),)),
    "3-dimensions": ((5, 30, 32), (4,), (Shard(0),)),
    "mesh-of-two-dimensions": ((66, 80), (2, 2), (Shard(0), Shard(0))),
    "replicas": ((66, 80), (2, 2), (Replicate(), Shard(0))),
}


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), STATE_CASES.values(), ids=STATE_CASES.keys())
@pytest.mark.parametrize(
    ("param_format", "moment_format"), [("split24", "8bit"), ("stochastic", "8bit"), ("split32", "bfloat16")]
)
def test_shards_have_the_bits_of_the_whole(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    param_format: str,
    moment_format: str,
) -> None:
    """Codes, words, remainders, weights and float32 weights, for any number of shards; states are placed as weights."""
    options = dict(param_format=param_format, moment_format=moment_format, ema_decay=0.9, ema_format="bfloat16")
    (p,) = make_params(CPU, torch.bfloat16, (shape,))
    whole = state_of(train(p, gradients(shape), **options))
    for rank in range(math.prod(mesh_shape)):
        with as_rank(rank, mesh_shape) as mesh:
            part = state_of(train_as_rank(shape, mesh, placements, **options))
            assert part.keys() == whole.keys()
            for key, value in part.items():
                expected = whole[key]
                if key in ("step", "exp_avg_sq_scale"):
                    assert not isinstance(value, DTensor)
                else:
                    assert isinstance(value, DTensor)
                    assert (value.device_mesh, value.placements) == (mesh, placements), key
                    assert value.shape == expected.shape, key
                    expected = sharded(expected, mesh, placements).to_local()
                    value = value.to_local()
                assert (value.dtype, value.shape) == (expected.dtype, expected.shape), key
                assert torch.equal(bits(value), bits(expected)), f"{key} of rank {rank}"


@pytest.mark.parametrize(
    ("shape", "placement", "is_8bit"),
    [
        ((66, 80), Shard(0), True),
        ((66, 80), Replicate(), True),
        ((64, 128), Shard(1), True),  # 32 columns each
        ((64, 96), Shard(1), False),  # 24
        ((64, 80), Shard(1), False),  # 20
        ((66, 81), Shard(0), False),  # rows that end within a group
        ((4096,), Shard(0), True),
        ((4104,), Shard(0), False),
        ((4098,), Shard(0), False),
        ((32, 64), Shard(0), False),  # too small, as a whole
        ((128, 32), Shard(0), True),  # large enough as a whole, not each shard
    ],
    ids=str,
)
def test_8bit_where_shards_do_not_cut_groups(shape: tuple[int, ...], placement: Placement, is_8bit: bool) -> None:
    """Every rank decides alike, and float32 is kept where a word would belong to two shards."""
    for rank in range(4):
        with as_rank(rank, (4,)) as mesh:
            opt = train_as_rank(shape, mesh, (placement,), moment_format="8bit")
            ((p, (_, moments)),) = opt.formats().items()
            assert (moments == "8bit") == is_8bit, f"rank {rank}"
            assert ("exp_avg_code" in opt.state[p], "exp_avg" in opt.state[p]) == (is_8bit, not is_8bit)


@pytest.mark.parametrize("moment_format", MOMENT_FORMATS)
@pytest.mark.parametrize("param_format", PARAM_FORMATS)
def test_interchange_of_shards(param_format: str, moment_format: str) -> None:
    """Resuming, exporting, importing and converting shards: DTensors all the way, with the bits of the whole."""
    shape, placements = (66, 80), (Shard(0),)
    options = dict(param_format=param_format, moment_format=moment_format)
    (p,) = make_params(CPU, torch.bfloat16, (shape,))
    before = train(p, gradients(shape)[:1], **options)
    with as_rank(1, (2,)) as mesh:

        def local(tensor: torch.Tensor) -> torch.Tensor:
            return sharded(tensor, mesh, placements).to_local()  # type: ignore[no-any-return]

        opt = train_as_rank(shape, mesh, placements, **options)
        ((part,),) = (group["params"] for group in opt.param_groups)
        resumed = FusedAdamW([torch.nn.Parameter(part.detach().clone())], **HYPER | options)
        resumed.load_state_dict(opt.state_dict())
        twin = resumed.param_groups[0]["params"][0]
        grad = sharded(gradients(shape)[0], mesh, placements)
        for optimizer, q in ((opt, part), (resumed, twin)):
            q.grad = grad.clone()
            optimizer.step()
        for key, value in state_of(opt).items():
            assert torch.equal(bits(_local(value)), bits(_local(state_of(resumed)[key]))), key

        exported = opt.export_state_dict()["state"][0]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (exported[key].dtype, exported[key].placements) == (torch.float32, placements)
        # An import and a conversion, of which the whole is the judge.
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        opt.load_fp32_weights([sharded(weights, mesh, placements)])
        assert opt.fp32_weights()[part].placements == placements
        before.load_fp32_weights([weights])
        assert torch.equal(_local(opt.fp32_weights()[part]), local(before.fp32_weights()[p]))
        with pytest.raises(ValueError, match="of which .* are here; the parameter has .* Shard it as the parameter is"):
            opt.load_fp32_weights([weights])
        opt.load_state_dict({**opt.state_dict(), "state": {0: _as_shards(before, p, mesh, placements)}})
        for after in (("split32", "8bit"), ("split24", "bfloat16")):
            for optimizer in (opt, before):
                optimizer.convert(param_format=after[0], moment_format=after[1])
            whole = {**before.state[p], "fp32": before.fp32_weights()[p]}
            found = {**opt.state[part], "fp32": opt.fp32_weights()[part]}
            assert found.keys() == whole.keys()
            for key, value in found.items():
                expected = local(whole[key]) if isinstance(value, DTensor) else whole[key]
                assert torch.equal(bits(_local(value)), bits(expected)), key


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _as_shards(opt: FusedAdamW, p: torch.Tensor, mesh: Any, placements: tuple[Placement, ...]) -> dict[str, Any]:
    """The state of a whole parameter, cut as a checkpoint's reader would."""
    state = {**opt.state[p]}
    return {key: sharded(value, mesh, placements) if value.ndim else value for key, value in state.items()}
