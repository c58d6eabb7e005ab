"""How well Adam follows exact Adam when its moments are stored in few bytes: our formats and published ones.

What reaches a weight is u = m_hat / (sqrt(v_hat) + eps). Every metric compares u, or what it adds up to, with that of
torch's AdamW in float64 on the same gradients: a recorded trace of a GPT's gradients (`record_trace.py`) and generators
of what breaks formats. Our formats run in the real optimizer: its float32 weights are set to 0 before every step of lr
1, so that they hold -u after it. Published formats (`published_formats.py`) run in the same optimizer with float32
moments, which go through the format after each step. Nothing here depends on time: a row is the same on any machine.

`README.md` beside this file says what each metric means; `ACCEPTANCE` holds the figures that our 8-bit moments must
meet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adamw_kernels import FusedAdamW
from adamw_kernels.packing import unpack_moments
from adamw_kernels.rules import moment_keys
from bench import record_trace, rows
from bench.published_formats import PUBLISHED, PublishedFormat

Array = npt.NDArray[Any]

BETA1 = 0.9
BETA2S = (0.999, 0.95)
BOUND_MARGIN = 1e-3  # of update_bound="auto"
SEED = 2019

# Smaller than any denominator that a stored v can give: eps must not hide what a format does to small gradients.
NO_EPS = 1e-30

# What our 8-bit moments must not exceed.
ACCEPTANCE: dict[str, float] = {
    "update_error_beta2_0.999": 6e-4,
    "update_error_beta2_0.95": 2.5e-4,
    "stress_weight_error": 0.08,
    "stress_largest_update": 1.0,  # of the bound that many steps approach
    "second_moment_bias": 0.01,
    "dead_drift": 1.1,
    "sparse_update_over_bound": (1 + BOUND_MARGIN) * (1 + 2.0**-22),  # two roundings of the clamped update
    "metadata_bytes": 1 / 8,
}


# --------------------------------------------------------------------------------------------------------- who runs


@dataclass(frozen=True)
class Format:
    """A way to keep the moments.

    Attributes:
        name: How rows call it.
        moment_format: What the optimizer keeps them in.
        published: The reference model that the optimizer's float32 moments go through, if any.
    """

    name: str
    moment_format: str = "float32"
    published: PublishedFormat | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether updates are clamped as it is shipped."""
        return self.published is None and self.moment_format != "float32"


OURS = (Format("float32"), Format("bfloat16", "bfloat16"), Format("8bit", "8bit"))
FORMATS = {
    format.name: format for format in (*OURS, *(Format(published.name, published=published) for published in PUBLISHED))
}


class Adam:
    """One tensor's optimizer, of which only the updates are wanted."""

    def __init__(
        self, format: Format, size: int, beta2: float, eps: float, *, bounded: bool, device: torch.device, seed: int = 0
    ) -> None:
        """An optimizer of `size` elements; `bounded` clamps updates, published formats' too. `seed`: of chance."""
        self.format = format
        self.beta2 = beta2
        self.step = 0
        self.clamp = bounded and format.published is not None
        self.noise = np.random.default_rng(SEED + seed)
        self.param = torch.nn.Parameter(torch.zeros(size, device=device))
        self.param.grad = torch.zeros_like(self.param)
        self.optimizer = FusedAdamW(
            [self.param],
            lr=1.0,
            betas=(BETA1, beta2),
            eps=eps,
            weight_decay=0.0,
            moment_format=format.moment_format,
            seed=seed,
            update_bound="auto" if bounded and format.is_bounded else None,
        )

    def update(self, grad: Array) -> Array:
        """The update u that this gradient brings."""
        self.step += 1
        u = update_of(self.optimizer, self.param, grad)
        if self.format.published is not None:
            self.store(self.format.published)
        if self.clamp:
            limit = bound(self.step, self.beta2) * (1 + BOUND_MARGIN)
            u = np.clip(u, -limit, limit)
        return u

    def store(self, published: PublishedFormat) -> None:
        """Sends the float32 moments through a published format."""
        state = self.optimizer.state[self.param]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        noise = self.noise.random(len(v), np.float32)
        for moment, stored in zip((m, v), published.store(m.cpu().numpy(), v.cpu().numpy(), noise), strict=True):
            moment.copy_(torch.from_numpy(stored))

    def second_moment(self) -> Array:
        """The stored v in float64."""
        state = self.optimizer.state[self.param]
        v = unpack_moments(state, self.param)[1] if self.format.moment_format == "8bit" else None
        return (state["exp_avg_sq"] if v is None else v).double().cpu().numpy()

    def bytes_per_param(self) -> tuple[float, float]:
        """Bytes per parameter of the moments and of what their codes need beside them, scalars not counted."""
        if self.format.published is not None:
            total = self.format.published.bytes_per_param
            return total, total - 2
        state = self.optimizer.state[self.param]
        keys = moment_keys(self.optimizer.param_groups[0], self.format.moment_format)
        moments = sum(state[key].nbytes for key in keys) / self.param.numel()
        groups = state["moment_groups"].nbytes / self.param.numel() if "moment_groups" in state else 0.0
        return moments + groups, groups


