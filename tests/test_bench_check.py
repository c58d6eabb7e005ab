"""The benchmark's check lets through what does AdamW, and nothing else."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import check, inputs  # noqa: E402  # a neighbour of the tests, not an installed package
from bench.cases import Case, Group  # noqa: E402
from bench.contenders import BETAS, EPS  # noqa: E402

CASE = Case(
    "two groups",
    "two groups",
    (Group(((64, 33), (7,))), Group(((128,),), lr=3e-4, weight_decay=0.0)),
    exceeds_caches=False,
)


def run(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, **options: Any) -> float:
    """What the check says of an optimizer."""
    drawn = inputs.draw(CASE, torch.device("cpu"), dtype)
    return check.check(optimizer(drawn.clone_groups(), eps=EPS, **options), drawn, check.expected(drawn))


class WithScratch(torch.optim.AdamW):
    """AdamW that leaves in the gradients what it needed room for, as optimi's loops do with 16-bit weights."""

    def step(self, closure: Any = None) -> Any:
        """As AdamW's; then the gradients are gone."""
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.copy_(p.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, WithScratch])
def test_adamw_passes(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    """Whatever an optimizer leaves in the gradients: each step's are written anew."""
    assert 0 < run(optimizer, dtype, betas=BETAS) <= 1


@pytest.mark.parametrize("betas", [(BETAS[0], 0.94), (0.89, BETAS[1])])
def test_other_betas_fail(betas: tuple[float, float]) -> None:
    """The steps' gradients differ, so that the moments' decay shows."""
    with pytest.raises(check.CheckFailedError, match="parameter 0 of shape"):
        run(torch.optim.AdamW, torch.float32, betas=betas)


def test_l2_in_the_gradient_fails() -> None:
    """Adam is not AdamW."""
    with pytest.raises(check.CheckFailedError, match="parameter 0 of shape"):
        run(torch.optim.Adam, torch.float32, betas=BETAS)
