"""DistributedDataParallel, ZeroRedundancyOptimizer and FSDP1: replicas, partitions and flat shards have the same bits.

Four gloo processes run every scenario, some of them as worlds of one and two. The judge is one optimizer in one process
that is given the same gradients.
"""

import copy
import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import assert_same_bits, bits, copies, make_params, params_of, snapshot
from processes import Scenarios, gathered
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from adamw_kernels import FusedAdamW, number_parameters

pytestmark = pytest.mark.filterwarnings("ignore:param_format='native'")

WORLD = 4
SCENARIOS = scenario = Scenarios(__file__, WORLD, limit_s=240, scenario_limit_s=30)

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
AVERAGE: dict[str, Any] = dict(ema_decay=0.9, ema_format="bfloat16")
# In the order of what they round by chance: nothing, the weight, all there is.
FORMATS: list[dict[str, Any]] = [
    {},
    dict(param_format="stochastic", moment_format="bfloat16"),
    dict(param_format="split24", moment_format="8bit", seed=7, **AVERAGE),
]


def make_model(dtype: torch.dtype = torch.bfloat16, columns: int = 65) -> torch.nn.Sequential:
    """Return a model whose weights have 4,225, 65, 455 and 7 elements: the first has 8-bit moments, all are odd."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(65, columns), torch.nn.Tanh(), torch.nn.Linear(columns, 7)
    return torch.nn.Sequential(*layers).to(dtype)


def backward(model: torch.nn.Module, rank: int, iteration: int) -> None:
    """Gradients of a batch of this rank's own."""
    dtype = next(model.parameters()).dtype
    batch = torch.randn(3, 65, generator=torch.Generator().manual_seed(10 * iteration + rank)).to(dtype)
    model.zero_grad()
    model(batch).square().mean().backward()


def give(params: list[torch.Tensor], iteration: int) -> None:
    """Gradients that every rank knows, as if they had been averaged."""
    generator = torch.Generator().manual_seed(iteration)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def assert_same_everywhere(params: list[torch.Tensor], what: str) -> None:
    """All ranks have the same bits."""
    everything = torch.cat([bits(p) for p in params])
    first, *others = gathered(everything)
    assert all(torch.equal(first, other) for other in others), what


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


@scenario
def data_parallel(rank: int) -> None:
    """Every replica has the bits of one process that is given the averaged gradients, also as views of buckets."""
    for ddp_options in ({}, dict(gradient_as_bucket_view=True), dict(gradient_as_bucket_view=True, static_graph=True)):
        for options in FORMATS:
            model = make_model()
            judge = FusedAdamW(copies(model.parameters()), **HYPER, **options)
            replica = DistributedDataParallel(model, **ddp_options)
            ours = FusedAdamW(replica.parameters(), **HYPER, **options)
            addresses = set()
            for iteration in range(4):
                backward(replica, rank, iteration)
                for p, q in zip(params_of(ours), params_of(judge), strict=True):
                    q.grad = p.grad.clone()
                    addresses.add(p.grad.data_ptr() % 16)
                ours.step()
                judge.step()
                assert_same_bits(ours, judge)
            assert_same_everywhere([tensor for _, tensor in snapshot(ours)], f"{ddp_options}, {options}")
            assert (len(addresses) > 1) == bool(ddp_options), "gradients begin at odd places of a bucket"


@scenario
def data_parallel_with_clipping(rank: int) -> None:
    """Each replica takes the same decisions on the same gradients; one rank's overflow skips the step on all."""
    options = dict(max_grad_norm=0.1, skip_nonfinite=True, **FORMATS[2])
    replica = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    ours = FusedAdamW(replica.parameters(), **HYPER, **options)
    for iteration in range(3):
        backward(replica, rank, iteration)
        ours.step()
        assert ours.grad_norm > 0.1 and not ours.last_step_skipped
    batch = torch.full((3, 65), float("inf") if rank == 1 else 1.0).bfloat16()
    replica.zero_grad()
    replica(batch).square().mean().backward()
    before = snapshot(ours)
    ours.step()
    assert ours.last_step_skipped
    assert all(torch.equal(bits(x), bits(y)) for (_, x), (_, y) in zip(before, snapshot(ours), strict=True))
    assert_same_everywhere([tensor for _, tensor in snapshot(ours)], "weights and state")


# --- ZeroRedundancyOptimizer ------------------------------------------------------------------------------------------


def partitioned(model: torch.nn.Module, options: dict[str, Any], *, as_views: bool, numbered: bool = True) -> Any:
    """FusedAdamW in as many parts as there are processes."""
    if numbered:
        number_parameters(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=FusedAdamW,
            parameters_as_bucket_view=as_views,
            **HYPER,
            **options,
        )


def consolidated(opt: Any) -> dict[str, Any]:
    """The whole state, on every rank, through a file that holds tensors and plain values only."""
    opt.consolidate_state_dict(0)
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        box = [file.getvalue()]
    dist.broadcast_object_list(box, 0)
    state: dict[str, Any] = torch.load(io.BytesIO(box[0]), weights_only=True)
    return state