class ExactAdam:
    """torch's AdamW in float64: no code shared with what is measured."""

    def __init__(self, size: int, beta2: float, eps: float) -> None:
        """An optimizer of `size` elements."""
        self.param = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.param.grad = torch.zeros_like(self.param)
        self.optimizer = torch.optim.AdamW(
            [self.param], lr=1.0, betas=(BETA1, beta2), eps=eps, weight_decay=0.0, fused=True
        )

    def update(self, grad: Array) -> Array:
        """The update u that this gradient brings."""
        return update_of(self.optimizer, self.param, grad)

    def second_moment(self) -> Array:
        """The exact v."""
        v: Array = self.optimizer.state[self.param]["exp_avg_sq"].numpy()
        return v


def update_of(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, grad: Array) -> Array:
    """A step of lr 1 from weights of 0, in float64."""
    assert param.grad is not None
    with torch.no_grad():
        param.grad.copy_(torch.from_numpy(grad))
        param.zero_()
    optimizer.step()
    return -param.detach().double().cpu().numpy()


def bound(step: int, beta2: float) -> float:
    """The largest |m_hat| / sqrt(v_hat) that `step` gradients can give (Cauchy-Schwarz)."""
    q = BETA1**2 / beta2
    first = (1 - BETA1) ** 2 / (1 - BETA1**step) ** 2
    return float(np.sqrt(first * (1 - beta2**step) / (1 - beta2) * (1 - q**step) / (1 - q)))


@dataclass
class Pair:
    """A format beside exact Adam on the same gradients; sums over the steps that count.

    Attributes:
        tested: The format's optimizer.
        exact: Exact Adam.
        update: Sum of the format's updates.
        exact_update: Sum of the exact ones.
        error: Sum of the squared differences, by element.
        square: Sum of the squared exact updates, by element.
        largest: Largest |u|, over all steps.
        over_bound: Largest |u| over the bound of its step, over all steps.
    """

    tested: Adam
    exact: ExactAdam
    update: Array
    exact_update: Array
    error: Array
    square: Array
    largest: float = 0.0
    over_bound: float = 0.0

    @classmethod
    def of(
        cls,
        format: Format,
        size: int,
        beta2: float,
        *,
        device: torch.device,
        eps: float = 1e-15,
        bounded: bool = True,
        seed: int = 0,
    ) -> Pair:
        """Both before their first step."""
        zeros = (np.zeros(size) for _ in range(4))
        tested = Adam(format, size, beta2, eps, bounded=bounded, device=device, seed=seed)
        return cls(tested, ExactAdam(size, beta2, eps), *zeros)

    def step(self, grad: Array, *, exact_grad: Array | None = None, counts: bool = True) -> tuple[Array, Array]:
        """Both updates of this gradient; those that count enter the sums."""
        grad = grad.astype(np.float32)
        u = self.tested.update(grad)
        exact = self.exact.update(grad if exact_grad is None else exact_grad)
        largest = np.abs(u).max()  # NaN stays NaN in what follows
        self.largest = float(np.maximum(self.largest, largest))
        self.over_bound = float(np.maximum(self.over_bound, largest / bound(self.tested.step, self.tested.beta2)))
        if counts:
            self.update += u
            self.exact_update += exact
            self.error += (u - exact) ** 2
            self.square += exact**2
        return u, exact

    def update_error(self, elements: Array | slice = slice(None)) -> float:
        """||u - exact||^2 / ||exact||^2 over steps and elements."""
        return float(self.error[elements].sum() / self.square[elements].sum())

    def weight_error(self) -> float:
        """||sum of u - sum of exact u|| / ||sum of exact u||: how far the weights end from where they should."""
        return float(np.linalg.norm(self.update - self.exact_update) / np.linalg.norm(self.exact_update))


# ---------------------------------------------------------------------------------------------------------- metrics


@functools.cache
def trace() -> tuple[Array, Array]:
    """The recorded gradients and which elements are real; more zeros behind them, for the tensor to be 8-bit."""
    gradients, real = record_trace.load()
    size = max(4096, gradients.shape[1])
    padding = size - gradients.shape[1]
    return np.pad(gradients, ((0, 0), (0, padding))), np.pad(real, (0, padding))


