"""Bugs that other fused AdamW implementations have or had, each reproduced here against ours.

The bugs are those of forty threads and sources of apex, TransformerEngine, DeepSpeed, Megatron, ColossalAI, FlagGems,
accelerate, Lightning and torch itself. A number is the bug's place in that list; a docstring says what must hold here.
`NOT_TESTED_HERE` holds the numbers that no test of this file covers, each with the reason.
"""

import copy
import gc
import inspect
import io
import itertools
import math
import pathlib
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CPU, Path
from problems import Guarded, assert_same_bits, stored
from reference import compute_dtype, step_count_after, step_exact
from reference_formats import SPLITS, merge_weight, split_weight
from tolerances import tolerance
from torch.distributed.checkpoint import state_dict as dcp

from adamw_kernels import FusedAdamW, backends, fused_adamw_

# The interpreter computes with NumPy, which warns of NaN and of divisions by zero on masked lanes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NOT_TESTED_HERE: dict[int, str] = {
    3: "tests/test_large.py updates tensors of 2^31 - 1, 2^31 + and 2^32 + elements on every path",
    37: "tests/test_cuda_graphs.py replays captured steps with new gradients and rates, beside eager steps",
}

HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def test_every_bug_of_the_list_has_a_test_or_a_reason() -> None:
    """Each number from 1 to 40 is tested by name in this file, or explained, and not both."""
    names = [name for name in globals() if name.startswith("test_pitfall_")]
    tested = {int(re.fullmatch(r"test_pitfall_(\d\d)_\w+", name).group(1)) for name in names}  # type: ignore[union-attr]
    assert tested | set(NOT_TESTED_HERE) == set(range(1, 41))
    assert not tested & set(NOT_TESTED_HERE)
    assert all(NOT_TESTED_HERE.values())


# --- an optimizer and the reference beside it -------------------------------------------------------------------------