Weights = list[list[torch.Tensor]]  # after each step


def train_on(opt: Any, weights: Weights, first: int, last: int) -> None:
    """Step, with the expected weights after each step."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for iteration in range(first, last):
        give(params, iteration)
        opt.step()
        for p, expected in zip(params, weights[iteration], strict=True):
            assert torch.equal(bits(p), bits(expected)), f"step {iteration} on {dist.get_world_size()} ranks"


def save(expected: list[Weights], as_views: bool) -> list[dict[str, Any]]:
    """For each format, the state after two steps."""
    states = []
    for options, weights in zip(FORMATS, expected, strict=True):
        opt = partitioned(make_model(), options, as_views=as_views)
        train_on(opt, weights, 0, 2)
        states.append(consolidated(opt))
    return states


def go_on(expected: list[Weights], as_views: bool, states: list[dict[str, Any]]) -> None:
    """Two more steps, in optimizers that were made with another seed."""
    for options, weights, state in zip(FORMATS, expected, states, strict=True):
        model = make_model()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights[1], strict=True):
                p.copy_(weight)
        opt = partitioned(model, {**options, "seed": 99}, as_views=as_views)
        opt.load_state_dict(copy.deepcopy(state))
        train_on(opt, weights, 2, 4)


@scenario
def partitions_of_numbered_parameters(rank: int) -> None:
    """On 1, 2, 4 ranks: the bits of one optimizer for all, also where the state goes on in another number of ranks."""
    expected: list[Weights] = []
    for options in FORMATS:
        judge = FusedAdamW(make_model().parameters(), **HYPER, **options)
        expected.append([])
        for iteration in range(4):
            give(params_of(judge), iteration)
            judge.step()
            expected[-1].append([p.detach().clone() for p in params_of(judge)])
    for world, as_views, after, views_after in ((1, False, 2, False), (2, True, 4, True), (4, False, 1, True)):
        box = [SCENARIOS.in_world(world, functools.partial(save, expected, as_views))]
        dist.broadcast_object_list(box, 0)
        SCENARIOS.in_world(after, functools.partial(go_on, expected, views_after, box[0]))
    for options, weights, state in zip(FORMATS, expected, box[0], strict=True):
        plain = FusedAdamW(copies(weights[1]), **HYPER, **options)
        plain.load_state_dict(state)
        train_on(plain, weights, 2, 4)


@scenario
def partitions_without_numbers(rank: int) -> None:
    """Replicas agree all the same, and have one optimizer's bits wherever nothing is rounded by chance."""
    for options in FORMATS:
        model = make_model()
        judge = FusedAdamW(copies(model.parameters()), **HYPER, **options)
        opt = partitioned(model, options, as_views=False, numbered=False)
        for iteration in range(3):
            give(params_of(judge), iteration)
            give([*model.parameters()], iteration)
            judge.step()
            opt.step()
        assert_same_everywhere([*model.parameters()], str(options))
        same = all(torch.equal(bits(p), bits(q)) for p, q in zip(model.parameters(), params_of(judge), strict=True))
        assert same == (not options)


def test_numbers() -> None:
    """Parts of a model in optimizers of their own have the bits of one optimizer for all; numbers go on from there."""
    options = dict(param_format="stochastic", moment_format="8bit", **HYPER)
    params = make_params(torch.device("cpu"), torch.bfloat16, ((67, 63), (7,), (5, 3)))
    judge = FusedAdamW(copies(params), **options)
    assert number_parameters(params[:1]) == 1
    assert number_parameters(params[1:], first=1) == 3
    parts = [FusedAdamW(params[1:][::-1], **options), FusedAdamW(params[:1], **options)]
    for iteration in range(3):
        give(params_of(judge), iteration)
        give(params, iteration)
        for opt in (judge, *parts):
            opt.step()
        for p, q in zip(params, params_of(judge), strict=True):
            assert torch.equal(bits(p), bits(q))
            state = judge.state[q]
            found = next(opt.state[p] for opt in parts if p in opt.state)
            assert all(torch.equal(bits(found[key]), bits(value)) for key, value in state.items())
    with pytest.raises(TypeError, match="number_parameters: parameter 4 is str; expected a torch.Tensor"):
        number_parameters([params[0], "weight"], first=3)  # type: ignore[list-item]


# --- FSDP1 ------------------------------------------------------------------------------------------------------------


def flat_sharded(dtype: torch.dtype, *, orig: bool) -> FullyShardedDataParallel:
    """FSDP1, whose ranks cut the flattened model anywhere."""
    return FullyShardedDataParallel(make_model(dtype), use_orig_params=orig, device_id=torch.device("cpu"))