def on_trace(
    format: Format,
    beta2: float,
    *,
    device: torch.device,
    scale: float = 1.0,
    eps: float = 1e-8,
    steps: int | None = None,
    first: int = 0,
    outliers: float | None = None,
) -> float:
    """Update error on the trace times `scale`, over the steps from `first` on.

    With `outliers`, one element in 128 is that many times larger, and the error is that of the others.
    """
    gradients, counted = trace()
    if outliers is not None:
        counted, factors = counted.copy(), np.ones(len(counted), np.float32)
        counted[37::128] = False
        factors[37::128] = outliers
        gradients = gradients * factors
    pair = Pair.of(format, gradients.shape[1], beta2, device=device, eps=eps)
    for step, gradient in enumerate(gradients[:steps]):
        pair.step(gradient * np.float32(scale), counts=step >= first)
    return pair.update_error(counted)


def trace_rms(steps: int) -> float:
    """Root-mean-square gradient of the first steps of the trace."""
    gradients, real = trace()
    return float(np.sqrt(np.mean(gradients[:steps, real].astype(np.float64) ** 2)))


def at_scale(format: Format, beta2: float, scale: float, *, device: torch.device, steps: int = 200) -> float:
    """Update error on the trace when its rms gradient is `scale` and eps plays no part."""
    return on_trace(format, beta2, device=device, scale=scale / trace_rms(steps), eps=NO_EPS, steps=steps)


def stress(
    format: Format,
    beta2: float,
    *,
    sigma: float,
    device: torch.device,
    bounded: bool = False,
    size: int = 16384,
    steps: int = 300,
    seed: int = 0,
) -> Pair:
    """Gradients of scales exp(sigma * normal), then all ten times smaller; the steps after that count."""
    rng = np.random.default_rng(SEED)
    scales = 1e-3 * np.exp(sigma * rng.standard_normal(size))
    pair = Pair.of(format, size, beta2, device=device, bounded=bounded, seed=seed)
    for step in range(2 * steps):
        dropped = step >= steps
        pair.step(scales * rng.standard_normal(size) * (0.1 if dropped else 1.0), counts=dropped)
    return pair


def bias_after_drops(
    format: Format,
    beta2: float,
    factors: tuple[float, ...],
    *,
    device: torch.device,
    size: int = 4096,
    before: int = 600,
    after: int = 1500,
) -> list[float]:
    """Largest |mean stored v / mean exact v - 1|, every 50 steps after gradients fell by each of the factors.

    Every factor has `size` elements of the same tensor.
    """
    rng = np.random.default_rng(SEED)
    scales = 1e-4 * np.exp(0.5 * rng.standard_normal(len(factors) * size))
    divisors = np.repeat(factors, size)
    pair = Pair.of(format, len(scales), beta2, device=device)
    worst = np.zeros(len(factors))
    for step in range(before + after):
        pair.step(scales * rng.standard_normal(len(scales)) / (divisors if step >= before else 1.0))
        if step >= before and (step - before) % 50 == 49:
            stored, exact = pair.tested.second_moment(), pair.exact.second_moment()
            means = (v.reshape(len(factors), size).mean(axis=1) for v in (stored, exact))
            worst = np.maximum(worst, np.abs(np.divide(*means) - 1))
    return [float(value) for value in worst]


@dataclass(frozen=True)
class Dead:
    """What became of elements whose gradient stopped.

    Attributes:
        mixed: Mean distance they drifted over that of exact Adam's, where one in four stopped.
        blocks: The same where whole blocks of 256 did.
        neighbours: Update error of the others.
    """

    mixed: float
    blocks: float
    neighbours: float