class Twin:
    """One parameter and its state as NumPy arrays."""

    def __init__(self, param: torch.Tensor) -> None:
        """Copy the parameter as it is now; no step was taken."""
        self.dtype = str(param.dtype).removeprefix("torch.")
        self.moment_dtype = np.dtype(compute_dtype(self.dtype)).name
        self.p = stored(param)
        self.remainder: np.ndarray | None = None
        self.m, self.v, self.v_max = (np.zeros(param.shape, self.moment_dtype) for _ in range(3))
        self.t = np.float32(0)

    def step(self, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """One step of the reference with a parameter group's options; of param_format "native" or "split32"."""
        self.t = step_count_after(self.t)
        beta1, beta2 = group["betas"]
        is_split = self.dtype in SPLITS and group.get("param_format", "auto") != "native"
        weight = self.p
        if is_split:
            remainder = np.zeros(self.p.shape, np.int16) if self.remainder is None else self.remainder
            weight = merge_weight(self.p, remainder, self.dtype, "split32")
        weight, self.m, self.v, v_max = step_exact(
            weight,
            stored(grad),
            self.m,
            self.v,
            self.v_max if group["amsgrad"] else None,
            int(self.t),
            param_dtype="float32" if is_split else self.dtype,
            grad_dtype=str(grad.dtype).removeprefix("torch."),
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            decoupled=group["decoupled_weight_decay"],
        )
        self.v_max = self.v_max if v_max is None else v_max
        if is_split:
            self.p, self.remainder = split_weight(weight, self.dtype, "split32")
        else:
            self.p = weight

    def check(self, param: torch.Tensor, state: dict[str, Any], what: str) -> None:
        """Compare every bit of the parameter, its moments and its step count."""
        assert_same_bits(stored(param), self.p, self.dtype, what)
        if self.t == 0:
            assert not state, f"{what} never had a gradient"
            return
        assert ("param_remainder" in state) == (self.remainder is not None), what
        if self.remainder is not None:
            np.testing.assert_array_equal(stored(state["param_remainder"]), self.remainder, f"remainder of {what}")
        for key, array in (("exp_avg", self.m), ("exp_avg_sq", self.v)):
            assert_same_bits(stored(state[key]), array, self.moment_dtype, f"{key} of {what}")
        if "max_exp_avg_sq" in state:
            assert_same_bits(stored(state["max_exp_avg_sq"]), self.v_max, self.moment_dtype, f"maximum of {what}")
        assert state["step"].item() == self.t, f"step of {what}"


class Judge:
    """The reference beside an optimizer: steps both and compares every bit of parameters, moments and step counts."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy every parameter as it is now."""
        self.optimizer = optimizer
        self._twins: dict[torch.Tensor, Twin] = {}
        self._see()

    def _places(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for i, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                yield f"group {i}, parameter {j}", p, group

    def _see(self) -> None:
        for _, p, _ in self._places():
            self._twins.setdefault(p, Twin(p))

    def expect(self) -> None:
        """Step the reference alone."""
        self._see()
        for _, p, group in self._places():
            if p.grad is not None:
                self._twins[p].step(p.grad, group)

    def step(self) -> None:
        """Step both, compare."""
        self.expect()
        self.optimizer.step()
        self.check()

    def check(self) -> None:
        """Compare without a step."""
        for what, p, _ in self._places():
            self._twins[p].check(p, self.optimizer.state.get(p, {}), what)


def parameter(*shape: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A parameter with random values and a random gradient."""
    rng = torch.Generator().manual_seed(1000 * seed + sum(shape))
    p = torch.nn.Parameter(torch.randn(shape, generator=rng).to(device=device, dtype=dtype))
    p.grad = torch.randn(shape, generator=rng).to(device=device, dtype=dtype)
    return p


def parameters(count: int, device: torch.device) -> list[torch.nn.Parameter]:
    """Small parameters of different sizes with random gradients."""
    return [parameter(3 + i, device=device, seed=i) for i in range(count)]


def renew_grads(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Other random gradients, in place, where there are any."""
    rng = torch.Generator().manual_seed(seed)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            p.grad.copy_(torch.randn(p.shape, generator=rng))


def bits_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything a step writes, as plain data that compares with ==."""
    found: list[Any] = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(p, {})
        tensors = {"param": p, **{key: v for key, v in state.items() if isinstance(v, torch.Tensor)}}
        found.append({key: (v.dtype, tuple(v.shape), stored(v).tobytes()) for key, v in tensors.items()})
    return found


# --- the launcher and memory ------------------------------------------------------------------------------------------

EMPTY_PLACES = {"first": {0}, "middle": {1, 2}, "last": {4}, "first-and-last": {0, 4}, "all": set(range(5))}


@pytest.mark.parametrize("empty", EMPTY_PLACES.values(), ids=EMPTY_PLACES.keys())
def test_pitfall_01_empty_tensors_drop_pending_work(path: Path, empty: set[int]) -> None:
    """Empty tensors anywhere in a list leave every other tensor's update complete, and count their own steps."""
    empty_shapes = itertools.cycle([(0,), (0, 4), (3, 0)])
    shapes = [next(empty_shapes) if i in empty else (7 + i,) for i in range(5)]
    params = [parameter(*shape, device=path.device, seed=i) for i, shape in enumerate(shapes)]
    judge = Judge(FusedAdamW([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}], **HYPER))
    judge.step()
    renew_grads(judge.optimizer, 1)
    judge.step()


def test_pitfall_02_empty_tensor_in_the_last_metadata_slot(path: Path) -> None:
    """Empty tensors around positions 30 and 36, where peers' launch metadata is full, with over 50 tensors behind."""
    empty = {29, 30, 31, 35, 36, 37}
    params = [parameter(0 if i in empty else 1 + i % 5, device=path.device, seed=i) for i in range(91)]
    Judge(FusedAdamW(params, **HYPER)).step()


@pytest.mark.slow
def test_pitfall_04_fifty_thousand_parameters(device: torch.device) -> None:
    """One step over 50,000 scalar parameters updates every one of them."""
    count = 50_000
    values = torch.linspace(-1, 1, count)
    flat, grads = values.clone().to(device), values.flip(0).to(device)
    params = [torch.nn.Parameter(p) for p in flat.unbind()]
    for p, grad in zip(params, grads.unbind(), strict=True):
        p.grad = grad
    optimizer = FusedAdamW(params, backend="cpu" if device == CPU else "auto", **HYPER)
    optimizer.step()
    twin = Twin(values)
    twin.step(values.flip(0), optimizer.param_groups[0])
    keys = ("exp_avg", "exp_avg_sq")
    state = {key: torch.stack([optimizer.state[p][key] for p in params]) for key in keys}
    twin.check(flat, {**state, "step": torch.ones(())}, "50,000 scalars")
    assert torch.stack([optimizer.state[p]["step"] for p in params]).eq(1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pitfall_05_misaligned_bucket_views(path: Path, dtype: str) -> None:
    """Views at odd element offsets, different for every operand, are updated exactly and nothing beside them is."""
    sizes = (1, 5, 33, 1027)
    offsets = {"param": 1, "grad": 3, "exp_avg": 2, "exp_avg_sq": 5}
    rng = np.random.default_rng(5)
    guarded = [
        {
            key: Guarded((n,), "float32" if key.startswith("exp") else dtype, path.device, offset=(offset + i) % 8)
            for key, offset in offsets.items()
        }
        for i, n in enumerate(sizes)
    ]
    params = []
    for views, n in zip(guarded, sizes, strict=True):
        for key in ("param", "grad"):
            values = torch.from_numpy(rng.standard_normal(n)).to(views[key].tensor.dtype)
            views[key].write(stored(values))
        p = torch.nn.Parameter(views["param"].tensor)
        p.grad = views["grad"].tensor
        params.append(p)
    optimizer = FusedAdamW(params, **HYPER)
    for p, views in zip(params, guarded, strict=True):
        moments = {key: views[key].tensor.zero_() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=path.device), **moments}
    judge = Judge(optimizer)
    judge.step()
    judge.step()
    for p, views in zip(params, guarded, strict=True):
        assert optimizer.state[p]["exp_avg"] is views["exp_avg"].tensor
        for key, view in views.items():
            view.check(stored(view.tensor), f"{key} of {len(p)} elements")


GRAD_LAYOUTS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "contiguous-param-transposed-grad": (lambda: torch.randn(4, 6), lambda g: g.t().contiguous().t()),
    "transposed-param-contiguous-grad": (lambda: torch.randn(6, 4).t(), torch.Tensor.contiguous),
    "channels-last-param-contiguous-grad": (
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.Tensor.contiguous,
    ),
    "contiguous-param-channels-last-grad": (
        lambda: torch.randn(2, 3, 4, 5),
        lambda g: g.to(memory_format=torch.channels_last),
    ),
    "expanded-grad": (lambda: torch.randn(4, 6), lambda g: g[:, :1].clone().expand(4, 6)),
    "every-other-column-grad": (lambda: torch.randn(4, 6), lambda g: g.repeat_interleave(2, dim=1)[:, ::2]),
    "permuted-3d-grad": (
        lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
        lambda g: g.permute(1, 2, 0).clone().permute(2, 0, 1),
    ),
    "odd-strides-of-size-1-dims": (
        lambda: torch.randn(4, 1, 6),
        lambda g: torch.as_strided(g.contiguous(), (4, 1, 6), (6, 17, 1)),
    ),
}


@pytest.mark.parametrize(("make", "lay"), GRAD_LAYOUTS.values(), ids=GRAD_LAYOUTS.keys())
def test_pitfall_06_gradient_strides_differ_from_the_parameters(
    path: Path, make: Callable[[], torch.Tensor], lay: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A gradient in another memory layout is paired element by element, on the first step and on warm ones."""
    torch.manual_seed(6)
    p = torch.nn.Parameter(make().to(path.device))
    strides = p.stride()
    judge = Judge(FusedAdamW([p], **HYPER))
    for _ in range(3):
        p.grad = lay(torch.randn(p.shape)).to(path.device)
        judge.step()
    p.grad = torch.randn_like(p)  # back to the parameter's own layout
    judge.step()
    assert p.stride() == strides
    assert judge.optimizer.state[p]["exp_avg"].stride() == strides, "moments have the parameter's layout"


def test_pitfall_06_loaded_moments_in_another_layout(path: Path) -> None:
    """Contiguous moments loaded beside a channels_last parameter are re-laid, not read in the wrong order."""
    torch.manual_seed(6)
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(path.device, memory_format=torch.channels_last))
    p.grad = torch.randn_like(p)
    judge = Judge(FusedAdamW([p], **HYPER))
    judge.step()
    loaded = judge.optimizer.state_dict()
    for key in ("exp_avg", "exp_avg_sq"):
        loaded["state"][0][key] = loaded["state"][0][key].contiguous()
    judge.optimizer.load_state_dict(loaded)
    judge.step()


def test_pitfall_06_expanded_gradient_beside_other_tensors(device: torch.device) -> None:
    """An expanded gradient is as large as its memory: what lies behind it is not taken for a part of it."""
    flat = torch.linspace(-1, 1, 50).to(device)
    p = torch.nn.Parameter(flat[1:41])
    p.grad = flat[0:1].expand(40)
    Judge(FusedAdamW([p], **HYPER)).step()


def test_pitfall_06_overlapping_memory_is_refused(device: torch.device) -> None:
    """A parameter whose elements share memory cannot be updated in place: an error, not a race."""
    p = torch.nn.Parameter(torch.ones(1, device=device).expand(4))
    p.grad = torch.ones(4, device=device)
    with pytest.raises(ValueError, match="overlap"):
        FusedAdamW([p]).step()
    assert p.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_pitfall_07_wrong_device_accepted(device: torch.device, key: str) -> None:
    """State on another device is brought over or refused by name; it is never read at an address of another memory."""
    first, second = parameters(2, device)
    judge = Judge(FusedAdamW([first, second], **HYPER))
    judge.step()
    before = bits_of(judge.optimizer)
    elsewhere = torch.device("meta") if device == CPU else CPU
    judge.optimizer.state[second][key] = judge.optimizer.state[second][key].to(elsewhere)
    if device == CPU:
        with pytest.raises(ValueError, match=rf"{key} of param_groups\[0\]\['params'\]\[1\] is on the meta device"):
            judge.optimizer.step()
        del judge.optimizer.state[second]
        untouched = bits_of(judge.optimizer)
        assert untouched == [before[0], {"param": before[1]["param"]}]
    else:
        judge.step()
        assert judge.optimizer.state[second][key].device == device


def test_pitfall_07_gradient_on_another_device(device: torch.device) -> None:
    """A gradient that lives elsewhere than its parameter is refused by name, before its address is used."""
    p = parameter(4, device=device).detach()
    moments = [torch.zeros_like(p) for _ in range(2)]
    step = torch.zeros((), device=device)
    grad = torch.ones(4, device="meta" if device == CPU else CPU)
    with pytest.raises(
        ValueError, match=rf"the gradient of params\[0\] is on {grad.device}, the parameter on {p.device}"
    ):
        fused_adamw_([p], [grad], moments[:1], moments[1:], [], [step], lr=1.0)
    assert step.item() == 0 and not moments[0].any()


def test_pitfall_08_groups_alternating_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that alternate between devices and dtypes each keep their own rate, whichever device is current.

    One GPU shows CPU and GPU in turns, two show a device that is not the current one; without one, dtypes alternate.
    """
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    devices = [CPU, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float64), devices)
    groups = []
    for i, (dtype, device) in enumerate([*kinds] * 2):
        rate = torch.tensor(10.0**-i, device=device, dtype=torch.float64)
        groups.append(dict(params=[parameter(6, device=device, dtype=dtype, seed=i)], lr=rate, weight_decay=0.1 * i))
    judge = Judge(FusedAdamW(groups))
    judge.step()
    for group in groups:
        group["lr"].mul_(0.5)
    judge.step()


# --- mixed precision --------------------------------------------------------------------------------------------------


def make_scaler(device: torch.device, scale: float = 1024.0, **options: Any) -> torch.amp.GradScaler:
    """A scaler that has its scale already."""
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, **options)
    scaler.scale(torch.ones((), device=device))
    return scaler


