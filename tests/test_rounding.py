"""Chance in rounding: every stochastic rounding is unbiased, and none leans on another.

What is rounded is known: from moments of zero and betas of 0 the first moment is the gradient g, the second one g * g,
and the update lr * sign(g), all exactly. Ten million elements hold the same value; the kernels round them at once. The
bits behind it are the judge's (tests/test_formats.py), so one backend speaks for all.

Everything is seeded and so passes or fails for good. Five standard errors are exceeded by one in 1.7 million.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import TORCH_DTYPE
from reference import (
    bits_for_average,
    bits_for_first_moment,
    bits_for_second_moment,
    bits_for_weight,
    random_key,
    random_words,
    store,
)
from reference_formats import (
    CODES_PER_OCTAVE,
    OCTAVES,
    decode_moments,
    merge_weight,
)
from tolerances import tolerance

from adamw_kernels import backends, formats
from adamw_kernels.launch_table import LaunchPlan, TensorSpec

STANDARD_ERRORS = 5
DRAWS = 10**7

BETAS_OF_ZERO = dict(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)


class Rounded:
    """A tensor in any formats, updated by the kernels that "auto" takes on a device."""

    def __init__(
        self,
        device: torch.device,
        size: int = DRAWS,
        *,
        param: str = "float32",
        param_format: str = "native",
        moment_format: str = "float32",
        ema: bool = False,
    ) -> None:
        """Allocate; everything is 0."""
        moment = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(moment_format)
        coded = moment is None

        def zeros(dtype: torch.dtype, numel: int = size) -> torch.Tensor:
            return torch.zeros(numel, dtype=dtype, device=device)

        remainder = formats.remainder_dtype(param_format)
        self.param, self.grad = zeros(TORCH_DTYPE[param]), zeros(torch.float32)
        self.exp_avg, self.exp_avg_sq = zeros(moment or torch.int8), zeros(moment or torch.uint8)
        self.step = torch.zeros((), device=device)
        self.remainder = None if remainder is None else zeros(remainder)
        self.groups = zeros(torch.int16, -(-size // 16)) if coded else None
        self.scale = torch.full((), formats.FIRST_SCALE, device=device) if coded else None
        self.ema = zeros(torch.bfloat16) if ema else None
        self.param_format, self.moment_format = param_format, moment_format

    def update(self, hyper: dict[str, float], seed: int = 0, position: int = 0, ema_decay: float | None = None) -> None:
        """One step, whose update is not bound."""
        spec = TensorSpec(
            name="rounded",
            param=self.param,
            grad_dtype=self.grad.dtype,
            exp_avg=self.exp_avg,
            exp_avg_sq=self.exp_avg_sq,
            max_exp_avg_sq=None,
            step=self.step,
            hyper=0,
            ema=self.ema,
            random_stream=formats.random_stream(seed, position),
            param_format=self.param_format,
            moment_format=self.moment_format,
            remainder=self.remainder,
            groups=self.groups,
            scale=self.scale,
        )
        plan = LaunchPlan([spec], 1, backends.choose)
        plan.hypers.write_all(
            [hyper[key] for key in ("lr", "beta1", "beta2", "eps", "weight_decay")] + [None, ema_decay, None]
        )
        plan.write_grads([self.grad.data_ptr()])
        plan.launch()


def shares(tensor: torch.Tensor) -> dict[float, float]:
    """Return the values that a tensor holds, at most two, and how large a part of it each takes."""
    low, high = tensor.min(), tensor.max()
    above = torch.count_nonzero(tensor == high).item() / tensor.numel()
    below = torch.count_nonzero(tensor == low).item() / tensor.numel()
    assert low == high or math.isclose(above + below, 1.0, rel_tol=0.0, abs_tol=tolerance("float64_against_torch"))
    return {low.item(): below, high.item(): above}


def assert_unbiased(values: dict[float, float], expected: float, what: str, resolution: float = 0.0) -> None:
    """Compare the mean of two values with what was rounded to them: within five standard errors.

    Args:
        values: with the share of each.
        expected: what was rounded.
        what: for the message.
        resolution: of chance, in units of the two values' distance; 0 where what is cut off is exact.
    """
    low, high = min(values), max(values)
    assert low <= expected <= high, what
    if low == high:
        assert low == expected, what
        return
    share = (expected - low) / (high - low)
    standard_error = math.sqrt(share * (1 - share) / DRAWS)
    assert abs(values[high] - share) <= STANDARD_ERRORS * standard_error + resolution, (what, values, share)


# --- weights --------------------------------------------------------------------------------------------------------

# Where a weight in 16 bits lies between two: in the middle of a binade, beside its edges, in subnormals. With their
# fraction bits and least exponents.
BINADES = {"bfloat16": (7, -126), "float16": (10, -14)}


def edges(fraction_bits: int, least_exponent: int, cut_off: float) -> dict[str, float]:
    """Return values between two that have so many fraction bits, `cut_off` of their distance above the lower one."""
    unit = 2.0**-fraction_bits
    tiny = 2.0**least_exponent * unit
    return {
        "above a power of two": 1 + cut_off * unit,
        "below a power of two": 2 - unit + cut_off * unit,
        "within a binade": -(1 + 77 * unit + cut_off * unit),
        "smallest normal": 2.0**least_exponent + cut_off * tiny,
        "subnormal": -(5 + cut_off) * tiny,
        "smallest subnormal": cut_off * tiny,
    }


def rounded_weights(device: torch.device, dtype: str, param_format: str, value: float) -> Rounded:
    """Return weights that became `value` in float32 and were stored, from the next one above that is stored."""
    rounded = Rounded(device, param=dtype, param_format=param_format)
    # The update is lr: the weight before it is the next one in 16 bits, or twice the value, which then is exact.
    fraction_bits, least = BINADES[dtype]
    exponent = max(math.frexp(value)[1] - 1, least)
    before = math.ceil(value * 2.0 ** (fraction_bits - exponent)) * 2.0 ** (exponent - fraction_bits)
    assert float(np.float32(before - value)) == before - value
    rounded.param.fill_(before)
    assert rounded.param[0].item() == before
    rounded.grad.fill_(1.0)
    rounded.update(BETAS_OF_ZERO | dict(lr=before - value))
    return rounded


@pytest.mark.parametrize("dtype", BINADES)
def test_stochastic_weights_are_unbiased(device: torch.device, dtype: str) -> None:
    """Ten million weights between two of the 16-bit ones, at every edge: their mean is the float32 weight."""
    for cut_off in (0.3125, 1 / 64):
        for name, value in edges(*BINADES[dtype], cut_off).items():
            rounded = rounded_weights(device, dtype, "stochastic", value)
            assert_unbiased(shares(rounded.param), value, f"{dtype} {name}, {cut_off}")


@pytest.mark.parametrize("dtype", BINADES)
def test_split24_weights_are_unbiased(device: torch.device, dtype: str) -> None:
    """The same in the units of eight more bits: of what is remembered, weight and remainder together."""
    fraction_bits, least = BINADES[dtype]
    for name, value in edges(fraction_bits + 8, least, 0.25).items():
        rounded = rounded_weights(device, dtype, "split24", value)
        whole = rounded.param.view(torch.int16).to(torch.int32) << 8  # bits and remainder in one number, to be counted
        whole += rounded.remainder
        counted = shares(whole)
        remembered = {}
        for number, share in counted.items():
            weight = (int(number) + 128) >> 8
            remainder = np.array([int(number) - (weight << 8)], np.int8)
            stored = np.array([weight & 0xFFFF], np.uint16).view(store(np.float32(0), dtype).dtype)
            remembered[float(merge_weight(stored, remainder, dtype, "split24")[0])] = share
        assert_unbiased(remembered, value, f"{dtype} {name}")


# --- moments in bfloat16 --------------------------------------------------------------------------------------------


def test_bfloat16_moments_are_unbiased(device: torch.device) -> None:
    """Both of them, at binades' edges and among subnormals: m is the gradient, v its square."""
    gradients = [1 + 2.0**-10, 2 - 2.0**-10, math.sqrt(2) * (1 - 2.0**-20), -1.41, 1.3 * 2.0**-66, -1.2345 * 2.0**-130]
    rounded = Rounded(device, moment_format="bfloat16")
    for gradient in (float(np.float32(g)) for g in gradients):
        rounded.exp_avg.zero_()  # m + (g - m) is g
        rounded.exp_avg_sq.zero_()
        rounded.grad.fill_(gradient)
        rounded.update(BETAS_OF_ZERO)
        with np.errstate(under="ignore"):
            square = float(np.float32(gradient) * np.float32(gradient))
        assert_unbiased(shares(rounded.exp_avg), gradient, f"first moment {gradient}")
        assert_unbiased(shares(rounded.exp_avg_sq), square, f"second moment {square}")


