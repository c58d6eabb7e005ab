"""The same parameters twice, one set for FusedAdamW and one for torch's optimizer, and what it means that they agree.

Host logic is compared in float64, where torch's sequence and ours differ by a few roundings of 1.1e-16: a step count, a
moment or a learning rate that is wrong shows up at 1e-3.
"""

from collections.abc import Iterable, Sequence

import torch
from tolerances import tolerance

from adamw_kernels import FusedAdamW

# A matrix, a vector and a scalar; small, because every launch of Triton's interpreter costs milliseconds.
SHAPES = ((3, 5), (7,), ())

# What the rest of a weight is kept under, by param_format.
REMAINDER_KEYS = {"split24": "param_remainder_8bit", "split32": "param_remainder"}


def make_params(
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    """Return random parameters, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(value.to(device=device, dtype=dtype)) for value in values]


def copies(params: Iterable[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Return parameters with the same values in memory of their own; no gradients."""
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


class Gradients:
    """A stream of random gradients; the next ones are given to any number of parameter lists alike."""

    def __init__(self, seed: int = 1) -> None:
        """Start at the beginning."""
        self._generator = torch.Generator().manual_seed(seed)

    def give(self, *lists: Iterable[torch.Tensor], present: Iterable[bool] | None = None) -> None:
        """Set `.grad` of every parameter, in each list the same, to fresh memory; None where not `present`."""
        rows = [list(row) for row in zip(*lists, strict=True)]
        for row, has_grad in zip(rows, present or [True] * len(rows), strict=True):
            value = torch.randn(row[0].shape, generator=self._generator, dtype=torch.float64)
            for p in row:
                p.grad = value.to(device=p.device, dtype=p.dtype, copy=True) if has_grad else None


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return every parameter in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def largest(tensor: torch.Tensor) -> float:
    """Return the largest magnitude in a tensor, 0 if it is empty."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_close(got: torch.Tensor, expected: torch.Tensor, name: str, what: str) -> None:
    """Compare two tensors, with the tolerance called `name` relative to the largest expected value."""
    assert got.shape == expected.shape, what
    error = largest(got.detach().cpu().to(torch.complex128) - expected.detach().cpu().to(torch.complex128))
    scale = largest(expected.detach())
    assert error <= tolerance(name) * scale, f"{what}: differs by {error:.2e}, relative {error / (scale or 1):.2e}"


def assert_agree(ours: FusedAdamW, theirs: torch.optim.Optimizer, name: str = "host_logic_in_float64") -> None:
    """Compare weights and moments within a tolerance, and state keys and step counts exactly."""
    pairs = list(zip(params_of(ours), params_of(theirs), strict=True))
    assert len(ours.state) == len(theirs.state)
    for i, (p, q) in enumerate(pairs):
        assert_close(p, q, name, f"parameter {i}")
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        assert mine.keys() == other.keys(), f"state of parameter {i}"
        for key in mine:
            if key == "step":
                assert float(mine[key]) == float(other[key]), f"step of parameter {i}"
            else:
                assert_close(mine[key], other[key], name, f"{key} of parameter {i}")


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Return copies of every weight and state tensor, named."""
    found = []
    for i, p in enumerate(params_of(optimizer)):
        found.append((f"parameter {i}", p.detach().clone()))
        found += [(f"{key} of parameter {i}", v.clone()) for key, v in sorted(optimizer.state.get(p, {}).items())]
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes on the CPU: -0.0 and 0.0 differ, a NaN equals itself."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_unchanged(before: list[tuple[str, torch.Tensor]], after: list[tuple[str, torch.Tensor]]) -> None:
    """Compare two snapshots: the same tensors with the same dtypes and bits."""
    assert [name for name, _ in before] == [name for name, _ in after]
    for (name, a), (_, b) in zip(before, after, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(bits(a), bits(b)), f"{name} differs"


def assert_same_bits(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Compare two optimizers' weights and states bit for bit."""
    assert_unchanged(snapshot(a), snapshot(b))