def backward(scaler: torch.amp.GradScaler, params: list[torch.nn.Parameter], seed: int, *, overflow: bool) -> None:
    """Scaled gradients, one of them infinite if `overflow`."""
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.device, p.dtype) * scaler.get_scale()
    if overflow:
        params[-1].grad[0] = math.inf


# With fused=True the scaler hands its scale and its flag over, and the device unscales and skips; else the host does.
EITHER_WAY = pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])


@EITHER_WAY
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
@pytest.mark.parametrize("flag", [1.0, 2.0, math.nan, math.inf])
def test_pitfall_09_found_inf_above_one(
    device: torch.device, flag: float, shape: tuple[int, ...], fused: bool | None
) -> None:
    """Any flag but zero skips the step: parameters, moments and step counts stay as they were."""
    params = parameters(2, device)
    optimizer = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}], fused=fused, **HYPER)
    optimizer.step()
    before = bits_of(optimizer)
    scaler = make_scaler(device)
    backward(scaler, params, 9, overflow=False)
    scaler.unscale_(optimizer)
    flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    flags[device] = torch.full(shape, flag, device=device)
    scaler.step(optimizer)
    assert bits_of(optimizer) == before
    assert optimizer.skipped_steps == bool(fused)


@EITHER_WAY
def test_pitfall_10_skipped_step_advances_the_count(device: torch.device, fused: bool | None) -> None:
    """After an overflow in the middle every group has counted the applied steps only, and every bit is as expected."""
    params = parameters(3, device)
    judge = Judge(FusedAdamW([{"params": [p]} for p in params], fused=fused, **HYPER))
    scaler = make_scaler(device)
    for i, overflow in enumerate([False, True, False, True, True, False]):
        backward(scaler, params, i, overflow=overflow)
        scaler.unscale_(judge.optimizer)
        if not overflow:
            judge.expect()
        scaler.step(judge.optimizer)
        scaler.update()
        judge.check()
    assert [judge.optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


@EITHER_WAY
def test_pitfall_11_double_unscale_after_clipping(device: torch.device, fused: bool | None) -> None:
    """After `unscale_` and clipping the step uses the clipped gradients as they are: unscaled once."""
    params = parameters(2, device)
    judge = Judge(FusedAdamW(params, fused=fused, **HYPER))
    scaler = make_scaler(device)
    backward(scaler, params, 11, overflow=False)
    scaler.unscale_(judge.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, 0.1)
    assert 0.1 < norm < 100, "unscaled, and clipping does something"
    judge.expect()
    scaler.step(judge.optimizer)
    judge.check()


@EITHER_WAY
@pytest.mark.parametrize("unscale", [False, True], ids=["step-alone", "unscale-first"])
def test_pitfall_12_gradients_stay_scaled(device: torch.device, fused: bool | None, unscale: bool) -> None:
    """Who wants to see unscaled gradients calls `unscale_`, as torch says; the step uses unscaled ones in any case.

    After a step without that call, `.grad` holds the unscaled gradient where the scaler unscaled it, and with
    `fused=True` still the scaled one: torch's fused step writes it back, a pass over memory for whoever looks.
    """
    p = parameter(5, device=device)
    unscaled = p.grad.clone()
    judge = Judge(FusedAdamW([p], fused=fused, **HYPER))
    judge.expect()
    scaler = make_scaler(device)
    p.grad.mul_(scaler.get_scale())  # a power of two: exact both ways
    if unscale:
        scaler.unscale_(judge.optimizer)
    scaler.step(judge.optimizer)
    judge.check()
    scale = scaler.get_scale() if fused and not unscale else 1.0
    assert torch.equal(p.grad, unscaled * scale)


@EITHER_WAY
def test_pitfall_13_wrappers_cannot_see_the_skip(device: torch.device, fused: bool | None) -> None:
    """A wrapper that patches `step` on the instance, as accelerate does, is called for applied steps only.

    With `fused=True` it is called for all, as with torch's; `last_step_skipped` then tells which were applied.
    """
    params = parameters(2, device)
    optimizer = FusedAdamW(params, fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = make_scaler(device)
    applied = []
    original = optimizer.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        applied.append(True)
        return original(*args, **kwargs)

    for i, overflow in enumerate([True, False, True]):
        applied.clear()
        backward(scaler, params, i, overflow=overflow)
        optimizer.step = patched  # type: ignore[method-assign]
        scaler.step(optimizer)
        optimizer.step = original  # type: ignore[method-assign]
        scaler.update()
        assert bool(applied) is (bool(fused) or not overflow)
        if applied and not optimizer.last_step_skipped:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5e-3
    assert optimizer.state[params[0]]["step"].item() == 1


def test_pitfall_14_grad_scaler_in_the_signature(device: torch.device) -> None:
    """`step` has no argument `grad_scaler`, so GradScaler neither passes itself nor warns."""
    assert [*inspect.signature(FusedAdamW.step).parameters] == ["self", "closure"]
    p = parameter(5, device=device)
    optimizer = FusedAdamW([p])
    scaler = make_scaler(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)
    assert optimizer.state[p]["step"].item() == 1


def test_pitfall_38_summed_flags_of_a_sharded_scaler(tmp_path: pathlib.Path) -> None:
    """Two ranks under a sharded scaler skip together when one or both overflow, with and without `unscale_`.

    With `fused=True` and without `unscale_` the scaler never talks to its peers: the step does, but the scale of a rank
    that saw no overflow stays. Hence the advice to call `unscale_`, which the documentation of `fused` repeats.
    """
    script = """
import math, os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from adamw_kernels import FusedAdamW

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for overflowing in ((0,), (1,), (0, 1)):
    for fused, unscale_first in ((None, True), (None, False), (True, True), (True, False)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = FusedAdamW([p], fused=fused, process_group=dist.group.WORLD)
        scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
        for overflow in (True, False):
            scaler.scale(p.sum()).backward()
            if overflow and rank in overflowing:
                p.grad[0] = math.inf
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            case = (rank, overflowing, fused, unscale_first, overflow)
            if overflow:
                assert p.tolist() == [1, 1, 1], (case, p)
                assert all(state["step"] == 0 for state in optimizer.state.values()), case
            else:
                assert p.isfinite().all() and p[0] < 1 and optimizer.state[p]["step"] == 1, (case, p)
            assert optimizer.skipped_steps == bool(fused), case
            told = fused is None or unscale_first or rank in overflowing
            assert scaler.get_scale() == (4 if told else 8), (case, scaler.get_scale())
            optimizer.zero_grad()
dist.destroy_process_group()
print("agreed", flush=True)
os._exit(0)  # gloo's threads now and then abort a process that ends by itself (torch 2.13, without us too)
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, answers, strict=True):
        assert rank.returncode == 0, err
        assert out.strip() == "agreed"


@EITHER_WAY
def test_pitfall_39_overflow_in_the_first_iteration(device: torch.device, fused: bool | None) -> None:
    """An overflow in iteration 1, normal at scale 65536, leaves no group ahead: all count three applied steps."""
    params = parameters(3, device)
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    judge = Judge(FusedAdamW(groups, fused=fused, **HYPER))
    scaler = make_scaler(device, scale=65536.0)
    for i in range(4):
        backward(scaler, params, i, overflow=i == 0)
        scaler.unscale_(judge.optimizer)
        if i > 0:
            judge.expect()
        scaler.step(judge.optimizer)
        scaler.update()
        if i > 0:
            judge.check()
        assert all(state["step"] == i for state in judge.optimizer.state.values())
    assert [judge.optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


def test_pitfall_40_amp_flag_decided_by_accident(device: torch.device) -> None:
    """As with torch, `fused=True` asks for scaling on the device; without it the scaler skips on the host.

    Lightning refuses to clip where the flag is set, and accelerate does not see such a skip: the default suits both.
    """
    for fused in (True, None):
        asked = FusedAdamW([parameter(5, device=device)], fused=fused)
        for candidate in (asked, copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
            assert getattr(candidate, "_step_supports_amp_scaling", False) == bool(fused)
    p = parameter(5, device=device)
    optimizer = FusedAdamW([p], capturable=True)
    scaler = make_scaler(device)
    p.grad.fill_(math.nan)
    scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    assert not optimizer.state, "the step was never called"

    asked = FusedAdamW([p], fused=True)
    before = p.detach().clone()
    scaler = make_scaler(device)
    scaler.step(asked)
    assert not hasattr(asked, "found_inf") and not hasattr(asked, "grad_scale")
    assert asked.last_step_skipped and asked.state[p]["step"] == 0 and torch.equal(p, before)


# --- state dict and lifecycle -----------------------------------------------------------------------------------------


def reloaded(optimizer: FusedAdamW, *, map_location: str | None = None) -> dict[str, Any]:
    """The state dict after a trip through a file, read with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location=map_location)
    return loaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pitfall_15_load_state_dict_casts_state(device: torch.device, dtype: torch.dtype) -> None:
    """Loading keeps every state tensor's dtype and bits, those of other integer entries included."""
    p = parameter(5, device=device, dtype=dtype)
    optimizer = FusedAdamW([p])
    optimizer.step()
    optimizer.state[p]["seed"] = torch.tensor(2**53 + 1, device=device)
    optimizer.state[p]["remainder"] = torch.arange(5, dtype=torch.int16, device=device) - 2
    expected = bits_of(optimizer)
    restored = FusedAdamW([p])
    restored.load_state_dict(reloaded(optimizer))
    assert bits_of(restored) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_16_half_moments_read_as_float_after_loading(path: Path, dtype: torch.dtype) -> None:
    """A resumed 16-bit model steps with the bits of one that never stopped, also from torch's 16-bit moments."""
    p = parameter(5, device=path.device, dtype=dtype)
    judge = Judge(FusedAdamW([p], **HYPER))
    judge.step()
    judge.optimizer.load_state_dict(judge.optimizer.state_dict())
    judge.step()

    rival = parameter(5, device=path.device, dtype=dtype)
    torch_adamw = torch.optim.AdamW([rival], **HYPER)
    torch_adamw.step()
    assert torch_adamw.state[rival]["exp_avg"].dtype == dtype
    ours = FusedAdamW([rival], **HYPER)
    ours.load_state_dict(torch_adamw.state_dict())
    twin = Twin(rival)
    twin.t = np.float32(1)
    twin.m, twin.v = (stored(torch_adamw.state[rival][key].float()) for key in ("exp_avg", "exp_avg_sq"))
    twin.step(rival.grad, ours.param_groups[0])
    ours.step()
    twin.check(rival, ours.state[rival], "resumed from torch")


STEP_FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": lambda step: int(step),
    "float": lambda step: float(step),
    "int64-scalar": lambda step: step.long(),
    "float32-one-element": lambda step: step.reshape(1),
    "float64-on-the-cpu": lambda step: step.double().cpu(),
    "bfloat16": lambda step: step.bfloat16(),
    "int32-one-by-one": lambda step: step.int().reshape(1, 1),
}


