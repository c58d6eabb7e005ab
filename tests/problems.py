"""Random problems: what one step reads and writes, as torch tensors in guarded memory and as the judge's arrays.

A `Case` is one parameter with its gradient and state. Its tensors lie between rows of sentinel bytes; the same values
stand beside them as NumPy arrays, which `reference.step_exact` or `reference_formats.step_packed` moves on. `check`
then compares every stored bit and every sentinel. `WholeStep` is the judge of a complete step over parameter groups:
norms, decision, update, averages.

Three ways lead to the kernels: `step_lists` through `fused_adamw_`, `Training` through `FusedAdamW`, and `Launch`
through a launch plan, which takes any storage format at any size, chunk and shard.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Path
from hypothesis import HealthCheck, Phase, settings
from pairs import REMAINDER_KEYS
from reference import (
    ARRAY_DTYPE,
    Decision,
    compute_dtype,
    decide,
    ema_exact,
    ema_weight,
    load,
    norm_chunks,
    norm_partials,
    random_key,
    random_words,
    step_count_after,
    step_exact,
    store,
    total,
)
from reference_formats import FIRST_SCALE, GROUP, load_weight, step_packed

from adamw_kernels import FusedAdamW, backends, formats, fused_adamw_
from adamw_kernels.control import DECISION_NORM
from adamw_kernels.functional import grad_address
from adamw_kernels.launch_table import LaunchPlan, TensorSpec

TORCH_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# What state tensors may be besides.
STATE_DTYPE = TORCH_DTYPE | {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}

# A parameter's dtype and its gradient's: the parameter's own, or any of float32, bfloat16, float16.
DTYPE_PAIRS = [
    (param, grad) for param, grad in itertools.product(TORCH_DTYPE, repeat=2) if grad != "float64" or param == "float64"
]

FLAGS = [
    dict(amsgrad=amsgrad, maximize=maximize, decoupled=decoupled)
    for amsgrad, maximize, decoupled in itertools.product([False, True], [False, True], [True, False])
]
PLAIN, AMSGRAD = FLAGS[0], FLAGS[4]

HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# State that is not of its parameter's shape: words of 16 neighbours, and a scalar.
UNSHAPED = ("moment_groups", "exp_avg_sq_scale")

# What a group of `Training` has unless it says otherwise; an optimizer's own default splits 16-bit weights.
NATIVE_FORMATS: dict[str, Any] = dict(param_format="native")


# --- one dtype's bits, in NumPy and in torch ------------------------------------------------------------------------


def stored(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor's values as the judge holds them: contiguous, bfloat16 as its bits."""
    tensor = tensor.detach().cpu().contiguous().clone()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Return a contiguous CPU tensor with the stored values of an array."""
    return torch.from_numpy(np.ascontiguousarray(array).copy()).view(STATE_DTYPE[dtype]).reshape(array.shape)


def assert_same_bits(got: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    """Compare stored values bit for bit; a NaN equals any NaN, for payloads are outside the promise."""
    assert got.dtype == expected.dtype == ARRAY_DTYPE[dtype], what
    assert got.shape == expected.shape, what
    got_bits, expected_bits = (np.ravel(x).view(f"u{x.dtype.itemsize}") for x in (got, expected))
    if np.array_equal(got_bits, expected_bits):
        return
    values = [np.ravel(load(x, dtype, np.float64)) for x in (got, expected)]
    wrong = np.flatnonzero((got_bits != expected_bits) & ~(np.isnan(values[0]) & np.isnan(values[1])))
    if len(wrong):
        i = wrong[0]
        pytest.fail(
            f"{what}: {len(wrong)} of {len(got_bits)} {dtype} values differ, first element {i}: "
            f"got {values[0][i]!r} ({got_bits[i]:#x}), expected {values[1][i]!r} ({expected_bits[i]:#x})"
        )


# --- values ---------------------------------------------------------------------------------------------------------


def ordinary_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Return stored random values of both signs whose magnitudes spread over six decades below about 4 * `scale`."""
    values = scale * rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0, shape)
    return store(np.asarray(values, dtype=compute_dtype(dtype)), dtype)