def dead(
    format: Format, beta2: float, *, device: torch.device, size: int = 8192, before: int = 300, after: int = 1500
) -> Dead:
    """Gradients stop for one element in four of the first half and for every other block of the second."""
    rng = np.random.default_rng(SEED)
    scales = 1e-4 * np.exp(0.5 * rng.standard_normal(size))
    first_half = np.arange(size) < size // 2
    stops = np.where(first_half, rng.random(size) < 0.25, np.arange(size) // 256 % 2 == 0)
    pair = Pair.of(format, size, beta2, device=device)
    for step in range(before + after):
        stopped = stops & (step >= before)
        pair.step(scales * (rng.standard_normal(size) + 0.3) * ~stopped, counts=step >= before)

    def drift(elements: Array) -> float:
        return float(np.abs(pair.update[elements]).mean() / np.abs(pair.exact_update[elements]).mean())

    return Dead(drift(stops & first_half), drift(stops & ~first_half), pair.update_error(~stops & first_half))


def sparse(
    format: Format, beta2: float, *, device: torch.device, bounded: bool, width: int = 128, steps: int = 1000
) -> Pair:
    """An embedding of 128 rows, each with a heavy-tailed gradient in about one step of fifty."""
    rng = np.random.default_rng(SEED)
    shape = (128, width)
    chances = 0.02 * np.exp(1.5 * rng.standard_normal(shape[0]))
    pair = Pair.of(format, shape[0] * width, beta2, device=device, bounded=bounded)
    for _ in range(steps):
        hit = (rng.random(shape[0]) < chances)[:, None]
        gradient = 1e-4 * rng.standard_t(3, shape) * np.exp(rng.standard_normal((shape[0], 1))) * hit
        pair.step(gradient.ravel())
    return pair


def closed_loop(
    format: Format, beta2: float, *, device: torch.device, size: int = 8192, steps: int = 1500, lr: float = 1e-2
) -> float:
    """Final loss over exact Adam's on a noisy quadratic with log-normal curvatures, noise ten times less half-way."""
    rng = np.random.default_rng(SEED)
    curvature = np.exp(2 * rng.standard_normal(size))
    weights = rng.standard_normal(size)
    exact_weights = weights.copy()
    pair = Pair.of(format, size, beta2, device=device, eps=1e-8)
    loss = exact_loss = 0.0
    for step in range(steps):
        noise = rng.standard_normal(size) * (1.0 if step < steps // 2 else 0.1)
        rate = lr * min(1.0, 1 - 0.95 * (step - steps // 2) / (steps - steps // 2))
        u, exact = pair.step(curvature * (weights + noise), exact_grad=curvature * (exact_weights + noise))
        weights = weights - rate * u
        exact_weights = exact_weights - rate * exact
        if step >= steps - 100:
            loss += float(np.mean(weights**2))
            exact_loss += float(np.mean(exact_weights**2))
    return loss / exact_loss


# ------------------------------------------------------------------------------------------------------------- rows


def measure(format: Format, device: torch.device) -> Iterator[rows.QualityRow]:
    """All rows of a format, each as soon as it is measured."""

    def row(metric: str, setting: str, beta2: float, value: float, acceptance: str | None = None) -> rows.QualityRow:
        limit = ACCEPTANCE[acceptance] if acceptance is not None else None
        return rows.QualityRow(
            format=format.name,
            source=format.published.source if format.published is not None else "FusedAdamW",
            bytes_per_param=total_bytes,
            metric=metric,
            setting=setting,
            beta2=beta2,
            value=value,
            limit=limit,
            met=int(value <= limit) if limit is not None else None,
        )

    kept = Adam(format, 16384, BETA2S[0], 1e-8, bounded=True, device=device)
    kept.update(np.ones(16384))
    total_bytes, metadata_bytes = kept.bytes_per_param()
    yield row("metadata_bytes", "", BETA2S[0], metadata_bytes, "metadata_bytes")
    late = len(trace()[0]) * 3 // 4
    run = functools.partial(on_trace, format, device=device)
    for beta2 in BETA2S:
        figure = f"update_error_beta2_{beta2:g}"
        yield row("update_error", "trace", beta2, run(beta2), figure)
        yield row("update_error", "trace, last quarter", beta2, run(beta2, first=late))
        for exponent in (-3, -6, -9, -12):
            error = at_scale(format, beta2, 10.0**exponent, device=device)
            yield row("update_error", f"trace at scale 1e{exponent}", beta2, error, figure)
        yield row("update_error", "trace beside outliers", beta2, run(beta2, steps=400, outliers=1e4))
        for sigma in (1.0, 2.0):
            pair = stress(format, beta2, sigma=sigma, device=device)
            name, required = f"stress, sigma {sigma:g}", sigma == 1.0
            yield row("weight_error", name, beta2, pair.weight_error(), "stress_weight_error" if required else None)
            ratio = pair.largest / bound(pair.tested.step, beta2)
            yield row("largest_update", name, beta2, ratio, "stress_largest_update" if required else None)
        factors = (5.0, 10.0, 25.0)
        for factor, bias in zip(factors, bias_after_drops(format, beta2, factors, device=device), strict=True):
            yield row("second_moment_bias", f"drop by {factor:g}", beta2, bias, "second_moment_bias")
        stopped = dead(format, beta2, device=device)
        yield row("dead_drift", "one in four", beta2, stopped.mixed, "dead_drift")
        yield row("dead_drift", "blocks of 256", beta2, stopped.blocks, "dead_drift")
        yield row("update_error", "beside dead elements", beta2, stopped.neighbours)
        for bounded in (True, False) if format.is_bounded else (False,):
            name = "sparse, update_bound=None" if format.is_bounded and not bounded else "sparse"
            acceptance = None if format.is_bounded and not bounded else "sparse_update_over_bound"
            pair = sparse(format, beta2, device=device, bounded=bounded)
            yield row("update_over_bound", name, beta2, pair.over_bound, acceptance)
            if bounded == format.is_bounded:
                yield row("update_error", "sparse", beta2, pair.update_error())
        yield row("closed_loop_loss", "noisy quadratic", beta2, closed_loop(format, beta2, device=device))