@pytest.mark.parametrize("form", STEP_FORMS.values(), ids=STEP_FORMS.keys())
def test_pitfall_17_step_of_another_kind_on_resume(device: torch.device, form: Callable[[torch.Tensor], Any]) -> None:
    """Whatever holds the loaded step count, training goes on with the same bits."""
    params = parameters(2, device)
    judge = Judge(FusedAdamW(params, **HYPER))
    judge.step()
    judge.step()
    loaded = judge.optimizer.state_dict()
    for entry in loaded["state"].values():
        entry["step"] = form(entry["step"])
    judge.optimizer.load_state_dict(loaded)
    judge.step()
    for p in params:
        step = judge.optimizer.state[p]["step"]
        assert (step.dtype, step.device, step.numel()) == (torch.float32, p.device, 1)


def test_pitfall_17_one_step_tensor_for_all_parameters(device: torch.device) -> None:
    """A step tensor that several loaded parameters share is counted once a step, not once a parameter."""
    params = parameters(3, device)
    judge = Judge(FusedAdamW(params, **HYPER))
    judge.step()
    shared = judge.optimizer.state[params[0]]["step"]
    for p in params[1:]:
        judge.optimizer.state[p]["step"] = shared
    judge.step()
    judge.step()


def test_pitfall_17_map_location_cpu(device: torch.device) -> None:
    """A checkpoint read to the CPU resumes on the parameters' device with the same bits."""
    judge = Judge(FusedAdamW(parameters(2, device), **HYPER))
    judge.step()
    judge.optimizer.load_state_dict(reloaded(judge.optimizer, map_location="cpu"))
    judge.step()
    for p in judge.optimizer.param_groups[0]["params"]:
        assert {value.device for value in judge.optimizer.state[p].values()} == {p.device}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_pitfall_18_copies_lose_attributes(device: torch.device, copied: Callable[[Any], Any]) -> None:
    """A copy made between steps trains its own parameters with the same bits and leaves the original's alone."""
    backend = "cpu" if device == CPU else "triton"
    original = FusedAdamW(parameters(2, device), backend=backend, **HYPER)
    judge = Judge(original)
    judge.step()
    twin = copied(original)
    assert bits_of(twin) == bits_of(original)
    for p, q in zip(original.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()
    twin.step()
    judge.check()  # the original did not move
    judge.step()
    assert bits_of(twin) == bits_of(original)
    assert [table.backend.name for table in twin._internals.stepper.plan.tables] == [backend]


def test_pitfall_19_group_added_later_is_never_stepped(path: Path) -> None:
    """A group added after steps were taken is stepped from then on, with its own options and its own count."""
    first, second = parameters(2, path.device)
    judge = Judge(FusedAdamW([first], **HYPER))
    judge.step()
    judge.optimizer.add_param_group({"params": [second], "lr": 0.5, "maximize": True})
    judge.step()
    renew_grads(judge.optimizer, 19)
    judge.step()
    assert judge.optimizer.state[second]["step"].item() == 2


def test_pitfall_20_parameters_replaced_in_place(device: torch.device) -> None:
    """Swapped parameters are stepped, the old ones neither written nor kept alive.

    As accelerate does for FSDP2: stubs that carry an integer `data_ptr`, then the new parameters; and as Megatron
    does: new groups altogether.
    """
    old = parameters(2, device)
    optimizer = FusedAdamW(old, **HYPER)
    optimizer.step()
    frozen = [p.detach().clone() for p in old]
    stubs = []
    for p in old:
        stub = torch.empty(1, device=device)
        stub.data_ptr = p.data_ptr()  # type: ignore[method-assign]
        stubs.append(stub)
    params = optimizer.param_groups[0]["params"]
    params[:] = stubs
    optimizer.state.clear()
    optimizer.step()  # stubs have no gradient: nothing to do, and nobody calls their data_ptr

    new = [parameter(*p.shape, device=device, seed=20 + i) for i, p in enumerate(old)]
    for i, p in enumerate(new):
        params[i] = p
    judge = Judge(optimizer)
    judge.step()
    for p, before in zip(old, frozen, strict=True):
        assert torch.equal(p, before)
    dead = [weakref.ref(p) for p in old]
    del old, p, stub, stubs
    gc.collect()
    assert [ref() for ref in dead] == [None, None]

    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [parameter(9, device=device, seed=7)], "lr": 0.5}]
    judge.step()