# --- averages in bfloat16 -------------------------------------------------------------------------------------------


def test_bfloat16_averages_are_unbiased(device: torch.device) -> None:
    """The average, which with a decay of 0 is the float32 weight, at every edge of bfloat16's binades."""
    rounded = Rounded(device, ema=True)
    rounded.grad.fill_(1.0)
    for cut_off in (0.3125, 1 / 64):
        for name, value in edges(*BINADES["bfloat16"], cut_off).items():
            rounded.param.fill_(value)
            rounded.ema.zero_()
            rounded.update(BETAS_OF_ZERO, ema_decay=0.0)
            assert rounded.param[0].item() == value
            assert_unbiased(shares(rounded.ema), value, f"average {name}, {cut_off}")


# --- moments in 8 bits ----------------------------------------------------------------------------------------------

# Two of 16 neighbours set the group's ranges; the draws are the others'.
CODED = -(-DRAWS // 14) * 16


def of_others(tensor: torch.Tensor) -> torch.Tensor:
    """Return what belongs to the other 14 of each 16 neighbours."""
    return tensor.view(-1, 16)[:, 2:].reshape(-1)


def decoded(rounded: Rounded, first: float, second: float) -> tuple[float, float]:
    """Return the moments that codes stand for in the first group."""
    groups, unscale = rounded.groups[:1].cpu().numpy(), np.float32(1 / rounded.scale.cpu().double().item())
    m, v = decode_moments(np.array([first], np.int8), np.array([second], np.uint8), groups, unscale)
    return float(m[0]), float(v[0])


@pytest.mark.parametrize("mode", [0, 5, 15])
def test_coded_second_moments_are_unbiased(device: torch.device, mode: int) -> None:
    """Between two codes of the finest, a middle and the coarsest range; beside codes, and beside octaves' edges."""
    n, octaves = int(CODES_PER_OCTAVE[mode]), int(OCTAVES[mode])
    rounded = Rounded(device, CODED, moment_format="8bit")
    places = {"in the middle": 1 + (n // 2 + 0.4) / n, "above an octave's edge": 1 + 0.03 / n, "below one": 2 - 0.2 / n}
    for name, value in places.items():
        if octaves > 1:
            value *= 2.0 ** (octaves // 2)
        rounded.grad.fill_(math.sqrt(value))
        rounded.grad.view(-1, 16)[:, 0] = math.sqrt(1.0)
        rounded.grad.view(-1, 16)[:, 1] = 2.0 ** ((octaves - 1) / 2) * 1.1 if octaves > 1 else 1.3
        g = float(np.float32(math.sqrt(value)))
        expected = float(np.float32(g) * np.float32(g))
        rounded.update(BETAS_OF_ZERO)
        assert int(rounded.groups[0].item()) >> 4 & 15 == mode
        counted = shares(of_others(rounded.exp_avg_sq))
        values = {decoded(rounded, 0, code)[1]: share for code, share in counted.items()}
        assert_unbiased(values, expected, f"mode {mode}, {name}", tolerance("resolution_of_chance"))


@pytest.mark.parametrize("part", [1.0, 0.4, 0.05])
def test_coded_first_moments_are_unbiased(device: torch.device, part: float) -> None:
    """A first moment that moved by a fraction of its code's step is above or below by chance, large or small.

    `part`: of the group's largest. From a state in which all are at a code.
    """
    rounded = Rounded(device, CODED, moment_format="8bit")
    code = round(127 * part) - 1
    for moved in (0.3, -0.7, 1.01):
        rounded.exp_avg.fill_(code)
        rounded.exp_avg.view(-1, 16)[:, 0] = 127
        rounded.exp_avg_sq.fill_(100)
        rounded.groups.fill_(127 << 8 | 4)
        rounded.scale.fill_(formats.FIRST_SCALE)
        before, _ = decoded(rounded, code, 100)
        of_largest, _ = decoded(rounded, 127, 100)
        target = float(np.float32(before + moved * of_largest / 127))
        rounded.grad.fill_(target)
        rounded.grad.view(-1, 16)[:, 0] = of_largest
        rounded.update(BETAS_OF_ZERO | dict(beta2=1 - 2.0**-40))  # the second moment stays
        counted = shares(of_others(rounded.exp_avg))
        values = {decoded(rounded, first, 100)[0]: share for first, share in counted.items()}
        assert_unbiased(values, target, f"{part} of the largest, moved {moved}", tolerance("resolution_of_chance"))


# --- independence ---------------------------------------------------------------------------------------------------

FIELDS = ("weight", "first moment", "second moment", "average")
PAIRED = 1 << 21


def outcomes(device: torch.device, t: int = 1, seed: int = 0, position: int = 0) -> dict[str, torch.Tensor]:
    """Return where each of an element's roundings in step `t` went up: centred, of variance 1."""
    rounded = Rounded(device, PAIRED, param="bfloat16", param_format="stochastic", moment_format="bfloat16", ema=True)
    rounded.step.fill_(t - 1)
    rounded.param.fill_(1 + 2.0**-7)
    rounded.grad.fill_(1 + 2.0**-8 + 2.0**-9)  # m: a half and a quarter above 1; v: its square
    rounded.ema.fill_(1.0)
    # The weight comes to lie midway below, and the average, whatever the weight is, between 1 and the next.
    rounded.update(BETAS_OF_ZERO | dict(lr=2.0**-8), seed, position, ema_decay=0.5)
    tensors = rounded.param, rounded.exp_avg, rounded.exp_avg_sq, rounded.ema
    found = {}
    for name, tensor in zip(FIELDS, tensors, strict=True):
        up = (tensor > tensor.min()).double()
        assert 0.1 < up.mean().item() < 0.9, name
        found[name] = (up - up.mean()) / up.std()
    return found


Outcomes = Callable[..., dict[str, torch.Tensor]]
CODED_FIELDS = ("weight", "first code", "second code")


def coded_outcomes(device: torch.device, t: int = 1, seed: int = 0, position: int = 0) -> dict[str, torch.Tensor]:
    """As `outcomes`, of 8-bit moments: of 14 in 16 neighbours, of which two set the range."""
    rounded = Rounded(device, PAIRED // 14 * 16, param="bfloat16", param_format="stochastic", moment_format="8bit")
    rounded.step.fill_(t - 1)
    rounded.param.fill_(1 + 2.0**-7)
    rounded.exp_avg.fill_(60)
    rounded.exp_avg.view(-1, 16)[:, 0] = 127
    rounded.exp_avg_sq.fill_(100)
    rounded.groups.fill_(127 << 8 | 4)
    _, v = decoded(rounded, 0, 100)
    step = decoded(rounded, 1, 100)[0]
    gradient = 60.4 * step  # m moves by less than a step of its code
    rounded.grad.fill_(gradient)
    rounded.grad.view(-1, 16)[:, 0] = 127 * step
    _, above = decoded(rounded, 0, 101)
    beta2 = 1 - 0.4 * (above - v) / gradient**2  # and v, whose decay the scale makes up for, to between two codes
    update = gradient / math.sqrt(v / (1 - beta2**t))
    rounded.update(BETAS_OF_ZERO | dict(lr=2.0**-8 / update, beta2=beta2), seed, position)
    found = {}
    for name, tensor in zip(CODED_FIELDS, (rounded.param, rounded.exp_avg, rounded.exp_avg_sq), strict=True):
        others = of_others(tensor)
        up = (others > others.min()).double()
        assert len(shares(others)) == 2 and 0.1 < up.mean().item() < 0.9, (name, shares(others))
        found[name] = (up - up.mean()) / up.std()
    return found


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean product of two centred variables of variance 1."""
    return float((a * b).mean())


def assert_independent(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Check that two variables' correlation is what chance allows."""
    assert abs(correlation(a, b)) <= STANDARD_ERRORS / math.sqrt(a.numel()), (what, correlation(a, b))


@pytest.mark.parametrize("outcomes", [outcomes, coded_outcomes])
def test_neighbours_are_rounded_independently(device: torch.device, outcomes: Outcomes) -> None:
    """Elements 1, 2, 15, 16, 17, 512 and 2^20 apart, in every field and code."""
    for (name, found), distance in itertools.product(outcomes(device).items(), (1, 2, 15, 16, 17, 512, 1 << 20)):
        assert_independent(found[:-distance], found[distance:], f"{name}, {distance} apart")


def test_fields_steps_seeds_and_tensors_are_rounded_independently(device: torch.device) -> None:
    """An element's four roundings; the same rounding in the next step, under another seed, at another position.

    The average is of the weight as it was rounded, and so follows it: it is compared where weights are the same.
    """
    here = outcomes(device)
    for a, b in itertools.combinations(FIELDS, 2):
        first, second = here[a], here[b]
        if b == "average":  # whose distance from the next value depends on the weight
            chosen = here["weight"] > 0
            second = second[chosen]
            if a == "weight":
                continue
            first, second = ((x - x.mean()) / x.std() for x in (first[chosen], second))
        assert_independent(first, second, f"{a} and {b}")
    others: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "next step": lambda: outcomes(device, t=2),
        "another seed": lambda: outcomes(device, seed=1),
        "another tensor": lambda: outcomes(device, position=1),
    }
    for name, run in others.items():
        there = run()
        for a, b in itertools.product(FIELDS, repeat=2):
            if (a, b) == ("weight", "average") or a != "average" != b or a == b:
                assert_independent(here[a], there[b], f"{a} here and {b}, {name}")


def test_codes_are_rounded_independently(device: torch.device) -> None:
    """An element's weight and codes; each beside all in the next step, under another seed, at another position."""
    here = coded_outcomes(device)
    for a, b in itertools.combinations(CODED_FIELDS, 2):
        assert_independent(here[a], here[b], f"{a} and {b}")
    for what, other in {
        "next step": dict(t=2),
        "another seed": dict(seed=1),
        "another tensor": dict(position=1),
    }.items():
        there = coded_outcomes(device, **other)
        for a, b in itertools.product(CODED_FIELDS, repeat=2):
            assert_independent(here[a], there[b], f"{a} here and {b}, {what}")


def chi_squared(classes: np.ndarray, count: int) -> float:
    """Return how far the sizes of equally likely classes lie from equal, in standard deviations."""
    counts = np.bincount(classes, minlength=count)
    expected = classes.size / count
    statistic = float(np.sum((counts - expected) ** 2) / expected)
    return (statistic - (count - 1)) / math.sqrt(2 * (count - 1))


@pytest.mark.parametrize("field", [bits_for_average, bits_for_first_moment, bits_for_second_moment, bits_for_weight])
def test_every_fields_bits_are_uniform(field: Callable[[np.ndarray], np.ndarray]) -> None:
    """Chi-squared of 2^16 classes over eight million elements, for each of the four fields' 16 bits."""
    random = field(random_words(random_key(11, 3, 17), np.arange(1 << 23)))
    assert abs(chi_squared(random.astype(np.int64), 1 << 16)) <= STANDARD_ERRORS
