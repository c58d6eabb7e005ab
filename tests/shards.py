"""What tests of sharded parameters share: a sharded model and the same one whole, gradients for both, and comparisons.

A shard is compared with the part of the whole that it should be, cut out locally: nothing has to be gathered, which
gloo could not do for every dtype anyway.
"""

from typing import Any

import torch
from pairs import bits, params_of
from torch.distributed.tensor import DTensor, distribute_tensor

from adamw_kernels import FusedAdamW

UNPLACED = ("step", "exp_avg_sq_scale")
"""Scalars of a parameter's state, equal on all ranks and no DTensors."""

FORMATS: dict[str, dict[str, Any]] = {
    "split32/float32": dict(param_format="split32", moment_format="float32"),
    "split24/8bit": dict(param_format="split24", moment_format="8bit", seed=3),
    "stochastic/8bit": dict(param_format="stochastic", moment_format="8bit", seed=4),
    "stochastic/bfloat16 with EMA": dict(
        param_format="stochastic", moment_format="bfloat16", ema_decay=0.9, ema_format="bfloat16", seed=5
    ),
}

KEYS: dict[str, set[str]] = {
    "split32/float32": {"exp_avg", "exp_avg_sq", "param_remainder"},
    "split24/8bit": {"exp_avg_code", "exp_avg_sq_code", "moment_groups", "exp_avg_sq_scale", "param_remainder_8bit"},
    "stochastic/8bit": {"exp_avg_code", "exp_avg_sq_code", "moment_groups", "exp_avg_sq_scale"},
    "stochastic/bfloat16 with EMA": {"exp_avg", "exp_avg_sq", "param_ema"},
}
"""State of a large parameter beside `step`."""


class Model(torch.nn.Module):
    """Embedding, Linear, LayerNorm, Linear: over two ranks and four, shards are even, uneven and empty.

    Three weights are large enough for 8-bit moments; that of the last layer is one row, of which most ranks have
    nothing.
    """

    def __init__(self) -> None:
        """Draw the weights from a fixed seed."""
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(71, 64)
        self.even = torch.nn.Linear(64, 64)
        self.uneven = torch.nn.Linear(64, 66)
        self.norm = torch.nn.LayerNorm(66)
        self.last = torch.nn.Linear(64 * 64, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """One number for each row of 64 tokens."""
        hidden = torch.tanh(self.even(self.embedding(tokens)))
        hidden = self.norm(self.uneven(hidden))[..., :64]
        return self.last(hidden.flatten(1))  # type: ignore[no-any-return]


def tokens(step: int, rows: int = 4) -> torch.Tensor:
    """A batch."""
    return torch.randint(0, 71, (rows, 64), generator=torch.Generator().manual_seed(step))


def full_gradients(model: torch.nn.Module, step: int) -> list[torch.Tensor]:
    """Random gradients of a whole model, the same for the same step; of very different sizes."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (10.0 ** (-i % 4) * torch.randn(p.shape, generator=generator)).to(p.dtype)
        for i, p in enumerate(model.parameters())
    ]


def part_like(full: torch.Tensor, placed: Any) -> Any:
    """This rank's part of a tensor that every rank knows, placed as a DTensor is."""
    return distribute_tensor(full, placed.device_mesh, placed.placements, src_data_rank=None)


def give(model: torch.nn.Module, gradients: list[torch.Tensor]) -> None:
    """Set every parameter's gradient; a DTensor's is its part."""
    for p, grad in zip(model.parameters(), gradients, strict=True):
        p.grad = part_like(grad, p) if isinstance(p, DTensor) else grad.clone()


def assert_part(part: Any, full: torch.Tensor, what: str) -> None:
    """A DTensor holds, bit for bit, its part of the whole; a plain tensor the whole."""
    expected = part_like(full, part).to_local() if isinstance(part, DTensor) else full
    local = part.to_local() if isinstance(part, DTensor) else part
    assert (local.dtype, local.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(bits(local), bits(expected)), f"{what} differs"


def assert_parts_of(sharded: FusedAdamW, judge: FusedAdamW) -> None:
    """Weights, float32 weights and states are those of the whole run; states of DTensors are placed as they are."""
    weights, full_weights = sharded.fp32_weights(), judge.fp32_weights()
    for i, (p, q) in enumerate(zip(params_of(sharded), params_of(judge), strict=True)):
        assert_part(p.detach(), q.detach(), f"parameter {i}")
        assert_part(weights[p], full_weights[q], f"float32 weight {i}")
        assert sharded.state[p].keys() == judge.state[q].keys(), f"state of parameter {i}"
        for key, value in sharded.state[p].items():
            full = judge.state[q][key]
            if isinstance(p, DTensor) and key not in UNPLACED:
                assert isinstance(value, DTensor), f"{key} of parameter {i}"
                placing = value.device_mesh, value.placements
                assert placing == (p.device_mesh, p.placements), f"{key} of parameter {i}"
                assert value.shape == full.shape, f"{key} of parameter {i}"
            else:
                assert not isinstance(value, DTensor)
            assert_part(value, full, f"{key} of parameter {i}")