def test_pitfall_20_parameters_data_replaced(path: Path) -> None:
    """`p.data = flat[...]`, as flattening wrappers do, moves the update to the new memory."""
    p, other = parameters(2, path.device)
    judge = Judge(FusedAdamW([p, other], **HYPER))
    judge.step()
    left = p.data
    kept = left.clone()
    p.data = p.data.clone()
    judge.step()
    assert torch.equal(left, kept)


def test_pitfall_21_round_trip_before_the_first_step(device: torch.device) -> None:
    """`load_state_dict(state_dict())` changes nothing, before the first step and after it."""
    judge = Judge(FusedAdamW(parameters(2, device), **HYPER))
    judge.optimizer.load_state_dict(judge.optimizer.state_dict())
    assert not judge.optimizer.state
    judge.step()
    judge.optimizer.load_state_dict(judge.optimizer.state_dict())
    judge.step()


def test_pitfall_22_resuming_from_other_libraries(device: torch.device) -> None:
    """Groups with foreign and missing options load; a step count kept in the group is asked for by name."""
    p = parameter(5, device=device)
    judge = Judge(FusedAdamW([p], **HYPER))
    judge.step()
    moments = {key: judge.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    group = dict(lr=0.5, bias_correction=True, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=1, params=[0])
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] has exp_avg, exp_avg_sq but no step"):
        judge.optimizer.load_state_dict({"state": {0: moments}, "param_groups": [group]})
    assert judge.optimizer.param_groups[0]["lr"] == HYPER["lr"]
    judge.optimizer.load_state_dict({"state": {0: {**moments, "step": group["step"]}}, "param_groups": [group]})
    assert judge.optimizer.param_groups[0]["amsgrad"] is False
    judge.step()