def handed_over(kind: str, model: Any, opt: Any, fresh: Any, target: Any) -> None:
    """Weights and state, from one optimizer to another of the same model, in one of torch's ways."""
    if kind in ("checkpoint", "flattened"):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=kind == "flattened")
        state = dcp.get_optimizer_state_dict(model, opt, options=options)
        dcp.set_model_state_dict(fresh, dcp.get_model_state_dict(model))
        dcp.set_optimizer_state_dict(fresh, target, state, options=options)
        return
    form = StateDictType.FULL_STATE_DICT if kind == "full" else StateDictType.SHARDED_STATE_DICT
    fsdp = FullyShardedDataParallel
    with fsdp.state_dict_type(model, form):
        weights, state = model.state_dict(), fsdp.optim_state_dict(model, opt)
    with fsdp.state_dict_type(fresh, form):
        fresh.load_state_dict(weights)
        target.load_state_dict(fsdp.optim_state_dict_to_load(fresh, target, state))


@scenario
def flat_shards_save_and_go_on(rank: int) -> None:
    """Every format that FSDP1 can hold, to the bit, through `optim_state_dict` and through a distributed checkpoint."""
    # torch 2.13's full optimizer state of original parameters on a CPU is wrong for its own AdamW, too.
    ways = [(True, "sharded"), (True, "checkpoint"), (True, "flattened"), (False, "full"), (False, "checkpoint")]
    formats = [AVERAGE, *FORMATS[1:2], dict(param_format="split24", moment_format="bfloat16", seed=7, **AVERAGE)]
    for dtype, options in ((torch.float32, AVERAGE), *((torch.bfloat16, options) for options in formats)):
        for orig, kind in ways:
            model, fresh = (flat_sharded(dtype, orig=orig) for _ in range(2))
            group = model.process_group
            opt = FusedAdamW(model.parameters(), process_group=group, **HYPER, **options)
            target = FusedAdamW(fresh.parameters(), process_group=group, **{**HYPER, **options, "lr": 0.5, "seed": 3})
            for iteration in range(2):
                backward(model, rank, iteration)
                opt.step()
            handed_over(kind, model, opt, fresh, target)
            for each, optimizer in ((model, opt), (fresh, target)):
                backward(each, rank, 2)
                optimizer.step()
            assert opt.state, "every rank holds something"
            assert_same_bits(opt, target)


def whole_of(model: Any, opt: Any) -> dict[str, Any]:
    """Weights and states, whole, by name."""
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        states = FullyShardedDataParallel.optim_state_dict(model, opt)["state"]
        found = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
        return found | model.state_dict()


def through_a_checkpoint(path: str, options: dict[str, Any], saves: bool) -> dict[str, Any]:
    """Weights and states that are saved, or loaded."""
    model = flat_sharded(torch.bfloat16, orig=False)
    opt = FusedAdamW(model.parameters(), process_group=model.process_group, **HYPER, **options)
    if saves:
        backward(model, dist.get_rank(), 0)
        opt.step()
    states = {"model": dcp.get_model_state_dict(model), "optim": dcp.get_optimizer_state_dict(model, opt)}
    if saves:
        checkpoint.save(states, checkpoint_id=path)
    else:
        checkpoint.load(states, checkpoint_id=path)
        dcp.set_model_state_dict(model, states["model"])
        dcp.set_optimizer_state_dict(model, opt, states["optim"])
    return whole_of(model, opt)


@scenario
def flat_shards_on_other_ranks(rank: int) -> None:
    """What FSDP1 saves on 2 ranks is the same on 4, and the reverse: default formats, split24 beside bfloat16."""
    for options in (AVERAGE, dict(param_format="split24", moment_format="bfloat16", **AVERAGE)):
        for before, after in ((2, 4), (4, 2)):
            box = [tempfile.mkdtemp(dir=SCENARIOS.directory) if rank == 0 else None]
            dist.broadcast_object_list(box, 0)
            saved, loaded = (
                SCENARIOS.in_world(world, functools.partial(through_a_checkpoint, box[0], options, saves))
                for world, saves in ((before, True), (after, False))
            )
            if rank == 0:
                assert saved.keys() == loaded.keys() and len(saved) > 16
                assert all(torch.equal(bits(value), bits(loaded[key])) for key, value in saved.items())


@scenario
def flat_shards_of_8_bits(rank: int) -> None:
    """Moments whose groups FSDP1 would cut are refused on every rank, by name, before anything is written."""
    for orig in (True, False):
        model = flat_sharded(torch.bfloat16, orig=orig)
        opt = FusedAdamW(model.parameters(), moment_format="8bit", **HYPER)
        backward(model, rank, 0)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"moment_format of param_groups\[0\]\['params'\]\[0\] is '8bit'.*FSDP2"):
            opt.step()
        assert not opt.state
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        opt.convert(moment_format="bfloat16")
        opt.step()


# --- the tests --------------------------------------------------------------------------------------------------------

test_four_processes: Callable[..., None] = SCENARIOS.test()

if __name__ == "__main__":
    SCENARIOS.main()