def special_pool(dtype: str) -> np.ndarray:
    """Return the stored edge cases of a dtype: zeros, infinities, NaN, largest, smallest, subnormal, and a few plain.

    Squares of the plain ones beyond 1e19 overflow float32, those below 1e-23 vanish in it.
    """
    info = torch.finfo(TORCH_DTYPE[dtype])
    smallest_subnormal = info.tiny * info.eps
    finite = [0.0, info.max, info.tiny, smallest_subnormal, info.tiny - smallest_subnormal, 1.0, 1.5, 1e-3, 3e4]
    finite += [x for x in (1e-30, 1e-20, 3e19, 1e30) if smallest_subnormal <= x <= info.max]
    values = [np.nan, np.inf, -np.inf, *finite, *(-x for x in finite)]
    return store(np.asarray(values, dtype=compute_dtype(dtype)), dtype)


def special_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return stored values drawn from `special_pool`."""
    return rng.choice(special_pool(dtype), shape)


# --- memory ---------------------------------------------------------------------------------------------------------

SENTINEL = 0xA5
GUARD_BYTES = 64


class Guarded:
    """A tensor between two rows of sentinel bytes, as many elements past a 64-byte boundary as one likes."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        device: torch.device,
        *,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> None:
        """Allocate and fill everything with sentinels.

        Args:
            shape: of the tensor.
            dtype: storage dtype's name.
            device: where to allocate.
            strides: in elements; contiguous by default.
            offset: elements past a 64-byte boundary.
        """
        self.dtype = dtype
        itemsize = STATE_DTYPE[dtype].itemsize
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else span
        self._begin = GUARD_BYTES + offset * itemsize
        self._end = self._begin + span * itemsize
        total = -(-(self._end + GUARD_BYTES) // 8) * 8
        self.memory = torch.full((total,), SENTINEL, dtype=torch.uint8, device=device)
        assert self.memory.data_ptr() % GUARD_BYTES == 0
        self.tensor = self.memory.view(STATE_DTYPE[dtype]).as_strided(shape, strides, self._begin // itemsize)

    def write(self, array: np.ndarray) -> None:
        """Store the values of an array."""
        self.tensor.copy_(as_tensor(array, self.dtype))

    def check(self, expected: np.ndarray, what: str) -> None:
        """Compare the tensor bit for bit and the memory around it with the sentinel."""
        assert_same_bits(stored(self.tensor), expected, self.dtype, what)
        for side, guard in (("before", self.memory[: self._begin]), ("after", self.memory[self._end :])):
            assert bool((guard == SENTINEL).all()), f"{what}: memory {side} the tensor was written to"


# --- one parameter with its gradient and state ----------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Case:
    """One parameter, its gradient and its state: guarded tensors by name, and the judge's arrays by the same names.

    Attributes:
        ema_format: "float32" or "bfloat16" where the state holds an average of the weights, else None.
        has_grad: whether `Training` and `WholeStep` let the parameter have its gradient.
        param_format: how the weight is stored; "native" unless it is in 16 bits.
        moment_format: how the moments are stored; in "8bit" they are codes, whatever the parameter's size.
        first_element: index of the parameter's first element in the whole of which it is a shard.
    """

    param_dtype: str
    grad_dtype: str
    tensors: dict[str, Guarded]
    arrays: dict[str, np.ndarray]
    ema_format: str | None = None
    has_grad: bool = True
    param_format: str = "native"
    moment_format: str = "float32"
    first_element: int = 0

    @property
    def dtypes(self) -> dict[str, str]:
        """The storage dtype of each of the case's tensors."""
        wide = np.dtype(compute_dtype(self.param_dtype)).name
        moment = "bfloat16" if self.moment_format == "bfloat16" else wide
        dtypes = dict(param=self.param_dtype, grad=self.grad_dtype, step="float32") | dict.fromkeys(MOMENTS, moment)
        if self.moment_format == "8bit":
            del dtypes["max_exp_avg_sq"]
            dtypes |= dict(exp_avg="int8", exp_avg_sq="uint8", moment_groups="int16", exp_avg_sq_scale="float32")
        if self.param_format in ("split24", "split32"):
            dtypes["param_remainder"] = "int8" if self.param_format == "split24" else "int16"
        if self.ema_format is not None:
            dtypes["param_ema"] = "bfloat16" if self.ema_format == "bfloat16" else wide
        return dtypes

    def unused(self, hyper: Mapping[str, Any], flags: Mapping[str, bool]) -> set[str]:
        """Tensors that are no part of the state under these options; no step may touch them."""
        return set() if flags["amsgrad"] else {"max_exp_avg_sq"}

    def state_key(self, key: str) -> str:
        """What an optimizer's state calls the tensor `key`: there, what is stored otherwise is called otherwise."""
        if key == "param_remainder":
            return REMAINDER_KEYS[self.param_format]
        return f"{key}_code" if self.moment_format == "8bit" and key in MOMENTS else key

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor called `key`: the parameter's, but for scalars and the words of 16 neighbours."""
        shape = tuple(self["param"].shape)
        if key == "moment_groups":
            return (-(-math.prod(shape) // GROUP),)
        return () if key in ("step", *UNSHAPED) else shape

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor called `key`: param, grad or one of the state."""
        return self.tensors[key].tensor

    def write(self, key: str, array: np.ndarray) -> None:
        """Give the tensor and the judge other values."""
        self.tensors[key].write(array)
        self.arrays[key] = array.copy()

    def renew_grad(self, rng: np.random.Generator) -> None:
        """Another ordinary gradient in the same memory."""
        self.write("grad", ordinary_values(rng, self.arrays["grad"].shape, self.grad_dtype))

    def memory_positions(self) -> np.ndarray:
        """Return where in the parameter's memory each element lies, counted in elements from the first."""
        strides, shape = self["param"].stride(), self.arrays["param"].shape
        order = sorted(range(len(shape)), key=lambda dim: -strides[dim])  # where one of extent 1 comes is all the same
        positions = np.arange(self.arrays["param"].size).reshape([shape[dim] for dim in order])
        return positions.transpose(np.argsort(order)) if order else positions

    def grad_in_memory_order(self) -> np.ndarray:
        """Return the gradient's stored values in the order of the parameter's memory."""
        flat = np.empty_like(self.arrays["grad"], shape=self.arrays["grad"].size)
        flat[np.ravel(self.memory_positions())] = np.ravel(self.arrays["grad"])
        return flat

    def start_anew(self) -> None:
        """Give the state the values that it has before the first step."""
        for key in self.dtypes.keys() - {"param", "grad", "param_ema"}:
            self.write(key, np.zeros_like(self.arrays[key]))
        if self.moment_format == "8bit":
            self.write("exp_avg_sq_scale", np.array(FIRST_SCALE))

    def weights(self) -> np.ndarray:
        """Return the judge's weights as they are remembered: in the compute dtype, split ones merged."""
        remainder = self.arrays.get("param_remainder")
        return load_weight(self.arrays["param"], remainder, self.param_dtype, self.param_format)

    def judge(
        self,
        hyper: Mapping[str, float],
        flags: Mapping[str, bool],
        seed: int = 0,
        position: int = 0,
        update_bound: float | str | None = "auto",
        **clipping: Any,
    ) -> None:
        """Let the judge take the step.

        Args:
            hyper: lr, beta1, beta2, eps, weight_decay, and initial_lr if the decay follows the schedule.
            flags: of `step_exact`.
            seed: of the random bits.
            position: of the parameter, over all groups.
            update_bound: of `FusedAdamW`: "auto" bounds what is computed from rounded moments alone.
            clipping: `step_exact`'s inv_scale, norm, max_grad_norm.
        """
        a = self.arrays
        step = step_count_after(np.float32(a["step"]))
        a["step"] = np.array(step, dtype=np.float32)
        if update_bound == "auto" and self.moment_format == "float32":
            update_bound = None
        options = dict(**hyper, **flags, **clipping, update_bound=update_bound)
        options |= dict(param_dtype=self.param_dtype, grad_dtype=self.grad_dtype)
        if (self.param_format, self.moment_format) != ("native", "float32"):
            self._judge_packed(int(step), random_key(seed, position, int(step)), options)
            return
        a["param"], a["exp_avg"], a["exp_avg_sq"], a["max_exp_avg_sq"] = step_exact(
            a["param"],
            a["grad"],
            a["exp_avg"],
            a["exp_avg_sq"],
            a["max_exp_avg_sq"],
            int(step),
            **options,
        )

    def _judge_packed(self, t: int, key: int, options: dict[str, Any]) -> None:
        positions = self.memory_positions()
        shaped = [name for name in self.dtypes if name not in ("step", "param_ema", *UNSHAPED)]
        state = dict(self.arrays)
        for name in shaped:
            state[name] = np.empty_like(self.arrays[name], shape=positions.size)
            state[name][np.ravel(positions)] = np.ravel(self.arrays[name])
        after = step_packed(
            state,
            state["grad"],
            t,
            random_words(key, self.first_element + np.arange(positions.size)),
            param_format=self.param_format,
            moment_format=self.moment_format,
            **options,
        )
        self.arrays |= {name: array[positions] if name in shaped else array for name, array in after.items()}

    def judge_average(self, ema_decay: float, ema_warmup: bool, seed: int, position: int) -> None:
        """Let the judge's new weights enter the average. `position`: the parameter's, over all groups."""
        a, t = self.arrays, int(self.arrays["step"])
        in_bfloat16 = self.ema_format == "bfloat16"
        indices = self.first_element + self.memory_positions()
        a["param_ema"] = ema_exact(
            a["param_ema"],
            self.weights(),
            compute_dtype(self.param_dtype)(ema_weight(t, ema_decay, ema_warmup)),
            np.dtype(compute_dtype(self.param_dtype)).name,
            self.dtypes["param_ema"],
            random_words(random_key(seed, position, t), indices) if in_bfloat16 else None,
        )

    def check(self, what: str) -> None:
        """Compare every tensor, the gradient and the unused maximum among them, with the judge's arrays."""
        shape, formats = self.arrays["param"].shape, f"{self.param_format} {self.param_dtype}"
        for key, tensor in self.tensors.items():
            tensor.check(
                self.arrays[key],
                f"{what}: {key} of a {formats} {shape} with a {self.grad_dtype} gradient, moments {self.moment_format}",
            )


def make_case(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    param_dtype: str,
    grad_dtype: str,
    device: torch.device,
    *,
    special: bool = False,
    steps_taken: float = 0,
    strides: tuple[int, ...] | None = None,
    offsets: Mapping[str, int] | None = None,
    ema_format: str | None = None,
    param_format: str = "native",
    moment_format: str = "float32",
    first_element: int = 0,
    kind: type[Case] = Case,
) -> Case:
    """Return a case in the middle of training: random weights, gradient and moments.

    Args:
        rng: draws the values.
        shape: of the parameter.
        param_dtype: storage dtype of the parameter.
        grad_dtype: storage dtype of the gradient.
        device: where the tensors live.
        special: draw everything from `special_pool`, independently.
        steps_taken: the stored step count.
        strides: of every tensor, in elements; contiguous by default.
        offsets: elements past a 64-byte boundary at which a tensor starts, by its name.
        ema_format: of the average of the weights, or None: there is none.
        param_format: how the weight is stored.
        moment_format: how the moments are stored.
        first_element: index of the first element in the whole tensor.
        kind: `Case`, or that of another rule.
    """
    case = kind(param_dtype, grad_dtype, {}, {}, ema_format, True, param_format, moment_format, first_element)
    for key, dtype in case.dtypes.items():
        if key in ("step", *UNSHAPED):
            whole = case.shape_of(key)
            case.tensors[key] = Guarded(whole, dtype, device, offset=(offsets or {}).get(key, 0))
            case.write(key, np.array(steps_taken, np.float32) if key == "step" else any_scaling(rng, whole, key))
            continue
        case.tensors[key] = Guarded(shape, dtype, device, strides=strides, offset=(offsets or {}).get(key, 0))
        if "int" in dtype:  # any code: 0, and -128 for a first moment that was not finite, among them
            info = np.iinfo(ARRAY_DTYPE[dtype])
            array = rng.integers(info.min, info.max, shape, ARRAY_DTYPE[dtype], endpoint=True)
        elif special:
            array = special_values(rng, shape, dtype)
        elif key.endswith("_sq"):
            values = load(ordinary_values(rng, shape, dtype, scale=1e-2), dtype, compute_dtype(dtype))
            array = store(np.abs(values), dtype)
        else:
            array = ordinary_values(rng, shape, dtype)
        case.write(key, array)
    return case


def any_scaling(rng: np.random.Generator, shape: tuple[int, ...], key: str) -> np.ndarray:
    """Return what 8-bit moments keep beside the codes: a scale, or words of groups whose v lies about 1e-4."""
    if key == "exp_avg_sq_scale":
        return np.array(FIRST_SCALE * np.float32(rng.uniform(1, 2)), np.float32)
    words = rng.integers(120, 140, shape) << 8 | rng.integers(0, 256, shape)
    return words.astype(np.uint16).view(np.int16)


def check_all(cases: Iterable[Case], what: str) -> None:
    """Compare every case with the judge."""
    for i, case in enumerate(cases):
        case.check(f"{what}, tensor {i}")


# --- the ways in ---------------------------------------------------------------------------------------------------


def update_lists(
    cases: Sequence[Case], hyper: Mapping[str, Any], flags: Mapping[str, bool], *, grads: Any = None, **options: Any
) -> None:
    """Take one step of all cases with `fused_adamw_`; the judge stands still.

    Args:
        cases: what to update.
        hyper: lr, beta1, beta2, eps, weight_decay: floats or tensors.
        flags: amsgrad, maximize, decoupled.
        grads: gradients to pass instead of the cases' own.
        options: other keyword arguments of `fused_adamw_`.
    """
    lists = {key: [case[key] for case in cases] for key in ("param", "grad", *MOMENTS, "step")}
    fused_adamw_(
        lists["param"],
        lists["grad"] if grads is None else grads,
        lists["exp_avg"],
        lists["exp_avg_sq"],
        lists["max_exp_avg_sq"] if flags["amsgrad"] else [],
        lists["step"],
        **hyper,
        **flags,
        **options,
    )


def step_lists(
    cases: Sequence[Case], hyper: Mapping[str, Any], flags: Mapping[str, bool], *, grads: Any = None, **options: Any
) -> None:
    """Take one step of all cases with `fused_adamw_`, and let the judge take it too. Arguments of `update_lists`."""
    update_lists(cases, hyper, flags, grads=grads, **options)
    judge_all(cases, hyper, flags)


def judge_all(cases: Iterable[Case], hyper: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
    """Let the judge take one step of every case; a hyperparameter's tensor counts as its float64 value."""
    values = {key: float(value) for key, value in hyper.items()}
    for case in cases:
        case.judge(values, flags)


class Launch:
    """A launch plan over cases, any formats at any sizes, and the judge beside it.

    Attributes:
        fields: the hyperparameters with which a HyperRow begins.
    """

    fields = ("lr", "beta1", "beta2", "eps", "weight_decay")

    def __init__(
        self,
        cases: Sequence[Case],
        hyper: Mapping[str, float] = HYPER,
        flags: Mapping[str, bool] = PLAIN,
        *,
        update_bound: float | str | None = "auto",
        ema_decay: float | None = None,
        seed: int = 0,
        positions: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        """Build the plan; no step is taken.

        Args:
            cases: what to update.
            hyper: lr, beta1, beta2, eps, weight_decay; initial_lr, if the decay follows the schedule.
            flags: of `reference.adamw_exact`: amsgrad, maximize, decoupled, cautious, cautious_weight_decay.
            update_bound: of `FusedAdamW`.
            ema_decay: of the cases that have an average.
            seed: of the random bits.
            positions: of the parameters in their optimizer; by default those among the cases.
            chunk_size: elements a chunk, instead of the backend's own choice.
        """
        self.cases = cases
        self.hyper, self.flags = hyper, flags
        self.update_bound, self.ema_decay, self.seed = update_bound, ema_decay, seed
        self.positions = range(len(cases)) if positions is None else positions
        specs = [self._spec(case, position) for case, position in zip(cases, self.positions, strict=True)]
        self.plan = LaunchPlan(specs, 1, backends.choose, chunk_size)
        values = [hyper.get(key) for key in self.fields]
        self.plan.hypers.write_all([*values, None, ema_decay, hyper.get("initial_lr")])

    def _spec(self, case: Case, position: int) -> TensorSpec:
        bound = self.update_bound
        if bound == "auto":
            bound = None if case.moment_format == "float32" else -1.0
        state = {key: case[key] for key in case.tensors}
        return TensorSpec(
            name=f"case {position}",
            param=state["param"],
            grad_dtype=state["grad"].dtype,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            max_exp_avg_sq=state.get("max_exp_avg_sq") if self.flags["amsgrad"] else None,
            step=state["step"],
            hyper=0,
            schedule_decay="initial_lr" in self.hyper,
            amsgrad=self.flags["amsgrad"],
            maximize=self.flags["maximize"],
            decoupled=self.flags["decoupled"],
            cautious=self.flags.get("cautious", False),
            cautious_decay=self.flags.get("cautious_weight_decay", False),
            ema=None if self.ema_decay is None else state.get("param_ema"),
            random_stream=formats.random_stream(self.seed, position),
            param_format=case.param_format,
            moment_format=case.moment_format,
            remainder=state.get("param_remainder"),
            groups=state.get("moment_groups"),
            scale=state.get("exp_avg_sq_scale"),
            first_element=case.first_element,
            update_bound=math.inf if bound is None else bound,
        )

    def run(self) -> None:
        """One step of the kernels; the judge stands still."""
        self.plan.write_grads([grad_address(case["grad"]) if case.has_grad else 0 for case in self.cases])
        self.plan.launch()

    def judge(self) -> None:
        """One step of the judge."""
        for case, position in zip(self.cases, self.positions, strict=True):
            if not case.has_grad:
                continue
            case.judge(self.hyper, self.flags, self.seed, position, self.update_bound)
            if case.ema_format is not None and self.ema_decay is not None:
                case.judge_average(self.ema_decay, False, self.seed, position)

    def step(self) -> None:
        """One step of both."""
        self.run()
        self.judge()


@dataclasses.dataclass
class Group:
    """The cases of one parameter group and its options.

    Attributes:
        flags: those of `reference.adamw_exact`: amsgrad, maximize, decoupled, cautious, cautious_weight_decay.
        options: any of max_grad_norm, ema_decay, ema_warmup, ema_format, update_bound, param_format, moment_format.
            Weights are native and moments exact unless an option says otherwise; cases are in the format that the
            optimizer makes of it.
    """

    cases: list[Case]
    hyper: Mapping[str, Any] = dataclasses.field(default_factory=lambda: HYPER)
    flags: Mapping[str, bool] = dataclasses.field(default_factory=lambda: PLAIN)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def number(value: Any) -> float | None:
    """Return the value of a float or one-element tensor; None stays None."""
    return None if value is None else float(value)


class WholeStep:
    """The judge of a complete step over parameter groups. Options that are tensors count as their float64 values.

    Attributes:
        decision: of the last step, or None before the first.
        skipped_steps: how many were.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        clip_per_group: bool = False,
        skip_nonfinite: bool = False,
        max_skip_norm: Any = None,
        seed: int = 0,
    ) -> None:
        """Take the options of `FusedAdamW` that concern all groups."""
        self.groups = groups
        self.clip_per_group = clip_per_group
        self.skip_nonfinite = skip_nonfinite
        self.max_skip_norm = max_skip_norm
        self.seed = seed
        self.decision: Decision | None = None
        self.skipped_steps = 0

    @property
    def measures(self) -> bool:
        """Whether anything asks for a norm."""
        guarded = self.skip_nonfinite or self.max_skip_norm is not None
        return guarded or any(group.options.get("max_grad_norm") is not None for group in self.groups)

    def take(self, grad_scale: Any = None, found_inf: Any = None) -> Decision:
        """Move every case's arrays on, unless the step is to be skipped."""
        partials = [[self._partials(case) for case in group.cases] for group in self.groups]
        if not self.clip_per_group:
            partials = [[x for group in partials for x in group]]
        totals = [total(np.concatenate([np.empty(0), *group])) for group in partials]
        decision = decide(
            totals, number(grad_scale), number(found_inf), self.skip_nonfinite, number(self.max_skip_norm)
        )
        self.decision = decision
        self.skipped_steps += decision.skip
        if not decision.skip:
            self._update(decision)
        return decision

    @staticmethod
    def _partials(case: Case) -> np.ndarray:
        if not case.has_grad:
            return np.zeros(norm_chunks(case.arrays["grad"].size))
        return norm_partials(case.grad_in_memory_order(), case.grad_dtype)

    def _update(self, decision: Decision) -> None:
        position = 0
        for index, group in enumerate(self.groups):
            hyper = {key: float(value) for key, value in group.hyper.items()}
            ema_decay = number(group.options.get("ema_decay"))
            for case in group.cases:
                if case.has_grad:
                    case.judge(
                        hyper,
                        group.flags,
                        self.seed,
                        position,
                        group.options.get("update_bound", "auto"),
                        inv_scale=decision.inv_scale,
                        norm=decision.norms[index if self.clip_per_group else 0],
                        max_grad_norm=number(group.options.get("max_grad_norm")),
                    )
                    if ema_decay is not None:
                        case.judge_average(ema_decay, group.options.get("ema_warmup", False), self.seed, position)
                position += 1


class Training:
    """A `FusedAdamW` over groups of cases whose state it has loaded, and the judge beside it.

    Attributes:
        make: the optimizer's class.
    """

    make: type[torch.optim.Optimizer] = FusedAdamW

    def __init__(self, groups: Sequence[Group], *, fused: bool | None = None, **options: Any) -> None:
        """Make the parameters, hand over gradients and state; no step is taken.

        Args:
            groups: what to update.
            fused: of `FusedAdamW`.
            options: those of `WholeStep`.
        """
        self.groups = groups
        self.params = [[torch.nn.Parameter(case["param"]) for case in group.cases] for group in groups]
        self.judge = WholeStep(groups, **options)
        of_groups = []
        for group, params in zip(groups, self.params, strict=True):
            hyper = dict(group.hyper)
            if "beta1" in hyper:
                hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
            if "initial_lr" in hyper:
                hyper["decay_coupling"] = "schedule"
            of_groups.append(dict(params=params, **hyper, **group.flags, **{**NATIVE_FORMATS, **group.options}))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="param_format='native'")  # of what native 16-bit weights lose
            self.optimizer = self.make(of_groups, fused=fused, **options)
        for p, case, group in self:
            if case["grad"].dtype != p.dtype:
                p.grad_dtype = None  # any dtype
            unused = {"param", "grad", *case.unused(group.hyper, group.flags)}
            self.optimizer.state[p] = {case.state_key(key): case[key] for key in case.tensors if key not in unused}
        self.give_grads()

    def __iter__(self) -> Any:
        """(parameter, case, group) of every parameter."""
        for group, params in zip(self.groups, self.params, strict=True):
            yield from ((p, case, group) for p, case in zip(params, group.cases, strict=True))

    def give_grads(self, absent: Sequence[Case] = ()) -> None:
        """Give every parameter its gradient, and None to the absent cases'."""
        for p, case, _ in self:
            case.has_grad = case not in absent
            p.grad = case["grad"] if case.has_grad else None

    def set_option(self, group: int, key: str, value: Any) -> None:
        """Give a group another value of one of its `options`, between two steps."""
        self.optimizer.param_groups[group][key] = value
        self.groups[group].options = {**self.groups[group].options, key: value}

    def renew_grads(self, rng: np.random.Generator) -> None:
        """Other ordinary gradients for all."""
        for _, case, _ in self:
            case.renew_grad(rng)

    def step(self, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None) -> None:
        """One step of the optimizer and of the judge.

        Args:
            grad_scale: set for this step as `torch.amp.GradScaler` does; None: not set.
            found_inf: likewise.
        """
        signals = {"grad_scale": grad_scale, "found_inf": found_inf}
        for name, value in signals.items():
            if value is not None:
                setattr(self.optimizer, name, value)
        self.optimizer.step()
        for name, value in signals.items():
            if value is not None:
                delattr(self.optimizer, name)
        self.judge.take(**signals)

    def check(self, what: str) -> None:
        """Compare every case with the judge, and what the optimizer says about the step: norms and skips."""
        for i, group in enumerate(self.groups):
            check_all(group.cases, f"{what}, group {i} {dict(group.hyper)} {dict(group.flags)} {dict(group.options)}")
        if self.judge.decision is not None:
            self._check_decision(self.judge.decision, what)

    def _check_decision(self, expected: Decision, what: str) -> None:
        opt = self.optimizer
        skipped, count = opt.last_step_skipped, opt.skipped_steps
        assert (skipped.dtype, skipped.shape, bool(skipped)) == (torch.bool, (), expected.skip), what
        assert (count.dtype, count.shape, int(count)) == (torch.int64, (), self.judge.skipped_steps), what
        if not self.judge.measures:
            return
        with np.errstate(over="ignore"):
            norm, norms = np.asarray(np.float32(expected.norm)), expected.norms.astype(np.float32)
        assert_same_bits(stored(opt.grad_norm), norm, "float32", f"{what}: grad_norm")
        if self.judge.clip_per_group:
            assert_same_bits(stored(opt.group_grad_norms), norms, "float32", f"{what}: group_grad_norms")
        # In float32 an order of additions of one's own would hardly ever show.
        in_full = np.array([expected.norm, expected.inv_scale, *expected.norms])
        (verdict,) = opt._internals.control.verdicts
        got = stored(verdict.decision.view(torch.float64)[DECISION_NORM:])
        assert_same_bits(got, in_full, "float64", f"{what}: norm, 1 / loss scale, norms")


# --- drawn by hypothesis --------------------------------------------------------------------------------------------


def is_interpreted(path: Path) -> bool:
    """Whether a step takes tens of milliseconds."""
    return path.backend == "triton" and path.device.type == "cpu"


def explore(path: Path, native_examples: int) -> settings:
    """Return the same examples on every run; fewer under the interpreter."""
    return settings(
        max_examples=native_examples // 5 if is_interpreted(path) else native_examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