def test_pitfall_22_others_resume_from_ours(device: torch.device) -> None:
    """The state dict has torch's keys and nothing else, so torch.optim.AdamW goes on from it."""
    p, q = parameter(5, device=device, dtype=torch.float64), parameter(5, device=device, dtype=torch.float64)
    ours = FusedAdamW([p], amsgrad=True, **HYPER)
    ours.step()
    theirs = torch.optim.AdamW([q], amsgrad=True, **HYPER)
    theirs.step()
    for mine, torchs in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert mine.keys() == torchs.keys()
    assert ours.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch's method would share the step tensor
    ours.step()
    theirs.step()
    assert theirs.state[q]["step"].item() == 2
    difference = (p - q).abs().max() / p.abs().max()
    assert difference <= tolerance("float64_against_torch")


def test_pitfall_23_step_counts_are_per_parameter(path: Path) -> None:
    """Gradients that come and go, mixed dtypes in a group, parameters added late: each counts its own steps."""
    params = [
        parameter(3, device=path.device),
        parameter(4, device=path.device, dtype=torch.bfloat16),
        parameter(0, device=path.device),
        parameter(5, device=path.device, dtype=torch.float16),
    ]
    judge = Judge(FusedAdamW([{"params": params[:3]}, {"params": params[3:]}], **HYPER))
    grads = [p.grad for p in params]
    for present in ([0, 2], [0, 1, 2, 3], [1], [], [0, 3], [0, 1, 2, 3]):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in present else None
        judge.step()
    late = parameter(6, device=path.device)
    judge.optimizer.add_param_group({"params": [late]})
    judge.step()
    counts = [judge.optimizer.state[p]["step"].item() for p in (*params, late)]
    assert counts == [5, 4, 4, 4, 1]


@pytest.mark.parametrize("step", [2**24 - 1, 2**24, 2**31 - 128])
def test_pitfall_24_step_stops_at_two_to_the_24(path: Path, step: int) -> None:
    """A float32 count stands still at 2^24; updates stay exact there and up to the largest count accepted."""
    p = parameter(5, device=path.device)
    optimizer = FusedAdamW([p], lr=1e-2, betas=(0.9, 0.9999999))
    zeros = torch.zeros_like(p)
    optimizer.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    judge = Judge(optimizer)
    (twin,) = judge._twins.values()
    twin.t = np.float32(step)
    judge.step()
    judge.step()
    assert optimizer.state[p]["step"].item() == max(step, 2**24)
    assert p.isfinite().all()


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, 2**40, -1, 0.5, math.nan, math.inf])
def test_pitfall_24_impossible_step_counts_are_refused(device: torch.device, step: float) -> None:
    """A loaded count that is no count, or too large for the powers to be right, is refused by name."""
    p = parameter(5, device=device)
    optimizer = FusedAdamW([p])
    optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    before = stored(p).tobytes()
    with pytest.raises(ValueError, match=r"step of param_groups\[0\]\['params'\]\[0\] is "):
        optimizer.step()
    assert stored(p).tobytes() == before


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfall_25_checkpoint_initialises_with_a_step(path: Path, rate: Any, dtype: torch.dtype) -> None:
    """The step that torch's distributed checkpoint takes to create state leaves every weight's bits as they were."""
    p = parameter(6, device=path.device, dtype=dtype)
    with torch.no_grad():
        p[:4] = torch.tensor([0.0, -0.0, 3e38, 1e-40])
    p.grad = None
    if isinstance(rate, torch.Tensor):
        rate = rate.to(path.device)
    optimizer = FusedAdamW([p], lr=rate)
    before = stored(p).tobytes()
    dcp._init_optim_state(optimizer)
    assert stored(p).tobytes() == before
    assert optimizer.param_groups[0]["lr"] is rate
    assert not optimizer.state[p]["exp_avg"].any() and not optimizer.state[p]["exp_avg_sq"].any()


def test_pitfall_25_resume_through_the_distributed_checkpoint(device: torch.device) -> None:
    """`get_optimizer_state_dict` and `set_optimizer_state_dict` carry state and step count to a fresh optimizer."""
    torch.manual_seed(25)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False)).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    optimizer.step()
    optimizer.step()
    copied = copy.deepcopy(model)
    resumed = FusedAdamW(copied.parameters(), **HYPER)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    copied.zero_grad()
    dcp.set_optimizer_state_dict(copied, resumed, saved)
    assert bits_of(resumed) == bits_of(optimizer)
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        q.grad = p.grad
    optimizer.step()
    resumed.step()
    assert bits_of(resumed) == bits_of(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_pitfall_26_state_of_another_shape(device: torch.device, dtype: torch.dtype) -> None:
    """State tensors are scalars or have the parameter's shape, as FSDP1's `optim_state_dict` demands."""
    params = [parameter(*shape, device=device, dtype=dtype) for shape in ((3, 4), (5,), (2, 1, 3))]
    optimizer = FusedAdamW(params, amsgrad=True)
    optimizer.step()
    for p in params:
        for key, value in optimizer.state[p].items():
            assert value.shape == (torch.Size([]) if key == "step" else p.shape), key


def test_pitfall_27_schedulers_and_wrapped_steps(device: torch.device) -> None:
    """Schedulers wrap `step` without a warning and their rates and momenta are used, floats and tensors alike."""
    assert inspect.isfunction(FusedAdamW.step), "a plain function in the class, bound by instances"
    for rate in (0.25, torch.tensor(0.25, device=device)):
        p = parameter(5, device=device)
        judge = Judge(FusedAdamW([p], lr=rate))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(judge.optimizer, max_lr=0.5, total_steps=6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = set()
            for _ in range(5):
                judge.step()
                scheduler.step()
                seen.add((float(judge.optimizer.param_groups[0]["lr"]), judge.optimizer.param_groups[0]["betas"]))
        assert len(seen) == 5, "rate and betas changed every step"


def test_pitfall_27_floats_assigned_over_a_tensor_rate(path: Path) -> None:
    """A rate may turn from tensor to float and back, and a rate's tensor may get other memory."""
    judge = Judge(FusedAdamW([parameter(5, device=path.device)], lr=torch.tensor(0.5, device=path.device)))
    group = judge.optimizer.param_groups[0]
    judge.step()
    group["lr"] = 0.25
    judge.step()
    group["lr"] = torch.tensor(0.125, device=path.device, dtype=torch.float64)
    judge.step()
    group["lr"].fill_(2.0)
    judge.step()
    group["lr"] = torch.tensor(0.0625)  # on the CPU, wherever the parameter is
    judge.step()
    group["lr"].data = torch.tensor(0.75)
    judge.step()
    group["lr"] = np.float32(0.375)
    judge.step()


def test_pitfall_27_subclasses_made_without_init(device: torch.device) -> None:
    """Dynamic subclasses that copy `__dict__` and never call `__init__`, as Lightning's, step with the same bits."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "state_dict")}
            self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})

    judge = Judge(FusedAdamW(parameters(2, device), **HYPER))
    early = Wrapper(judge.optimizer)
    judge.step()
    late = Wrapper(judge.optimizer)
    for wrapper in (early, late):
        assert isinstance(wrapper, torch.optim.Optimizer)
        for _ in range(2):
            judge.expect()
            wrapper.step()
            judge.check()
    judge.step()

    group = judge.optimizer.param_groups[0]
    before = group["lr"]
    group["lr"] = 0.5
    judge.expect()
    late.step()
    judge.check()
    group["lr"] = before  # the very object that the wrapped one saw last, while the wrapper has used another since
    judge.step()

    bare = FusedAdamW.__new__(type("Bare", (FusedAdamW,), {}))  # not even __dict__ but what torch itself restores
    bare.__setstate__({**judge.optimizer.__getstate__(), "defaults": judge.optimizer.defaults})
    judge.expect()
    bare.step()
    judge.check()


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("beta2", [0.999, 0.9999, 0.999999])
def test_pitfall_28_bias_correction_in_float32(path: Path, beta2: float, t: int) -> None:
    """An update that is nothing but bias corrections comes out to a few float32 roundings of the float64 one.

    With float32 arithmetic 1 - beta2^t is off by up to 2e-4, and 1 - float32(beta2) by as much.
    """
    p = torch.nn.Parameter(torch.zeros(4, device=path.device))
    p.grad = torch.full((4,), 0.5, device=path.device)
    optimizer = FusedAdamW([p], lr=1e-3, betas=(0.9, beta2), eps=0.0, weight_decay=0.0)
    # m = g and v = g^2 are the steady state, which the moments' update leaves exactly as it is.
    moments = dict(exp_avg=p.grad.clone(), exp_avg_sq=p.grad**2)
    optimizer.state[p] = {"step": torch.tensor(float(t - 1), device=path.device), **moments}
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], p.grad)
    truth = -1e-3 / -np.expm1(t * np.log(0.9)) * np.sqrt(-np.expm1(t * np.log(beta2)))
    assert np.abs(p.detach().cpu().double().numpy() / truth - 1).max() <= tolerance("one_update_in_float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_29_rounding_points(path: Path, dtype: torch.dtype) -> None:
    """A 16-bit parameter is rounded once, when it is stored, or never; no intermediate and no moment ever is."""
    params = [parameter(64, device=path.device, dtype=dtype, seed=i) for i in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "param_format": "native"},
        {"params": params[1:2], "param_format": "native", "amsgrad": True},
        {"params": params[2:]},
    ]
    with pytest.warns(UserWarning, match="rounds .* to nearest"):
        judge = Judge(FusedAdamW(groups, **HYPER))
    for i in range(4):
        judge.step()
        renew_grads(judge.optimizer, i)


@pytest.mark.filterwarnings("ignore:param_format='native'")
@pytest.mark.parametrize("param_format", ["native", "split32"])
def test_pitfall_30_nan_and_ties_in_bfloat16(path: Path, param_format: str) -> None:
    """Stored to bfloat16, NaN stays NaN (0x7FFFFFFF is not -0.0) and FLT_MAX overflows to infinity.

    Ties go to even, and upwards beside a remainder, which brings back every float32 value, FLT_MAX too.
    """
    # With beta1 = 0, p = 0, a running maximum of 1 and no bias left to correct, the new weight is -lr * g exactly as
    # long as (1 - beta2) * g^2 <= 1: from 2^-3 up to FLT_MAX, with lr = 2^123, any float32 can be stored.
    cases = {
        0x3F808000: 0x3F80,  # a tie, below is even
        0x3F818000: 0x3F82,  # a tie, above is even
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0x7F7F7FFF: 0x7F7F,  # just below the last tie
        0x7F7F8000: 0x7F80,  # the last tie: infinity
        0x7F7FFFFF: 0x7F80,  # FLT_MAX
    }
    if param_format == "split32":
        cases[0x3F808000] = 0x3F81
    wanted = np.array([*cases, *(bits | 0x80000000 for bits in cases)], np.uint32).view(np.float32)
    rounded = np.array([*cases.values(), *(bits | 0x8000 for bits in cases.values())], np.uint16)
    lr, beta2, t = 2.0**123, 1 - 2.0**-10, 2**20
    grads = np.concatenate([-(wanted.astype(np.float64) / lr), [0.0, -0.0]]).astype(np.float32)
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, 0x7F800000, 0xFF800000], np.uint32)
    grads = np.concatenate([grads, odd.view(np.float32)])

    p = torch.nn.Parameter(torch.zeros(len(grads), dtype=torch.bfloat16, device=path.device))
    p.grad_dtype = None  # any
    p.grad = torch.from_numpy(grads).to(path.device)
    optimizer = FusedAdamW(
        [p], lr=lr, betas=(0.0, beta2), eps=0.0, weight_decay=0.0, amsgrad=True, param_format=param_format
    )
    zeros = torch.zeros(len(grads), device=path.device)
    moments = dict(exp_avg=zeros, exp_avg_sq=zeros.clone(), max_exp_avg_sq=torch.ones_like(zeros))
    optimizer.state[p] = {"step": t, **moments}
    judge = Judge(optimizer)
    (twin,) = judge._twins.values()
    twin.t, twin.v_max[:] = np.float32(t), 1
    judge.step()
    got = stored(p)
    np.testing.assert_array_equal(got[: len(rounded)], rounded)
    np.testing.assert_array_equal(got[len(rounded) : len(rounded) + 2] & 0x7FFF, [0, 0])
    assert p[len(rounded) + 2 :].isnan().all(), "NaN gradients, and infinity over infinity"
    remembered = stored(optimizer.fp32_weights()[p])
    expected = wanted if param_format == "split32" else (rounded.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(remembered[: len(rounded)].view(np.uint32), expected.view(np.uint32))
    assert np.isnan(remembered[len(rounded) + 2 :]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_31_moments_rounded_to_the_parameters_dtype(path: Path, dtype: torch.dtype) -> None:
    """Float32 moments of a 16-bit parameter hold float32 values, not 16-bit ones in wide clothes."""
    p = parameter(64, device=path.device, dtype=dtype)
    judge = Judge(FusedAdamW([p], **HYPER))
    judge.step()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = judge.optimizer.state[p][key]
        assert moment.dtype == torch.float32
        assert not torch.equal(moment, moment.to(dtype).float())


def test_pitfall_32_bfloat16_moments_unasked(device: torch.device) -> None:
    """A bfloat16 parameter gets float32 moments; torch gives it bfloat16 ones, whose v then hardly moves."""
    ours, theirs = (parameter(64, device=device, dtype=torch.bfloat16) for _ in range(2))
    fused, rival = FusedAdamW([ours]), torch.optim.AdamW([theirs])
    fused.step()
    rival.step()
    assert rival.state[theirs]["exp_avg_sq"].dtype == torch.bfloat16
    assert fused.state[ours]["exp_avg_sq"].dtype == torch.float32
    for p in (ours, theirs):
        p.grad.zero_()
    before = fused.state[ours]["exp_avg_sq"].clone()
    frozen = rival.state[theirs]["exp_avg_sq"].clone()
    fused.step()
    rival.step()
    assert (fused.state[ours]["exp_avg_sq"] < before).all()
    assert (rival.state[theirs]["exp_avg_sq"] == frozen).all()


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "l2"])
def test_pitfall_33_negative_decay_ignored(path: Path, decoupled: bool) -> None:
    """A negative decay, which a group may be given later, is applied, not skipped by a `> 0`."""
    p = parameter(5, device=path.device)
    judge = Judge(FusedAdamW([p], lr=0.5, weight_decay=0.1, decoupled=decoupled))
    judge.step()
    judge.optimizer.param_groups[0]["weight_decay"] = -0.1
    judge.step()
    p.grad.zero_()
    judge.optimizer.param_groups[0]["betas"] = (0.0, 0.0)
    before = p.detach().clone()
    judge.step()
    if decoupled:
        assert (p.abs() > before.abs()).all(), "without a gradient the weights grow"


def test_pitfall_34_adam_and_adamw_confused(path: Path) -> None:
    """Without a gradient AdamW decays the weight and keeps the moments zero; L2 moves moments and takes full steps."""
    decayed, regularised = (parameter(5, device=path.device) for _ in range(2))
    start = decayed.detach().clone()
    for p in (decayed, regularised):
        p.grad.zero_()
    groups = [{"params": [decayed]}, {"params": [regularised], "decoupled": False}]
    judge = Judge(FusedAdamW(groups, lr=0.5, weight_decay=0.25))
    judge.step()
    assert torch.equal(decayed, start - 0.125 * start)
    assert not judge.optimizer.state[decayed]["exp_avg"].any()
    assert judge.optimizer.state[regularised]["exp_avg"].all()
    assert torch.equal((start - regularised).sign(), start.sign()), "the first step of Adam is lr towards zero"
    assert ((start - regularised).abs() > 0.49).all()


# --- distributed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rank_three_of_four() -> Iterator[None]:
    """A process group of four ranks whose other three do not exist; enough to make and step DTensors."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield
    dist.destroy_process_group()
    sys.excepthook = hook


def shard(local: torch.Tensor, mesh: Any, placements: list[Any], shape: tuple[int, int]) -> Any:
    """A contiguous DTensor of a global shape from this rank's part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=torch.empty(shape).stride()
    )


def mixed_parameters(device: torch.device) -> list[torch.nn.Parameter]:
    """Plain parameters and DTensors on two meshes, one of them with nothing on this rank; all with gradients."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard

    line = DeviceMesh(device.type, torch.arange(4))
    square = DeviceMesh(device.type, torch.arange(4).view(2, 2))
    layouts: list[tuple[Any, list[Any], tuple[int, int], tuple[int, int]]] = [
        (line, [Shard(0)], (8, 3), (2, 3)),
        (line, [Shard(0)], (5, 3), (0, 3)),  # rows 2, 2, 1, 0
        (square, [Shard(0), Shard(1)], (4, 6), (2, 3)),
        (square, [Replicate(), Shard(1)], (2, 4), (2, 2)),
    ]
    params = [parameter(4, device=device)]
    for i, (mesh, placements, shape, local) in enumerate(layouts):
        rng = torch.Generator().manual_seed(i)
        values, grads = (torch.randn(local, generator=rng).to(device) for _ in range(2))
        p = torch.nn.Parameter(shard(values, mesh, placements, shape))
        p.grad = shard(grads, mesh, placements, shape)
        params.append(p)
    return params


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's own part, any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


@pytest.mark.usefixtures("rank_three_of_four")
def test_pitfall_35_mixed_meshes_and_plain_tensors(path: Path) -> None:
    """Plain tensors and DTensors on different meshes step together, local shard by local shard."""
    params = mixed_parameters(path.device)
    twins = [Twin(local(p.data)) for p in params]
    optimizer = FusedAdamW(params, **HYPER)
    for _ in range(2):
        for p, twin in zip(params, twins, strict=True):
            twin.step(local(p.grad), optimizer.param_groups[0])
        optimizer.step()
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            state = {key: local(value) for key, value in optimizer.state[p].items()}
            twin.check(local(p.data), state, f"parameter {i}")


@pytest.mark.usefixtures("rank_three_of_four")
def test_pitfall_35_warm_steps_leak_no_objects(device: torch.device) -> None:
    """Warm steps over DTensors leave no Python objects behind."""
    optimizer = FusedAdamW(mixed_parameters(device))
    for _ in range(3):
        optimizer.step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(20):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) - before < 20, "less than one object a step"


@pytest.mark.usefixtures("rank_three_of_four")
def test_pitfall_36_state_of_a_sharded_parameter(device: torch.device) -> None:
    """Moments of a DTensor are DTensors of its mesh, placements and shape, of which this rank holds its part."""
    params = mixed_parameters(device)
    optimizer = FusedAdamW(params, amsgrad=True)
    optimizer.step()
    for p in params[1:]:
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            moment = optimizer.state[p][key]
            assert type(moment) is type(p.data), key
            assert (moment.device_mesh, moment.placements) == (p.device_mesh, p.placements)
            assert (moment.shape, local(moment).shape) == (p.shape, local(p.data).shape)
